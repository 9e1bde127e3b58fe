"""Ctrl-C before a program is so far that it can stop in order. Imports nothing but the standard library's lightest."""

from __future__ import annotations

import os
import signal

EXIT_INTERRUPTED = 130


def end_quietly() -> None:
    """From here on Ctrl-C ends this process at once and without a word, until another takes the signal.

    For the time of the imports: there is nothing yet that would have to be ended in order. Where SIGINT is ignored,
    it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os._exit(EXIT_INTERRUPTED)
