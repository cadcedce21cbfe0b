"""`pgbackend bench`: how fast pgbackend is on this machine, compared with bare asyncpg."""

import asyncio
from dataclasses import asdict
from json import dumps

import click

from pgbackend.bench import Measurement, Report, run
from pgbackend.cli.options import table


@click.command()
@click.option(
    "--dsn",
    envvar="PGBACKEND_DSN",
    metavar="URL",
    show_envvar=True,
    help="The database to measure on, in a scratch schema that is dropped afterwards. Default: an embedded server.",
)
@click.option("--events", type=click.IntRange(min=1_000), default=50_000, show_default=True, help="Events in a round.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds of each measurement; the medians are shown.",
)
@click.option("--json", is_flag=True, help="Print one JSON object.")
def bench(dsn: str | None, *, events: int, rounds: int, json: bool) -> None:  # fmt: skip
    """Measure pgbackend and bare asyncpg with the same rows, in the same run.

    Takes a few minutes with the defaults. Compare the ratios, pgbackend's figure divided by asyncpg's: they depend less
    on the machine than the figures do.
    """
    report = asyncio.run(
        run(dsn, events=events, rounds=rounds, progress=lambda text: click.echo(f"… {text}", err=True))
    )
    if json:
        measurements = [{**asdict(each), "ok": each.ok} for each in report.measurements]
        click.echo(dumps({"machine": report.machine, "measurements": measurements}, indent=2))
    else:
        click.echo(_render(report))


def _render(report: Report) -> str:
    rows: list[tuple[object, ...]] = [
        (
            each.name,
            _figure(each, each.ours),
            each.against,
            _figure(each, each.bare),
            f"{each.ratio:.2f}",
            f"{'≥' if each.unit == 'events/s' else '≤'} {each.limit:g}",
            "ok" if each.ok else "MISSED",
        )
        for each in report.measurements
    ]
    machine = "\n".join(f"{name:<11} {value}" for name, value in report.machine.items())
    return f"{table(('PGBACKEND', '', 'BARE ASYNCPG', '', 'RATIO', 'WANTED', ''), rows)}\n\n{machine}"


def _figure(measurement: Measurement, value: float) -> str:
    return f"{value:,.0f} /s" if measurement.unit == "events/s" else f"{value:.2f} ms"
