"""The broker as one process: configuration, backend, triggers and HTTP server, started and stopped in order.

    configured ─▶ bound ─▶ initialized ─▶ subscribed ─▶ serving ─▶ draining ─▶ stopped
                    └──────── a signal before `serving` goes straight to `stopped` ───┘

`serve` returns when a signal asked for it and everything in progress is finished; it raises what made it fail. Ingest
drains before the backend does, so that what was accepted is committed; the backend then finishes its dispatches.
"""

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgbackend import embedded
from pgbackend.backend import Backend
from pgbackend.errors import PgBackendError
from pgbackend.serve import delivery
from pgbackend.serve.config import Configuration, load, load_file
from pgbackend.serve.ingest import Ingest
from pgbackend.serve.listener import Listener, allow_many_connections, bind
from pgbackend.serve.triggers import Triggers


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line says."""

    dsn: str | None = None
    """Without one an embedded PostgreSQL is started."""
    listen_dsn: str | None = None
    schema: str = "pgbackend"
    data_dir: Path | None = None
    """Of the embedded PostgreSQL; None is the user's data directory."""
    config: Path | None = None
    config_inline: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    """0 is any free one."""


async def serve(settings: Settings, *, say: Callable[[str], None] = print) -> None:
    """Return after a SIGTERM or SIGINT, everything drained. A second SIGINT ends the process at once.

    `say` is told, in lines for people, where the broker listens and what it does, once it does. Raises PgBackendError.
    """
    configuration = _configuration(settings)
    bound = bind(settings.host, settings.port)
    try:
        allow_many_connections()
        backend = _backend(settings, say)
        stop = asyncio.Event()
        with _signals(stop):
            try:
                async with delivery.open_session() as session:

                    async def prepare() -> None:
                        await backend.init()
                        await Triggers(backend, session).apply(configuration)

                    if await _finished(prepare(), unless=stop):
                        listener = Listener(Ingest(backend, auth=configuration.ingest), bound)
                        welcome = _welcome(settings, configuration, backend, *bound.getsockname()[:2])
                        await _run(backend, listener, stop, lambda: say(welcome))
            finally:
                await backend.stop()
    finally:
        bound.close()


def _configuration(settings: Settings) -> Configuration:
    if settings.config is not None:
        return load_file(settings.config)
    if settings.config_inline is not None:
        return load(settings.config_inline, origin="inline configuration")
    return Configuration()


def _backend(settings: Settings, say: Callable[[str], None]) -> Backend:
    if settings.dsn is not None:
        return Backend(settings.dsn, listen_dsn=settings.listen_dsn, schema=settings.schema)
    directory = settings.data_dir or embedded.default_directory()
    say(f"No --dsn is given: starting an embedded PostgreSQL in {directory}")
    return Backend.embedded(directory, schema=settings.schema)


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


async def _run(backend: Backend, listener: Listener, stop: asyncio.Event, announce: Callable[[], None]) -> None:
    """Serve until `stop`; then drain the listener, then the backend. When either ends by itself, so does the other."""
    # No TaskGroup: it would cancel all of them together, and the order of the drain is what keeps promises.
    running = asyncio.create_task(backend.start(), name="backend")
    listening = asyncio.create_task(listener.run(), name="listener")
    started = asyncio.create_task(listener.wait_started(), name="wait for the listener")
    stopped: asyncio.Task[Any] = asyncio.create_task(stop.wait(), name="wait for a signal")
    try:
        await asyncio.wait({running, listening, started}, return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            announce()
            await asyncio.wait({running, listening, stopped}, return_when=asyncio.FIRST_COMPLETED)
        died = running.done()
        listener.stop()
        await asyncio.wait({listening})
        await backend.stop()
        await asyncio.wait({running})
        for task in (running, listening):
            _raise_reason(task)
        if died:
            raise PgBackendError("The backend stopped without being asked to. Its log says more.")
    finally:
        for task in (started, stopped, listening, running):
            task.cancel()
        await asyncio.wait({started, stopped, listening, running})


def _raise_reason(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, PgBackendError):
        raise error
    if error is not None:
        raise PgBackendError(f"The {task.get_name()} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; a SIGINT after that ends the process, whatever it is doing."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if stop.is_set():
            # No clean-up on purpose: this is what a person does when the clean-up hangs.
            sys.stderr.write("Stopped at once; what was in progress is dispatched again.\n")
            sys.stderr.flush()
            os._exit(130)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


def _welcome(settings: Settings, configuration: Configuration, backend: Backend, host: str, port: int) -> str:
    """What a person needs to know, and the line to try it with."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - only to name another
    reachable = f"[{reachable}]" if ":" in reachable else reachable
    url = f"http://{reachable}:{port}/"
    info = backend.info()
    lines = [f"Broker takes CloudEvents at {url}", f"  log: schema {info.schema}, {info.server}"]
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
    data = shlex.quote('{"hello": "world"}')
    lines.append(f"Try: curl -i {url} {options} -d {data}")
    return "\n".join(lines)
