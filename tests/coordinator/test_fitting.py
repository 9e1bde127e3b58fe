"""Which stages of a strategy are possible for which kind of agent, and that the rest is said."""

from __future__ import annotations

import pytest

from interlock.broker import facts
from interlock.broker.config import AgentConfig, ProbeConfig, RevisionConfig
from interlock.broker.strategies import RAPID, STAGED
from interlock.coordinator.fitting import fitted
from interlock.coordinator.wording import sentence


def agent(endpoint: str) -> AgentConfig:
    revision = RevisionConfig(command=["x"], probe=ProbeConfig(kind="tcp"))
    return AgentConfig(host="h", endpoint=endpoint, serve="r1", revisions={"r1": revision})


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "ipc:///tmp/x", "http://127.0.0.1:1"])
def test_an_agent_with_requests_goes_through_all_stages(endpoint: str) -> None:
    assert fitted(STAGED, agent(endpoint)) == (STAGED, [])


def test_a_tcp_agent_has_no_shadow_and_says_so() -> None:
    strategy, left_out = fitted(STAGED, agent("stream://127.0.0.1:1"))
    assert (strategy.shadow_requests, strategy.canary) == (0, STAGED.canary)
    assert left_out[0] == "shadow is not possible: a TCP agent has connections, no requests to mirror"
    assert left_out[1].startswith("the checks of latency and errors are not possible")
    assert strategy.observe.requests == 0
    assert fitted(RAPID, agent("stream://127.0.0.1:1")) == (RAPID, [])


def test_an_agent_without_a_port_has_neither_shadow_nor_canary_and_says_so() -> None:
    strategy, left_out = fitted(STAGED, agent(""))
    assert (strategy.shadow_requests, strategy.canary) == (0, [])
    assert strategy.observation_s == STAGED.observation_s
    assert [line.partition(":")[0] for line in left_out] == [
        "shadow is not possible",
        "canary is not possible",
        "the checks of latency and errors are not possible",
    ]


def test_what_is_left_out_stands_in_the_sentence_of_the_migration() -> None:
    started = facts.MigrationStarted(
        migration="m", epoch=1, agent="a", host="h", previous="r1", to="r2", strategy="staged", request="r",
        settings={"left_out": ["shadow is not possible: because"]},
    )  # fmt: skip
    assert sentence(started).endswith("staged, on h; shadow is not possible: because")
