"""The pure parts of benchmarks/compare: its events, its figures and its report."""

import json

import pytest

from benchmarks.compare.report import Report, Row
from benchmarks.compare.system import EVENT_BYTES, body, sent_at
from benchmarks.compare.systems import NAMES
from pgbackend.codec.wire import parse_structured


def _report(**rows: Row) -> Report:
    return Report(machine={"processor": "2 × Abacus"}, rounds=3, seconds=1.0, rows=rows)


@pytest.mark.parametrize("number", [0, 9_999, 10**11])
def test_every_event_has_the_same_size(number: int) -> None:
    assert len(body(number, 86_400.5)) == EVENT_BYTES


def test_an_event_and_its_data_tell_when_it_was_sent() -> None:
    event = parse_structured(body(7, 1234.5))
    assert event.data_bytes is not None
    assert sent_at(event.data_bytes) == sent_at(body(7, 1234.5)) == 1234.5


def test_a_table_shows_medians_and_then_spreads() -> None:
    row = Row("ours", figures={"one": [3_904.0, 4_100.0, 3_012.0], "latency_p50": [0.51], "latency_p99": [12.34]})
    medians, _, spreads = _report(ours=row).markdown().partition("Least and greatest")
    assert "| ours | 3,900 | failed |" in medians
    assert "| 0.51 / 12 |" in medians
    assert "| ours | 3,010–4,100 | failed |" in spreads


def test_a_system_that_cannot_run_is_named_with_its_reason() -> None:
    text = _report(pgq=Row("PgQ", skipped="pgqd is missing: apt-get install pgqd")).markdown()
    assert "| PgQ | skipped: pgqd is missing: apt-get install pgqd |" in text


def test_a_failed_measurement_is_named_with_its_reason() -> None:
    row = Row("NATS", failures=["round 1, reading: it did not end in time"])
    assert "- NATS **failed** in round 1, reading: it did not end in time" in _report(nats=row).markdown()


def test_only_a_queue_has_the_mark_of_a_shared_backlog() -> None:
    figures = {"read_4": [1_000.0]}
    queue, log = Row("queue", kind="queue", figures=figures), Row("log", figures=figures)
    lines = _report(queue=queue, log=log).markdown().splitlines()
    assert [" †" in line for line in lines if line.startswith(("| queue", "| log"))] == [True, False, True, False]


def test_the_json_has_all_figures_and_their_medians() -> None:
    data = json.loads(json.dumps(_report(ours=Row("**ours**", figures={"one": [3.0, 1.0, 2.0]})).data()))
    assert data["systems"]["ours"]["title"] == "ours"
    assert data["systems"]["ours"]["figures"] == {"one": [3.0, 1.0, 2.0]}
    assert data["systems"]["ours"]["medians"] == {"one": 2.0}


def test_pgbackend_and_the_limit_are_compared() -> None:
    assert {"bare", "pgbackend", "pgbackend-sdk"} < set(NAMES)
