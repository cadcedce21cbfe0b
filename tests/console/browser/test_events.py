"""The live tail: new events appear by themselves, filters narrow it, and it can be paused and paged back."""

import json
import re
from itertools import count

import pytest
from playwright.async_api import Locator, Page, expect

from tests.console.browser.chromium import Watch
from tests.console.browser.conftest import Shop
from tests.console.browser.views import row, visit
from tests.support.databases import connected, query_value

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

SOON = 5_000
"""Milliseconds until a new event is on the page: it asks each second."""

_numbers = count(1)


@pytest.fixture
def type_() -> str:
    """A type that only one test's events have."""
    return f"com.example.tail.{next(_numbers)}"


def events_table(page: Page) -> Locator:
    return page.get_by_role("table", name="Events, newest first").locator("tbody").get_by_role("row")


async def produce(shop: Shop, type_: str, *ids: str, **members: object) -> None:
    """Events with these ids are in the log."""
    event = {"specversion": "1.0", "source": "/tail", "type": type_, "data": {"n": 1}, **members}
    await shop.backend.produce_many([json.dumps({**event, "id": id_}).encode() for id_ in ids])


async def test_a_new_event_appears_by_itself(page: Page, shop: Shop, type_: str) -> None:
    await visit(page, "#/events", "Events")
    await expect(events_table(page).first).to_be_visible()
    await produce(shop, type_, "new-1")
    await expect(events_table(page).first).to_contain_text("new-1", timeout=SOON)
    await expect(events_table(page).first).to_contain_text(type_)


async def test_each_filter_shows_only_what_matches_and_goes_on(page: Page, shop: Shop, type_: str) -> None:
    wanted = {"source": "/tail/wanted", "subject": "Größe/7", "data": {"note": f"a needle in {type_}, Größe/7"}}
    await produce(shop, type_, "wanted-0", **wanted)
    await produce(shop, f"com.example.other.{type_}", "other", source="/tail/other", subject="Größe/8")
    await visit(page, "#/events", "Events")
    await expect(events_table(page).first).to_contain_text("other")
    for number, (field, text) in enumerate(
        (
            ("Type", type_),
            ("Type", f"{type_}*"),
            ("Source", "/tail/wanted"),
            ("Source", "/tail/w*"),
            ("Subject", "Größe/7"),
            ("ID", "wanted-*"),
            ("Contains", f"NEEDLE in {type_}"),
            ("Contains", "größe/7"),
        ),
        1,
    ):
        await page.get_by_role("searchbox", name=field, exact=True).fill(text)
        await expect(events_table(page)).to_have_count(number)
        await expect(events_table(page).filter(has_text="other")).to_have_count(0)
        await produce(shop, type_, f"wanted-{number}", **wanted)
        await expect(events_table(page)).to_have_count(number + 1, timeout=SOON)
        await page.get_by_role("searchbox", name=field, exact=True).fill("")
        await expect(events_table(page).filter(has_text="other")).to_have_count(1)


async def test_an_address_with_filters_shows_what_they_say(page: Page, shop: Shop, type_: str) -> None:
    await produce(shop, type_, "linked")
    await visit(page, f"#/events?type={type_}", "Events")
    await expect(events_table(page)).to_have_count(1)
    await expect(page.get_by_role("searchbox", name="Type")).to_have_value(type_)
    await page.get_by_role("searchbox", name="Source").fill("/tail")
    await expect(page).to_have_url(re.compile(r"source=%2Ftail"))


async def test_pause_stops_the_tail_and_resume_catches_up(page: Page, watch: Watch, shop: Shop, type_: str) -> None:
    await page.clock.install()
    await visit(page, f"#/events?type={type_}", "Events")
    await produce(shop, type_, "before")
    await expect(events_table(page)).to_have_count(1, timeout=SOON)
    await page.get_by_role("button", name="Pause").click()
    await expect(page.get_by_text("paused", exact=True)).to_be_visible()

    await produce(shop, type_, "meanwhile-1", "meanwhile-2")
    asked = [one.url for one in watch.requests if "/api/events" in one.url]
    async with page.expect_response("**/api/overview"):
        await page.clock.fast_forward(60_000)
    assert [one.url for one in watch.requests if "/api/events" in one.url] == asked
    await expect(events_table(page)).to_have_count(1)

    await page.keyboard.press("Alt+p")
    await expect(events_table(page)).to_have_count(3, timeout=SOON)


async def test_a_late_commit_appears_in_its_place(page: Page, shop: Shop, type_: str) -> None:
    head = await query_value(shop.dsn, "SELECT max(position) FROM pgbackend.events")
    await visit(page, f"#/events?type={type_}", "Events")
    async with connected(shop.dsn) as late, late.transaction():
        await late.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('late', '/tail', $1)", type_)
        await produce(shop, type_, "early")
        await expect(events_table(page)).to_have_count(1, timeout=SOON)
    await expect(events_table(page)).to_have_count(2, timeout=15_000)
    await expect(events_table(page).nth(0)).to_contain_text("early")
    await expect(events_table(page).nth(1)).to_contain_text("late")
    await expect(row(page, str(head + 1))).to_be_visible()


async def test_older_events_are_paged_back_to(page: Page, shop: Shop) -> None:
    await visit(page, "#/events?type=com.example.order.created", "Events")
    await expect(events_table(page)).to_have_count(100)
    newest = await events_table(page).first.get_by_role("rowheader").inner_text()
    await page.get_by_role("button", name="Older events").click()
    await expect(events_table(page)).to_have_count(200)
    shown = [int(text) for text in await page.locator("tbody th").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) == 200

    await page.get_by_role("button", name="Back to live").click()
    await expect(events_table(page)).to_have_count(100)
    await expect(events_table(page).first.get_by_role("rowheader")).to_have_text(newest)


async def test_events_beyond_what_can_be_shown_are_counted(page: Page, shop: Shop, type_: str) -> None:
    await visit(page, "#/events", "Events")
    await expect(events_table(page).first).to_be_visible()
    await produce(shop, type_, *map(str, range(1_200)))
    await expect(page.get_by_text("events are not shown")).to_be_visible(timeout=SOON)
    assert await events_table(page).count() <= 502


async def test_an_event_of_the_tail_leads_to_its_page_and_back(page: Page, shop: Shop, type_: str) -> None:
    await produce(shop, type_, "followed")
    await visit(page, f"#/events?type={type_}", "Events")
    await events_table(page).first.get_by_role("link").click()
    await expect(page.get_by_role("cell", name="followed", exact=True)).to_be_visible()
    await page.go_back()
    await expect(events_table(page)).to_have_count(1)
