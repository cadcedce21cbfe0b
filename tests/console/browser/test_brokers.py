"""Brokers of other kinds: with credentials, with actions off, just started, and one whose PostgreSQL goes away."""

import json
import math
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, Error, HttpCredentials, expect

from pgbackend import Backend
from tests.console.browser.chromium import opened
from tests.console.browser.conftest import Shop
from tests.console.browser.sites import site
from tests.console.browser.views import ROUTES, figure, row, visit
from tests.serve.support.process import running
from tests.support.backends import produce, status_of
from tests.support.databases import query_value
from tests.support.ports import unasked_port
from tests.support.standby import Server

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

ME: HttpCredentials = {"username": "operator", "password": "hunter2"}


@asynccontextmanager
async def broker(dsn: str, console: Mapping[str, object] | None = None) -> AsyncIterator[str]:
    """The URL of the console of a broker with this `console` section."""
    config = json.dumps({"console": console or {}})
    async with running("--dsn", dsn, "--port", "0", "--config-inline", config) as serve:
        yield f"{await serve.listening()}console/"


@asynccontextmanager
async def own_server(programs: Path) -> AsyncIterator[Server]:
    """A PostgreSQL that a test may stop, in a directory that its user can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        async with Server(Path(directory) / "own", programs=programs) as server:
            yield server


async def test_a_broker_that_has_just_started_shows_the_last_hour(browser: Browser, shop: Shop) -> None:
    async with broker(shop.dsn) as url, opened(browser, url) as (page, _):
        await visit(page, "#/", "Overview")
        chart = page.get_by_role("figure", name="Events a second")
        # The burst was a quarter of an hour before this process began.
        most = await query_value(shop.dsn, "SELECT max(events_per_second) FROM pgbackend.rates")
        rate = "|".join(re.escape(f"{rounded(most * 10) / 10:g}") for rounded in (math.floor, math.ceil))
        await expect(chart).to_contain_text(re.compile(rf"At most ({rate}) in the last hour"))
        await chart.get_by_role("button", name="Show as table").click()
        await expect(chart.get_by_role("cell", name=re.compile(rf"^({rate}) events.s$"))).to_have_count(1)


async def test_credentials_open_the_console_and_nothing_else_does(browser: Browser, shop: Shop) -> None:
    console = {"user": ME["username"], "password": ME["password"]}
    async with broker(shop.dsn, console) as url:
        async with opened(browser, url) as (page, watch):
            watch.expect("401|INVALID_AUTH_CREDENTIALS")
            # Where a person would be asked for them.
            with pytest.raises(Error, match="INVALID_AUTH_CREDENTIALS"):
                await page.goto("./")
        async with opened(browser, url, http_credentials={**ME, "password": "guess"}) as (page, watch):
            # A page of plain text names no icon, so the browser looks for one at the broker's root.
            watch.expect("401|favicon.ico")
            answer = await page.goto("./")
            assert answer is not None
            assert answer.status == 401
            await expect(page.get_by_text("Give the user and the password of the console.")).to_be_visible()
        async with opened(browser, url, http_credentials=ME) as (page, watch):
            watch.expect("answer 401")  # the first request, before the browser knows that it must tell them
            await visit(page, "#/", "Overview")
            await expect(row(page, "billing")).to_be_visible()


async def test_without_actions_no_page_has_a_button_for_one_and_none_can_be_asked_for(
    browser: Browser, shop: Shop
) -> None:
    async with broker(shop.dsn, {"actions": False}) as url, opened(browser, url) as (page, watch):
        [letter, *_] = [letter async for letter in shop.backend.dead_letters("billing")]
        for route in [*ROUTES, f"#/dead-letters/{letter.group}", f"#/events/{letter.event.position}"]:
            await page.goto(f"./{route}")
            await expect(page.get_by_role("heading", level=1)).to_be_visible()
            await expect(page.get_by_text("Loading…")).to_have_count(0)
            buttons = await page.get_by_role("button").all_inner_texts()
            assert not [text for text in buttons if text.endswith("…")], f"{route}: {buttons}"
            await expect(page.get_by_role("checkbox")).to_have_count(0)

        watch.expect("403")
        status = await page.evaluate(
            """async () => (await fetch("api/subscriptions/billing/pause", {
                method: "POST", headers: {"Content-Type": "application/json", "X-Pgbackend-Console": "1"}, body: "{}",
            })).status"""
        )
        assert status == 403
        assert (await status_of(shop.backend, "billing")).paused is None


async def test_a_stopped_postgresql_is_shown_and_the_page_recovers_by_itself(
    browser: Browser, pg_programs: Path
) -> None:
    async with own_server(pg_programs) as server:
        backend = Backend(server.dsn)
        await backend.init()
        await produce(backend, "1", "2")
        async with broker(server.dsn) as url, opened(browser, url) as (page, watch):
            watch.expect("503")
            await visit(page, "#/", "Overview")
            await expect(figure(page, "Head")).to_have_text("2")

            await backend.stop()
            await server.stop()
            await expect(page.get_by_text("Not updated since")).to_be_visible()
            await expect(figure(page, "Head")).to_have_text("2")
            other = await page.context.new_page()
            await other.goto("./")
            await expect(other.get_by_role("heading", level=1)).to_have_text("The log cannot be read")

            await server.start()
            backend = Backend(server.dsn)
            await backend.init()
            await produce(backend, "3")
            await backend.stop()
            await expect(figure(page, "Head")).to_have_text("3")
            await expect(page.get_by_text("Not updated since")).to_have_count(0)
            await expect(figure(other, "Head")).to_have_text("3")


async def test_a_broker_that_ends_is_noticed_and_its_successor_too(browser: Browser, shop: Shop) -> None:
    arguments = ("--dsn", shop.dsn, "--port", str(unasked_port()))
    async with AsyncExitStack() as stack:
        async with running(*arguments) as first:
            url = f"{await first.listening()}console/"
            page, watch = await stack.enter_async_context(opened(browser, url))
            watch.expect("request failed|ERR_CONNECTION_REFUSED")
            await visit(page, "#/workers", "Workers")
        await expect(page.get_by_text("Not updated since")).to_be_visible()
        async with running(*arguments) as second:
            await second.listening()
            await expect(page.get_by_text("Not updated since")).to_have_count(0)


_ATTACK = """
    async url => {
        const outcome = request => request.then(answer => answer.type, error => error.name);
        const target = `${url}api/subscriptions/billing/pause`;
        const pause = (mode, headers) => fetch(target, {method: "POST", mode, headers, body: "{}"});
        return [
            await outcome(fetch(`${url}api/overview`)),
            await outcome(pause("cors", {"Content-Type": "application/json", "X-Pgbackend-Console": "1"})),
            await outcome(pause("no-cors", {"Content-Type": "text/plain"})),
        ];
    }"""


async def test_a_page_of_another_origin_can_neither_read_nor_steer(browser: Browser, shop: Shop) -> None:
    html = "<title>Any site that is open beside the console</title>"
    async with site(html) as other, opened(browser, other) as (page, watch):
        watch.expect("to another host|request failed|CORS|403|ERR_FAILED|NotSameOrigin")
        await page.goto("./")
        assert await page.evaluate(_ATTACK, shop.url) == ["TypeError"] * 3
    assert (await status_of(shop.backend, "billing")).paused is None
