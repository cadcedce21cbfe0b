"""Every page: what it shows, in both colour schemes, on a phone, and for people who use no mouse or no screen."""

import re

import pytest
from playwright.async_api import Browser, Page, expect

from tests.console import world
from tests.console.browser import axe
from tests.console.browser.chromium import PHONE, Watch, opened
from tests.console.browser.conftest import Shop
from tests.console.browser.views import ROUTES, dialog, figure, row, visit, visit_subscription
from tests.support.backends import status_of

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

FIRST_LOAD = 200_000
"""Bytes that the console may take before it shows figures, without compression."""

SCHEMES = {"light": None, "dark": "color-contrast"}
"""The colour schemes, and the only rule of axe that a scheme can break if the other one breaks none."""


async def load(page: Page, route: str) -> None:
    """Return once the page at this route shows its content."""
    await page.goto(f"./{route}")
    await expect(page.get_by_role("heading", level=1)).to_be_visible()
    await expect(page.get_by_text("Loading…")).to_have_count(0)


# ── accessibility ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_axe_finds_nothing_serious_on_any_page(
    browser: Browser, shop: Shop, axe_script: str, scheme: str
) -> None:
    async with opened(browser, shop.url, color_scheme=scheme) as (page, _):
        for route in ROUTES:
            await load(page, route)
            await axe.check(page, axe_script, only=SCHEMES[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_axe_finds_nothing_serious_in_open_dialogs(
    browser: Browser, shop: Shop, axe_script: str, scheme: str
) -> None:
    async with opened(browser, shop.url, color_scheme=scheme) as (page, _):
        for route, openers in (
            ("#/subscriptions/shipping", ("Pause…", "Retry all…", "Seek…", "Skip…")),
            ("#/subscriptions/crm-sync", ("Resume…",)),
            ("#/dead-letters?subscription=shipping", ("Redeliver all 5,850…", "Purge all 5,850…")),
        ):
            await load(page, route)
            for opener in openers:
                await page.get_by_role("button").filter(has_text=opener).first.click()
                await expect(dialog(page)).to_be_visible()
                await expect(dialog(page).get_by_text("Counting…")).to_have_count(0)
                await axe.check(page, axe_script, only=SCHEMES[scheme])
                await dialog(page).get_by_role("button", name="Cancel").click()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_axe_finds_nothing_serious_on_a_phone(browser: Browser, shop: Shop, axe_script: str, scheme: str) -> None:
    async with opened(browser, shop.url, color_scheme=scheme, viewport=PHONE, has_touch=True) as (page, _):
        for route in ("#/", "#/subscriptions/shipping"):
            await load(page, route)
            await axe.check(page, axe_script, only=SCHEMES[scheme])


async def test_each_page_has_a_title_one_heading_and_its_place_in_the_navigation(page: Page) -> None:
    for route, title, place in (
        ("#/", "Overview", "Overview"),
        ("#/subscriptions/shipping", "shipping", "Overview"),
        ("#/events", "Events", "Events"),
        ("#/dead-letters", "Dead letters", "Dead letters"),
        ("#/workers", "Workers", "Workers"),
    ):
        await visit(page, route, title)
        await expect(page).to_have_title(f"{title} · pgbackend console")
        await expect(page.locator("nav [aria-current=page]")).to_contain_text(place)
        await expect(page.locator("html")).to_have_attribute("lang", "en")


async def test_the_focus_moves_to_the_heading_of_a_new_page(page: Page) -> None:
    await visit(page, "#/", "Overview")
    await page.get_by_role("link", name="Workers").click()
    await expect(page.get_by_role("heading", level=1, name="Workers")).to_be_focused()


async def test_a_table_is_sorted_by_its_headers_and_says_so(page: Page) -> None:
    await visit(page, "#/", "Overview")
    header = page.get_by_role("columnheader", name="Dead letters")
    await header.get_by_role("button").click()
    await expect(header).to_have_attribute("aria-sort", "descending")
    await expect(page.locator("tbody").get_by_role("rowheader").first).to_have_text("shipping")
    await header.get_by_role("button").click()
    await expect(header).to_have_attribute("aria-sort", "ascending")


async def test_a_chart_has_a_summary_and_a_table(page: Page) -> None:
    await visit(page, "#/", "Overview")
    chart = page.get_by_role("figure", name="Events a second")
    await expect(chart.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"events in that hour"))
    await chart.get_by_role("button", name="Show as table").click()
    rows = chart.get_by_role("table").get_by_role("row")
    await expect(rows.nth(60)).to_be_attached()


# ── by keyboard alone ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _tab_to(page: Page, text: str, *, most: int = 60) -> None:
    """Press Tab until the focused element has this text or label. The focus is always to be seen."""
    for _ in range(most):
        await page.keyboard.press("Tab")
        focused = page.locator(":focus")
        if not await focused.count():
            continue
        found: dict[str, str] = await focused.evaluate(
            """element => {
                const style = getComputedStyle(element);
                return {
                    text: element.getAttribute("aria-label") ?? element.innerText ?? "",
                    outline: style.outlineStyle, width: style.outlineWidth, shadow: style.boxShadow,
                };
            }"""
        )
        is_seen = (found["outline"] != "none" and found["width"] != "0px") or found["shadow"] != "none"
        assert is_seen, f"the focus cannot be seen on {found}"
        if found["text"].strip() == text:
            return
    raise AssertionError(f"{most} times Tab do not lead to {text!r}")


async def test_a_subscription_is_found_paused_and_resumed_without_a_mouse(page: Page, shop: Shop) -> None:
    name = "tenant-077.orders"
    await visit(page, "#/", "Overview")
    await _tab_to(page, "Filter by name")
    await page.keyboard.type(name)
    await _tab_to(page, name, most=30)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1, name=name)).to_be_focused()

    for verb in ("Pause", "Resume"):
        await _tab_to(page, f"{verb}…")
        await page.keyboard.press("Enter")
        await expect(dialog(page)).to_be_visible()
        await _tab_to(page, f"{verb} {name}", most=5)
        await page.keyboard.press("Enter")
        await expect(dialog(page)).to_have_count(0)
        is_paused = (await status_of(shop.backend, name)).paused is not None
        assert is_paused == (verb == "Pause")
        await expect(page.get_by_role("heading", level=1, name=name)).to_be_visible()


async def test_the_focus_stays_in_a_dialog_and_returns_to_its_button(page: Page) -> None:
    await visit_subscription(page, "shipping")
    button = page.get_by_role("button", name="Pause…")
    await button.focus()
    await page.keyboard.press("Enter")
    await expect(dialog(page)).to_be_visible()
    for _ in range(12):
        await page.keyboard.press("Tab")
        assert await page.evaluate(
            "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
        )
    await page.keyboard.press("Escape")
    await expect(dialog(page)).to_have_count(0)
    await expect(button).to_be_focused()


async def test_a_link_leads_past_the_navigation(page: Page) -> None:
    await visit(page, "#/", "Overview")
    await _tab_to(page, "Skip to content", most=2)
    await page.keyboard.press("Enter")
    assert await page.evaluate("document.activeElement.id") == "main"


# ── phones, and many rows ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [360, 768, 1280])
async def test_no_page_is_wider_than_its_window(browser: Browser, shop: Shop, width: int) -> None:
    # A page that is too wide is so on a phone first.
    hostile = [f"#/events/{position}" for position in shop.hostile.values()] if width == PHONE["width"] else []
    names = [f"#/subscriptions/{one.name}" for one in world.HOSTILE_SUBSCRIPTIONS[4:6]]
    async with opened(browser, shop.url, viewport={"width": width, "height": 740}) as (page, _):
        for route in [*ROUTES, *names, *hostile]:
            await load(page, route)
            wide, window = await page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert wide <= window, f"{route} is {wide} px wide in a window of {window}"


async def test_a_dialog_fits_on_a_phone(browser: Browser, shop: Shop) -> None:
    async with opened(browser, shop.url, viewport=PHONE, has_touch=True) as (page, _):
        await visit_subscription(page, "shipping")
        await page.get_by_role("button", name="Seek…").tap()
        await expect(dialog(page)).to_be_visible()
        box = await dialog(page).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        await dialog(page).get_by_role("button", name="Seek shipping").scroll_into_view_if_needed()
        await expect(dialog(page).get_by_role("button", name="Seek shipping")).to_be_in_viewport()


async def test_two_hundred_subscriptions_are_filtered_by_name_and_by_state(page: Page) -> None:
    await visit(page, "#/", "Overview")
    rows = page.get_by_role("table", name="Subscriptions").locator("tbody").get_by_role("row")
    await expect(rows).to_have_count(world.SUBSCRIPTIONS)

    await page.get_by_role("searchbox", name="Filter by name").fill("tenant-1")
    named = [one for one in world.subscriptions() if "tenant-1" in one.name]
    await expect(rows).to_have_count(len(named))
    paused = [one for one in named if one.paused_by]
    await page.get_by_role("button", name=re.compile("^Paused")).click()
    await expect(rows).to_have_count(len(paused))

    await page.get_by_role("searchbox", name="Filter by name").fill("no such subscription")
    await page.get_by_role("button", name=f"Show all {world.SUBSCRIPTIONS}").click()
    await expect(rows).to_have_count(world.SUBSCRIPTIONS)


async def test_ten_thousand_dead_letters_are_grouped_and_paged(page: Page) -> None:
    await visit(page, "#/dead-letters", "Dead letters")
    await expect(page.get_by_text(f"10,000 dead letters in {len(world.GROUPS)} groups")).to_be_visible()
    await page.get_by_role("link", name=re.compile("no label for order")).click()
    await expect(page.get_by_text("Letters 1 to 100 of 4,120")).to_be_visible()
    first = await page.locator("tbody").get_by_role("rowheader").first.inner_text()

    await page.get_by_role("button", name="Next").click()
    await expect(page.get_by_text("Letters 101 to 200 of 4,120")).to_be_visible()
    await expect(page.locator("tbody").get_by_role("row")).to_have_count(100)
    await page.get_by_role("button", name="Previous").click()
    await expect(page.locator("tbody").get_by_role("rowheader").first).to_have_text(first)


# ── what the pages show ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_overview_shows_the_log_as_it_is(page: Page, shop: Shop) -> None:
    status = await shop.backend.status()
    await visit(page, "#/", "Overview")
    await expect(figure(page, "Head")).to_have_text(f"{status.head:,}")
    await expect(figure(page, "Retention")).to_have_text(str(status.retention))
    await expect(row(page, "billing")).to_contain_text("web-1:412")
    await expect(row(page, "billing")).to_contain_text("1,204")
    await expect(row(page, "migration-2026-10")).to_contain_text("complete")


async def test_a_subscription_shows_state_owners_errors_and_lag(page: Page, shop: Shop) -> None:
    status = await status_of(shop.backend, "crm-sync")
    await visit_subscription(page, "crm-sync")
    await expect(figure(page, "Lag")).to_have_text(f"{status.lag:,}")
    await expect(page.get_by_text("the hook is gone")).to_be_visible()
    await expect(page.get_by_text("Paused by its dispatcher")).to_be_visible()
    await expect(page.get_by_text("jobs-1:1207").first).to_be_visible()

    await visit_subscription(page, "shipping")
    await expect(page.get_by_text("did not answer within 30 s").first).to_be_visible()
    await expect(figure(page, "Waiting")).to_have_text("37")
    table = page.get_by_role("table", name="Failed events that wait to be tried again")
    await expect(table.locator("tbody").get_by_role("row")).to_have_count(37)


async def test_the_lag_chart_shows_what_is_left_of_each_minute(page: Page, shop: Shop) -> None:
    status = await status_of(shop.backend, "analytics")
    await visit_subscription(page, "analytics")
    chart = page.get_by_role("figure", name="Lag")
    await expect(chart).to_contain_text(f"{status.lag:,} events not settled now")
    await chart.get_by_role("button", name="Show as table").click()
    await expect(chart.get_by_role("table")).to_contain_text(f"{status.lag:,} events")


async def test_workers_are_shown_with_what_they_run_and_whether_they_live(page: Page) -> None:
    await visit(page, "#/workers", "Workers")
    table = page.get_by_role("table", name="Workers")
    for name in ("web-1:412", "web-2:388", "jobs-1:1207"):
        await expect(table.get_by_role("row").filter(has_text=name)).to_contain_text("alive")
    await expect(table.get_by_role("row").filter(has_text="jobs-2:990")).to_contain_text("gone")
    await table.get_by_role("link", name="billing").click()
    await expect(page.get_by_role("heading", level=1, name="billing")).to_be_visible()


async def test_an_event_shows_what_became_of_it_in_each_subscription(page: Page, shop: Shop) -> None:
    [letter, *_] = [letter async for letter in shop.backend.dead_letters("billing")]
    assert letter.event.position is not None
    await visit(page, f"#/events/{letter.event.position}", f"Event {letter.event.position}")
    outcome = page.locator(".outcome").filter(has=page.get_by_role("heading", name="billing"))
    await expect(outcome).to_contain_text("dead letter")
    steps = outcome.get_by_role("listitem")
    assert [text.splitlines()[0].partition(" ")[2] for text in await steps.all_inner_texts()] == [
        "recorded",
        *[f"attempt {number} failed" for number in range(1, 6)],
        "dead letter",
    ]
    await expect(steps.nth(5)).to_contain_text("CardDeclined")
    await expect(page.get_by_text(letter.event.id, exact=True)).to_be_visible()


async def test_the_first_load_is_small(page: Page, watch: Watch) -> None:
    await visit(page, "#/", "Overview")
    await expect(page.get_by_role("table", name="Subscriptions")).to_be_visible()
    sizes = {
        request.url: len(await response.body())
        for request in list(watch.requests)
        if "/api/" not in request.url and (response := await request.response()) is not None
    }
    assert sum(sizes.values()) < FIRST_LOAD, sizes
