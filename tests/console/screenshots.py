"""Pictures of the console for its documentation: light, dark, and on a phone, of the world of `world`.

python -m tests.console.screenshots docs/console
"""

import argparse
import asyncio
from dataclasses import dataclass
from pathlib import Path

from playwright.async_api import Browser, Page, Route, expect

from tests.console import world
from tests.console.browser.chromium import PHONE, launched, opened
from tests.console.browser.views import dialog

WINDOW = {"width": 1180, "height": 800}
SERVER = "db.example:5432/shop"
"""What the pictures say in the place of a temporary directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A page, and what is done on it before its picture is taken."""

    name: str
    route: str
    scheme: str = "light"
    is_phone: bool = False
    opener: str | None = None
    """The button that opens a dialog."""
    position: str | None = None
    """The values to fill into the dialog."""


PICTURES = (
    Picture(name="overview-light", route="#/"),
    Picture(name="overview-phone", route="#/", is_phone=True),
    Picture(name="event-dark", route="#/events/{letter}", scheme="dark"),
    Picture(name="event-phone", route="#/events/{letter}", scheme="dark", is_phone=True),
    Picture(name="letters-light", route="#/dead-letters"),
    Picture(name="seek-dark", route="#/subscriptions/analytics", scheme="dark", opener="Seek…", position="4000"),
    Picture(name="subscription-light", route="#/subscriptions/shipping"),
)
"""Those that docs/console.md shows, and one more."""


async def take(browser: Browser, url: str, picture: Picture, *, letter: int, directory: Path) -> None:
    """The picture is in the directory, as a PNG of what a window shows."""
    options = {"viewport": PHONE, "device_scale_factor": 2} if picture.is_phone else {"viewport": WINDOW}
    async with opened(browser, url, color_scheme=picture.scheme, **options) as (page, _):
        await page.route("**/api/overview", _with_a_server)
        await page.goto(f"./{picture.route.format(letter=letter)}")
        await expect(page.get_by_text("Loading…")).to_have_count(0)
        if picture.opener:
            await page.get_by_role("button").filter(has_text=picture.opener).click()
            if picture.position:
                await dialog(page).get_by_role("textbox", name="Position").fill(picture.position)
            await expect(dialog(page).get_by_text("come again")).to_be_visible()
        await _settled(page)
        await page.screenshot(path=directory / f"{picture.name}.png", animations="disabled")


async def _with_a_server(route: Route) -> None:
    answer = await route.fetch()
    await route.fulfill(response=answer, json={**await answer.json(), "server": SERVER})


async def _settled(page: Page) -> None:
    """Charts have their history, and nothing has the focus."""
    await page.wait_for_load_state("networkidle")
    await page.evaluate("document.querySelector('dialog') ?? document.activeElement?.blur()")


async def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of the console.")
    parser.add_argument("directory", type=Path, help="where to put them")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    async with world.demonstration("--port", "0") as shop, launched() as browser:
        letter = await anext(aiter(shop.backend.dead_letters("billing")))
        for picture in PICTURES:
            await take(browser, shop.url, picture, letter=letter.event.position, directory=directory)


if __name__ == "__main__":
    asyncio.run(main())
