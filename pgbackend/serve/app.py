"""The broker as one process: configuration, backend, triggers and HTTP server, started and stopped in order.

    configured ─▶ bound ─▶ initialized ─▶ subscribed ─▶ serving ─▶ draining ─▶ stopped
                    └──────── a signal before `serving` goes straight to `stopped` ───┘

`serve` returns when a signal asked for it and everything in progress is finished; it raises what made it fail. Ingest
drains before the backend does, so that what was accepted is committed; the backend then finishes its dispatches. While
it serves, the configuration and the certificates follow their files, and are read again at once with SIGHUP.

PostgreSQL may come up after the broker, as containers do in any order: it is waited for, up to `startup_timeout`. A
broker that waited for ever would hide a mistake in its DSN; one that did not wait would need another to restart it.
"""

import asyncio
import gc
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.embedded import server as embedded
from pgbackend.errors import ConfigError, ConnectionLostError, PgBackendError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve.config.models import Configuration, load, load_file
from pgbackend.serve.config.reload import changes, says_once
from pgbackend.serve.egress import connections as egress
from pgbackend.serve.egress import delivery
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.ingest.admin import Admin
from pgbackend.serve.ingest.handler import Ingest
from pgbackend.serve.ingest.hosts import Hosts
from pgbackend.serve.ingest.listener import Listener, Ports, bind
from pgbackend.serve.ingest.protocol import allow_many_connections
from pgbackend.serve.ingest.tls import TLS
from pgbackend.serve.operations import tracing
from pgbackend.serve.operations.metrics import Metrics

PRODUCE_TIMEOUT = 10.0
"""Seconds until a sender is told 503 when PostgreSQL hangs: fewer than most clients have patience for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    dsn: str | None = None
    """Without one an embedded PostgreSQL is started."""
    listen_dsn: str | None = None
    schema: str = "pgbackend"
    data_dir: Path | None = None
    """Of the embedded PostgreSQL; None is the user's data directory."""
    startup_timeout: float = 60.0
    """Seconds that PostgreSQL may take to be there. 0: it must be."""
    config: Path | None = None
    config_inline: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    """0 is any free one."""
    admin_port: int | None = None
    """For probes and metrics, without TLS. 0 is any free one; without it they are at `port`."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may have in their Host header, besides the broker's own; see `hosts`."""
    tls_cert: Path | None = None
    """Without one it is plain HTTP."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    deny_private_targets: bool = False
    max_hops: int = 255
    workers: int = 1
    """Processes."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True)
class Orders:
    """What the world asks of a broker that runs."""

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Finish what is in progress and end."""
    reload: asyncio.Event = field(default_factory=asyncio.Event)
    """Read configuration and certificates again."""


async def serve(settings: Settings, *, say: Callable[[str], None] = print) -> None:
    """Return after a SIGTERM or SIGINT, everything drained. A second SIGINT ends the process at once.

    `say` is told, in lines for people, where the broker listens and what it does, once it does. Raises PgBackendError.
    """
    configuration = configuration_of(settings)
    with closing(bind_ports(settings)) as ports, obeying_signals() as orders:
        if settings.dsn is None:
            say(embedded_notice(settings))
        await run(settings, configuration, ports, orders, lambda: announce(settings, configuration, ports, say))


def bind_ports(settings: Settings) -> Ports:
    """Sockets where the settings say. Raises ConfigError."""
    events = bind(settings.host, settings.port)
    if settings.admin_port is None:
        return Ports(events)
    try:
        return Ports(events, bind(settings.host, settings.admin_port, option="--admin-port"))
    except ConfigError:
        events.close()
        raise


def configuration_of(settings: Settings) -> Configuration:
    """What the file, or the text, says now. Raises ConfigError."""
    if settings.config is not None:
        return load_file(settings.config)
    if settings.config_inline is not None:
        return load(settings.config_inline, origin="inline configuration")
    return Configuration()


async def run(
    settings: Settings, configuration: Configuration, ports: Ports, orders: Orders, on_serving: Callable[[], None]
) -> None:
    """Serve on `ports`, which are the listeners' from then on, until `orders` say stop; return once it is drained.

    `on_serving` is called once events are taken in. Raises PgBackendError.
    """
    tls = None if settings.tls_cert is None else TLS(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    allow_many_connections()
    egress.resolve_many_names()
    look_for_garbage_rarely()
    backend = _backend(settings)
    traces = tracing.from_environment(destination=settings.schema)
    try:
        async with delivery.open_session(deny_private=settings.deny_private_targets) as session:
            with Metrics(backend) as metrics:
                triggers = Triggers(backend, session, metrics=metrics, tracing=traces, hops=settings.max_hops)

                async def prepare() -> None:
                    await _init(backend, settings.startup_timeout)
                    await triggers.apply(configuration)

                if await _finished(prepare(), unless=orders.stop):
                    ingest = Ingest(
                        backend,
                        auth=configuration.ingest,
                        metrics=metrics,
                        tracing=traces,
                        has_admin=ports.admin is not None,
                    )
                    following = _Following(settings, triggers, ingest, tls)
                    hosts = Hosts(ports.events.getsockname()[0], settings.allowed_hosts, name=settings.host)
                    listener = Listener(ingest, ports.events, hosts=hosts, tls=tls)
                    admin = None if ports.admin is None else Listener(Admin(ingest), ports.admin, hosts=hosts)
                    await _run(backend, listener, admin, following, orders, on_serving)
    finally:
        await backend.stop()
        if traces is not None:
            await asyncio.to_thread(traces.shutdown)


def look_for_garbage_rarely() -> None:
    """The search for reference cycles passes over all that is loaded by now, and begins 30 times as seldom.

    Nothing on an event's way makes cycles: of 10,000 deliveries the search found none. It took a sixth of their time,
    and a full one stopped everything for 0.1 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _backend(settings: Settings) -> Backend:
    options: dict[str, Any] = {"schema": settings.schema, "produce_timeout": PRODUCE_TIMEOUT}
    if settings.dsn is not None:
        return Backend(settings.dsn, listen_dsn=settings.listen_dsn, **options)
    return Backend.embedded(_directory(settings), **options)


def _directory(settings: Settings) -> Path:
    return settings.data_dir or embedded.default_directory()


async def _init(backend: Backend, patience: float) -> None:
    """The log can be used. Raises what is wrong, if that is PostgreSQL's absence, after `patience` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    backoff = GrowingDelay()
    while True:
        try:
            await backend.init()
            return
        except ConnectionLostError as error:
            if loop.time() >= deadline:
                raise
            facts.emit("waiting for postgresql", level=logging.WARNING, error=str(error), patience=patience)
        await backoff.wait()


async def _finished(work: Coroutine[Any, Any, None], *, unless: asyncio.Event) -> bool:
    """True when the work is done; False when `unless` was set first, and the work is cancelled."""
    working = asyncio.create_task(work, name="start the broker")
    stopped: asyncio.Task[Any] = asyncio.create_task(unless.wait(), name="wait for a signal")
    try:
        await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopped):
            task.cancel()
        await asyncio.wait({working, stopped})


async def _run(
    backend: Backend,
    listener: Listener,
    admin: Listener | None,
    following: "_Following",
    orders: Orders,
    on_serving: Callable[[], None],
) -> None:
    """Serve until told to stop; then drain the listener, then the backend. When one ends by itself, so do all.

    `admin` tells how things are until all is drained.
    """
    # No TaskGroup: it would cancel all of them together, and the order of the drain is what keeps promises.
    running = asyncio.create_task(backend.start(), name="backend")
    listening = asyncio.create_task(listener.run(), name="listener")
    keeping_up = asyncio.create_task(following.run(orders.reload), name="watch over the configuration")
    telling = set() if admin is None else {asyncio.create_task(admin.run(), name="admin listener")}
    parts = {running, listening, keeping_up, *telling}
    started = asyncio.create_task(_all_started(listener, admin), name="wait for the listeners")
    stopped: asyncio.Task[Any] = asyncio.create_task(orders.stop.wait(), name="wait for a signal")
    try:
        await asyncio.wait({*parts, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            on_serving()
            await asyncio.wait({*parts, stopped}, return_when=asyncio.FIRST_COMPLETED)
        died = running.done()
        keeping_up.cancel()
        await asyncio.wait({keeping_up})
        listener.stop()
        await asyncio.wait({listening})
        await backend.stop()
        await asyncio.wait({running})
        if admin is not None:
            admin.stop()
            await asyncio.wait(telling)
        for task in parts:
            _raise_reason(task)
        if died:
            raise PgBackendError("The backend stopped without being asked to. Its log says more.")
    finally:
        for task in (started, stopped, *parts):
            task.cancel()
        await asyncio.wait({started, stopped, *parts})


async def _all_started(listener: Listener, admin: Listener | None) -> None:
    await listener.wait_started()
    if admin is not None:
        await admin.wait_started()


def _raise_reason(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, PgBackendError):
        raise error
    if error is not None:
        raise PgBackendError(f"The {task.get_name()} failed: {type(error).__name__}: {error}") from error


class _Following:
    """Puts what the configuration and the certificates become in force, while the broker serves."""

    def __init__(self, settings: Settings, triggers: Triggers, ingest: Ingest, tls: TLS | None) -> None:
        self._settings = settings
        self._triggers = triggers
        self._ingest = ingest
        self._tls = tls

    async def run(self, reload: asyncio.Event) -> None:
        """Until it is cancelled. `reload`: look at once, and whether or not something has changed."""
        async with asyncio.TaskGroup() as tasks:
            if self._settings.config is not None:
                tasks.create_task(self._follow_configuration(self._settings.config), name="follow the configuration")
            if self._tls is not None:
                tasks.create_task(self._follow_certificates(self._tls), name="follow the certificates")
            while True:
                await reload.wait()
                reload.clear()
                await self._read_again()

    async def _follow_configuration(self, file: Path) -> None:
        async with aclosing(changes(file, self._triggers.configuration)) as configurations:
            async for configuration in configurations:
                await self._put_in_force(configuration)

    async def _follow_certificates(self, tls: TLS) -> None:
        files = (self._settings.tls_cert, self._settings.tls_key, self._settings.tls_client_ca)
        async with aclosing(changes(None, Configuration(), extra=[file for file in files if file])) as touched:
            async for _ in touched:
                tls.reload()

    async def _read_again(self) -> None:
        if self._tls is not None:
            self._tls.reload()
        if self._settings.config is not None and says_once(self._settings.config):
            return
        try:
            # Not in a thread: an older one must not come into force after what `changes()` finds meanwhile.
            configuration = configuration_of(self._settings)
        except ConfigError as error:
            facts.emit("configuration refused", level=logging.ERROR, file=str(self._settings.config), error=str(error))
        else:
            await self._put_in_force(configuration)

    async def _put_in_force(self, configuration: Configuration) -> None:
        await self._triggers.apply(configuration)
        # The newest, not this one: a signal and the file may have been heeded at once, and this one have waited longer.
        self._ingest.authorize_by(self._triggers.configuration.ingest)
        facts.emit("configuration reloaded", file=str(self._settings.config))


@contextmanager
def obeying_signals(*, at_once: Callable[[], None] = lambda: None) -> Iterator[Orders]:
    """SIGTERM and SIGINT say stop, SIGHUP says reload. A SIGINT after that ends the process, whatever it is doing.

    `at_once` is called before that. The SIGHUP of a terminal that was closed says stop: nobody would find the broker.
    """
    orders = Orders()
    loop = asyncio.get_running_loop()
    at_a_terminal = _has_terminal()

    def interrupt() -> None:
        if orders.stop.is_set():
            # No clean-up on purpose: this is what a person does when the clean-up hangs.
            at_once()
            sys.stderr.write("Stopped at once; what was in progress is dispatched again.\n")
            sys.stderr.flush()
            os._exit(130)
        orders.stop.set()

    def hang_up() -> None:
        (orders.stop if at_a_terminal and not _has_terminal() else orders.reload).set()

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: orders.stop.set, signal.SIGHUP: hang_up}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield orders
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal that is open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


# What is said to those who started it


def embedded_notice(settings: Settings) -> str:
    """Before the embedded PostgreSQL is started."""
    return f"No --dsn is given: starting an embedded PostgreSQL in {_directory(settings)}"


def announce(settings: Settings, configuration: Configuration, ports: Ports, say: Callable[[str], None]) -> None:
    """The broker takes events in: people know from `say`, systemd as sd_notify(3) has it."""
    say(_welcome(settings, configuration, ports))
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            systemd.sendall(b"READY=1")


def _welcome(settings: Settings, configuration: Configuration, ports: Ports) -> str:
    """What a person needs to know of a broker that serves, and the line to try it with."""
    url = f"{'http' if settings.tls_cert is None else 'https'}://{_shown(ports.events)}/"
    info = _backend(settings).info()
    lines = [f"Broker takes CloudEvents at {url}", f"  log: schema {info.schema}, {info.server}"]
    if ports.admin is not None:
        lines.append(f"  probes and metrics: http://{_shown(ports.admin)}/healthz, /readyz and /metrics")
    for name, trigger in configuration.triggers.items():
        target = "no target URL" if trigger.target.url is None else delivery.shown(trigger.target.url)
        lines.append(f"  trigger: {name} -> {target}")
    if not configuration.triggers:
        said = "the configuration has none" if settings.config or settings.config_inline else "no --config is given"
        lines.append(f"  trigger: none, {said}: events are taken in and kept")
    headers = ["ce-specversion: 1.0", "ce-id: 1", "ce-source: /try", "ce-type: com.example.tried"]
    headers += ["content-type: application/json"]
    if configuration.ingest.user is not None:
        headers += ["authorization: Basic …"]
    elif configuration.ingest.token is not None:
        headers += ["authorization: Bearer …"]
    options = " ".join(f"-H {shlex.quote(header)}" for header in headers)
    if settings.tls_cert is not None:
        # The name that the certificate is for is not known here.
        options = f"-k {options}" if settings.tls_client_ca is None else f"-k --cert … {options}"
    data = shlex.quote('{"hello": "world"}')
    lines.append(f"Try: curl -i {url} {options} -d {data}")
    return "\n".join(lines)


def _shown(bound: socket.socket) -> str:
    """Host and port, as a URL has them, by which this machine reaches a socket."""
    host, port = bound.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - only to name another
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"
