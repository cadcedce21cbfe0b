"""Wires one broker process: its backend, its triggers, its HTTP server, and what follows their files.

`serve()` is all of `pgbackend serve` in one process; `run()` is a broker on ports that are bound already, as each
process under `supervisor` runs it. `broker` starts and drains the parts in order.
"""

import asyncio
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any

from pgbackend.backend import Backend
from pgbackend.errors import ConfigError
from pgbackend.serve.announcement import announce
from pgbackend.serve.broker import Broker
from pgbackend.serve.config import watch
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.console import BrokerConsole
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.subscribing import SubscriptionFactory
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.ingest.admin import Admin
from pgbackend.serve.ingest.handler import Ingest
from pgbackend.serve.ingest.hosts import Hosts
from pgbackend.serve.ingest.limits import ADMIN_CONNECTIONS, allow_many_connections
from pgbackend.serve.ingest.listener import Listener
from pgbackend.serve.ingest.ports import Ports, bind
from pgbackend.serve.ingest.tls import TLS
from pgbackend.serve.operations import tracing
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.serve.options import Options
from pgbackend.serve.process import Signals, collect_garbage_rarely, handling_signals, resolve_many_names
from pgbackend.serve.reloader import Reloader

PRODUCE_TIMEOUT = 10.0
"""Seconds until a sender gets 503 when PostgreSQL hangs: less than most clients are ready to wait."""


async def serve(options: Options, *, say: Callable[[str], None]) -> None:
    """Return after a SIGTERM or SIGINT, once everything is drained. A second SIGINT ends the process at once.

    `say` gets lines for people: where the broker listens and what it does, once it does. Raises PgBackendError.
    """
    configuration = options.configuration()
    with closing(bind_ports(options)) as ports, handling_signals() as signals:
        if options.dsn is None:
            say(embedded_notice(options))
        await run(options, configuration, ports, signals, lambda: say_serving(options, configuration, ports, say))


def bind_ports(options: Options) -> Ports:
    """Sockets bound as the options say. Raises ConfigError."""
    events = bind(options.host, options.port)
    if options.admin_port is None:
        return Ports(events)
    try:
        return Ports(events, bind(options.host, options.admin_port, option="--admin-port"))
    except ConfigError:
        events.close()
        raise


async def run(
    options: Options, configuration: Configuration, ports: Ports, signals: Signals, on_serving: Callable[[], None]
) -> None:
    """Serve on `ports`, and close them, until `signals.stop` is set; return once everything is drained.

    `on_serving` is called once the broker takes events in. Raises PgBackendError.
    """
    certificates = watch.digests(options.certificate_files)
    tls = None if options.tls_cert is None else TLS(options.tls_cert, options.tls_key, options.tls_client_ca)
    allow_many_connections()
    resolve_many_names()
    collect_garbage_rarely()
    traces = tracing.from_environment(destination=options.schema)
    backend = make_backend(options, deduplicate=configuration.deduplicate)
    try:
        async with Pool(deny_private=options.deny_private_targets) as pool:
            with Metrics(backend) as metrics:
                factory = SubscriptionFactory(
                    pool,
                    # A target that answers an event again may mean it: its replies are stored however often they come.
                    partial(backend.produce_many, deduplicate=False),
                    metrics=metrics,
                    tracing=traces,
                    max_hops=options.max_hops,
                )
                triggers = Triggers(backend, factory)
                bound, *_ = ports.events.getsockname()
                console = BrokerConsole(backend, configuration, bound=bound)
                ingest = Ingest(
                    backend,
                    auth=configuration.ingest,
                    metrics=metrics,
                    tracing=traces,
                    has_admin=ports.admin is not None,
                    console=console,
                )
                hosts = Hosts(bound, options.allowed_hosts, name=options.host)
                broker = Broker(
                    backend,
                    triggers,
                    Listener(ingest, ports.events, hosts=hosts, tls=tls),
                    None if ports.admin is None else _admin_listener(ingest, ports.admin, hosts),
                    Reloader(options, backend, triggers, ingest, console, tls, certificates=certificates),
                    startup_timeout=options.startup_timeout,
                )
                await broker.run(configuration, signals, on_serving)
    finally:
        await backend.stop()
        if traces is not None:
            await asyncio.to_thread(traces.shutdown)


def _admin_listener(ingest: Ingest, bound: socket.socket, hosts: Hosts) -> Listener:
    admin = Admin(ingest.probes)
    return Listener(admin, bound, hosts=hosts, connections=ADMIN_CONNECTIONS, option="--admin-port")


def make_backend(options: Options, *, deduplicate: timedelta | None = None) -> Backend:
    """A backend on the database of the options, or on an embedded PostgreSQL."""
    settings: dict[str, Any] = {
        "schema": options.schema,
        "produce_timeout": PRODUCE_TIMEOUT,
        "deduplicate": deduplicate,
    }
    if options.dsn is not None:
        return Backend(options.dsn, listen_dsn=options.listen_dsn, **settings)
    return Backend.embedded(options.embedded_directory, **settings)


def embedded_notice(options: Options) -> str:
    """A line for people, before the embedded PostgreSQL starts."""
    return f"No --dsn is given: starting an embedded PostgreSQL in {options.embedded_directory}"


def say_serving(options: Options, configuration: Configuration, ports: Ports, say: Callable[[str], None]) -> None:
    """People, and systemd, are told that the broker takes events in."""
    announce(options, make_backend(options).info(), configuration, ports, say)
