"""TLS and client certificates over real sockets: accepted and refused clients, and renewed certificates."""

import asyncio
import logging
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trustme

from pgbackend.errors import ConfigError
from pgbackend.facts import Recorder
from pgbackend.serve.ingest import limits
from pgbackend.serve.ingest.tls import TLS
from tests.serve.support.broker import HEADERS, Broker, Commits, serving
from tests.support.polling import eventually

REQUEST = (
    b"POST / HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(f"{name}: {value}\r\n".encode() for name, value in HEADERS.items())
    + b"Content-Length: 4\r\nConnection: close\r\n\r\nbody"
)


class Files:
    """Certificates in a directory, of an authority that can issue more."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        self.cert, self.key, self.client_ca = (directory / name for name in ("tls.crt", "tls.key", "ca.crt"))
        self.renew()
        self.clients = trustme.CA()
        self.clients.cert_pem.write_to_path(self.client_ca)

    def renew(self) -> None:
        """Another certificate and key in the same files."""
        issued = self.authority.issue_cert("127.0.0.1")
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.key)

    def client(self, *, known_by: trustme.CA | None = None) -> ssl.SSLContext:
        """A client's context; `known_by` issues its certificate."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if known_by is not None:
            known_by.issue_cert("client@example.com").configure_cert(context)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
async def broker(database: str, files: Files) -> AsyncIterator[Broker]:
    """A broker that speaks TLS and knows its clients."""
    async with serving(database, tls=TLS(files.cert, files.key, files.client_ca)) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in records if record.msg != "certificates not reloaded%s"] == []


async def ask(broker: Broker, context: ssl.SSLContext, request: bytes = REQUEST) -> bytes:
    """The answer; raises what the handshake does."""
    reader, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
    try:
        async with asyncio.timeout(10):
            writer.write(request)
            return await reader.read()
    finally:
        writer.close()


async def is_refused(broker: Broker, context: ssl.SSLContext) -> bool:
    """Whether the client gets no answer. With TLS 1.3 its handshake succeeds before the server has checked it."""
    try:
        return await ask(broker, context) == b""
    except (ssl.SSLError, ConnectionError):
        return True


async def shown(broker: Broker, context: ssl.SSLContext) -> bytes:
    """The certificate that the broker presents now."""
    _, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
    connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
    shown = connection.getpeercert(binary_form=True)
    writer.close()
    assert shown is not None
    return shown


class TestClients:
    async def test_any_client_is_accepted_without_a_client_ca(self, database: str, files: Files) -> None:
        async with serving(database, tls=TLS(files.cert, files.key)) as broker:
            assert (await ask(broker, files.client())).startswith(b"HTTP/1.1 202 ")
            with pytest.raises(ssl.SSLCertVerificationError):
                await ask(broker, ssl.create_default_context())
            assert [event.data_bytes for event in await broker.stored()] == [b"body"]

    async def test_a_client_with_a_certificate_of_the_client_ca_is_accepted(self, broker: Broker, files: Files) -> None:
        assert (await ask(broker, files.client(known_by=files.clients))).startswith(b"HTTP/1.1 202 ")
        assert len(await broker.stored()) == 1

    async def test_a_client_without_such_a_certificate_is_refused(self, broker: Broker, files: Files) -> None:
        with Recorder() as recorder:
            for known_by in (None, trustme.CA(), files.authority):
                assert await is_refused(broker, files.client(known_by=known_by))
            told = await recorder.wait("tls handshakes failed")
            assert "CERTIFICATE" in str(told["last"]).upper()
        assert await broker.stored() == []

    async def test_certificate_and_key_may_be_in_one_file(self, database: str, files: Files, tmp_path: Path) -> None:
        both = tmp_path / "both.pem"
        both.write_bytes(files.cert.read_bytes() + files.key.read_bytes())
        async with serving(database, tls=TLS(both)) as broker:
            assert (await ask(broker, files.client())).startswith(b"HTTP/1.1 202 ")


class TestProtocol:
    async def test_tls_1_2_and_1_3_with_forward_secrecy_and_nothing_older(self, broker: Broker, files: Files) -> None:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = files.client(known_by=files.clients)
            context.minimum_version = context.maximum_version = version
            assert (await ask(broker, context)).startswith(b"HTTP/1.1 202 ")

        old = files.client(known_by=files.clients)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLS"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        assert await is_refused(broker, old)
        weak = files.client(known_by=files.clients)
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers("AES256-SHA:AES128-GCM-SHA256")  # without forward secrecy
        assert await is_refused(broker, weak)

    async def test_alpn_agrees_on_http_1_1(self, broker: Broker, files: Files) -> None:
        context = files.client(known_by=files.clients)
        context.set_alpn_protocols(["h2", "http/1.1"])
        _, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "http/1.1"
        writer.close()

    async def test_plain_http_is_cut_off(self, broker: Broker, files: Files) -> None:
        assert b"HTTP" not in await broker.talk(REQUEST)
        assert (await ask(broker, files.client(known_by=files.clients))).startswith(b"HTTP/1.1 202 ")

    async def test_a_half_closed_connection_is_cut_off_without_a_warning(
        self, broker: Broker, files: Files, commits: Commits, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Unlike plain HTTP: the event loop cannot keep such a connection, and warns if it is asked to."""
        plain = socket.create_connection((broker.host, broker.port), timeout=10)
        context = files.client(known_by=files.clients)
        connection = await asyncio.to_thread(context.wrap_socket, plain, server_hostname=broker.host)
        await asyncio.to_thread(connection.sendall, REQUEST)
        await commits.reached.wait()
        ending = asyncio.create_task(asyncio.to_thread(connection.unwrap))

        async def cut_off() -> bool:
            return not broker.listener.state.connections

        await eventually("it is cut off", cut_off)
        commits.go_on()
        (await ending).close()
        assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []

    async def test_large_events_arrive_over_several_connections(self, broker: Broker, files: Files) -> None:
        body = b"x" * 1_000_000
        request = REQUEST.replace(b"Content-Length: 4", b"Content-Length: 1000000")[:-4] + body
        context = files.client(known_by=files.clients)
        for _ in range(3):
            assert (await ask(broker, context, request)).startswith(b"HTTP/1.1 202 ")
        assert [event.data_bytes for event in await broker.stored()] == [body] * 3


class TestSlowClients:
    async def test_an_unfinished_handshake_times_out_and_delays_no_other_client(
        self, broker: Broker, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "HANDSHAKE", 2.0)
        hello = first_hello()
        silent = [await asyncio.open_connection(broker.host, broker.port) for _ in range(20)]
        for number, (_, writer) in enumerate(silent):
            writer.write(hello[: number * 3])

        async def all_have_begun() -> bool:
            return broker.listener.state.places.held == 20

        await eventually("20 handshakes have begun", all_have_begun, interval=0.001)
        monkeypatch.setattr(limits, "HANDSHAKE", 30.0)
        assert (await ask(broker, files.client(known_by=files.clients))).startswith(b"HTTP/1.1 202 ")
        async with asyncio.timeout(10):
            for reader, writer in silent:
                assert await reader.read() == b""
                writer.close()

    async def test_handshakes_count_as_connections(self, broker: Broker, files: Files) -> None:
        broker.listener.state.places.total = 6
        with Recorder() as recorder:
            silent = [await asyncio.open_connection(broker.host, broker.port) for _ in range(3)]
            assert await is_refused(broker, files.client(known_by=files.clients))
            refused = await recorder.wait("connections refused")
        assert (refused["connected"], refused["limit"]) == (3, 6)  # one address gets a half
        for _, writer in silent:
            writer.close()

    async def test_a_request_over_tls_must_arrive_in_time(
        self, broker: Broker, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "PATIENCE", 0.5)
        answer = await ask(broker, files.client(known_by=files.clients), REQUEST[:-1])
        assert answer.startswith(b"HTTP/1.1 408 ")

    async def test_draining_does_not_wait_for_handshakes(self, database: str, files: Files) -> None:
        async with serving(database, tls=TLS(files.cert, files.key)) as broker:
            _, writer = await asyncio.open_connection(broker.host, broker.port)
            writer.write(first_hello()[:10])
            await ask(broker, files.client())
        writer.close()


def first_hello() -> bytes:
    """The first message of a handshake."""
    outgoing = ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


class TestRenewal:
    async def test_new_connections_get_a_renewed_certificate_and_old_ones_go_on(
        self, database: str, files: Files
    ) -> None:
        tls = TLS(files.cert, files.key, files.client_ca)
        async with serving(database, tls=tls) as broker:
            context = files.client(known_by=files.clients)
            reader, writer = await asyncio.open_connection(broker.host, broker.port, ssl=context)
            before = await shown(broker, context)

            files.renew()
            assert await shown(broker, context) == before
            with Recorder() as recorder:
                tls.reload()
                assert recorder.all("certificates reloaded", cert=str(files.cert))
            assert await shown(broker, context) != before
            writer.write(REQUEST)
            assert (await reader.read()).startswith(b"HTTP/1.1 202 ")
            writer.close()

    async def test_a_changed_client_ca_counts_from_the_reload_on(self, database: str, files: Files) -> None:
        tls = TLS(files.cert, files.key, files.client_ca)
        async with serving(database, tls=tls) as broker:
            successor = trustme.CA()
            successor.cert_pem.write_to_path(files.client_ca)
            tls.reload()
            assert (await ask(broker, files.client(known_by=successor))).startswith(b"HTTP/1.1 202 ")
            assert await is_refused(broker, files.client(known_by=files.clients))

    async def test_an_invalid_file_changes_nothing_and_is_logged(self, database: str, files: Files) -> None:
        tls = TLS(files.cert, files.key)
        async with serving(database, tls=tls) as broker:
            before = await shown(broker, files.client())
            files.cert.write_text("not a certificate")
            with Recorder() as recorder:
                tls.reload()
                [told] = recorder.all("certificates not reloaded")
            assert str(files.cert) in str(told["error"])
            assert await shown(broker, files.client()) == before


class TestInvalidFiles:
    """Each is one clear line, before anything is bound."""

    def test_a_missing_file(self, files: Files, tmp_path: Path) -> None:
        nowhere = tmp_path / "nowhere"
        for arguments in ((nowhere, files.key), (files.cert, nowhere), (files.cert, files.key, nowhere)):
            with pytest.raises(ConfigError, match=r"nowhere cannot be read: No such file or directory\."):
                TLS(*arguments)
        with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
            TLS(tmp_path, files.key)

    def test_a_file_with_other_contents(self, files: Files, tmp_path: Path) -> None:
        other = tmp_path / "other"
        for content in (b"", b"other", b"\x00\xff" * 1000):
            other.write_bytes(content)
            with pytest.raises(ConfigError, match="other has no certificate in PEM form"):
                TLS(other, files.key)
            with pytest.raises(ConfigError, match="other has no private key in PEM form"):
                TLS(files.cert, other)
            with pytest.raises(ConfigError, match=r"client CA .*other has no certificate in PEM form"):
                TLS(files.cert, files.key, other)
            with pytest.raises(ConfigError, match=r"PEM form( \([A-Z_ ]+\))?\.$"):
                TLS(other, files.key)

    def test_a_key_that_is_missing_or_does_not_match(self, files: Files) -> None:
        with pytest.raises(ConfigError, match=r"tls\.crt has no private key\. Give one with --tls-key\."):
            TLS(files.cert)
        files.authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(files.key)
        with pytest.raises(ConfigError, match=r"tls\.key does not match the first certificate in .*tls\.crt"):
            TLS(files.cert, files.key)

    def test_an_encrypted_key_is_refused_without_asking_for_its_password(self, files: Files, tmp_path: Path) -> None:
        locked = tmp_path / "locked.key"
        encrypt = ["openssl", "pkey", "-in", str(files.key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
        subprocess.run(encrypt, check=True)
        with pytest.raises(ConfigError, match=r"locked\.key is encrypted\. Decrypt it: openssl pkey"):
            TLS(files.cert, locked)


async def test_a_connection_reset_in_its_handshake_is_forgotten(broker: Broker, files: Files) -> None:
    for _ in range(10):
        connection = socket.create_connection((broker.host, broker.port))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.send(first_hello()[:50])
        connection.close()  # with a reset
    assert (await ask(broker, files.client(known_by=files.clients))).startswith(b"HTTP/1.1 202 ")
