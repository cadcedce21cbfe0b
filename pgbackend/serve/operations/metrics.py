"""The broker's metrics, and the text that Prometheus reads.

`handler` and the dispatchers of `egress` report to it what they do; facts tell the rest, such as a buried event or a
target that is down; `collectors` adds the state of the log. The promise: counting costs the hot path well below a
microsecond, and `exposition()` answers within seconds, even without PostgreSQL.
"""

import asyncio
import platform
from bisect import bisect_left
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics
from prometheus_client import exposition as text
from prometheus_client.openmetrics import exposition as openmetrics

from pgbackend import facts
from pgbackend.errors import PgBackendError
from pgbackend.recent import Recent
from pgbackend.serve.operations.collectors import LogCollector, ProcessesCollector, shared_directory
from pgbackend.serve.operations.instruments import (
    BUCKETS,
    CHANGES,
    PROCESS,
    SEND,
    BulkHistogram,
    Instruments,
    class_of,
    code_of,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pgbackend.backend import Backend
    from pgbackend.model import Status

_STATUS_AGE = 1.0
"""Seconds for which PostgreSQL's answer is used again."""
_STATUS_TIMEOUT = 3.0
"""Seconds until a scrape goes on without PostgreSQL. Prometheus gives up after ten."""
_WRITE_DELAY = 0.2
"""Seconds after which other broker processes see what this one has counted."""


class Metrics:
    """Everything that this process measures. While it is open it also observes facts.

    >>> with Metrics() as metrics:
    ...     metrics.ingested(1, 0.004)
    ...     metrics.trigger("billing").delivered(0.020)
    """

    def __init__(self, backend: "Backend | None" = None) -> None:
        """`backend` is asked for the state of the log at each scrape; without one that is not shown."""
        self._backend = backend
        # Otherwise each series would have a second one: the time at which it began.
        disable_created_metrics()
        registry = CollectorRegistry()
        directory = shared_directory()
        self._is_shared = directory is not None
        # Shared values are read from files, this process's own included.
        self._instruments = Instruments(None if self._is_shared else registry)
        self._log = LogCollector(_build(backend))
        registry.register(self._log)
        if directory is None:
            ProcessCollector(registry=registry)
        else:
            registry.register(ProcessesCollector(directory, self._triggers_contain))
        self._triggers: dict[str, TriggerMetrics] = {}
        self._dirty: list[_Tally] = []
        self._ingest = _Tally(
            self._instruments.sent.labels(*SEND), self._instruments.send_seconds.labels(*SEND), self._write_soon
        )
        self._status = Recent(self._ask_status, age=_STATUS_AGE)
        # One text for all who ask meanwhile: with hundreds of triggers it takes a tenth of a second and more.
        self._texts = {format_: Recent(partial(self._text, format_, registry)) for format_ in _FORMATS}
        self._observing: AbstractContextManager[None] = facts.observe(self._observe)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, traceback)
        self._write()

    def ingested(self, events: int, seconds: float) -> None:
        """The events of one request were committed, so many seconds after they were parsed."""
        self._ingest.add(events, seconds)

    def repeated(self, events: int) -> None:
        """So many events that came in were in the log already, and were not appended."""
        self._instruments.duplicates.inc(events)

    def refused(self, status: int) -> None:
        """A request with events was answered with this status."""
        self._instruments.refused.labels(code_of(status)).inc()

    def trigger(self, name: str) -> "TriggerMetrics":
        """The metrics of one trigger; always the same object, until `forget()`."""
        found = self._triggers.get(name)
        if found is None:
            found = self._triggers[name] = TriggerMetrics(self._instruments, name, self._write_soon)
        return found

    def forget(self, name: str) -> None:
        """Show nothing more of the trigger, which is gone."""
        self._triggers.pop(name, None)
        if not self._is_shared:  # files keep their series, and `ProcessesCollector` hides them
            self._instruments.forget_trigger(name)

    async def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """All metrics, in the format that the Accept header asks for, and their content type."""
        format_ = openmetrics if _prefers_openmetrics(accept or "") else text
        return await self._texts[format_].get(), _FORMATS[format_]

    async def _text(self, format_: ModuleType, registry: CollectorRegistry) -> bytes:
        self._write()
        self._log.status = status = await self._status.get()
        for one in status.subscriptions if status is not None else ():
            if one.name in self._triggers:
                # Facts are faster, but they do not follow a shard that went to another process.
                self._instruments.down.labels(one.name).set(one.state == "target down")
                is_paused = one.paused is not None or one.state.startswith("paused")
                self._instruments.paused.labels(one.name).set(is_paused)
        body: bytes = await asyncio.to_thread(format_.generate_latest, registry)
        return body

    async def _ask_status(self) -> "Status | None":
        """The state of the log; None if PostgreSQL cannot be asked, which `pgbackend_postgresql_up` shows."""
        if self._backend is None:
            return None
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT):
                return await self._backend.status()
        except (PgBackendError, TimeoutError, OSError):
            return None

    def _triggers_contain(self, name: str) -> bool:
        return name in self._triggers

    def _write_soon(self, tally: "_Tally") -> None:
        self._dirty.append(tally)
        if self._is_shared and len(self._dirty) == 1:
            try:
                asyncio.get_running_loop().call_later(_WRITE_DELAY, self._write)
            except RuntimeError:
                self._write()  # called outside an event loop

    def _write(self) -> None:
        while self._dirty:
            self._dirty.pop().write()

    def _observe(self, name: str, fields: Mapping[str, object]) -> None:
        """Apply a fact. Called in any thread."""
        if (change := CHANGES.get(name)) is not None:
            change(self._instruments, str(fields.get("subscription", "")))
        elif name == "trigger added":
            # A trigger without a target URL has no dispatcher that would ask for its metrics.
            self.trigger(str(fields["trigger"]))


class TriggerMetrics:
    """The metrics of one trigger."""

    __slots__ = ("_delivered", "_instruments", "_name", "_replied")

    def __init__(self, instruments: Instruments, name: str, on_change: "Callable[[_Tally], None]") -> None:
        self._instruments = instruments
        self._name = name
        success = (*PROCESS, name, "")
        self._delivered = _Tally(
            instruments.consumed.labels(*success), instruments.process_seconds.labels(*success), on_change
        )
        self._replied = instruments.replied.labels(name)
        instruments.begin_trigger(name)

    def delivered(self, seconds: float) -> None:
        """The target took an event, after so many seconds."""
        self._delivered.add(1, seconds)

    def failed(self, seconds: float, status: int | None) -> None:
        """An attempt ended with this status; None without an answer."""
        labels = (*PROCESS, self._name)
        code, kind = ("no_response", "no_response") if status is None else (code_of(status), class_of(status))
        self._instruments.consumed.labels(*labels, code).inc()
        self._instruments.process_seconds.labels(*labels, kind).observe(seconds)

    def replied(self, events: int) -> None:
        """So many events of the target's answer were committed to the log."""
        self._replied.inc(events)


class _Tally:
    """Counts successes in plain numbers, and adds them to `counter` and `histogram` later.

    An event counts in 0.2 µs here. The two would take 0.8 µs for their locks, and 2.3 µs where their values are in
    mapped files. `on_change` is called when there is something to write.
    """

    __slots__ = ("_counter", "_counts", "_events", "_histogram", "_is_dirty", "_on_change", "_seconds")

    def __init__(self, counter: Counter, histogram: BulkHistogram, on_change: "Callable[[_Tally], None]") -> None:
        self._counter = counter
        self._histogram = histogram
        self._on_change = on_change
        self._is_dirty = False
        self._clear()

    def add(self, events: int, seconds: float) -> None:
        self._events += events
        self._seconds += seconds
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        if not self._is_dirty:
            self._is_dirty = True
            self._on_change(self)

    def write(self) -> None:
        self._is_dirty = False
        self._counter.inc(self._events)
        self._histogram.add(self._counts, self._seconds)
        self._clear()

    def _clear(self) -> None:
        self._events = 0
        self._seconds = 0.0
        self._counts = [0] * (len(BUCKETS) + 1)


_FORMATS: Mapping[ModuleType, str] = {text: text.CONTENT_TYPE_PLAIN_0_0_4, openmetrics: openmetrics.CONTENT_TYPE_LATEST}
"""Modules of prometheus_client that write a format, and its content type."""


def _prefers_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is asked for at least as much as text. prometheus_client's choice fails on odd versions."""
    asked = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for one in accept.split(","):
        kind, *parameters = [part.strip() for part in one.split(";")]
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        if kind in asked and (kind == "text/plain" or given.get("version", "1.0.0") == "1.0.0"):
            with suppress(ValueError):
                asked[kind] = max(asked[kind], float(given.get("q", "1")))
    return 0 < asked["application/openmetrics-text"] >= asked["text/plain"]


def _build(backend: "Backend | None") -> dict[str, str]:
    build = {"python": platform.python_version()}
    return build if backend is None else build | {"version": backend.info().version}
