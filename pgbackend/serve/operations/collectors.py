"""Shows more than this process's own counts in a scrape: the log's state, and the counts of other broker processes.

`metrics` registers both collectors. Broker processes share a directory of mapped files (PROMETHEUS_MULTIPROC_DIR, set
before prometheus_client is imported), so each can answer for all. The promise: a counter never falls, because counts of
ended processes stay; gauges are those of living ones.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import ProcessCollector
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from pgbackend.serve.operations.instruments import TRIGGER

if TYPE_CHECKING:
    from pgbackend.model import Status


class LogCollector:
    """The state of the log as PostgreSQL told it last."""

    def __init__(self, build: dict[str, str]) -> None:
        self._build = build
        self.status: Status | None = None
        """None if PostgreSQL could not be asked."""

    def collect(self) -> Iterable[Metric]:
        status = self.status
        yield InfoMetricFamily("pgbackend_build", "Versions of pgbackend and of Python.", value=self._build)
        yield _gauge("pgbackend_postgresql_up", "1 if PostgreSQL answered this scrape.", status is not None)
        if status is None:
            return
        yield from _of_the_log(status)
        yield from _of_subscriptions(status)


def _of_the_log(status: "Status") -> Iterator[Metric]:
    yield _gauge("pgbackend_log_head_position", "The highest position assigned in the log.", status.head)
    yield _gauge("pgbackend_log_events_per_second", "Events appended a second, over the last minute.", status.rate)
    yield _gauge("pgbackend_log_size_bytes", "Bytes that the events take on disk.", status.bytes_on_disk)
    yield _gauge("pgbackend_log_segments", "Segments of the log, with those made ahead.", status.segments)
    yield _gauge("pgbackend_log_open_appenders", "Open transactions that have appended events.", len(status.appenders))
    policy = status.retention
    seconds = GaugeMetricFamily(
        "pgbackend_log_retention_seconds", "How long events or dead letters stay, by limit.", labels=("limit",)
    )
    for limit, time in (("keep", policy.keep), ("max_age", policy.max_age), ("dead_letters", policy.dead_letters)):
        if time is not None:
            seconds.add_metric((limit,), time.total_seconds())
    yield seconds
    if policy.max_bytes is not None:
        yield _gauge("pgbackend_log_retention_bytes", "The size from which the oldest events go.", policy.max_bytes)


def _of_subscriptions(status: "Status") -> Iterator[Metric]:
    lag = _by_trigger("pgbackend_subscription_lag_events", "Positions between the offset and the head of the log.")
    age = _by_trigger("pgbackend_subscription_lag_seconds", "Age of the oldest event that is not settled.")
    pending = _by_trigger("pgbackend_subscription_pending_events", "Positions below the offset that are not settled.")
    in_flight = _by_trigger("pgbackend_subscription_in_flight_events", "Events below the offset that are at work.")
    waiting = _by_trigger("pgbackend_subscription_waiting_events", "Failed events that wait for a retry.")
    letters = _by_trigger("pgbackend_subscription_dead_letter_events", "Dead letters kept in PostgreSQL.")
    skipped = _by_trigger(
        "pgbackend_subscription_skipped_events", "Unsettled positions whose rows are gone from the log."
    )
    owned = _by_trigger("pgbackend_subscription_owned_shards", "Shards that a living worker runs.")
    holds = _by_trigger("pgbackend_subscription_holds_log", "1 if events stay longer than `keep` because of it.")
    holders = {holder.subscription for holder in status.holders}
    for one in status.subscriptions:
        name = (one.name,)
        lag.add_metric(name, one.lag)
        pending.add_metric(name, sum(shard.pending for shard in one.shards))
        in_flight.add_metric(name, one.in_flight)
        waiting.add_metric(name, one.redeliveries)
        letters.add_metric(name, one.dead_letters)
        skipped.add_metric(name, one.skipped)
        owned.add_metric(name, sum(shard.owner_name is not None for shard in one.shards))
        holds.add_metric(name, one.name in holders)
        if one.lag_seconds is not None:  # it is for a complete subscription
            age.add_metric(name, one.lag_seconds)
    yield from (lag, age, pending, in_flight, waiting, letters, skipped, owned, holds)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, text)
    gauge.add_metric((), value)
    return gauge


def _by_trigger(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=(TRIGGER,))


class ProcessesCollector:
    """The counts of all broker processes, from their files, without triggers that `is_known` does not know."""

    def __init__(self, directory: Path, is_known: Callable[[str], bool]) -> None:
        self._directory = directory
        self._is_known = is_known

    def collect(self) -> Iterable[Metric]:
        with _locked(self._directory, fcntl.LOCK_SH):
            counted = list(MultiProcessCollector(None, str(self._directory)).collect())
            pids = sorted({file.stem.rpartition("_")[2] for file in self._directory.glob("gauge_*.db")})
        for metric in counted:
            # The files keep the series of removed triggers.
            metric.samples = [one for one in metric.samples if self._is_shown(one.labels.get(TRIGGER))]
            if metric.samples:
                yield metric
        yield from _usage_of(pids)

    def _is_shown(self, trigger: str | None) -> bool:
        return trigger is None or self._is_known(trigger)


def _usage_of(pids: Iterable[str]) -> Iterable[Metric]:
    """CPU time, memory and files of each process."""
    merged: dict[str, Metric] = {}
    for pid in pids:
        for metric in ProcessCollector(pid=partial(str, pid), registry=None).collect():
            into = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                into.add_sample(sample.name, {**sample.labels, "pid": pid}, sample.value)
    return merged.values()


def merge_ended(pid: int) -> None:
    """Add the counters of an ended process to the file of all ended ones, and delete its gauges.

    One file for all, because a broker that runs for years would otherwise have thousands. Raises BlockingIOError at
    once while a process reads the files: that process may be frozen, and the supervisor must not wait for it.
    """
    directory = shared_directory()
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


def shared_directory() -> Path | None:
    """The directory that broker processes share; None for a process on its own."""
    named = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(named) if named else None


@contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    """A reader must not see counts twice, or not at all, while they move from one file to another."""
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, how)
        yield
