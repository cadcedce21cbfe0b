"""Each action of the console: its dialog says how many events it affects, and the log shows what it did."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from pgbackend import DeadLetter, Event, Retry
from pgbackend.errors import Reject
from pgbackend.subscriptions.places import Place
from tests.console.browser.chromium import Watch, opened
from tests.console.browser.conftest import Shop
from tests.console.browser.views import confirm, dialog, figure, said, visit_subscription
from tests.support.backends import dead_letters, produce, settled, status_of
from tests.support.polling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

LATER = Retry(attempts=3, delay=3600.0)

_numbers = count(1)


class Handler:
    """A dispatcher that keeps the ids that it gets, and raises `error` if there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.ids: list[str] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self, event: Event) -> None:
        self.ids.append(event.id)
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def name() -> str:
    """The name of a subscription that no other test has."""
    return f"action-{next(_numbers)}"


@pytest.fixture
def ids(name: str) -> list[str]:
    """Ids of three events."""
    return [f"{name}-{letter}" for letter in "abc"]


@asynccontextmanager
async def subscribed(shop: Shop, name: str, handler: Handler, **options: Any) -> AsyncIterator[None]:
    """The subscription runs in this process, and is deleted at the end."""
    await shop.backend.subscribe(name, handler, **options)
    try:
        yield
    finally:
        handler.goes_on.set()
        await shop.backend.delete_subscription(name)


async def positions(shop: Shop, name: str) -> dict[str, int]:
    """The waiting events of a subscription: their positions by id."""
    return {str(one.id): one.position async for one in shop.backend.waiting(name)}


# ── subscriptions ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_pause_says_how_many_events_wait_and_nothing_more_is_dispatched(
    page: Page, shop: Shop, name: str, ids: list[str]
) -> None:
    handler = Handler()
    handler.goes_on.clear()
    async with subscribed(shop, name, handler):
        await produce(shop.backend, *ids)
        await visit_subscription(page, name)
        await expect(figure(page, "Lag")).to_have_text("3")

        await page.get_by_role("button", name="Pause…").click()
        await dialog(page).get_by_label("Reason").fill("counting stock")
        await confirm(page, says="3 events have not been settled and will wait.", button=f"Pause {name}")

        await said(page, "Paused.")
        await expect(page.get_by_text("counting stock")).to_be_visible()
        handler.goes_on.set()
        await settled(shop.backend, name)
        await produce(shop.backend, f"{name}-d")
        status = await status_of(shop.backend, name)
        assert status.paused is not None
        assert (status.paused.by, status.paused.reason, status.lag) == ("operator", "counting stock", 1)
        assert handler.ids == ids


async def test_resume_says_how_many_events_wait_and_they_are_dispatched(
    page: Page, shop: Shop, name: str, ids: list[str]
) -> None:
    handler = Handler()
    async with subscribed(shop, name, handler):
        await shop.backend.pause(name, reason="counting stock")
        await produce(shop.backend, *ids)
        await visit_subscription(page, name)
        await expect(figure(page, "Lag")).to_have_text("3")

        await page.get_by_role("button", name="Resume…").click()
        await expect(dialog(page)).to_contain_text("counting stock")
        await confirm(page, says="3 events wait to be dispatched.", button=f"Resume {name}")

        await said(page, "Resumed.")
        await settled(shop.backend, name)
        assert (await status_of(shop.backend, name)).paused is None
        assert handler.ids == ids
        await expect(page.get_by_role("button", name="Pause…")).to_be_visible()


async def test_retry_all_says_how_many_events_failed_and_tries_them_at_once(
    page: Page, shop: Shop, name: str, ids: list[str]
) -> None:
    handler = Handler(ValueError("no stock"))
    async with subscribed(shop, name, handler, retry=LATER):
        await produce(shop.backend, *ids)
        await eventually("three events failed", lambda: _have_failed(shop, name, 3))
        handler.error = None
        await visit_subscription(page, name)

        await page.get_by_role("button", name="Retry all…").click()
        await confirm(page, says="3 failed events that wait to be tried again", button="Retry 3 events")

        await settled(shop.backend, name)
        assert sorted(handler.ids) == sorted(ids * 2)
        await expect(figure(page, "Waiting")).to_have_text("0")


async def test_retry_of_one_event_leaves_the_others_waiting(page: Page, shop: Shop, name: str, ids: list[str]) -> None:
    handler = Handler(ValueError("no stock"))
    async with subscribed(shop, name, handler, retry=LATER):
        await produce(shop.backend, *ids)
        await eventually("three events failed", lambda: _have_failed(shop, name, 3))
        handler.error = None
        at = (await positions(shop, name))[ids[1]]
        await visit_subscription(page, name)

        await page.get_by_role("button", name=f"Retry event {at}").click()
        await confirm(page, says="1 failed event that waits to be tried again", button=f"Retry event {at}")

        await eventually("one event is settled", lambda: _have_failed(shop, name, 2))
        assert handler.ids[3:] == [ids[1]]


async def test_skip_makes_one_event_a_dead_letter(page: Page, shop: Shop, name: str, ids: list[str]) -> None:
    async with subscribed(shop, name, Handler(ValueError("no stock")), retry=LATER):
        await produce(shop.backend, *ids)
        await eventually("three events failed", lambda: _have_failed(shop, name, 3))
        at = (await positions(shop, name))[ids[0]]
        await visit_subscription(page, name)

        await page.get_by_role("button", name=f"Skip event {at}").click()
        await confirm(page, says=f"1 event is not dispatched to {name} any more.", button=f"Skip event {at}")

        await said(page, f"Skipped the event at position {at}")
        [letter] = await dead_letters(shop.backend, 1, name)
        assert letter.event.id == ids[0]
        assert sorted(await positions(shop, name)) == ids[1:]


# ── seek ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

BERLIN = "Europe/Berlin"
PLACES = ("earliest", "latest", "position", "time")


def choice(kind: str, *, head: int) -> tuple[Place, str]:
    """A place of this kind, and what is typed for it in a browser in Berlin, in winter."""
    if kind in ("earliest", "latest"):
        return kind, ""  # type: ignore[return-value]  # the two words
    if kind == "position":
        return head - 1234, str(head - 1234)
    time = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=30)
    return time, (time + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize("kind", PLACES)
async def test_seek_says_what_comes_again_and_what_is_skipped_and_moves_there(
    browser: Browser, shop: Shop, name: str, kind: str
) -> None:
    async with opened(browser, shop.url, timezone_id=BERLIN) as (page, _), subscribed(shop, name, Handler()):
        await shop.backend.unsubscribe(name)  # no worker runs it, so it stays where it is moved to
        head = (await shop.backend.status()).head
        await shop.backend.seek(name, head - 5000)
        place, typed = choice(kind, head=head)
        expected = await shop.backend.preview_seek(name, place)
        assert expected.again or expected.skipped
        await visit_subscription(page, name)

        await page.get_by_role("button", name="Seek…").click()
        await dialog(page).locator(f"input[type=radio][value={kind}]").check()
        if kind == "position":
            await dialog(page).get_by_role("textbox", name="Position").fill(typed)
        elif kind == "time":
            await dialog(page).get_by_label("Time", exact=True).fill(typed)
        comes = "event comes" if expected.again == 1 else "events come"
        are = "is" if expected.skipped == 1 else "are"
        says = f"{expected.again:,} {comes} again, {expected.skipped:,} {are} skipped."
        await confirm(page, says=says, button=f"Seek {name}")

        moved = await shop.backend.preview_seek(name, place)
        # A date lies between two positions: events before it that the offset has not passed are skipped later.
        assert (moved.position, moved.again, moved.skipped if kind != "time" else 0) == (expected.position, 0, 0)


async def test_seek_waits_for_a_place_that_can_be_read(page: Page, shop: Shop, name: str) -> None:
    async with subscribed(shop, name, Handler()):
        await visit_subscription(page, name)
        await page.get_by_role("button", name="Seek…").click()
        await dialog(page).locator("input[type=radio][value=position]").check()
        await dialog(page).get_by_role("textbox", name="Position").fill("twelve")
        await expect(dialog(page)).to_contain_text("Enter where it goes on.")
        await expect(dialog(page).get_by_role("button", name=f"Seek {name}")).to_be_disabled()


# ── dead letters ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def buried(shop: Shop, name: str, ids: list[str]) -> dict[str, DeadLetter]:
    """The letters by their events' ids, once all events are dead letters."""
    await produce(shop.backend, *ids)
    return {letter.event.id: letter for letter in await dead_letters(shop.backend, len(ids), name)}


@pytest.mark.parametrize("verb", ["Redeliver", "Purge"])
@pytest.mark.parametrize("chosen", ["letter", "selection", "group", "subscription"])
async def test_letters_are_counted_and_then_redelivered_or_purged(
    page: Page, shop: Shop, name: str, ids: list[str], verb: str, chosen: str
) -> None:
    handler = Handler(Reject(f"never {name}"))
    async with subscribed(shop, name, handler):
        letters = await buried(shop, name, ids)
        handler.error = None
        [group] = {letter.group for letter in letters.values()}
        affected = {"letter": ids[:1], "selection": ids[:2], "group": ids, "subscription": ids}[chosen]
        where = f"?subscription={name}" if chosen == "subscription" else f"/{group}"
        await page.goto(f"./#/dead-letters{where}")

        if chosen == "letter":
            await page.get_by_role("button", name=f"{verb} dead letter {letters[ids[0]].id}", exact=True).click()
        elif chosen == "selection":
            for id_ in affected:
                await page.get_by_role("checkbox", name=f"Select dead letter {letters[id_].id}", exact=True).check()
            await page.get_by_role("button", name=f"{verb} 2 selected…").click()
        else:
            await page.get_by_role("button", name=f"{verb} all 3…").click()
        counted = f"{len(affected)} dead letter{'' if len(affected) == 1 else 's'}"
        outcome = "will be dispatched again" if verb == "Redeliver" else "will be deleted for good"
        await confirm(page, says=f"{counted} {outcome}", button=f"{verb} {counted}")

        await said(page, counted)
        left = await dead_letters(shop.backend, len(ids) - len(affected), name)
        assert {letter.event.id for letter in left} == set(ids) - set(affected)
        assert sorted(handler.ids[len(ids) :]) == (sorted(affected) if verb == "Redeliver" else [])


async def test_a_group_is_purged_from_the_list_of_groups(page: Page, shop: Shop, name: str, ids: list[str]) -> None:
    async with subscribed(shop, name, Handler(Reject(f"never {name}"))):
        letters = await buried(shop, name, ids)
        [group] = {letter.group for letter in letters.values()}
        await page.goto(f"./#/dead-letters?subscription={name}")
        await page.get_by_role("button", name=f"Purge group {group}").click()
        await confirm(page, says="3 dead letters will be deleted for good", button="Purge 3 dead letters")
        await dead_letters(shop.backend, 0, name)
        await expect(page.get_by_text("No dead letters: no event was given up.")).to_be_visible()


# ── what changes nothing ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["Cancel", "Escape"])
async def test_a_dialog_that_is_cancelled_changes_nothing(
    page: Page, watch: Watch, shop: Shop, name: str, ids: list[str], way: str
) -> None:
    handler = Handler(ValueError("no stock"))
    async with subscribed(shop, name, handler, retry=LATER):
        await produce(shop.backend, *ids)
        await eventually("three events failed", lambda: _have_failed(shop, name, 3))
        at = sorted((await positions(shop, name)).values())
        await shop.backend.skip(name, at[0])
        [letter] = await dead_letters(shop.backend, 1, name)
        before = await status_of(shop.backend, name)

        await visit_subscription(page, name)
        openers = ["Pause…", "Retry all…", "Seek…", f"Retry event {at[1]}", f"Skip event {at[1]}"]
        for opener in openers:
            await _cancel(page, opener, way)
        await page.goto(f"./#/dead-letters/{letter.group}")
        for opener in ("Redeliver all 1…", "Purge all 1…", f"Redeliver dead letter {letter.id}"):
            await _cancel(page, opener, way)

        posts = [request.url for request in watch.requests if request.method == "POST"]
        assert all("/api/preview/" in url for url in posts), posts
        after = await status_of(shop.backend, name)
        assert (after.paused, after.lag, after.redeliveries, after.dead_letters) == (None, 0, 2, 1)
        assert [one.position for one in after.shards] == [one.position for one in before.shards]
        assert handler.ids == ids


async def _cancel(page: Page, opener: str, way: str) -> None:
    button = page.get_by_role("button", name=opener, exact=True)
    await button.click()
    await expect(dialog(page)).to_be_visible()
    if way == "Escape":
        await page.keyboard.press("Escape")
    else:
        await dialog(page).get_by_role("button", name="Cancel").click()
    await expect(dialog(page)).to_have_count(0)
    await expect(button).to_be_focused()


async def test_an_action_that_fails_says_why_in_its_dialog(page: Page, watch: Watch, shop: Shop, name: str) -> None:
    watch.expect(r"status of 404|answer 404")
    async with subscribed(shop, name, Handler()):
        await visit_subscription(page, name)
        await page.get_by_role("button", name="Pause…").click()
        await expect(dialog(page)).to_be_visible()
    await dialog(page).get_by_role("button", name=f"Pause {name}").click()
    await expect(dialog(page).get_by_role("alert")).to_contain_text(name)
    await expect(dialog(page).get_by_role("button", name=f"Pause {name}")).to_be_enabled()


async def _have_failed(shop: Shop, name: str, wanted: int) -> bool:
    status = await status_of(shop.backend, name)
    return status.redeliveries == wanted and not status.lag
