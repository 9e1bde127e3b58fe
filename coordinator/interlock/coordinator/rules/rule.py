"""One rule, as the rule file says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from interlock.coordinator.rules.expression import Expression

Action = Literal["rollback", "hold", "notify"]
NoData = Literal["keep", "resolve", "fire"]
Kind = Literal["alert", "record"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`name`: of the alert, or of the series that is recorded. `text` is what `expression` was parsed from.

    no_data: what an alert does when its series fall silent: stay as it is, resolve, or fire.
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
    group: str = ""
    file: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}: group {self.group!r}: rule {self.name!r}"
