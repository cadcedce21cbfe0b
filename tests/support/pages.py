"""The pages of the documentation, and the code blocks on them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_FENCE = re.compile(r'```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?$')
_INDENT = "    "


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A code block. An indented one has no language."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The code blocks of a page, such as `docs/broker.md`, in their order: all, or those in these languages."""
    return [block for block in _blocks(page) if not languages or block.language in languages]


def every_block() -> list[Block]:
    """The code blocks of all pages."""
    return [block for path in PAGES for block in _blocks(path.relative_to(ROOT).as_posix())]


def _blocks(page: str) -> Iterator[Block]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    end = 0
    while end < len(lines):
        begin, fence = end, _FENCE.match(lines[end])
        if fence is not None:
            end = lines.index("```", begin + 1) + 1
            text, language, title = "\n".join(lines[begin + 1 : end - 1]), fence["language"], fence["title"] or ""
        elif lines[begin].startswith(_INDENT) and not lines[begin - 1]:
            while end < len(lines) and (not lines[end] or lines[end].startswith(_INDENT)):
                end += 1
            text, language, title = dedent("\n".join(lines[begin:end])).strip(), "", ""
        else:
            end += 1
            continue
        yield Block(page=page, line=begin + 1, language=language, title=title, text=f"{text}\n")
