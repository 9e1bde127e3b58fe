"""A host that speaks for what is not its own, as transcripts: nobody believes it, and it is counted.

Agent echo is on alpha; beta, which has an agent of its own, is hostile, or has a wrong fleet file.
"""

from __future__ import annotations

from typing import Any

import msgspec

from event_parts import logged
from interlock.broker import commands, facts, topics
from interlock.broker.commands import Breach
from interlock.broker.facts import MigrationStarted, RolledBack, SlotChanged
from interlock.broker.policy import BY_HOST
from interlock.broker.samples import Announcement, Batch, labels
from interlock.broker.wire import Body
from interlock.coordinator.fleet import KEPT_MIGRATIONS, Fleet
from interlock.coordinator.ownership import KEPT_CLAIMS, owner
from interlock.coordinator.rules.decisions import RuleDecisions
from interlock.coordinator.rules.inflight import InFlight
from interlock.coordinator.rules.intake import Intake
from interlock.coordinator.rules.rulefile import parse_rules

PLACED = {"echo": "alpha", "own": "beta"}
BREACH = Breach(by="host beta", reason="it says so", sample_time=5.0)
STARTED = MigrationStarted(
    migration="echo-7", epoch=7, agent="echo", host="alpha", previous="v1", to="v2", strategy="staged", request="r"
)
TALE: list[Body] = [
    facts.HostUp(host="alpha", control="tcp://alpha:1", pid=10, boot="b", agents=["echo"]),
    facts.HostUp(host="beta", control="tcp://beta:1", pid=11, boot="b", agents=["own"]),
    SlotChanged(host="alpha", agent="echo", state="serving", permanent="v1", endpoint="tcp://e"),
    SlotChanged(host="beta", agent="own", state="serving", permanent="v1", endpoint="tcp://o"),
    facts.InstanceStarted(
        host="alpha", agent="echo", instance="i1", revision="v1", role="permanent", pid=12, started=1.0
    ),
    STARTED,
    SlotChanged(
        host="alpha", agent="echo", state="live", permanent="v1", candidate="v2", share=0.1, migration="echo-7", epoch=7
    ),
]  # fmt: skip


def lies(host: str = "beta", agent: str = "echo", migration: str = "echo-7") -> list[Body]:
    """All that a host can say of an agent and its migration, and everything in it is wrong."""
    of: dict[str, Any] = {"host": host, "agent": agent}
    in_it = of | {"migration": migration, "epoch": 7}
    step: dict[str, Any] = in_it | {"step": "commit", "command": "echo-7/5"}
    instance: dict[str, Any] = of | {"instance": "i1", "revision": "v9", "role": "permanent"}
    return [
        SlotChanged(**in_it, state="serving", permanent="v9", endpoint="tcp://mine"),
        SlotChanged(**of, state="serving", permanent="v2", epoch=7),
        SlotChanged(**of, state="serving", permanent="v9", epoch=1 << 50),
        facts.InstanceStarted(**instance, pid=1, started=1.0),
        facts.InstanceStopped(**instance, returncode=0, expected=True),
        facts.StepDone(**step),
        facts.StepFailed(**step, check="health", reason="it says so"),
        facts.CommandRefused(**of, migration=migration, command="echo-7/5", reason="it says so"),
        RolledBack(
            **in_it, revision="v1", level=1, breach=BREACH, received=1.0, routed=1.0, restored=1.0, verified=True
        ),
        facts.RollBackEscalated(**in_it, breach=BREACH, level=2, reason="it says so"),
        facts.RollBackFailed(**in_it, breach=BREACH, reason="it says so"),
        facts.DrillDone(**of, revision="v1", seconds={"1": 0.001}),
    ]  # fmt: skip


def view(*bodies: Body, placed: dict[str, str] | None = PLACED) -> Fleet:
    fleet = Fleet(placed)
    say(fleet, *bodies)
    return fleet


def say(fleet: Fleet, *bodies: Body, host: str = "") -> list[bool]:
    """What comes of it, by body; `host` says it instead of the one that the body names."""
    return [fleet.apply(logged(body, fleet.position + 1, host=host)) for body in bodies]


def shown(fleet: Fleet) -> dict[str, Any]:
    tree = fleet.to_json()
    return {name: tree[name] for name in ("hosts", "agents", "migrations")}


def test_what_a_host_says_of_anothers_agent_changes_nothing_whatever_it_is() -> None:
    fleet = view(*TALE)
    before = shown(fleet)
    told = lies()
    assert {type(body) for body in told} == set(BY_HOST) - {facts.HostUp, facts.HostDown}
    assert not any(say(fleet, *told))
    assert shown(fleet) == before
    assert fleet.claims.total == len(told)


def test_a_host_that_names_another_in_the_body_is_not_believed_either() -> None:
    fleet = view(*TALE)
    before = shown(fleet)
    gone = [
        facts.HostDown(host="alpha"),
        facts.HostUp(host="alpha", control="tcp://beta:1", pid=1, boot="x", agents=["echo"]),
    ]
    assert not any(say(fleet, *lies(host="alpha"), *gone, host="beta"))
    assert shown(fleet) == before


def test_a_host_can_not_bring_anothers_migration_into_what_it_says_of_its_own_agent() -> None:
    fleet = view(*TALE)
    before = shown(fleet)
    say(fleet, *(body for body in lies(agent="own") if getattr(body, "migration", None)))
    assert shown(fleet)["migrations"] == before["migrations"]


def test_a_host_that_says_it_is_up_with_anothers_agents_has_its_own_only() -> None:
    fleet = view(*TALE)
    say(fleet, facts.HostUp(host="beta", control="tcp://beta:2", pid=20, boot="b", agents=["echo", "own", "new"]))
    assert fleet.hosts["beta"].agents == ["own"]
    assert fleet.agents["echo"].host == "alpha"
    assert list(fleet.agents["echo"].instances) == ["i1"]
    say(fleet, facts.HostDown(host="beta"))
    assert list(fleet.agents["echo"].instances) == ["i1"]


def test_a_migration_that_a_host_spoke_of_before_there_was_one_is_as_the_coordinator_begins_it() -> None:
    fleet = view(*TALE[:-2])
    say(fleet, *lies(agent="own"))  # it guesses the name
    say(fleet, STARTED)
    found = fleet.migrations["echo-7"]
    assert (found.agent, found.host, found.outcome, found.in_flight) == ("echo", "alpha", "", True)


def test_made_up_migrations_of_a_hosts_own_agent_are_forgotten() -> None:
    fleet = view(*TALE)
    for number in range(KEPT_MIGRATIONS + 50):
        say(fleet, lies(agent="own", migration=f"own-{number}")[5])
    assert len(fleet.migrations) <= KEPT_MIGRATIONS + 2
    assert fleet.migrations["echo-7"].in_flight


def test_the_host_that_was_ordered_to_move_an_agent_is_believed_to_the_end_though_the_file_has_it_elsewhere_now() -> (
    None
):
    fleet = view(*TALE)
    fleet.placed = {"echo": "beta", "own": "beta"}
    assert all(say(fleet, *lies(host="alpha")[5:6]))
    assert fleet.migrations["echo-7"].outcome == "committed"
    assert not any(say(fleet, *lies(host="beta")[5:6]))


def test_an_agent_that_left_a_host_is_its_new_hosts_alone_and_begins_there_anew() -> None:
    fleet = view(*TALE[:-2])
    fleet.placed = {"echo": "beta", "own": "beta"}
    assert not any(say(fleet, SlotChanged(host="alpha", agent="echo", state="serving", permanent="v1")))
    assert all(say(fleet, SlotChanged(host="beta", agent="echo", state="serving", permanent="v3")))
    found = fleet.agents["echo"]
    assert (found.host, found.permanent, found.instances) == ("beta", "v3", {})


def test_an_agent_that_the_file_does_not_name_is_nobodys_until_the_coordinator_orders_something() -> None:
    serving = SlotChanged(host="gamma", agent="late", state="serving", permanent="v1")
    fleet = view()
    assert say(fleet, serving) == [False]
    assert "late" not in fleet.agents
    begun = msgspec.structs.replace(STARTED, migration="late-9", agent="late", host="gamma")
    assert say(fleet, begun, serving) == [True, True]
    assert fleet.agents["late"].permanent == "v1"


def test_without_a_file_an_agent_belongs_to_whoever_spoke_of_it_first() -> None:
    fleet = view(*TALE, placed=None)
    before = shown(fleet)
    assert not any(say(fleet, *lies()))
    assert shown(fleet) == before


def test_the_file_comes_before_the_order_and_nobody_is_somebody_only_without_a_file() -> None:
    assert owner("echo", PLACED, "") == "alpha"
    assert owner("echo", PLACED, "beta") == "alpha"
    assert owner("late", PLACED, "beta") == "beta"
    assert owner("late", PLACED, "") == ""
    assert owner("late", None, "beta") == "beta"
    assert owner("late", None, "") is None


def test_each_host_and_agent_is_told_once_and_only_so_many_of_them() -> None:
    fleet = view(*TALE)
    say(fleet, *lies(), *lies(), host="beta")
    (line,) = fleet.claims.news()
    assert "host/beta speaks for agent echo" in line
    assert fleet.claims.news() == []
    (claim,) = fleet.to_json()["claims"]
    assert claim == {"source": "host/beta", "agent": "echo", "count": 2 * len(lies())}
    for number in range(KEPT_CLAIMS + 50):
        say(fleet, SlotChanged(host="beta", agent=f"a{number}", state="serving", permanent="v1"), host="beta")
    assert len(fleet.to_json()["claims"]) == KEPT_CLAIMS
    assert fleet.claims.total == 2 * len(lies()) + KEPT_CLAIMS + 50


# --- the coordinator


TWO = {"alpha": {"control": "tcp://127.0.0.1:7181"}, "beta": {"control": "tcp://127.0.0.1:7182"}}


def test_a_hostile_host_neither_moves_nor_ends_nor_undoes_a_migration(story: Any) -> None:
    tale = story(hosts=TWO)
    tale.migrate()
    tale.done()
    migration = tale.migration
    before = (migration.phase, migration.index, migration.outcome)
    for body in lies(agent="tutor", migration=migration.id):
        lie = msgspec.structs.replace(body, **({"command": tale.asked().header.id} if hasattr(body, "command") else {}))
        tale.say(topics.host_fact("beta"), lie)
        assert tale.run() == []
    undo = commands.RollBack(
        migration=migration.id, agent="tutor", epoch=migration.started.epoch, breach=BREACH, issued=1.0
    )
    tale.say(topics.rollback("beta"), undo)
    assert tale.run() == []
    assert (tale.migration.phase, tale.migration.index, tale.migration.outcome) == before
    tale.restart()
    assert (tale.migration.phase, tale.migration.index, tale.migration.outcome) == before
    tale.say(topics.rollback("alpha"), undo)
    assert tale.migration.phase == "rolling-back"


def test_a_host_that_comes_with_an_agent_of_a_newer_fleet_file_is_believed_without_a_restart(story: Any) -> None:
    tale = story(hosts=TWO)
    before = tale.config
    serving = SlotChanged(host="beta", agent="tutor", state="serving", permanent="r1")
    up = facts.HostUp(host="beta", control="c", pid=2, boot="b", agents=["tutor"])
    tale.say(topics.host_fact("beta"), up)
    tale.say(topics.host_fact("beta"), serving)
    assert tale.core.fleet.agents["tutor"].host == "alpha"
    moved = msgspec.structs.replace(before.agents["tutor"], host="beta")
    tale.config = msgspec.structs.replace(before, agents={"tutor": moved})
    tale.say(topics.host_fact("beta"), up)
    tale.say(topics.host_fact("beta"), serving)
    assert tale.core.fleet.agents["tutor"].host == "beta"
    assert "MigrationStarted" in tale.migrate()


# --- the rule engine


def test_a_rollback_that_another_host_reports_ends_no_watch_over_a_candidate() -> None:
    fold = InFlight()
    fold.apply(logged(STARTED, 1), 1)
    (lie,) = [body for body in lies() if isinstance(body, RolledBack)]
    fold.apply(logged(lie, 2, host="beta"), 2)
    fold.apply(logged(msgspec.structs.replace(lie, host="alpha"), 3, host="beta"), 3)
    assert list(fold.migrations) == ["echo"]
    assert fold.claims.total == 2
    fold.apply(logged(msgspec.structs.replace(lie, host="alpha"), 4, host="alpha"), 4)
    assert fold.migrations == {}


def test_a_host_can_not_draw_anothers_rollbacks_to_itself() -> None:
    fold = InFlight()
    fold.apply(logged(TALE[0], 1), 1)
    lie = facts.HostUp(host="alpha", control="tcp://beta:1", pid=1, boot="x")
    fold.apply(logged(lie, 2, host="beta"), 2)
    assert fold.control == {"alpha": "tcp://alpha:1"}


def batch(source: str, *series: dict[str, str]) -> Batch:
    announced = [Announcement(number, found) for number, found in enumerate(series)]
    return Batch(
        source=source, epoch=1, seq=1, time=100.0, series=announced, ids=list(range(len(series))),
        values=[9.0] * len(series),
    )  # fmt: skip


def test_a_host_can_not_measure_another_host_or_its_agents() -> None:
    intake = Intake(PLACED)
    mine = {"__name__": "took", "host": "beta", "agent": "own"}
    found = [mine, mine | {"host": "alpha"}, mine | {"agent": "echo"}, {"__name__": "took", "agent": "echo"}]
    for publisher in ("host", "monitor"):
        samples, _ = intake.read(batch(f"beta/{publisher}", *found), 100.0)
        assert samples == [(labels("took", host="beta", agent="own"), 9.0)]
    assert intake.strange == 6
    assert intake.read(batch("fleet/rules", {"__name__": "rules_late_total", "host": "fleet"}), 100.0)[0]


RULE = """
groups:
- name: g
  rules:
  - {alert: late, expr: 'took > 5', x_action: rollback}
"""


def test_a_hostile_host_neither_rolls_back_nor_excuses_anothers_candidate() -> None:
    """What it says is as if it were not there, to the rules and to the question whose fault a breach is."""
    candidate = {"__name__": "took", "host": "alpha", "agent": "echo", "role": "candidate", "revision": "v2"}
    intake, decisions = Intake(PLACED), RuleDecisions(parse_rules(RULE, file="f.yml"), {"alpha": "tcp://alpha:1"})
    decisions.go_live(0.0)
    decisions.follow(logged(STARTED, 1, 1.0), 1.0)

    def heard(source: str, now: float, *series: dict[str, str]) -> list[str]:
        samples, ended = intake.read(batch(source, *series), now)
        return [type(send.body).__name__ for send in decisions.ingest(samples, ended, now, now, publisher=source)]

    assert heard("beta/host", 2.0, candidate, candidate | {"role": "permanent", "revision": "v1"}) == []
    assert heard("alpha/host", 3.0, candidate) == ["RollBack", "AlertFiring"]
