"""Which of two hosts an agent belongs to while it moves from one to the other. Pure.

There is one commit point: the source's journal. First the target writes that the agent is *arriving*, which is a
promise to serve once it hears so, and serves nobody yet; then the source writes that it *moved*, and from then on only
forwards; then the target writes that it *serves*. If a host dies in between, whoever comes back asks: a target that has
an agent arriving asks the source until that answers from its journal, and a source whose agent moved tells the target
until that has heard. So at no time do both serve, and once both are back and can reach each other, one does.

The source decides, not the target, since it has the way back: until it has written, its old process is warm, it can
roll back by itself, and clients reach the agent through it. A target that decided could serve while the source, cut
off, rolls back.
"""

from __future__ import annotations

from enum import StrEnum

from interlock.agents.slot_io import Row, State


class Word(StrEnum):
    """What a source says of an agent of which a target asks."""

    MOVED = "moved"  # it is the target's
    MINE = "mine"  # it stays here
    UNDECIDED = "undecided"  # its commit may be under way


class Turn(StrEnum):
    """What a target does with an agent that is arriving."""

    SERVE = "serve"
    DROP = "drop"
    WAIT = "wait"


DECISIONS: dict[Word | None, Turn] = {  # None: the source can't be reached
    Word.MOVED: Turn.SERVE,
    Word.MINE: Turn.DROP,
    Word.UNDECIDED: Turn.WAIT,
    None: Turn.WAIT,
}
OPEN = {State.STANDBY, State.LIVE, State.HANDING_OVER}  # of a source: it has not decided yet


def word_of(row: Row | None, migration: str, target: str) -> Word:
    """What the source says to `target`: `row` is what its journal holds, never what it is about to write."""
    if row is None:
        return Word.MINE  # it knows of no move: whatever was arriving did not arrive
    if row.state is State.FORWARDING:
        return Word.MOVED if row.place == target and row.migration == migration else Word.MINE
    if row.state in OPEN and row.migration == migration and row.place == target:
        return Word.UNDECIDED
    return Word.MINE
