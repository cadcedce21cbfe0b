"""The addresses that the broker connects to, and the reuse of its connections."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from yarl import URL

from pgbackend.codec import wire
from pgbackend.serve.egress import addresses
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.outcomes import TargetError
from tests.serve.support.broker import envelope
from tests.serve.support.dispatchers import dispatcher_to
from tests.serve.support.target import Target, raw_server, read_request
from tests.support.polling import eventually

ORDER = wire.parse_structured(envelope("order"))


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    async with Pool(deny_private=True) as opened:
        yield opened


def resolving(monkeypatch: pytest.MonkeyPatch, name: str, *answers: list[str]) -> None:
    """Each lookup of the name returns the next of these answers."""
    loop = asyncio.get_running_loop()
    real, turns = loop.getaddrinfo, iter(answers)

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        # uvloop looks up literal addresses as well, just before it connects to them.
        found = next(turns) if host == name else [host]
        return [info for address in found for info in await real(address, port, **options)]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


class TestDenyPrivateTargets:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::ffff:127.0.0.1", "::"])  # noqa: S104
    async def test_a_target_on_this_machine_is_never_connected_to(self, host: str, target: Target, pool: Pool) -> None:
        url = URL(target.url).with_host(host)
        with pytest.raises(TargetError, match="is not a public address, and --deny-private-targets is on") as caught:
            await dispatcher_to(pool, url)(ORDER)
        assert caught.value.status is None
        assert target.requests == []

    @pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
    async def test_an_address_in_an_old_form_is_never_connected_to(self, host: str, target: Target, pool: Pool) -> None:
        url = URL(target.url.replace("127.0.0.1", host), encoded=True)
        with pytest.raises(TargetError):
            await dispatcher_to(pool, url)(ORDER)
        assert target.requests == []

    async def test_dns_rebinding_does_not_help(
        self, target: Target, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The name resolves to a public address when it is checked, and to this machine when it is used."""
        resolving(monkeypatch, "rebinding.example", ["93.184.215.14"], ["127.0.0.1"])
        await asyncio.get_running_loop().getaddrinfo("rebinding.example", 80)  # a check of the name
        url = URL(target.url).with_host("rebinding.example")
        with pytest.raises(TargetError, match=r"127\.0\.0\.1 is not a public address"):
            await dispatcher_to(pool, url)(ORDER)
        assert target.requests == []

    async def test_private_addresses_among_several_are_skipped(
        self, target: Target, pool: Pool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """127.0.0.2 stands for a public address here."""
        port = URL(target.url).port
        taken = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            writer.close()
            taken.set()

        monkeypatch.setattr(addresses, "is_public", lambda host: host == "127.0.0.2")
        resolving(monkeypatch, "two.example", ["127.0.0.1", "127.0.0.2"])
        async with await asyncio.start_server(talk, "127.0.0.2", port):
            await dispatcher_to(pool, URL(target.url).with_host("two.example"))(ORDER)
        assert taken.is_set()
        assert target.requests == []

    async def test_private_targets_are_allowed_by_default(self, target: Target) -> None:
        async with Pool() as pool:
            await dispatcher_to(pool, target.url)(ORDER)
        assert len(target.requests) == 1


class TestConnections:
    async def test_an_idle_connection_is_closed(self) -> None:
        """Nothing is kept of targets that a reload has removed."""
        closed = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            await reader.read()
            closed.set()

        async with raw_server(talk) as url, Pool(keepalive=0.2) as pool:
            await dispatcher_to(pool, url, trigger="removed")(ORDER)
            await asyncio.wait_for(closed.wait(), 10)

            async def nothing_kept() -> bool:
                return not pool._conns

            await eventually("the pool forgot it", nothing_kept)

    async def test_a_connection_is_reused(self) -> None:
        connections = requests = 0

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections, requests
            connections += 1
            while await read_request(reader):
                requests += 1
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")

        async with raw_server(talk) as url, Pool() as pool:
            dispatch = dispatcher_to(pool, url)
            for _ in range(5):
                await dispatch(ORDER)
        assert (connections, requests) == (1, 5)
