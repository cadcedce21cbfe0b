"""Hooks of the documentation site: a link that works in the repository works in the site.

Pages of docs/ link to files of the repository, such as `../examples/webhooks.py`. Each of these files becomes a page
that shows it, and each directory a page that lists it. README.md is the home page; CHANGELOG.md and CONTRIBUTING.md are
pages, too. A link to nothing stays as it is, and `mkdocs build --strict` refuses it.

The options of the command line are listed where docs/settings.md has a comment for them.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # MkDocs loads hooks by path, without their directory

from mkdocs_options import tables  # noqa: E402 - needs the path

_PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""The pages outside docs/, and their places in the site."""
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")
_OPTIONS = re.compile(r"<!-- The site has tables of all options here.*?-->")
_LANGUAGES = {".js": "javascript", ".py": "python", ".sql": "sql", ".yaml": "yaml"}


def on_config(config: MkDocsConfig) -> None:
    """Headings have the anchors that code hosts give them. Examples of docstrings are code."""
    config.mdx_configs["toc"]["slugify"] = _anchor
    config.markdown_extensions.append(_Examples())  # type: ignore[arg-type] # Python-Markdown takes objects, too


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Every file that a page links to has a place in the site."""
    for path, place in _PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = {target for page in files.documentation_pages() for target in _targets(page)}
    linked |= {below for target in linked for below in _below(target)}
    for path in sorted(linked):
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), content=_shown(path)))


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Links lead to the places of their targets."""
    if page.file.src_uri.startswith("repository/"):
        return markdown

    def placed(link: re.Match[str]) -> str:
        path = _resolved(link[1], page.file)
        return relpath(_place(path), dirname(page.file.src_uri) or ".") if (ROOT / path).exists() else link[1]

    parts = _FENCED.split(_OPTIONS.sub(lambda _: tables(), markdown))
    return "".join(part if part.startswith("```") else _LINK.sub(placed, part) for part in parts)


def _anchor(title: str, separator: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", separator)


def _targets(page: File) -> Iterator[str]:
    """The files and directories of the repository that the page links to."""
    for link in _LINK.findall(_FENCED.sub("", page.content_string)):
        path = _resolved(link, page)
        if (ROOT / path).exists():
            yield path


def _resolved(link: str, page: File) -> str:
    """The path in the repository that the link of this page leads to."""
    homes = {place: path for path, place in _PAGES.items()}
    return normpath(join(dirname(homes.get(page.src_uri, f"docs/{page.src_uri}")), link))


def _place(path: str) -> str:
    """The place in the site of a path in the repository."""
    if path in _PAGES:
        return _PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}/index.md" if (ROOT / path).is_dir() else f"repository/{path}.md"


def _below(path: str) -> list[str]:
    """The files of a directory; of a file, nothing."""
    return sorted(
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / path).rglob("*")
        if file.is_file() and not {"__pycache__", "node_modules"} & set(file.parts)
    )


def _shown(path: str) -> str:
    """A page that shows the file, or lists the directory. The search leaves it out."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    if (ROOT / path).is_dir():
        places = {below: relpath(_place(below), dirname(_place(path))) for below in _below(path)}
        return head + "\n".join(f"- [{below}]({place})" for below, place in places.items())
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"{head}~~~~~~{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text.rstrip()}\n~~~~~~\n"


class _Examples(Extension):
    """Lines from `>>>` to the next empty one are code. Markdown takes them for quotations."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Python-Markdown's name
        md.preprocessors.register(_ExampleLines(md), "examples", 28)  # after the lines are clean, before fences


class _ExampleLines(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        fenced: list[str] = []
        is_example = False
        for line in [*lines, ""]:
            if line.startswith(">>> ") and not is_example:
                fenced.append("```pycon")
                is_example = True
            elif is_example and not line.strip():
                fenced.append("```")
                is_example = False
            fenced.append(line)
        return fenced[:-1]
