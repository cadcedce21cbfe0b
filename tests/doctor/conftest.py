"""Examinations of logs that tests have made ill."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from pgbackend.doctor import Finding, Limits, examine
from tests.cli.conftest import run

__all__ = ["run"]  # a fixture

NOW = Limits(
    appender_age=0.0, lock_wait=0.0, idle_age=0.0, query_age=0.0, slot_bytes=0, unrun_age=0.0, overdue=0.0, leftover=0.0
)
"""Conditions count at once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The owner makes a log ill, and ends sessions by their pid."""
    for item in items:
        if "tests/doctor/" in item.nodeid or "/doctor/" in str(item.path):
            item.add_marker(pytest.mark.owner)
            item.add_marker(pytest.mark.direct)


async def found(dsn: str, *, listen_dsn: str | None = None, schema: str = "pgbackend", **limits: Any) -> list[Finding]:
    """All findings but that the tests' server runs without fsync."""
    examination = await examine(dsn, listen_dsn=listen_dsn, schema=schema, limits=replace(NOW, **limits))
    return [one for one in examination.findings if one.subject != "setting fsync"]


def only(findings: Iterable[Finding], check: str) -> Finding:
    """The one finding of this check."""
    (one,) = [one for one in findings if one.check == check]
    return one
