"""`pgbackend doctor`: says what is wrong with a log and its server, and prints the line that cures each finding."""

import asyncio
from dataclasses import asdict
from json import dumps
from textwrap import fill

import click
from click.core import ParameterSource

from pgbackend.cli.options import LogAddress, log_options
from pgbackend.cli.terminal import counted, printable
from pgbackend.doctor import SEVERITIES, Examination, Finding, Severity, examine

_EXIT_CODES: dict[Severity, int] = {"note": 0, "warning": 3, "error": 4}
_WIDTH = 110


@click.command()
@log_options
@click.option("--json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--min-severity", type=click.Choice(SEVERITIES), default="note", show_default=True,
    help="Leave out findings that are less severe. The exit code goes by the others.",
)  # fmt: skip
@click.pass_context
def doctor(context: click.Context, *, log: LogAddress, json: bool, min_severity: Severity) -> None:
    """Look for what is wrong with the log, its server and the way to it, and print the line that cures each finding.

    Nothing is changed, and no cure is run. A cure that ends or deletes something says so. The owner sees most, and so
    does an operator who also has pg_read_all_stats.

    Exit codes: 0 nothing found, or notes only; 3 warnings; 4 errors; 1 the log could not be examined.
    """
    found = asyncio.run(_examine(log))
    shown = [one for one in found.findings if SEVERITIES.index(one.severity) >= SEVERITIES.index(min_severity)]
    if json:
        facts = {"log": str(log), "looked_at": found.looked_at, "findings": [asdict(one) for one in shown]}
        click.echo(dumps(facts, indent=2))
    else:
        click.echo(_render(log, found, shown))
        if hint := _hint(context, shown):
            click.echo(hint)
    context.exit(max((_EXIT_CODES[one.severity] for one in shown), default=0))


def _hint(context: click.Context, shown: list[Finding]) -> str | None:
    """Says which option the printed commands lack, because it may hold a password. None if they lack none."""
    given = [
        option
        for option, name in (("--dsn", "dsn"), ("--data-dir", "data_dir"))
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if not given or not any((one.cure or "").startswith("pgbackend ") for one in shown):
        return None
    return f"Commands of pgbackend that use the log need the same {given[0]} as this one."


async def _examine(log: LogAddress) -> Examination:
    async with log.served() as dsn:
        return await examine(dsn, listen_dsn=log.listen_dsn, schema=log.schema)


def _render(log: LogAddress, found: Examination, shown: list[Finding]) -> str:
    blocks = [f"log {_line(str(log))}\n" + fill(f"looked at {', '.join(found.looked_at)}", _WIDTH)]
    for severity in reversed(SEVERITIES):
        group = [one for one in shown if one.severity == severity]
        if group:
            blocks.append("\n\n".join([counted(len(group), severity).upper(), *map(_render_finding, group)]))
    blocks.append("docs/doctor.md explains each finding under its name." if shown else "nothing found")
    return "\n\n".join(blocks)


def _render_finding(finding: Finding) -> str:
    lines = [
        f"{finding.check}: {_line(finding.subject)}",
        fill(_line(finding.what), _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
    ]
    if finding.cure:
        lines += [f"      {_line(line)}" for line in finding.cure.splitlines()]
    if finding.destroys:
        lines.append(fill(f"destroys {_line(finding.destroys)}", _WIDTH, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(lines)


def _line(text: str) -> str:
    """As one line that cannot control the terminal."""
    return printable(text.replace("\n", " "))
