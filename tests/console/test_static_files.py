"""The console's page: small, whole, without code in its HTML, and with nothing in it that its licences do not cover."""

import re
from html.parser import HTMLParser
from pathlib import Path
from posixpath import dirname, join, normpath

import pytest

import pgbackend

ROOT = Path(__file__).parents[2]
STATIC = Path(pgbackend.__file__).parent / "console" / "static"
VENDOR = STATIC / "vendor"
LOADED = sorted(path for path in STATIC.rglob("*") if path.suffix in {".html", ".css", ".js"})
OWN = [path for path in LOADED if VENDOR not in path.parents]
MOST_BYTES = 200_000

_IMPORT = re.compile(r'^import .* from "(\./[^"]+)";$', re.MULTILINE)
_PARSED_AS_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|\beval\b|new Function|setHTML"
)


class Tags(HTMLParser):
    """The tags of a document, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.code += data.strip()


def test_the_page_loads_in_less_than_200_kilobytes() -> None:
    assert sum(path.stat().st_size for path in LOADED) < MOST_BYTES


def test_the_html_has_no_code_and_loads_nothing_from_elsewhere() -> None:
    page = Tags((STATIC / "index.html").read_text())
    assert page.code == ""
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        source = attributes.get("src") or attributes.get("href") or ""
        assert source.startswith("data:image/") or source == "" or (STATIC / source).is_file(), source


@pytest.mark.parametrize("path", [path for path in OWN if path.suffix == ".js"], ids=lambda path: path.name)
def test_a_module_imports_what_there_is_and_makes_no_html_from_text(path: Path) -> None:
    text = path.read_text()
    for imported in _IMPORT.findall(text):
        assert (STATIC / normpath(join(dirname(path.relative_to(STATIC).as_posix()), imported))).is_file(), imported
    assert not _PARSED_AS_HTML.search(text)
    assert not re.search(r'\sstyle="', text)


@pytest.mark.parametrize("path", [path for path in OWN if path.suffix != ".html"], ids=lambda path: path.name)
def test_a_file_opens_with_its_job_and_names_no_other_host(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(("// ", "/* "))
    assert "://" not in text


def test_vendored_files_have_their_licences_and_a_line_in_the_list_of_dependencies() -> None:
    listed = (ROOT / "docs" / "dependencies.md").read_text()
    for library in ("htm", "preact", "uPlot"):
        assert "icense" in (VENDOR / f"{library}.LICENSE").read_text()[:200]
    for path in VENDOR.iterdir():
        assert f"`{path.name}`" in listed or path.suffix == ".LICENSE", path.name
    version = re.search(r"\(v(\d+\.\d+\.\d+)\)", (VENDOR / "uPlot.iife.min.js").read_text())
    assert version is not None
    assert f"uPlot {version[1]}" in listed
