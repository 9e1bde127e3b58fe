"""Is there room for the old and the new process together, and is what the agent needs there? `judge` decides. Pure.

What a process takes is either said (`needs` in the fleet file) or measured on the old one: resident memory of its
process tree, and GPU memory as the host's monitor last told it. What is not known is not called enough: an agent that
uses a GPU, of whose memory nothing is known, does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from interlock.agents.findings import Finding, mib

MARGIN = 1.1  # what the old one takes, times this: two processes of the same program are not alike to the byte
SPARE_BYTES = 256 << 20  # left for everything else on the machine, or on the card
UNKNOWN_BYTES = 256 << 20  # for a process of which nothing is known: what a Python program with a few libraries takes
FRESH_S = 5.0  # readings of a monitor older than this are none: it reads once a second

Together = Literal["yes", "no", "unknown"]


class Card(msgspec.Struct, frozen=True):
    """One GPU as its monitor sees it. Bytes. `agent`: what the agent's permanent revision has there."""

    uuid: str
    total: int
    free: int
    agent: int = 0


class Room(msgspec.Struct, frozen=True):
    """What is there, and what the old process takes of it. Bytes; None: not known."""

    memory_available: int | None
    memory_of_old: int | None
    cards: Sequence[Card] | None = None


class Needs(msgspec.Struct, frozen=True):
    """What the candidate takes. Bytes; 0: as the old one. `gpu`: it uses a GPU, as far as anybody says."""

    memory: int = 0
    gpu_memory: int = 0
    gpu: bool = False


class Judgement(msgspec.Struct, frozen=True):
    """`together`: old and new fit at once. `apart`: the new one fits once the old one is gone. `known`: what the old
    one has on the GPU was seen, or makes no difference.
    """

    findings: list[Finding] = []
    together: Together = "yes"
    apart: bool = True
    gpu: bool = False
    known: bool = True


def judge(room: Room, needs: Needs) -> Judgement:
    """Memory and GPU memory for both at once; the findings say what was seen and what is missing."""
    memory, memory_together, memory_apart = _memory(room, needs)
    gpu = _gpu(room, needs)
    if gpu is None:
        return Judgement([memory], memory_together, memory_apart)
    finding, together, apart = gpu
    both: Together = (
        "no" if "no" in (memory_together, together) else together if memory_together == "yes" else "unknown"
    )
    known = finding.ok or any(card.agent for card in room.cards or ())
    return Judgement([memory, finding], both, memory_apart and apart, gpu=True, known=known)


def _memory(room: Room, needs: Needs) -> tuple[Finding, Together, bool]:
    if room.memory_available is None:
        return Finding("memory", False, "inconclusive: the memory available is not known"), "unknown", False
    old = room.memory_of_old or 0
    needed = needs.memory or round(old * MARGIN) or UNKNOWN_BYTES
    whose = "as the fleet file says" if needs.memory else "as the old one takes" if old else "a guess: the old is down"
    seen = {"available_bytes": room.memory_available, "old_bytes": room.memory_of_old, "needed_bytes": needed}
    if room.memory_available >= needed + SPARE_BYTES:
        return (
            Finding("memory", True, f"{mib(room.memory_available)} available, {mib(needed)} needed", seen),
            "yes",
            True,
        )
    apart = room.memory_available + old >= needed + SPARE_BYTES
    reason = (
        f"{mib(room.memory_available)} available, {mib(needed)} needed ({whose}) beside {mib(SPARE_BYTES)} for the rest"
    )
    return Finding("memory", False, reason, seen), "no", apart


def _gpu(room: Room, needs: Needs) -> tuple[Finding, Together, bool] | None:
    """None: nothing says that the agent uses a GPU."""
    used = [card for card in room.cards or () if card.agent]
    if not (needs.gpu or needs.gpu_memory or used):
        return None
    if not room.cards:
        reason = (
            "inconclusive: it uses a GPU, and nothing is known of this host's GPU memory; is the monitor running, and "
            "the broker reachable?"
        )
        return Finding("gpu-memory", False, reason), "unknown", True
    if not used and not needs.gpu_memory:
        reason = (
            "inconclusive: it uses a GPU, and the driver does not tell how much memory the old one has there; say it: "
            "needs = { gpu_memory_mb = N } of the revision"
        )
        return Finding("gpu-memory", False, reason), "unknown", True
    wanted = _wanted(room.cards, used, needs.gpu_memory)
    lacking = [(card, need) for card, need in wanted if card.free < need + SPARE_BYTES]
    seen = {
        card.uuid: {"free_bytes": card.free, "old_bytes": card.agent, "needed_bytes": need} for card, need in wanted
    }
    if not lacking:
        words = ", ".join(f"{mib(card.free)} free, {mib(need)} needed" for card, need in wanted)
        return Finding("gpu-memory", True, words, {"cards": seen}), "yes", True
    apart = all(card.free + card.agent >= need + SPARE_BYTES for card, need in lacking)
    card, need = lacking[0]
    reason = f"{mib(card.free)} free on {card.uuid}, {mib(need)} needed beside {mib(SPARE_BYTES)} for the rest"
    return Finding("gpu-memory", False, reason, {"cards": seen}), "no", apart


def _wanted(cards: Sequence[Card], used: Sequence[Card], said: int) -> list[tuple[Card, int]]:
    """The cards the candidate is expected on: where the old one is; else the one with most room."""
    if not used:
        return [(max(cards, key=lambda card: card.free), said)]
    total = sum(card.agent for card in used)
    return [(card, round(said * card.agent / total) if said else round(card.agent * MARGIN)) for card in used]


def cards_of(samples: Mapping[tuple[tuple[str, str], ...], tuple[float, float]], agent: str, now: float) -> list[Card]:
    """The GPUs in a monitor's samples: labels -> (value, time in seconds since 1970). Old ones don't count."""
    total: dict[str, float] = {}
    free: dict[str, float] = {}
    owned: dict[str, float] = {}
    for key, (value, time) in samples.items():
        of = dict(key)
        uuid = of.get("uuid", "")
        if not uuid or now - time > FRESH_S:
            continue
        match of.get("__name__"):
            case "gpu_memory_total_bytes":
                total[uuid] = value
            case "gpu_memory_free_bytes":
                free[uuid] = value
            case "gpu_process_memory_bytes" if of.get("agent") == agent and of.get("role") == "permanent":
                owned[uuid] = owned.get(uuid, 0.0) + value
    return [
        Card(uuid, int(total[uuid]), int(free[uuid]), int(owned.get(uuid, 0.0)))
        for uuid in sorted(total)
        if uuid in free
    ]
