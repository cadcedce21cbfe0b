"""The report of `pgbackend status` for people: what is in its tables, and which columns and rows fit. Pure.

The promise: a terminal gets no line that is wider than it is, and nothing that names and errors chose to control it. A
report that is not for a terminal has all columns and rows, whatever their width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pgbackend.cli.terminal import counted, printable_line, shortened
from pgbackend.model import BlockingAppender, Holder, Info, Paused, Status, SubscriptionStatus

_GAP = 2
"""Blanks between two columns."""
_MOST_TEXT = 40
"""Characters of a text in a column on a terminal."""
_FEWEST_ROWS = 3
"""Subscriptions that are shown however low the terminal is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The room that a report has. `None` for `rows`: as many as there are."""

    columns: int
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of subscriptions."""

    heading: str
    rank: int
    """Columns with the highest rank go first when not all fit."""
    cell: Callable[[SubscriptionStatus], str | int]
    is_bad: Callable[[SubscriptionStatus], bool] = lambda _: False
    """Whether the cell is shown in red."""


def _shards(subscription: SubscriptionStatus) -> str:
    """The number of shards; during a reshard the old and the new number."""
    old = sum(shard.until is not None for shard in subscription.shards)
    new = len(subscription.shards) - old
    return " → ".join(str(count) for count in (old, new) if count)


def _owners(subscription: SubscriptionStatus) -> list[str]:
    return sorted({shard.owner_name for shard in subscription.shards if shard.owner_name})


def _state(subscription: SubscriptionStatus) -> str:
    """Its state in one or two words: reasons of pauses have a table of their own."""
    if subscription.complete:
        return "complete"
    return subscription.state if subscription.paused is None else "paused"


def _is_stuck(subscription: SubscriptionStatus) -> bool:
    """Whether it has something to do, and nobody does it."""
    return subscription.lag > 0 and _state(subscription) not in ("running", "elsewhere", "complete")


COLUMNS = (
    Column("SUBSCRIPTION", 0, lambda one: one.name),
    Column("ORDER", 9, lambda one: one.order),
    Column("SHARDS", 8, _shards),
    Column("LAG", 1, lambda one: one.lag),
    Column("BEHIND", 2, lambda one: duration(one.lag_seconds)),
    Column("IN FLIGHT", 10, lambda one: one.in_flight),
    Column("PENDING", 7, lambda one: sum(shard.pending for shard in one.shards)),
    Column("REDELIVERIES", 5, lambda one: one.redeliveries),
    Column("DEAD LETTERS", 4, lambda one: one.dead_letters, lambda one: one.dead_letters > 0),
    Column("SKIPPED", 6, lambda one: one.skipped, lambda one: one.skipped > 0),
    Column("STATE", 3, _state, _is_stuck),
    Column("OWNERS", 11, lambda one: ", ".join(_owners(one)) or "-"),
)


def report(info: Info, status: Status, space: Space | None = None) -> RenderableType:
    """The whole report. `space`: that of a terminal; None for a report without limits."""
    blocks: list[RenderableType] = [_log(info, status)]
    if status.holders:
        blocks.append(_text(f"events older than that stay because of: {', '.join(map(_holder, status.holders))}"))
    if status.appenders:
        blocks.append(_appenders(status.appenders, space))
    pauses = [(one.name, one.paused) for one in status.subscriptions if one.paused is not None]
    errors = [one for one in status.subscriptions if one.last_error]
    if not status.subscriptions:
        blocks.append(_text("no subscriptions"))
    else:
        beside = _lines(status.appenders) + _lines(pauses) + _lines(errors)
        used = _LOG_LINES + _FRAME_LINES + (2 if status.holders else 0) + beside
        blocks.append(_subscriptions(status.subscriptions, space, used))
    if pauses:
        blocks.append(_pauses(pauses, space))
    if errors:
        blocks.append(_errors(errors, space))
    return Group(*_apart(blocks))


def duration(seconds: float | None) -> str:
    """Seconds in their two largest units.

    >>> [duration(seconds) for seconds in (None, 0.0, 0.25, 75.0, 3600.0, 200_000.0)]
    ['-', '0 s', '0.2 s', '1 min 15 s', '1 h', '2 d 7 h']
    """
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{seconds:.0f} s"
    for (size, name), (smaller, lesser) in pairwise(_UNITS):
        if seconds >= size:
            rest = int(seconds % size // smaller)
            return f"{int(seconds // size)} {name}" + (f" {rest} {lesser}" if rest else "")
    raise AssertionError(seconds)


_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def bytes_text(count: int) -> str:
    """Bytes in the largest unit of which there is one.

    >>> [bytes_text(count) for count in (0, 1023, 1024, 5_000_000, 3 << 40)]
    ['0 B', '1023 B', '1.0 KiB', '4.8 MiB', '3.0 TiB']
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"


def fitting(widths: Sequence[int], ranks: Sequence[int], room: int) -> list[int]:
    """The indexes of the columns that fit, in order: those with the highest ranks go first. One always stays.

    >>> fitting([10, 5, 5, 8], [0, 3, 1, 2], 28), fitting([10, 5, 5, 8], [0, 3, 1, 2], 5)
    ([0, 2, 3], [0])
    """
    kept = list(range(len(widths)))
    while len(kept) > 1 and sum(widths[index] for index in kept) + _GAP * (len(kept) - 1) > room:
        kept.remove(max(kept, key=lambda index: ranks[index]))
    return kept


_LOG_LINES = 6
_FRAME_LINES = 3
"""Around the rows of the table of subscriptions: a blank line, the headings, the note."""


def _log(info: Info, status: Status) -> Table:
    facts = (
        ("log", f"{info.schema} on {info.server}"),
        ("head", f"{status.head:,}"),
        ("rate", f"{status.rate:,.2f} events/s"),
        ("on disk", bytes_text(status.bytes_on_disk)),
        ("segments", f"{status.segments}, until position {status.segments_until:,}"),
        ("retention", str(status.retention)),
    )
    table = Table.grid(padding=(0, _GAP))
    table.add_column(style="bold")
    table.add_column(overflow="ellipsis", no_wrap=True)
    for name, fact in facts:
        table.add_row(name, _text(fact))
    return table


def _appenders(appenders: Sequence[BlockingAppender], space: Space | None) -> Table:
    rows = [
        (
            str(appender.pid or appender.gid or appender.virtual_transaction),
            appender.application or "?",
            "?" if appender.age is None else duration(appender.age),
        )
        for appender in appenders
    ]
    return _table(("OPEN APPENDER", "APPLICATION", "AGE"), _first(rows, space), space)


def _subscriptions(every: Sequence[SubscriptionStatus], space: Space | None, used: int) -> RenderableType:
    """The table of subscriptions, with a note of what is missing. `used`: the lines of all else."""
    shown = every if space is None else _farthest_behind(every, space, used)
    cells = [[column.cell(one) for column in COLUMNS] for one in shown]
    kept = list(range(len(COLUMNS)))
    if space is not None:
        widths = _widths([column.heading for column in COLUMNS], cells)
        kept = fitting(widths, [column.rank for column in COLUMNS], space.columns)
    table = _table(
        tuple(COLUMNS[index].heading for index in kept),
        [tuple(row[index] for index in kept) for row in cells],
        space,
        bad=[[COLUMNS[index].is_bad(one) for index in kept] for one in shown],
    )
    notes = []
    if missing := len(every) - len(shown):
        notes.append(f"{counted(missing, 'subscription')} more, less far behind")
    if hidden := [column.heading for index, column in enumerate(COLUMNS) if index not in kept]:
        notes.append(f"no room for {', '.join(hidden)}")
    return Group(table, _text(f"({'; '.join(notes)})")) if notes else table


def _farthest_behind(every: Sequence[SubscriptionStatus], space: Space, used: int) -> Sequence[SubscriptionStatus]:
    """As many as there is room for. All of them keep their order."""
    most = len(every) if space.rows is None else max(space.rows - used, _FEWEST_ROWS)
    return every if len(every) <= most else sorted(every, key=lambda one: -(one.lag_seconds or 0.0))[:most]


def _holder(holder: Holder) -> str:
    """The name of a subscription that holds old events, and why it does not handle them."""
    reason = " (paused)" if holder.is_paused else "" if holder.is_run else " (stopped)"
    return printable_line(holder.subscription) + reason


def _pauses(pauses: Sequence[tuple[str, Paused]], space: Space | None) -> Table:
    """The table of pauses: the subscription, who paused it, since when, and why."""
    rows = [
        (
            name,
            "an operator" if paused.by == "operator" else "its dispatcher",
            f"{paused.at:%Y-%m-%d %H:%M:%S %Z}",
            shortened(paused.reason, 500),
        )
        for name, paused in pauses
    ]
    return _table(("SUBSCRIPTION", "PAUSED BY", "SINCE", "REASON"), _first(rows, space), space)


def _errors(failing: Sequence[SubscriptionStatus], space: Space | None) -> Table:
    rows = [(one.name, shortened(one.last_error or "", 500)) for one in failing]
    return _table(("SUBSCRIPTION", "LAST ERROR"), _first(rows, space), space)


def _first(rows: Sequence[tuple[str, ...]], space: Space | None) -> Sequence[tuple[str, ...]]:
    """As many rows as a table beside that of subscriptions may have."""
    return rows if space is None or space.rows is None else rows[:_FEWEST_ROWS]


def _lines(rows: Sequence[object]) -> int:
    """The lines of a table beside that of subscriptions, with the blank one before it."""
    return 2 + min(len(rows), _FEWEST_ROWS) if rows else 0


def _table(
    headings: tuple[str, ...],
    rows: Sequence[tuple[str | int, ...]],
    space: Space | None,
    bad: Sequence[Sequence[bool]] = (),
) -> Table:
    """Aligned columns: text to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_edge=False)
    widths = _widths(headings, rows)
    for index, heading in enumerate(headings):
        is_last = index == len(headings) - 1
        # The last column gets the rest of a terminal.
        limit = space.columns - sum(widths[:-1]) - _GAP * (len(widths) - 1) if space and is_last else _MOST_TEXT
        table.add_column(
            heading,
            justify="right" if rows and all(isinstance(row[index], int) for row in rows) else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(limit, 1) if space else None,
        )
    for number, row in enumerate(rows):
        is_bad = bad[number] if bad else [False] * len(row)
        table.add_row(*(_text(_shown(cell), style="red" if red else "") for cell, red in zip(row, is_bad, strict=True)))
    return table


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str | int]]) -> list[int]:
    """The cells that each column takes on a terminal."""
    return [
        min(max(cell_len(_shown(cell)) for cell in (heading, *(row[index] for row in rows))), _MOST_TEXT)
        for index, heading in enumerate(headings)
    ]


def _shown(cell: str | int) -> str:
    return f"{cell:,}" if isinstance(cell, int) else printable_line(cell)


def _text(text: str, *, style: str = "") -> Text:
    """Text as it is: rich would read brackets in plain strings as markup."""
    return Text(printable_line(text), style=style, no_wrap=True, overflow="ellipsis")


def _apart(blocks: Sequence[RenderableType]) -> Iterator[RenderableType]:
    for number, block in enumerate(blocks):
        if number:
            yield Text("")
        yield block
