"""What tests do on the console's pages: go to one, find a figure or a row, open a dialog."""

from playwright.async_api import Locator, Page, expect

ROUTES = (
    "#/",
    "#/subscriptions/shipping",
    "#/subscriptions/crm-sync",
    "#/events",
    "#/dead-letters",
    "#/dead-letters?subscription=shipping",
    "#/workers",
    "#/nothing-here",
)
"""Pages that every world has."""


async def visit(page: Page, route: str, title: str) -> None:
    """Return once the page at this route shows its title and its content."""
    await page.goto(f"./{route}")
    await expect(page.get_by_role("heading", level=1)).to_have_text(title)
    await expect(page.get_by_text("Loading…")).to_have_count(0)


async def visit_subscription(page: Page, name: str) -> None:
    await page.goto(f"./#/subscriptions/{name}")
    await expect(page.get_by_role("heading", level=1)).to_have_text(name)
    await expect(page.get_by_role("heading", name="Shards")).to_be_visible()


def figure(page: Page, name: str) -> Locator:
    """The value of a tile with this name."""
    tile = page.locator(".tile").filter(has=page.locator("dt", has_text=name))
    return tile.locator("dd").first


def row(page: Page, name: str) -> Locator:
    """The row of a table whose head is this name."""
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))


def dialog(page: Page) -> Locator:
    return page.get_by_role("dialog")


async def confirm(page: Page, *, says: str, button: str) -> None:
    """Press the button of the open dialog, which says whom it affects. Return once the dialog is closed."""
    await expect(dialog(page)).to_contain_text(says)
    await dialog(page).get_by_role("button", name=button, exact=True).click()
    await expect(dialog(page)).to_have_count(0)


async def said(page: Page, text: str) -> None:
    """Return once this result of an action is announced."""
    await expect(page.locator(".announcements")).to_contain_text(text)
