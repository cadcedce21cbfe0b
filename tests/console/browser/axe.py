"""axe-core, which finds what keeps people with disabilities from using a page."""

from pathlib import Path
from typing import Any

from playwright.async_api import Page

from tests.support.node import install

NODE = Path(__file__).parent / "node"
_SCRIPT = NODE / "node_modules" / "axe-core" / "axe.min.js"

# `preload` would fetch style sheets again.
_RUN = "options => axe.run(document, {resultTypes: ['violations'], preload: false, ...options})"


def load() -> str:
    """The script of axe-core, installed by the first test process that needs it."""
    install(NODE)
    return _SCRIPT.read_text()


async def check(page: Page, script: str, *, only: str | None = None) -> None:
    """Raises AssertionError for findings that axe calls serious or critical, each with its elements.

    All rules of axe run, best practices included, or `only` this one.
    """
    await page.evaluate(script)
    results: dict[str, Any] = await page.evaluate(_RUN, {} if only is None else {"runOnly": [only]})
    found = [
        f"{one['impact']} {one['id']}: {one['help']}\n    "
        + "\n    ".join(_describe(node) for node in one["nodes"][:5])
        for one in results["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert not found, f"{page.url}:\n" + "\n".join(found)


def _describe(node: dict[str, Any]) -> str:
    return f"{node['html'][:200]} {node.get('failureSummary', '')!r}"
