"""The command line: parses options, calls `Backend` or the broker, and prints.

Each command lives in a module of its own, which is imported only when the command runs. An error ends in one line that
says what to do, and exit code 1; wrong usage is exit code 2.
"""

import errno
import os
import sys
from importlib import import_module
from pathlib import Path

import click

from pgbackend.backend import VERSION
from pgbackend.cli.terminal import printable_line
from pgbackend.errors import PgBackendError

_COMMANDS = {
    "bench": "pgbackend.cli.bench",
    "dead-letters": "pgbackend.cli.dead_letters",
    "doctor": "pgbackend.cli.doctor",
    "export": "pgbackend.cli.export",
    "grants": "pgbackend.cli.grants",
    "import": "pgbackend.cli.import_",
    "migrate": "pgbackend.cli.migrate",
    "produce": "pgbackend.cli.produce",
    "redact": "pgbackend.cli.redact",
    "retention": "pgbackend.cli.retention",
    "serve": "pgbackend.cli.serve",
    "status": "pgbackend.cli.status",
    "subscriptions": "pgbackend.cli.subscriptions",
    "tail": "pgbackend.cli.tail",
    "torture": "pgbackend.cli.torture",
}


class _Commands(click.Group):
    """The commands of `_COMMANDS`. An error of this package becomes one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(_COMMANDS[cmd_name])
        command: click.Command = getattr(module, _COMMANDS[cmd_name].rpartition(".")[2])
        return command

    def invoke(self, ctx: click.Context) -> object:
        _open_closed_streams()
        try:
            return super().invoke(ctx)
        except PgBackendError as error:
            raise click.ClickException(printable_line(" ".join(str(error).split()))) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise click.ClickException(f"The output cannot be written: {error.strerror}.") from error


def _open_closed_streams() -> None:
    """Standard streams that the caller has closed, as `2>&-` does, are empty and take everything."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - it stays until the process ends
            setattr(sys, name, stream)


_SETTINGS = {"auto_envvar_prefix": "PGBACKEND", "help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Commands, context_settings=_SETTINGS)
# Not by environment: a deployment may set PGBACKEND_VERSION for itself, and must not get the version printed.
@click.version_option(VERSION, message="%(prog)s %(version)s", allow_from_autoenv=False)
def main() -> None:
    """A durable event log for CloudEvents, inside the PostgreSQL you already run.

    Every option also comes from the environment: from the variable that its help shows, or else from
    PGBACKEND_COMMAND_OPTION, such as PGBACKEND_BENCH_ROUNDS. Exit codes: 0 done, 1 failed with one line that says why,
    2 wrong usage.
    """
