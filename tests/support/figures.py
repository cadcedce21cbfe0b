"""Figures that a test measured, for people: `pytest -rP` or `-s` shows them. No test depends on them."""

import sys


def report(text: str) -> None:
    """The figures are in the test's output."""
    sys.stdout.write(f"\n{text}\n")
