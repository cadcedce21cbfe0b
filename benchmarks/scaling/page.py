"""The page docs/scale.md, made of the figures of `scale.py`.

The page's prose stays as it is. Between the comments `<!-- figures NAME -->` and `<!-- end -->` is what this module
writes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling.plots import draw
from benchmarks.scaling.runs import Row
from benchmarks.scaling.sections import SECTIONS, Section, middle

WANTED_RATIO = 0.9
"""Reading at the largest backlog, as a share of reading at a million events."""
WANTED_IDLE = 0.02
"""The share of a core that 100 idle subscriptions may cost, client and server together."""
WANTED_RSS = 200 << 20
"""The memory that a worker may have in any run."""


def write(page: Path, directory: Path, figures: dict[str, Any]) -> None:
    """Bring the page and its plots up to date with the figures of all runs."""
    text = page.read_text()
    directory.mkdir(exist_ok=True)
    for section in SECTIONS:
        if run := figures.get(section.name):
            plot = directory / f"{section.name}.svg"
            draw(plot, section, run["rows"])
            shown = (
                f"![{section.name}]({directory.name}/{plot.name})\n\n{_made_by(run)}\n\n{_table(section, run['rows'])}"
            )
            text = _replaced(text, section.name, shown)
    page.write_text(_replaced(text, "goals", _goals(figures)))


def _replaced(text: str, name: str, shown: str) -> str:
    pattern = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda found: f"{found[1]}\n{shown}\n\n{found[2]}", text)
    if not count:
        raise SystemExit(f"The page has no place for the figures of {name}: <!-- figures {name} --> … <!-- end -->.")
    return replaced


def _made_by(run: dict[str, Any]) -> str:
    warning = " **Too small to conclude anything from: run it without `--quick`.**" if run["quick"] else ""
    return f"Made by `{run['command']}` on {run['machine']}.{warning}"


def _table(section: Section, rows: list[Row]) -> str:
    shown = rows[:: section.every] if len(rows) > 3 * section.every else rows
    lines = [
        "| " + " | ".join(name.strip() for name in section.columns) + " |",
        "|---" * len(section.columns) + "|",
        *("| " + " | ".join(column(row) for column in section.columns.values()) + " |" for row in shown),
    ]
    return "\n".join(lines)


# The goals.


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for a figure."""

    text: str
    measured: str
    is_met: bool


def _goals(figures: dict[str, Any]) -> str:
    lines = ["| goal | measured | |", "|---|---|---|"]
    for name, run in figures.items():
        for goal in [*_CHECKS.get(name, _no_goals)(run["rows"]), _memory_goal(name, run["rows"])]:
            verdict = "not judged: `--quick`" if run["quick"] else "met" if goal.is_met else "**missed**"
            lines.append(f"| {goal.text} | {goal.measured} | {verdict} |")
    return "\n".join(lines)


def _no_goals(_: list[Row]) -> list[Goal]:
    return []


def _reading_goals(rows: list[Row]) -> list[Goal]:
    # The goal is about ten million events and one million, which stand next to each other.
    *_, base, largest = rows
    goals = []
    for what, name in (("first", "from the beginning"), ("last", "the end")):
        ratio = middle(largest[what]) / middle(base[what])
        text = (
            f"reading {name} of {largest['events']:,} events is at least {WANTED_RATIO} of reading {base['events']:,}"
        )
        goals.append(Goal(text, f"{ratio:.2f}", ratio >= WANTED_RATIO))
    return goals


def _idle_goals(rows: list[Row]) -> list[Goal]:
    cost = rows[-1]["idle client"] + rows[-1]["idle server"]
    text = f"{rows[-1]['subscriptions']} idle subscriptions cost under {WANTED_IDLE:.0%} of a core"
    return [Goal(text, f"{cost:.2%}", cost < WANTED_IDLE)]


def _memory_goal(name: str, rows: list[Row]) -> Goal:
    peak = max(max(row["rss"], row.get("producer rss", 0)) for row in rows)
    return Goal(
        f"a worker stays under {WANTED_RSS >> 20} MiB: {name}", f"{peak / (1 << 20):.0f} MiB", peak < WANTED_RSS
    )


_CHECKS: dict[str, Callable[[list[Row]], list[Goal]]] = {"backlog": _reading_goals, "subscriptions": _idle_goals}
