"""What the coordinator's cores decide to send."""

from __future__ import annotations

from dataclasses import dataclass

from interlock.broker.wire import Body


@dataclass(frozen=True)
class Emit:
    """Publish `body` under `id`. `direct`: only to the host's control endpoint, not through the log."""

    topic: str
    body: Body
    id: str
    direct: bool = False
    also_direct: bool = False
