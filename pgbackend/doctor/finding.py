"""Findings: what the doctor says. Each names its subject, and the line that cures it."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["note", "warning", "error"]
"""note: worth knowing. warning: it delays, costs, or becomes an error. error: events are lost, or work has stopped."""

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
"""From the least to the most severe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong. Its texts may contain what strangers chose: a terminal must not get them as they are."""

    check: str
    """The name of the check, which is also its heading in docs/doctor.md."""
    severity: Severity
    subject: str
    """The session, table, subscription or setting that has the fault."""
    what: str
    """The fault, its effect, and the next step where no line cures it."""
    cure: str | None = None
    """Lines of SQL or commands, ready to paste; None when no line cures it."""
    destroys: str | None = None
    """The things that the cure ends or deletes for good; None when there are none."""
