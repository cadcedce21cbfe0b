"""Debian's Chromium without a screen, driven by Playwright, and pages that say what went wrong in them.

A `Watch` keeps every complaint of a browser context: errors and warnings on the console, exceptions, violations of the
content security policy, failed requests, dialogs, popups, and requests to other hosts than the console's. The promise:
`Watch.check` raises for each that the test did not expect.
"""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    Response,
    WebError,
    async_playwright,
)

TIMEOUT = 15_000
"""Milliseconds that an expectation waits. Pages answer in tenths of a second; test machines may be busy."""

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}

# Requests that the browser makes by itself find no host, so a test needs no network.
_ARGUMENTS = (
    "--no-sandbox",  # Chromium refuses to run as root with it
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


def find_chromium() -> str | None:
    """The path of the program; None when it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """A browser. Skips the test where Chromium is not installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("chromium not found: install it (Debian: apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


class Watch:
    """What went wrong in a browser context so far."""

    def __init__(self, context: BrowserContext, *, host: str) -> None:
        self._host = host
        self.complaints: list[str] = []
        self._expected: list[re.Pattern[str]] = []
        self.requests: list[Request] = []
        context.on("console", self._hear)
        context.on("weberror", self._note_exception)
        context.on("request", self._note_request)
        context.on("requestfailed", self._note_failure)
        context.on("response", self._note_response)
        context.on("dialog", self._dismiss)
        context.on("page", self._note_page)

    def expect(self, pattern: str) -> None:
        """Complaints that match are part of the test."""
        self._expected.append(re.compile(pattern))

    def check(self) -> None:
        """Raises AssertionError, which lists every unexpected complaint."""
        found = [text for text in self.complaints if not any(pattern.search(text) for pattern in self._expected)]
        assert not found, "the browser complained:\n" + "\n".join(found)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            self.complaints.append(f"console {message.type}: {message.text} {message.location}")

    def _note_exception(self, error: WebError) -> None:
        self.complaints.append(f"exception: {error.error}")

    def _note_request(self, request: Request) -> None:
        self.requests.append(request)
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._host:
            self.complaints.append(f"request to another host: {request.url}")

    def _note_failure(self, request: Request) -> None:
        # A page that goes away, or loses interest, aborts its own requests.
        if request.failure != "net::ERR_ABORTED":
            self.complaints.append(f"request failed: {request.url}: {request.failure}")

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self.complaints.append(f"answer {response.status}: {response.url}")

    async def _dismiss(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    async def _note_page(self, page: Page) -> None:
        if await page.opener() is not None:
            self.complaints.append(f"popup: {page.url}")


# A violation that only a report would show is on the console, too.
_REPORT_VIOLATIONS = """
    document.addEventListener("securitypolicyviolation", event =>
        console.error(`policy violated: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
"""


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[tuple[Page, Watch]]:
    """A page in a context of its own, at the console's `url`, and its watch, which is checked at the end.

    `options` are Playwright's for a new context: `color_scheme`, `viewport`, `http_credentials`, and others.
    """
    context = await browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", "base_url": url, **options})
    context.set_default_timeout(TIMEOUT)
    watch = Watch(context, host=urlsplit(url).netloc)
    await context.add_init_script(_REPORT_VIOLATIONS)
    try:
        yield await context.new_page(), watch
    finally:
        await context.close()
    watch.check()
