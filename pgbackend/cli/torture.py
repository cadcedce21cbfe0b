"""`pgbackend torture`: checks every promise while producers, workers and PostgreSQL are killed."""

import asyncio
import logging
import secrets
import sys
from pathlib import Path
from typing import TextIO, get_args

import click

from pgbackend.torture.plan import Name, Plan
from pgbackend.torture.run import run
from pgbackend.torture.verdict.rulings import Outcome

_EXIT_CODES: dict[Outcome, int] = {"kept": 0, "broken": 1, "not judged": 3}


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="How long the run takes."
)
@click.option("--seed", type=click.IntRange(min=0), help="Repeat the plan of an earlier run. Default: a random one.")
@click.option(
    "--plan",
    "name",
    type=click.Choice(get_args(Name)),
    default="log",
    show_default=True,
    help="log: every promise of the log. bank: transfers by transactional subscriptions. orders: orders that are "
    "inserted together with their events.",
)
@click.option("--print-plan", "only_print", is_flag=True, help="Only print the faults and their times.")
@click.option(
    "--dsn",
    envvar="PGBACKEND_DSN",
    metavar="URL",
    show_envvar=True,
    help="The database to use, in a scratch schema that is dropped afterwards; its server is not restarted. "
    "Default: an embedded server, which is restarted and killed too.",
)
@click.option(
    "--report",
    "page",
    type=click.File("w", encoding="utf-8", lazy=False),
    help="Write the report to this file, as Markdown.",
)
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the records in this new directory."
)
@click.pass_context
def torture(
    context: click.Context,
    *,
    minutes: float,
    seed: int | None,
    name: Name,
    only_print: bool,
    dsn: str | None,
    page: TextIO | None,
    keep: Path | None,
) -> None:
    """Kill, freeze and cut off producers, workers and PostgreSQL, and check every promise against what happened.

    Exits with 1 and the evidence if a promise was broken, and with 3 if the run cannot be judged because the machine
    stood still. The same --plan, --seed and --minutes give the same faults. With --dsn there are others, without
    restarts of PostgreSQL.
    """
    # Restarts of the embedded server are planned here. Do not print warnings about them.
    logging.getLogger("pgbackend").addHandler(logging.NullHandler())
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    plan = Plan.make(seed, minutes * 60, server=dsn is None, name=name)
    server = "an embedded PostgreSQL, which is restarted" if dsn is None else "the PostgreSQL of --dsn, which is not"
    click.echo(f"… plan {plan.name}, seed {plan.seed}, {minutes:g} minutes, on {server}", err=True)
    if only_print:
        click.echo(str(plan))
        return
    if sys.platform != "linux":
        raise click.UsageError("pgbackend torture finds processes in /proc, which only Linux has. Run it there.")
    report = asyncio.run(run(plan, dsn=dsn, keep=keep, progress=lambda text: click.echo(f"… {text}", err=True)))
    click.echo(report.text())
    if page is not None:
        page.write(report.markdown())
    context.exit(_EXIT_CODES[report.verdict.outcome])
