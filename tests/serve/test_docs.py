"""What docs/broker.md shows is what the broker takes."""

import re
from pathlib import Path

import pytest

from pgbackend.serve.config import load

TEXT = (Path(__file__).parents[2] / "docs" / "broker.md").read_text(encoding="utf-8")


def test_the_configuration_in_the_documentation_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INGEST_PASSWORD", "INGEST_TOKEN", "BILLING_AUTH"):
        monkeypatch.setenv(name, "secret")
    [shown] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    billing = load(shown, origin="docs/broker.md").triggers["billing"]
    assert billing.delivery_options.policy().waits() == (4.0, 8.0, 16.0, 32.0, 64.0)
