"""The text that Prometheus reads: names, formats, bounded labels, and the sums of several processes."""

import asyncio
import json
import logging
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from aiohttp import web
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import pgbackend
from pgbackend import Backend, facts
from pgbackend.codec.event import Event
from pgbackend.codec.wire import parse_structured
from pgbackend.facts import Recorder
from pgbackend.serve.operations.collectors import merge_ended
from pgbackend.serve.operations.instruments import CHANGES, TRIGGER
from pgbackend.serve.operations.metrics import Metrics
from pgbackend.torture.proxy import Proxy
from tests.serve.support.broker import HEADERS, serving
from tests.serve.support.target import Target
from tests.support.polling import eventually

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
DOCUMENTED = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    with Metrics() as open_metrics:
        yield open_metrics


async def scrape(metrics: Metrics) -> dict[str, Metric]:
    """Every metric family, by its name."""
    text, _ = await metrics.exposition(OPENMETRICS)
    return {family.name: family for family in parse_openmetrics(text.decode())}


async def value(metrics: Metrics, sample: str, **labels: str) -> float | None:
    """The sum of the samples with this name and these labels; None if there are none."""
    found = [
        one.value
        for family in (await scrape(metrics)).values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    ]
    return sum(found) if found else None


class TestCounting:
    async def test_events_and_the_time_of_their_commit_are_counted(self, metrics: Metrics) -> None:
        metrics.ingested(3, 0.004)
        metrics.ingested(1, 0.2)
        assert await value(metrics, "messaging_client_sent_messages_total", messaging_system="pgbackend") == 4
        name = "messaging_client_operation_duration_seconds"
        assert await value(metrics, f"{name}_count", messaging_operation_name="send") == 2
        assert await value(metrics, f"{name}_sum") == pytest.approx(0.204)
        assert await value(metrics, f"{name}_bucket", le="0.005") == 1
        assert await value(metrics, f"{name}_bucket", le="0.0025") == 0
        assert await value(metrics, f"{name}_bucket", le="0.25") == 2

    async def test_bucket_bounds_are_inclusive_and_the_last_bucket_has_none(self, metrics: Metrics) -> None:
        metrics.ingested(1, 0.005)
        metrics.ingested(1, 1e6)
        name = "messaging_client_operation_duration_seconds_bucket"
        assert await value(metrics, name, le="0.005") == 1
        assert await value(metrics, name, le="300.0") == 1
        assert await value(metrics, name, le="+Inf") == 2

    async def test_attempts_are_counted_by_trigger_and_outcome(self, metrics: Metrics) -> None:
        billing, audit = metrics.trigger("billing"), metrics.trigger("audit")
        billing.delivered(0.02)
        billing.failed(0.5, 503)
        billing.failed(0.5, 500)
        billing.failed(30, None)
        audit.delivered(0.02)
        attempts, seconds = "messaging_client_consumed_messages_total", "messaging_process_duration_seconds_count"
        for error, class_, count in (("", "", 1), ("503", "5xx", 2), ("no_response", "no_response", 1)):
            assert await value(metrics, attempts, **{TRIGGER: "billing", "error_type": error}) == 1
            assert await value(metrics, seconds, **{TRIGGER: "billing", "error_type": class_}) == count
        assert await value(metrics, attempts, **{TRIGGER: "audit"}) == 1

    async def test_replies_and_refused_requests_are_counted(self, metrics: Metrics) -> None:
        metrics.trigger("billing").replied(2)
        metrics.refused(413)
        metrics.refused(413)
        assert await value(metrics, "pgbackend_reply_events_total", **{TRIGGER: "billing"}) == 2
        assert await value(metrics, "pgbackend_ingest_refused_requests_total", http_response_status_code="413") == 2

    def test_a_trigger_has_one_metrics_object(self, metrics: Metrics) -> None:
        assert metrics.trigger("billing") is metrics.trigger("billing")

    async def test_a_trigger_begins_with_zeros(self, metrics: Metrics) -> None:
        metrics.trigger("billing")
        for name in ("messaging_client_consumed_messages_total", "pgbackend_retries_scheduled_total"):
            assert await value(metrics, name, **{TRIGGER: "billing"}) == 0

    async def test_a_forgotten_trigger_is_not_shown(self, metrics: Metrics) -> None:
        metrics.trigger("billing").delivered(0.1)
        metrics.trigger("audit").failed(0.1, 500)
        metrics.forget("billing")
        text, _ = await metrics.exposition(None)
        assert b"billing" not in text
        assert b"audit" in text

    async def test_two_brokers_in_one_process_count_separately(self, metrics: Metrics) -> None:
        metrics.ingested(1, 0.1)
        assert await value(Metrics(), "messaging_client_sent_messages_total") == 0


class TestFacts:
    @pytest.mark.parametrize(
        ("fact", "sample", "labels"),
        [
            ("event buried", "pgbackend_dead_lettered_events_total", {"destination": "table"}),
            ("event given up", "pgbackend_dead_lettered_events_total", {"destination": "url"}),
            ("retry scheduled", "pgbackend_retries_scheduled_total", {}),
            ("target is down", "pgbackend_target_down", {}),
            ("subscription paused", "pgbackend_subscription_paused", {}),
        ],
    )
    async def test_facts_change_metrics(self, fact: str, sample: str, labels: dict[str, str], metrics: Metrics) -> None:
        metrics.trigger("audit")
        facts.emit(fact, level=logging.DEBUG, subscription="billing")
        assert await value(metrics, sample, **labels, **{TRIGGER: "billing"}) == 1
        assert await value(metrics, sample, **labels, **{TRIGGER: "audit"}) == 0

    @pytest.mark.parametrize(
        ("trouble", "sample", "end"),
        [
            ("target is down", "pgbackend_target_down", "target is up"),
            ("target is down", "pgbackend_target_down", "subscription reconfigured"),
            ("target is down", "pgbackend_target_down", "lease lost"),
            ("subscription paused", "pgbackend_subscription_paused", "subscription resumed"),
        ],
    )
    async def test_down_and_paused_end_with_their_facts(
        self, trouble: str, sample: str, end: str, metrics: Metrics
    ) -> None:
        facts.emit(trouble, level=logging.DEBUG, subscription="billing")
        facts.emit(end, level=logging.DEBUG, subscription="billing")
        assert await value(metrics, sample, **{TRIGGER: "billing"}) == 0

    @pytest.mark.parametrize("fact", ["lease released", "lease lost", "subscription reconfigured"])
    async def test_a_pause_stays_with_the_subscription_not_with_its_shards(self, fact: str, metrics: Metrics) -> None:
        facts.emit("subscription paused", level=logging.DEBUG, subscription="billing")
        facts.emit(fact, level=logging.DEBUG, subscription="billing")
        assert await value(metrics, "pgbackend_subscription_paused", **{TRIGGER: "billing"}) == 1

    def test_each_fact_that_changes_a_metric_is_emitted_somewhere(self) -> None:
        sources = "".join(file.read_text() for file in Path(pgbackend.__file__).parent.rglob("*.py"))
        for fact in (*CHANGES, "trigger added"):
            # Here, and where it is emitted.
            assert sources.count(f'"{fact}"') >= 2, fact

    async def test_reloads_are_counted_and_the_last_one_is_shown(self, metrics: Metrics) -> None:
        when = "pgbackend_config_last_reload_success_timestamp_seconds"
        began = await value(metrics, when)
        assert began
        facts.emit("configuration refused", level=logging.DEBUG)
        assert await value(metrics, "pgbackend_config_reloads_total", outcome="refused") == 1
        assert await value(metrics, "pgbackend_config_last_reload_successful") == 0
        assert await value(metrics, when) == began
        facts.emit("configuration reloaded", level=logging.DEBUG)
        assert await value(metrics, "pgbackend_config_reloads_total", outcome="applied") == 1
        assert await value(metrics, "pgbackend_config_last_reload_successful") == 1
        assert (await value(metrics, when) or 0) > began

    async def test_a_trigger_without_a_target_is_shown_when_it_is_added(self, metrics: Metrics) -> None:
        facts.emit("trigger added", level=logging.DEBUG, trigger="archive")
        assert await value(metrics, "messaging_client_consumed_messages_total", **{TRIGGER: "archive"}) == 0

    async def test_facts_count_only_while_metrics_are_open(self) -> None:
        metrics = Metrics()
        facts.emit("event buried", level=logging.DEBUG, subscription="billing")
        with metrics:
            pass
        facts.emit("event buried", level=logging.DEBUG, subscription="billing")
        assert await value(metrics, "pgbackend_dead_lettered_events_total") is None


class TestLabels:
    async def test_labels_are_bounded_whatever_targets_answer(self, metrics: Metrics) -> None:
        billing = metrics.trigger("billing")
        for status in [*range(-5, 1200), 10**9]:
            billing.failed(0.1, status)
            metrics.refused(status)
        families = await scrape(metrics)
        errors = {one.labels["error_type"] for one in families["messaging_client_consumed_messages"].samples}
        assert len(errors) < 80
        assert errors >= {"", "503", "4xx", "_OTHER"}
        classes = {one.labels["error_type"] for one in families["messaging_process_duration_seconds"].samples}
        assert classes == {"", "1xx", "2xx", "3xx", "4xx", "5xx", "_OTHER"}
        assert len(families["pgbackend_ingest_refused_requests"].samples) < 80

    async def test_a_triggers_name_cannot_break_out_of_its_label(self, metrics: Metrics) -> None:
        name = 'a"} 1\nforged_total{x="\\'
        metrics.trigger(name).delivered(0.1)
        families = await scrape(metrics)
        assert "forged" not in families
        assert name in {one.labels[TRIGGER] for one in families["messaging_client_consumed_messages"].samples}


class TestExposition:
    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            (None, "text/plain; version=0.0.4"),
            ("", "text/plain; version=0.0.4"),
            ("*/*", "text/plain; version=0.0.4"),
            ("text/html", "text/plain; version=0.0.4"),
            ("text/plain;version=0.0.4", "text/plain; version=0.0.4"),
            ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0"),
            ("application/openmetrics-text;version=1.0.0;q=0.5", "application/openmetrics-text; version=1.0.0"),
            (PROMETHEUS_3, "application/openmetrics-text; version=1.0.0"),
            ("text/plain; version=\x00;;=,,;q", "text/plain; version=0.0.4"),
            ("application/openmetrics-text; version=x.y", "text/plain; version=0.0.4"),
            ("application/openmetrics-text; version=9.0.0", "text/plain; version=0.0.4"),
            ("application/openmetrics-text; q=0", "text/plain; version=0.0.4"),
            ("application/openmetrics-text; q=many", "text/plain; version=0.0.4"),
            ("application/openmetrics-text; q=0.5, text/plain; q=0.9", "text/plain; version=0.0.4"),
        ],
    )
    async def test_the_accept_header_decides_the_format(
        self, accept: str | None, expected: str, metrics: Metrics
    ) -> None:
        metrics.trigger("billing").delivered(0.1)
        body, content_type = await metrics.exposition(accept)
        assert content_type.startswith(expected)
        parse = parse_openmetrics if "openmetrics" in expected else parse_text
        names = {family.name.removesuffix("_total") for family in parse(body.decode())}
        assert {"messaging_client_consumed_messages", "pgbackend_target_down", "process_open_fds"} <= names

    async def test_names_and_texts_keep_prometheus_rules(self, database: str) -> None:
        """The mistakes that promlint looks for."""
        for family in (await everything(database)).values():
            assert family.documentation.endswith("."), family.name
            assert re.fullmatch("[a-z][a-z0-9_]*", family.name)
            assert re.match("(messaging|pgbackend|process)_", family.name)
            words = set(family.name.split("_"))
            assert not words & {"gauge", "counter", "histogram", "summary", "info", "bucket", "sum", "ms", "msec"}
            assert not words & {"milliseconds", "minutes", "hours", "kilobytes", "percent"}
            assert not family.name.endswith(("_count", "_total"))
            if family.type == "histogram":
                assert family.name.endswith("_seconds")
            for sample in family.samples:
                assert family.type != "counter" or sample.name == f"{family.name}_total"
                assert all(re.fullmatch("[a-z][a-z0-9_]*", label) for label in sample.labels)

    async def test_docs_list_exactly_the_metrics_that_exist(self, database: str) -> None:
        families = await everything(database)
        said = {}
        for line in DOCUMENTED.read_text().splitlines():
            if match := re.match(r"\| `(\w+)` \| (\w+) \|([^|]*)\|", line):
                said[match[1]] = (match[2], set(re.findall(r"`(\w+)`", match[3])))
        suffix = {"counter": "_total", "info": "_info"}
        there = {
            name + suffix.get(family.type, ""): (
                family.type,
                {label for sample in family.samples for label in sample.labels} - {"le"},
            )
            for name, family in families.items()
        }
        assert said == there

    async def test_examples_in_the_docs_use_existing_metrics(self, database: str) -> None:
        documented = DOCUMENTED.read_text()
        names = {sample.name for family in (await everything(database)).values() for sample in family.samples}
        examples = "".join(re.findall(r"```(?:yaml|promql)\n(.*?)```", documented, re.DOTALL))
        asked = set(re.findall(r"\b(?:pgbackend|messaging|process)_\w+", examples)) - {TRIGGER}
        assert asked
        assert asked <= names
        [rules] = [text for text in re.findall(r"```yaml\n(.*?)```", documented, re.DOTALL) if "alert" in text]
        for rule in yaml.safe_load(rules)["groups"][0]["rules"]:
            assert {"alert", "expr"} <= rule.keys() <= {"alert", "expr", "for", "annotations"}


async def everything(database: str) -> dict[str, Metric]:
    """Every metric family."""
    async with Backend(database) as backend:
        await backend.set_retention(max_bytes=1 << 40)
        await backend.subscribe("billing", lambda event: None)
        with Metrics(backend) as metrics:
            metrics.ingested(1, 0.1)
            metrics.refused(400)
            metrics.trigger("billing").failed(0.1, 500)
            return await scrape(metrics)


class TestTheLog:
    async def test_lag_and_head_come_from_the_log(self, database: str) -> None:
        async with Backend(database) as backend:
            with Metrics(backend) as metrics:
                metrics.trigger("billing")
                release = asyncio.Event()

                async def hang(event: object) -> None:
                    await release.wait()

                await backend.subscribe("billing", hang)
                for number in range(3):
                    await backend.produce(event(number))
                assert await value(metrics, "pgbackend_log_head_position") == 3
                assert await value(metrics, "pgbackend_postgresql_up") == 1
                assert await value(metrics, "pgbackend_subscription_lag_events", **{TRIGGER: "billing"}) == 3
                assert (await value(metrics, "pgbackend_subscription_lag_seconds", **{TRIGGER: "billing"}) or 0) > 0
                with Recorder() as recorder:
                    release.set()
                    await recorder.wait("offsets committed")

                async def caught_up() -> bool:
                    return await value(metrics, "pgbackend_subscription_lag_events", **{TRIGGER: "billing"}) == 0

                await eventually("a lag of 0", caught_up)
                assert await value(metrics, "pgbackend_subscription_lag_seconds", **{TRIGGER: "billing"}) == 0

    async def test_an_operators_pause_is_shown_by_processes_that_run_none_of_its_shards(self, database: str) -> None:
        async with Backend(database) as backend, Backend(database) as other:
            await other.subscribe("billing", print)
            await backend.pause("billing")
            with Metrics(backend) as metrics:
                metrics.trigger("billing")
                assert await value(metrics, "pgbackend_subscription_paused", **{TRIGGER: "billing"}) == 1

    async def test_the_size_of_the_log_and_its_retention_are_shown(self, database: str) -> None:
        async with Backend(database) as backend:
            await backend.set_retention(keep=timedelta(hours=1), dead_letters=None, max_bytes=1 << 40)
            await backend.produce(event(1))
            with Metrics(backend) as metrics:
                assert await value(metrics, "pgbackend_log_events_per_second") == pytest.approx(1 / 60)
                assert (await value(metrics, "pgbackend_log_size_bytes") or 0) > 8192
                assert (await value(metrics, "pgbackend_log_segments") or 0) > 1
                assert await value(metrics, "pgbackend_log_open_appenders") == 0
                seconds = "pgbackend_log_retention_seconds"
                assert await value(metrics, seconds, limit="keep") == 3600
                assert await value(metrics, seconds, limit="dead_letters") is None
                assert await value(metrics, "pgbackend_log_retention_bytes") == 1 << 40

    async def test_a_subscription_shows_who_runs_it_and_whether_it_holds_the_log(self, database: str) -> None:
        async with Backend(database) as backend:
            await backend.subscribe("billing", lambda event: None)
            with Metrics(backend) as metrics:

                async def owned() -> bool:
                    return await value(metrics, "pgbackend_subscription_owned_shards", **{TRIGGER: "billing"}) == 1

                await eventually("its shard has an owner", owned)
                for state in ("holds_log", "pending_events", "in_flight_events"):
                    assert await value(metrics, f"pgbackend_subscription_{state}", **{TRIGGER: "billing"}) == 0

    async def test_scrapes_at_the_same_time_share_one_question(self, database: str) -> None:
        async with Backend(database) as backend:
            asked = 0
            status = backend.status

            async def counted() -> object:
                nonlocal asked
                asked += 1
                return await status()

            backend.status = counted  # type: ignore[method-assign,assignment]  # to count, and then ask as ever
            with Metrics(backend) as metrics:
                await asyncio.gather(*(metrics.exposition(None) for _ in range(20)))
            assert asked == 1

    async def test_a_cancelled_scrape_leaves_the_answer_to_others(self, database: str) -> None:
        async with Backend(database) as backend:
            with Metrics(backend) as metrics:
                first = asyncio.create_task(metrics.exposition(None))
                second = asyncio.create_task(metrics.exposition(None))
                await asyncio.sleep(0)
                first.cancel()
                text, _ = await second
                assert first.cancelled()
                assert b"pgbackend_postgresql_up 1.0" in text

    async def test_own_counts_are_shown_without_postgresql(self, database: str) -> None:
        async with Proxy(database) as proxy, Backend(proxy.dsn) as backend:
            with Metrics(backend) as metrics:
                metrics.ingested(1, 0.1)
                proxy.stall()
                async with asyncio.timeout(20):
                    text, _ = await metrics.exposition(None)
                assert b"pgbackend_postgresql_up 0.0" in text
                assert b"pgbackend_log_head_position" not in text
                assert b'messaging_client_sent_messages_total{messaging_operation_name="send"' in text
                proxy.restore()

                async def up() -> bool:
                    return await value(metrics, "pgbackend_postgresql_up") == 1

                await eventually("PostgreSQL is up", up)

    async def test_a_backend_that_is_not_running_counts_as_down(self, database: str) -> None:
        backend = Backend(database)
        with Metrics(backend) as metrics:
            assert await value(metrics, "pgbackend_postgresql_up") == 0


class TestBroker:
    async def test_a_broker_shows_what_it_did(self, database: str, target: Target) -> None:
        answers = iter([204, 503, 204, 400])
        target.answer = lambda request: web.Response(status=next(answers))
        options = {"backoffDelay": "PT0.01S", "retry": 2}
        text = json.dumps({"triggers": {"billing": {"target": {"url": target.url}, "deliveryOptions": options}}})
        with Metrics() as metrics, Recorder() as recorder:
            async with serving(database, config=text, metrics=metrics) as broker:
                for number in range(3):
                    assert (await broker.send({**HEADERS, "ce-id": str(number)})).status == 202
                    await target.wait([1, 3, 4][number])
                assert (await broker.send({**HEADERS, "ce-id": ""})).status == 400
                await recorder.wait("event buried")
                answer = await broker.request("GET", "/metrics", headers={"accept": OPENMETRICS})
                assert answer.status == 200
                assert answer.headers["content-type"].startswith("application/openmetrics-text")
                parsed = list(parse_openmetrics(answer.body.decode()))
        samples = {
            (one.name, one.labels.get("error_type", one.labels.get("destination", ""))): one.value
            for family in parsed
            for one in family.samples
        }
        assert samples["messaging_client_sent_messages_total", ""] == 3
        assert samples["messaging_client_operation_duration_seconds_count", ""] == 3
        assert samples["messaging_client_consumed_messages_total", ""] == 2
        assert samples["messaging_client_consumed_messages_total", "503"] == 1
        assert samples["messaging_client_consumed_messages_total", "400"] == 1
        assert samples["messaging_process_duration_seconds_count", "4xx"] == 1
        assert samples["pgbackend_retries_scheduled_total", ""] == 1
        assert samples["pgbackend_dead_lettered_events_total", "table"] == 1
        assert samples["pgbackend_ingest_refused_requests_total", ""] == 1

    async def test_no_text_of_a_client_becomes_a_series(self, database: str) -> None:
        with Metrics() as metrics:
            async with serving(database, metrics=metrics) as broker:

                async def series() -> int:
                    return len((await broker.request("GET", "/metrics")).body.splitlines())

                assert (await broker.send(HEADERS)).status == 202
                assert (await broker.send({})).status in (400, 415)
                assert (await broker.request("DELETE")).status == 405
                before = await series()
                for number in range(50):
                    hostile = f"made-up-{number}"
                    headers = {**HEADERS, "ce-id": hostile, "ce-source": f"/{hostile}", "ce-type": hostile}
                    await broker.send({**headers, f"ce-x{number}": hostile}, path=f"/{hostile}")
                    await broker.request(f"M{number}", f"/{hostile}")
                    await broker.send({"content-type": f"application/{hostile}"})
                assert await series() <= before + 2  # another status or two
                assert b"made-up" not in (await broker.request("GET", "/metrics")).body


# Several processes


class Process:
    """A process whose metrics the test controls."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def do(self, what: str) -> object:
        """The value of an expression over `metrics`, `billing` (a trigger) and `facts` there."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{what}\n".encode())
        async with asyncio.timeout(60):
            return json.loads(await self.process.stdout.readline())

    async def samples(self) -> dict[str, float]:
        """Its samples: `name{labels}` → value, without buckets and what it says of processes."""
        text = str(await self.do("(await metrics.exposition(None))[0].decode()"))
        return {
            f"{one.name}{sorted(one.labels.items())}": one.value
            for family in parse_text(text)
            for one in family.samples
            if not one.name.endswith("_bucket") and not one.name.startswith("process_")
        }

    async def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        await self.process.wait()


_PROGRAM = """
import ast, asyncio, json, sys
from pgbackend import facts
from pgbackend.serve.operations.metrics import Metrics

async def main():
    loop = asyncio.get_running_loop()
    with Metrics() as metrics:
        billing = metrics.trigger("billing")
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            names = {"metrics": metrics, "billing": billing, "facts": facts}
            code = compile(line, "line", "eval", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)
            print(json.dumps(await result if asyncio.iscoroutine(result) else result), flush=True)

asyncio.run(main())
"""


@asynccontextmanager
async def process(directory: Path) -> AsyncIterator[Process]:
    """One of several processes that share the directory."""
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROGRAM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)},
        limit=1 << 20,
    )
    one = Process(running)
    try:
        yield one
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
        # Or its pipe is a warning in another test.
        running._transport.close()  # type: ignore[attr-defined]


def count(name: str, **labels: str) -> str:
    return f"{name}{sorted({'messaging_system': 'pgbackend', **labels}.items())}"


SENT = count("messaging_client_sent_messages_total", messaging_operation_name="send")
DOWN = f"pgbackend_target_down{[(TRIGGER, 'billing')]}"


class TestSeveralProcesses:
    @pytest.fixture
    def directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        return tmp_path

    async def test_any_process_shows_the_sums_of_all(self, directory: Path) -> None:
        async with process(directory) as one, process(directory) as other:
            await one.do("metrics.ingested(3, 0.1)")
            await other.do("metrics.ingested(4, 0.1)")
            await one.do("billing.failed(0.1, 503)")
            await other.do("facts.emit('target is down', subscription='billing')")

            async def agree() -> bool:
                first, second = await one.samples(), await other.samples()
                return first == second and first[SENT] == 7

            await eventually("one sum", agree)
            shown = await one.samples()
            assert (
                shown[count("messaging_client_operation_duration_seconds_count", messaging_operation_name="send")] == 2
            )
            assert shown[DOWN] == 1
            assert "pgbackend_config_last_reload_successful[]" in shown
            pids = str(await one.do("(await metrics.exposition(None))[0].decode()"))
            assert {int(pid) for pid in re.findall(r'process_open_fds\{pid="(\d+)"', pids)} == {
                one.process.pid,
                other.process.pid,
            }

    async def test_counts_of_an_ended_process_stay_and_its_gauges_go(self, directory: Path) -> None:
        async with process(directory) as staying:
            await staying.do("metrics.ingested(1, 0.1)")
            for killed in (False, True):
                async with process(directory) as going:
                    await going.do("metrics.ingested(10, 0.1)")
                    await going.do("billing.replied(1)")
                    await going.do("facts.emit('target is down', subscription='billing')")
                    # Writes what was counted.
                    await going.do("(await metrics.exposition(None))[1]")
                    if killed:
                        going.process.kill()
                        await going.process.wait()
                    else:
                        await going.end()
                before = (await staying.samples())[SENT]
                merge_ended(going.process.pid)
                assert (await staying.samples())[SENT] == before
            shown = await staying.samples()
            assert shown[SENT] == 21
            assert shown[f"pgbackend_reply_events_total{[(TRIGGER, 'billing')]}"] == 2
            assert shown[DOWN] == 0
            assert len(list(directory.glob("counter_*.db"))) == 2

    async def test_a_scrape_during_a_merge_counts_nothing_twice(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To Prometheus, a counter that falls looks like a restart, and its whole value is added again."""
        async with process(directory) as staying, process(directory) as going:
            await going.do("metrics.ingested(10, 0.1)")
            await going.end()
            copied, go_on = threading.Event(), threading.Event()
            unlink = Path.unlink

            def hesitating(file: Path) -> None:
                if file.name.startswith("counter_"):
                    copied.set()
                    assert go_on.wait(60)
                unlink(file)

            monkeypatch.setattr(Path, "unlink", hesitating)
            moving = asyncio.create_task(asyncio.to_thread(merge_ended, going.process.pid))
            await asyncio.to_thread(copied.wait, 60)
            looking = asyncio.create_task(staying.samples())
            # Long enough for a scrape that does not wait for the merge.
            await asyncio.wait({looking}, timeout=0.5)
            go_on.set()
            assert (await looking)[SENT] == 10
            await moving

    async def test_a_trigger_that_one_process_forgot_is_not_shown_by_it(self, directory: Path) -> None:
        async with process(directory) as one, process(directory) as other:
            await one.do("metrics.trigger('audit').delivered(0.1)")
            await one.do("(await metrics.exposition(None))[1]")
            await other.do("metrics.trigger('audit') and None")
            assert "audit" in str(await other.samples())
            await other.do("metrics.forget('audit')")
            assert "audit" not in str(await other.samples())


def event(number: int) -> Event:
    return parse_structured(b'{"specversion":"1.0","id":"%d","source":"/shop","type":"order"}' % number)
