"""One rule, as the rule file says it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

from interlock.coordinator.rules.expression import Expression

Action = Literal["rollback", "hold", "notify"]
NoData = Literal["keep", "resolve", "fire"]
Kind = Literal["alert", "record"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`name`: of the alert, or of the series that is recorded. `text` is what `expression` was parsed from.

    no_data: what an alert does when its series fall silent: stay as it is, resolve, or fire. resolve: while it gives no
    element with an alert's labels, the alert goes on firing. interval_s: 0: evaluated when samples arrive.
    """

    name: str
    kind: Kind = "alert"
    text: str
    expression: Expression
    for_s: float = 0.0
    keep_firing_for_s: float = 0.0
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    action: Action = "notify"
    dry_run: bool = False
    no_data: NoData = "resolve"
    resolve: Expression | None = None
    resolve_text: str = ""
    group: str = ""
    file: str = ""
    interval_s: float = 0.0

    @property
    def where(self) -> str:
        return f"{self.file}: group {self.group!r}: rule {self.name!r}"

    @property
    def hash(self) -> str:
        """What stays the same where the rule's meaning does: its state goes on under it."""
        labels = sorted(self.labels.items())
        # text of a twin is its original's: the expression tells them apart
        said = (self.kind, self.name, self.text, repr(self.expression), repr(labels), self.for_s, self.interval_s)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:32]
