"""Several rule engines that share a fleet: whose a host is, what adds up over all of them, and one rollback at most."""

from __future__ import annotations

from collections import Counter

import pytest

from interlock.broker import topics
from interlock.broker.commands import RollBack
from interlock.broker.errors import ConfigError
from interlock.broker.facts import AlertFiring, AlertResolved, HostUp, MigrationStarted
from interlock.broker.samples import Labels, labels
from interlock.broker.wire import Event, Header
from interlock.coordinator.rules.decisions import RuleDecisions, Send
from interlock.coordinator.rules.rulefile import load_rules, parse_rules
from interlock.coordinator.rules.sharing import Part, part_of, share

T0 = 1_800_000_000.0
HOSTS = [f"h{number}" for number in range(6)]
RULES = """
groups: [{name: g, rules: [
  {alert: own, expr: "temperature > 90", x_action: rollback},
  {alert: total, expr: "sum(load) > 20"},
  {alert: mean, expr: "avg by (rack) (load) > 8"},
  {alert: many, expr: "count(temperature > 50) >= 3"},
  {alert: nobody, expr: "absent(heart{kind=\\"x\\"})"},
  {record: fleet:load, expr: "sum(load)"},
  {alert: greedy, for: 2s, expr: "load > on() group_left() 0.5 * fleet:load"},
  {alert: coolest, expr: "min(temperature) > 70 or max(temperature) > 200"}]}]
"""


class Fleet:
    """Engines that hear their hosts and each other's partial results, as the service does it, on one clock."""

    def __init__(self, count: int, text: str = RULES) -> None:
        self.parts = [Part(number + 1, count) for number in range(count)]
        rules = parse_rules(text, file="r.yml")
        self.engines = [RuleDecisions(rules, {}, part) for part in self.parts]
        self.now = T0
        self.sends: list[tuple[int, Send]] = []
        self.dead: set[int] = set()
        self._told: dict[int, dict[Labels, float]] = {}
        for number, engine in enumerate(self.engines):
            self._say(number, engine.go_live(self.now))

    def _say(self, number: int, sends: list[Send]) -> None:
        self.sends += [(number + 1, send) for send in sends]

    def round(self, samples: dict[str, dict[Labels, float]], seconds: float = 1.0) -> None:
        """A second in quarters: each host measures at its begin, engines tell partial results in between."""
        for quarter in range(4):
            self.now += seconds / 4
            for number, engine in enumerate(self.engines):
                if number in self.dead:
                    continue
                part = self.parts[number]
                for host, found in samples.items() if quarter == 0 else ():
                    if part.takes(f"{host}/monitor"):
                        self._say(number, engine.ingest(found.items(), (), self.now, self.now, publisher=host))
                for other, told in self._told.items():
                    if part.takes(f"fleet/{self.parts[other].partials}"):
                        name = f"fleet/{self.parts[other].partials}"
                        self._say(number, engine.ingest(told.items(), (), self.now, self.now, publisher=name))
                self._say(number, engine.tick(self.now))
            live = [number for number in range(len(self.engines)) if number not in self.dead]
            self._told = {number: self.engines[number].partials() for number in live if self.parts[number].shared}

    def firing(self) -> Counter[str]:
        return Counter(
            f"{send.body.rule}{send.body.labels}" for _, send in self.sends if isinstance(send.body, AlertFiring)
        )

    def tellers(self, rule: str) -> set[int]:
        return {n for n, send in self.sends if isinstance(send.body, AlertFiring) and send.body.rule == rule}


def measured(load: float = 3.0, temperature: float = 60.0) -> dict[str, dict[Labels, float]]:
    return {
        host: {
            labels("load", host=host, rack=f"r{int(host[1:]) % 2}"): load,
            labels("temperature", host=host): temperature,
            labels("heart", host=host, kind="x"): 1.0,
        }
        for host in HOSTS
    }


def test_each_host_has_one_engine_and_the_shares_are_about_equal() -> None:
    counts = Counter(part_of(f"host-{number}", 5) for number in range(5000))
    assert set(counts) == {1, 2, 3, 4, 5}
    assert max(counts.values()) < 1.2 * min(counts.values())
    moved = sum(part_of(f"host-{number}", 5) != part_of(f"host-{number}", 6) for number in range(5000))
    assert moved < 5000 / 4  # a sixth is the least there can be


def test_an_engine_hears_its_own_hosts_and_the_partial_results_of_the_others() -> None:
    heard = [Part(number, 3).hears(HOSTS) for number in (1, 2, 3)]
    own = [topic for prefixes in heard for topic in prefixes if not topic.startswith("telemetry/fleet/")]
    assert sorted(own) == [f"telemetry/{host}/" for host in HOSTS]
    assert heard[0][-1] == "telemetry/fleet/"
    assert {prefixes[-1] for prefixes in heard[1:]} == {"telemetry/fleet/partial-"}
    assert Part().hears(HOSTS) == ["telemetry/"]
    many = [f"h{number}" for number in range(2000)]
    assert Part(2, 3).hears(many) == ["telemetry/"]  # more prefixes than a key may have: it passes over the others'
    assert not Part(2, 3).takes("fleet/partial-2")
    assert Part(2, 3).takes("fleet/partial-1")
    assert [Part(number, 3).takes("fleet/broker") for number in (1, 2, 3)] == [True, False, False]
    assert sum(Part(number, 3).takes("h1/monitor") for number in (1, 2, 3)) == 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_adds_up_over_all_hosts_is_the_same_however_many_engines_there_are(count: int) -> None:
    fleet = Fleet(count)
    for _ in range(8):
        fleet.round(measured())
    assert fleet.firing() == Counter({"many{}": 1})
    for _ in range(3):
        fleet.round(measured(load=9.0, temperature=75.0))
    assert fleet.firing() == Counter(
        {"many{}": 1, "total{}": 1, "mean{'rack': 'r0'}": 1, "mean{'rack': 'r1'}": 1, "coolest{}": 1}
    )
    assert fleet.tellers("total") == {1}  # of the fleet as a whole the first engine tells
    high = measured()
    high["h4"] = {labels("load", host="h4", rack="r0"): 40.0, labels("temperature", host="h4"): 95.0}
    for _ in range(4):
        fleet.round(high)
    assert fleet.firing()["own{'host': 'h4'}"] == 1
    assert fleet.firing()["greedy{'host': 'h4', 'rack': 'r0'}"] == 1  # 40 of 55, told where the host is
    assert fleet.tellers("own") == fleet.tellers("greedy") == {part_of("h4", count)}
    without = {host: {key: value for key, value in found.items() if ("__name__", "heart") not in key}
               for host, found in measured().items()}  # fmt: skip
    for _ in range(6):
        fleet.round(without, seconds=4.0)
    assert fleet.firing()["nobody{'kind': 'x'}"] == 1


def test_while_an_engine_is_silent_nothing_is_said_of_the_fleet_as_a_whole() -> None:
    rules = 'groups: [{name: g, rules: [{alert: few, expr: "count(load) < 4"}, {alert: low, expr: "sum(load) < 15"}]}]'
    fleet = Fleet(2, rules)
    for _ in range(8):
        fleet.round(measured())
    assert fleet.firing() == Counter()
    fleet.dead.add(1)
    for _ in range(8):
        fleet.round(measured(), seconds=3.0)
    assert fleet.firing() == Counter()  # the hosts of the dead engine are not gone: nobody knows
    fleet.dead.clear()
    fleet.engines[1] = RuleDecisions(parse_rules(rules, file="r.yml"), {}, fleet.parts[1])
    fleet.engines[1].go_live(fleet.now)
    for _ in range(12):
        fleet.round(measured(load=1.0))
    assert fleet.firing() == Counter({"low{}": 1})


def started(seq: int) -> list[Event]:
    up = HostUp(host="h4", control="tcp://127.0.0.1:1", pid=1, boot="b")
    begun = MigrationStarted(
        migration="m1", epoch=7, agent="chat", host="h4", previous="v1", to="v2", strategy="rapid", request="r"
    )
    return [
        Event(topics.host_fact("h4"), Header(id="u", source="host/h4", time=T0, seq=seq), up, b""),
        Event(topics.migration_fact("chat"), Header(id="m", source="coordinator", time=T0, seq=seq + 1), begun, b""),
    ]


def test_one_engine_of_those_that_share_the_fleet_rolls_a_migration_back() -> None:
    fleet = Fleet(3)
    fleet.round(measured())
    for event in started(1):
        for number, engine in enumerate(fleet.engines):
            fleet._say(number, engine.follow(event, fleet.now))
    hot = measured()
    hot["h4"] = {labels("temperature", host="h4"): 95.0}
    for _ in range(3):
        fleet.round(hot)
    rollbacks = [(number, send) for number, send in fleet.sends if isinstance(send.body, RollBack)]
    assert [(number, send.id) for number, send in rollbacks] == [(part_of("h4", 3), "m1/7/rules")]


def test_two_engines_of_the_same_part_say_one_rollback_under_one_id() -> None:
    """The log takes an id once, and a host an epoch once: it does not matter who came first."""
    rules = parse_rules(RULES, file="r.yml")
    ids = []
    for _ in range(2):
        engine = RuleDecisions(rules, {}, Part(part_of("h4", 2), 2))
        sends = engine.go_live(T0)
        for event in started(1):
            sends += engine.follow(event, T0 + 1)
        for second in range(3):
            found = {labels("temperature", host="h4"): 95.0}
            sends += engine.ingest(found.items(), (), T0 + 2 + second, T0 + 2 + second, publisher="h4")
        ids += [send.id for send in sends if isinstance(send.body, RollBack)]
    assert ids == ["m1/7/rules"] * 2


def test_after_a_restart_each_engine_takes_up_its_own_alerts_only() -> None:
    fired = [("own", {"host": host}) for host in HOSTS] + [("total", {}), ("gone", {}), ("gone", {"host": "h1"})]
    events = [
        Event(
            topics.alert_fact(rule), Header(id=str(at), source="rules", time=T0, seq=at + 1, logged=T0),
            AlertFiring(rule=rule, labels=found, value=1.0, action="notify", sample_time=T0, summary=""), b"",
        )
        for at, (rule, found) in enumerate(fired)
    ]  # fmt: skip
    taken: Counter[str] = Counter()
    resolved: Counter[str] = Counter()
    for number in (1, 2, 3):
        engine = RuleDecisions(parse_rules(RULES, file="r.yml"), {}, Part(number, 3))
        for event in events:
            engine.follow(event, T0)
        for send in engine.go_live(T0 + 1):
            assert isinstance(send.body, AlertResolved)
            resolved[f"{send.body.rule}{send.body.labels}"] += 1
        taken += Counter(f"{alert.rule.name}{alert.labels}" for alert in engine.firing())
    assert taken == Counter({**{f"own{{'host': '{host}'}}": 1 for host in HOSTS}, "total{}": 1})
    assert resolved == Counter({"gone{}": 1, "gone{'host': 'h1'}": 1})


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("topk(3, load)", "topk over hosts"),
        ("quantile(0.9, load)", "quantile over hosts"),
        ("stddev by (rack) (load)", "stddev over hosts"),
        ("load > on(rack) group_left() other", "different hosts"),
        ("load and ignoring(host) other", "different hosts"),
        ("scalar(load) > bool 1", "scalar"),
        ('label_replace(load, "host", "x", "rack", ".*")', "changes the label `host`"),
        ("sum(load) or load", "or joins"),
        ("sum(load) > on() load", "use group_left|one element of the fleet"),
    ],
)
def test_what_can_not_be_had_from_partial_results_is_refused_with_its_place(expression: str, reason: str) -> None:
    rules = parse_rules(f"groups: [{{name: g, rules: [{{alert: a, expr: '{expression}'}}]}}]", file="r.yml")
    assert share(rules, Part()).rules == rules  # one engine can
    with pytest.raises(ConfigError, match=reason) as caught:
        share(rules, Part(1, 2))
    assert "r.yml: group 'g': rule 'a'" in caught.value.where
    assert caught.value.hint


def test_the_rules_that_ship_can_be_shared() -> None:
    from pathlib import Path

    rules = load_rules(["default", "categories"], Path())
    for number in (1, 2, 3):
        shared = share(rules, Part(number, 3))
        assert len(shared.rules) == len(rules) + 1  # all of them about one host each, and the sign of life
        assert shared.fleet_wide <= {rule.name for rule in rules if rule.kind == "record"}
