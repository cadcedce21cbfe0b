"""The examples in docs/broker.md are valid."""

import re
from pathlib import Path
from textwrap import indent

import pytest

from pgbackend.serve.config.load import load

TEXT = (Path(__file__).parents[2] / "docs" / "broker.md").read_text(encoding="utf-8")


def test_the_configuration_in_the_documentation_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INGEST_PASSWORD", "INGEST_TOKEN", "CONSOLE_PASSWORD", "BILLING_AUTH"):
        monkeypatch.setenv(name, "secret")
    shown, filters = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    billing = load(shown, origin="docs/broker.md").triggers["billing"]
    alone = load("triggers:\n  alone:\n" + indent(filters, "    "), origin="docs/broker.md").triggers["alone"]
    assert alone.predicate is not None
    assert billing.delivery_options.policy().waits() == (4.0, 8.0, 16.0, 32.0, 64.0)
