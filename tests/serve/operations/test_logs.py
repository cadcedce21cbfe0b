"""The format of log lines, and that no event, client or target can break it."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from pgbackend import facts
from pgbackend.serve.operations import logs
from tests.serve.support.broker import HEADERS, serving
from tests.serve.support.target import Target

Lines = Callable[[], list[str]]
HOSTILE = 'x\n2026-01-01T00:00:00Z [error    ] forged\r\x1b[2J\x1b]0;t\x07\u2028\u202e\x9b31m"} {"level": "error"'
"""Texts that a stranger may put into an event's id."""


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Lines]:
    """The lines logged so far, in the format of the test's parameter."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter(request.param))
    root, before = logging.getLogger(), facts.logger.level
    root.addHandler(handler)
    facts.logger.setLevel(logging.DEBUG)
    yield lambda: stream.getvalue().splitlines()
    facts.logger.setLevel(before)
    root.removeHandler(handler)


def raised(error: Exception) -> Exception:
    """The exception, with a traceback."""
    try:
        raise error
    except type(error) as caught:
        return caught


in_json = pytest.mark.parametrize("log", ["json"], indirect=True)
on_console = pytest.mark.parametrize("log", ["console"], indirect=True)


@pytest.mark.parametrize("log", ["json", "console"], indirect=True)
def test_no_text_makes_a_long_line(log: Lines) -> None:
    long = "x" * 3_000_000
    nested: list[object] = [long]
    for _ in range(200):
        nested = [nested]
    emits: list[Callable[[], None]] = [
        lambda: facts.emit("a text", error=long),
        lambda: facts.emit("a list", events=[long] * 100),
        lambda: facts.emit("a mapping", details={f"{n}{long}": long for n in range(30)}),
        lambda: facts.emit("nested", events=nested),
        lambda: facts.emit("octets", data=long.encode()),
        lambda: facts.emit("an error", error=ValueError(long)),
        lambda: facts.emit("an integer", number=10**100_000),
        lambda: facts.emit("raised", exc_info=raised(ValueError(long))),
        lambda: facts.emit("raised", exc_info=raised(ValueError(f"{long}\n" * 9))),
        lambda: facts.emit("raised", exc_info=raised(ExceptionGroup("many", [ValueError(long)] * 20))),
        lambda: logging.getLogger("aiohttp").error("It said %s", long),
        lambda: logging.getLogger("aiohttp").error(long, exc_info=raised(ValueError(long))),
    ]
    for emit in emits:
        before = len(log())
        emit()
        written = log()[before:]
        assert written
        assert sum(map(len, written)) < 60_000, written[0][:100]


@in_json
class TestJson:
    def test_cut_texts_and_lists_say_how_long_they_were(self, log: Lines) -> None:
        facts.emit("failed", error="x" * 1001, events=["x"] * 21, details={str(n): "x" for n in range(21)})
        said = json.loads(log()[0])
        assert said["error"] == "x" * 1000 + "… (1001 characters)"
        assert said["events"] == ["x"] * 20 + ["… (21 items)"]
        assert said["details"] == {str(n): "x" for n in range(20)} | {"…": "21 items"}

    def test_a_password_at_the_cut_is_not_shown(self, log: Lines) -> None:
        facts.emit("failed", error="x" * 980 + " postgresql://me:secret-secret-secret-secret@db/x")
        assert "secret" not in log()[0]

    def test_a_fact_is_one_object_with_its_fields(self, log: Lines) -> None:
        facts.emit(
            "dispatch failed", level=logging.WARNING, subscription="billing", event_id="7", attempt=3, delay=0.25
        )
        [line] = log()
        said = json.loads(line)
        at = datetime.fromisoformat(said.pop("timestamp"))
        assert at.tzinfo == UTC
        assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
        assert said == {
            "level": "warning", "event": "dispatch failed", "logger": "pgbackend", "process": os.getpid(),
            "subscription": "billing", "event_id": "7", "attempt": 3, "delay": 0.25,
        }  # fmt: skip

    def test_the_time_is_rfc_3339_in_utc(self, log: Lines) -> None:
        facts.emit("worker started")
        said = json.loads(log()[0])["timestamp"]
        assert said.endswith("Z")
        assert len(said) == len("2026-01-01T00:00:00.000000Z")

    def test_records_of_libraries_have_the_same_fields(self, log: Lines) -> None:
        logging.getLogger("aiohttp.client").warning("%s is %d", "this", 7)
        said = json.loads(log()[0])
        assert (said["event"], said["logger"], said["level"]) == ("this is 7", "aiohttp.client", "warning")

    def test_an_exception_is_type_message_and_stacktrace(self, log: Lines) -> None:
        error = raised(KeyError("missing"))
        facts.emit("ingest failed", level=logging.ERROR, exc_info=error, error=error)
        said = json.loads(log()[0])
        assert said["error"] == "KeyError: 'missing'"
        assert said["exception"]["type"] == "KeyError"
        assert said["exception"]["message"] == "'missing'"
        assert said["exception"]["stacktrace"].startswith("Traceback (most recent call last):\n")

    def test_fields_of_any_type_are_written(self, log: Lines) -> None:
        class Odd:
            def __str__(self) -> str:
                raise RuntimeError("no")

        facts.emit(
            "odd fields", odd=Odd(), infinite=float("inf"), octets=b"\xff", none=None, listed=[1, Odd(), {"a": {2}}],
            half="\ud800", yes=True, large=2**80,
        )  # fmt: skip
        said = json.loads(log()[0])
        assert said["odd"] == "(Odd that cannot be shown)"
        assert said["infinite"] == "inf"
        assert said["listed"] == [1, "(Odd that cannot be shown)", {"a": [2]}]
        assert (said["none"], said["yes"], said["large"]) == (None, True, 2**80)

    def test_a_field_cannot_replace_the_record_itself(self, log: Lines) -> None:
        facts.emit("true", timestamp="never", event="false", exception="none", logger="root", process=1, _record="x")
        said = json.loads(log()[0])
        assert said["event"] == "true"
        assert said["event_"] == "false"
        assert said["logger"] == "pgbackend"
        assert said["process"] == os.getpid()
        assert "exception" not in said

    def test_hostile_text_stays_in_its_value(self, log: Lines) -> None:
        facts.emit("dispatch failed", event_id=HOSTILE)
        logging.getLogger("aiohttp").error("It said %s", HOSTILE)
        first, second = log()
        assert first.isascii()
        assert second.isascii()
        assert json.loads(first)["event_id"] == HOSTILE
        assert json.loads(second)["event"] == f"It said {HOSTILE}"


@on_console
class TestConsole:
    def test_a_fact_is_one_line_for_people(self, log: Lines) -> None:
        facts.emit("dispatch failed", level=logging.WARNING, subscription="billing", error="no answer", delay=0.1 + 0.2)
        [line] = log()
        assert " [warning  ] dispatch failed " in line
        assert line.endswith(" subscription=billing error='no answer' delay=0.3")
        assert "\x1b" not in line

    def test_records_of_libraries_name_their_logger(self, log: Lines) -> None:
        logging.getLogger("aiohttp.client").warning("%s is %d", "this", 7)
        assert "this is 7" in log()[0]
        assert "[aiohttp.client]" in log()[0]

    def test_a_traceback_is_indented_below_its_line(self, log: Lines) -> None:
        facts.emit("ingest failed", level=logging.ERROR, exc_info=raised(ValueError(HOSTILE)))
        first, *rest = log()
        assert "ingest failed" in first
        assert rest[0] == "    Traceback (most recent call last):"
        assert all(line.startswith("    ") for line in rest)
        assert all(line.isprintable() for line in rest)

    def test_hostile_text_stays_in_its_line(self, log: Lines) -> None:
        facts.emit("dispatch failed", event_id=HOSTILE, details={HOSTILE: HOSTILE}, many=[HOSTILE])
        logging.getLogger("aiohttp").error("It said %s", HOSTILE)
        lines = log()
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)

    def test_an_id_cannot_look_like_another_field(self, log: Lines) -> None:
        facts.emit("dispatch failed", event_id="7 attempt=9", attempt=1)
        assert log()[0].endswith("event_id='7 attempt=9' attempt=1")


@pytest.mark.parametrize("log", ["json", "console"], indirect=True)
@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@target.example/x",
        "https://secret@target.example",
        "postgresql://user:secret@host/db",
        "https://user:p@secret@h/",
    ],
)
def test_credentials_in_urls_are_not_shown(url: str, log: Lines) -> None:
    logging.getLogger("aiohttp").error("Cannot connect to %s", url)
    error = raised(ValueError(f"bad {url}"))
    facts.emit("dispatch failed", exc_info=error, url=url, error=error, many=[url], details={url: url})
    assert "secret" not in "\n".join(log())
    assert "bad " in "\n".join(log())


# A process of its own


def run(program: str, stderr: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    imports = "import logging, sys, warnings\nfrom pgbackend import facts\nfrom pgbackend.serve.operations import logs"
    code = f"{imports}\n{program}"
    return subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, check=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


class TestConfigure:
    def test_records_below_the_level_and_infos_of_libraries_are_hidden(self) -> None:
        done = run(
            "logs.configure('json', 'info')\n"
            "facts.emit('shown'); facts.emit('hidden', level=logging.DEBUG)\n"
            "logging.getLogger('uvicorn').info('hidden'); logging.getLogger('uvicorn').warning('shown')\n"
            "warnings.warn('shown', UserWarning)\n"
        )
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event"] for line in lines[:2]] == ["shown", "shown"]
        assert lines[2]["logger"] == "py.warnings"
        assert "hidden" not in done.stderr

    def test_a_second_call_replaces_the_first(self) -> None:
        done = run("logs.configure('json', 'debug'); logs.configure('console', 'error')\nfacts.emit('no')\n"
                   "facts.emit('yes', level=logging.ERROR)\n")  # fmt: skip
        [line] = done.stderr.splitlines()
        assert "[error    ] yes" in line

    @pytest.mark.parametrize("level", ["loud", "", "notset", "10", "INFO"])
    def test_an_unknown_level_is_refused(self, level: str) -> None:
        with pytest.raises(ValueError, match="expected debug, info, warning or error"):
            logs.configure("json", level)

    def test_a_text_is_logged_ten_times_a_second_for_each_trigger(self) -> None:
        done = run(
            "second, factory = 1.0, logging.getLogRecordFactory()\n"
            "def made(*args, **options):\n"
            "    record = factory(*args, **options)\n"
            "    record.created = second\n"
            "    return record\n"
            "logging.setLogRecordFactory(made)\n"
            "logs.configure('json', 'info')\n"
            "for n in range(100):\n"
            "    facts.emit('event buried', level=30, subscription='billing', event_id=str(n))\n"
            "    logging.getLogger('aiohttp').warning('odd %s', n)\n"
            "    facts.emit('lease claimed', subscription='billing', shard=n)\n"
            "facts.emit('event buried', level=30, subscription='audit', event_id='a')\n"
            "facts.emit('target is down', level=30, subscription='billing')\n"
            "second = 2.0\n"
            "facts.emit('event buried', level=30, subscription='billing', event_id='b')\n"
        )
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert [line["event_id"] for line in lines if "event_id" in line] == [*map(str, range(10)), "a", "b"]
        assert lines[-1]["not_shown"] == 90
        told = [line["event"] for line in lines]
        assert "target is down" in told
        assert len([text for text in told if text.startswith("odd ")]) == 10
        assert told.count("lease claimed") == 100

    def test_old_texts_are_forgotten(self) -> None:
        flood = logs._Flood()
        for number in range(5000):
            assert flood.filter(logging.makeLogRecord({"msg": f"text {number}", "created": float(number)}))
        assert len(flood._seen) <= 1001

    def test_the_limit_holds_for_each_of_very_many_triggers(self) -> None:
        flood = logs._Flood()

        def shown(second: float) -> list[logging.LogRecord]:
            records = [
                logging.makeLogRecord({"msg": "event buried", "created": second, "fields": {"subscription": str(name)}})
                for _ in range(12)
                for name in range(1500)
            ]
            return [record for record in records if flood.filter(record)]

        assert len(shown(1.0)) == 15_000
        again = shown(2.0)
        assert len(again) == 15_000
        assert all(vars(record)["fields"]["not_shown"] == 2 for record in again[:1500])

    def test_debug_drops_nothing(self) -> None:
        done = run(
            "logs.configure('json', 'debug')\nfor n in range(100): facts.emit('event buried', event_id=str(n))\n"
        )
        assert len(done.stderr.splitlines()) == 100

    def test_a_broken_pipe_stops_nothing(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = run(
                "logs.configure('json', 'info')\n"
                "for n in range(9): facts.emit('told', text='x' * 9999)\n"
                "print('alive')",
                stderr=writing,
            )
        finally:
            os.close(writing)
        assert done.stdout == "alive\n"

    @pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/null", "2>/dev/full"])
    def test_a_closed_or_full_log_stops_nothing(self, redirect: str) -> None:
        code = (
            "import sys; from pgbackend import facts; from pgbackend.serve.operations import logs\n"
            "for format_ in ('json', 'console'): logs.configure(format_, 'info'); facts.emit('logged')\n"
            "sys.stderr and sys.stderr.close(); facts.emit('logged'); print('alive')"
        )
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code],
            stdout=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.stdout == "alive\n"

    @pytest.mark.parametrize(("no_color", "colourful"), [("", True), ("1", False)])
    def test_only_terminals_get_colours(self, no_color: str, colourful: bool) -> None:
        ours, theirs = pty.openpty()
        try:
            run(
                "logs.configure('console', 'info')\nfacts.emit('told', level=30)",
                stderr=theirs,
                NO_COLOR=no_color,
                TERM="xterm",
            )
            assert (b"\x1b[" in os.read(ours, 4096)) is colourful
        finally:
            os.close(ours)
            os.close(theirs)
        assert "\x1b" not in run("logs.configure('console', 'info')\nfacts.emit('told', level=30)").stderr


async def test_a_failed_delivery_names_the_event_by_id_and_source(database: str, target: Target) -> None:
    from aiohttp import web

    target.answer = lambda request: web.Response(status=400)
    config = f"triggers: {{billing: {{target: {{url: '{target.url}'}}}}}}"
    with facts.Recorder() as recorder:
        async with serving(database, config=config) as broker:
            assert (await broker.send({**HEADERS, "ce-id": "7"})).status == 202
            for fact in ("dispatch failed", "event buried"):
                await recorder.wait(fact, subscription="billing", event_id="7", event_source=HEADERS["ce-source"])
