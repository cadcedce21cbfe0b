"""The docs name what exists: links, headings, paths and commands."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from pgbackend.cli import main
from tests.support.pages import PAGES, ROOT


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def expand(path: str) -> Iterator[str]:
    """The paths that a shell would make of `a/{b,c}.py`."""
    parts = [part.split(",") for part in re.split(r"[{}]", path)]
    return ("".join(chosen) for chosen in product(*parts))


def test_links_lead_to_files_and_headings_of_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        assert not anchor or anchor in headings(linked), target


def test_paths_in_the_text_exist(page: Path) -> None:
    roots = "pgbackend|tests|docs|migrations|benchmarks|examples|deploy"
    for path in re.findall(rf"`((?:{roots})/[\w/.{{}},*-]+)`", page.read_text()):
        for each in expand(path):
            assert list(ROOT.glob(each.rstrip("/"))), each


def test_commands_in_the_text_exist(page: Path) -> None:
    commands = main.list_commands(None)  # type: ignore[arg-type] # our group does not look at it
    for name in re.findall(r"`pgbackend ([a-z-]+)", page.read_text()):
        assert name in commands
