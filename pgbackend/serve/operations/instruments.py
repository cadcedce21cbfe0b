"""The metrics that the broker counts itself: their names and labels, and how facts change them.

`metrics` feeds them, `collectors` adds what PostgreSQL and other processes tell. The promise: no label holds what a
stranger has written. Triggers are the operator's, and a status is one that IANA has registered, or its class.

To the log in PostgreSQL the broker is what OpenTelemetry's messaging conventions call a client: it sends the events
that come in over HTTP, and processes those that it delivers, since a push-based consumer's attempts are `process`
operations. So four metrics have the conventions' names as Prometheus spells them, with their attributes as labels:

    messaging.client.sent.messages        events committed
    messaging.client.operation.duration   of `send`: from the parsed events to their commit
    messaging.client.consumed.messages    attempts to deliver, by trigger and outcome
    messaging.process.duration            of an attempt

(`sent` was `published` until version 1.28 of the conventions.) `messaging_consumer_group_name` is the trigger: the
subscription that its consumers share. `error_type` is absent without an error, which Prometheus writes as empty. All
other metrics begin with `pgbackend_`.
"""

import time
from collections.abc import Callable, Mapping
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TRIGGER = "messaging_consumer_group_name"
"""The label with a trigger's name."""
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Seconds: from a commit on a fast disk to an attempt's longest timeouts."""
SEND = ("pgbackend", "send")
"""The values of the labels of a commit."""
PROCESS = ("pgbackend", "process")
"""The first values of the labels of an attempt."""

_SYSTEM = ("messaging_system", "messaging_operation_name")


class BulkHistogram(Histogram):
    """A histogram that takes many observations at once."""

    def add(self, counts: list[int], seconds: float) -> None:
        """Add `counts` observations to the buckets, which took `seconds` in all."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(seconds)


class Instruments:
    """The metrics that are counted here. `registry` shows them; None if `collectors` reads them from files."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        of_trigger = (TRIGGER,)
        self.sent = Counter(
            "messaging_client_sent_messages", "Events committed to the log.", _SYSTEM, registry=registry
        )
        self.send_seconds = BulkHistogram(
            "messaging_client_operation_duration_seconds",
            "Time from a request's parsed events to their commit.",
            _SYSTEM,
            registry=registry,
            buckets=BUCKETS,
        )
        self.refused = Counter(
            "pgbackend_ingest_refused_requests",
            "Requests with events that were refused, by the status of the answer.",
            ("http_response_status_code",),
            registry=registry,
        )
        self.duplicates = Counter(
            "pgbackend_ingest_duplicate_events",
            "Events that were taken in and not appended, because the log had their source and id within its window.",
            registry=registry,
        )
        self.consumed = Counter(
            "messaging_client_consumed_messages",
            "Attempts to deliver an event. error_type is empty if the target took it.",
            (*_SYSTEM, TRIGGER, "error_type"),
            registry=registry,
        )
        self.process_seconds = BulkHistogram(
            "messaging_process_duration_seconds",
            "Duration of an attempt to deliver an event. error_type is the class of the status.",
            (*_SYSTEM, TRIGGER, "error_type"),
            registry=registry,
            buckets=BUCKETS,
        )
        self.replied = Counter(
            "pgbackend_reply_events",
            "Events from replies of targets that were committed to the log.",
            of_trigger,
            registry=registry,
        )
        self.retries = Counter(
            "pgbackend_retries_scheduled", "Failed events scheduled for a retry.", of_trigger, registry=registry
        )
        self.dead_lettered = Counter(
            "pgbackend_dead_lettered_events",
            "Events given up, by destination: `url` is the dead letter target, `table` is PostgreSQL.",
            (TRIGGER, "destination"),
            registry=registry,
        )
        self.down = Gauge(
            "pgbackend_target_down",
            "1 while the target counts as down and gets single probes only.",
            of_trigger,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.paused = Gauge(
            "pgbackend_subscription_paused",
            "1 while delivery is paused, by an operator or because the target answered 410 Gone.",
            of_trigger,
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.reloads = Counter(
            "pgbackend_config_reloads",
            "Changed configurations, by outcome: `applied`, or `refused` if invalid.",
            ("outcome",),
            registry=registry,
        )
        self.reload_good = Gauge(
            "pgbackend_config_last_reload_successful",
            "0 while the configuration in force is not the one in the file.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.reload_time = Gauge(
            "pgbackend_config_last_reload_success_timestamp_seconds",
            "When a configuration was last put in force.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.by_trigger = (
            self.consumed, self.process_seconds, self.replied, self.retries, self.dead_lettered, self.down, self.paused,
        )  # fmt: skip
        self.reloads.labels("applied")
        self.reloads.labels("refused")
        self.reload_good.set(1)
        self.reload_time.set(time.time())

    def begin_trigger(self, name: str) -> None:
        """Show the trigger's metrics as zero: a rate over a series that begins with its first event misses that one."""
        self.replied.labels(name)
        self.retries.labels(name)
        self.dead_lettered.labels(name, "url")
        self.dead_lettered.labels(name, "table")
        self.down.labels(name)
        # It may have been paused when it was here before.
        self.paused.labels(name).set(0)

    def forget_trigger(self, name: str) -> None:
        """Show nothing more of the trigger."""
        for metric in self.by_trigger:
            metric.remove_by_labels({TRIGGER: name})


def _reloaded(instruments: Instruments, _: str) -> None:
    instruments.reloads.labels("applied").inc()
    instruments.reload_good.set(1)
    instruments.reload_time.set(time.time())


def _reload_refused(instruments: Instruments, _: str) -> None:
    instruments.reloads.labels("refused").inc()
    instruments.reload_good.set(0)


def _recovered(instruments: Instruments, name: str) -> None:
    instruments.down.labels(name).set(0)


CHANGES: Mapping[str, Callable[[Instruments, str], None]] = {
    "event buried": lambda instruments, name: instruments.dead_lettered.labels(name, "table").inc(),
    "event given up": lambda instruments, name: instruments.dead_lettered.labels(name, "url").inc(),
    "retry scheduled": lambda instruments, name: instruments.retries.labels(name).inc(),
    "target is down": lambda instruments, name: instruments.down.labels(name).set(1),
    "target is up": lambda instruments, name: instruments.down.labels(name).set(0),
    "subscription paused": lambda instruments, name: instruments.paused.labels(name).set(1),
    "subscription resumed": lambda instruments, name: instruments.paused.labels(name).set(0),
    "subscription reconfigured": _recovered,
    "lease released": _recovered,
    "lease lost": _recovered,
    "configuration reloaded": _reloaded,
    "configuration refused": _reload_refused,
}
"""The change that each fact makes, given the subscription that it is about."""


def code_of(status: int) -> str:
    """The status as a label: itself if it is registered, else its class, because targets can make up any number."""
    return str(status) if status in _REGISTERED else class_of(status)


def class_of(status: int) -> str:
    return f"{status // 100}xx" if 100 <= status < 600 else "_OTHER"


_REGISTERED = frozenset(int(status) for status in HTTPStatus)
