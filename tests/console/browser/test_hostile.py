"""Content that others wrote is shown, and does nothing: no script runs, no text is reordered, no number changes."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Locator, Page, expect

from tests.console import world
from tests.console.browser.chromium import Watch, opened
from tests.console.browser.conftest import Shop
from tests.console.browser.views import dialog, row, visit
from tests.support.backends import status_of

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

EVENTS = {event.id.split(" ")[0]: event for event in world.HOSTILE_EVENTS}
SHOWN = 262_144
"""The most bytes of an event's data that the console shows."""


async def event_page(page: Page, shop: Shop, name: str) -> None:
    position = shop.hostile[name]
    await visit(page, f"#/events/{position}", f"Event {position}")
    await expect(page.get_by_role("heading", name="Data", exact=True)).to_be_visible()


def shown_data(page: Page) -> Locator:
    return page.locator("pre.data")


async def is_harmless(page: Page) -> None:
    """Assert that no script of an event ran, and that no element came from its text."""
    assert await page.evaluate("window.__pwned") is None
    assert await page.evaluate("({}).polluted") is None
    found = await page.evaluate(
        """() => [...document.querySelectorAll("main :is(script, img, iframe, object, b), [onload], [onerror]")]
            .map(element => element.outerHTML)"""
    )
    assert found == []
    links = await page.evaluate("[...document.links].map(link => link.href)")
    assert all(link.startswith("http://127.0.0.1:") for link in links), links


@pytest_asyncio.fixture(loop_scope="session")
async def copying(browser: Browser, shop: Shop) -> AsyncIterator[Page]:
    """A page that may read the clipboard."""
    permissions = ["clipboard-read", "clipboard-write"]
    async with opened(browser, shop.url, permissions=permissions) as (page, _):
        yield page


async def copied(page: Page) -> str:
    text: str = await page.evaluate("navigator.clipboard.readText()")
    return text


async def test_hostile_events_are_shown_and_do_nothing(page: Page, watch: Watch, shop: Shop) -> None:
    for name, position in shop.hostile.items():
        await event_page(page, shop, name)
        await expect(page.get_by_role("cell", name=name).first).to_be_visible()
        await is_harmless(page)
        await expect(page).to_have_title(f"Event {position} · pgbackend console")
        watch.check()  # here, so that the failure names the event
    assert all(request.resource_type != "image" or request.url.startswith("data:") for request in watch.requests)


async def test_every_attribute_is_shown_as_the_text_that_it_is(page: Page, shop: Shop) -> None:
    event = EVENTS["every-attribute"]
    await event_page(page, shop, "every-attribute")
    table = page.get_by_role("table", name="Attributes")
    for attribute in ("id", "source", "type", "subject", "datacontenttype", "dataschema", "partitionkey"):
        named = page.get_by_role("rowheader", name=attribute, exact=True)
        await expect(table.get_by_role("row").filter(has=named)).to_contain_text(getattr(event, attribute))


async def test_pages_with_hostile_rows_do_nothing(page: Page) -> None:
    for route, title in (
        ("#/", "Overview"),
        ("#/events?type=*", "Events"),
        ("#/dead-letters", "Dead letters"),
        ("#/workers", "Workers"),
    ):
        await visit(page, route, title)
        await is_harmless(page)


async def test_an_override_of_direction_is_shown_as_a_marker(page: Page, shop: Shop) -> None:
    await event_page(page, shop, "bidi")
    shown = await page.locator("main").inner_text()
    assert "invoice⟨U+202E⟩fdp.exe⟨U+202C⟩" in shown
    assert not set(shown) & set("\u202e\u202c\u2066\u2067\u200f\u200b\ufeff")


async def test_control_characters_are_shown_as_markers(page: Page, shop: Shop) -> None:
    await event_page(page, shop, "control-characters")
    shown = await page.locator("main").inner_text()
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize("one", world.HOSTILE_SUBSCRIPTIONS, ids=lambda one: ascii(one.name)[:20])
async def test_a_subscription_with_a_hostile_name_is_found_and_can_be_steered(
    page: Page, shop: Shop, one: world.Subscription
) -> None:
    await visit(page, "#/", "Overview")
    await page.get_by_role("searchbox", name="Filter by name").fill(one.name)
    await page.get_by_role("table", name="Subscriptions").locator("tbody").get_by_role("link").first.click()
    await expect(page.get_by_role("heading", name="Shards")).to_be_visible()
    await is_harmless(page)
    title = await page.title()
    assert "\u202e" not in title
    assert len(title) <= 120

    was_paused = (await status_of(shop.backend, one.name)).paused is not None
    await page.get_by_role("button", name="Resume…" if was_paused else "Pause…").click()
    await is_harmless(page)
    await dialog(page).locator("button[type=submit]").click()
    await expect(dialog(page)).to_have_count(0)
    assert ((await status_of(shop.backend, one.name)).paused is None) == was_paused


async def test_a_hostile_error_is_shown_as_text(page: Page) -> None:
    await visit(page, "#/dead-letters?subscription=returns", "Dead letters")
    await page.get_by_role("link").filter(has_text="window.__pwned").click()
    await expect(page.get_by_text("Letters 1 to 96 of 96")).to_be_visible()
    await expect(page.locator("pre.error").first).to_contain_text(world.SCRIPT)
    await is_harmless(page)


async def test_numbers_that_javascript_cannot_hold_are_exact_and_copied_exactly(copying: Page, shop: Shop) -> None:
    data = EVENTS["numbers"].data.decode()
    await event_page(copying, shop, "numbers")
    shown = await shown_data(copying).inner_text()
    for number in (world.NUMBER, "9007199254740993", "1e-400", "-0.0", "1.00"):
        assert f" {number}" in shown
    assert "".join(shown.split()) == data

    await copying.get_by_role("heading", name="Data").locator("..").get_by_role("button", name="Copy").click()
    await expect(copying.locator(".announcements")).to_contain_text("copied")
    assert await copied(copying) == data
    await copying.get_by_role("button", name="Raw").click()
    assert await shown_data(copying).inner_text() == data


async def test_a_copied_attribute_has_its_hidden_characters(copying: Page, shop: Shop) -> None:
    await event_page(copying, shop, "bidi")
    await copying.get_by_role("button", name="Copy subject").click()
    await expect(copying.locator(".announcements")).to_contain_text("copied")
    assert await copied(copying) == world.OVERRIDE


async def test_copied_data_has_its_hidden_characters(copying: Page, shop: Shop) -> None:
    await event_page(copying, shop, "bidi")
    await copying.get_by_role("heading", name="Data").locator("..").get_by_role("button", name="Copy").click()
    await expect(copying.locator(".announcements")).to_contain_text("copied")
    assert await copied(copying) == EVENTS["bidi"].data.decode()


@pytest.mark.parametrize("name", ["invalid-utf-8", "one-mebibyte", "svg", "html", "binary"])
async def test_a_download_has_the_bytes_of_the_log(page: Page, shop: Shop, name: str) -> None:
    await event_page(page, shop, name)
    async with page.expect_download() as downloading:
        await page.get_by_role("link", name="Download").click()
    download = await downloading.value
    path = await download.path()
    assert path.read_bytes() == EVENTS[name].data
    assert download.suggested_filename.startswith(f"event-{shop.hostile[name]}")


async def test_a_large_event_is_cut_and_says_so(page: Page, shop: Shop) -> None:
    await event_page(page, shop, "one-mebibyte")
    await expect(page.get_by_text("The first 256 KiB of")).to_be_visible()
    shown = await shown_data(page).inner_text()
    assert len(shown) <= SHOWN * 1.1


async def test_json_that_is_too_deep_or_broken_is_shown_as_it_is(page: Page, shop: Shop) -> None:
    for name in ("deep", "not-json"):
        await event_page(page, shop, name)
        shown = await shown_data(page).inner_text()
        assert "".join(shown.split()) == "".join(EVENTS[name].data.decode().split())


async def test_an_event_is_found_by_hostile_text_and_patterns_mean_themselves(page: Page, shop: Shop) -> None:
    await visit(page, "#/events", "Events")
    rows = page.get_by_role("table", name="Events, newest first").locator("tbody").get_by_role("row")
    await page.get_by_role("searchbox", name="Contains").fill("<svg xmlns='http")
    await expect(rows).to_have_count(1)
    await expect(row(page, str(shop.hostile["svg"]))).to_be_visible()
    await page.get_by_role("searchbox", name="Contains").fill("%svg%")
    await expect(page.get_by_text("No event matches")).to_be_visible()
    await page.get_by_role("searchbox", name="Contains").fill("")
    await page.get_by_role("searchbox", name="ID").fill("numb_rs")
    await expect(page.get_by_text("No event matches")).to_be_visible()
