"""The console's readings: their shape, their limits, and what they say of events in each state."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.console import app
from pgbackend.console.readings import Wanted, page_of
from tests.support.backends import SOON, dead_letters, failed, produce, running, settled
from tests.support.console import Client, served
from tests.support.databases import Sql
from tests.support.events import make_event
from tests.support.polling import eventually

ODD_NAMES = [
    "a/b",
    "100%",
    "%2F",
    "..",
    ".",
    "ü ñ 漢",
    "a?b#c&d=e",
    "a//b/",
    "line\nbreak",
    "pause",
    "x/pause",
    "'\"\\",
    "n" * 1024,
]

FILTERS = [
    ("id=a_1", ["a_1"]),
    ("id=a%25*", ["a%1"]),
    ("id=a_*", ["a_1"]),
    ("id=A_1", []),
    ("id=*", ["none", "binary", "letter", "axx", "a%1", "a_1"]),
    ("type=test&source=test&id=none", ["none"]),
    ("source=tes", []),
    ("subject=x*", []),
    ("search=LETTER", ["letter"]),
    ("search=straße", ["letter"]),
    ("search=strasse", ["letter"]),
    ("search=ärger", ["letter"]),
    ("search=Back%5CS", ["binary"]),
    ("search=%5C", ["binary"]),
    ("search=%25", ["a%1"]),
    ("search=%EF%BF%BD", []),
    ("search=a_&id=a*", ["a_1"]),
]


def at(name: str, rest: str = "") -> str:
    """The path of a subscription, as the page makes it."""
    if name in (".", ".."):
        return f"subscriptions/-{rest}?name={quote(name, safe='')}"
    return f"subscriptions/{quote(name, safe='')}{rest}"


async def refuse(event: Event) -> None:
    raise ValueError(f"no {event.id}")


class TestOverview:
    async def test_of_an_empty_log(self, console: Client) -> None:
        overview = await console.get("overview")

        assert overview["log"]["head"] == "0"
        assert overview["log"]["open_appenders"] == []
        assert (overview["subscriptions"], overview["workers"]) == ([], [])
        assert (overview["schema"], overview["version"], overview["actions"]) == ("pgbackend", "0.1.0", True)
        assert datetime.fromisoformat(overview["now"]).utcoffset() == timedelta(0)

    async def test_of_a_subscription_that_runs_fails_and_is_paused(self, database: str) -> None:
        async with running(database) as backend, served(app(backend)) as console:
            await backend.subscribe("billing", refuse, start="earliest", retry=Retry(attempts=9, delay=600))
            await produce(backend, "1")
            await failed(backend)
            await backend.pause("billing", reason="too many")
            overview = await console.get("overview")

        (subscription,), (worker,) = overview["subscriptions"], overview["workers"]
        assert subscription["state"] == "paused"
        assert subscription["owners"] == [worker["name"]]
        assert subscription["last_error"] == "ValueError: no 1"
        assert (subscription["redeliveries"], subscription["dead_letters"], subscription["skipped"]) == (1, 0, 0)
        assert subscription["paused"].items() >= {"by": "operator", "reason": "too many"}.items()
        assert (worker["is_alive"], worker["shards"], worker["subscriptions"]) == (True, 1, ["billing"])
        assert int(overview["log"]["head"]) == 1

    async def test_an_open_appender_is_named(self, console: Client, sql: Sql) -> None:
        async with sql.transaction():
            await sql.execute("insert into pgbackend.events (id, source, type) values ('1', '/s', 't')")
            (appender,) = (await console.get("overview"))["log"]["open_appenders"]
        assert appender["pid"] == sql.get_server_pid()
        assert appender["gid"] is None

    async def test_all_tabs_share_one_reading(self, console: Client) -> None:
        answers = await asyncio.gather(*[console.get("overview") for _ in range(10)])
        assert len({answer["now"] for answer in answers}) == 1

    @pytest.mark.slow
    async def test_of_a_log_in_another_schema(self, empty_database: str) -> None:
        backend = Backend(empty_database, schema='my "log"')
        await backend.init()
        try:
            await produce(backend, "1")
            async with served(app(backend)) as console:
                assert (await console.get("overview"))["schema"] == 'my "log"'
                assert (await console.get("events/1"))["event"]["attributes"]["id"] == "1"
                assert (await console.get("history"))["minutes"][-1]["events"] == 1
        finally:
            await backend.stop()


class TestHistory:
    async def test_it_has_the_last_hour_by_minutes(self, console: Client, backend: Backend, sql: Sql) -> None:
        await produce(backend, *map(str, range(10)))
        # The first four were recorded 30 minutes ago.
        await sql.execute(
            "update pgbackend.events set recorded_at = recorded_at - interval '30 minutes' where position <= 4"
        )
        minutes = (await console.get("history"))["minutes"]

        starts = [datetime.fromisoformat(minute["minute"]) for minute in minutes]
        assert starts == [starts[0] + timedelta(minutes=number) for number in range(61)]
        assert datetime.now(UTC) - starts[-1] < timedelta(minutes=3)
        assert sum(minute["events"] for minute in minutes) == 10
        assert sum(minute["events"] for minute in minutes[25:35]) == 4
        assert minutes[0].items() >= {"events": 0, "events_per_second": 0.0, "backlog": None}.items()

    async def test_the_backlog_is_what_is_still_owed(self, console: Client, backend: Backend, sql: Sql) -> None:
        await backend.subscribe("billing", print, start="earliest", shards=2)
        await produce(backend, *map(str, range(10)))
        await sql.execute(
            "update pgbackend.events set recorded_at = recorded_at - interval '30 minutes' where position <= 4"
        )
        # Each shard owes 3 and 4, and the first one also 7 to 10.
        await sql.execute(
            "update pgbackend.offsets set position = case when shard = 0 then 6 else 10 end, pending = '{[3,5)}'"
        )
        minutes = (await console.get("history?subscription=billing"))["minutes"]
        lag = (await console.get("overview"))["subscriptions"][0]["lag"]

        assert minutes[0]["backlog"] == 0
        assert {minute["backlog"] for minute in minutes[35:55]} == {2}
        assert minutes[-1]["backlog"] == lag == 6

    async def test_of_an_unknown_subscription_there_is_none(self, console: Client) -> None:
        assert (await console.ask("GET", "api/history?subscription=nope")).status == 404


class TestSubscription:
    async def test_any_name_can_be_asked_for(self, console: Client, backend: Backend) -> None:
        for name in ODD_NAMES:
            await backend.subscribe(name, print)
        for name in ODD_NAMES:
            found = await console.get(at(name))
            assert found["subscription"]["name"] == name
            assert (await console.act(at(name, "/pause"), {"reason": "odd"}))["done"]
            assert (await console.get(at(name)))["subscription"]["paused"]["reason"] == "odd"
            assert len((await console.get(f"history?subscription={quote(name, safe='')}"))["minutes"]) == 61

    async def test_an_unknown_one_is_not_found(self, console: Client) -> None:
        for name in ("nope", "a/b", "%00", "x" * 2000):
            assert (await console.ask("GET", f"api/subscriptions/{name}")).status == 404
            assert (await console.post(f"subscriptions/{name}/pause", {})).status == 404

    async def test_it_has_its_shards_and_its_waiting_events(self, database: str) -> None:
        async with running(database) as backend, served(app(backend)) as console:
            await backend.subscribe("billing", refuse, start="earliest", shards=2, retry=Retry(attempts=9, delay=600))
            await produce(backend, *map(str, range(150)))
            await failed(backend, at_least=10)
            found = await console.get("subscriptions/billing")

        assert [(shard["shard"], shard["shards"]) for shard in found["shards"]] == [(0, 2), (1, 2)]
        assert all(isinstance(shard["position"], str) and isinstance(shard["epoch"], str) for shard in found["shards"])
        assert found["waiting_total"] == found["subscription"]["redeliveries"] >= len(found["waiting"])
        first = found["waiting"][0]
        assert first["error"] == f"ValueError: no {first['id']}"
        assert (first["attempts"], first["given_up"], isinstance(first["position"], str)) == (1, False, True)


class TestEvents:
    @pytest.fixture(autouse=True)
    async def events(self, backend: Backend) -> None:
        await produce(backend, "a_1", "a%1", "axx")
        await backend.produce(make_event("letter", "Die STRASSE und der Ärger"))
        await backend.produce(make_event("binary", b"\xff\0back\\slash"))
        await backend.produce(make_event("none"))

    async def ids(self, console: Client, query: str) -> list[str]:
        return [event["id"] for event in (await console.get(f"events?{quote(query, safe='%=&*')}"))["events"]]

    async def test_the_newest_comes_first_and_pages_follow_each_other(self, console: Client) -> None:
        first = await console.get("events?limit=4")
        second = await console.get(f"events?limit=4&before={first['read_down_to']}")

        assert [event["position"] for event in first["events"] + second["events"]] == ["6", "5", "4", "3", "2", "1"]
        assert (first["head"], first["more"], second["more"]) == ("6", True, False)

    async def test_a_tail_asks_for_what_is_above(self, console: Client) -> None:
        assert await self.ids(console, "after=4") == ["none", "binary"]
        assert await self.ids(console, "after=6") == []
        above = await console.get("events?after=2&limit=2")
        assert ([event["id"] for event in above["events"]], above["more"]) == (["none", "binary"], True)
        above = await console.get("events?after=4&limit=4")
        assert (above["read_down_to"], above["more"]) == ("5", False)

    async def test_a_tail_sees_a_new_event_soon(self, console: Client, backend: Backend) -> None:
        assert await self.ids(console, "after=6") == []
        await produce(backend, "new")

        async def is_there() -> bool:
            return await self.ids(console, "after=6") == ["new"]

        await eventually("the tail has the event", is_there, 5.0)

    async def test_filters_and_search_find_exactly_what_they_say(self, console: Client) -> None:
        for query, expected in FILTERS:
            assert await self.ids(console, query) == expected, query

    async def test_a_preview_is_text_or_nothing(self, console: Client, backend: Backend) -> None:
        await backend.produce(make_event("long", "ü" * 600))
        previews = {event["id"]: event["preview"] for event in (await console.get("events"))["events"]}

        assert previews["long"] == "ü" * 200
        assert previews["binary"] is None
        assert previews["letter"] == "Die STRASSE und der Ärger"


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=501", "before=x", "before=-1", "after=9223372036854775808", "search=%00", "id=" + "x" * 5000],
)
async def test_a_query_that_means_nothing_is_refused(gate: Client, query: str) -> None:
    assert (await gate.ask("GET", f"api/events?{query}")).status == 400


class TestScan:
    """A search reads at most 10,000 events at a time, and says how far it came."""

    async def test_it_stops_after_ten_thousand_events_and_goes_on_from_there(self, console: Client, sql: Sql) -> None:
        await sql.execute(
            "insert into pgbackend.events (id, source, type) "
            "select number::text, '/s', 't' from generate_series(1, 10050) as number"
        )
        first = await console.get("events?id=7")
        second = await console.get(f"events?id=7&before={first['read_down_to']}")

        assert (first["events"], first["read_down_to"], first["more"]) == ([], "51", True)
        assert [event["id"] for event in second["events"]] == ["7"]
        assert second["more"] is False

    def test_it_says_where_the_time_was_up(self) -> None:
        rows: Any = [
            {"position": 9, "is_match": True},
            {"position": 7, "is_match": None},
            {"position": 6, "is_match": None},
        ]
        page = page_of(rows, Wanted(), head=9)
        assert ([row["position"] for row in page.rows], page.read_down_to, page.more) == ([9], 8, True)


class TestEvent:
    async def test_numbers_that_no_browser_can_hold_come_out_as_they_went_in(
        self, console: Client, backend: Backend
    ) -> None:
        text = '{"n": 12345678901234567890.10, "big":1e999, "dup":1, "dup":2,\n "é":"\\u00e9"}'
        event = f'{{"specversion":"1.0","id":"1","source":"/s","type":"t","flag":true,"num":7,"data":{text}}}'
        await backend.produce(event.encode())
        found = (await console.get("events/1"))["event"]

        assert found["data"] == {
            "kind": "json",
            "text": text,
            "base64": None,
            "size": str(len(text.encode())),
            "truncated": False,
        }
        assert found["attributes"].items() >= {"flag": "true", "num": "7", "specversion": "1.0"}.items()
        assert (found["position"], found["redacted"]) == ("1", False)
        assert (await console.ask("GET", "api/events/1/data")).body == text.encode()

    async def test_hostile_texts_are_sent_as_they_are(self, console: Client, backend: Backend) -> None:
        hostile = "<script>alert(1)</script>\u202e\u0007"
        event = {"specversion": "1.0", "id": "1", "source": "/s", "type": "<img src=x>", "data": hostile}
        await backend.produce(json.dumps(event).encode())
        answer = await console.ask("GET", "api/events/1")

        assert answer.headers["content-type"] == "application/json"
        assert answer.json["event"]["data"]["text"] == json.dumps(hostile)
        assert answer.json["event"]["attributes"]["type"] == "<img src=x>"

    async def test_what_is_no_text_is_binary(self, console: Client, backend: Backend) -> None:
        for position, data in enumerate([b"\xff\xfe", b"a\0b", "ü".encode()[:1]], 1):
            await backend.produce(make_event("1", data))
            found = (await console.get(f"events/{position}"))["event"]["data"]
            assert (found["kind"], found["text"], found["size"]) == ("binary", None, str(len(data)))

    async def test_large_data_is_cut_at_a_character_and_can_be_saved_whole(
        self, console: Client, backend: Backend
    ) -> None:
        text = "x" + "ü" * 500_000
        await backend.produce(make_event("1", text))
        found = (await console.get("events/1"))["event"]["data"]
        saved = await console.ask("GET", "api/events/1/data")

        assert (found["kind"], found["truncated"], found["size"]) == ("text", True, "1000001")
        assert found["text"] == text[: (1 << 17)]
        assert saved.body == text.encode()
        assert saved.headers["content-disposition"] == 'attachment; filename="event-1"'
        assert saved.headers["content-type"] == "application/octet-stream"

    async def test_an_event_without_data_has_none(self, console: Client, backend: Backend) -> None:
        await backend.produce(b'{"specversion":"1.0","id":"1","source":"/s","type":"t"}')
        assert (await console.get("events/1"))["event"]["data"]["kind"] == "none"
        assert (await console.ask("GET", "api/events/1/data")).body == b""

    async def test_a_redacted_event_says_so(self, console: Client, backend: Backend) -> None:
        await backend.produce(make_event("1", "secret"))
        await backend.redact(1)
        answer = await console.ask("GET", "api/events/1")

        assert answer.json["event"]["redacted"] is True
        assert b"secret" not in answer.body

    async def test_a_dead_letter_is_shown_when_its_event_is_gone(self, database: str, sql: Sql) -> None:
        async with running(database) as backend, served(app(backend)) as console:
            await backend.subscribe("billing", refuse, start="earliest", retry=Retry(attempts=1))
            await backend.produce(make_event("1", "kept"))
            await dead_letters(backend, 1)
            await sql.execute("delete from pgbackend.events")

            assert (await console.get("events/1"))["event"]["data"]["text"] == "kept"
            assert (await console.ask("GET", "api/events/1/data")).body == b"kept"

    async def test_where_nothing_is_there_is_none(self, console: Client) -> None:
        for position in ("1", "0", "-1", "x", "9223372036854775808", "1" * 400, "%31x"):
            assert (await console.ask("GET", f"api/events/{position}")).status == 404
            assert (await console.ask("GET", f"api/events/{position}/data")).status == 404


class TestOutcomes:
    """The state of one event in each subscription."""

    async def state(self, console: Client, name: str, position: int = 1) -> Any:
        found = (await console.get(f"events/{position}"))["subscriptions"]
        (outcome,) = [one for one in found if one["name"] == name]
        return outcome

    async def test_of_an_event_in_each_state(self, database: str) -> None:
        async def hang(event: Event) -> None:
            if event.id == "1":
                await asyncio.Event().wait()

        async with running(database, drain_timeout=0.1) as backend, served(app(backend)) as console:
            await backend.subscribe("handled", lambda _: None, start="earliest")
            await backend.subscribe("waiting", refuse, start="earliest", retry=Retry(attempts=9, delay=600))
            await backend.subscribe("buried", refuse, start="earliest", retry=Retry(attempts=1))
            await backend.subscribe("hanging", hang, start="earliest")
            await backend.subscribe("paused", print, start="earliest")
            await backend.pause("paused")
            await produce(backend, "1", "2")
            await settled(backend, "handled")
            await failed(backend, 2, "waiting")
            await dead_letters(backend, 2, "buried")

            async def hangs() -> bool:
                return bool((await self.state(console, "hanging"))["state"] == "in flight")

            await eventually("the offset passes the event that hangs", hangs)
            states = {one["name"]: one["state"] for one in (await console.get("events/1"))["subscriptions"]}
            waiting, buried = await self.state(console, "waiting"), await self.state(console, "buried")

        assert states == {
            "handled": "settled",
            "waiting": "waiting",
            "buried": "dead letter",
            "hanging": "in flight",
            "paused": "not read yet",
        }
        assert waiting["attempts"] == 1
        assert [step["what"] for step in waiting["timeline"]] == ["recorded", "attempt failed", "due again"]
        assert waiting["timeline"][-1]["at"] == waiting["due_at"]
        assert waiting["timeline"][1].items() >= {"attempt": 1, "error": "ValueError: no 1"}.items()
        assert buried["letter_id"] is not None
        assert [step["what"] for step in buried["timeline"]] == ["recorded", "attempt failed", "dead letter"]
        moments = [step["at"] for step in buried["timeline"]]
        assert moments == sorted(moments)

    async def test_rows_without_a_history_show_what_is_known(self, backend: Backend, console: Client, sql: Sql) -> None:
        await backend.subscribe("waits", print, start="earliest")
        await backend.subscribe("gave up", print, start="earliest")
        await produce(backend, "1")
        await backend.skip("gave up", 1)
        await sql.execute(
            "insert into pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error) "
            "values ('waits', 1, 1, 3, now(), 'KeyError: x')"
        )
        await sql.execute("update pgbackend.dead_letters set history = '[]', error = 'KeyError: y', attempts = 5")
        waits, gave_up = await self.state(console, "waits"), await self.state(console, "gave up")

        assert [(step["what"], step["attempt"], step["error"]) for step in waits["timeline"][1:]] == [
            ("attempt failed", 3, "KeyError: x"),
            ("due again", None, None),
        ]
        assert [(step["what"], step["attempt"], step["error"]) for step in gave_up["timeline"][1:]] == [
            ("dead letter", 5, "KeyError: y")
        ]

    async def test_a_letter_that_was_skipped_and_sent_again_tells_both(self, backend: Backend, console: Client) -> None:
        await backend.subscribe("billing", print, start="earliest")
        await produce(backend, "1")
        await backend.skip("billing", 1)
        await backend.redeliver(subscription="billing")
        found = await self.state(console, "billing")

        assert [step["what"] for step in found["timeline"]] == ["recorded", "skipped", "redelivered", "due again"]
        assert (found["state"], found["due_at"] is not None) == ("dead letter", True)

    async def test_a_skipped_event_is_on_record(self, backend: Backend, console: Client, sql: Sql) -> None:
        await backend.subscribe("billing", print, start="earliest")
        await produce(backend, "1")
        await sql.execute("insert into pgbackend.skipped (subscription, positions) values ('billing', '[1,2)')")
        assert (await self.state(console, "billing"))["state"] == "skipped"

    async def test_an_open_position_is_open_and_one_that_was_never_owed_is_settled(
        self, backend: Backend, console: Client, sql: Sql
    ) -> None:
        await produce(backend, "1")
        await backend.subscribe("late", print)
        await backend.subscribe("holed", print, start="earliest")
        await sql.execute(
            "update pgbackend.offsets set position = 1, pending = '{[1,2)}', holes = '{[1,2)}' "
            "where subscription = 'holed'"
        )
        assert (await self.state(console, "late"))["state"] == "settled"
        assert (await self.state(console, "holed"))["state"] == "open"

    async def test_an_old_shard_decides_while_the_number_of_shards_changes(
        self, backend: Backend, console: Client, sql: Sql
    ) -> None:
        await backend.subscribe("billing", print, start="earliest")
        await produce(backend, "1", "2")
        await sql.execute(
            "update pgbackend.offsets set position = 1, until = 1; "
            "insert into pgbackend.offsets (subscription, shard, shards, position, epoch) "
            "select 'billing', n, 2, 1, nextval('pgbackend.epochs') from generate_series(0, 1) n"
        )
        assert (await self.state(console, "billing", 1))["state"] == "settled"
        assert (await self.state(console, "billing", 2))["state"] == "not read yet"


class TestDeadLetters:
    @pytest.fixture(autouse=True)
    async def letters(self, database: str) -> None:
        async def fail(event: Event) -> None:
            raise ValueError("odd number" if int(event.id) % 2 else f"even: {event.id}")

        async with running(database) as backend:
            for name in ("billing", "mail"):
                await backend.subscribe(name, fail, start="earliest", retry=Retry(attempts=1))
            await produce(backend, *map(str, range(6)))
            await dead_letters(backend, 12)

    async def test_groups_come_first_and_letters_by_pages(self, console: Client) -> None:
        found = await console.get("dead-letter-groups?subscription=mail")
        odd = next(group for group in found["groups"] if group["error"] == "ValueError: odd number")
        first = await console.get(f"dead-letters?group={odd['name']}&limit=2")
        rest = await console.get(f"dead-letters?group={odd['name']}&after={first['letters'][-1]['id']}")

        assert (found["total"], [group["letters"] for group in found["groups"]]) == (6, [3, 3])
        assert [letter["event_id"] for letter in first["letters"] + rest["letters"]] == ["1", "3", "5"]
        assert (first["more"], rest["more"]) == (True, False)
        letter = first["letters"][0]
        assert letter.items() >= {"subscription": "mail", "error": "ValueError: odd number", "attempts": 1}.items()
        assert (letter["position"], letter["details"], letter["due_at"], letter["group"]) == (
            "2",
            {},
            None,
            odd["name"],
        )

    async def test_the_groups_of_all_subscriptions_are_apart(self, console: Client) -> None:
        found = await console.get("dead-letter-groups")
        assert (found["total"], len(found["groups"])) == (12, 4)
        assert len((await console.get("dead-letters"))["letters"]) == 12


async def test_a_backend_that_is_not_initialized_or_stopped_is_unavailable(database: str) -> None:
    backend = Backend(database, **SOON)
    async with served(app(backend)) as console:
        before = await console.ask("GET", "api/overview")
        await backend.init()
        while_open = await console.ask("GET", "api/overview")
        await backend.stop()
        after = await console.ask("GET", "api/events")

    assert [answer.status for answer in (before, while_open, after)] == [503, 200, 503]
    assert "init()" in before.detail
