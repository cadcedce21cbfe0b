"""The published CloudEvents SDKs for JavaScript and Python, as senders and as receivers.

Their events are stored as they mean them, and they read deliveries as the events that were sent. Where an SDK departs
from the CloudEvents specification, a test shows the effect, so that it is not taken for a defect of the broker.

The JavaScript SDK does not code header values: it sends `é` as Latin-1, refuses other characters, and takes
percent-codes for text. Its structured mode is correct. The Python SDK re-encodes JSON data.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http, to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, Broker, envelope, serving
from tests.serve.support.target import Request, Target
from tests.support.node import install

NODE = Path(__file__).parent / "node"
NANOSECONDS = "2026-01-01T00:00:00.123456789Z"
OCTETS = bytes(range(256))


# ── the JavaScript SDK ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def peer() -> str:
    """The script, with its package installed by the first test process that needs it."""
    install(NODE)
    return str(NODE / "peer.js")


async def emit(peer: str, url: str, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcome of each event that the package's emitter sent: `status`, or the emitter's `error`."""
    process = await asyncio.create_subprocess_exec(
        "node", peer, "send", url, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        said, _ = await process.communicate(json.dumps(events).encode())
    assert process.returncode == 0
    answers = [json.loads(line) for line in said.splitlines()]
    assert len(answers) == len(events)
    return answers


class Receiver:
    """A server with the package, and the result of `HTTP.toEvent` for each request."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}/"

    async def take(self, count: int) -> list[dict[str, Any]]:
        """The next events."""
        assert self._process.stdout
        async with asyncio.timeout(30):
            lines = [await self._process.stdout.readline() for _ in range(count)]
        return [json.loads(line)["event"] for line in lines]


@asynccontextmanager
async def receiving(peer: str) -> AsyncIterator[Receiver]:
    process = await asyncio.create_subprocess_exec(
        "node", peer, "receive", stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    try:
        assert process.stdout
        yield Receiver(process, json.loads(await process.stdout.readline()))
    finally:
        process.kill()
        await process.communicate()


def js(id_: str, mode: str = "binary", *, octets: bytes | None = None, **members: object) -> dict[str, Any]:
    """An event for `emit`."""
    one: dict[str, Any] = {"mode": mode, "event": {"id": id_, "source": "/js", "type": "t", **members}}
    return one if octets is None else one | {"octets": base64.b64encode(octets).decode()}


class TestJavaScriptSends:
    @pytest.mark.slow
    async def test_binary_mode(self, broker: Broker, peer: str) -> None:
        answers = await emit(
            peer,
            broker.url,
            js("json", data={"n": 1.5, "é": '☃ "quoted"'}),
            js("text", data="Grüße, 100 %", datacontenttype="text/plain; charset=utf-8"),
            js("octets", octets=OCTETS, datacontenttype="image/png"),
            js("octets that are text", octets=b'{"a": 1}', datacontenttype="application/octet-stream"),
            js("null", data=None),
            js("empty", data="", datacontenttype="text/plain"),
            js("large", data={"x": "é" * 400_000}),
            js("extensions", data={}, count=-42, flag=True, note="as is", dataschema="http://example.com/s#1"),
            js("coded by its user", data={}, subject="caf%C3%A9"),
            js("percent", data={}, subject="100%", half='say "hi"'),
        )
        assert answers == [{"status": 202}] * len(answers)
        stored = {event.id: event for event in await broker.stored()}

        assert json.loads(stored["json"].data_bytes or b"") == {"n": 1.5, "é": '☃ "quoted"'}
        assert stored["json"].attribute("datacontenttype") == "application/json; charset=utf-8"
        assert stored["text"].data_bytes == "Grüße, 100 %".encode()
        assert stored["octets"].data_bytes == OCTETS
        assert stored["octets that are text"].data_bytes == b'{"a": 1}'
        assert stored["null"].data_bytes == b"null"
        assert stored["empty"].data_bytes is None
        assert json.loads(stored["large"].data_bytes or b"") == {"x": "é" * 400_000}
        extensions = stored["extensions"].attributes_text
        assert {name: extensions[name] for name in ("count", "flag", "note", "dataschema")} == {
            "count": "-42",
            "flag": "true",
            "note": "as is",
            "dataschema": "http://example.com/s#1",
        }
        assert stored["coded by its user"].subject == "café"
        # A sender that does not code: a % that cannot begin a code stays as it is.
        assert stored["percent"].subject == "100%"
        assert stored["percent"].attribute("half") == 'say "hi"'

    @pytest.mark.slow
    async def test_structured_mode(self, broker: Broker, peer: str) -> None:
        answers = await emit(
            peer,
            broker.url,
            js("json", "structured", data={"n": 1.5, "é": '☃ "quoted"'}, datacontenttype="application/json"),
            js("text", "structured", data="Grüße, 100 %", datacontenttype="text/plain"),
            js("string", "structured", data="a JSON string", datacontenttype="application/json"),
            js("false", "structured", data=False),
            js("null", "structured", data=None),
            js("none", "structured"),
            js("octets", "structured", octets=OCTETS, datacontenttype="image/png"),
            js("octets that are text", "structured", octets=b"text", datacontenttype="text/plain"),
            js("attributes", "structured", subject="café 100% ☃", count=-42, flag=True, note="a\\b"),
        )
        assert answers == [{"status": 202}] * len(answers)
        stored = {event.id: event for event in await broker.stored()}

        assert stored["json"].get_data() == {"n": 1.5, "é": '☃ "quoted"'}
        assert stored["text"].get_data() == "Grüße, 100 %"
        assert stored["string"].data_bytes == b'"a JSON string"'
        assert stored["false"].data_bytes == b"false"
        assert stored["null"].data_bytes == b"null"
        assert stored["none"].data_bytes is None
        assert stored["octets"].data_bytes == OCTETS
        assert stored["octets that are text"].get_data() == b"text"
        assert stored["attributes"].subject == "café 100% ☃"
        attributes = stored["attributes"].get_attributes()
        assert (attributes["count"], attributes["flag"], attributes["note"]) == (-42, True, "a\\b")

    @pytest.mark.slow
    async def test_batches_sent_by_its_transport_are_stored(self, broker: Broker, peer: str) -> None:
        events = [js(str(number), data={"n": number}, subject=f"☃{number}")["event"] for number in range(50)]
        bad = {"mode": "batch", "events": [events[0], events[1] | {"time": "2026-06-30T23:59:59Z", "count": 2**31}]}
        answers = await emit(peer, broker.url, {"mode": "batch", "events": events}, bad)

        assert answers[0] == {"status": 202}
        assert answers[1]["status"] == 400
        assert "index 1" in answers[1]["detail"]
        assert "'count'" in answers[1]["detail"]
        stored = await broker.stored()
        assert [(event.id, event.subject) for event in stored] == [(str(n), f"☃{n}") for n in range(50)]

    @pytest.mark.slow
    async def test_its_headers_can_carry_a_token(self, database: str, peer: str) -> None:
        async with serving(database, config="ingest: {token: secret}") as broker:
            answers = await emit(
                peer,
                broker.url,
                js("1", data={}),
                js("2", data={}) | {"headers": {"authorization": "Bearer secret"}},
                js("3", "structured") | {"headers": {"authorization": "Bearer wrong"}},
            )
            assert [answer["status"] for answer in answers] == [401, 202, 401]
            assert [event.id for event in await broker.stored()] == ["2"]

    @pytest.mark.slow
    async def test_its_mistakes_are_refused_or_stored_as_sent(self, broker: Broker, peer: str) -> None:
        answers = await emit(
            peer,
            broker.url,
            js("latin-1", data={}, subject="café"),
            js("beyond latin-1", data={}, subject="☃"),
            js("no data"),
            js("number", data=5),
            js("string", data="hello", datacontenttype="application/json"),
            js("in quotes", data={}, subject='"quoted"'),
            js("looks coded", data={}, subject="5%25"),
            js("nanoseconds", data={}, time=NANOSECONDS),
            js("nanoseconds, structured", "structured", time=NANOSECONDS),
        )
        # Octets of Latin-1 are no UTF-8: guessing would store another text than the sender meant.
        assert answers[0]["status"] == 400
        assert "ce-subject" in answers[0]["detail"]
        assert ["error" in answer for answer in answers[1:4]] == [True] * 3, "it can send these now: say so here"
        assert answers[4:] == [{"status": 202}] * 5
        stored = {event.id: event for event in await broker.stored()}
        assert len(stored) == 5
        assert stored["string"].data_bytes == b"hello", "it does not write strings as JSON"
        assert stored["in quotes"].subject == "quoted", "it does not code what every receiver has to decode"
        assert stored["looks coded"].subject == "5%"
        assert stored["nanoseconds"].attribute("time") == "2026-01-01T00:00:00.123Z", "its times are milliseconds"
        assert stored["nanoseconds, structured"].attribute("time") == "2026-01-01T00:00:00.123Z"


SENT: Sequence[tuple[dict[str, str], bytes]] = (
    (HEADERS | {"ce-id": "json", "content-type": "application/json"}, '{"é": [1.5, "☃"]}'.encode()),
    (HEADERS | {"ce-id": "text", "content-type": "text/plain"}, "Grüße, 100 %".encode()),
    (HEADERS | {"ce-id": "octets", "content-type": "application/octet-stream"}, b"octets that are text"),
    (HEADERS | {"ce-id": "none"}, b""),
    (HEADERS | {"ce-id": "large", "content-type": "application/json"}, json.dumps(["é" * 100_000]).encode()),
    (STRUCTURED, envelope("attributes", subject="plain", count=-42, flag=True, note="a b", data={})),
    (STRUCTURED, envelope("base64", datacontenttype="image/png", data_base64=base64.b64encode(OCTETS).decode())),
    (STRUCTURED, envelope("time", time="2026-01-01T00:00:00Z", data=[])),
)


async def post(broker: Broker, *messages: tuple[dict[str, str], bytes]) -> None:
    for headers, body in messages:
        assert (await broker.send(headers, body)).status == 202


def to(url: str, mode: str = "binary") -> str:
    return f"triggers: {{peer: {{target: {{url: '{url}', mode: {mode}}}, order: strict}}}}"


class TestJavaScriptReceives:
    @pytest.mark.slow
    async def test_structured_mode(self, database: str, peer: str) -> None:
        async with receiving(peer) as receiver, serving(database, config=to(receiver.url, "structured")) as broker:
            await post(broker, *SENT)
            got = {event["id"]: event for event in await receiver.take(len(SENT))}

        assert got["json"]["data"] == {"é": [1.5, "☃"]}
        assert (got["text"]["data"], got["text"]["datacontenttype"]) == ("Grüße, 100 %", "text/plain")
        assert got["octets"]["data"] == {"octets": base64.b64encode(b"octets that are text").decode()}
        assert "data" not in got["none"]
        assert got["large"]["data"] == ["é" * 100_000]
        assert (got["attributes"]["count"], got["attributes"]["flag"]) == (-42, True)
        assert (got["attributes"]["subject"], got["attributes"]["note"]) == ("plain", "a b")
        assert got["base64"]["data"] == {"octets": base64.b64encode(OCTETS).decode()}
        assert got["time"]["time"] == "2026-01-01T00:00:00.000Z"
        assert {event["source"] for event in got.values()} == {"/shop"}

    @pytest.mark.slow
    async def test_binary_mode(self, database: str, peer: str) -> None:
        async with receiving(peer) as receiver, serving(database, config=to(receiver.url)) as broker:
            await post(broker, *(one for one in SENT if b"base64" not in one[1]))  # its users' bodies are text
            got = {event["id"]: event for event in await receiver.take(len(SENT) - 1)}

        assert got["json"]["data"] == {"é": [1.5, "☃"]}
        assert (got["text"]["data"], got["text"]["datacontenttype"]) == ("Grüße, 100 %", "text/plain")
        assert got["octets"]["data"] == "octets that are text"
        assert got["none"]["data"] == ""
        assert "datacontenttype" not in got["none"]
        assert got["large"]["data"] == ["é" * 100_000]
        assert got["attributes"]["count"] == "-42"
        assert got["attributes"]["flag"] == "true"
        assert got["time"]["time"] == "2026-01-01T00:00:00.000Z"
        # It does not decode header values. Values with other than ASCII's visible characters are for structured mode.
        assert got["attributes"]["note"] == "a%20b"

    @pytest.mark.slow
    async def test_its_reading_mistakes_are_not_in_the_delivery(self, database: str, target: Target, peer: str) -> None:
        """The same events go to a target of ours: there they are whole."""
        messages = (
            (STRUCTURED, envelope("false", data=False)),
            (STRUCTURED, envelope("leap", time="2016-12-31T23:59:60Z", data=1)),
            (STRUCTURED, envelope("nanoseconds", time=NANOSECONDS, subject="é", data=1)),
        )
        async with receiving(peer) as receiver:
            config = f"""
                triggers:
                  peer: {{target: {{url: '{receiver.url}', mode: structured}}, order: strict}}
                  ours: {{target: {{url: '{target.url}'}}, order: strict}}
                """
            async with serving(database, config=config) as broker:
                await post(broker, *messages)
                got = await receiver.take(3)
                ours = [request.event() for request in await target.wait(3)]

        assert "data" not in got[0], "data that JavaScript takes for false are lost on it"
        assert ours[0].data_bytes == b"false"
        assert got[1]["time"] > "2026-", "a leap second becomes the present time"
        assert ours[1].attribute("time") == "2016-12-31T23:59:60Z"
        assert (got[2]["time"], got[2]["subject"]) == ("2026-01-01T00:00:00.123Z", "é")
        assert ours[2].attribute("time") == NANOSECONDS

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["binary", "structured"])
    async def test_its_replies_are_stored(self, mode: str, database: str, peer: str) -> None:
        async with receiving(peer) as receiver:
            config = f"""
                triggers:
                  asks: {{filters: [exact: {{type: order}}], target: {{url: '{receiver.url}'}}}}
                  hears: {{filters: [exact: {{type: reply}}], target: {{url: '{receiver.url}', mode: structured}}}}
                """
            async with serving(database, config=config) as broker:
                await post(broker, (STRUCTURED, envelope("1", wanted=mode, count=7, data={"n": [1, "é"]})))
                [asked, heard] = await receiver.take(2)

        assert (asked["id"], asked["type"]) == ("1", "order")
        assert (heard["id"], heard["type"], heard["data"]) == ("1-reply", "reply", {"n": [1, "é"]})
        assert str(heard["count"]) == "7"


# ── the Python SDK ────────────────────────────────────────────────────────────────────────────────────────────────────


def sdk(id_: str, data: Any = None, **attributes: object) -> CloudEvent:
    time = datetime(2026, 1, 1, 0, 0, 0, 123456, UTC)
    return CloudEvent({"id": id_, "source": "/py", "type": "t", "time": time, **attributes}, data)


async def post_message(broker: Broker, message: HTTPMessage) -> int:
    async with (
        aiohttp.ClientSession(skip_auto_headers=("Content-Type",)) as client,
        client.post(broker.url, headers=message.headers, data=message.body) as answer,
    ):
        return answer.status


PYTHON_EVENTS: Sequence[tuple[CloudEvent, bytes | None]] = (
    (
        sdk("json", {"n": 1.5, "é": '☃ "x"'}, datacontenttype="application/json"),
        b'{"n": 1.5, "\\u00e9": "\\u2603 \\"x\\""}',
    ),
    (sdk("text", "Grüße, 100 %", datacontenttype="text/plain"), "Grüße, 100 %".encode()),
    (sdk("octets", OCTETS, datacontenttype="image/png"), OCTETS),
    (sdk("octets that are text", b'{"a": 1}', datacontenttype="image/png"), b'{"a": 1}'),
    (sdk("none"), None),
    (sdk("attributes", subject='café 100% "☃" \\ %41', count=-42, note="a,b;c=d", percent="%"), None),
)


class TestPythonSends:
    @pytest.mark.parametrize("write", [to_binary, to_structured])
    async def test_events_are_stored_as_the_sdk_means_them(self, write: Any, broker: Broker) -> None:
        for event, _ in PYTHON_EVENTS:
            assert await post_message(broker, write(event, JSONFormat())) == 202
        stored = {event.id: event for event in await broker.stored()}
        for event, data in PYTHON_EVENTS:
            mine = stored[event.get_id()]
            assert mine.data_bytes == data
            assert mine.attribute("time") == "2026-01-01T00:00:00.123456Z"
            for name in ("subject", "note", "percent", "datacontenttype"):
                assert mine.attribute(name) == event.get_attributes().get(name), (event.get_id(), name)
        assert stored["attributes"].attribute("count") == "-42"

    async def test_its_mistakes_are_refused_or_stored_as_sent(self, broker: Broker) -> None:
        json_type = {"datacontenttype": "application/json"}
        for event, status in (
            (sdk("a list", ["a", None, True], **json_type), 202),
            (sdk("a string", "text", **json_type), 202),
            (sdk("a flag", flag=True), 202),
            (sdk("not a number", {"n": float("nan")}, **json_type), 202),
            (sdk("a large integer", large=2**40), 202),
        ):
            assert await post_message(broker, to_binary(event, JSONFormat())) == status
        stored = {event.id: event for event in await broker.stored()}
        # Its binary mode writes JSON data other than dicts as Python does. The broker stores bodies unchanged.
        assert stored["a list"].data_bytes == b"['a', None, True]"
        assert stored["a string"].data_bytes == b"text"
        assert stored["not a number"].data_bytes == b'{"n": NaN}'
        assert stored["a flag"].attribute("flag") == "True"
        assert stored["a large integer"].attribute("large") == str(2**40)

        for event in (sdk("nan", {"n": float("nan")}, **json_type), sdk("large", large=2**40), sdk("float", f=1.5)):
            assert await post_message(broker, to_structured(event, JSONFormat())) == 400
        assert len(await broker.stored()) == 5


def read(request: Request) -> Any:
    """As users of the SDK read a request of their web framework."""
    headers = {name.decode(): value.decode() for name, value in request.headers}
    return from_http(HTTPMessage(headers=headers, body=request.body), JSONFormat(), CloudEvent)


class TestPythonReceives:
    @pytest.mark.parametrize("mode", ["binary", "structured"])
    async def test_deliveries_equal_the_events_that_were_sent(self, mode: str, database: str, target: Target) -> None:
        async with serving(database, config=to(target.url, mode)) as broker:
            await post(broker, *SENT, (STRUCTURED, envelope("coded", subject='café 100% "☃" \\ %41', data="a string")))
            got = {event.get_id(): event for event in map(read, await target.wait(len(SENT) + 1))}

        assert got["json"].get_data() == {"é": [1.5, "☃"]}
        assert got["text"].get_data() == "Grüße, 100 %"
        # It takes a body of octets that are valid UTF-8 for text.
        octets = b"octets that are text"
        assert got["octets"].get_data() == (octets.decode() if mode == "binary" else octets)
        assert got["none"].get_data() is None
        assert got["large"].get_data() == ["é" * 100_000]
        assert got["base64"].get_data() == OCTETS
        assert got["attributes"].get_extension("count") == ("-42" if mode == "binary" else -42)
        assert got["attributes"].get_extension("flag") == ("true" if mode == "binary" else True)
        assert got["attributes"].get_extension("note") == "a b"
        assert got["coded"].get_subject() == 'café 100% "☃" \\ %41'
        assert got["coded"].get_data() == "a string"
        assert got["time"].get_time() == datetime(2026, 1, 1, tzinfo=UTC)

    async def test_events_of_a_batch_are_delivered_one_by_one(self, database: str, target: Target) -> None:
        """A receiver gets batches only if it asked for them."""
        async with serving(database, config=to(target.url)) as broker:
            await post(broker, (BATCH, b"[%b]" % b",".join(envelope(number, data=number) for number in range(5))))
            requests = await target.wait(5)
        assert [(read(request).get_id(), read(request).get_data()) for request in requests] == [
            (str(number), number) for number in range(5)
        ]
        for request in requests:
            assert not (request.header("content-type") or "").startswith("application/cloudevents")
