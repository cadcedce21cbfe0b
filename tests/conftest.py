"""A real PostgreSQL for the session, a migrated database of its own for each test that asks for one."""

import asyncio
import inspect
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import hypothesis
import pytest

from pgbackend import Backend
from pgbackend.embedded.server import EmbeddedServer
from pgbackend.postgres import connections, schema
from pgbackend.postgres.grants import grants
from pgbackend.postgres.pool import Database
from tests.support.databases import Sql, connected, dsn_of, new_database
from tests.support.memory import memory
from tests.support.pooler import PGBOUNCER, Pooler
from tests.support.programs import VERSIONS, programs

QUICK = 5.0
"""Seconds that a test without the marker `slow` may take."""

# Hypothesis fails examples that take 200 ms, which depends on the machine.
for profile, examples in {"quick": 25, "all": 100}.items():
    hypothesis.settings.register_profile(
        profile, max_examples=examples, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pgbackend")
    group.addoption("--quick", action="store_true", help="without the tests marked slow, and with fewer examples")
    group.addoption("--pg-dsn", help="a PostgreSQL that is already there, as a role that may create databases")
    group.addoption("--pg-version", type=int, choices=VERSIONS, help="major version of PostgreSQL")
    group.addoption(
        "--least-privilege",
        action="store_true",
        help="backends use the log of `database` as a role that has what `pgbackend grants` prints, and no more",
    )
    group.addoption("--pg-bin", type=Path, metavar="DIR", help="programs of another PostgreSQL, in reach of all users")
    group.addoption("--long", action="store_true", help="crashes, outages and load at full length: takes many minutes")
    group.addoption(
        "--pooler", choices=("listen", "poll"),
        help="what is tested reaches the databases through pgbouncer in transaction mode: with a direct listen_dsn, "
        "where it is in the tests' own process, or with polling only",
    )  # fmt: skip
    group.addoption("--cesql-tck", metavar="DIR", help="CloudEvents SQL's conformance suite: a directory of YAML files")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("quick" if config.getoption("--quick") else "all")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of `-n auto`: two more than processors, because tests also wait."""
    return (os.cpu_count() or 1) + 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long: give --long"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skip a test that reads /proc where there is none."""
    try:
        return (yield)
    except FileNotFoundError as error:
        if str(error.filename).startswith("/proc/") and not Path("/proc/self").exists():
            pytest.skip("reads /proc, which only Linux has")
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that are neither quick nor marked `slow`."""
    if terminalreporter.config.getoption("--long"):
        return
    seconds: dict[str, float] = {}
    for report in [report for reports in terminalreporter.stats.values() for report in reports]:
        # A session's fixtures are made in the setup of its first test.
        if isinstance(report, pytest.TestReport) and report.when == "call" and "slow" not in report.keywords:
            seconds[report.nodeid] = report.duration
    if late := [(name, took) for name, took in seconds.items() if took > QUICK]:
        terminalreporter.section(f"took more than {QUICK:g} s: make them quicker, or mark them slow")
        for name, took in sorted(late, key=lambda one: -one[1]):
            terminalreporter.line(f"{took:.1f} s {name}")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the test is to run at full length."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def pg_programs(request: pytest.FixtureRequest) -> Path:
    """Directory of the PostgreSQL that the tests run on."""
    given: Path | None = request.config.getoption("--pg-bin")
    return given or programs(request.config.getoption("--pg-version"))


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """DSN of a maintenance database. Without fsync: a test that crashes the server starts one of its own."""
    given: str | None = request.config.getoption("--pg-dsn")
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="pgbackend-test-", dir=memory(), ignore_cleanup_errors=True) as directory:
        # A fourth of the default for buffers makes connections cheaper, which are new processes.
        settings = {"fsync": "off", "shared_buffers": "32MB", "max_prepared_transactions": "10"}
        running = EmbeddedServer(directory, programs=request.getfixturevalue("pg_programs"), settings=settings)
        yield asyncio.run(running.start())
        asyncio.run(running.stop())


@pytest.fixture(scope="session")
def pooler(request: pytest.FixtureRequest, server: str) -> Iterator[Pooler | None]:
    """With `--pooler`: what stands before the server, but for the tests' own connections."""
    mode: str | None = request.config.getoption("--pooler")
    if mode is None:
        yield None
        return
    if PGBOUNCER is None:
        pytest.exit("--pooler needs pgbouncer (Debian: apt-get install pgbouncer).", returncode=4)
    with Pooler(server) as running, pytest.MonkeyPatch.context() as patch:
        connect, init = asyncpg.connect, Database.__init__

        def connect_directly(dsn: str | None = None, *args: Any, **options: Any) -> Any:
            if dsn is not None and not sys._getframe(1).f_globals["__name__"].startswith("pgbackend."):
                dsn = running.direct(dsn)
            return connect(dsn, *args, **options)

        def listen_directly(self: Database, dsn: str, *, listen_dsn: str | None = None, **options: Any) -> None:
            init(self, dsn, listen_dsn=listen_dsn or running.direct(dsn), **options)

        patch.setattr(asyncpg, "connect", connect_directly)
        if mode == "listen":
            patch.setattr(Database, "__init__", listen_directly)
        yield running


@pytest.fixture
def way(request: pytest.FixtureRequest, pooler: Pooler | None) -> Callable[[str], str]:
    """The DSN to hand to what is tested, for that of a database."""
    if pooler is None or request.node.get_closest_marker("direct"):
        return lambda dsn: dsn
    return pooler.dsn


@pytest.fixture(scope="session")
def role(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """With --least-privilege the name of the role that backends connect as; asyncpg in a test connects as the owner."""
    if not request.config.getoption("--least-privilege"):
        yield None
        return
    connect, owner = asyncpg.connect, urlsplit(request.getfixturevalue("server"))
    name = f"pgbackend_role_{uuid.uuid4().hex[:12]}"

    def connect_as_owner(dsn: str, *args: Any, **kwargs: Any) -> Any:
        parts = urlsplit(dsn)
        if parts.username == name and sys._getframe(1).f_globals["__name__"] != connections.__name__:
            user, at, _ = owner.netloc.rpartition("@")
            dsn = parts._replace(netloc=f"{user}{at}{parts.netloc.rpartition('@')[2]}").geturl()
        return connect(dsn, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncpg, "connect", connect_as_owner)
        yield name


@pytest.fixture(scope="session")
def template(server: str, role: str | None) -> Iterator[str]:
    """Name of a database that was migrated once; copies of it cost less than migrating."""

    async def migrated() -> None:
        async with connected(server) as connection:
            await connection.execute(f'create database "{name}"')
        await schema.migrate(lambda: asyncpg.connect(dsn_of(server, name)), "pgbackend")
        if role is not None:
            async with connected(dsn_of(server, name)) as connection:
                await connection.execute(f"create role {role} login password '{role}'")
                await connection.execute(
                    grants("pgbackend", producers=[role], consumers=[role], readers=[role], operators=[role])
                )

    async def dropped() -> None:
        async with connected(server) as connection:
            await connection.execute(f'drop database if exists "{name}" with (force)')
            if role is not None:
                await connection.execute(f"drop role if exists {role}")

    name = f"pgbackend_template_{uuid.uuid4().hex[:12]}"
    asyncio.run(migrated())
    yield name
    asyncio.run(dropped())


@pytest.fixture
async def database(
    request: pytest.FixtureRequest, server: str, template: str, role: str | None, way: Callable[[str], str]
) -> AsyncIterator[str]:
    """DSN of a migrated, empty log in a database of the test's own."""
    async with new_database(server, template=template) as dsn:
        if role is None or request.node.get_closest_marker("owner"):
            yield way(dsn)
        else:
            parts = urlsplit(dsn)
            yield parts._replace(netloc=f"{role}:{role}@{parts.netloc.rpartition('@')[2]}").geturl()


@pytest.fixture
async def empty_database(server: str, way: Callable[[str], str]) -> AsyncIterator[str]:
    """DSN of a database without a log."""
    async with new_database(server, template="template1") as dsn:
        yield way(dsn)


@pytest.fixture
async def sql(database: str) -> AsyncIterator[Sql]:
    """A connection to `database`, as the owner of the log and past the engine."""
    async with connected(database) as connection:
        yield connection


@pytest.fixture
async def backend(database: str) -> AsyncIterator[Backend]:
    """An initialized backend on a log of its own, stopped at the end; `start()` is the test's."""
    backend = Backend(database)
    await backend.init()
    yield backend
    await backend.stop()


_LEFT_BY_ASYNCPG = "ConnectionDoesNotExistError('connection was closed in the middle of operation')"
"""asyncpg's COPY leaves its future behind when the server ended since the statement before. The call itself raises."""


class _Complaints(logging.Handler):
    """Keeps what asyncio only logs: exceptions that nobody retrieved, callbacks that failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if _LEFT_BY_ASYNCPG not in text:
            self.texts.append(text)


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A task left running or an exception nobody looked at fails the test that caused it."""
    complaints = _Complaints()
    logging.getLogger("asyncio").addHandler(complaints)
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("_no_task_left")
    yield
    logging.getLogger("asyncio").removeHandler(complaints)
    assert not complaints.texts, "asyncio complained:\n" + "\n".join(complaints.texts)


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    left = {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task() and not task.done()}
    assert not left, f"tasks left running: {sorted(task.get_name() for task in left)}"
