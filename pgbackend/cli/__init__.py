"""The command line: parses, calls `Backend` or the broker, prints. No SQL and no logic of its own.

Each command lives in a module that is imported when it is needed, so that `--help` and `--version` answer at once and a
command that needs an extra package does not break the others. Whatever goes wrong ends in one line that says what to
do, and exit code 1; wrong usage is 2.
"""

from importlib import import_module

import click

from pgbackend.errors import PgBackendError

_COMMANDS = {
    "bench": "pgbackend.cli.bench",
    "dead-letters": "pgbackend.cli.dead_letters",
    "migrate": "pgbackend.cli.migrate",
    "serve": "pgbackend.cli.serve",
    "status": "pgbackend.cli.status",
}


class _Commands(click.Group):
    """The commands of `_COMMANDS`, with this package's errors as one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _COMMANDS:
            return None
        try:
            module = import_module(_COMMANDS[cmd_name])
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.partition(".")[0] == "pgbackend":
                raise
            return _not_installed(cmd_name, error.name)
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PgBackendError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


def _not_installed(name: str, package: str | None) -> click.Command:
    message = f"`{name}` needs the package {package}. Run `pip install 'pgbackend[all]'`."

    @click.command(
        name, short_help=f"Needs {package}.", context_settings={"ignore_unknown_options": True, "help_option_names": []}
    )
    @click.argument("args", nargs=-1, type=click.UNPROCESSED)
    def command(args: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever was asked, the answer is the same
        raise click.ClickException(message)

    return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pgbackend", message="%(prog)s %(version)s")
def main() -> None:
    """A durable event log for CloudEvents, inside the PostgreSQL you already run.

    Every option can also be given by environment, where the help shows its name. Exit codes: 0 done, 1 failed with one
    clear line, 2 wrong usage.
    """
