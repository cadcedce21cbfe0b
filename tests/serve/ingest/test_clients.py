"""Greedy clients: whatever an address uses up, other addresses still get their share."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from pgbackend.backend import Backend
from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.clients import Budget, address_of
from pgbackend.serve.ingest.limits import Limits
from tests.serve.support.broker import HEAD, Broker, Commits, serving
from tests.support.polling import eventually

GREEDY, OTHER = "127.0.0.2", "127.0.0.3"
SMALL = HEAD + b"Content-Length: 1\r\n\r\nx"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


class Clients:
    """Connections to a broker from chosen addresses, until the test ends."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._opened: list[asyncio.StreamWriter] = []
        self._holding: list[asyncio.Task[bytes]] = []

    async def connect(self, address: str) -> Streams:
        reader, writer = await asyncio.open_connection(
            self._broker.host, self._broker.port, local_addr=(address, 0), limit=1 << 20
        )
        self._opened.append(writer)
        return reader, writer

    async def ask(self, address: str, *parts: bytes) -> bytes:
        """The head of the answer to these pieces, on a new connection; empty without an answer."""
        reader, writer = await self.connect(address)
        return await ask(reader, writer, *parts)

    async def hold(self, sent: bytes, count: int) -> None:
        """Open `count` connections from GREEDY that send only this; return once one of them gets a 503."""
        self._holding = [asyncio.create_task(self.ask(GREEDY, sent)) for _ in range(count)]
        done, _ = await asyncio.wait(self._holding, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            assert b" 503 " in task.result()

    async def close(self) -> None:
        for task in self._holding:
            task.cancel()
        await asyncio.gather(*self._holding, return_exceptions=True)
        for writer in self._opened:
            writer.transport.abort()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *parts: bytes) -> bytes:
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)  # so that they arrive as separate pieces
        return await reader.readuntil(b"\r\n\r\n")
    except (ConnectionError, asyncio.IncompleteReadError):
        return b""


@asynccontextmanager
async def clients_of(broker: Broker) -> AsyncIterator[Clients]:
    clients = Clients(broker)
    try:
        yield clients
    finally:
        await clients.close()


@pytest.mark.parametrize("greedy", [1, 2, 10])
def test_greedy_addresses_leave_some_of_the_budget_to_the_next(greedy: int) -> None:
    budget = Budget(10_000)
    for number in range(greedy):
        while budget.take(str(number), 1):
            pass
    assert budget.take("another", 10_000 // 2 ** (greedy + 1) - 1)


def test_an_amount_that_is_given_back_can_be_taken_again() -> None:
    budget = Budget(100)
    for _ in range(1000):
        assert budget.take("a", 50)
        assert not budget.take("a", 1)
        assert not budget.take("b", 26)
        budget.give_back("a", 50)
    assert budget.held == 0


def test_all_addresses_of_an_ipv6_64_count_as_one() -> None:
    assert address_of("2001:db8:1:2:3:4:5:6") == address_of("2001:db8:1:2::1")
    assert address_of("2001:db8:1:2::1") != address_of("2001:db8:1:3::1")
    assert address_of("::ffff:192.0.2.1") == address_of("192.0.2.1") != address_of("192.0.2.2")


async def test_silent_connections_of_one_address_leave_places_for_others(broker: Broker) -> None:
    places = broker.listener.state.places
    places.total = 24
    async with clients_of(broker) as clients:
        silent = [await clients.connect(GREEDY) for _ in range(12)]
        assert b" 503 " in await clients.ask(GREEDY)
        assert b" 200 " in await clients.ask(OTHER, HEALTH)
        for _, writer in silent:
            writer.close()

        async def gone() -> bool:
            return places.held <= 1

        await eventually("their places are free", gone)
        assert b" 200 " in await clients.ask(GREEDY, HEALTH)

    async def all_gone() -> bool:
        return places.held == 0

    await eventually("all places are free", all_gone)


async def test_incomplete_bodies_leave_room_for_others(database: str) -> None:
    head = HEAD + b"Content-Length: 1000000\r\n\r\n"
    large = (head, b"x" * 999_999)
    async with serving(database, limits=Limits(held_bytes=8_000_000)) as broker, clients_of(broker) as clients:
        await clients.hold(b"".join(large), 12)

        # Another address may send large bodies, too; the greedy one, which may be a reverse proxy, small ones.
        assert b" 202 " in await clients.ask(OTHER, *large, b"x")
        assert b" 202 " in await clients.ask(GREEDY, SMALL)
        assert b" 202 " in await clients.ask(GREEDY, SMALL[:-1], SMALL[-1:])


async def test_incomplete_small_bodies_leave_room_for_others(database: str) -> None:
    async with serving(database, limits=Limits(held_bytes=1_000_000)) as broker, clients_of(broker) as clients:
        await clients.hold(HEAD + b"Content-Length: 60001\r\n\r\n" + b"x" * 60_000, 40)
        assert b" 202 " in await clients.ask(OTHER, SMALL[:-1], SMALL[-1:])


@pytest.mark.parametrize(
    "half", [HEAD + b"X: " + b"x" * 60_000, HEAD + b"a:\r\n" * 400], ids=["large headers", "many headers"]
)
async def test_incomplete_heads_leave_room_for_others(half: bytes, broker: Broker) -> None:
    heads = broker.listener.state.heads
    heads.total = 1_000_000
    async with clients_of(broker) as clients:
        await clients.hold(half, 40)
        assert heads.held < 1_000_000
        assert b" 202 " in await clients.ask(OTHER, SMALL[:20], SMALL[20:])

    async def forgotten() -> bool:
        return heads.held == 0

    await eventually("nothing is held", forgotten)


async def test_the_body_of_a_get_is_not_kept(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def probe(_: Backend) -> None:
        asked.set()
        await answered.wait()

    monkeypatch.setattr(Backend, "probe", probe)
    async with clients_of(broker) as clients:
        reader, writer = await clients.connect(GREEDY)
        head = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000\r\n\r\n"
        writer.write(head + b"x" * 100_000)
        await asked.wait()
        writer.write(b"x" * 100_000)
        (connection,) = broker.connections()

        async def all_there() -> bool:
            return connection.arrival.body_bytes == 200_000

        await eventually("the body is there", all_there)
        assert isinstance(connection.cycle, RequestResponseCycle)
        assert connection.cycle.body == b""
        answered.set()
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")


async def test_nothing_is_read_while_requests_wait_for_their_turn(
    broker: Broker, commits: Commits, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = broker.listener.state.heads
    held = []
    take = heads.take

    def taken(address: str, amount: int, *, share: int) -> bool:
        answer = take(address, amount, share=share)
        held.append(heads.held)
        return answer

    monkeypatch.setattr(heads, "take", taken)
    async with clients_of(broker) as clients:
        reader, writer = await clients.connect(GREEDY)
        writer.write(SMALL)
        await commits.reached.wait()
        request = b"GET /never HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"
        writer.write(request * 300)

        async def queued() -> bool:
            return heads.held > 0

        await eventually("some are queued", queued)
        commits.go_on()
        assert b" 202 " in await reader.readuntil(b"\r\n\r\n")
        for _ in range(300):
            assert b" 404 " in await reader.readuntil(b"}")
    # One read of the socket, counted twice where only an upper bound is known; 300 requests are 6 MB.
    assert max(held) < 700_000


@pytest.mark.parametrize("half", [SMALL[:-1], HEAD, b"", SMALL + HEAD], ids=["body", "head", "nothing", "second head"])
async def test_a_client_that_disconnects_holds_nothing_any_more(half: bytes, broker: Broker) -> None:
    state = broker.listener.state
    async with clients_of(broker) as clients:
        _, writer = await clients.connect(GREEDY)
        writer.write(half)

        async def there() -> bool:
            return state.places.held == 1 and (not half or bool(state.heads.held or broker.ingest.held.held))

        if half != SMALL[:-1]:
            await eventually("it is counted", there)

    async def gone() -> bool:
        return state.places.held == state.heads.held == broker.ingest.held.held == 0

    await eventually("nothing is counted", gone)


async def test_a_request_that_stalls_after_many_bytes_is_cut_off_in_time(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 1.0)
    answer = await broker.talk(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 999_999)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.slow
async def test_a_steady_request_may_take_longer_up_to_the_longest_arrival(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PATIENCE", 1.0)

    async def trickle() -> bytes:
        parts = [b"x" * 10_000] * 10
        reader, writer = await asyncio.open_connection(broker.host, broker.port)
        writer.write(HEAD + b"Connection: close\r\nContent-Length: 100000\r\n\r\n")
        try:
            for part in parts:
                await asyncio.sleep(0.4)
                writer.write(part)
                await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    assert (await trickle()).startswith(b"HTTP/1.1 202 ")
    monkeypatch.setattr(limits, "LONGEST_ARRIVAL", 1.5)
    answer = await trickle()
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert len(await broker.stored()) == 1


async def test_trailers_are_bounded_even_after_a_large_body(broker: Broker) -> None:
    chunk = b"%x\r\n%b\r\n" % (900_000, b"x" * 900_000)
    trailer = b"x" * 100_000
    sent = [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk, b"0\r\nX: ", *[trailer] * 20, b"\r\n\r\n"]
    answer = await broker.talk(*sent)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert await broker.stored() == []
