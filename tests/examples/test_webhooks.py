"""examples/webhooks.py: the broker fans out to two webhooks, tries again, and keeps what is given up."""

import re
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.examples.programs import EXAMPLES, running
from tests.support.databases import Sql
from tests.support.polling import eventually
from tests.support.ports import unasked_port

pytestmark = [pytest.mark.slow, pytest.mark.owner]


def configuration(tmp_path: Path, port: int) -> Path:
    """The example's configuration for a receiver on this port, with shorter waits."""
    file = tmp_path / "webhooks.yaml"
    text = (EXAMPLES / "webhooks.yaml").read_text()
    file.write_text(text.replace(":8888/", f":{port}/").replace("PT1S", "PT0.05S"))
    return file


async def place(url: str, order: int, *, cents: int) -> None:
    """The broker has accepted this order."""
    headers = {
        "ce-specversion": "1.0", "ce-id": str(order), "ce-source": "/shop", "ce-type": "order.placed",
        "ce-cents": str(cents), "content-type": "application/json",
    }  # fmt: skip
    async with aiohttp.ClientSession() as client, client.post(url, headers=headers, json={"order": order}) as response:
        assert response.status == 202


async def dead_letters(*arguments: str, dsn: str) -> list[str]:
    """The ids that `pgbackend dead-letters` prints with these arguments."""
    async with running(sys.executable, "-m", "pgbackend", "dead-letters", *arguments, dsn=dsn) as command:
        assert await command.ended() == 0, command.output
    return re.findall(r"^(\d+) ", command.output, re.MULTILINE)


async def test_each_webhook_gets_its_events_with_its_own_retries(database: str, sql: Sql, tmp_path: Path) -> None:
    port = unasked_port()
    file = configuration(tmp_path, port)
    broker = [sys.executable, "-m", "pgbackend", "serve", "--config", str(file), "--port", "0"]
    async with running(EXAMPLES / "webhooks.py", "--port", str(port), "--", *broker, dsn=database) as program:
        said = await program.says("Try: ")
        (url,) = re.findall(r"Broker takes CloudEvents at (\S+)", said)
        for order, cents in {1: 25_000, 2: 25_000, 3: 25_000, 4: 500}.items():
            await place(url, order, cents=cents)
        for order in (1, 3, 4):
            await program.says(f"204 arrived at /billing (binary): order.placed id={order} ")
        await program.says("204 arrived at /unbilled (binary): order.placed id=2 ")
        for order in (1, 2):
            await program.says(f"204 arrived at /sales (structured): order.placed id={order} ")
        refused = "422 arrived at /sales (structured): order.placed id=3 "
        await program.says(refused)
        letter = await eventually("a dead letter", lambda: sql.fetchrow("SELECT * FROM pgbackend.dead_letters"))
        assert (letter["subscription"], letter["id"], letter["attempts"]) == ("sales", "3", 1)
        assert await dead_letters("list", dsn=database) == [str(letter["letter_id"])]
        await dead_letters("redeliver", str(letter["letter_id"]), dsn=database)
        await program.says(refused, times=2)
        await program.stop()
    answers = Counter(re.findall(r"^(\d+) arrived at (\S+) .* id=(\d) ", program.output, re.MULTILINE))
    assert answers == {
        ("503", "/billing", "1"): 2, ("204", "/billing", "1"): 1,
        ("503", "/billing", "2"): 4, ("204", "/unbilled", "2"): 1,
        ("503", "/billing", "3"): 2, ("204", "/billing", "3"): 1,
        ("503", "/billing", "4"): 2, ("204", "/billing", "4"): 1,
        ("204", "/sales", "1"): 1, ("204", "/sales", "2"): 1, ("422", "/sales", "3"): 2,
    }  # fmt: skip
