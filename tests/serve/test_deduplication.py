"""A broker whose file has `deduplicate`: repeats are answered like first copies, say so, and are counted."""

from pathlib import Path

import pytest
from aiohttp import web

from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, envelope, serving
from tests.serve.support.process import post, running
from tests.serve.support.target import Request, Target
from tests.support.databases import query_value
from tests.support.polling import eventually

DAY = "deduplicate: P1D\n"


async def test_a_repeat_is_accepted_and_says_so(database: str) -> None:
    """In every content mode, through ASGI and without, on connections that stay open and on others."""
    async with serving(database, config=DAY) as broker:
        sent = [
            (HEADERS, b"x", "/"),
            (HEADERS, b"x", "/?through=asgi"),
            (HEADERS | {"connection": "close"}, b"x", "/"),
            (STRUCTURED, envelope("1"), "/"),
            (STRUCTURED, envelope("2"), "/"),
            (BATCH, b"[%b,%b,%b,%b]" % (envelope("1"), envelope("3"), envelope("3"), envelope("2")), "/"),
            (BATCH, b"[%b]" % envelope("4"), "/"),
            (BATCH, b"[]", "/"),
        ]
        found = []
        for headers, body, path in sent:
            answer = await broker.send(headers, body, path)
            assert (answer.status, answer.body) == (202, b"")
            found.append(answer.headers.get("pgbackend-duplicates"))

        assert found == [None, "1", "1", "1", None, "3", None, None]
        assert [event.id for event in await broker.stored()] == ["1", "2", "3", "4"]
        metrics = (await broker.request("GET", "/metrics")).body.decode()
        assert "\npgbackend_ingest_duplicate_events_total 6.0\n" in metrics
        assert (
            'messaging_client_sent_messages_total{messaging_operation_name="send",messaging_system="pgbackend"} 4.0'
            in (metrics)
        )


async def test_a_broker_without_the_key_obeys_the_log(database: str) -> None:
    """And a log that was never told deduplicates nothing."""
    async with serving(database) as broker:
        for _ in range(2):
            assert "pgbackend-duplicates" not in (await broker.send(HEADERS, b"x")).headers
    async with serving(database, config=DAY) as broker:
        await broker.send(HEADERS, b"x")
    async with serving(database) as broker:
        assert (await broker.send(HEADERS, b"x")).headers["pgbackend-duplicates"] == "1"
        assert len(await broker.stored()) == 3


async def test_replies_are_stored_however_often_they_come(database: str, target: Target) -> None:
    def answer(request: Request) -> web.Response:
        if request.header("ce-id") == "reply":
            return web.Response(status=202)
        return web.Response(body=envelope("reply", source="/target"), headers=STRUCTURED)

    target.answer = answer
    config = DAY + f"triggers: {{a: {{target: {{url: '{target.url}'}}}}}}"
    async with serving(database, config=config) as broker:
        for id_ in ("one", "two", "one"):
            await broker.send(HEADERS | {"ce-id": id_}, b"x")

        async def are_stored() -> bool:
            return [event.id for event in await broker.stored()].count("reply") == 2

        await eventually("both replies are stored", are_stored)
        assert sorted(event.id for event in await broker.stored()) == ["one", "reply", "reply", "two"]


@pytest.mark.slow
async def test_a_changed_file_changes_the_window(database: str, tmp_path: Path) -> None:
    file = tmp_path / "broker.yaml"
    file.write_text(DAY)
    async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
        url = await serve.listening()
        for _ in range(3):
            assert await post(url) == 202
        assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 1
        file.write_text("deduplicate: P0D\n")

        async def is_off() -> bool:
            return bool(await query_value(database, "SELECT window_us = 0 FROM pgbackend.deduplication"))

        await eventually("it is switched off", is_off)
        for _ in range(3):
            assert await post(url) == 202
        assert await query_value(database, "SELECT count(*) FROM pgbackend.events") == 4
