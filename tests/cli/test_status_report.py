"""The report of `pgbackend status`: its content, and how it fits a terminal."""

import re
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from pgbackend.cli.status_report import COLUMNS, Space, report
from pgbackend.model import (
    BlockingAppender,
    Epoch,
    Holder,
    Info,
    Paused,
    Position,
    Retention,
    ShardStatus,
    Status,
    SubscriptionStatus,
)

INFO = Info(name="PostgreSQL", version="0", schema="pgbackend", server="localhost:5432/events")
HOSTILE = "a\x1b[2J\x1b]0;gone\x07\u202eb\r\n[bold red]c[/]\x9b1m"


def shard(number: int = 0, *, owner: str | None = None, until: int | None = None) -> ShardStatus:
    return ShardStatus(
        shard=number, shards=2, position=Position(5), pending=2, epoch=Epoch(1), owner=None, owner_name=owner,
        until=None if until is None else Position(until),
    )  # fmt: skip


def subscription(
    name: str,
    *,
    lag_seconds: float | None = 0.0,
    last_error: str | None = None,
    state: str = "elsewhere",
    owner: str | None = "worker/1",
    dead_letters: int = 0,
    paused: Paused | None = None,
) -> SubscriptionStatus:
    return SubscriptionStatus(
        name=name, order="none", shards=(shard(0, owner=owner),), lag=12_345, lag_seconds=lag_seconds, in_flight=1,
        redeliveries=0, dead_letters=dead_letters, skipped=0, last_error=last_error, complete=False, paused=paused,
        state=state,
    )  # fmt: skip


def pause(reason: str) -> Paused:
    return Paused(at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), by="operator", reason=reason)


def status(
    *subscriptions: SubscriptionStatus, appenders: tuple[BlockingAppender, ...] = (), holders: tuple[Holder, ...] = ()
) -> Status:
    return Status(
        head=Position(1_000_000),
        rate=1234.56,
        bytes_on_disk=5 << 30,
        segments=12,
        segments_until=Position(110_000_000),
        subscriptions=subscriptions,
        appenders=appenders,
        retention=Retention(keep=timedelta(days=7)),
        holders=holders,
    )


def lines(found: Status, space: Space | None = None, *, color: bool = False) -> list[str]:
    """The report as it is printed."""
    width = 100_000 if space is None else space.columns
    console = Console(width=width, force_terminal=color, color_system="standard" if color else None, highlight=False)
    with console.capture() as captured:
        console.print(report(INFO, found, space))
    return [line.rstrip() for line in captured.get().splitlines()]


def many(count: int) -> list[SubscriptionStatus]:
    return [
        subscription(f"subscription {number:03}", lag_seconds=float(number), last_error=f"error {number}")
        for number in range(count)
    ]


def test_the_log_is_described_in_lines_that_begin_with_a_word() -> None:
    assert lines(status())[:6] == [
        "log        pgbackend on localhost:5432/events",
        "head       1,000,000",
        "rate       1,234.56 events/s",
        "on disk    5.0 GiB",
        "segments   12, until position 110,000,000",
        "retention  keep 7d, dead letters forever",
    ]


def test_all_columns_are_there_without_a_terminal_however_many_subscriptions() -> None:
    shown = lines(status(*many(200)))
    (heading,) = [line for line in shown if line.startswith("SUBSCRIPTION  ") and "LAG" in line]
    assert re.split(r" {2,}", heading) == [column.heading for column in COLUMNS]
    first = shown.index(heading) + 1
    assert [line.split()[1] for line in shown[first : first + 200]] == [f"{number:03}" for number in range(200)]
    row = dict(zip(re.split(r" {2,}", heading), re.split(r" {2,}", shown[first]), strict=True))
    assert (row["LAG"], row["IN FLIGHT"], row["PENDING"], row["OWNERS"]) == ("12,345", "1", "2", "worker/1")


def test_a_report_without_a_terminal_has_neither_colors_nor_frames() -> None:
    text = "\n".join(lines(status(*many(3), subscription("bad", dead_letters=3))))
    assert text.isprintable() or set(text) - set(map(chr, range(32, 127))) <= {"\n", "…", "→"}


@pytest.mark.parametrize("columns", [20, 40, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_hidden_columns_are_named(columns: int) -> None:
    found = status(
        subscription("x" * 300, last_error="error " * 100, owner="host/" + "y" * 200, paused=pause("z" * 200)),
        subscription("日本語" * 30, last_error="日本語" * 100),
        appenders=(
            BlockingAppender(virtual_transaction="3/4", pid=7, gid=None, application="w" * 300, age=75.0),
        ),
        holders=(Holder(subscription="v" * 300, is_run=False, is_paused=False),),
    )  # fmt: skip
    shown = lines(found, Space(columns=columns))
    console = Console(width=columns)
    assert all(console.measure(line).maximum <= columns for line in shown)
    heading = next(line for line in shown if line.startswith("SUBSCRIPTION"))
    hidden = [column.heading for column in COLUMNS if not re.search(rf"(^| ){column.heading}( |$)", heading)]
    if columns == 80:
        assert {"LAG", "BEHIND"} <= set(re.split(r" {2,}", heading))
    if columns >= 40:
        assert hidden == [] or any(line.startswith(f"(no room for {hidden[0]}"[:columns]) for line in shown)


def test_a_low_terminal_shows_those_that_are_farthest_behind_and_counts_the_others() -> None:
    shown = lines(status(*many(200)), Space(columns=200, rows=30))
    assert len(shown) <= 30
    heading = next(number for number, line in enumerate(shown) if line.startswith("SUBSCRIPTION"))
    names = [line.split()[1] for line in shown[heading + 1 :] if line.startswith("subscription")]
    assert names[:3] == ["199", "198", "197"]
    (note,) = [line for line in shown if line.startswith("(")]
    rows = next(number for number, line in enumerate(shown) if line.startswith("(")) - heading - 1
    assert note == f"({200 - rows} subscriptions more, less far behind)"


@pytest.mark.parametrize("space", [None, Space(columns=200, rows=50)], ids=["pipe", "terminal"])
def test_names_and_errors_cannot_control_the_terminal(space: Space | None) -> None:
    found = status(
        subscription(HOSTILE, last_error=HOSTILE, owner=HOSTILE, state=f"worker died: {HOSTILE}"),
        subscription(HOSTILE, paused=pause(HOSTILE)),
        appenders=(
            BlockingAppender(virtual_transaction="-1/7", pid=None, gid=HOSTILE, application=HOSTILE, age=None),
        ),
        holders=(Holder(subscription=HOSTILE, is_run=False, is_paused=False),),
    )  # fmt: skip
    shown = lines(found, space)
    assert all(line.isprintable() for line in shown), shown
    text = "\n".join(shown)
    assert "\\x1b[2J" in text
    assert "[bold red]" in text, "brackets are text, not markup"


def test_what_needs_a_look_is_red_on_a_terminal() -> None:
    found = status(subscription("bad", dead_letters=3), subscription("good"), subscription("idle", state="stopped"))
    red = [line for line in lines(found, Space(columns=200), color=True) if "\x1b[31m" in line]
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line).split()[0] for line in red] == ["bad", "idle"]


def test_a_subscription_that_changes_its_shards_shows_both_numbers() -> None:
    changing = SubscriptionStatus(
        name="s", order="none", shards=(shard(0, until=9), shard(1, until=9), shard(0), shard(1), shard(2)), lag=0,
        lag_seconds=0.0, in_flight=0, redeliveries=0, dead_letters=0, skipped=0, last_error=None, complete=False,
        paused=None, state="running",
    )  # fmt: skip
    assert any("2 → 3" in line for line in lines(status(changing)))


def test_a_pause_says_who_made_it_since_when_and_why() -> None:
    shown = lines(status(subscription("s", state="paused: a migration", paused=pause("a migration"))))
    (line,) = [line for line in shown if "an operator" in line]
    assert line.split(maxsplit=1) == ["s", "an operator  2026-01-02 03:04:05 UTC  a migration"]
    assert any(re.search(r"\bpaused\b", line) for line in shown if "worker/1" in line)


def test_a_paused_holder_of_old_events_is_named_as_such() -> None:
    shown = lines(status(holders=(Holder(subscription="s", is_run=True, is_paused=True),)))
    assert "events older than that stay because of: s (paused)" in shown
