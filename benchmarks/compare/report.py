"""The results of a run, as Markdown and as JSON. Nothing here measures."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.compare.measurements import (
    BATCHES,
    BOTH,
    FILL_SECONDS,
    LATENCY_50,
    LATENCY_99,
    MOST_EVENTS,
    ONE,
    RATE,
    READ_1,
    READ_4,
    READ_SECONDS,
    TOGETHER,
    Measurement,
)
from benchmarks.compare.system import EVENT_BYTES

_COLUMNS: tuple[tuple[str, tuple[Measurement, ...]], ...] = (
    *((one.title, (one,)) for one in (ONE, TOGETHER, BATCHES, READ_1, READ_4)),
    (f"latency p50 / p99, ms at {RATE:g}/s", (LATENCY_50, LATENCY_99)),
    (BOTH.title, (BOTH,)),
)
_SHARED = "†"

Text = Callable[[Sequence[float], Measurement], str]
"""Writes the figures of all rounds."""


@dataclass(slots=True)
class Row:
    """A system, and its figures of all rounds by the measurement's name."""

    title: str
    kind: str = "log"
    versions: str = ""
    durability: str = ""
    mode: str = ""
    skipped: str | None = None
    """Why it was not measured."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Everything that went wrong, with the round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run."""

    machine: Mapping[str, str]
    rounds: int
    seconds: float
    rows: Mapping[str, Row]

    def markdown(self) -> str:
        """Medians, spreads, and what a reader must know about each system."""
        measured = [row for row in self.rows.values() if row.skipped is None]
        skipped = [row for row in self.rows.values() if row.skipped is not None]
        rounds = f"{self.rounds} round{'' if self.rounds == 1 else 's'}"
        return f"""\
Events a second, and latencies in ms: medians of {rounds}, the systems in turns. All systems get the
same events of {EVENT_BYTES} bytes.

{_table([*measured, *skipped], _median)}

{_SHARED} A work queue: its four processes share one backlog. Of the other systems each process reads the whole log, and
their rates are added up. A backlog is what batches store in {FILL_SECONDS * self.seconds:g} s, at most
{MOST_EVENTS * self.seconds:,.0f} events; reading ends after {READ_SECONDS * self.seconds:g} s.

Least and greatest figure of the rounds:

{_table(measured, _spread)}

{_lines(measured)}

{_bullets(f"{name}: {value}" for name, value in self.machine.items())}"""

    def data(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "machine": dict(self.machine),
            "rounds": self.rounds,
            "seconds": self.seconds,
            "systems": {
                name: {
                    "title": row.title.replace("*", ""),
                    "kind": row.kind,
                    "versions": row.versions,
                    "durability": row.durability,
                    "mode": row.mode,
                    "skipped": row.skipped,
                    "failures": row.failures,
                    "figures": row.figures,
                    "medians": {one: statistics.median(figures) for one, figures in row.figures.items()},
                }
                for name, row in self.rows.items()
            },
        }


def _table(rows: Iterable[Row], text: Text) -> str:
    lines = [["", *(title for title, _ in _COLUMNS)], ["---"] * (1 + len(_COLUMNS))]
    for row in rows:
        if row.skipped is None:
            lines.append([row.title, *(_cell(row, columns, text) for _, columns in _COLUMNS)])
        else:
            lines.append([row.title, f"skipped: {row.skipped}", *[""] * (len(_COLUMNS) - 1)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _lines(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        lines.append(f"{row.title}: {row.versions}. {row.mode}. {row.durability}.")
        lines += [f"{row.title} **failed** in {failure}" for failure in row.failures]
    return _bullets(lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(row: Row, columns: Sequence[Measurement], text: Text) -> str:
    texts = [text(row.figures[one.name], one) if row.figures.get(one.name) else "failed" for one in columns]
    mark = f" {_SHARED}" if row.kind == "queue" and columns == (READ_4,) else ""
    return " / ".join(texts) + mark


def _median(figures: Sequence[float], measurement: Measurement) -> str:
    return _number(statistics.median(figures), measurement)


def _spread(figures: Sequence[float], measurement: Measurement) -> str:
    return f"{_number(min(figures), measurement)}–{_number(max(figures), measurement)}"


def _number(figure: float, measurement: Measurement) -> str:
    """Three digits of a rate: more would be noise.

    >>> _number(352_417.0, READ_1), _number(87.5, READ_1), _number(0.4836, LATENCY_50), _number(25.31, LATENCY_50)
    ('352,000', '88', '0.48', '25')
    """
    if measurement.unit == "ms":
        return f"{figure:.2f}" if figure < 10 else f"{figure:.0f}"
    digits = max(len(str(int(figure))) - 3, 0)
    return f"{round(figure, -digits):,.0f}"
