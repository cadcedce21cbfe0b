"""The contents of docs/scale.md for each run of `scale.py`: which figures, in which plots and columns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling.runs import Row

Figure = Callable[[Row], Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a plot."""

    label: str
    figure: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot of a run."""

    title: str
    unit: str
    lines: Sequence[Line]
    limit: float | None = None
    """A goal, drawn as a dashed line."""
    is_logarithmic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The part of the page about one run."""

    name: str
    x: Figure
    x_label: str
    panels: Sequence[Panel]
    columns: dict[str, Callable[[Row], str]]
    """The first one is the value of x."""
    is_logarithmic: bool = True
    every: int = 1
    """Only every n-th row is in the table."""


def middle(value: Any) -> float:
    """The median of what was measured in several rounds."""
    return float(statistics.median(value) if isinstance(value, list) else value)


def _of(name: str) -> Figure:
    return lambda row: row[name]


def _sum(*names: str, scale: float = 1.0) -> Figure:
    return lambda row: sum(row[name] for name in names) * scale


def _megabytes(name: str) -> Figure:
    return lambda row: [rate * row["bytes"] / 1e6 for rate in row[name]]


def _mib(name: str) -> Figure:
    return lambda row: row[name] / (1 << 20)


def _number(figure: Figure, digits: int = 0) -> Callable[[Row], str]:
    return lambda row: "–" if (value := figure(row)) is None else f"{middle(value):,.{digits}f}"


def _size(row: Row) -> str:
    size: int = row["bytes"]
    return f"{size} B" if size < 1 << 10 else f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"


_RSS = {"memory, MiB": _number(_mib("rss"))}

SECTIONS: tuple[Section, ...] = (
    Section(
        name="backlog",
        x=_of("events"),
        x_label="events in the log",
        panels=[
            Panel(
                title="reading",
                unit="events/s",
                lines=[
                    Line("from the beginning", _of("first")),
                    Line("the end", _of("last")),
                    Line("all", _of("whole")),
                ],
            ),
            Panel(title="memory of the worker", unit="MiB", lines=[Line("peak RSS", _mib("rss"))], limit=200),
        ],
        columns={
            "events in the log": _number(_of("events")),
            "from the beginning, /s": _number(_of("first")),
            "the end, /s": _number(_of("last")),
            "all of it, /s": _number(_of("whole")),
            **_RSS,
        },
    ),
    Section(
        name="subscriptions",
        x=_of("subscriptions"),
        x_label="subscriptions",
        panels=[
            Panel(title="dispatching, all together", unit="events/s", lines=[Line("one worker", _of("rate"))]),
            Panel(
                title="idle",
                unit="% of a core",
                lines=[
                    Line("worker and server", _sum("idle client", "idle server", scale=100)),
                    Line("worker", _sum("idle client", scale=100)),
                ],
                limit=2,
            ),
            Panel(title="memory of the worker", unit="MiB", lines=[Line("peak RSS", _mib("rss"))], limit=200),
        ],
        columns={
            "subscriptions": _number(_of("subscriptions")),
            "dispatched, all together, /s": _number(_of("rate")),
            "idle: worker, % of a core": _number(_sum("idle client", scale=100), 2),
            "idle: server, % of a core": _number(_sum("idle server", scale=100), 2),
            **_RSS,
        },
    ),
    Section(
        name="event-size",
        x=_of("bytes"),
        x_label="bytes of data in an event",
        panels=[
            Panel(
                title="events",
                unit="events/s",
                lines=[
                    Line("read", _of("read")),
                    Line("produce_many()", _of("batches")),
                    Line("produce(), 32 at once", _of("singly")),
                ],
                is_logarithmic=True,
            ),
            Panel(
                title="data",
                unit="MB/s",
                lines=[
                    Line("read", _megabytes("read")),
                    Line("produce_many()", _megabytes("batches")),
                    Line("produce(), 32 at once", _megabytes("singly")),
                ],
                is_logarithmic=True,
            ),
            Panel(
                title="memory",
                unit="MiB",
                lines=[Line("reading", _mib("rss")), Line("producing", _mib("producer rss"))],
                limit=200,
            ),
        ],
        columns={
            "data": _size,
            "`produce()`, 32 at once, /s": _number(_of("singly")),
            "MB/s": _number(_megabytes("singly"), 1),
            "`produce_many()`, /s": _number(_of("batches")),
            "MB/s ": _number(_megabytes("batches"), 1),
            "read, /s": _number(_of("read")),
            "MB/s  ": _number(_megabytes("read"), 1),
            "memory reading, MiB": _number(_mib("rss")),
            "memory producing, MiB": _number(_mib("producer rss")),
        },
    ),
    Section(
        name="shards",
        x=_of("shards"),
        x_label="shards",
        panels=[
            Panel(
                title="dispatching by key",
                unit="events/s",
                lines=[Line("one worker", _of("rate 1")), Line("two workers", _of("rate 2"))],
            ),
            Panel(
                title="idle, workers and server",
                unit="% of a core",
                lines=[
                    Line("one worker", _sum("idle client 1", "idle server 1", scale=100)),
                    Line("two workers", _sum("idle client 2", "idle server 2", scale=100)),
                ],
            ),
            Panel(title="memory of a worker", unit="MiB", lines=[Line("peak RSS", _mib("rss"))], limit=200),
        ],
        columns={
            "shards": _number(_of("shards")),
            "one worker, /s": _number(_of("rate 1")),
            "two workers, /s": _number(_of("rate 2")),
            "one idle worker and server, % of a core": _number(_sum("idle client 1", "idle server 1", scale=100), 2),
            "two idle workers and server, % of a core": _number(_sum("idle client 2", "idle server 2", scale=100), 2),
            **_RSS,
        },
    ),
    Section(
        name="connections",
        x=_of("connections"),
        x_label="connections that append",
        panels=[
            Panel(
                title="events",
                unit="events/s",
                lines=[Line("appended", _of("appended")), Line("dispatched meanwhile", _of("read"))],
            ),
            Panel(
                title="from INSERT to dispatch",
                unit="ms",
                lines=[Line("median", _of("p50")), Line("99th percentile", _of("p99"))],
                is_logarithmic=True,
            ),
            Panel(
                title="the fence's evidence",
                unit="ms",
                lines=[Line("median", _of("fence")), Line("99th percentile", _of("fence p99"))],
                is_logarithmic=True,
            ),
        ],
        columns={
            "connections": _number(_of("connections")),
            "appended, /s": _number(_of("appended")),
            "dispatched, /s": _number(_of("read")),
            "latency p50, ms": _number(_of("p50"), 1),
            "latency p99, ms": _number(_of("p99"), 1),
            "evidence p50, ms": _number(_of("fence"), 2),
            "evidence p99, ms": _number(_of("fence p99"), 2),
            **_RSS,
        },
    ),
    Section(
        name="snapshot",
        x=_of("seconds"),
        x_label="seconds; the snapshot is open where it is grey",
        panels=[
            Panel(title="dispatching", unit="events/s", lines=[Line("dispatched", _of("rate"))]),
            Panel(
                title="from produce() to dispatch",
                unit="ms",
                lines=[Line("median", _of("p50")), Line("99th percentile", _of("p99"))],
                is_logarithmic=True,
            ),
            Panel(
                title="the tables offsets and workers", unit="KiB", lines=[Line("size", _sum("bytes", scale=1 / 1024))]
            ),
            Panel(
                title="CPU time",
                unit="% of a core",
                lines=[Line("server", _sum("server", scale=100)), Line("worker that reads", _sum("client", scale=100))],
            ),
        ],
        columns={
            "seconds": _number(_of("seconds")),
            "snapshot": lambda row: "open" if row["held"] else "",
            "dispatched, /s": _number(_of("rate")),
            "latency p50, ms": _number(_of("p50"), 1),
            "latency p99, ms": _number(_of("p99"), 1),
            "offsets and workers, KiB": _number(_sum("bytes", scale=1 / 1024)),
            "dead rows in them": _number(_of("dead")),
            "server, % of a core": _number(_sum("server", scale=100), 1),
            **_RSS,
        },
        is_logarithmic=False,
        every=6,
    ),
)
