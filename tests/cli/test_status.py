"""`pgbackend status`."""

import json
import signal

import asyncpg
import pytest
from cloudevents.core.v1.event import CloudEvent

from pgbackend import Backend, Event
from pgbackend.torture.proxy import Proxy
from tests.cli.conftest import Command, Run, Terminal
from tests.support.polling import eventually


async def _ignore(event: Event) -> None: ...


async def test_status_shows_where_the_log_and_its_subscriptions_stand(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore, order="key")
        await backend.unsubscribe("billing")
        await backend.produce(CloudEvent({"type": "t", "source": "/s"}))

    result = await run("status", "--dsn", database)
    assert result.exit_code == 0, result.output
    assert "\nhead       1\n" in result.stdout
    heading, row = result.stdout.partition("SUBSCRIPTION")[2].splitlines()[:2]
    assert heading.split()[:4] == ["ORDER", "SHARDS", "LAG", "BEHIND"]
    assert row.split()[:4] == ["billing", "key", "1", "1"]
    assert row.split()[5] == "s", "seconds"


async def test_status_names_open_appenders(run: Run, database: str) -> None:
    connection = await asyncpg.connect(database, server_settings={"application_name": "slow producer"})
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("insert into pgbackend.events (id, source, type) values ('1', '/s', 't')")
    result = await run("status", "--dsn", database)
    assert "slow producer" in result.stdout
    assert str(connection.get_server_pid()) in result.stdout
    await transaction.rollback()
    await connection.close()


async def test_status_as_json_is_one_object_with_everything(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore)
    found = json.loads((await run("status", "--json", "--dsn", database)).stdout)
    assert found["head"] == 0
    (subscription,) = found["subscriptions"]
    assert subscription["name"] == "billing"
    assert subscription["shards"][0]["position"] == 0


async def test_status_of_a_log_in_use_names_the_owner(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore)

        async def owner() -> str | None:
            return (await backend.status()).subscriptions[0].shards[0].owner_name

        name = await eventually("an owner", owner)
        result = await run("status", "--dsn", database)
    assert name
    assert name in result.stdout
    assert "elsewhere" in result.stdout


async def test_status_as_json_says_how_large_the_log_is(run: Run, database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing", _ignore)
        await backend.produce(CloudEvent({"type": "t", "source": "/s"}))
    found = json.loads((await run("status", "--json", "--dsn", database)).stdout)
    assert found["rate"] == pytest.approx(1 / 60)
    assert found["bytes_on_disk"] > 8192
    assert found["segments"] >= 1
    assert found["subscriptions"][0]["in_flight"] == 0


async def test_json_is_refused_together_with_watch(run: Run, database: str) -> None:
    result = await run("status", "--json", "--watch", "--dsn", database)
    assert result.exit_code == 2
    assert "give it or --watch" in result.stderr


async def test_watch_prints_reports_to_a_pipe_until_a_signal_ends_it(database: str) -> None:
    async with Command("status", "--watch", "0.1", "--dsn", database) as command:
        shown = "".join([await command.line() for _ in range(30)])
        command.send(signal.SIGINT)
        assert await command.ended() == (0, "")
    assert shown.count("\nhead       0\n") >= 2
    assert shown.isascii()
    assert "\x1b" not in shown


@pytest.mark.slow
@pytest.mark.direct
async def test_watch_says_why_there_is_no_status_and_goes_on_when_there_is_one_again(database: str) -> None:
    async with Proxy(database) as proxy, Command("status", "--watch", "0.1", "--dsn", proxy.dsn) as command:

        async def printed(text: str) -> None:
            while text not in await command.line():
                pass

        await printed("retention")
        proxy.cut()
        await printed("PostgreSQL")
        proxy.restore()
        await printed("retention")
        command.send(signal.SIGTERM)
        assert (await command.ended())[0] == 0


async def test_watch_leaves_a_terminal_as_it_was(database: str) -> None:
    """It shows the log on a screen of its own, with the cursor hidden, and takes both back at Ctrl-C."""
    async with Terminal("status", "--watch", "0.1", "--dsn", database) as terminal:
        await eventually("two reports are shown", lambda: terminal.output.count("segments") >= 2)
        terminal.write(b"\x03")
        assert await terminal.ended() == 0
    output = terminal.output
    assert output.rindex("\x1b[?25l") < output.rindex("\x1b[?25h")
    assert output.index("\x1b[?1049h") < output.index("segments") < output.rindex("\x1b[?1049l")


async def test_status_on_a_terminal_ends_with_the_report(database: str) -> None:
    async with Backend(database) as backend:
        await backend.subscribe("billing\x1b[2J", _ignore)
    async with Terminal("status", "--dsn", database) as terminal:
        assert await terminal.ended() == 0
    assert "billing\\x1b[2J" in terminal.output
    assert "no room for" in terminal.output, "a terminal of 80 columns"
