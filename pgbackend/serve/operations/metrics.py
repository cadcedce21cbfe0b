"""What the broker counts and measures, and how Prometheus reads it.

A process counts what it does itself; what is true of the log (lag, dead letters) is asked of PostgreSQL when somebody
reads, at most once a second; what facts say (an event buried, a target down) is taken from them. The promise: counting
costs the hot path well below a microsecond, and `exposition()` answers within seconds even without PostgreSQL.

Names. To the log in PostgreSQL the broker is what OpenTelemetry's messaging conventions call a client: it sends what
comes in over HTTP, and passes on what it reads (a push-based consumer, so that an attempt is a `process` operation). So
four metrics have the conventions' names as Prometheus spells them, with their attributes as labels:

    messaging.client.sent.messages        events committed
    messaging.client.operation.duration   of `send`: from the event in hand to the commit
    messaging.client.consumed.messages    attempts to deliver, by trigger and how they ended
    messaging.process.duration            of an attempt

(`sent` was `published` until version 1.28 of the conventions.) `messaging_consumer_group_name` is the trigger, here and
everywhere: the subscription that its consumers share. `error_type` is absent, which Prometheus writes as empty, where
nothing failed. Everything that the conventions have no word for begins with `pgbackend_`.

No label holds what a stranger has written: triggers are the operator's, and a status is one that IANA has registered,
or its class.

Several processes (PROMETHEUS_MULTIPROC_DIR, set before this module is imported) share a directory of mapped files: any
of them answers for all. Counters and histograms are summed, dead processes' too; gauges are of the living.
"""

import asyncio
import fcntl
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client import exposition as text
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics

from pgbackend import facts
from pgbackend.errors import PgBackendError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from pgbackend.backend import Backend
    from pgbackend.model import Status

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Seconds: from a commit on a fast disk to an attempt's longest timeouts."""
_STATUS_AGE = 1.0
"""Seconds for which what PostgreSQL said is not asked again."""
_STATUS_TIMEOUT = 3.0
"""Prometheus gives up after ten."""
_WRITE_DELAY = 0.2
"""Seconds after which other processes see what this one has counted."""

_TRIGGER = "messaging_consumer_group_name"
_SYSTEM = ("messaging_system", "messaging_operation_name")
_SEND = ("pgbackend", "send")
_PROCESS = ("pgbackend", "process")


class Metrics:
    """Everything that this process measures. Open, it also hears what facts say.

    >>> with Metrics() as metrics:
    ...     metrics.ingested(1, 0.004)
    ...     metrics.trigger("billing").delivered(0.020)
    """

    def __init__(self, backend: "Backend | None" = None) -> None:
        """`backend` is asked for the lag of its subscriptions; without one there is none to tell."""
        self._backend = backend
        directory = _directory()
        self._shared = directory is not None
        # Each series would have a second one, of the time at which it began.
        disable_created_metrics()
        self._registry = CollectorRegistry()
        # Values that are shared are read from their files, those of this process included.
        own = None if self._shared else self._registry
        self._instruments = instruments = _Instruments(own)
        instruments.reloads.labels("applied")
        instruments.reloads.labels("refused")
        instruments.reload_good.set(1)
        instruments.reload_time.set(time.time())
        if directory is not None:
            self._registry.register(_Processes(directory, self._is_known))
        else:
            ProcessCollector(registry=self._registry)
        self._log = _Log(self._build())
        self._registry.register(self._log)
        self._triggers: dict[str, TriggerMetrics] = {}
        self._dirty: list[_Tally] = []
        self._ingest = _Tally(
            instruments.sent.labels(*_SEND), instruments.send_seconds.labels(*_SEND), self._write_soon
        )
        self._writing: dict[ModuleType, asyncio.Task[bytes]] = {}
        self._asking: asyncio.Task[Status | None] | None = None
        self._asked_at = 0.0
        self._observing: AbstractContextManager[None] = facts.observe(self._observe)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, traceback)
        for task in (*self._writing.values(), self._asking):
            if task is not None:
                task.cancel()
        self._write()

    def ingested(self, events: int, seconds: float) -> None:
        """The events of one request were committed, that long after they were in hand."""
        self._ingest.add(events, seconds)

    def refused(self, status: int) -> None:
        """A request was answered with this status, and its events were not taken."""
        self._instruments.refused.labels(_code(status)).inc()

    def trigger(self, name: str) -> "TriggerMetrics":
        """What is measured of one trigger; always the same object, until `forget()`."""
        found = self._triggers.get(name)
        if found is None:
            found = self._triggers[name] = TriggerMetrics(self._instruments, name, self._write_soon)
        return found

    def forget(self, name: str) -> None:
        """The trigger is gone, and nothing more is shown of it."""
        self._triggers.pop(name, None)
        if self._shared:
            return  # files keep what they have; `_is_known` hides it
        for metric in self._instruments.by_trigger:
            metric.remove_by_labels({_TRIGGER: name})

    async def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """Everything in the format that was asked for, and its content type. Within seconds, PostgreSQL or not."""
        format_ = openmetrics if _prefers_openmetrics(accept or "") else text
        task = self._writing.get(format_)
        if task is None or task.done():
            # One for all who ask meanwhile: with hundreds of triggers it takes a tenth of a second and more.
            task = self._writing[format_] = asyncio.create_task(self._text(format_), name="write metrics")
        # Shielded: a scraper that hangs up does not take the answer from the others.
        body = await asyncio.shield(task)
        return body, text.CONTENT_TYPE_PLAIN_0_0_4 if format_ is text else openmetrics.CONTENT_TYPE_LATEST

    async def _text(self, format_: ModuleType) -> bytes:
        self._write()
        self._log.status = status = await self._status()
        for one in status.subscriptions if status is not None else ():
            if one.name in self._triggers:
                # Facts are quicker; but of a shard that went elsewhere meanwhile they say nothing more.
                self._instruments.down.labels(one.name).set(one.state == "target down")
                self._instruments.paused.labels(one.name).set(one.state.startswith("paused"))
        body: bytes = await asyncio.to_thread(format_.generate_latest, self._registry)
        return body

    async def _status(self) -> "Status | None":
        """What the log says of itself; None when it cannot be asked. Shared by all who ask within a second."""
        if self._backend is None:
            return None
        task = self._asking
        if task is None or (task.done() and time.monotonic() - self._asked_at >= _STATUS_AGE):
            self._asked_at = time.monotonic()
            task = self._asking = asyncio.create_task(self._ask(self._backend), name="status for metrics")
        return await task

    async def _ask(self, backend: "Backend") -> "Status | None":
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT):
                return await backend.status()
        except (PgBackendError, TimeoutError, OSError):
            return None  # told as pgbackend_postgresql_up

    def _build(self) -> dict[str, str]:
        build = {"python": platform.python_version()}
        if self._backend is not None:
            build |= {"version": self._backend.info().version}
        return build

    def _is_known(self, trigger: str | None) -> bool:
        return trigger is None or trigger in self._triggers

    def _write_soon(self, tally: "_Tally") -> None:
        self._dirty.append(tally)
        if self._shared and len(self._dirty) == 1:
            try:
                asyncio.get_running_loop().call_later(_WRITE_DELAY, self._write)
            except RuntimeError:
                self._write()  # nobody's loop: a thread, or a test

    def _write(self) -> None:
        while self._dirty:
            self._dirty.pop().write()

    def _observe(self, name: str, fields: Mapping[str, object]) -> None:
        """Take what a fact says; in any thread."""
        if (told := _TOLD.get(name)) is not None:
            told(self._instruments, str(fields.get("subscription", "")))
        elif name == "trigger added":
            # One without a target URL has nobody who asks for it.
            self.trigger(str(fields["trigger"]))


class TriggerMetrics:
    """What is measured of one trigger."""

    __slots__ = ("_delivered", "_instruments", "_name", "_replied")

    def __init__(self, instruments: "_Instruments", name: str, tell: "Callable[[_Tally], None]") -> None:
        self._instruments = instruments
        self._name = name
        delivered = (*_PROCESS, name, "")
        self._delivered = _Tally(
            instruments.consumed.labels(*delivered), instruments.process_seconds.labels(*delivered), tell
        )
        self._replied = instruments.replied.labels(name)
        # What is zero is told too: a rate over a series that begins with its first event misses that one.
        instruments.retries.labels(name)
        instruments.dead_lettered.labels(name, "url")
        instruments.dead_lettered.labels(name, "table")
        instruments.down.labels(name)
        instruments.paused.labels(name)

    def delivered(self, seconds: float) -> None:
        """The target took an event, after that long."""
        self._delivered.add(1, seconds)

    def failed(self, seconds: float, status: int | None) -> None:
        """An attempt ended with this status, or without an answer."""
        labels = (*_PROCESS, self._name)
        code, kind = ("no_response", "no_response") if status is None else (_code(status), _class(status))
        self._instruments.consumed.labels(*labels, code).inc()
        self._instruments.process_seconds.labels(*labels, kind).observe(seconds)

    def replied(self, events: int) -> None:
        """The target answered with that many events, and they are in the log."""
        self._replied.inc(events)


def merge_ended(pid: int) -> None:
    """Add the counters of an ended process to the file of all ended ones, and delete its gauges.

    One file for all, because a broker that runs for years would otherwise have thousands. Raises BlockingIOError at
    once while a process reads the files: that process may be frozen, and the supervisor must not wait for it.
    """
    directory = _directory()
    assert directory is not None  # noqa: S101 - the supervisor set it
    with _locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
        for file in directory.glob(f"*_{pid}.db"):
            kind = file.name.partition("_")[0]
            if kind != "gauge":
                sums = MmapedDict(str(directory / f"{kind}_ended.db"))
                for key, value, _, _ in MmapedDict.read_all_values_from_file(file):
                    sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
                sums.close()
            file.unlink()


def _directory() -> Path | None:
    """What the processes share; None for a process alone."""
    named = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(named) if named else None


@contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    """A reader does not see counts twice, or not at all, while they move from one file to another."""
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, how)
        yield


class _Instruments:
    """The metrics that are counted here. `registry` shows them; None where files are what is shown."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        of_trigger = (_TRIGGER,)
        self.sent = Counter(
            "messaging_client_sent_messages", "Events that are committed to the log.", _SYSTEM, registry=registry
        )
        self.send_seconds = _Histogram(
            "messaging_client_operation_duration_seconds",
            "From a request's events in hand to their commit.",
            _SYSTEM,
            registry=registry,
            buckets=_BUCKETS,
        )
        self.refused = Counter(
            "pgbackend_ingest_refused_requests",
            "Requests that were not taken, by the status that they were answered.",
            ("http_response_status_code",),
            registry=registry,
        )
        self.consumed = Counter(
            "messaging_client_consumed_messages",
            "Attempts to deliver an event; error_type is empty for those that the target took.",
            (*_SYSTEM, _TRIGGER, "error_type"),
            registry=registry,
        )
        self.process_seconds = _Histogram(
            "messaging_process_duration_seconds",
            "Duration of an attempt to deliver an event; error_type is the class of the status.",
            (*_SYSTEM, _TRIGGER, "error_type"),
            registry=registry,
            buckets=_BUCKETS,
        )
        self.replied = Counter(
            "pgbackend_reply_events", "Events that came as replies and are in the log.", of_trigger, registry=registry
        )
        self.retries = Counter(
            "pgbackend_retries_scheduled",
            "Failed events that were put off to be tried again.",
            of_trigger,
            registry=registry,
        )
        self.dead_lettered = Counter(
            "pgbackend_dead_lettered_events",
            "Events that were given up, by where they go: `url`, the dead letter target; `table`, kept in PostgreSQL.",
            (_TRIGGER, "destination"),
            registry=registry,
        )
        self.down = Gauge(
            "pgbackend_target_down",
            "1 while the target counts as down and gets single events only.",
            of_trigger,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.paused = Gauge(
            "pgbackend_subscription_paused",
            "1 while nothing is dispatched because the target asked for it (410 Gone).",
            of_trigger,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.reloads = Counter(
            "pgbackend_config_reloads",
            "Changed configurations, by outcome: `applied`, or `refused` for one that is not valid.",
            ("outcome",),
            registry=registry,
        )
        self.reload_good = Gauge(
            "pgbackend_config_last_reload_successful",
            "0 while the configuration that is in force is not the one in the file.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.reload_time = Gauge(
            "pgbackend_config_last_reload_success_timestamp_seconds",
            "When a configuration was put in force last.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.by_trigger = (
            self.consumed, self.process_seconds, self.replied, self.retries, self.dead_lettered, self.down, self.paused,
        )  # fmt: skip


def _reloaded(instruments: _Instruments, _: str) -> None:
    instruments.reloads.labels("applied").inc()
    instruments.reload_good.set(1)
    instruments.reload_time.set(time.time())


def _reload_failed(instruments: _Instruments, _: str) -> None:
    instruments.reloads.labels("refused").inc()
    instruments.reload_good.set(0)


def _at_ease(instruments: _Instruments, name: str) -> None:
    instruments.down.labels(name).set(0)
    instruments.paused.labels(name).set(0)


_TOLD: Mapping[str, Callable[[_Instruments, str], None]] = {
    "event buried": lambda instruments, name: instruments.dead_lettered.labels(name, "table").inc(),
    "event given up": lambda instruments, name: instruments.dead_lettered.labels(name, "url").inc(),
    "retry scheduled": lambda instruments, name: instruments.retries.labels(name).inc(),
    "target is down": lambda instruments, name: instruments.down.labels(name).set(1),
    "target is up": lambda instruments, name: instruments.down.labels(name).set(0),
    "subscription paused": lambda instruments, name: instruments.paused.labels(name).set(1),
    "subscription resumed": lambda instruments, name: instruments.paused.labels(name).set(0),
    "subscription reconfigured": _at_ease,
    "lease released": _at_ease,
    "lease lost": _at_ease,
    "configuration reloaded": _reloaded,
    "configuration refused": _reload_failed,
}
"""What each fact changes, of the subscription that it is about."""


class _Histogram(Histogram):
    """A histogram that can be told of many observations at once."""

    def add(self, counts: list[int], seconds: float) -> None:
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(seconds)


class _Tally:
    """Counts successes in plain numbers, and tells `counter` and `histogram` later.

    Told each time, they take 0.8 µs together for locks, and 2.3 µs where values are in mapped files; this takes 0.2 µs.
    """

    __slots__ = ("_counter", "_counts", "_dirty", "_events", "_histogram", "_seconds", "_tell")

    def __init__(self, counter: Counter, histogram: _Histogram, tell: "Callable[[_Tally], None]") -> None:
        self._counter = counter
        self._histogram = histogram
        self._tell = tell
        self._dirty = False
        self._clear()

    def add(self, events: int, seconds: float) -> None:
        self._events += events
        self._seconds += seconds
        self._counts[bisect_left(_BUCKETS, seconds)] += 1
        if not self._dirty:
            self._dirty = True
            self._tell(self)

    def write(self) -> None:
        self._dirty = False
        self._counter.inc(self._events)
        self._histogram.add(self._counts, self._seconds)
        self._clear()

    def _clear(self) -> None:
        self._events = 0
        self._seconds = 0.0
        self._counts = [0] * (len(_BUCKETS) + 1)


class _Log:
    """The log's own numbers, as they were told last."""

    def __init__(self, build: dict[str, str]) -> None:
        self._build = build
        self.status: Status | None = None

    def collect(self) -> Iterable[Metric]:
        status = self.status
        yield InfoMetricFamily("pgbackend_build", "The version of pgbackend, and what it runs on.", value=self._build)
        up = GaugeMetricFamily("pgbackend_postgresql_up", "1 when PostgreSQL answered this scrape.")
        up.add_metric((), float(status is not None))
        yield up
        if status is None:
            return
        head = GaugeMetricFamily("pgbackend_log_head_position", "The highest position given out in the log.")
        head.add_metric((), status.head)
        yield head
        lag = _by_trigger("pgbackend_subscription_lag_events", "Positions between the offset and the head of the log.")
        age = _by_trigger("pgbackend_subscription_lag_seconds", "Age of the oldest event that is not settled.")
        waiting = _by_trigger("pgbackend_subscription_waiting_events", "Failed events that wait to be tried again.")
        letters = _by_trigger("pgbackend_subscription_dead_letter_events", "Dead letters that are kept in PostgreSQL.")
        skipped = _by_trigger(
            "pgbackend_subscription_skipped_events", "Positions still to be handled whose rows are gone from the log."
        )
        for one in status.subscriptions:
            name = (one.name,)
            lag.add_metric(name, one.lag)
            waiting.add_metric(name, one.redeliveries)
            letters.add_metric(name, one.dead_letters)
            skipped.add_metric(name, one.skipped)
            if one.lag_seconds is not None:  # it is, of a subscription that is complete
                age.add_metric(name, one.lag_seconds)
        yield from (lag, age, waiting, letters, skipped)


def _by_trigger(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=(_TRIGGER,))


class _Processes:
    """What all processes of the broker have counted, from their files."""

    def __init__(self, directory: Path, is_known: Callable[[str | None], bool]) -> None:
        self._directory = directory
        self._is_known = is_known

    def collect(self) -> Iterable[Metric]:
        with _locked(self._directory, fcntl.LOCK_SH):
            counted = list(MultiProcessCollector(None, str(self._directory)).collect())
            pids = sorted({file.stem.rpartition("_")[2] for file in self._directory.glob("gauge_*.db")})
        for metric in counted:
            # Of a trigger that is gone the files still know.
            metric.samples = [one for one in metric.samples if self._is_known(one.labels.get(_TRIGGER))]
            if metric.samples:
                yield metric
        processes: dict[str, Metric] = {}
        for pid in pids:
            for metric in ProcessCollector(pid=partial(str, pid), registry=None).collect():
                merged = processes.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    merged.add_sample(sample.name, {**sample.labels, "pid": pid}, sample.value)
        yield from processes.values()


def _prefers_openmetrics(accept: str) -> bool:
    """Whether it is asked for, and text not more. The library's own choice trips over versions that are no numbers."""
    asked = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for one in accept.split(","):
        kind, *parameters = [part.strip() for part in one.split(";")]
        given = dict(parameter.partition("=")[::2] for parameter in parameters)
        if kind in asked and (kind == "text/plain" or given.get("version", "1.0.0") == "1.0.0"):
            with suppress(ValueError):
                asked[kind] = max(asked[kind], float(given.get("q", "1")))
    return 0 < asked["application/openmetrics-text"] >= asked["text/plain"]


def _code(status: int) -> str:
    """The status when it is a registered one, otherwise its class: what a target makes up does not become a label."""
    return str(status) if status in _REGISTERED else _class(status)


def _class(status: int) -> str:
    return f"{status // 100}xx" if 100 <= status < 600 else "_OTHER"


_REGISTERED = frozenset(int(status) for status in HTTPStatus)
