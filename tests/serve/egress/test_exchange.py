"""Requests as bytes, and what becomes of their connections."""

import asyncio

import pytest
from yarl import URL

from pgbackend.codec import wire
from pgbackend.codec.event import Event
from pgbackend.errors import Reject
from pgbackend.serve.egress.connections import Pool
from pgbackend.serve.egress.exchange import Exchange, Line
from pgbackend.serve.egress.outcomes import TargetError
from tests.serve.support.broker import envelope
from tests.serve.support.dispatchers import dispatcher_to
from tests.serve.support.target import Target, raw_server, read_request
from tests.support.polling import eventually

ORDER = wire.parse_structured(envelope("order"))


class TestHead:
    async def test_a_head_has_its_lines_in_order(self) -> None:
        async with Pool() as pool:
            line = Line(pool, URL("http://target.example:81/a%20b?x=%2F1#here", encoded=True), given=["user-agent"])
            assert line.head([("ce-id", "é"), ("User-Agent", "mine")], 7) == (
                b"POST /a%20b?x=%2F1 HTTP/1.1\r\n"
                b"Host: target.example:81\r\n"
                b"Accept: */*\r\n"
                b"Accept-Encoding: identity\r\n"
                b"ce-id: \xc3\xa9\r\n"
                b"User-Agent: mine\r\n"
                b"Content-Length: 7\r\n"
                b"\r\n"
            )

    @pytest.mark.parametrize("broken", ["\n", "\r", "\0", "a\r\nX: b", "\ud800"])
    async def test_no_header_breaks_out_of_its_line(self, broken: str, target: Target) -> None:
        async with Pool() as pool:
            with pytest.raises(ValueError, match=r"header|surrogates"):
                Line(pool, URL(target.url)).head([("a", broken), ("b", "c")], 0)
            with pytest.raises(Reject, match="cannot be sent"):
                await dispatcher_to(pool, target.url, headers={"x": broken})(ORDER)
            await dispatcher_to(pool, target.url)(ORDER)
        assert len(target.requests) == 1


class TestConnections:
    async def test_interim_answers_are_skipped(self) -> None:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 202 Accepted\r\n")
            writer.write(b"Content-Length: 2\r\n\r\nok")

        async with raw_server(talk) as url, Pool() as pool:
            line = Line(pool, URL(url))
            async with Exchange(line, deadline=asyncio.get_running_loop().time() + 30) as exchange:
                response = await exchange.post(line.head([], 0), b"")
                assert (response.status, response.content_length) == (202, 2)
                assert await response.content.read() == b"ok"

    async def test_a_request_that_is_never_read_is_dropped_at_the_timeout(self) -> None:
        """The unsent part must not stay in memory for a target that reads nothing."""
        received = asyncio.get_running_loop().create_future()

        async def read_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
            await eventually("the connection ends", lambda: not pool._acquired)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            size = 0
            while piece := await reader.read(1 << 20):
                size += len(piece)
            received.set_result(size)

        large = Event((*ORDER.row[:10], b"x" * 20_000_000, None))
        async with Pool() as pool, raw_server(read_later) as url:
            with pytest.raises(TargetError, match="no response within"):
                await dispatcher_to(pool, url, timeout=0.3)(large)
            assert await asyncio.wait_for(received, 10) < 20_000_000
            assert not pool._conns

    async def test_a_connection_with_an_unread_rest_is_not_used_again(self) -> None:
        connections = 0

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            while await read_request(reader):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 100_000)

        async with raw_server(talk) as url, Pool() as pool:
            dispatch = dispatcher_to(pool, url, timeout=30.0)
            await dispatch(ORDER)
            await dispatch(ORDER)
        assert connections == 2
