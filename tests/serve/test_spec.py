"""The broker's specification, rule by rule, end to end: over HTTP in, out to real targets.

A class is a section of the specification, a docstring a rule. Rules that other files of tests/serve show end to end are
not repeated here.
"""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import web

from pgbackend.codec.event import Event
from pgbackend.facts import Recorder
from pgbackend.serve.config.load import load
from tests.serve.support.broker import HEADERS, STRUCTURED, Broker, envelope, send, serving
from tests.serve.support.process import Process, post, running
from tests.serve.support.target import Request, Target
from tests.support.backends import complete, dead_letters, settled, status_of
from tests.support.polling import eventually

FAST = "backoffPolicy: constant, backoffDelay: PT0.01S"


def one(url: str, options: str = "") -> str:
    """A configuration with the trigger `t`."""
    return f"triggers: {{t: {{target: {{url: '{url}'}}{', ' if options else ''}{options}}}}}"


def waits(target: Target) -> list[float]:
    """Seconds between one request and the next."""
    return [later.at - earlier.at for earlier, later in pairwise(target.requests)]


def refusing(target: Target, *statuses: int, body: bytes = b"no", **headers: str) -> None:
    """Answer with these statuses, one after another, and then with 204."""

    def answer(request: Request) -> web.Response:
        at = len(target.requests) - 1
        if at >= len(statuses):
            return web.Response(status=204)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=statuses[at], body=body, headers=named)

    target.answer = answer


class TestParsing:
    async def test_scalars_in_filters_keep_their_text(self, database: str, target: Target) -> None:
        """Numbers, dates and booleans in filters are text, whatever YAML makes of them."""
        filters = "filters: [{exact: {type: 042, subject: 2026-01-01, flag: yes, note: 1.50}}]"
        async with serving(database, config=one(target.url, filters)) as broker:
            await send(broker, "right", type="042", subject="2026-01-01", flag="yes", note="1.50")
            for other in ({"type": "42"}, {"subject": "2026-01-01T00:00:00Z"}, {"flag": True}, {"note": "1.5"}):
                members = {"type": "042", "subject": "2026-01-01", "flag": "yes", "note": "1.50"} | other
                await send(broker, "wrong", **members)
            await settled(broker.backend)
        assert target.ids() == ["right"]

    MISTAKES = (
        ("unknown: 1", "unknown"),
        ("filters: [{regex: {type: x}}]", "filters[0].regex"),
        ("filters: [{exact: {type: x}, prefix: {type: x}}]", "filters[0]"),
        ("filters: [{exact: {'': x}}]", "filters[0].exact"),
        ("filters: [{exact: {type: ''}}]", "filters[0].exact.type"),
        ("filters: [{any: []}]", "filters[0].any"),
        ("filters: [{cesql: 'type ='}]", "filters[0].cesql"),
        ("deliveryOptions: {backoffDelay: 5 s}", "deliveryOptions.backoffDelay"),
        ("deliveryOptions: {backoffDelay: PT0S}", "deliveryOptions.backoffDelay"),
        ("target: {url: orders/1}", "target.url"),
        ("target: {url: 'ftp://host/'}", "target.url"),
    )

    async def test_each_mistake_is_reported_with_path_line_and_what_was_expected(self, tmp_path: Path) -> None:
        """Nothing is ignored, and no part of a file with a mistake is used."""
        file = tmp_path / "broker.yaml"
        lines = ["triggers:", "  fine: {target: {url: 'http://localhost:1/'}}"]
        for number, (text, _) in enumerate(self.MISTAKES):
            lines += [f"  t{number}:", f"    {text}"]
        file.write_text("\n".join(lines))
        async with running("--check-config", str(file)) as check:
            assert await check.ended() == 1
            reported = (await check.complaint()).splitlines()
        for number, (_, path) in enumerate(self.MISTAKES):
            [line] = [line for line in reported if f"{file}:{4 + 2 * number}: " in line]
            assert f": triggers.t{number}.{path}" in line
            assert "expected" in line or "cesql" in path
        assert not any("Traceback" in line for line in reported)


TRIGGERMESH = """
ingest:
  user: ""
  password: ""
triggers:
  paid:
    filters:
    - exact:
        type: com.example.invoice.paid
        source: /accounting
    - any:
      - prefix:
          subject: 2026-
      - suffix:
          subject: "-urgent"
    - not:
        all:
        - exact:
            tenant: test
        - prefix:
            region: us
    target:
      url: {target}paid
    deliveryOptions:
      retry: 2
      backoffDelay: PT0.05S
      backoffPolicy: linear
      deadLetterURL: {dead}
  everything:
    filters:
    target:
      url: {target}everything
      deliveryOptions:
        retry: 1
        backoffDelay: PT0,1S
        backoffPolicy: constant
  nowhere:
    filters: []
    target:
    deliveryOptions:
      deadLetterURL: {dead}nowhere
  replayed:
    bounds:
      byId:
        start: 1
        end: "4"
      byDate:
        start: 2020-01-01T00:00:00.123456789Z
        end: 2020-01-02T00:00:00Z
    target:
      url: {target}replayed
"""


class TestTriggerMeshFile:
    @staticmethod
    def file(target: Target, dead: Target) -> str:
        return TRIGGERMESH.replace("{target}", target.url).replace("{dead}", dead.url)

    async def test_a_file_of_triggermesh_works_unchanged(
        self, database: str, target: Target, other_target: Target, tmp_path: Path
    ) -> None:
        """With every key that such a file may have, in YAML and in JSON."""
        async with serving(database) as broker:
            await send(broker, *range(1, 6), source="/before")
        text = self.file(target, other_target)
        assert load(json.dumps(_as_json(text)), origin="test") == load(text, origin="test")
        file = tmp_path / "broker.conf"
        file.write_text(text)
        refused = {"/paid": 0}

        def answer(request: Request) -> web.Response:
            if request.path != "/paid":
                return web.Response(status=200)
            refused["/paid"] += 1
            return web.Response(status=503)

        target.answer = answer
        async with running("--dsn", database, "--port", "0", "--config", str(file)) as serve:
            url = await serve.listening()
            await _post_structured(url, envelope("a", type="com.example.invoice.paid", source="/accounting"))
            paid = {"type": "com.example.invoice.paid", "source": "/accounting", "subject": "2026-7"}
            await _post_structured(url, envelope("b", **paid))
            await _post_structured(url, envelope("c", **paid | {"tenant": "test", "region": "us-1"}))
            # `paid` tries one event 3 times, `everything` and `nowhere` get 3 each, `replayed` gets 2.
            await target.wait(3 + 3 + 2)
            await other_target.wait(1 + 3)
        got: dict[str, list[str]] = {}
        for request in (*target.requests, *other_target.requests):
            got.setdefault(request.path, []).append(request.event().id)
        assert got["/paid"] == ["b", "b", "b"]
        assert sorted(got["/everything"]) == ["a", "b", "c"]
        assert sorted(got["/nowhere"]) == ["a", "b", "c"]
        assert sorted(got["/replayed"]) == ["2", "3"]
        assert got["/"] == ["b"]


def _as_json(text: str) -> Any:
    """The same document as JSON."""
    import yaml

    members = yaml.load(text, yaml.BaseLoader)  # noqa: S506 - the one that makes texts and nothing else
    members["triggers"]["everything"]["filters"] = members["triggers"]["nowhere"]["target"] = None
    return members


async def _post_structured(url: str, body: bytes) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as client, client.post(url, data=body, headers=STRUCTURED) as answer:
        assert answer.status == 202, await answer.text()


class TestReload:
    @staticmethod
    @asynccontextmanager
    async def following(database: str, file: Path) -> AsyncIterator[tuple[Process, str]]:
        arguments = ("--dsn", database, "--port", "0", "--config", str(file), "--log-level", "info")
        async with running(*arguments) as serve:
            yield serve, await serve.listening()

    async def test_a_changed_file_takes_effect_under_load(
        self, database: str, target: Target, other_target: Target, tmp_path: Path
    ) -> None:
        """One trigger is added, one removed, one gets another target: no event is lost or delivered twice."""
        file = _mounted(tmp_path, _two(target.url, other_target.url))
        async with self.following(database, file) as (_, url):
            sent = 0
            for round_ in range(4):
                for _ in range(10):
                    assert await post(url, str(sent)) == 202
                    sent += 1
                swapped = (target.url, other_target.url) if round_ % 2 else (other_target.url, target.url)
                _swap(file, _two(*swapped, extra=f"\n  new{round_}: {{target: {{url: '{swapped[0]}new'}}}}"))
                await _new_trigger_gets(url, [target, other_target], f"marker{round_}")
            await _until(lambda: len(_ids("/kept", target, other_target)) >= sent)
            kept = [id_ for id_ in _ids("/kept", target, other_target) if id_.isdigit()]
        assert sorted(map(int, kept)) == list(range(sent))

    async def test_a_removed_trigger_keeps_its_offset(self, database: str, target: Target, tmp_path: Path) -> None:
        """Its event in flight ends. Once it is there again, it gets the events produced meanwhile."""
        released = asyncio.Event()

        async def hold(request: Request) -> web.Response:
            await released.wait()
            return web.Response(status=204)

        target.answer = hold
        file = tmp_path / "broker.yaml"
        file.write_text(one(target.url))
        async with self.following(database, file) as (serve, url):
            assert await post(url, "in flight") == 202
            await target.wait(1)
            file.write_text("triggers: {}")
            released.set()
            await serve.complains("trigger removed")
            assert await post(url, "meanwhile") == 202
            file.write_text(one(target.url))
            await target.wait(2)
            assert await post(url, "after") == 202
            await target.wait(3)
        assert target.ids() == ["in flight", "meanwhile", "after"]

    async def test_an_invalid_file_changes_nothing_and_is_reported(
        self, database: str, target: Target, tmp_path: Path
    ) -> None:
        """The old file stays in force, and no valid part of the new one is used."""
        file = tmp_path / "broker.yaml"
        file.write_text(one(target.url))
        async with self.following(database, file) as (serve, url):
            file.write_text(f"triggers:\n  valid: {{target: {{url: '{target.url}valid'}}}}\n  t: {{unknown: 1}}\n")
            [line] = await serve.complains("triggers.t.unknown")
            assert f"{file}:3" in line
            assert await post(url, "1") == 202
            await target.wait(1)
            file.write_text(one(target.url + "new"))
            await serve.complains("trigger changed")
            assert await post(url, "2") == 202
            await target.wait(2)
        assert [request.path for request in target.requests] == ["/", "/new"]


def _two(kept: str, other: str, extra: str = "") -> str:
    return (
        f"triggers:\n  kept: {{target: {{url: '{kept}kept'}}}}\n  other: {{target: {{url: '{other}other'}}}}{extra}\n"
    )


def _mounted(directory: Path, text: str) -> Path:
    """The file as Kubernetes mounts a ConfigMap: a link through a directory link that is swapped."""
    file = directory / "broker.yaml"
    (directory / "..data").symlink_to("..0")
    (directory / "..0").mkdir()
    (directory / "..0" / "broker.yaml").write_text(text)
    file.symlink_to("..data/broker.yaml")
    return file


def _swap(file: Path, text: str) -> None:
    """The file has new contents, as Kubernetes updates a ConfigMap."""
    old = (file.parent / "..data").readlink().name
    directory = file.parent / f"..{int(old[2:]) + 1}"
    directory.mkdir()
    (directory / "broker.yaml").write_text(text)
    (file.parent / "..tmp").symlink_to(directory.name)
    (file.parent / "..tmp").rename(file.parent / "..data")


def _ids(path: str, *targets: Target) -> list[str]:
    return [request.event().id for target in targets for request in target.requests if request.path == path]


async def _new_trigger_gets(url: str, targets: Sequence[Target], marker: str) -> None:
    """Return once an event reaches the new trigger, because the new file is in force."""
    number = 0

    async def arrives() -> bool:
        nonlocal number
        number += 1
        assert await post(url, f"{marker}-{number}") == 202
        return any(id_.startswith(marker) for id_ in _ids("/new", *targets))

    await eventually("the new trigger gets events", arrives, interval=0.05)


async def _until(is_so: Any, timeout: float = 60.0) -> None:
    async def check() -> bool:
        return bool(is_so())

    await eventually("all have arrived", check, timeout)


class TestFilters:
    EVENTS = (
        envelope("plain", type="a.b", subject="Draft"),
        envelope("typed", type="a.c", count=3, flag=True, time="2026-01-01T00:00:00.5Z"),
        envelope("bare"),
    )
    CASES = (
        ("[]", "plain typed bare"),
        ("[{exact: {subject: draft}}]", ""),
        ("[{exact: {subject: Draft}}]", "plain"),
        ("[{prefix: {type: a.}}, {suffix: {type: .c}}]", "typed"),
        ("[{exact: {type: a.b, subject: Draft}}]", "plain"),
        ("[{exact: {type: a.b, subject: draft}}]", ""),
        # A missing attribute matches nothing, so `not` of it is true.
        ("[{prefix: {subject: D}}]", "plain"),
        ("[{suffix: {missing: x}}]", ""),
        ("[{not: {exact: {missing: x}}}]", "plain typed bare"),
        ("[{not: {prefix: {subject: D}}}]", "typed bare"),
        ("[{any: [{exact: {missing: x}}, {exact: {type: a.c}}]}]", "typed"),
        ("[{all: [{not: {exact: {missing: x}}}, {exact: {type: a.b}}]}]", "plain"),
        # Values of other types compare by their canonical text.
        ("[{exact: {count: 3}}]", "typed"),
        ("[{exact: {flag: true}}]", "typed"),
        ("[{exact: {flag: 'True'}}]", ""),
        ("[{prefix: {flag: tr}}, {suffix: {count: '3'}}]", "typed"),
        ("[{exact: {time: '2026-01-01T00:00:00.5Z'}}]", "typed"),
        # In CloudEvents SQL, an error means no match.
        ('[{cesql: "count = 3 AND flag"}]', "typed"),
        ("[{cesql: \"subject LIKE 'D%'\"}]", "plain"),
        ("[{cesql: \"NOT (missing = 'x')\"}]", ""),
        ('[{cesql: "EXISTS subject OR EXISTS count"}]', "plain typed"),
        ('[{not: {cesql: "count / 0 = 1"}}]', "plain typed bare"),
        ('[{cesql: "type"}]', ""),
        ('[{any: [{cesql: "count > 2"}, {exact: {subject: Draft}}]}]', "plain typed"),
    )  # fmt: skip

    async def test_each_dialect_passes_the_matching_events(self, database: str, target: Target) -> None:
        """A list means AND; an empty one passes everything; case matters; a missing attribute does not match."""
        triggers = "\n".join(
            f"  f{number}: {{filters: {filters}, target: {{url: '{target.url}{number}'}}}}"
            for number, (filters, _) in enumerate(self.CASES)
        )
        async with serving(database, config=f"triggers:\n{triggers}") as broker:
            for event in self.EVENTS:
                assert (await broker.send(STRUCTURED, event)).status == 202
            for number in range(len(self.CASES)):
                await settled(broker.backend, f"f{number}")
        for number, (filters, expected) in enumerate(self.CASES):
            assert set(_ids(f"/{number}", target)) == set(expected.split()), filters


class TestDelivery:
    async def test_bodies_are_unchanged_and_redirects_are_not_followed(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """The default is binary mode. A 3xx is a final failure."""

        def answer(request: Request) -> web.Response:
            if request.event().id == "redirected":
                return web.Response(status=302, headers={"Location": other_target.url})
            return web.Response(status=204)

        target.answer = answer
        body = b' {"n": 1.00,\r\n "n": [ ]}\n\xff'
        async with serving(database, config=one(target.url, f"deliveryOptions: {{retry: 3, {FAST}}}")) as broker:
            for id_ in ("redirected", "delivered"):
                headers = HEADERS | {"ce-id": id_, "content-type": "application/octet-stream"}
                assert (await broker.send(headers, body)).status == 202
            await settled(broker.backend)
            assert [letter.event.id for letter in await dead_letters(broker.backend)] == ["redirected"]
        assert [request.body for request in target.requests] == [body, body]
        assert other_target.requests == []

    RETRIED = (404, 408, 409, 413, 425, 429, 500, 501, 502, 503, 504, 507, 599)
    FINAL = (301, 307, 400, 401, 402, 403, 405, 406, 411, 412, 415, 418, 422, 426, 428, 431, 451)

    async def test_statuses_are_retried_or_final(self, database: str, target: Target) -> None:
        """Some 4xx and every 5xx are retried; any other status is final, even with retries left."""

        def answer(request: Request) -> web.Response:
            code, is_first = int(request.event().id), target.ids().count(request.event().id) == 1
            return web.Response(status=code if is_first else 200)

        target.answer = answer
        async with serving(database, config=one(target.url, f"deliveryOptions: {{retry: 2, {FAST}}}")) as broker:
            await send(broker, *self.RETRIED, *self.FINAL)
            await settled(broker.backend)
            dead = {letter.event.id for letter in await dead_letters(broker.backend)}
        assert dead == {str(code) for code in self.FINAL}
        assert all(target.ids().count(str(code)) == 2 for code in self.RETRIED)
        assert all(target.ids().count(str(code)) == 1 for code in self.FINAL)

    POLICIES = (
        ("backoffPolicy: constant, backoffDelay: PT0.3S", (0.3, 0.3, 0.3)),
        ("backoffPolicy: linear, backoffDelay: PT0.2S", (0.2, 0.4, 0.6)),
        ("backoffPolicy: exponential, backoffDelay: PT0.1S", (0.2, 0.4, 0.8)),
        ("backoffPolicy: exponential, backoffDelay: PT0.1S, backoffMax: PT0.3S", (0.2, 0.3, 0.3)),
        ("backoffDelay: PT0.3S", (0.3, 0.3, 0.3)),
        ("backoffPolicy: constant", (1.0, 1.0, 1.0)),
    )

    async def test_waits_before_each_retry(self, database: str, target: Target) -> None:
        """P, P·n or P·2ⁿ, capped, plus up to 10 %. The default policy is constant, the default delay one second."""

        def answer(request: Request) -> web.Response:
            return web.Response(status=503 if len(_ids(request.path, target)) <= 3 else 204)

        target.answer = answer
        triggers = "\n".join(
            f"  p{number}: {{target: {{url: '{target.url}{number}'}}, deliveryOptions: {{retry: 3, {policy}}}}}"
            for number, (policy, _) in enumerate(self.POLICIES)
        )
        with Recorder() as recorder:
            async with serving(database, config=f"triggers:\n{triggers}") as broker:
                await send(broker, "1")
                await target.wait(4 * len(self.POLICIES))
        for number, (policy, expected) in enumerate(self.POLICIES):
            at = [request.at for request in target.requests if request.path == f"/{number}"]
            planned = [fact["delay"] for fact in recorder.all("retry scheduled", subscription=f"p{number}")]
            for (earlier, later), delay, wait in zip(pairwise(at), planned, expected, strict=True):
                # The planned delay is exact; a busy machine adds to the real one.
                assert wait <= cast("float", delay) <= wait * 1.1, (policy, number)
                assert later - earlier >= wait - 0.01, (policy, number)

    async def test_retry_after_is_obeyed(self, database: str, target: Target) -> None:
        """Even if it is longer than the policy's delay, and with statuses other than 429."""
        refusing(target, 429, 503, Retry_After="1")
        options = f"deliveryOptions: {{retry: 2, {FAST}}}"
        async with serving(database, config=one(target.url, options)) as broker:
            await send(broker, "1")
            await target.wait(3)
        assert all(wait >= 0.99 for wait in waits(target))

    async def test_410_pauses_the_trigger_and_is_logged(
        self, database: str, target: Target, other_target: Target, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing more is sent there, and other triggers go on. With a new target, the waiting events are delivered."""
        refusing(target, *[410] * 100)
        two = one(target.url) + f"\n  other: {{target: {{url: '{other_target.url}other'}}}}"
        two = f"triggers:\n  t: {{target: {{url: '{target.url}'}}}}\n" + two.partition("\n")[2]
        async with serving(database, config=two) as broker:
            await send(broker, *range(10), source="/1")
            await _until(lambda: len(_ids("/other", other_target)) == 10)

            async def is_paused() -> bool:
                return (await status_of(broker.backend, "t")).state.startswith("paused")

            await eventually("the trigger is paused", is_paused)
            asked = len(target.requests)
            await send(broker, *range(10, 20), source="/2")
            await _until(lambda: len(_ids("/other", other_target)) == 20)
            assert len(target.requests) == asked
            assert await dead_letters(broker.backend, name="t") == []
            # One record at WARNING names both the trigger and the URL.
            warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert len(warnings) == 1
            assert warnings[0].startswith("subscription paused subscription=t ")
            assert f"reason='{target.url} answered 410 Gone; change the URL of trigger t, " in warnings[0]

            await broker.triggers.apply(load(one(other_target.url + "new"), origin="test"))
            await _until(lambda: len(_ids("/new", other_target)) >= 20)
        assert sorted(map(int, _ids("/new", other_target))) == list(range(20))

    async def test_the_timeout_applies_to_each_attempt(self, database: str, target: Target) -> None:
        """Each attempt has the whole timeout, and an attempt that exceeds it is retried."""

        released = asyncio.Event()

        async def hang(request: Request) -> web.Response:
            if len(target.requests) <= 2:
                await released.wait()
            return web.Response(status=204)

        target.answer = hang
        # Many retries, because a stalled machine answers none of them in time.
        options = f"deliveryOptions: {{retry: 20, timeout: PT0.3S, {FAST}}}"
        async with serving(database, config=one(target.url, options)) as broker:
            await send(broker, "1")
            await target.wait(3)
            await settled(broker.backend)
            assert await dead_letters(broker.backend) == []
            released.set()
        assert all(0.3 <= wait < 20 for wait in waits(target)[:2])


class TestDeadLetters:
    async def test_an_event_that_is_given_up_is_kept_or_handed_on(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """Without retries left, without a URL, or with a failing dead letter URL, the event can still be found."""
        refusing(target, *[500] * 1000)
        dead = f"deadLetterURL: '{other_target.url}'"
        config = f"""
            triggers:
              used-up: {{target: {{url: '{target.url}'}}, deliveryOptions: {{retry: 1, {FAST}}}}}
              handed-on: {{target: {{url: '{target.url}'}}, deliveryOptions: {{retry: 1, {FAST}, {dead}}}}}
              nowhere: {{deliveryOptions: {{retry: 1, {FAST}, {dead}}}}}
              nothing: {{target: {{url: ''}}}}
              both-fail:
                target: {{url: '{target.url}'}}
                deliveryOptions: {{retry: 1, {FAST}, deadLetterURL: '{target.url}dead'}}
            """
        async with serving(database, config=config) as broker:
            await send(broker, "1", data={"n": 1.0})
            for name in ("used-up", "handed-on", "nowhere", "nothing", "both-fail"):
                await settled(broker.backend, name)
            kept = {
                name: len(await dead_letters(broker.backend, name=name)) for name in ("used-up", "handed-on", "nowhere")
            }
            kept |= {name: len(await dead_letters(broker.backend, name=name)) for name in ("nothing", "both-fail")}
            [letter] = await dead_letters(broker.backend, name="both-fail")
        assert kept == {"used-up": 1, "handed-on": 0, "nowhere": 0, "nothing": 1, "both-fail": 1}
        assert letter.event.data_bytes == b'{"n": 1.0}'
        assert len(_ids("/dead", target)) == 2, "the dead letter URL has the same retries"

        by_dest = {request.header("ce-knativeerrordest"): request for request in other_target.requests}
        handed_on = by_dest[target.url]
        assert handed_on.header("ce-knativeerrorcode") == "500"
        assert base64.b64decode(handed_on.header("ce-knativeerrordata") or "") == b"no"
        assert handed_on.body == b'{"n": 1.0}'


class TestReplies:
    async def test_a_reply_is_produced_and_delivered_to_matching_triggers(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """An event in the answer is stored; any other body is ignored."""

        def answer(request: Request) -> web.Response:
            event = request.event()
            if event.id == "plain":
                return web.Response(status=200, body=b'{"specversion": "1.0"}', content_type="application/json")
            headers = HEADERS | {"ce-id": f"{event.id}'", "ce-type": "answer", "content-type": "text/plain"}
            return web.Response(status=200, headers=headers, body=b"said")

        target.answer = answer
        config = f"""
            triggers:
              asks: {{filters: [{{exact: {{type: order}}}}], target: {{url: '{target.url}'}}}}
              hears: {{filters: [{{exact: {{type: answer}}}}], target: {{url: '{other_target.url}'}}}}
            """
        async with serving(database, config=config) as broker:
            await send(broker, "plain", "1")
            [heard] = await other_target.wait(1)
            await settled(broker.backend, "asks")
            assert {event.id for event in await broker.stored()} == {"plain", "1", "1'"}
        assert heard.body == b"said"
        assert heard.event().attributes_text["knativebrokerttl"] == "254"

    async def test_a_loop_of_replies_ends_after_255_hops(self, database: str, target: Target) -> None:
        """The counter follows the chain of replies, even if the target sends it back."""

        def answer(request: Request) -> web.Response:
            headers = {name.decode(): value.decode() for name, value in request.headers if name.lower()[:3] == b"ce-"}
            return web.Response(status=200, headers=headers, body=request.body)

        target.answer = answer
        async with serving(database, config=one(target.url)) as broker:
            await send(broker, "loop")
            await target.wait(255, timeout=60)
            await settled(broker.backend)
            assert len(await broker.stored()) == 255
            assert await dead_letters(broker.backend) == []


class TestBounds:
    @staticmethod
    def bounded(url: str, bounds: str, name: str = "t") -> str:
        return f"triggers: {{{name}: {{target: {{url: '{url}'}}, bounds: {bounds}}}}}"

    async def test_bounds_are_exclusive_and_positions_take_precedence_over_dates(
        self, database: str, target: Target
    ) -> None:
        """Dates compare with the time of recording by the server's clock, not with an event's `time`."""
        async with serving(database) as broker:
            await send(broker, *range(1, 6), time="1999-01-01T00:00:00Z")
            between = datetime.now(UTC)
            positions = [event.position for event in await _positioned(broker)]
        for bounds, expected in (
            (f'{{byId: {{start: "{positions[0]}", end: "{positions[3]}"}}}}', "23"),
            (f"{{byId: {{start: {positions[1]}}}, byDate: {{start: '2100-01-01T00:00:00Z'}}}}", "345"),
            (f"{{byId: {{end: {positions[2]}}}, byDate: {{start: '2000-01-01T00:00:00Z'}}}}", "12"),
            (f"{{byDate: {{start: '2000-01-01T00:00:00Z', end: '{between.isoformat()}'}}}}", "12345"),
        ):
            target.requests.clear()
            name = f"t{expected}"
            async with serving(database, config=self.bounded(target.url, bounds, name)) as broker:
                await settled(broker.backend, name)
            assert sorted(target.ids()) == list(expected), bounds

    async def test_a_changed_end_acts_at_once_and_a_changed_start_seeks(self, database: str, target: Target) -> None:
        """A later end revives a complete trigger. A start that is read again without a change moves nothing."""
        async with serving(database, config=self.bounded(target.url, "{byId: {start: 0, end: 3}}")) as broker:
            await send(broker, *range(1, 6))
            await _until(lambda: len(target.requests) >= 2)
            await complete(broker.backend)
            assert sorted(target.ids()) == ["1", "2"]

            await broker.triggers.apply(load(self.bounded(target.url, "{byId: {start: 0, end: 5}}"), origin="test"))
            await _until(lambda: len(target.requests) >= 4)
            await complete(broker.backend)
            assert sorted(target.ids()) == ["1", "2", "3", "4"]

            await broker.triggers.apply(load(self.bounded(target.url, "{byId: {start: 2, end: 5}}"), origin="test"))
            await _until(lambda: len(target.requests) >= 6)
            await complete(broker.backend)
            assert sorted(target.ids()[4:]) == ["3", "4"]
        async with serving(database, config=self.bounded(target.url, "{byId: {start: 2, end: 5}}")) as broker:
            await complete(broker.backend)
            assert len(target.requests) == 6

    async def test_a_quiet_log_completes_by_the_clock_and_completion_is_durable(
        self, database: str, target: Target
    ) -> None:
        """Completion needs no event past the end, and a later event does not undo it."""
        async with serving(database) as broker:
            end = (datetime.now(UTC) + timedelta(seconds=4)).isoformat()
            config = self.bounded(target.url, f"{{byDate: {{end: '{end}'}}}}")
            await broker.configure(config)
            await send(broker, "in time")
            await target.wait(1)
            await complete(broker.backend)
        async with serving(database, config=config) as broker:
            await send(broker, "too late")
            await complete(broker.backend)
        assert target.ids() == ["in time"]


async def _positioned(broker: Broker) -> list[Event]:
    import asyncpg

    from pgbackend.codec.attributes import COLUMNS

    connection = await asyncpg.connect(broker.dsn)
    try:
        columns = ", ".join(COLUMNS)
        rows = await connection.fetch(f"select {columns}, position from pgbackend.events order by position")
        return [Event(tuple(row)) for row in rows]
    finally:
        await connection.close()


class TestEgress:
    ADDRESSES = ("127.0.0.1", "localhost", "[::1]", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]")  # noqa: S104

    async def test_private_targets_can_be_denied(self, database: str, target: Target) -> None:
        """The address that is connected to decides, whatever the URL calls it."""
        port = target.url.rsplit(":", 1)[1].rstrip("/")
        triggers = "\n".join(
            f"  t{number}: {{target: {{url: 'http://{address}:{port}/'}}, deliveryOptions: {{retry: 1, {FAST}}}}}"
            for number, address in enumerate(self.ADDRESSES)
        )
        config = f"triggers:\n{triggers}"
        arguments = ("--dsn", database, "--port", "0", "--config-inline", config, "--deny-private-targets")
        async with running(*arguments) as serve:
            assert await post(await serve.listening()) == 202
            await _dead_letters(database, len(self.ADDRESSES))
        assert target.requests == []


async def _dead_letters(database: str, count: int) -> None:
    import asyncpg

    connection = await asyncpg.connect(database)
    try:

        async def are_there() -> bool:
            return int(await connection.fetchval("select count(*) from pgbackend.dead_letters")) == count

        await eventually(f"{count} dead letters", are_there)
    finally:
        await connection.close()


# ── CloudEvents over HTTP ─────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def passing(database: str, binary: Target, structured: Target) -> AsyncIterator[Broker]:
    """A broker that delivers each event in both modes, in order."""
    config = f"""
        triggers:
          binary: {{target: {{url: '{binary.url}'}}, order: strict}}
          structured: {{target: {{url: '{structured.url}', mode: structured}}, order: strict}}
        """
    async with serving(database, config=config) as broker:
        yield broker


class TestAsIntermediary:
    async def test_unknown_extensions_are_delivered_unchanged(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """None is dropped, renamed or corrected, and its type is kept in modes that have types."""
        members = {"x": "", "a1": " padded ", "b2": -5, "c3": False, "averyveryverylongextensionname": "é%41"}
        async with passing(database, target, other_target) as broker:
            await send(broker, "1", **members)
            [binary], [structured] = await target.wait(1), await other_target.wait(1)
        sent = json.loads(structured.body)
        assert {name: sent[name] for name in members} == members
        texts = binary.event().attributes_text
        assert {name: texts.get(name, "") for name in members} == {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in members.items()
        }

    async def test_data_of_every_kind_survives_a_change_of_mode(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """JSON keeps its text, a JSON string is not parsed, and null is not the same as no data."""
        json_type = {"content-type": "application/json"}
        raw = b'{"n": 1.00, "big": 12345678901234567890, "n": [ ]}'
        sent: Sequence[tuple[dict[str, str], bytes, bytes, bytes | None]] = (
            (HEADERS | json_type, raw, raw, b'"data":' + raw),
            (HEADERS | json_type, b'"{}"', b'"{}"', b'"data":"{}"'),
            (HEADERS | json_type, b"null", b"null", b'"data":null'),
            (HEADERS | json_type, b"not JSON", b"not JSON", b'"data_base64":"bm90IEpTT04="'),
            (HEADERS | {"content-type": "text/plain"}, b"{}", b"{}", b'"data":"{}"'),
            (HEADERS | {"content-type": "x/y"}, b"text", b"text", b'"data_base64":"dGV4dA=="'),
            (HEADERS, b"\xff", b"\xff", b'"data_base64":"/w=="'),
            (HEADERS, b"", b"", None),
            (STRUCTURED, envelope(data="a string"), b'"a string"', b'"data":"a string"'),
            (STRUCTURED, envelope(data=None), b"null", b'"data":null'),
            (STRUCTURED, envelope(data_base64="AA=="), b"\0", b'"data_base64":"AA=="'),
        )
        async with passing(database, target, other_target) as broker:
            for headers, body, _, _ in sent:
                assert (await broker.send(headers, body)).status == 202
            binary, structured = await target.wait(len(sent)), await other_target.wait(len(sent))
        for (_, _, octets, member), one_binary, one_structured in zip(sent, binary, structured, strict=True):
            assert one_binary.body == octets
            assert one_binary.header("ce-datacontenttype") is None
            assert member in one_structured.body if member else b'"data' not in one_structured.body
        # No content type is invented, except for JSON data that had none because it was in an envelope.
        assert [request.header("content-type") for request in binary[6:]] == [
            None, None, "application/json", "application/json", None,
        ]  # fmt: skip

    async def test_events_up_to_the_size_limit_are_delivered_whole(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """Intermediaries must forward 64 KiB; the broker forwards up to its limit, attributes included."""
        async with passing(database, target, other_target) as broker:
            headers = HEADERS | {"ce-note": "n" * 8_000, "content-type": "text/plain"}
            assert (await broker.send(headers, b"x" * 57_000)).status == 202
            assert (await broker.send(HEADERS, b"x" * 1_000_000)).status == 202
            await target.wait(2)
            await other_target.wait(2)
        assert [len(request.body) for request in target.requests] == [57_000, 1_000_000]
        assert target.requests[0].header("ce-note") == "n" * 8_000
        assert other_target.requests[0].event().attribute("note") == "n" * 8_000

    async def test_times_and_texts_are_delivered_unchanged(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """Including nanoseconds, leap seconds, offsets, and all characters that an attribute may have."""
        members = ("2016-12-31T23:59:60.123456789Z", "2026-01-01t00:00:00-05:30", "0001-01-01T00:00:00Z")
        text = ' "quoted" 100% %41 \\ é ☃ 𝄞 \u00a0 ~'
        async with passing(database, target, other_target) as broker:
            for time in members:
                await send(broker, time, time=time, subject=text, note=text)
            binary, structured = await target.wait(3), await other_target.wait(3)
        for request in (*binary, *structured):
            event = request.event()
            assert event.attribute("time") == event.id
            assert (event.subject, event.attribute("note")) == (text, text)
        written = [value for request in binary for name, value in request.headers if name.lower().startswith(b"ce-")]
        assert len(written) == 3 * 7
        assert all(0x21 <= byte <= 0x7E and byte != ord('"') for value in written for byte in value)


class TestAsReceiver:
    async def test_a_json_content_type_is_recognized_in_every_spelling(
        self, database: str, target: Target, other_target: Target
    ) -> None:
        """Case, parameters, and the text before `/json` and `+json` do not matter."""
        kinds = ("application/json", "APPLICATION/Json ; a=b", "text/json", "model/gltf+JSON", "x/json;charset=utf-8")
        async with passing(database, target, other_target) as broker:
            for kind in kinds:
                await send(broker, kind, datacontenttype=kind, data="text")
                assert (await broker.send(HEADERS | {"content-type": kind}, b'"text"')).status == 202
            await target.wait(2 * len(kinds))
            for request in await other_target.wait(2 * len(kinds)):
                assert b'"data":"text"' in request.body
        assert {request.body for request in target.requests} == {b'"text"'}

    BAD_HEADERS = (
        {"ce-subject": "%C0%A0"},
        {"ce-subject": "%ff"},
        {"ce-subject": "a%0Ab"},
        {"ce-subject": "a%00b"},
        {"ce-subject": "%EF%BF%BF"},
        {"ce-subject": "%ED%A0%80"},
        {"ce-subject": ""},
        {"ce-id": ""},
        {"ce-time": "2026-W01-1T00:00:00Z"},
        {"ce-time": "20260101T000000Z"},
        {"ce-time": "2026-01-01T24:00:00Z"},
        {"ce-time": "2026-01-01T00:00:00,5Z"},
        {"ce-source": "a b"},
        {"ce-dataschema": "relative"},
        {"ce-data": "x"},
        {"ce-a_b": "x"},
        {"ce-datacontenttype": "text/plain"},
        {"ce-specversion": "2.0"},
        {"content-type": "text"},
    )

    async def test_invalid_values_of_attributes_are_400(self, broker: Broker) -> None:
        """Invalid UTF-8, forbidden characters, empty texts, invalid times and references. Nothing is stored."""
        for headers in self.BAD_HEADERS:
            answer = await broker.send(HEADERS | headers, b"{}")
            assert answer.status == 400, headers
            assert next(iter(headers)).removeprefix("ce-") in answer.detail.lower() or "content" in answer.detail
        assert await broker.stored() == []

    BAD_MEMBERS: tuple[dict[str, Any], ...] = (
        {"x": 2**31},
        {"x": -(2**31) - 1},
        {"x": 1.5},
        {"x": {}},
        {"x": []},
        {"subject": "a\u0001"},
        {"subject": "a\u0085"},
        {"subject": "a\ufffe"},
        {"subject": "\ud800"},
        {"subject": ""},
        {"dataschema": ""},
        {"X": "x"},
        {"x\n": "x"},
        {"": "x"},
        {"id": 1},
        {"data_base64": "e!!A=="},
        {"data_base64": "AA==", "data": 1},
    )

    async def test_invalid_members_of_an_envelope_are_400(self, broker: Broker) -> None:
        """Integers beyond 32 bits, other types, forbidden characters, invalid names, data twice."""
        for members in self.BAD_MEMBERS:
            answer = await broker.send(STRUCTURED, envelope(**members))
            assert answer.status == 400, members
            assert next(iter(members)).strip() in answer.detail
        assert await broker.stored() == []

    async def test_header_values_are_unquoted_then_decoded_once(self, broker: Broker) -> None:
        """Lower-case and needless codes are decoded, too; a `%` that begins no code stays as it is."""
        for sent, meant in (
            ('"a \\"b\\" \\\\"', 'a "b" \\'),
            ("%c3%a9", "é"),
            ("%41", "A"),
            ("%2541", "%41"),
            ("100%", "100%"),
            ("50%-", "50%-"),
            ('"%22"', '"'),
        ):
            assert (await broker.send(HEADERS | {"ce-subject": sent})).status == 202
            assert (await broker.stored())[-1].subject == meant, sent

    async def test_null_means_absent_and_nothing_is_invented(self, broker: Broker) -> None:
        """A missing id, time, specversion or content type gets no default."""
        assert (await broker.send(STRUCTURED, envelope(subject=None, time=None, x=None, data=1))).status == 202
        [event] = await broker.stored()
        assert event.attributes_text == {"specversion": "1.0", "id": "1", "source": "/shop", "type": "order"}
        for missing in ("id", "source", "type", "specversion"):
            body = json.dumps({name: value for name, value in json.loads(envelope()).items() if name != missing})
            answer = await broker.send(STRUCTURED, body.encode())
            assert (answer.status, repr(missing) in answer.detail) == (400, True)
            assert (await broker.send(STRUCTURED, envelope(**{missing: None}))).status == 400

    async def test_the_webhook_handshake_is_answered(self, broker: Broker) -> None:
        """The headers give consent, to any origin and at any rate."""
        asked = {"WebHook-Request-Origin": "eventemitter.example.com", "WebHook-Request-Rate": "120"}
        for path in ("/", "/a/b"):
            answer = await broker.request("OPTIONS", path, headers=asked)
            assert answer.status in (200, 204)
            assert answer.headers["webhook-allowed-origin"] in ("*", "eventemitter.example.com")
            assert answer.headers["webhook-allowed-rate"] in ("*", "120")
            assert "POST" in answer.headers["allow"]
        answer = await broker.request("OPTIONS", "/", headers={"WebHook-Request-Origin": "x.example"})
        assert answer.headers["webhook-allowed-origin"] in ("*", "x.example")

    async def test_options_without_an_origin_gets_no_consent(self, broker: Broker) -> None:
        """Without an origin, OPTIONS only asks for the methods."""
        answer = await broker.request("OPTIONS", "/")
        assert answer.status < 300
        assert "POST" in answer.headers["allow"]
        assert "webhook-allowed-origin" not in answer.headers
