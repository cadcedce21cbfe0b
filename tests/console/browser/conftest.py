"""The console in a browser: one world, one broker and one Chromium for each test process, a new page for each test.

Playwright's objects belong to the event loop in which they were made, so these fixtures and their tests share the
session's loop: a module of tests says so with `pytestmark`.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from pgbackend import Backend
from tests.console import world
from tests.console.browser import axe
from tests.console.browser.chromium import TIMEOUT, Watch, launched, opened
from tests.serve.support.process import running
from tests.support.backends import SOON
from tests.support.databases import new_database

expect.set_options(timeout=TIMEOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop(world.Shop):
    """The world, a broker that shows it, and a worker in this process, for the subscriptions of tests."""

    hostile: dict[str, int]
    """Positions of the hostile events, by the first word of their ids."""


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with launched() as running_browser:
        yield running_browser


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def axe_script() -> str:
    return axe.load()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shop(server: str, template: str) -> AsyncIterator[Shop]:
    async with new_database(server, template=template) as dsn:
        await world.populate(dsn)
        async with running("--dsn", dsn, "--port", "0") as serve:
            backend = Backend(dsn, **SOON)
            await backend.init()
            working = asyncio.create_task(backend.start(), name="the tests' worker")
            try:
                url = await serve.listening()
                yield Shop(dsn=dsn, url=f"{url}console/", backend=backend, hostile=await world.find_hostile(dsn))
            finally:
                await backend.stop()
                await working


@pytest_asyncio.fixture(loop_scope="session")
async def tab(browser: Browser, shop: Shop) -> AsyncIterator[tuple[Page, Watch]]:
    async with opened(browser, shop.url) as (page, watch):
        yield page, watch


@pytest_asyncio.fixture(loop_scope="session")
async def page(tab: tuple[Page, Watch]) -> Page:
    """A page that nothing is loaded into. The test fails at its end if the browser complained."""
    return tab[0]


@pytest_asyncio.fixture(loop_scope="session")
async def watch(tab: tuple[Page, Watch]) -> Watch:
    """The watch of `page`."""
    return tab[1]
