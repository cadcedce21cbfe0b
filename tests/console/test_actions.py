"""What the console does is what it said it would do, and a wrong request does nothing."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pgbackend import Backend, Event, Retry
from pgbackend.console import app
from pgbackend.facts import Recorder
from tests.support.backends import dead_letters, failed, produce, running, settled, status_of
from tests.support.console import PAGE, Client, served
from tests.support.databases import Sql


async def refuse(event: Event) -> None:
    raise ValueError(f"no {event.id}")


class TestSubscriptions:
    @pytest.fixture(autouse=True)
    async def billing(self, backend: Backend) -> None:
        await produce(backend, *map(str, range(10)))
        await backend.subscribe("billing", print, start=4)

    async def position(self, backend: Backend) -> int:
        (shard,) = (await status_of(backend)).shards
        return shard.position

    async def test_pause_and_resume(self, console: Client, backend: Backend) -> None:
        assert (await console.act("subscriptions/billing/pause", {"reason": "ünder repair"}))["count"] is None
        paused = (await status_of(backend)).paused
        assert paused is not None
        assert (paused.by, paused.reason) == ("operator", "ünder repair")

        await console.act("subscriptions/billing/resume", {})
        assert (await status_of(backend)).paused is None

    async def test_the_log_says_what_was_done_and_from_where(self, console: Client) -> None:
        with Recorder() as recorder:
            await console.act("subscriptions/billing/skip", {"position": "7"})
            assert (await console.post("subscriptions/billing/skip", {"position": "99"})).status == 404
        (fact,) = recorder.all("console action")
        assert (fact["request"], fact["client"]) == ("/api/subscriptions/billing/skip", "127.0.0.1")
        assert fact["done"] == "Skipped the event at position 7: it is a dead letter now."

    async def test_the_next_overview_shows_what_was_done(self, console: Client) -> None:
        await console.get("overview")
        await console.act("subscriptions/billing/pause", {})
        assert (await console.get("overview"))["subscriptions"][0]["state"] == "paused"

    @pytest.mark.parametrize(
        ("place", "position", "again", "skipped"),
        [("earliest", 0, 4, 0), ("latest", 10, 0, 6), ("7", 7, 0, 3), ("2", 2, 2, 0)],
    )
    async def test_a_seek_does_what_its_preview_says(
        self, console: Client, backend: Backend, place: str, position: int, again: int, skipped: int
    ) -> None:
        preview = await console.act("preview/seek", {"subscription": "billing", "place": place})
        assert preview == {"position": str(position), "again": again, "skipped": skipped}
        assert await self.position(backend) == 4

        await console.act("subscriptions/billing/seek", {"place": place})
        assert await self.position(backend) == position

    async def test_a_seek_to_a_date(self, console: Client, sql: Sql) -> None:
        await sql.execute(
            "update pgbackend.events set recorded_at = recorded_at - interval '1 hour' where position <= 6"
        )
        place = (datetime.now(UTC) - timedelta(minutes=30)).isoformat().replace("+00:00", "Z")
        preview = await console.act("preview/seek", {"subscription": "billing", "place": place})
        assert (preview["again"], preview["skipped"]) == (0, 2)
        assert (await console.post("subscriptions/billing/seek", {"place": place})).status == 200

    async def test_an_unread_event_is_skipped_and_a_settled_one_is_not(self, console: Client, backend: Backend) -> None:
        assert (await console.act("subscriptions/billing/skip", {"position": "7"}))["count"] == 1
        (letter,) = await dead_letters(backend, 1)
        assert letter.event.position == 7
        again = await console.post("subscriptions/billing/skip", {"position": "7"})
        assert (again.status, "settled" in again.detail) == (409, True)
        assert (await console.post("subscriptions/billing/skip", {"position": "99"})).status == 404
        assert (await console.post("subscriptions/billing/skip", {})).status == 400

    async def test_an_unknown_subscription_is_not_found(self, console: Client) -> None:
        for verb in ("pause", "resume", "retry", "seek", "skip"):
            body = {"seek": {"place": "latest"}, "skip": {"position": "1"}}.get(verb, {})
            assert (await console.post(f"subscriptions/nope/{verb}", body)).status == 404


@pytest.mark.slow
async def test_failed_events_are_retried_one_by_one_or_together(database: str) -> None:
    broken = True

    async def handle(event: Event) -> None:
        if broken:
            raise ValueError("broken")

    async with running(database) as backend, served(app(backend)) as console:
        await backend.subscribe("billing", handle, start="earliest", retry=Retry(attempts=9, delay=3600))
        await produce(backend, "1", "2", "3")
        await failed(backend, 3)
        broken = False

        assert (await console.act("subscriptions/billing/retry", {"position": "1"}))["count"] == 1
        assert (await console.act("subscriptions/billing/retry", {"position": None}))["count"] in (2, 3)
        await settled(backend)


class TestDeadLetters:
    @pytest.fixture
    async def console(self, database: str) -> Any:
        async with running(database) as backend:
            for name in ("billing", "mail"):
                await backend.subscribe(name, refuse, start="earliest", retry=Retry(attempts=1))
            await produce(backend, "1", "a", "b")
            await dead_letters(backend, 6)
        backend = Backend(database)
        await backend.init()
        async with served(app(backend)) as client:
            yield client
        await backend.stop()

    async def groups(self, console: Client) -> dict[str, dict[str, Any]]:
        found = (await console.get("dead-letter-groups"))["groups"]
        return {f"{group['subscription']}: {group['error']}": group for group in found}

    async def test_a_letter_is_sent_again_once(self, console: Client) -> None:
        ids = {"ids": [letter["id"] for letter in (await console.get("dead-letters?limit=2"))["letters"]]}

        assert await console.act("preview/dead-letters", ids) == {"letters": 2, "due": 0}
        assert (await console.act("dead-letters/redeliver", ids))["count"] == 2
        assert await console.act("preview/dead-letters", ids) == {"letters": 2, "due": 2}
        assert (await console.act("dead-letters/redeliver", ids))["count"] == 0
        assert (await console.act("dead-letters/purge", ids))["count"] == 0

    async def test_a_group_and_a_subscription_are_purged_whole(self, console: Client) -> None:
        group = {"group": (await self.groups(console))["billing: ValueError: no 1"]["name"], "subscription": "billing"}

        assert await console.act("preview/dead-letters", group) == {"letters": 1, "due": 0}
        assert (await console.act("dead-letters/purge", group))["count"] == 1
        assert "billing: ValueError: no 1" not in await self.groups(console)
        assert (await console.act("dead-letters/purge", {"subscription": "mail"}))["count"] == 3
        assert (await console.get("dead-letter-groups"))["total"] == 2

    async def test_letters_of_an_unknown_subscription_are_none(self, console: Client) -> None:
        assert await console.act("preview/dead-letters", {"subscription": "nope"}) == {"letters": 0, "due": 0}
        assert (await console.post("dead-letters/purge", {"subscription": "nope"})).status == 404
        assert (await console.act("dead-letters/purge", {"ids": ["99"]}))["count"] == 0


class TestRefusals:
    """A request that is wrong is refused before PostgreSQL is asked."""

    @pytest.mark.parametrize(
        "place",
        ["", "yesterday", "-1", "9223372036854775808", "2026-01-01", "2026-01-01T00:00:00", "\u0661", "1" * 5000],
    )
    async def test_a_place_that_is_none_is_refused(self, gate: Client, place: str) -> None:
        for path, body in (
            ("preview/seek", {"subscription": "billing", "place": place}),
            ("subscriptions/billing/seek", {"place": place}),
        ):
            assert (await gate.post(path, body)).status == 400

    @pytest.mark.parametrize(
        ("verb", "body"),
        [
            ("pause", []),
            ("pause", {"reason": 7}),
            ("pause", {"reason": "x" * 1001}),
            ("pause", {"reason": "a\0b"}),
            ("pause", {"why": "typo"}),
            ("resume", {"reason": "x"}),
            ("retry", {"position": 7}),
            ("retry", {"position": "0"}),
            ("skip", {"position": "seven"}),
            ("seek", {}),
            ("seek", {"place": 7}),
        ],
    )
    async def test_a_body_that_means_nothing_is_refused(self, gate: Client, verb: str, body: object) -> None:
        assert (await gate.post(f"subscriptions/billing/{verb}", body)).status == 400

    @pytest.mark.parametrize(
        ("body", "status"), [(b"{", 400), (b"\xff", 400), (b"[" * 5000, 400), (b" " * 70_000, 413), (b"", 503)]
    )
    async def test_a_body_is_json_of_64_kib_at_most(self, gate: Client, body: bytes, status: int) -> None:
        answer = await gate.ask("POST", "api/subscriptions/billing/resume", headers=PAGE, data=body)
        assert answer.status == status

    async def test_a_large_body_in_pieces_is_refused_while_it_arrives(self, gate: Client) -> None:
        async def endless() -> Any:
            for _ in range(100):
                yield b" " * 1024

        answer = await gate.ask("POST", "api/subscriptions/billing/resume", headers=PAGE, data=endless())
        assert answer.status == 413

    @pytest.mark.parametrize("path", ["preview/dead-letters", "dead-letters/redeliver", "dead-letters/purge"])
    @pytest.mark.parametrize(
        "body", [{}, {"ids": []}, {"ids": [1]}, {"ids": "1"}, {"ids": ["x"]}, {"group": 7}, {"subscription": "\0"}]
    )
    async def test_a_body_that_names_no_letters_is_refused(self, gate: Client, path: str, body: object) -> None:
        assert (await gate.post(path, body)).status == 400
