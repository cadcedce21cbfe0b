"""`pgbackend retention`: shows and sets how long the log keeps events."""

import asyncio
import re
from datetime import timedelta
from typing import TypeVar

import click

from pgbackend.cli.options import LogAddress, connected, log_options
from pgbackend.model import Retention, time_text

_UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days"}
_SIZES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

Value = TypeVar("Value")


class _Time(click.ParamType[tuple[timedelta | None]]):
    """A number with its unit, or `forever`. Converted to a tuple, because None means that the option is absent."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[timedelta | None]:
        if value == "forever":
            return (None,)
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|min|h|d)", str(value))
        if match is None:
            self.fail(f"{value!r}: expected a number with s, min, h or d, such as 7d, or forever.", param, ctx)
        try:
            return (timedelta(**{_UNITS[match[2]]: float(match[1])}),)
        except OverflowError:
            self.fail(f"{value!r}: expected a shorter time.", param, ctx)


class _Size(click.ParamType[tuple[int | None]]):
    """A number of bytes, or `unlimited`."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None]:
        if value == "unlimited":
            return (None,)
        match = re.fullmatch(r"([0-9]{1,18})(|[KMGT]iB)", str(value))
        if match is None:
            self.fail(f"{value!r}: expected bytes, or a number with KiB, MiB, GiB or TiB, or unlimited.", param, ctx)
        return (int(match[1]) * _SIZES[match[2]],)


@click.command()
@click.option("--keep", type=_Time(), help="Events that every subscription has settled stay this long: 7d, or forever.")
@click.option("--max-age", type=_Time(), help="Older events go even if a subscription has not handled them.")
@click.option("--max-bytes", type=_Size(), help="Of a log that is larger, the oldest events go: 100GiB, or unlimited.")
@click.option("--dead-letters", type=_Time(), help="Dead letters stay this long.")
@log_options
def retention(
    *,
    log: LogAddress,
    keep: tuple[timedelta | None] | None,
    max_age: tuple[timedelta | None] | None,
    max_bytes: tuple[int | None] | None,
    dead_letters: tuple[timedelta | None] | None,
) -> None:
    """Show how long the log keeps events and dead letters, and change that.

    Times have the unit s, min, h or d. Options that are not given leave what is stored. All workers obey within 5 s.
    What a subscription loses to a hard limit (--max-age, --max-bytes) is in the column SKIPPED of `pgbackend status`.
    """

    async def change() -> Retention:
        async with connected(log) as backend:
            before = await backend.retention()
            if (keep, max_age, max_bytes, dead_letters) != (None, None, None, None):
                await backend.set_retention(
                    keep=_chosen(keep, before.keep),
                    max_age=_chosen(max_age, before.max_age),
                    max_bytes=_chosen(max_bytes, before.max_bytes),
                    dead_letters=_chosen(dead_letters, before.dead_letters),
                )
            return await backend.retention()

    found = asyncio.run(change())
    click.echo(f"keep          {time_text(found.keep)}")
    click.echo(f"max age       {time_text(found.max_age)}")
    click.echo(f"max bytes     {'unlimited' if found.max_bytes is None else found.max_bytes}")
    click.echo(f"dead letters  {time_text(found.dead_letters)}")


def _chosen(given: tuple[Value] | None, stored: Value) -> Value:
    return stored if given is None else given[0]
