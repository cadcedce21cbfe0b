"""The site builds without a warning, leads nowhere that does not exist, and asks no other host for anything."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urlsplit

import click
import pytest
import yaml

import pgbackend
from pgbackend.cli import main
from tests.support.pages import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
MADE_BY_HOOKS = {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"}
"""Pages whose files are outside docs/."""


@dataclass
class Page(HTMLParser):
    """The anchors, links and assets of a built page."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe", "source", "video") and "src" in given:
            self.assets.append(given["src"])
        elif tag == "link" and "href" in given:
            self.assets.append(given["href"])


def _nav(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        match entry:
            case str():
                yield entry
            case dict():
                for below in entry.values():
                    yield from _nav(below if isinstance(below, list) else [below])


def test_the_navigation_has_every_page_and_no_other() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    named = list(_nav(CONFIG["nav"]))
    assert set(named) == pages | MADE_BY_HOOKS
    assert len(named) == len(set(named))


def test_the_api_page_names_everything_public() -> None:
    page = (ROOT / "docs/api.md").read_text()
    documented = re.findall(r"^::: pgbackend\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == sorted(pgbackend.__all__)


@pytest.mark.slow
def test_the_site_is_whole_and_asks_no_other_host(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    # 404.html links from the root of a server, because it stands for any address.
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}

    assert [asset for page in pages.values() for asset in page.assets if urlsplit(asset).netloc] == []
    assert [
        style for style in site.rglob("*.css") if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text())
    ] == []
    broken = [f"{page.path.name}: {link}" for page in pages.values() for link in _broken(page, pages)]
    assert broken == []

    assert all(
        'class="mermaid"' not in page.path.read_text() for page in pages.values()
    )  # it would be loaded from a host
    assert "hole_wait" in (site / "search/search_index.js").read_text()
    api = pages[site / "api.html"].ids
    classes = {name for name in pgbackend.__all__ if not isinstance(getattr(pgbackend, name), ModuleType)}
    assert {f"pgbackend.{name}" for name in classes} <= api
    assert {
        "pgbackend.Backend.produce",
        "pgbackend.filters.CESQL",
        "pgbackend.outbox.produce",
        "pgbackend.doctor.examine",
    } <= api
    settings = (site / "settings.html").read_text()
    assert all(
        f"pgbackend {name}" in settings for name in main.list_commands(click.Context(main)) if name != "subscriptions"
    )


def _broken(page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """The links and assets of the page that lead to no file, or to no anchor of their page."""
    for link in [*page.links, *page.assets]:
        target, anchor = urldefrag(link)
        if urlsplit(link).scheme or urlsplit(link).netloc:
            continue
        path = (page.path.parent / unquote(urlsplit(target).path)).resolve() if target else page.path
        if path.is_dir():
            path /= "index.html"
        if not path.is_file() or (anchor and path in pages and unquote(anchor) not in pages[path].ids):
            yield link
