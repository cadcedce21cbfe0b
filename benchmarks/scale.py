"""How each cost grows: with the backlog, subscriptions, event size, shards, connections, and an open snapshot.

    python benchmarks/scale.py                          # everything, half an hour; writes docs/scale.md and its plots
    python benchmarks/scale.py --only snapshot --snapshot-seconds 60
    python benchmarks/scale.py --quick                  # small sizes in a minute, to try the command out

Plots need the extra `bench`. Workers and producers are processes of their own. The server is an embedded one with
fsync. A backlog of 10 million events takes 8 GB of disk: if there is less, the largest sizes are left out.
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks.scaling import page
from benchmarks.scaling.runs import QUICK, RUNS, Bench, Sizes
from pgbackend.embedded.server import EmbeddedServer

DOCS = Path(__file__).resolve().parents[1] / "docs"
_EVENT_ON_DISK = 800
"""Bytes of disk that an event of a backlog takes, with its index and the write-ahead log."""
_SPARE = 4 << 30
"""Bytes of disk that stay free."""
_BEGAN = time.monotonic()


async def measure(
    names: list[str], sizes: Sizes, directory: str, keep: Callable[[str, dict[str, Any]], None], *, is_quick: bool
) -> None:
    """Measure these runs on one server. `keep` gets each one's figures at once: the next one may fail."""
    async with EmbeddedServer(directory, settings={"max_connections": "600"}) as server:
        machine = await _machine(server.dsn)
        for name in names:
            bench = await Bench.of(server.dsn, sizes, progress=lambda what, name=name: _say(f"{name}: {what}"))  # type: ignore[misc]  # binds the loop's value
            rows = await RUNS[name](bench)
            keep(name, {"command": _command(), "quick": is_quick, "machine": machine, "rows": rows})


def _say(what: str) -> None:
    print(f"{time.monotonic() - _BEGAN:5.0f} s  {what}", file=sys.stderr, flush=True)


def _command() -> str:
    return " ".join(["python benchmarks/scale.py", *sys.argv[1:]])


async def _machine(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    postgresql = await connection.fetchval("SELECT current_setting('server_version')")
    await connection.close()
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} cores, PostgreSQL {postgresql} with fsync, Python {python} with uvloop"


def fitting(sizes: Sizes, directory: str) -> Sizes:
    """The sizes without the backlogs that the disk has no room for."""
    free = shutil.disk_usage(directory).free - _SPARE
    backlogs = sizes.backlogs
    while len(backlogs) > 2 and sum(backlogs) * _EVENT_ON_DISK > free:
        _say(
            f"The disk has no room for a backlog of {backlogs[-1]:,} events: it is left out. Name another --directory."
        )
        backlogs = backlogs[:-1]
    return replace(sizes, backlogs=backlogs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RUNS, action="append", help="this run; may be repeated")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--snapshot-seconds", type=float, metavar="SECONDS", help="how long the snapshot is open")
    parser.add_argument("--directory", help="where the server keeps its data; default: a temporary directory")
    parser.add_argument("--docs", type=Path, default=DOCS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else Sizes()
    if chosen.snapshot_seconds is not None:
        sizes = replace(sizes, snapshot=chosen.snapshot_seconds)
    kept = chosen.docs / "scale" / "figures.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}

    def keep(name: str, run: dict[str, Any]) -> None:
        figures[name] = run
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(figures, indent=1) + "\n")
        page.write(chosen.docs / "scale.md", kept.parent, figures)

    with tempfile.TemporaryDirectory(dir=chosen.directory, ignore_cleanup_errors=True) as directory:
        sizes = fitting(sizes, directory)
        asyncio.run(measure(chosen.only or list(RUNS), sizes, directory, keep, is_quick=chosen.quick))


if __name__ == "__main__":
    main()
