"""docs/status.md explains each column, and the dashboards and the autoscaler in deploy/ ask for what exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgbackend import Backend
from pgbackend.cli.status_report import COLUMNS
from pgbackend.serve.operations.instruments import TRIGGER
from tests.serve.operations.test_metrics import everything
from tests.support.databases import Sql, connected
from tests.support.dispatchers import Catch

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "status.md").read_text()
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
VIEWS = ("log_status", "lag", "shard_lag", "holes", "appenders", "worker_status", "rates")


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    (text,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def test_each_column_of_the_command_is_explained_in_its_order() -> None:
    explained = re.findall(r"^\| ([A-Z ]+) \| \S", section("Each subscription"), re.MULTILINE)
    assert explained == [column.heading for column in COLUMNS]


async def test_each_column_of_each_view_is_explained_in_its_section(database: str) -> None:
    async with connected(database) as connection:
        for view in VIEWS:
            assert set(await columns(connection, view)) <= set(re.findall(r"`(\w+)`", section(view))), view


async def columns(connection: Sql, view: str) -> list[str]:
    query = await connection.prepare(f"SELECT * FROM pgbackend.{view}")
    return [column.name for column in query.get_attributes()]


async def test_each_query_on_the_page_runs(database: str) -> None:
    queries = re.findall(r"psql -c \"(.*?)\"", PAGE) + re.findall(r"^    (SELECT .*)$", PAGE, re.MULTILINE)
    assert len(queries) == 3
    async with connected(database) as connection:
        for query in queries:
            await connection.fetch(query)


def targets(dashboard: Path) -> list[dict[str, Any]]:
    """The queries of its panels."""
    return [target for panel in json.loads(dashboard.read_text())["panels"] for target in panel["targets"]]


def queries() -> list[str]:
    """The SQL of all panels, in the schema of the tests."""
    found = [target["rawSql"] for dashboard in DASHBOARDS for target in targets(dashboard) if "rawSql" in target]
    return [query.replace("${schema}", "pgbackend") for query in found]


async def test_each_query_of_the_dashboards_runs_on_a_log_in_use(database: str) -> None:
    assert len(queries()) >= 10
    async with Backend(database) as backend, connected(database) as connection:
        await backend.subscribe("billing", Catch())
        for query in queries():
            await connection.fetch(query)


async def test_the_dashboards_ask_for_metrics_and_labels_that_exist(database: str) -> None:
    samples = [sample for family in (await everything(database)).values() for sample in family.samples]
    asked = [target["expr"] for dashboard in DASHBOARDS for target in targets(dashboard) if "expr" in target]
    asked += [
        variable["query"]["query"]
        for dashboard in DASHBOARDS
        for variable in json.loads(dashboard.read_text())["templating"]["list"]
        if variable["type"] == "query"
    ]
    assert len(asked) >= 20
    names = set(re.findall(r"\b(?:pgbackend|messaging|process)_\w+", " ".join(asked))) - {TRIGGER}
    assert names <= {sample.name for sample in samples}
    labels = set(re.findall(r"(\w+)(?==~|!=|=\")", " ".join(asked)))
    # Prometheus adds the label of the job.
    assert labels - {"job"} <= {label for sample in samples for label in sample.labels}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_a_dashboard_can_be_imported_for_any_data_source(dashboard: Path) -> None:
    """Panels have a place each and their own number, and name the data source by the variable."""
    text = dashboard.read_text()
    board = json.loads(text)
    assert {"uid", "title", "schemaVersion", "panels", "templating"} <= board.keys()
    assert [one["type"] for one in board["templating"]["list"]].count("datasource") == 1
    assert set(re.findall(r'"uid": "([^"]+)"', text)) == {board["uid"], "${datasource}"}
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(numbers) == len(set(numbers))
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)), "two panels overlap"
    assert max(x for x, _ in taken) < 24


async def test_the_autoscaler_gets_one_number_whether_or_not_its_subscription_exists(database: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / "deploy" / "keda" / "scaledobject.yaml").read_text()))
    authentication, scaled = documents
    (trigger,) = scaled["spec"]["triggers"]
    assert trigger["type"] == "postgresql"
    assert trigger["authenticationRef"]["name"] == authentication["metadata"]["name"]
    assert float(trigger["metadata"]["targetQueryValue"]) > 0
    assert trigger["metadata"]["query"] in PAGE
    async with Backend(database) as backend, connected(database) as connection:
        assert [tuple(row) for row in await connection.fetch(trigger["metadata"]["query"])] == [(0,)]
        await backend.subscribe("billing", Catch(), start="earliest")
        await backend.unsubscribe("billing")
        await connection.execute("INSERT INTO pgbackend.events (id, source, type) VALUES ('1', '/s', 't')")
        assert [tuple(row) for row in await connection.fetch(trigger["metadata"]["query"])] == [(1,)]
