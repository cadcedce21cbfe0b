"""The command line: parses, calls `Backend` or the broker, prints. No SQL and no logic of its own.

Each command lives in a module that is imported when it is needed, so that one does not pay for the others.
Whatever goes wrong ends in one line that says what to do, and exit code 1; wrong usage is 2.
"""

from importlib import import_module

import click

from pgbackend.backend import VERSION
from pgbackend.errors import PgBackendError

_COMMANDS = {
    "bench": "pgbackend.cli.bench",
    "dead-letters": "pgbackend.cli.dead_letters",
    "grants": "pgbackend.cli.grants",
    "migrate": "pgbackend.cli.migrate",
    "serve": "pgbackend.cli.serve",
    "status": "pgbackend.cli.status",
    "subscriptions": "pgbackend.cli.subscriptions",
    "torture": "pgbackend.cli.torture",
}


class _Commands(click.Group):
    """The commands of `_COMMANDS`, with this package's errors as one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(_COMMANDS[cmd_name])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PgBackendError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


_SETTINGS = {"auto_envvar_prefix": "PGBACKEND", "help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=_Commands, context_settings=_SETTINGS)
# Not by environment: a deployment that notes its PGBACKEND_VERSION must not get that printed instead of its work.
@click.version_option(VERSION, message="%(prog)s %(version)s", allow_from_autoenv=False)
def main() -> None:
    """A durable event log for CloudEvents, inside the PostgreSQL you already run.

    Every option can also be given by environment: under the name that its help shows, or else as
    PGBACKEND_COMMAND_OPTION, such as PGBACKEND_BENCH_ROUNDS. Exit codes: 0 done, 1 failed with one clear line, 2 wrong
    usage.
    """
