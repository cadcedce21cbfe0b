"""A broker whose configuration changes five times a second under load: nothing is lost, repeated or reordered."""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import asyncpg
import pytest
from aiohttp import web

from tests.serve.support.broker import BATCH, envelope
from tests.serve.support.process import Process, running
from tests.serve.support.target import Request, Target
from tests.support.polling import eventually

PERMANENT = ("none", "key", "strict", "altered")
FILTERS: list[list[dict[str, Any]]] = [
    [],
    [{"prefix": {"source": "/shop"}}],
    [{"not": {"exact": {"type": "never"}}}, {"suffix": {"type": "der"}}],
    [{"any": [{"exact": {"type": "never"}}, {"cesql": "type = 'order' AND EXISTS partitionkey"}]}],
]
"""All of them let everything through, each in its own way."""
PACE = 0.2
"""Seconds from one change to the next."""


def of(numbers: int, *choices: Any) -> Any:
    return choices[numbers % len(choices)]


def configuration(version: int, url: str) -> str:
    """A file in which everything that can change about a trigger has changed since the version before."""

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


class Mounted:
    """A configuration file as Kubernetes mounts it, behind two links, and every way to change it."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "broker.yaml"
        self._directory = directory
        self._versions = count()
        self.swap("{}")
        self.file.symlink_to("..data/broker.yaml")

    def write(self, text: str) -> None:
        """In place."""
        self.file.write_text(text)

    def rename(self, text: str) -> None:
        """Over the file."""
        new = self._directory / "..data" / "new"
        new.write_text(text)
        new.rename(self._directory / "..data" / "broker.yaml")

    def swap(self, text: str) -> None:
        """The directory in which it is, for another one."""
        version = self._directory / f"..{next(self._versions)}"
        version.mkdir()
        (version / "broker.yaml").write_text(text)
        link = self._directory / "..new"
        link.symlink_to(version.name)
        link.rename(self._directory / "..data")

    def remove(self) -> None:
        (self._directory / "..data" / "broker.yaml").unlink()


async def change_for(seconds: float, mounted: Mounted, url: str, in_force: Callable[[int], Awaitable[None]]) -> int:
    """How many versions there were, one each 200 ms; in between there are files that are not valid, and none at all.

    Each eighth stays until it is in force: a busy machine may see none that stands still for the moment it takes.
    """
    end = monotonic() + seconds
    ways: list[Callable[[str], None]] = [mounted.write, mounted.rename, mounted.swap]
    for version in count(1):
        if monotonic() > end:
            return version - 1
        if version % 5 == 0:
            of(version, mounted.write, mounted.swap)(
                of(version, "", "triggers: [", '{"triggers": {"none": {"url": 1}}}')
            )
            await asyncio.sleep(of(version, PACE, PACE / 4))
        if version % 7 == 0:
            mounted.remove()
            await asyncio.sleep(PACE / 4)
        of(version, *ways)(configuration(version, url))
        if version % 8:
            await asyncio.sleep(PACE)
        else:
            await in_force(version)
    raise AssertionError


async def produce(url: str, name: str, stop: asyncio.Event, produced: list[str]) -> None:
    """Events one by one and in batches, some 50 a second, until told to stop."""
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
    """The ids that each path of a target has taken, in order. Each 20th event fails at its first attempt."""

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
        """Return once events came as it says, of three triggers that it does not create or alter."""

        async def all_came() -> bool:
            return all(str(version) in self.versions[name] for name in PERMANENT[:3])

        await eventually(f"version {version} is in force", all_came, 60.0)


async def listen(serve: Process) -> None:
    """What the process says must be read, or it waits."""
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
    mounted = Mounted(tmp_path)
    mounted.write(configuration(0, target.url))
    async with running("--dsn", database, "--port", "0", "--config", str(mounted.file)) as serve:
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
    connection = await asyncpg.connect(dsn)
    try:
        return [
            str(record["id"]) for record in await connection.fetch("select id from pgbackend.events order by position")
        ]
    finally:
        await connection.close()
