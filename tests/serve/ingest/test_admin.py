"""The admin port: probes and metrics are answered, whatever clients do to the port for events."""

import asyncio
import re
import resource
import signal
import socket
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from tests.serve.support.configs import config
from tests.serve.support.process import Process, post, refused, running
from tests.serve.support.target import Request, Target


async def admin_of(serve: Process) -> str:
    """Its URL, once the broker listens."""
    await serve.listening()
    found = re.search(r"probes and metrics: (http://[^/]+)/healthz", serve.said)
    assert found, serve.said
    return found[1]


async def status(url: str, method: str = "GET") -> int:
    async with aiohttp.ClientSession() as client, client.request(method, url) as answer:
        return answer.status


async def test_the_admin_port_has_probes_and_metrics_and_takes_no_events(database: str) -> None:
    arguments = ("--dsn", database, "--port", "0", "--admin-port", "0", "--workers", "2")
    async with running(*arguments) as serve:
        events = (await serve.listening()).rstrip("/")
        admin = await admin_of(serve)
        for path in ("/healthz", "/readyz", "/metrics"):
            assert await status(admin + path) == 200
            assert await status(admin + path, "HEAD") == 200
        assert await status(admin + "/") == 404
        assert await post(admin + "/") == 405
        assert await status(admin + "/", "OPTIONS") == 405

        assert await status(events + "/healthz") == await status(events + "/readyz") == 200
        assert await status(events + "/metrics") == 404
        assert await post(events) == 202
        serve.send(signal.SIGTERM)
        assert await serve.ended() == 0
        assert await serve.complaint() == ""


async def test_probes_are_answered_while_silent_clients_hold_all_other_connections(database: str) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    arguments = ("--dsn", database, "--port", "0", "--admin-port", "0")
    async with running(*arguments, preexec_fn=few_files) as serve:
        events = urlsplit(await serve.listening())
        silent = [await asyncio.open_connection(events.hostname, events.port) for _ in range(400)]
        assert await status(f"http://{events.netloc}/healthz") == 503
        for _ in range(10):
            assert await status(await admin_of(serve) + "/healthz") == 200
            assert await status(await admin_of(serve) + "/readyz") == 200
        for _, writer in silent:
            writer.transport.abort()


async def test_the_admin_port_answers_until_the_broker_has_drained(database: str, target: Target) -> None:
    released = asyncio.Event()

    async def hold(_: Request) -> web.Response:
        await released.wait()
        return web.Response(status=204)

    target.answer = hold
    arguments = ("--dsn", database, "--port", "0", "--admin-port", "0", "--config-inline", config(target))
    async with running(*arguments) as serve:
        events = await serve.listening()
        admin = await admin_of(serve)
        assert await post(events) == 202
        await target.wait(1)
        serve.send(signal.SIGTERM)
        await refused(events)
        assert await status(admin + "/healthz") == 200
        assert await status(admin + "/readyz") == 503
        released.set()
        assert await serve.ended() == 0


async def test_an_admin_port_in_use_is_one_clear_line(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with running("--dsn", database, "--port", "0", "--admin-port", str(port)) as serve:
            assert await serve.ended() == 1
            reported = await serve.complaint()
    assert reported.count("\n") == 1
    assert reported.endswith(f"port {port} of 127.0.0.1: it is in use. Choose another with --admin-port.\n")


async def test_the_admin_port_is_plain_http_even_if_the_other_port_asks_for_certificates(
    database: str, tmp_path: Path
) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "tls.pem"))
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ("--tls-cert", str(tmp_path / "tls.pem"), "--tls-client-ca", str(tmp_path / "ca.pem"))
    async with running("--dsn", database, "--port", "0", "--admin-port", "0", *tls) as serve:
        assert (await serve.listening()).startswith("https://")
        assert await status(await admin_of(serve) + "/readyz") == 200
