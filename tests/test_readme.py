"""The README is true: its program runs as it stands there. tests/docs checks its other blocks."""

import asyncio
import os
import sys
from pathlib import Path

from tests.support.pages import ROOT, blocks


async def test_first_program_runs_as_written_and_prints_what_it_says(tmp_path: Path) -> None:
    program, output = (
        block.text for block in blocks("README.md") if "order.created" in block.text and "curl" not in block.text
    )
    assert len(program.splitlines()) <= 20
    (tmp_path / "program.py").write_text(program)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "program.py",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert (out.decode(), err.decode(), process.returncode) == (output, "", 0)


def test_a_visitor_reads_it_in_two_minutes() -> None:
    text = [line for line in (ROOT / "README.md").read_text().splitlines() if not line.startswith("| ")]
    assert len(" ".join(text).split()) < 900


def test_its_table_is_the_one_of_the_last_comparison() -> None:
    table = _rows("README.md")
    assert len(table) == 11
    assert table == _rows("docs/compare.md")


def _rows(page: str) -> list[str]:
    """The lines of the first table of systems on a page: two of a head, and nine systems."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "one at a time" in line)
    return [line for line in lines[start:] if line.startswith("| ")][:11]
