"""`pgbackend serve`: the broker, in this process."""

import asyncio
import logging
from pathlib import Path

import click
from click.core import ParameterSource

from pgbackend.cli.options import backend_options


@click.command()
@backend_options(dsn_required=False)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="PGBACKEND_DATA_DIR",
    show_envvar=True,
    help="Where the embedded PostgreSQL keeps its data, without --dsn. Default: the user's data directory.",
)
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="PGBACKEND_CONFIG_FILE",
    show_envvar=True,
    help="The triggers, and who may send: a YAML or JSON file. Without one events are only taken in.",
)
@click.option(
    "--config-inline", metavar="TEXT", envvar="PGBACKEND_CONFIG", show_envvar=True, help="The same, as the text itself."
)
@click.option("--host", envvar="PGBACKEND_HOST", default="127.0.0.1", show_default=True, show_envvar=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    envvar="PGBACKEND_PORT",
    default=8080,
    show_default=True,
    show_envvar=True,
    help="0 is any free one.",
)
@click.pass_context
def serve(
    context: click.Context,
    *,
    dsn: str | None,
    listen_dsn: str | None,
    schema: str,
    data_dir: Path | None,
    config: Path | None,
    config_inline: str | None,
    host: str,
    port: int,
) -> None:
    """Take CloudEvents in over HTTP and deliver them to the targets of a configuration file.

    Without --dsn a PostgreSQL of its own is started. SIGTERM and SIGINT finish what is in progress.
    """
    if dsn is not None and data_dir is not None:
        raise click.UsageError("--data-dir is the embedded PostgreSQL's: give it or --dsn.")
    if config is not None and config_inline is not None:
        config, config_inline = _nearer(context, config, config_inline)
    try:
        import uvloop  # noqa: PLC0415 - the extra `serve`, which `--help` can do without

        from pgbackend.serve.app import Settings  # noqa: PLC0415 - as above
        from pgbackend.serve.app import serve as run  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"`pgbackend serve` needs the package {error.name}. Run `pip install 'pgbackend[all]'`."
        ) from error
    settings = Settings(
        dsn=dsn,
        listen_dsn=listen_dsn,
        schema=schema,
        data_dir=data_dir,
        config=config,
        config_inline=config_inline,
        host=host,
        port=port,
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(settings, say=click.echo))


def _nearer(context: click.Context, config: Path, inline: str) -> tuple[Path | None, str | None]:
    """Of two configurations the one on the command line; two of one kind are a mistake."""
    is_given = context.get_parameter_source("config") is ParameterSource.COMMANDLINE
    inline_is_given = context.get_parameter_source("config_inline") is ParameterSource.COMMANDLINE
    if is_given == inline_is_given:
        raise click.UsageError(
            "Give --config or --config-inline, not both (PGBACKEND_CONFIG_FILE or PGBACKEND_CONFIG)."
        )
    return (config, None) if is_given else (None, inline)
