"""The engine as transcripts: samples and the time go in, transitions of alerts come out."""

from __future__ import annotations

import math
import re

import pytest

from interlock.broker.samples import Labels, labels
from interlock.coordinator.rules.alerts import RESTORE_GRACE_S, Transition
from interlock.coordinator.rules.engine import STARTUP_S, Engine, Skew
from interlock.coordinator.rules.rulefile import default_rules, parse_rules
from interlock.coordinator.rules.series import IDLE_EXPIRY_S


def series(text: str) -> Labels:
    found = re.fullmatch(r"(\w+)(?:\{(.*)\})?", text)
    assert found is not None
    return labels(found[1], **dict(re.findall(r'(\w+)="(.*?)"', found[2] or "")))


def told(transition: Transition) -> str:
    pairs = ",".join(f"{name}={value}" for name, value in sorted(transition.labels.items()))
    return f"{transition.state} {transition.rule.name}{{{pairs}}} {transition.value:g} since {transition.sample_time:g}"


class Play:
    """An engine and its clock: `at(1, 'up{host="a"} 1')` is a batch received and taken at second 1."""

    def __init__(self, *rules: str, lookback_s: float = 300.0) -> None:
        text = f"groups: [{{name: g, rules: [{', '.join(rules)}]}}]"
        self.engine = Engine(parse_rules(text, file="f.yml"), lookback_s=lookback_s)

    def at(self, now: float, *samples: str, ended: tuple[str, ...] = (), taken: float | None = None) -> list[str]:
        batch = [(series(name), float(value)) for name, value in (text.rsplit(" ", 1) for text in samples)]
        gone = [series(name) for name in ended]
        return [told(made) for made in self.engine.ingest(batch, gone, now if taken is None else taken, now)]

    def tick(self, now: float) -> list[str]:
        return [told(made) for made in self.engine.tick(now)]


HOT = '{alert: hot, expr: "temp > 90"}'


def test_a_rule_without_for_fires_at_the_very_sample_and_resolves_at_the_first_good_one() -> None:
    play = Play(HOT)
    assert play.at(1, 'temp{host="a"} 80') == []
    assert play.at(2, 'temp{host="a"} 95') == ["firing hot{host=a} 95 since 2"]
    assert play.at(3, 'temp{host="a"} 96') == []
    assert play.at(4, 'temp{host="a"} 90') == ["resolved hot{host=a} 96 since 2"]


def test_the_time_told_is_that_of_the_first_sample_by_its_publishers_clock() -> None:
    play = Play('{alert: hot, expr: "temp > 90", for: 2s}')
    assert play.at(1, 'temp{host="a"} 95', taken=501) == ["pending hot{host=a} 95 since 501"]
    assert play.at(2, 'temp{host="a"} 97', taken=502) == []
    assert play.at(3, 'temp{host="a"} 99', taken=503) == ["firing hot{host=a} 99 since 501"]


def test_for_ends_by_time_alone_where_no_further_sample_comes() -> None:
    play = Play('{alert: hot, expr: "temp > 90", for: 2s}')
    play.at(1, "temp 95")
    assert play.engine.next_deadline() <= 3
    assert play.tick(2.9) == []
    assert play.tick(3) == ["firing hot{} 95 since 1"]


def test_a_breach_shorter_than_for_ends_without_a_word_and_counts_anew() -> None:
    play = Play('{alert: hot, expr: "temp > 90", for: 2s}')
    play.at(1, "temp 95")
    assert play.at(2, "temp 50") == []
    assert play.tick(4) == []
    assert play.at(5, "temp 95") == ["pending hot{} 95 since 5"]


def test_keep_firing_for_bridges_a_gap_and_then_resolves() -> None:
    play = Play('{alert: hot, expr: "temp > 90", keep_firing_for: 5s}')
    play.at(1, "temp 95")
    assert play.at(2, "temp 50") == []
    assert play.at(6, "temp 95") == []
    assert play.at(7, "temp 50") == []
    assert play.tick(11) == []
    assert play.tick(12) == ["resolved hot{} 95 since 1"]


def test_a_whole_batch_is_applied_before_any_rule_looks() -> None:
    play = Play('{alert: full, expr: "used / total > 0.9"}')
    assert play.at(1, "used 5", "total 10") == []
    assert play.at(2, "used 50", "total 100") == []
    assert play.at(3, "used 95", "total 100") == ["firing full{} 0.95 since 3"]


def test_only_rules_that_the_batch_touched_are_evaluated() -> None:
    play = Play(HOT, '{alert: full, expr: "used > 1"}')
    play.at(1, "temp 1", "used 1")
    play.tick(1)
    before = play.engine.evaluations
    play.at(2, "temp 1", "other 1")
    assert play.engine.evaluations == before + 1


def test_a_series_that_ended_takes_its_alert_with_it() -> None:
    play = Play('{alert: hot, expr: "temp > 90", x_action: rollback}')
    play.at(1, 'temp{host="a"} 95', 'temp{host="b"} 96')
    assert play.at(2, ended=('temp{host="a"}',)) == ["resolved hot{host=a} 95 since 1"]
    assert play.at(3, 'temp{host="a"} 97') == ["firing hot{host=a} 97 since 3"]


@pytest.mark.parametrize(
    ("no_data", "expected"),
    [("resolve", ["resolved hot{host=a} 95 since 1"]), ("keep", []), ("fire", ["firing hot{host=b} nan since 20"])],
)
def test_what_a_series_that_falls_silent_means_is_the_rules_choice(no_data: str, expected: list[str]) -> None:
    play = Play(f'{{alert: hot, expr: "temp > 90", x_no_data: {no_data}}}', lookback_s=10)
    play.at(1, 'temp{host="a"} 95', 'temp{host="b"} 50')
    play.at(9, 'other{host="a"} 1')
    play.tick(9)
    play.at(20, 'other{host="a"} 1')
    made = play.tick(20)
    assert made == [line.replace("since 20", "since 1") for line in expected]


def test_a_condition_that_turned_false_before_the_silence_does_not_come_back() -> None:
    play = Play('{alert: hot, expr: "temp > 90", x_no_data: keep}', lookback_s=10)
    play.at(1, "temp 95")
    assert play.at(2, "temp 50") == ["resolved hot{} 95 since 1"]
    play.at(20, "other 1")
    assert play.tick(20) == []


def test_a_pending_alert_does_not_fire_on_silence() -> None:
    play = Play('{alert: hot, expr: "temp > 90", for: 30s, x_no_data: keep}', lookback_s=10)
    play.at(1, "temp 95")
    play.at(20, "other 1")
    assert play.tick(20) == []
    assert play.tick(40) == []
    assert play.at(41, "temp 95") == []
    play.at(70, "temp 95")
    assert play.at(71, "temp 95") == ["firing hot{} 95 since 41"]


def test_a_kept_alert_goes_when_its_series_is_forgotten() -> None:
    play = Play('{alert: hot, expr: "temp > 90", x_no_data: keep}', lookback_s=10)
    play.at(1, "temp 95")
    play.at(IDLE_EXPIRY_S + 2, "other 1")
    assert play.tick(IDLE_EXPIRY_S + 2) == ["resolved hot{} 95 since 1"]


def test_nothing_falls_silent_while_the_bus_stands_still() -> None:
    play = Play(HOT, lookback_s=10)
    play.at(1, "temp 95")
    for second in range(2, 60):
        assert play.tick(second) == []
    play.at(60, "other 1")
    assert play.tick(60) == ["resolved hot{} 95 since 1"]


def test_absence_is_judged_only_after_some_ingest() -> None:
    play = Play('{alert: lost, expr: "absent(up)"}')
    assert play.tick(0) == []
    play.at(1, "other 1")
    assert play.tick(2) == []
    play.at(1 + STARTUP_S, "other 1")
    assert play.tick(1 + STARTUP_S) == ["firing lost{} 1 since 6"] or play.engine.current("firing")
    assert play.at(8, "up 1") == ["resolved lost{} 1 since 6"]


def test_a_rate_is_evaluated_as_time_passes() -> None:
    play = Play('{alert: errors, expr: "increase(errors_total[5s]) > 10"}')
    for second in range(4):
        play.at(second, f"errors_total {second * 20}")
        made = play.tick(second + 0.01)
    assert made == []
    assert [told(alert)[:14] for alert in play.engine.current("firing")] == ["firing errors{"]
    assert [line[:15] for line in play.tick(30)] in ([], ["resolved errors"])
    play.at(31, "other 1")
    play.tick(31)
    assert play.engine.current("firing") == []


def test_a_match_of_many_to_many_is_counted_reported_and_leaves_the_other_rules_alone() -> None:
    play = Play('{alert: slow, expr: "took > on(host) base"}', HOT)
    assert play.at(1, 'took{host="a"} 5', 'base{host="a",x="1"} 1', 'base{host="a",x="2"} 1', "temp 95") == [
        "firing hot{} 95 since 1"
    ]
    assert play.engine.evaluation_errors == 1
    assert list(play.engine.errors) == ["f.yml: group 'g': rule 'slow'"]
    assert "found duplicate series for the match group" in next(iter(play.engine.errors.values()))
    assert play.at(2, ended=('base{host="a",x="2"}',)) == ["firing slow{host=a} 5 since 2"]
    assert play.engine.errors == {}


def test_an_alert_keeps_its_state_while_its_rule_cannot_be_evaluated() -> None:
    play = Play('{alert: slow, expr: "took > on(host) base"}')
    assert play.at(1, 'took{host="a"} 5', 'base{host="a",x="1"} 1') == ["firing slow{host=a} 5 since 1"]
    assert play.at(2, 'base{host="a",x="2"} 1') == []
    assert play.tick(3) == []
    assert len(play.engine.current("firing")) == 1


def test_two_places_of_a_result_that_differ_only_in_the_name_are_one_alert() -> None:
    play = Play('{alert: bad, expr: "a == 1 or on(x) b"}')
    assert play.at(1, 'a{x="1"} 1', 'b{x="1"} 0') == ["firing bad{x=1} 1 since 1"]
    assert play.at(2, 'a{x="1"} 2') == []
    assert play.at(3, ended=('b{x="1"}',)) == ["resolved bad{x=1} 0 since 1"]


def test_the_threshold_may_be_a_series_of_its_own_and_changes_live() -> None:
    play = Play('{alert: hot, expr: "temp > on(host) group_left() limit"}')
    assert play.at(1, 'temp{host="a",gpu="0"} 85', 'limit{host="a"} 90') == []
    assert play.at(2, 'limit{host="a"} 80') == ["firing hot{gpu=0,host=a} 85 since 2"]


def test_a_recorded_series_feeds_a_rule_at_the_same_sample() -> None:
    play = Play('{alert: full, expr: "ratio > 0.9"}', '{record: ratio, expr: "used / total", labels: {by: rule}}')
    assert play.at(1, "used 95", "total 100") == ["firing full{by=rule} 0.95 since 1"]
    assert play.at(2, ended=("used",)) == ["resolved full{by=rule} 0.95 since 1"]


def test_recorded_series_that_feed_each_other_come_to_an_end() -> None:
    play = Play('{record: a, expr: "b + 1"}', '{record: b, expr: "a + 1 or c"}')
    play.at(1, "c 1")
    play.at(2, "c 1")
    assert play.engine.evaluations < 100


def test_labels_of_the_rule_are_added_and_filled_in() -> None:
    play = Play('{alert: hot, expr: "temp > 90", labels: {severity: high, where: "on {{ $labels.host }}"}}')
    assert play.at(1, 'temp{host="a"} 95') == ["firing hot{host=a,severity=high,where=on a} 95 since 1"]


def test_the_summary_is_the_annotation_filled_in_or_the_expression() -> None:
    play = Play(
        '{alert: hot, expr: "temp > 90", annotations: {summary: "{{ $labels.host }}: {{ $value }} C"}}',
        HOT.replace("hot", "also"),
    )
    play.at(1, 'temp{host="a"} 95')
    assert [alert.summary for alert in play.engine.current("firing")] == ["a: 95 C", "also: temp > 90 (value 95)"]


def test_an_alert_from_before_a_restart_goes_on_without_a_new_transition() -> None:
    play = Play(HOT)
    assert play.engine.restore("hot", {"host": "a"}, 95, sample_time=1, since=1, now=100)
    assert not play.engine.restore("gone", {"host": "a"}, 95, sample_time=1, since=1, now=100)
    assert play.at(101, 'temp{host="a"} 96') == []
    assert [told(alert) for alert in play.engine.current("firing")] == ["firing hot{host=a} 96 since 1"]
    assert play.at(102, 'temp{host="a"} 50') == ["resolved hot{host=a} 96 since 1"]


def test_an_alert_from_before_a_restart_that_does_not_show_itself_resolves() -> None:
    play = Play(HOT)
    play.engine.restore("hot", {"host": "a"}, 95, sample_time=1, since=1, now=100)
    assert play.at(101, 'temp{host="a"} 50') == []
    assert play.tick(100 + RESTORE_GRACE_S) == ["resolved hot{host=a} 95 since 1"]


def test_a_clock_that_is_wrong_does_not_make_a_sample_old_or_new() -> None:
    skew = Skew()
    assert skew.to_ours(1000.0, 10.0) == 10.0
    assert skew.to_ours(1001.0, 11.5) == 11.0  # half a second late
    assert skew.to_ours(900.0, 12.0) == 7.0  # set back: never more than five seconds old
    play = Play(HOT)
    assert play.at(1, "temp 95", taken=math.nan) == ["firing hot{} 95 since 1"]


def test_the_default_rules_roll_back_on_the_figures_of_a_bad_candidate() -> None:
    engine = Engine(default_rules())
    who = {"host": "alpha", "agent": "chat", "revision": "v2", "role": "candidate"}
    gpu = {"host": "alpha", "gpu": "0", "uuid": "u"}

    def play(now: float, errors: float) -> set[str]:
        batch = {
            labels("gpu_memory_used_ratio", **gpu): 0.97,
            labels("agent_response_seconds", **who, quantile="0.95"): 0.4,
            labels("agent_response_baseline_seconds", host="alpha", agent="chat", quantile="0.95"): 0.1,
            labels("agent_response_baseline_seconds", host="alpha", agent="chat", quantile="0.5"): 0.05,
            labels("agent_health_failures", **who): 3.0,
            labels("agent_requests_total", **who): errors * 10,
            labels("agent_errors_total", **who): errors,
            labels("host_load1", host="alpha"): 25.0,
            labels("host_cpus", host="alpha"): 8.0,
            labels("host_memory_available_bytes", host="alpha"): 1e9,
            labels("host_memory_total_bytes", host="alpha"): 64e9,
        }
        made = engine.ingest(batch.items(), [], now, now) + engine.tick(now)
        return {t.rule.name for t in made if t.action == "rollback" and t.state == "firing"}

    assert play(1.0, 0.0) == {"gpu-memory", "health", "load", "host-memory"}
    assert {name for second in range(2, 6) for name in play(second, second * 5.0)} == {
        "response-time",  # a second later
        "error-rate",
        "error-rate-of-a-minute",
    }
    assert engine.evaluation_errors == 0


def test_a_candidate_is_not_blamed_for_a_machine_on_which_the_permanent_revision_is_as_slow() -> None:
    def fired(permanent: float) -> bool:
        engine = Engine(default_rules())
        of = {"host": "alpha", "agent": "chat", "quantile": "0.95"}
        batch = {
            labels("agent_response_seconds", **of, revision="v2", role="candidate"): 0.4,
            labels("agent_response_seconds", **of, revision="v1", role="permanent"): permanent,
            labels("agent_response_baseline_seconds", **of): 0.1,
        }
        made = [t for now in (1.0, 2.0, 3.0) for t in engine.ingest(batch.items(), [], now, now) + engine.tick(now)]
        return any(t.rule.name == "response-time" and t.state == "firing" for t in made)

    assert fired(permanent=0.1)
    assert not fired(permanent=0.4)
