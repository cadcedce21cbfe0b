"""Replies of targets: which responses carry events, how they are stored, and where chains of them end."""

import asyncio
import gzip
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from time import monotonic

import pytest
from aiohttp import web

from pgbackend.backend import Backend
from pgbackend.codec import wire
from pgbackend.codec.event import Event
from pgbackend.errors import ConnectionLostError, EventError, PgBackendError, ProduceUncertainError
from pgbackend.facts import Recorder
from pgbackend.model import Failure
from pgbackend.serve.egress import replies
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.dispatcher import DeadLetterDispatcher, TargetDispatcher
from pgbackend.serve.egress.outcomes import TargetError
from tests.serve.support.broker import BATCH, HEADERS, STRUCTURED, envelope
from tests.serve.support.dispatchers import dispatcher_to
from tests.serve.support.target import Target, raw_server, read_request
from tests.support.dispatchers import Catch
from tests.support.polling import eventually

ORDER = wire.parse_structured(envelope("order"))


class Log:
    """Stores replies, unless `fails` is set."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.fails: PgBackendError | None = None

    async def produce(self, events: Sequence[Event]) -> None:
        if self.fails is not None:
            raise self.fails
        self.events += events


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with Pool() as opened:
        yield opened


@pytest.fixture
def log() -> Log:
    return Log()


Maker = Callable[..., TargetDispatcher]


@pytest.fixture
def dispatcher(pool: Pool, log: Log) -> Maker:
    return partial(dispatcher_to, pool, store=log.produce)


def replying(target: Target, body: bytes, headers: dict[str, str], status: int = 200) -> None:
    target.answer = lambda request: web.Response(status=status, body=body, headers=headers)


def counted(hops: object) -> Event:
    return wire.parse_structured(envelope("order", **{replies.HOPS: hops}))


class TestWhatIsAReply:
    async def test_binary_mode(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, b'{"n": 1.00}', HEADERS | {"content-type": "application/json", "ce-subject": "caf%C3%A9"})
        await dispatcher(target.url)(ORDER)
        [reply] = log.events
        assert (reply.subject, reply.data_bytes) == ("café", b'{"n": 1.00}')
        assert reply.attribute("datacontenttype") == "application/json"

    @pytest.mark.parametrize("status", [200, 201, 202, 299])
    async def test_structured_mode(self, status: int, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, envelope("reply", data=[1]), {"Content-Type": "Application/CloudEvents+JSON"}, status)
        await dispatcher(target.url)(ORDER)
        assert [reply.id for reply in log.events] == ["reply"]

    async def test_a_batch(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, b"[%b,%b]" % (envelope("1"), envelope("2")), BATCH)
        await dispatcher(target.url)(ORDER)
        assert [reply.id for reply in log.events] == ["1", "2"]

    async def test_the_content_type_alone_says_the_mode(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, envelope("payload"), STRUCTURED | HEADERS)
        await dispatcher(target.url)(ORDER)
        assert [reply.id for reply in log.events] == ["payload"]

    @pytest.mark.parametrize(
        ("body", "headers"),
        [
            (b"", {}),
            (b"fine", {}),
            (envelope("1"), {"Content-Type": "application/json"}),
            (b"fine", {"Content-Type": "text/plain", "ce-id": "1", "ce-type": "t", "ce-source": "/"}),
            (b"[]", BATCH),
        ],
    )
    async def test_a_body_that_is_not_an_event_is_ignored(
        self, body: bytes, headers: dict[str, str], target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, body, headers)
        with Recorder() as recorder:
            await dispatcher(target.url)(ORDER)
        assert (log.events, recorder.facts) == ([], [])

    @pytest.mark.parametrize(
        ("body", "headers", "said"),
        [
            (b"", {"ce-specversion": "1.0", "ce-id": "1"}, "'source' is missing"),
            (b"", HEADERS | {"ce-specversion": "2.0"}, "expected '1.0'"),
            (b"{", STRUCTURED, "Not JSON"),
            (b"", STRUCTURED, "is not a JSON object"),
            (b"[%b, 1]" % envelope("1"), BATCH, "index 1"),
            (b"<x/>", {"Content-Type": "application/cloudevents+xml"}, "not supported"),
        ],
    )
    async def test_an_invalid_event_is_ignored_with_a_warning(
        self, body: bytes, headers: dict[str, str], said: str, target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, body, headers)
        with Recorder() as recorder:
            await dispatcher(target.url)(ORDER)
        [fact] = recorder.all("reply ignored", trigger="billing", url=target.url)
        assert said in str(fact["error"])
        assert log.events == []

    async def test_a_failure_carries_no_reply(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, envelope("1"), STRUCTURED, 500)
        with pytest.raises(TargetError):
            await dispatcher(target.url)(ORDER)
        assert log.events == []

    async def test_a_dead_letter_target_may_reply_as_well(self, target: Target, dispatcher: Maker, log: Log) -> None:
        """TriggerMesh's brokers accept these replies as well."""
        replying(target, envelope("reply"), STRUCTURED)
        failed = ORDER.with_delivery(failure=Failure(error="Reject: no", attempts=1, details={}))
        await DeadLetterDispatcher(dispatcher(target.url))(failed)
        assert [reply.id for reply in log.events] == ["reply"]


class TestWhenItCannotBeStored:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ConnectionLostError("PostgreSQL is away"), "503"),
            (ProduceUncertainError("nobody knows"), "503"),
            (EventError("too large for the log"), "502"),
        ],
    )
    async def test_the_dispatch_fails_with_the_reason(
        self, error: PgBackendError, code: str, target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, envelope("1"), STRUCTURED)
        log.fails = error
        with pytest.raises(TargetError, match=f"answered 200, but its reply was not stored: {error}") as caught:
            await dispatcher(target.url)(ORDER)
        assert caught.value.details["knativeerrorcode"] == code

    @pytest.mark.parametrize(
        ("headers", "limit"),
        [
            (HEADERS, replies.EVENT_BYTES),
            (STRUCTURED, replies.limit_of("structured")),
            (BATCH, replies.limit_of("batch")),
        ],
    )
    async def test_a_reply_that_is_too_large_is_read_to_its_limit_and_fails(
        self, headers: dict[str, str], limit: int, target: Target, dispatcher: Maker
    ) -> None:
        replying(target, b"x" * (limit + 1), headers)
        with pytest.raises(TargetError, match=f"answered 200, but its reply has more than {limit} bytes") as caught:
            await dispatcher(target.url)(ORDER)
        assert caught.value.details["knativeerrorcode"] == "502"

    @pytest.mark.parametrize("headers", [HEADERS, STRUCTURED, BATCH], ids=["binary", "structured", "batch"])
    async def test_a_reply_that_is_compressed_fails(
        self, headers: dict[str, str], target: Target, dispatcher: Maker, log: Log
    ) -> None:
        """Stored compressed, its data would not match its content type."""
        replying(target, gzip.compress(b"{}"), headers | {"content-encoding": "gzip"})
        with pytest.raises(TargetError, match="answered 200, but its reply has the Content-Encoding 'gzip'") as caught:
            await dispatcher(target.url)(ORDER)
        assert caught.value.details["knativeerrorcode"] == "502"
        assert log.events == []

    async def test_a_compressed_body_that_is_not_an_event_is_ignored(
        self, target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, gzip.compress(b"thanks"), {"content-encoding": "gzip"})
        await dispatcher(target.url)(ORDER)
        assert log.events == []

    async def test_a_reply_at_the_limit_is_stored(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, b"x" * replies.EVENT_BYTES, HEADERS)
        await dispatcher(target.url)(ORDER)
        assert len(log.events[0].data_bytes or b"") == replies.EVENT_BYTES

    @pytest.mark.parametrize("ending", ["slow", "cut"])
    async def test_a_reply_that_does_not_end_in_time_or_breaks_off_fails(
        self, ending: str, dispatcher: Maker, log: Log
    ) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/cloudevents+json\r\nContent-Length: 900\r\n\r\n{"
            )
            await writer.drain()
            if ending == "slow":
                await reader.read()

        async with raw_server(talk) as url:
            began = monotonic()
            with pytest.raises(TargetError, match="answered 200, but its reply broke off: ") as caught:
                await dispatcher(url, timeout=2.0 if ending == "slow" else 30.0)(ORDER)
        assert monotonic() - began < 20
        assert caught.value.details["knativeerrorcode"] == "502"
        assert log.events == []


class Counts:
    """Records what a dispatcher counts."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int | None]] = []

    def delivered(self, seconds: float) -> None:
        assert 0 < seconds < 60
        self.told.append(("delivered", None))

    def failed(self, seconds: float, status: int | None) -> None:
        assert 0 < seconds < 60
        self.told.append(("failed", status))

    def replied(self, events: int) -> None:
        self.told.append(("replied", events))


async def test_metrics_count_each_attempt_with_its_outcome(target: Target, dispatcher: Maker, log: Log) -> None:
    counts = Counts()
    billing = dispatcher(target.url, metrics=counts)
    for status, headers, fails in (
        (200, {}, None),
        (200, STRUCTURED, None),
        (200, STRUCTURED, ConnectionLostError("PostgreSQL is away")),
        (200, STRUCTURED, EventError("too large")),
        (503, {}, None),
        (503, {"Retry-After": "1"}, None),
        (403, {}, None),
        (410, {}, None),
    ):
        replying(target, envelope("1"), headers, status)
        log.fails = fails
        await asyncio.gather(billing(ORDER), return_exceptions=True)
    await asyncio.gather(dispatcher("http://127.0.0.1:1/", metrics=counts)(ORDER), return_exceptions=True)
    assert counts.told == [
        ("delivered", None),
        ("replied", 1),
        ("delivered", None),
        *(("failed", status) for status in (503, 502, 503, 503, 403, 410, None)),
    ]


class TestMemory:
    async def test_a_reply_of_too_many_events_fails(self, target: Target, dispatcher: Maker, log: Log) -> None:
        replying(target, b"[%b]" % b",".join([envelope()] * replies.BATCH_EVENTS), BATCH)
        await dispatcher(target.url)(ORDER)
        assert len(log.events) == replies.BATCH_EVENTS
        # The rest of a batch that is too long is not parsed.
        replying(target, b"[%b,]" % b",".join([envelope()] * (replies.BATCH_EVENTS + 1)), BATCH)
        with pytest.raises(TargetError, match="its reply has more than 100 events") as caught:
            await dispatcher(target.url)(ORDER)
        assert caught.value.details["knativeerrorcode"] == "502"
        assert len(log.events) == replies.BATCH_EVENTS

    async def test_endless_replies_take_only_the_share_of_their_trigger(
        self, pool: Pool, target: Target, log: Log
    ) -> None:
        """One target never ends its replies; meanwhile the large replies of another are stored."""
        budget = replies.ReplyBudget(8 << 20)
        begun = 0

        async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal begun
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/cloudevents+json\r\n")
            writer.write(b"Content-Length: 400000\r\n\r\n" + b" " * 200_000)
            await writer.drain()
            begun += 1
            await reader.read()

        async def all_have_begun() -> bool:
            return begun == 20

        replying(target, envelope("large", data="x" * 200_000), STRUCTURED)
        async with raw_server(hold) as held:
            bad = dispatcher_to(pool, held, trigger="bad", timeout=60.0, store=log.produce, budget=budget)
            good = dispatcher_to(pool, target.url, trigger="good", timeout=30.0, store=log.produce, budget=budget)
            waiting = [asyncio.create_task(bad(ORDER)) for _ in range(20)]
            await eventually("all of them have begun", all_have_begun)
            await asyncio.gather(*(good(ORDER) for _ in range(20)))
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        assert len(log.events) == 20

    async def test_replies_of_all_triggers_stay_within_the_budget(self, pool: Pool, target: Target) -> None:
        # A reply reserves four times its size.
        fit = (4 << 20) // 800_000
        storing = 0
        full = asyncio.Event()

        async def store(events: Sequence[Event]) -> None:
            nonlocal storing
            storing += 1
            assert storing <= fit
            if storing == fit:
                full.set()
            await full.wait()
            await asyncio.sleep(0)
            storing -= 1

        replying(target, envelope("large", data="x" * 200_000), STRUCTURED)
        budget = replies.ReplyBudget(4 << 20)
        dispatchers = [
            dispatcher_to(pool, target.url, trigger=str(n), timeout=30.0, store=store, budget=budget) for n in range(10)
        ]
        await asyncio.gather(*(dispatch(ORDER) for dispatch in dispatchers for _ in range(3)))

    async def test_a_reply_that_finds_no_room_fails_at_the_timeout(self, pool: Pool, target: Target, log: Log) -> None:
        replying(target, envelope("large", data="x" * 200_000), STRUCTURED)
        budget = replies.ReplyBudget(1 << 20)
        dispatch = dispatcher_to(pool, target.url, trigger="a", timeout=0.5, store=log.produce, budget=budget)
        async with budget.reserved(1 << 20):
            with pytest.raises(TargetError, match=r"broke off: no response within 0\.5 s"):
                await dispatch(ORDER)
        await dispatch(ORDER)
        assert len(log.events) == 1


class TestHops:
    @pytest.mark.parametrize(
        ("delivered", "own", "expected"),
        [
            (None, None, 254),  # the count begins
            (17, None, 16),
            ("17", None, 16),  # text, as binary mode has it
            (17, 3, 3),  # the smaller counter wins
            (17, "99", 16),
            (None, 2_000_000_000, 254),
            (2_000_000_000, None, 254),  # the broker's limit wins
            ("junk", None, 254),  # invalid counters count as none
            (True, None, 254),
            ("", None, 254),
            ("٣", None, 254),
            ("9" * 5000, None, 254),
            (17, "junk", 16),
            (2, None, 1),
        ],
    )
    async def test_a_reply_has_one_hop_less_than_its_event(
        self, delivered: object, own: object, expected: int, target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, envelope("reply", **({} if own is None else {replies.HOPS: own})), STRUCTURED)
        await dispatcher(target.url)(ORDER if delivered is None else counted(delivered))
        assert [reply.attribute(replies.HOPS) for reply in log.events] == [str(expected)]

    @pytest.mark.parametrize(("delivered", "own"), [(1, None), (0, None), (-5, None), (17, 0), (17, -1), (1, 100)])
    async def test_a_reply_without_hops_left_is_dropped(
        self, delivered: int, own: int | None, target: Target, dispatcher: Maker, log: Log
    ) -> None:
        replying(target, envelope("reply", **({} if own is None else {replies.HOPS: own})), STRUCTURED)
        with Recorder() as recorder:
            await dispatcher(target.url)(counted(delivered))
        assert log.events == []
        assert recorder.all("reply dropped after too many hops", trigger="billing", event_id="order", events=1)

    async def test_each_event_of_a_batch_has_its_own_hops(self, target: Target, dispatcher: Maker, log: Log) -> None:
        events = (envelope("1", **{replies.HOPS: 0}), envelope("2", **{replies.HOPS: 5}), envelope("3"))
        replying(target, b"[%b]" % b",".join(events), BATCH)
        await dispatcher(target.url, max_hops=10)(ORDER)
        assert [(reply.id, reply.attribute(replies.HOPS)) for reply in log.events] == [("2", "5"), ("3", "9")]


async def test_a_loop_of_replies_ends(backend: Backend, target: Target, pool: Pool) -> None:
    """Two triggers reply to each other's replies, until three hops are used up."""
    target.answer = lambda request: web.Response(body=envelope(f"after {request.event().id}"), headers=STRUCTURED)
    for name in ("ping", "pong"):
        dispatcher = dispatcher_to(pool, target.url + name, trigger=name, store=backend.produce_many, max_hops=3)
        await backend.subscribe(name, dispatcher, start="earliest")
    running = asyncio.create_task(backend.start())
    with Recorder() as recorder:
        await backend.produce(ORDER)
        # 1 event causes 2 replies, and these cause 4. Each of the 4 is delivered twice; its 8 replies are dropped.
        await recorder.wait("reply dropped after too many hops", count=8)
        assert len(await target.wait(14)) == 14
    await backend.stop()
    await running


async def test_an_event_is_settled_only_after_its_reply_is_in_the_log(
    backend: Backend, target: Target, pool: Pool
) -> None:
    replying(target, envelope("reply"), STRUCTURED)
    stored, release = asyncio.Event(), asyncio.Event()

    async def produce(events: Sequence[Event]) -> None:
        await backend.produce_many(events)
        stored.set()
        await release.wait()

    await backend.subscribe(
        "billing",
        dispatcher_to(pool, target.url, trigger="billing", store=produce),
        filter=lambda event: event.id == "order",
        start="earliest",
    )
    running = asyncio.create_task(backend.start())
    await backend.produce(ORDER)
    await asyncio.wait_for(stored.wait(), 10)
    [subscription] = (await backend.status()).subscriptions
    assert subscription.lag > 0
    release.set()
    async with asyncio.timeout(10):
        while (await backend.status()).subscriptions[0].lag:
            await asyncio.sleep(0.02)
    await backend.stop()
    await running


async def test_a_reply_during_the_drain_is_stored(backend: Backend, target: Target, pool: Pool, database: str) -> None:
    stopping = asyncio.Event()

    async def reply_late(request: object) -> web.Response:
        await stopping.wait()
        return web.Response(body=envelope("reply"), headers=STRUCTURED)

    target.answer = reply_late
    billing = dispatcher_to(pool, target.url, trigger="billing", store=backend.produce_many)
    await backend.subscribe("billing", billing, filter=lambda event: event.id == "order", start="earliest")
    running = asyncio.create_task(backend.start())
    await backend.produce(ORDER)
    await target.wait(1)
    stop = asyncio.create_task(backend.stop())
    await asyncio.sleep(0)  # it has begun
    stopping.set()
    await stop
    await running

    async with Backend(database) as again:
        await again.subscribe("billing", billing, filter=lambda event: event.id == "order")
        await again.subscribe("all", everything := Catch(), start="earliest")
        await everything.has("order", "reply")
    assert len(target.requests) == 1, "it was delivered again"


async def test_a_reply_that_is_too_large_for_the_log_fails(backend: Backend, target: Target, pool: Pool) -> None:
    """A structured reply may be larger than an event in the log."""
    replying(target, envelope("large", data="x" * (replies.EVENT_BYTES + 1000)), STRUCTURED)
    billing = dispatcher_to(pool, target.url, trigger="billing", store=backend.produce_many)
    with pytest.raises(TargetError, match="max_event_bytes") as caught:
        await billing(ORDER)
    assert b"max_event_bytes" in b64decode(caught.value.details["knativeerrordata"])
