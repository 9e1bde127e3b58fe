"""The fleet file: one TOML file from which every role takes its part.

Each role has one frozen class; each field says its meaning, unit, and where the default comes from. A key that nobody
knows is an error that names it and the nearest one known; so is a value of the wrong type, a path that does not exist,
and a name that refers to nothing.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args

import msgspec
from msgspec.structs import replace

from interlock.broker.agent_checks import check_handlers, check_host_places, check_revision, near
from interlock.broker.bounds import check_place, check_values
from interlock.broker.errors import ConfigError
from interlock.broker.freeze import Window, parse_zone
from interlock.broker.strategies import (
    BUILT_IN,
    STRATEGY_OF,
    Level,
    StrategyConfig,
    StrategyName,
    _Config,
    check_strategy,
)
from interlock.broker.topics import RESERVED, check_name

_ENDPOINT = re.compile(
    r"(tcp://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._*-]+):(\d{1,5}|\*)|ipc://.+|(http|stream)://[A-Za-z0-9._*-]+:\d{1,5})"
)


HOSTS_PER_S = (
    400  # hosts for each second between the pings of a link: what they cost a broker stays below 5 % of a core
)
MAX_FILE = 16 << 20  # characters: 10,000 hosts with an agent each take 3 million


class BrokerConfig(_Config, frozen=True, kw_only=True):
    """Where the two planes of the bus listen; every role connects there."""

    events: str = "tcp://127.0.0.1:7171"  # publishers of events, replay, acknowledgements (ROUTER)
    feed: str = "tcp://127.0.0.1:7172"  # subscribers of events (XPUB)
    telemetry_in: str = "tcp://127.0.0.1:7173"  # publishers of telemetry (ROUTER)
    telemetry_out: str = "tcp://127.0.0.1:7174"  # subscribers of telemetry (XPUB)
    heartbeat_s: float = 1.0  # between pings of a link; by itself 1, and with more than 400 hosts a second for each 400


PLACES = ("events", "feed", "telemetry_in", "telemetry_out")  # the keys of a BrokerConfig that are endpoints


class SecurityConfig(_Config, frozen=True, kw_only=True):
    """closed: every connection is encrypted and proves who it is. insecure: anybody on this machine may do anything."""

    mode: Literal["closed", "insecure"] = "closed"  # insecure: on the loopback only, and it warns
    keys: str = "keys"  # folder of the keys and the authority, relative to the state folder


class LogConfig(_Config, frozen=True, kw_only=True):
    """How long the event log remembers. What no snapshot stands for yet, or an open migration needs, stays anyway."""

    keep_days: float = 30.0  # events older than this are dropped: a month of history for whoever looks into a failure
    keep_mb: float = 1024.0  # and the oldest beyond so many MiB: some 2 million events, replayed in a minute


class CoordinatorConfig(_Config, frozen=True, kw_only=True):
    """The times by which the coordinator and the hosts judge each other."""

    lease_s: float = 6.0  # a live candidate loses its share if the coordinator is silent for this long
    step_margin_s: float = 15.0  # added to a step's own time before it counts as failed
    approval_s: float = 3600.0  # a stage that nobody approves for so long is rolled back: an operator is awake
    pause_s: float = 3600.0  # so is a migration that is paused for longer: two revisions cost twice
    hold_s: float = 86_400.0  # and one that is held for longer: somebody looks once a day


class FreezeWindow(_Config, frozen=True, kw_only=True):
    """A time in which no migration begins: each week ("Fri 16:00"), or once ("2026-12-24T12:00"). Rollbacks go on."""

    start: str = msgspec.field(name="from")  # a day and a time of the week, or ISO 8601
    end: str = msgspec.field(name="to")  # of the same kind; not frozen any more from then on
    because: str  # told to whoever asks meanwhile

    @property
    def window(self) -> Window:
        return Window.parse(self.start, self.end)


class FreezeConfig(_Config, frozen=True, kw_only=True):
    """When the fleet stays as it is. An operator may override it with `--because`."""

    timezone: str = ""  # such as "Europe/Berlin", of times that name no zone; empty: of the coordinator's machine
    windows: list[FreezeWindow] = []  # times in which no migration begins


class RulesConfig(_Config, frozen=True, kw_only=True):
    """What the rule engine evaluates."""

    # rule files, relative to the fleet file; "default" names the rules that ship. None named: only those
    files: list[str] = []
    answers: str = ""  # where it is asked (rules eval, explain); empty: a socket in its state folder
    partitions: int = 1  # processes that share the fleet's hosts; one takes some 100,000 samples a second


class SimulatedGpu(_Config, frozen=True, kw_only=True):
    """A card that exists in a file only, for demos and tests."""

    name: str = "simulated"  # as the monitor reports it
    memory_bytes: int = 24 * 1024**3  # as much as a common 24 GB card


class MonitorTemplate(_Config, frozen=True, kw_only=True):
    """Which metrics of its agents' processes are read how often. NAME: a category. Those not named stay as they are."""

    hot: list[str] = []  # metrics to read every `migrating_s` while a migration touches the host
    calm: list[str] = []  # metrics to read every `idle_s`
    slow: list[str] = []  # metrics to read every `slow_s`
    off: list[str] = []  # metrics not to read


class MonitorConfig(_Config, frozen=True, kw_only=True):
    """How often hosts and monitors measure, and which GPUs there are."""

    idle_s: float = 1.0  # between samples of a host where nothing moves
    migrating_s: float = 0.1  # between samples while a migration touches the host: the largest part of a reaction
    slow_s: float = 10.0  # between samples of what changes slowly or costs much to read: disks, context switches
    # auto: NVIDIA's cards where its library and driver are, else those of AMD and Intel (drm)
    gpu: Literal["auto", "nvidia", "drm", "simulated", "none"] = "auto"
    gpu_call_s: float = 0.4  # a call into the GPUs' driver that takes longer hangs; readings take at most some 100 ms
    simulated: list[SimulatedGpu] = []  # with gpu = "simulated": the cards there are
    templates: dict[str, MonitorTemplate] = {}  # by category of agent: what differs from what is usual for it


class HostConfig(_Config, frozen=True, kw_only=True):
    """A host: a process that runs agents, one machine or a part of one."""

    control: str  # where this host takes rollbacks and leases directly (ROUTER)
    link: str = ""  # where other hosts reach this one to move agents (ROUTER); empty: none moves to or from here
    monitor: bool = True  # `interlock up` starts a monitor for it
    backups: int = 5  # newest backups kept of each agent: one is made whenever a migration of it begins
    cgroups: Literal["auto", "none"] = "auto"  # auto: a cgroup for each instance, where this host may make one


class ProbeConfig(_Config, frozen=True, kw_only=True):
    """How to ask a program whether it is well.

    zmq: send `request` to the REQ/REP port, expect each key of `expect` in the JSON or MessagePack answer. http: GET
    `path`, expect a status below 400 (and `expect` in a JSON body). tcp: the port accepts. script: `command` exits 0.
    """

    kind: Literal["zmq", "http", "tcp", "script"]  # how it is asked
    port: Literal["request", "health"] = "health"  # which of the instance's two ports is asked
    request: dict[str, Any] = msgspec.field(default_factory=lambda: {"action": "health"})  # zmq: sent as JSON
    path: str = "/health"  # http: of the GET
    expect: dict[str, Any] = {}  # zmq, http: keys that the answer must have, with these values
    command: list[str] = []  # script: the program and its arguments, run in the source folder
    timeout_s: float = 1.0  # an answer later than this is a failed check


class NeedsConfig(_Config, frozen=True, kw_only=True):
    """What a process of the revision takes of the machine, where it is not what the one before it takes."""

    memory_mb: float = 0.0  # MiB of memory, with all that it starts; 0: as the one before takes
    gpu_memory_mb: float = 0.0  # MiB of GPU memory; 0: as the one before takes


class StateConfig(_Config, frozen=True, kw_only=True):
    """How a program hands its state in memory to the process that follows it: commands, run in the source folder.

    Placeholders as in `command`; the environment is the program's own. One that does not exit with 0 has failed.
    """

    give: list[str]  # writes the state to its standard output
    take: list[str]  # reads it from its standard input; when it exits with 0, the program has it
    quiesce: list[str] = []  # before `give`: the program stops working by itself; none: it does nothing by itself
    resume: list[str] = []  # undoes that: where the hand-over failed, and in the program that has the state


class RevisionConfig(_Config, frozen=True, kw_only=True):
    """One revision of an agent: a class on our base class (`entry`), or any program (`command`).

    In `command` and `env`, {port}, {health_port}, {python}, {source}, {revision} and {agent} are filled in.
    """

    source: str = ""  # the folder of its code, relative to the fleet file; recorded as a whole
    entry: str = ""  # "module:Class", imported from the source folder
    command: list[str] = []  # the program and its arguments, run in the source folder
    python: str = ""  # the interpreter of its environment; empty: the host's own
    config: dict[str, Any] = {}  # handed to the agent as it is
    env: dict[str, str] = {}  # added to the environment
    probe: ProbeConfig | None = None  # of a program; a class answers for itself
    start_timeout_s: float = 30.0  # not healthy by then: it failed to start
    stop_timeout_s: float = 5.0  # after SIGTERM, before SIGKILL
    state: StateConfig | None = None  # of a program that keeps state in memory; a class has hooks for it
    needs: NeedsConfig = NeedsConfig()  # checked before it is started; no part of what the revision is

    @property
    def kind(self) -> Literal["class", "exec"]:
        return "class" if self.entry else "exec"


class HandlerCompare(_Config, frozen=True, kw_only=True):
    """How the answers to one action are compared. NAME: the action; of HTTP "METHOD /path", which stands for all below.

    A function takes `(request, old, new)` and returns True, False, or the difference as a text.
    """

    mode: Literal["equal", "exact"] = "equal"  # equal: the same values; exact: the same bytes
    ignore: list[str] | None = None  # instead of the agent's
    tolerance: float | None = None  # instead of the agent's
    function: str = ""  # "module:function" in the candidate's source: it decides alone, in a process of its own


class CompareConfig(_Config, frozen=True, kw_only=True):
    """How the answers of a candidate are held against those of the serving revision."""

    ignore: list[str] = []  # keys of the answer, at any depth, that may differ
    tolerance: float = 0.0  # numbers may differ by this, relative to the larger
    handlers: dict[str, HandlerCompare] = {}  # where one action is compared in another way
    timeout_s: float = 1.0  # for a function to judge one pair; then its process is killed, and the pair is an error
    errors: int = 0  # pairs that a function may fail to judge; one more, and the shadow run ends with the verdict error


class AgentConfig(_Config, frozen=True, kw_only=True):
    """An agent: where it runs, what its clients connect to, and the revisions there are of it."""

    host: str  # one of [hosts]
    endpoints: dict[str, str] = {}  # by host: where clients find it once it was moved there
    endpoint: str = ""  # tcp:// or ipc:// for ZeroMQ clients, http://, stream:// for other TCP; empty: it has no port
    serve: str  # the revision that serves until another is committed
    revisions: dict[str, RevisionConfig]  # by name; a name that was committed once keeps its content for good
    category: Literal["gpu-model", "service", "worker", "voice", "utility"] = "service"  # what waves go by
    depends: list[str] = []  # what it needs: agents of this fleet, or endpoints (tcp://, http://)
    level: Level = "medium"  # low: rapid, medium: staged, high: framework, critical: custom
    strategy: Literal["rapid", "staged", "framework", "custom", ""] = ""  # empty: by level
    idempotent: list[str] | bool = False  # exec: actions (HTTP: "METHOD /path") that may be asked twice
    side_effects: list[str] = []  # actions (HTTP: "METHOD /path") that are never mirrored; a class declares its own
    action_field: str = "action"  # exec: the key of a JSON or MessagePack request that names the action
    window: int = 0  # requests outstanding at an instance at once; 0: 1 for a REP program, 64 for a class or HTTP
    compare: CompareConfig = CompareConfig()  # of the answers in shadow
    hand_over_s: float = 5.0  # requests wait this long for state in memory to be handed over; then the old one goes on
    hand_back: bool = True  # at a rollback the candidate's newer state goes back, if it can still give it
    request_timeout_s: float = 30.0  # a request unanswered for so long is answered with an error
    hold_s: float = 10.0  # requests wait this long for an instance to come back, then get an error
    health_period_s: float = 1.0  # between health checks
    health_failures: int = 3  # in a row, then a candidate is rolled back and a permanent instance restarted

    @property
    def serves(self) -> Literal["requests", "connections", "nothing"]:
        """What its clients bring: requests (ZeroMQ, HTTP), connections (other TCP); nothing without an endpoint."""
        if not self.endpoint:
            return "nothing"
        return "connections" if self.endpoint.startswith("stream://") else "requests"

    def endpoint_at(self, host: str) -> str:
        """Where clients find it on a host; "" if it can't be there."""
        return self.endpoints.get(host, self.endpoint if host == self.host else "")

    @property
    def strategy_name(self) -> StrategyName:
        return self.strategy or STRATEGY_OF[self.level]


class FleetConfig(_Config, frozen=True, kw_only=True):
    """The whole file. `path` is where it was read from; relative paths in it start at its folder."""

    name: str = "fleet"  # for people
    state: str = ".interlock"  # folder of logs, journals, revisions, backups and locks
    broker: BrokerConfig = BrokerConfig()  # where the bus listens
    security: SecurityConfig = SecurityConfig()  # who may take part
    log: LogConfig = LogConfig()  # how much of the event log is kept
    coordinator: CoordinatorConfig = CoordinatorConfig()  # its deadlines
    rules: RulesConfig = RulesConfig()  # which rule files hold
    monitor: MonitorConfig = MonitorConfig()  # how often is measured
    strategies: dict[
        str, StrategyConfig
    ] = {}  # "rapid", "staged", "framework", "custom", in place of the built-in ones
    freeze: FreezeConfig = FreezeConfig()  # when no migration begins
    hosts: dict[str, HostConfig] = {}  # by name
    agents: dict[str, AgentConfig] = {}  # by name
    path: str = ""  # not a key of the file: where it was read from

    @property
    def folder(self) -> Path:
        return Path(self.path).resolve().parent if self.path else Path.cwd()

    @property
    def state_dir(self) -> Path:
        return self.folder / self.state

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / self.security.keys

    def strategy(self, name: StrategyName) -> StrategyConfig:
        return self.strategies.get(name) or BUILT_IN[name]

    def agents_of(self, host: str) -> dict[str, AgentConfig]:
        return {name: agent for name, agent in self.agents.items() if agent.host == host}


def load_fleet(path: str | os.PathLike[str]) -> FleetConfig:
    """The fleet file at `path`, checked. ConfigError says which key is wrong and what is near it."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file", where=str(path), hint="name your fleet file with --fleet, or set INTERLOCK_FLEET"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None
    if len(text) > MAX_FILE:
        raise ConfigError(f"is longer than {MAX_FILE} characters", where=str(path), hint="is it a fleet file?")
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, or a number of 5,000 digits
        raise ConfigError(f"is not TOML: {error or 'nested too deeply'}", where=str(path)) from None
    if not tree:
        raise ConfigError("is empty", where=str(path), hint="the smallest fleet stands in docs/fleet-file.md")
    return parse_fleet(tree, path=str(path))


def parse_fleet(tree: dict[str, Any], *, path: str = "") -> FleetConfig:
    """The same from a tree of plain values (what TOML parses to)."""
    where = path or "fleet"
    if "path" in tree:  # ours: where the file is
        raise _explain("Object contains unknown field `path`", tree, where)
    try:
        fleet = msgspec.convert({**tree, "path": path}, FleetConfig)
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where) from None
    except msgspec.ValidationError as error:
        raise _explain(str(error), tree, where) from None
    _check(fleet, where)
    broker = tree.get("broker", {})
    if "heartbeat_s" in broker:
        return fleet
    return replace(fleet, broker=replace(fleet.broker, heartbeat_s=heartbeat_of(len(fleet.hosts))))


def heartbeat_of(hosts: int) -> float:
    """Seconds between the pings of a link, in a fleet of so many hosts that says nothing of it."""
    return min(max(1.0, hosts / HOSTS_PER_S), 60.0)


def _explain(message: str, tree: dict[str, Any], where: str) -> ConfigError:
    """msgspec's message in the words of the file: the dotted key, and the nearest known key."""
    text, _, location = message.partition(" - at `")
    found = re.search(r"unknown field `(.+?)`", text)
    place = location.rstrip("`").removeprefix("$").lstrip(".")
    place = _name_path(place, tree, found[1] if found else None)
    if found is None:
        return ConfigError(text[0].lower() + text[1:], where=f"{where}: {place or 'top level'}")
    near = difflib.get_close_matches(found[1], _keys_of(location), n=1)
    return ConfigError(
        f"unknown key {found[1]!r}",
        where=f"{where}: {place or 'top level'}",
        hint=f"did you mean {near[0]!r}?" if near else "see the reference of the fleet file in docs/fleet-file.md",
    )


def _keys_of(location: str) -> list[str]:
    """The keys of the table that msgspec calls `$.agents[...].revisions[...]`."""
    kind: Any = FleetConfig
    for step in re.findall(r"\[[^\]]*\]|[^.$`\[\]]+", location):
        if step.startswith("["):
            kind = get_args(kind)[-1]
        else:
            kind = next(field.type for field in msgspec.structs.fields(kind) if field.encode_name == step)
        if isinstance(kind, UnionType):
            kind = next(each for each in get_args(kind) if each is not NoneType)
    return [name for name in kind.__struct_encode_fields__ if (kind, name) != (FleetConfig, "path")]


def _name_path(place: str, tree: Any, unknown: str | None) -> str:
    """`agents[...].revisions[...]` with the real names, as far as they can be told (the one that has the bad key)."""
    keys = re.findall(r"\[\.\.\.\]|\[\d+\]|[^.\[\]]+", place)

    def walk(node: Any, rest: list[str], trail: str) -> str | None:
        if not rest:
            return trail if unknown is None or (isinstance(node, dict) and unknown in node) else None
        if rest[0] == "[...]":
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for name, child in items:
                if (found := walk(child, rest[1:], f"{trail}.{name}")) is not None:
                    return found
            return None
        if re.fullmatch(r"\[\d+\]", rest[0]) and isinstance(node, list):
            return walk(node[int(rest[0][1:-1])], rest[1:], trail + rest[0])
        if isinstance(node, dict) and rest[0] in node:
            return walk(node[rest[0]], rest[1:], f"{trail}.{rest[0]}")
        return f"{trail}.{rest[0]}" if len(rest) == 1 and unknown is None else None

    return (walk(tree, keys, "") or place).lstrip(".")


def _check(fleet: FleetConfig, where: str) -> None:
    check_values(fleet, "", where)
    taken: dict[str, str] = {}

    def endpoint(value: str, key: str, *, public: bool = False) -> None:
        if not _ENDPOINT.fullmatch(value) or (value.startswith(("http", "stream")) and not public):
            kinds = "tcp://ADDRESS:PORT or ipc://PATH" + (", http://ADDRESS:PORT or stream://ADDRESS:PORT" * public)
            raise ConfigError(f"{value!r} is not an endpoint", where=f"{where}: {key}", hint=f"use {kinds}")
        check_place(value, f"{where}: {key}", any_port=key.endswith(".control"))
        place = value.split("://", 1)[1]
        if place in taken and not place.endswith(":*"):
            raise ConfigError(f"{value} is already used by {taken[place]}", where=f"{where}: {key}")
        taken[place] = key

    places = {f"broker.{name}": getattr(fleet.broker, name) for name in PLACES}
    places |= {"rules.answers": fleet.rules.answers} if fleet.rules.answers else {}
    for key, value in places.items():
        endpoint(value, key)
    for name, host in fleet.hosts.items():
        check_name(name, where=f"{where}: hosts")
        if name in RESERVED:
            raise ConfigError(f"no host may be called {name!r}", where=f"{where}: hosts", hint="choose another name")
        endpoint(host.control, f"hosts.{name}.control")
        if host.link:
            endpoint(host.link, f"hosts.{name}.link")
    for name in fleet.strategies:
        if name not in BUILT_IN:
            raise ConfigError(f"unknown strategy {name!r}", where=f"{where}: strategies", hint=", ".join(BUILT_IN))
        check_strategy(fleet.strategies[name], f"{where}: strategies.{name}")
    _check_freeze(fleet.freeze, f"{where}: freeze")
    for name, agent in fleet.agents.items():
        check_name(name, where=f"{where}: agents")
        key = f"agents.{name}"
        if agent.endpoint:
            endpoint(agent.endpoint, f"{key}.endpoint", public=True)
        if agent.host not in fleet.hosts:
            raise ConfigError(
                f"unknown host {agent.host!r}", where=f"{where}: {key}.host", hint=near(agent.host, fleet.hosts)
            )
        if agent.serve not in agent.revisions:
            raise ConfigError(
                f"unknown revision {agent.serve!r}",
                where=f"{where}: {key}.serve",
                hint=near(agent.serve, agent.revisions),
            )
        for there, place in check_host_places(fleet, agent, f"{where}: {key}.endpoints"):
            endpoint(place, f"{key}.endpoints.{there}", public=True)
        _check_needed(fleet, name, f"{where}: {key}.depends")
        check_handlers(agent, f"{where}: {key}")
        for revision_name, revision in agent.revisions.items():
            check_name(revision_name, where=f"{where}: {key}.revisions")
            check_revision(fleet, agent, revision, f"{where}: {key}.revisions.{revision_name}")


def _check_needed(fleet: FleetConfig, name: str, where: str) -> None:
    for needed in fleet.agents[name].depends:
        if needed == name or not (needed in fleet.agents or re.match(r"(tcp|http)://.", needed)):
            raise ConfigError(
                f"{needed!r} is no other agent of this fleet, and no endpoint",
                where=where,
                hint=near(needed, {other: None for other in fleet.agents if other != name}),
            )


def _check_freeze(freeze: FreezeConfig, where: str) -> None:
    parse_zone(freeze.timezone, where=f"{where}.timezone")
    for number, window in enumerate(freeze.windows):
        Window.parse(window.start, window.end, where=f"{where}.windows[{number}]")


def source_of(fleet: FleetConfig, revision: RevisionConfig, *, where: str) -> Path:
    """The folder of a revision's code; ConfigError if it is not there."""
    folder = (fleet.folder / revision.source).resolve()
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=f"{where}: source {folder}")
    return folder
