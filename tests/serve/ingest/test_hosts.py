"""The Host header: required, unique, and one of the broker's own names on a loopback address."""

import asyncio
from collections.abc import Sequence

import aiohttp
import pytest

from pgbackend.errors import ConfigError
from pgbackend.serve.ingest.hosts import Hosts, checked_host
from tests.serve.support.broker import HEADERS, Broker
from tests.serve.support.process import running

ATTRIBUTES = b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items())
END = b"Connection: close\r\nContent-Length: 0\r\n\r\n"


def post(*hosts: bytes, target: bytes = b"/", version: bytes = b"1.1") -> bytes:
    lines = b"".join(b"Host: " + host + b"\r\n" for host in hosts)
    return b"POST " + target + b" HTTP/" + version + b"\r\n" + lines + ATTRIBUTES + END


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


NOT_ONE_HOST = [
    post(),
    post(version=b"2.0"),
    post(version=b"0.9"),
    post(b"localhost", b"localhost"),
    post(b"localhost", b"evil.example"),
    post(b"localhost", b"localhost", version=b"1.0"),
    post(b""),
    post(b"", b""),
    post(b"local host"),
    post(b"localhost, localhost"),
    post(b"me@localhost"),
    post(b"localhost:x"),
    post(b"localhost:1:2"),
    post(b"localhost:999999"),
    post(b"localhost/"),
    post(b"http://localhost"),
    post(b"[::1"),
    post(b"::1"),
    post(b"[localhost]"),
    post(b"[:::]"),
    post(b"%zz"),
    post(b"\xff"),
    post(b"x" * 10_000),
    post(target=b"http://localhost/"),
    post(b"localhost", target=b"http:///x"),
    post(b"localhost", target=b"http://me@localhost/"),
]


async def test_a_request_without_one_valid_host_is_400(broker: Broker) -> None:
    for sent in NOT_ONE_HOST:
        answer = await broker.talk(sent)
        assert status(answer) == 400, (sent, answer)
        assert b"application/problem+json" in answer
    assert await broker.stored() == []


OWN = [
    b"localhost", b"LocalHost:8080", b"localhost.", b"localhost.:80", b"localhost:", b"app.localhost", b"127.0.0.1",
    b"127.0.0.1:1", b"127.9.9.9", b"[::1]:8080", b"[0:0:0:0:0:0:0:1]", b"[::ffff:127.0.0.1]", b" localhost ",
]  # fmt: skip
OTHERS = [
    b"evil.example", b"evil.example:8080", b"localhost.evil.example", b"notlocalhost", b"127.0.0.1.evil.example",
    b"localhost..", b"192.0.2.1", b"0.0.0.0", b"[::]", b"[2001:db8::1]", b"2130706433", b"0x7f.1", b"127.1",
    b"%6cocalhost", b"a.", b"xn--localhost-",
]  # fmt: skip


async def test_a_broker_on_a_loopback_address_accepts_only_its_own_hosts(broker: Broker) -> None:
    for host in OWN:
        assert status(await broker.talk(post(host))) == 202, host
        # The host of a target that is a whole URL counts instead of the header.
        target = b"HTTP://" + host.strip().rstrip(b":") + b"/x?y=http://evil.example/"
        assert status(await broker.talk(post(b"evil.example", target=target))) == 202, host
    stored = len(await broker.stored())
    for host in OTHERS:
        answer = await broker.talk(post(host))
        assert status(answer) == 421, (host, answer)
        assert b"--allowed-host" in answer
        answer = await broker.talk(post(b"localhost", target=b"http://" + host + b"/"))
        assert status(answer) == 421, (host, answer)
        for path in (b"/metrics", b"/healthz"):
            get = b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
            assert status(await broker.talk(get)) == 421
    assert len(await broker.stored()) == stored


async def test_http_1_0_clients_need_no_host(broker: Broker) -> None:
    assert status(await broker.talk(post(version=b"1.0"))) == 202
    assert status(await broker.talk(post(b"evil.example", version=b"1.0"))) == 421


async def test_the_host_of_each_request_is_checked(broker: Broker) -> None:
    keep = post(b"localhost").replace(b"Connection: close\r\n", b"")
    answer = await broker.talk(keep + keep + post(b"evil.example"))
    assert answer.count(b"HTTP/1.1 202 ") == 2
    assert len(await broker.stored()) == 2


async def test_a_host_that_a_url_overrode_is_checked_in_the_next_request(broker: Broker) -> None:
    keep = post(b"evil.example", target=b"http://localhost/").replace(b"Connection: close\r\n", b"")
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    for sent, expected in ((keep, 202), (keep, 202), (post(b"evil.example"), 421)):
        writer.write(sent)
        assert status(await reader.readuntil(b"\r\n\r\n")) == expected
    writer.close()


async def test_the_host_is_checked_if_the_request_offers_an_upgrade(broker: Broker) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    for host, expected in ((b"localhost", 202), (b"evil.example", 421)):
        sent = post(host).replace(b"Connection: close\r\n", b"Connection: Upgrade, close\r\n" + upgrade)
        assert status(await broker.talk(sent)) == expected
    sent = post(b"localhost", b"evil.example").replace(b"Connection: close\r\n", b"Connection: close\r\n" + upgrade)
    assert status(await broker.talk(sent)) == 400


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "local", "is_right"),
    [
        ("127.0.0.1", (), b"broker.example", "127.0.0.1", False),
        ("::1", (), b"broker.example", "::1", False),
        ("127.0.0.1", ("Broker.Example.",), b"broker.example:443", "127.0.0.1", True),
        ("127.0.0.1", ("broker.example",), b"BROKER.example.", "127.0.0.1", True),
        ("127.0.0.1", ("broker.example",), b"other.example", "127.0.0.1", False),
        ("127.0.0.1", ("2001:db8::1",), b"[2001:DB8:0::1]:80", "127.0.0.1", True),
        ("127.0.0.1", ("*",), b"anything", "127.0.0.1", True),
        ("0.0.0.0", (), b"anything", "192.0.2.7", True),  # noqa: S104 - nothing is bound
        ("0.0.0.0", ("broker.example",), b"anything", "192.0.2.7", False),  # noqa: S104
        ("0.0.0.0", ("broker.example",), b"192.0.2.7:80", "192.0.2.7", True),  # noqa: S104 - as probes ask
        ("::", ("broker.example",), b"192.0.2.7", "::ffff:192.0.2.7", True),
        ("::", ("broker.example",), b"[fe80::1]", "fe80::1", True),
    ],
)
def test_hosts_are_compared_without_case_dots_and_ports(
    bound: str, allowed: Sequence[str], host: bytes, local: str, is_right: bool
) -> None:
    assert (Hosts(bound, allowed).problem(host, b"/", local=local) is None) is is_right


@pytest.mark.parametrize("text", ["", "http://x", "x:80", "a b", "[::1]:80", "x/", "me@x", "[x", "x" * 300])
def test_an_invalid_allowed_host_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Allowed host"):
        checked_host(text)


async def test_allowed_hosts_come_from_options_and_invalid_ones_are_wrong_usage(database: str) -> None:
    arguments = ("--dsn", database, "--port", "0", "--admin-port", "0")
    environment = {"PGBACKEND_ALLOWED_HOST": "broker.example other.example"}
    async with running(*arguments, env=environment) as serve:
        url = await serve.listening()
        async with aiohttp.ClientSession() as client:
            for host, expected in (("other.example", 202), ("localhost", 202), ("third.example", 421)):
                async with client.post(url, headers=HEADERS | {"Host": host}) as answer:
                    assert answer.status == expected
    async with running(*arguments, "--allowed-host", "http://broker.example") as serve:
        assert await serve.ended() == 2
        assert "Allowed host 'http://broker.example' is not a host" in await serve.complaint()
