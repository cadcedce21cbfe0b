"""`pgbackend serve`: runs the broker, in this process or in several below it, or checks its configuration."""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pgbackend import facts
from pgbackend.cli.options import check_server, server_options
from pgbackend.errors import ConfigError

if TYPE_CHECKING:
    from pgbackend.serve.options import Options

_SECTIONS = {
    "Database": ["dsn", "listen_dsn", "schema", "startup_timeout", "data_dir"],
    "Configuration": ["config", "config_inline", "check_config", "print_schema"],
    "Taking events in": ["host", "port", "admin_port", "allowed_host", "tls_cert", "tls_key", "tls_client_ca"],
    "Delivering them": ["deny_private_targets", "max_hops"],
    "Process": ["workers", "log_format", "log_level"],
}


class _Sectioned(click.Command):
    """A command whose help lists its many options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {one.name: record for one in self.get_params(ctx) if (record := one.get_help_record(ctx))}
        for section, names in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(records.values()))


class _PortOption(click.Option):
    """A port. It ignores a variable that Kubernetes set: a Service named `pgbackend` makes PGBACKEND_PORT a URL."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        if value is not None and _SERVICE_LINK.match(value):
            ctx.meta.setdefault(_IGNORED, {})[self.envvar] = value
            return None
        return value


_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")
_IGNORED = "pgbackend.ignored"

_Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def _file(option: str, envvar: str, text: str) -> _Decorator:
    kind = click.Path(dir_okay=False, path_type=Path)
    return click.option(option, type=kind, envvar=envvar, show_envvar=True, metavar="FILE", help=text)


@click.command(cls=_Sectioned)
@server_options
@click.option(
    "--startup-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    envvar="PGBACKEND_STARTUP_TIMEOUT",
    default=60.0,
    show_default=True,
    show_envvar=True,
    help="How long to wait for PostgreSQL to answer. 0 does not wait.",
)
@_file(
    "--config",
    "PGBACKEND_CONFIG_FILE",
    "The triggers, and who may send: YAML or JSON, read again when it changes. Without a file, events are only stored.",
)
@click.option(
    "--config-inline",
    metavar="TEXT",
    envvar="PGBACKEND_CONFIG",
    show_envvar=True,
    help="The content of such a file, instead of --config.",
)
@click.option(
    "--check-config",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=False),
    metavar="FILE",
    allow_from_autoenv=False,
    help="Only check FILE, and the secrets that it takes from elsewhere. Exit with 1 if it is not valid.",
)
@click.option(
    "--print-schema", is_flag=True, allow_from_autoenv=False, help="Only print the JSON Schema of such files."
)
@click.option(
    "--host",
    metavar="ADDRESS",
    envvar="PGBACKEND_HOST",
    default="127.0.0.1",
    show_default=True,
    show_envvar=True,
    help="The address to listen on. 0.0.0.0 is every IPv4 address of the machine, :: every address.",
)
@click.option(
    "--port",
    cls=_PortOption,
    type=click.IntRange(0, 65535),
    metavar="NUMBER",
    envvar="PGBACKEND_PORT",
    default=8080,
    show_default=True,
    show_envvar=True,
    help="The port to listen on. 0 takes any free one.",
)
@click.option(
    "--admin-port",
    cls=_PortOption,
    type=click.IntRange(0, 65535),
    metavar="NUMBER",
    envvar="PGBACKEND_ADMIN_PORT",
    show_envvar=True,
    help="A separate port for health checks and metrics, without TLS. /metrics is then not served at --port.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    envvar="PGBACKEND_ALLOWED_HOST",
    show_envvar=True,
    help="A name that requests may have in their Host header, such as a reverse proxy's. Can be given several times; "
    "* allows any. Without it, a loopback address allows only its own names, and other addresses allow any.",
)
@_file("--tls-cert", "PGBACKEND_TLS_CERT", "Serve HTTPS with this certificate chain; read again when it changes.")
@_file("--tls-key", "PGBACKEND_TLS_KEY", "The private key of --tls-cert, unless it is in the same file.")
@_file("--tls-client-ca", "PGBACKEND_TLS_CLIENT_CA", "Accept only clients with a certificate from these authorities.")
@click.option(
    "--deny-private-targets",
    is_flag=True,
    envvar="PGBACKEND_DENY_PRIVATE_TARGETS",
    show_envvar=True,
    help="Deliver only to public addresses: not to private, loopback or link-local ones.",
)
@click.option(
    "--max-hops",
    type=click.IntRange(1, 65535),
    metavar="NUMBER",
    envvar="PGBACKEND_MAX_HOPS",
    default=255,
    show_default=True,
    show_envvar=True,
    help="The longest chain of events that are replies to replies. A longer one is taken for a loop and ends.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="NUMBER",
    envvar="PGBACKEND_WORKERS",
    default=1,
    show_default=True,
    show_envvar=True,
    help="Broker processes that share the port. Several run under a supervisor.",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    envvar="PGBACKEND_LOG_FORMAT",
    default="console",
    show_default=True,
    show_envvar=True,
    help="The format of log lines on standard error: for people, or for machines.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    envvar="PGBACKEND_LOG_LEVEL",
    default="info",
    show_default=True,
    show_envvar=True,
    help="The lowest level that is logged.",
)
@click.pass_context
def serve(context: click.Context, /, *, check_config: Path | None, print_schema: bool, **options: Any) -> None:
    """Take CloudEvents in over HTTP and deliver them to the targets of a configuration file.

    Without --dsn, an embedded PostgreSQL is started. SIGTERM and SIGINT drain and exit. SIGHUP reads configuration and
    certificates again; with several processes it restarts them one by one.
    """
    try:
        if print_schema:
            _print_schema()
        elif check_config is not None:
            _check(context, check_config)
        else:
            _serve(_options(context, options), ignored=context.meta.get(_IGNORED, {}))
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"`pgbackend serve` needs the package {error.name}. Run `pip install 'pgbackend[all]'`."
        ) from error


def _print_schema() -> None:
    from pgbackend.serve.config.schema import json_schema  # noqa: PLC0415 - of the extra `serve`

    click.echo(json.dumps(json_schema(), indent=2))


def _check(context: click.Context, file: Path) -> None:
    from pgbackend.serve.config.load import load_file  # noqa: PLC0415 - as above

    try:
        triggers = load_file(file).triggers
    except ConfigError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        context.exit(1)
    counted = "1 trigger" if len(triggers) == 1 else f"{len(triggers) or 'no'} triggers"
    click.echo(f"{file}: valid, {counted}" + (f": {', '.join(triggers)}" if triggers else ""))


def _serve(options: "Options", *, ignored: Mapping[str, str]) -> None:
    import uvloop  # noqa: PLC0415 - as above

    from pgbackend.serve import app, supervisor  # noqa: PLC0415 - as above
    from pgbackend.serve.operations import logs  # noqa: PLC0415 - as above

    logs.configure(options.log_format, options.log_level)
    for variable, value in ignored.items():
        facts.emit(
            "variable ignored", level=logging.WARNING, variable=variable, value=value,
            reason="Kubernetes set it for a Service of that name. Set enableServiceLinks: false, or give the option.",
        )  # fmt: skip
    run = app.serve if options.workers == 1 else supervisor.supervise
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(options, say=click.echo))


def _options(context: click.Context, options: dict[str, Any]) -> "Options":
    from pgbackend.serve.ingest.hosts import checked_host  # noqa: PLC0415 - as above
    from pgbackend.serve.options import Options  # noqa: PLC0415 - as above

    try:
        options["allowed_hosts"] = tuple(checked_host(host) for host in options.pop("allowed_host"))
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    check_server(options["dsn"], options["data_dir"])
    if options["tls_cert"] is None and (options["tls_key"] is not None or options["tls_client_ca"] is not None):
        raise click.UsageError("--tls-key and --tls-client-ca need --tls-cert.")
    if options["config"] is not None and options["config_inline"] is not None:
        del options[_overridden(context)]
    return Options(**options)


def _overridden(context: click.Context) -> str:
    """The configuration from the environment, where the other is on the command line. Two of one kind are an error."""
    is_given = context.get_parameter_source("config") is ParameterSource.COMMANDLINE
    inline_is_given = context.get_parameter_source("config_inline") is ParameterSource.COMMANDLINE
    if is_given == inline_is_given:
        raise click.UsageError(
            "Give --config or --config-inline, not both (PGBACKEND_CONFIG_FILE or PGBACKEND_CONFIG)."
        )
    return "config_inline" if is_given else "config"
