"""The phases of a migration as a table: what each event makes of each phase. Pure.

The table is total. None: the event says nothing new in that phase (a straggler, or a repetition); for what an operator
asks it means that it is refused there. Whatever a phase is, a rollback leads out of it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import get_args

from interlock.broker.commands import SteerAction


class Phase(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"  # an operator said so: no further step, and no time counts
    WAITING = "waiting"  # for an operator to approve the next stage
    HELD = "held"  # a rule or an operator stopped it; somebody must look
    ROLLING_BACK = "rolling-back"
    ENDED = "ended"


STEERED: tuple[SteerAction, ...] = get_args(SteerAction)

_RUN, _PAUSE, _WAIT, _HOLD, _BACK, _END = Phase
_ROWS: dict[str, tuple[Phase | None, ...]] = {
    # the phase:          running paused  waiting held   rolling-back ended
    "step-done":         (_RUN,   _PAUSE, None,   _HOLD, None,  None),
    "step-failed":       (_BACK,  _BACK,  None,   _BACK, None,  None),  # waiting: no step is under way
    "checks-failed":     (_BACK,  _BACK,  _BACK,  _BACK, None,  None),  # the candidate is worse for sure
    "refused":           (_BACK,  _BACK,  None,   _BACK, None,  None),  # by the host
    "not-prepared":      (_END,   _END,   None,   _END,  None,  None),  # nothing was started, nothing is to be undone
    "not-committed":     (_END,   _END,   None,   _END,  None,  None),  # a kept one: there is nothing else
    "committed":         (_END,   _END,   _END,   _END,  _END,  None),  # the host has the last word
    "waiting":           (_WAIT,  None,   None,   None,  None,  None),
    "held":              (_HOLD,  _HOLD,  _HOLD,  _HOLD, None,  None),  # by a rule, or once more at its deadline
    "roll-back":         (_BACK,  _BACK,  _BACK,  _BACK, _BACK, None),
    "roll-back-failed":  (_BACK,  _BACK,  _BACK,  _BACK, _BACK, None),
    "kept":              (_HOLD,  _HOLD,  _HOLD,  _HOLD, _HOLD, None),  # the old one can't come back: who decides?
    "rolled-back":       (_END,   _END,   _END,   _END,  _END,  None),
    "closed":            (_END,   _END,   _END,   _END,  _END,  _END),
    "approve":           (None,   None,   _RUN,   None,  None,  None),
    "pause":             (_PAUSE, None,   None,   None,  None,  None),
    "resume":            (None,   _RUN,   None,   _RUN,  None,  None),
    "hold":              (_HOLD,  _HOLD,  _HOLD,  None,  None,  None),
    "abort":             (_BACK,  _BACK,  _BACK,  _BACK, None,  None),
    "commit":            (_RUN,   _RUN,   _RUN,   _RUN,  None,  None),  # from the observation on
}  # fmt: skip

EVENTS = tuple(_ROWS)
TRANSITIONS: dict[tuple[Phase, str], Phase | None] = {
    (phase, event): to for event, row in _ROWS.items() for phase, to in zip(Phase, row, strict=True)
}
ON_TRIAL = {Phase.RUNNING, Phase.PAUSED, Phase.WAITING, Phase.HELD}  # nothing is decided, no rollback under way
STANDING = {Phase.PAUSED, Phase.WAITING, Phase.HELD}  # it goes on only when somebody says so
