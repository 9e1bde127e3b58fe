"""The errors of Interlock. Each says what happened, where, and what to do about it."""

from __future__ import annotations


class InterlockError(Exception):
    """Base of every error that Interlock raises on purpose.

    `what` happened, `where` (a file and key, an endpoint, an agent; may be empty) and `hint`, what to do (may be
    empty). `str()` is one line fit for an operator.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class ConfigError(InterlockError):
    """A fleet file, rule file or option is wrong. Nothing was started or changed."""


class WireError(InterlockError):
    """Bytes from the network are not a message of ours. The sender is at fault; the receiver goes on."""


class UnknownVersion(WireError):
    """A message of a version of the wire format that is not understood here: one of the two sides is too old."""


class Refused(InterlockError):
    """The other side understood the request and said no; nothing was changed there."""


class Unreachable(InterlockError):
    """No answer within the deadline. Whether the request took effect is unknown."""


class InUse(InterlockError):
    """Somebody else holds the state directory, lock, or port that was asked for."""


class LogError(InterlockError):
    """The event log, or a host's journal, can't be read or written."""


class UnsureWrite(LogError):
    """Writing to the event log failed so late that the events may be there all the same. Repeating them finds out."""
