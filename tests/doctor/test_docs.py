"""docs/doctor.md explains what the doctor finds, and a test makes each condition."""

import ast
import re
from pathlib import Path

import pgbackend
from tests.support.pages import ROOT

PACKAGE = Path(pgbackend.__file__).parent / "doctor"
PAGE = ROOT / "docs" / "doctor.md"


def checks() -> set[str]:
    """The names of all checks, as the source has them."""
    return {
        str(node.value.value)
        for path in PACKAGE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "check" and isinstance(node.value, ast.Constant)
    }


def test_each_check_has_its_heading_and_each_heading_its_check() -> None:
    assert set(re.findall(r"^### (.+)$", PAGE.read_text(), re.MULTILINE)) == checks()


def test_each_check_has_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {name for name in checks() if f'"{name}' not in tests} == set()
