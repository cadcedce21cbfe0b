"""The run: starts the servers, takes the systems in turns, and collects their figures."""

import os
import platform
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path

from benchmarks.compare.measurements import Figures, Subject, appending, both, latency, reading
from benchmarks.compare.report import Report, Row
from benchmarks.compare.system import CompareError, Server, System
from benchmarks.compare.systems import load

_STEPS: tuple[Callable[[Subject], AsyncIterator[Figures]], ...] = (appending, reading, latency, both)


async def run(names: Sequence[str], *, rounds: int, seconds: float, progress: Callable[[str], None]) -> Report:
    """The figures of these systems. A system that cannot run here is in the report with its reason."""
    rows: dict[str, Row] = {}
    subjects: list[Subject] = []
    machine = _machine()
    async with AsyncExitStack() as stack:
        # On a disk, because /tmp may be in memory, where a commit costs nothing.
        root = tempfile.TemporaryDirectory(prefix="pgbackend-compare-", dir="/var/tmp", ignore_cleanup_errors=True)
        directory = Path(stack.enter_context(root))
        servers: dict[int, str] = {}
        for name in names:
            try:
                system = load(name)
            except CompareError as error:
                rows[name] = Row(name, skipped=f"{error}")
                continue
            if reason := system.server.missing():
                rows[name] = Row(system.title, skipped=reason)
                continue
            if id(system.server) not in servers:
                servers[id(system.server)] = await _start(system.server, directory / f"server{len(servers)}", stack)
            subjects.append(Subject(name, system, servers[id(system.server)], seconds))
            rows[name] = await _row(system, subjects[-1].server)
        for number in range(1, rounds + 1):
            for step in _STEPS:
                for subject in subjects:
                    progress(f"round {number} of {rounds}: {step.__name__}, {subject.name}")
                    await _measure(step, subject, rows[subject.name], number)
    return Report(machine=machine, rounds=rounds, seconds=seconds, rows=rows)


async def _start(server: Server, directory: Path, stack: AsyncExitStack) -> str:
    directory.mkdir()  # noqa: ASYNC240 - nothing is measured now
    return await stack.enter_async_context(server.running(directory))


async def _row(system: System, server: str) -> Row:
    return Row(
        system.title,
        kind=system.kind,
        versions=await system.versions(server),
        durability=system.durability,
        mode=system.mode,
    )


async def _measure(step: Callable[[Subject], AsyncIterator[Figures]], subject: Subject, row: Row, number: int) -> None:
    try:
        async for figures in step(subject):
            for name, figure in figures.items():
                row.figures.setdefault(name, []).append(figure)
    except TimeoutError:
        row.failures.append(f"round {number}, {step.__name__}: it did not end in time")
    except Exception as error:  # noqa: BLE001 - a peer's client may raise anything; the table says what
        row.failures.append(f"round {number}, {step.__name__}: {str(error) or repr(error)}")


def _machine() -> dict[str, str]:
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "processor": f"{os.cpu_count()} × {' '.join(model.split())}",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_version()}, uvloop {version('uvloop')}",
        "load when the run began": ", ".join(f"{load_:.1f}" for load_ in os.getloadavg()),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
