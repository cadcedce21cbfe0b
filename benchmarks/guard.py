"""Does a change make encoding, reading or dispatching slower? Counts instructions: a busy machine does no harm.

    make guard                            # uncommitted changes against HEAD; without any, HEAD against the one before
    make guard ARGS="--against COMMIT"    # the working tree against any commit

Needs valgrind, whose callgrind counts the instructions of the Python process. The PostgreSQL server is a real one and
is not counted. The old commit is checked out into a temporary worktree, and runs this file with the same interpreter.
So scenarios use public names only. A scenario that fails in the old commit is shown as new.

Start-up, imports and a warm-up are not counted. Hash seed and garbage collection are the same each time. A scenario
that takes more than 15 % more instructions is named, and the exit status is 1.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from cloudevents.core.v1.event import CloudEvent

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.15
"""A scenario may take this many times the instructions of the old commit."""
BACKLOG = 20_000
"""Events in the log that the scenarios read."""
_WARM_UP, _READ = 4_000, 10_000
"""Events that a reading scenario reads before it is counted, and while it is."""
_PAGE = 1000
_FUNCTION = "ffi_call"
"""A function of libffi. ctypes calls what is counted through it, and nothing else here uses ctypes."""

Work = Callable[[], int]
"""The work whose instructions are counted. Returns the number of events."""


# The events: about 500 bytes each.

_DATA = {"order": 4711, "lines": [{"article": f"A-{n}", "count": n, "price": n * 1.25} for n in range(8)], "paid": True}
_BODY = json.dumps(_DATA).encode()
_ID = "00000000-0000-4000-8000-{:012}"


def _attributes(number: int) -> dict[str, str]:
    texts = {"source": "/shop/orders", "type": "com.example.order.created", "subject": f"order-{number % 1000}"}
    return {**texts, "id": _ID.format(number)}


def _sdk_event(number: int, data: object) -> CloudEvent:
    attributes = {**_attributes(number), "time": datetime(2025, 1, 1, tzinfo=UTC)}
    return CloudEvent({**attributes, "datacontenttype": "application/json"}, data)  # type: ignore[arg-type]


def _structured(number: int) -> bytes:
    attributes = {**_attributes(number), "time": "2025-01-01T00:00:00Z", "specversion": "1.0"}
    return json.dumps({**attributes, "datacontenttype": "application/json", "data": _DATA}).encode()


def _headers(number: int) -> list[tuple[bytes, bytes]]:
    texts = {**_attributes(number), "time": "2025-01-01T00:00:00Z", "specversion": "1.0"}
    headers = [(f"ce-{name}".encode(), text.encode()) for name, text in texts.items()]
    return [*headers, (b"content-type", b"application/json"), (b"content-length", b"420"), (b"host", b"localhost")]


# The scenarios. Each yields its work after it has warmed up.


@contextmanager
def encode_sdk(data: object) -> Iterator[Work]:
    from pgbackend.codec.sdk import encode  # noqa: PLC0415 - only this scenario fails when an old commit lacks it

    yield _repeat([_sdk_event(n, data) for n in range(1000)], lambda event: encode(event, max_event_bytes=1 << 20))


@contextmanager
def encode_structured() -> Iterator[Work]:
    from pgbackend.codec.wire import parse_structured  # noqa: PLC0415 - as above

    yield _repeat([_structured(n) for n in range(1000)], lambda body: parse_structured(body).row)


@contextmanager
def encode_binary() -> Iterator[Work]:
    from pgbackend.codec.wire import parse_binary  # noqa: PLC0415 - as above

    yield _repeat([_headers(n) for n in range(1000)], lambda headers: parse_binary(headers, _BODY).row)


@contextmanager
def event_of_row() -> Iterator[Work]:
    from pgbackend import Event  # noqa: PLC0415 - as above

    texts = ("/shop/orders", "com.example.order.created", "order-4711", "2025-01-01T00:00:00Z", "application/json")
    rows = [("1.0", _ID.format(n), *texts, None, None, "{}", _BODY, "json") for n in range(1000)]

    def read(row: Any) -> None:
        event = Event(row)
        _ = event.id, event.type, event.get_data()

    yield _repeat(rows, read)


@contextmanager
def read_refused() -> Iterator[Work]:
    """A page from the driver to the subscription, whose filter refuses every event."""
    with _reading({}, is_refused=True) as work:
        yield work


@contextmanager
def dispatch(**options: Any) -> Iterator[Work]:
    """From the driver through feed, window and deliverers to a handler that gets the data, and settled."""
    with _reading(options, is_refused=False) as work:
        yield work


SCENARIOS: dict[str, Callable[[], Any]] = {
    "encode an SDK event, data is a dict": lambda: encode_sdk(_DATA),
    "encode an SDK event, data is bytes": lambda: encode_sdk(_BODY),
    "encode structured JSON": encode_structured,
    "encode binary mode": encode_binary,
    "make an event of a row, get its data": event_of_row,
    "read, refuse by filter": read_refused,
    "read and dispatch": dispatch,
    "read and dispatch by key": lambda: dispatch(order="key"),
}


def _repeat(things: list[Any], step: Callable[[Any], object]) -> Work:
    def work() -> int:
        for thing in things:
            step(thing)
        return len(things)

    work()
    return work


@contextmanager
def _reading(options: dict[str, Any], *, is_refused: bool) -> Iterator[Work]:
    loop = asyncio.new_event_loop()
    seen, wanted = 0, _WARM_UP
    reached = asyncio.Event()

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == wanted:
            reached.set()

    async def handle(event: Any) -> None:
        _ = event.data_bytes
        count()

    def refuse(_: Any) -> bool:
        count()
        return False

    async def until(number: int) -> None:
        nonlocal wanted
        wanted = number
        reached.clear()
        if seen < wanted:
            await reached.wait()

    async def begin(stack: AsyncExitStack) -> None:
        await stack.enter_async_context(_subscribed(handle, filter=refuse if is_refused else None, **options))
        await until(_WARM_UP)

    def work() -> int:
        before = seen
        loop.run_until_complete(until(before + _READ))
        return seen - before

    stack = AsyncExitStack()
    try:
        loop.run_until_complete(begin(stack))
        yield work
        loop.run_until_complete(stack.aclose())
    finally:
        loop.close()


@asynccontextmanager
async def _subscribed(handle: Callable[[Any], Any], **options: Any) -> AsyncIterator[None]:
    from pgbackend import Backend  # noqa: PLC0415 - as above

    # Valgrind makes Python about 50 times slower: what happens by the clock must not happen 50 times as often.
    backend = Backend(os.environ["PGBACKEND_DSN"], poll_interval=3600.0, commit_interval=3600.0, lease_timeout=3600.0)
    async with backend:
        await backend.subscribe("guard", handle, start="earliest", **options)
        yield
        await backend.delete_subscription("guard")


# In a process of its own, with the package of one of the two trees.


async def fill() -> None:
    """Write the log that the scenarios read. Without valgrind."""
    from pgbackend import Backend  # noqa: PLC0415 - as above

    backend = Backend(os.environ["PGBACKEND_DSN"])
    await backend.init()
    for start in range(0, BACKLOG, _PAGE):
        await backend.produce_many([_sdk_event(n, _BODY) for n in range(start, start + _PAGE)])
    await backend.stop()


def run_scenarios(file: Path) -> None:
    """Under valgrind: run each scenario, and write down their events and errors in the order of the counts."""
    results: dict[str, int | str] = {}
    for name, scenario in SCENARIOS.items():
        try:
            with scenario() as work:
                results[name] = _counted(work)
        except Exception as error:  # noqa: BLE001 - any error of an old commit means that it lacks the scenario
            results[name] = f"{type(error).__name__}: {error}"
        file.write_text(json.dumps(results))


def _counted(work: Work) -> int:
    events: list[int] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            events.append(work())
        except Exception as error:  # noqa: BLE001 - raised below: no exception passes through ctypes
            errors.append(error)

    function = ctypes.PYFUNCTYPE(None)(call)
    # Collections count, because events cause them; but each scenario begins with no garbage.
    gc.set_threshold(700, 10, 10)
    gc.collect()
    gc.freeze()
    function()
    gc.unfreeze()
    return events[0] if events else _raise(errors[0])


def _raise(error: Exception) -> int:
    raise error


# The comparison.


async def count(tree: Path, dsn: str, directory: Path) -> dict[str, float | str]:
    """The instructions an event takes in each scenario with the package of this tree, or the error."""
    directory = Path(tempfile.mkdtemp(dir=directory))
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "PGBACKEND_DSN": dsn}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    await _run([sys.executable, __file__, "--fill"], environment)
    results = directory / "results.json"
    callgrind = [
        "valgrind", "--quiet", "--tool=callgrind", f"--callgrind-out-file={directory}/counts",
        f"--toggle-collect={_FUNCTION}", f"--dump-after={_FUNCTION}",
    ]  # fmt: skip
    await _run([*callgrind, sys.executable, __file__, "--count", str(results)], environment)
    counted: dict[str, float | str] = {}
    number = 0
    for name, events in json.loads(results.read_text()).items():
        if isinstance(events, str):
            counted[name] = events
            continue
        number += 1
        counted[name] = _total(directory / f"counts.{number}") / events
    return counted


def _total(file: Path) -> int:
    found = re.search(r"^totals: (\d+)$", file.read_text(), re.MULTILINE) if file.exists() else None
    if found is None or found[1] == "0":
        raise SystemExit(f"callgrind counted nothing: this Python does not call {_FUNCTION} of a shared libffi.")
    return int(found[1])


async def _run(command: list[str], environment: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{out.decode(errors='replace')}")


@asynccontextmanager
async def _databases(directory: str, names: list[str]) -> AsyncIterator[list[str]]:
    from pgbackend.embedded.server import EmbeddedServer  # noqa: PLC0415 - as above

    async with EmbeddedServer(directory, settings={"fsync": "off"}) as server:
        connection = await asyncpg.connect(server.dsn)
        for name in names:
            await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        yield [server.dsn.replace("/postgres?", f"/{name}?") for name in names]


@contextmanager
def _checked_out(commit: str, directory: Path) -> Iterator[Path]:
    _git("worktree", "add", "--quiet", "--detach", str(directory), commit)
    try:
        yield directory
    finally:
        _git("worktree", "remove", "--force", str(directory))


def _git(*arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - our own arguments
        ["git", "-C", str(ROOT), *arguments],  # noqa: S607 - from PATH
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def report(old: dict[str, float | str], new: dict[str, float | str]) -> bool:
    """Print both counts of each scenario. Returns whether none takes too many more."""
    slower = []
    print(f"{'instructions an event':38} {'old':>10} {'new':>10}   change")
    for name, after in new.items():
        before = old[name]
        if isinstance(after, str):
            print(f"{name:38} fails: {after}")
            slower.append(f"{name} fails")
        elif isinstance(before, str):
            print(f"{name:38} {'':10} {after:10,.0f}   new")
        else:
            print(f"{name:38} {before:10,.0f} {after:10,.0f}   {after / before - 1:+.1%}")
            if after > before * LIMIT:
                slower.append(f"{name} takes {after / before - 1:.0%} more instructions")
    for line in slower:
        print(f"{line}.")
    if not slower:
        print(f"Nothing takes more than {LIMIT - 1:.0%} more instructions.")
    return not slower


async def compare(commit: str) -> bool:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with _checked_out(commit, directory / "tree") as tree:
            async with _databases(f"{name}/server", ["old", "new"]) as dsns:
                old, new = await asyncio.gather(count(tree, dsns[0], directory), count(ROOT, dsns[1], directory))
    return report(old, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="the old commit")
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.fill:
        asyncio.run(fill())
    elif chosen.count:
        run_scenarios(chosen.count)
    else:
        if shutil.which("valgrind") is None:
            raise SystemExit("valgrind is not installed. Debian, Ubuntu: apt-get install valgrind")
        commit = chosen.against or (
            "HEAD" if _git("status", "--porcelain", "--", "pgbackend", "migrations") else "HEAD~1"
        )
        print(f"{_git('log', '-1', '--format=%h %s', commit)}: against the working tree", flush=True)
        sys.exit(0 if asyncio.run(compare(commit)) else 1)


if __name__ == "__main__":
    main()
