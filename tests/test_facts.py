"""Facts reach the log, and observers such as metrics and tests."""

import asyncio
import logging

import pytest

from pgbackend import facts


def test_record_reads_well_and_carries_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pgbackend"):
        facts.emit("lease claimed", shard=3, subscription="bill ing", error=ValueError("no"), waited=0.5, name="x=y")
    (record,) = caplog.records
    assert (
        record.getMessage()
        == "lease claimed shard=3 subscription='bill ing' error='ValueError: no' waited=0.5 name='x=y'"
    )
    assert record.msg == "lease claimed%s"
    assert vars(record)["fact"] == "lease claimed"
    assert vars(record)["fields"]["shard"] == 3
    assert record.funcName == "test_record_reads_well_and_carries_the_fields"


def test_a_field_without_text_does_not_lose_the_record(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    with caplog.at_level(logging.INFO, logger="pgbackend"):
        facts.emit("dispatch failed", attempt=1, error=BrokenError())
    assert caplog.records[0].getMessage() == "dispatch failed attempt=1 error='(BrokenError that cannot be shown)'"


def test_a_long_field_is_cut_and_says_how_long_it_was(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pgbackend"):
        facts.emit("told", text="x" * 3_000_000, listed=["y" * 3_000_000] * 100)
    [record] = caplog.records
    assert len(record.getMessage()) < 3000
    assert "(3000000 characters)" in record.getMessage()


def test_nothing_is_rendered_when_nobody_listens() -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError("rendered")

    facts.emit("quiet", level=logging.DEBUG, value=Loud())


def test_observers_get_facts_below_the_log_level() -> None:
    with facts.Recorder() as recorder:
        facts.emit("offset committed", level=logging.DEBUG, shard=1)
        facts.emit("offset committed", level=logging.DEBUG, shard=2)
    facts.emit("offset committed", level=logging.DEBUG, shard=3)
    assert recorder.all("offset committed") == [{"shard": 1}, {"shard": 2}]
    assert recorder.all("offset committed", shard=2) == [{"shard": 2}]


async def test_wait_returns_the_matching_fact_of_that_number() -> None:
    with facts.Recorder() as recorder:
        facts.emit("pump stopped", level=logging.DEBUG, shard=1, first=True)
        waiting = asyncio.create_task(recorder.wait("pump stopped", 5, count=2, shard=1))
        await asyncio.sleep(0)
        facts.emit("pump stopped", level=logging.DEBUG, shard=2)
        facts.emit("pump stopped", level=logging.DEBUG, shard=1)
        assert await waiting == {"shard": 1}


async def test_wait_sees_facts_of_other_threads() -> None:
    with facts.Recorder() as recorder:
        await asyncio.to_thread(facts.emit, "lease renewed", level=logging.DEBUG)
        await recorder.wait("lease renewed", 5)


async def test_a_timeout_names_the_expected_and_the_seen_facts() -> None:
    with facts.Recorder() as recorder:
        facts.emit("lease claimed", level=logging.DEBUG)
        with pytest.raises(
            TimeoutError, match=r"0 of 1 facts .lease lost. shard=1 within 0\.01 s; heard: lease claimed"
        ):
            await recorder.wait("lease lost", 0.01, shard=1)
