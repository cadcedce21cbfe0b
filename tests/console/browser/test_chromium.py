"""The kit itself: a page that misbehaves fails its test."""

import pytest
from playwright.async_api import Browser

from tests.console.browser import axe
from tests.console.browser.chromium import opened
from tests.console.browser.sites import site
from tests.support.polling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]


POLICY = "default-src 'self' 'unsafe-inline'"


async def visit(browser: Browser, url: str) -> None:
    """Raises AssertionError once the page has done something wrong."""
    async with opened(browser, url) as (page, watch):
        await page.goto("./", wait_until="networkidle")
        await eventually("a complaint", lambda: bool(watch.complaints))


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ("<script>console.error('broken')</script>", "console error: broken"),
        ("<script>console.warn('odd')</script>", "console warning: odd"),
        ("<script>throw new Error('thrown')</script>", "exception: .*thrown"),
        ("<script>Promise.reject(new Error('left alone'))</script>", "exception: .*left alone"),
        ("<script>alert('hello')</script>", "dialog: hello"),
        ("<script>open('/other')</script>", "popup"),
        ("<img src='http://elsewhere.example/pixel.png'>", "policy violated: img-src http://elsewhere.example"),
        ("<script>eval('1')</script>", "policy violated: script-src eval"),
        ("<script>fetch('/missing')</script>", "answer 404: .*/missing"),
    ],
)
async def test_what_a_page_does_wrong_fails_its_test(browser: Browser, html: str, complaint: str) -> None:
    async with site(f"<!doctype html><title>t</title>{html}", policy=POLICY) as url:
        with pytest.raises(AssertionError, match=complaint):
            await visit(browser, url)


async def test_a_request_to_another_host_fails_the_test(browser: Browser) -> None:
    async with site("<img src='http://elsewhere.example/pixel.png'>", policy="img-src *") as url:
        with pytest.raises(AssertionError, match=r"request to another host: http://elsewhere\.example/pixel\.png"):
            await visit(browser, url)


async def test_an_expected_complaint_fails_no_test(browser: Browser) -> None:
    async with site("<script>console.error('known'); document.title = 'done'</script>") as url:
        async with opened(browser, url) as (page, watch):
            watch.expect("console error: known")
            await page.goto("./")
        assert any("known" in text for text in watch.complaints)


DIM = """
    <html lang="en"><title>t</title>
    <style>@media (prefers-color-scheme: dark) { body { color: #555; background: #444; } }</style>
    <main><h1>Hard to read</h1></main></html>"""


@pytest.mark.parametrize("only", [None, "color-contrast"])
async def test_text_that_is_hard_to_read_in_one_scheme_is_found(
    browser: Browser, axe_script: str, only: str | None
) -> None:
    async with site(DIM) as url:
        async with opened(browser, url, color_scheme="light") as (page, _):
            await page.goto("./")
            await axe.check(page, axe_script, only=only)
        async with opened(browser, url, color_scheme="dark") as (page, _):
            await page.goto("./")
            with pytest.raises(AssertionError, match="color-contrast"):
                await axe.check(page, axe_script, only=only)
