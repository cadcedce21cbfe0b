"""A configuration that changes five times a second under load loses, repeats and reorders nothing."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.serve.support.broker import BATCH, envelope
from tests.serve.support.mounted import Mounted
from tests.serve.support.process import Process, running
from tests.serve.support.target import Request, Target
from tests.support.databases import query_rows
from tests.support.polling import eventually

PERMANENT = ("none", "key", "strict", "altered")
FILTERS: list[list[dict[str, Any]]] = [
    [],
    [{"prefix": {"source": "/shop"}}],
    [{"not": {"exact": {"type": "never"}}}, {"suffix": {"type": "der"}}],
    [{"any": [{"exact": {"type": "never"}}, {"cesql": "type = 'order' AND EXISTS partitionkey"}]}],
]
"""Different filters that all pass every event."""
PACE = 0.2
"""Seconds between two changes."""


def of(numbers: int, *choices: Any) -> Any:
    return choices[numbers % len(choices)]


def configuration(version: int, url: str) -> str:
    """A file in which everything that may change differs from the version before."""

    def trigger(name: str, order: str) -> dict[str, Any]:
        turn = version + len(name)
        return {
            "filters": FILTERS[turn % len(FILTERS)],
            "target": {
                "url": f"{url}{name}",
                "headers": {"X-Version": version, f"X-{turn % 3}": "y"},
                "mode": of(turn, "binary", "structured"),
            },
            "deliveryOptions": {
                "retry": 5 + turn % 4,
                "backoffPolicy": of(turn, "constant", "linear", "exponential"),
                "backoffDelay": of(turn, "PT0.01S", "PT0.02S"),
                "backoffMax": "PT0.5S",
                "timeout": of(turn, "PT60S", "PT61S"),
            },
            "order": order,
            "concurrency": of(turn, 1, 2, 8, 64),
        }

    triggers = {name: trigger(name, name) for name in PERMANENT[:3]}
    triggers["altered"] = trigger("altered", of(version // 8, "none", "strict", "key"))
    triggers |= {f"t{bit}": trigger(f"t{bit}", "none") for bit in range(3) if version >> bit & 1}
    return json.dumps({"triggers": triggers})


async def change_for(seconds: float, mounted: Mounted, url: str, in_force: Callable[[int], Awaitable[None]]) -> int:
    """Write a version each 200 ms, and invalid or no files in between; return the number of versions.

    Each eighth version stays until it is in force: a busy machine may not see any that holds still long enough.
    """

    def write(text: str) -> None:
        mounted.path("broker").write_text(text)

    def rename_over(text: str) -> None:
        mounted.rename_over("broker", text)

    def swap(text: str) -> None:
        mounted.swap(broker=text)

    end = monotonic() + seconds
    for version in count(1):
        if monotonic() > end:
            return version - 1
        if version % 5 == 0:
            of(version, write, swap)(of(version, "", "triggers: [", '{"triggers": {"none": {"url": 1}}}'))
            await asyncio.sleep(of(version, PACE, PACE / 4))
        if version % 7 == 0:
            mounted.remove("broker")
            await asyncio.sleep(PACE / 4)
        of(version, write, rename_over, swap)(configuration(version, url))
        if version % 8:
            await asyncio.sleep(PACE)
        else:
            await in_force(version)
    raise AssertionError


async def produce(url: str, name: str, stop: asyncio.Event, produced: list[str]) -> None:
    """Produce some 50 events a second until `stop` is set."""
    numbers = count()
    async with aiohttp.ClientSession() as client:
        while not stop.is_set():
            ids = [f"{name}-{next(numbers)}" for _ in range(4)]
            bodies = [envelope(id_, partitionkey=str(hash(id_) % 16)) for id_ in ids]
            async with client.post(url, data=b"[%b]" % b",".join(bodies), headers=BATCH) as answer:
                assert answer.status == 202
            produced += ids
            await asyncio.sleep(0.08)


class Arrivals:
    """The ids that arrived at each path of a target, in order. Each 20th event fails at its first attempt."""

    def __init__(self) -> None:
        self.taken: defaultdict[str, list[str]] = defaultdict(list)
        self.versions: defaultdict[str, set[str]] = defaultdict(set)

    def answer(self, request: Request) -> web.Response:
        name, id_ = request.path.strip("/"), request.event().id
        if request.header("pgbackend-attempt") == "1" and int(id_.rpartition("-")[2]) % 20 == 0:
            return web.Response(status=503)
        self.taken[name].append(id_)
        self.versions[name].add(request.header("x-version") or "")
        return web.Response(status=204)

    async def in_version(self, version: int) -> None:
        """Return once events have arrived from the three permanent triggers in this version."""

        async def all_came() -> bool:
            return all(str(version) in self.versions[name] for name in PERMANENT[:3])

        await eventually(f"version {version} is in force", all_came, 60.0)


async def listen(serve: Process) -> None:
    """Read standard error, which would block the process when its pipe is full."""
    assert serve.process.stderr
    while await serve.process.stderr.readline():
        pass


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_reload_every_200_ms_under_load_loses_repeats_and_reorders_nothing(
    database: str, target: Target, tmp_path: Path, long: bool
) -> None:
    seconds = 30.0 if long else 6.0
    arrivals = Arrivals()
    target.answer = arrivals.answer
    mounted = Mounted(tmp_path / "etc", broker=configuration(0, target.url))
    async with running("--dsn", database, "--port", "0", "--config", str(mounted.path("broker"))) as serve:
        url = await serve.listening()
        listening = asyncio.create_task(listen(serve))
        produced: list[str] = []
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(produce(url, f"p{number}", stop, produced))
            versions = await change_for(seconds, mounted, target.url, arrivals.in_version)
            stop.set()

        async def all_arrived() -> bool:
            return all(len(set(arrivals.taken[name])) >= len(produced) for name in PERMANENT)

        try:
            await eventually("every event at every permanent trigger", all_arrived, 120.0)
        finally:
            found = {name: len(ids) for name, ids in sorted(arrivals.taken.items())}
            seen = {name: len(of_it) for name, of_it in sorted(arrivals.versions.items())}
            print(f"{len(produced)} produced; {versions} versions in {seconds:g} s; arrived {found}; versions {seen}")  # noqa: T201
        serve.process.terminate()
        assert await serve.ended() == 0
        await listening
    log = await in_log_order(database)
    assert sorted(log) == sorted(produced)
    for name, ids in arrivals.taken.items():
        assert not {id_: times for id_, times in Counter(ids).items() if times > 1}, f"{name} got events twice"
    for name in PERMANENT:
        assert set(arrivals.taken[name]) == set(produced), f"{name} lost events"
    assert arrivals.taken["strict"] == log
    for key in range(16):
        assert [id_ for id_ in arrivals.taken["key"] if hash(id_) % 16 == key] == [
            id_ for id_ in log if hash(id_) % 16 == key
        ]


async def in_log_order(dsn: str) -> list[str]:
    return [str(id_) for (id_,) in await query_rows(dsn, "SELECT id FROM pgbackend.events ORDER BY position")]
