"""The console inside other applications, and what it costs and bears there."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from pgbackend import Backend
from pgbackend.console import app
from pgbackend.console.application import Console
from pgbackend.torture.proxy import Proxy
from tests.support.backends import produce
from tests.support.console import PAGE, served
from tests.support.databases import Sql
from tests.support.polling import eventually


async def teapot(_request: Request, _error: Exception) -> PlainTextResponse:
    return PlainTextResponse("the application's own", 418)


def in_starlette(console: Console) -> Any:
    return Starlette(
        routes=[Mount("/admin", routes=[Mount("/queue", console)]), Route("/", lambda _: PlainTextResponse("home"))],
        exception_handlers={404: teapot, LookupError: teapot, ValueError: teapot},
    )


def in_fastapi(console: Console) -> Any:
    application = FastAPI(exception_handlers={404: teapot, LookupError: teapot, ValueError: teapot})
    application.mount("/admin/queue", console)
    return application


@pytest.mark.parametrize("around", [in_starlette, in_fastapi])
class TestBelowAPath:
    async def test_it_answers_as_at_the_top(self, backend: Backend, around: Callable[[Console], Any]) -> None:
        await backend.subscribe("a/b", print)
        await produce(backend, "1")
        async with served(around(app(backend)), "/admin/queue/") as console:
            assert (await console.get("overview"))["log"]["head"] == "1"
            assert (await console.get("subscriptions/a%2Fb"))["subscription"]["name"] == "a/b"
            assert (await console.act("subscriptions/a%2Fb/pause", {}))["done"]

    async def test_its_errors_are_its_own(self, backend: Backend, around: Callable[[Console], Any]) -> None:
        async with served(around(app(backend)), "/admin/queue/") as console:
            assert (await console.ask("GET", "no/such/file")).detail
            assert (await console.ask("GET", "api/subscriptions/nope")).status == 404
            assert (await console.ask("GET", "api/events?limit=x")).status == 400
            assert (await console.ask("DELETE", "api/events")).status == 405
            assert (await console.ask("POST", "api/events", headers=PAGE)).headers["allow"] == "GET, HEAD"

    async def test_the_path_without_a_slash_leads_to_the_one_with_it(
        self, backend: Backend, around: Callable[[Console], Any]
    ) -> None:
        async with served(around(app(backend)), "/admin/queue") as console:
            answer = await console.ask("GET", "")
        assert answer.status == 307
        assert answer.headers["location"].endswith("queue/")


async def test_a_hanging_postgresql_makes_it_unavailable_for_a_moment(
    backend: Backend, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(app(backend)) as console:
        async with sql.transaction():
            await sql.execute("lock table pgbackend.subscriptions")
            with monkeypatch.context() as patch:
                patch.setattr("pgbackend.console.readings.PATIENCE", 0.3)
                answers = await asyncio.gather(*[console.ask("GET", "api/overview") for _ in range(5)])
            # What hangs holds up nothing else.
            assert (await console.ask("GET", "api/events")).status == 200

        assert [answer.status for answer in answers] == [503] * 5
        assert "PostgreSQL did not answer within 0.3 s" in answers[0].detail
        assert answers[0].headers["retry-after"] == "1"

        async def is_back() -> bool:
            return (await console.ask("GET", "api/overview")).status == 200

        await eventually("the console is back", is_back)


async def test_a_postgresql_that_is_away_is_found_again(database: str) -> None:
    async with Proxy(database) as proxy:
        backend = Backend(proxy.dsn)
        await backend.init()
        async with served(app(backend)) as console:
            proxy.cut()
            assert (await console.ask("GET", "api/overview")).status == 503
            proxy.restore()

            async def is_back() -> bool:
                return (await console.ask("GET", "api/overview")).status == 200

            await eventually("the console is back", is_back)
        await backend.stop()


async def test_readings_leave_connections_to_producers(
    backend: Backend, sql: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool has four connections; the console takes two of them, however many ask."""
    monkeypatch.setattr("pgbackend.console.readings.PATIENCE", 60.0)
    monkeypatch.setattr("pgbackend.console.readings._STATEMENT_TIMEOUT", "60s")
    async with served(app(backend)) as console:
        async with sql.transaction():
            await sql.execute("lock table pgbackend.offsets")
            asking = [asyncio.create_task(console.ask("GET", f"api/subscriptions/s{n}")) for n in range(10)]

            async def two_wait() -> bool:
                waiting = "select count(*) from pg_locks where not granted and relation = 'pgbackend.offsets'::regclass"
                return bool(await sql.fetchval(waiting) == 2)

            await eventually("two readings wait for the lock", two_wait)
            await produce(backend, "1", "2")
            assert not any(one.done() for one in asking)
        assert {(await one).status for one in asking} == {404}


@pytest.mark.slow
async def test_a_statement_ends_at_the_server_even_if_nobody_waits(backend: Backend, sql: Sql) -> None:
    async with served(app(backend)) as console:
        async with sql.transaction():
            await sql.execute("lock table pgbackend.dead_letters")
            answer = await console.ask("GET", "api/dead-letters")
        assert answer.status == 503
        active = await sql.fetchval(
            "select count(*) from pg_stat_activity where query like '%pgbackend:show_letters%' and state <> 'idle' "
            "and pid <> pg_backend_pid()"
        )
    assert active == 0
