"""The history of a failed event as commands print it: as JSON, and as a line for people."""

from typing import Any

from pgbackend.cli.terminal import printable_line
from pgbackend.model import HistoryEntry


def history_json(entry: HistoryEntry) -> dict[str, Any]:
    """The entry as an object for `json`."""
    return {"at": entry.at.isoformat(), "what": entry.what, "attempt": entry.attempt, "error": entry.error}


def history_line(entry: HistoryEntry) -> str:
    """The entry on one line, which cannot control a terminal."""
    what = entry.what if entry.attempt is None else f"attempt {entry.attempt} {entry.what}"
    error = "" if entry.error is None else f": {printable_line(entry.error)}"
    return f"{entry.at.isoformat(sep=' ', timespec='seconds')}  {what}{error}"
