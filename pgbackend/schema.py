"""The log's tables: which revision they are at, and bringing them to another one.

`init()` asks `found()`, one query, and either stops there or calls `migrate()`; everything else relies on the tables
being at `head()`. Its promise: a schema is at one revision or another, never between, however many migrate it at once.
The only importer of Alembic, which it hands a configuration made in code: an installed package has no alembic.ini.
"""

import asyncio
import io
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from pgbackend.database import INSUFFICIENT_PRIVILEGE, Connection, translate
from pgbackend.errors import ConfigError, DatabaseError, SchemaError
from pgbackend.sql import load, quote_ident
from pgbackend.sql.statements import SchemaSql

_LOCK_NOT_AVAILABLE = "55P03"

# Alembic's context belongs to the process, so two migrations never run at once in it.
_alembic = threading.Lock()


def head() -> str:
    """The revision that this version of pgbackend works with."""
    return revisions()[-1]


@cache
def _revisions() -> tuple[str, ...]:
    script = ScriptDirectory.from_config(_config("pgbackend"))
    return tuple(revision.revision for revision in reversed(list(script.walk_revisions())))


def revisions() -> list[str]:
    """All revisions, oldest first."""
    return list(_revisions())


async def found(fetch: Callable[[str], Awaitable[Sequence[Any]]], schema: str) -> str | None:
    """The stored revision; None when there is none. `fetch` is `Database.fetch`: one query in its own transaction."""
    try:
        rows = await fetch(load(SchemaSql, "schema", schema=schema).find_revision)
    except SchemaError:
        return None
    return rows[0][0] if rows else None


def check(found: str | None, schema: str) -> None:
    """Raises SchemaError, with the next step, unless `found` is the revision that this version works with."""
    expected = head()
    if found == expected:
        return
    if found is None:
        message = f"Schema {quote_ident(schema)} holds no log. Run `pgbackend migrate`."
    elif found in revisions():
        message = f"Schema {quote_ident(schema)} is at {found}, this version needs {expected}. Run `pgbackend migrate`."
    else:
        message = (
            f"Schema {quote_ident(schema)} is at {found}, this version knows revisions up to {expected}. "
            "This schema was migrated by a newer pgbackend; upgrade it."
        )
    raise SchemaError(message, found=found, expected=expected)


async def migrate(connect: Callable[[], Awaitable[Connection]], schema: str, *, to: str = "head") -> None:
    """Return once the schema is at revision `to`, which may be an older one, or "base" for no tables at all.

    `connect` opens a connection of the caller's kind; it is called in another thread, in an event loop of its own,
    because Alembic is blocking code. Concurrent calls are safe, in one process and from many: one works, the others
    wait and find nothing left to do. Cancelled, it returns when the transaction is rolled back.

    Raises ConfigError for an unknown `to`, SchemaError when a newer pgbackend has migrated this schema, DatabaseError
    when PostgreSQL refuses; nothing was changed then.
    """
    quote_ident(schema)
    _check_known(to)
    run = _Run(connect, schema, to)
    done = asyncio.get_running_loop().run_in_executor(None, run)
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        run.cancel()
        # Shielded again: whoever cancels twice is not told earlier that it is over.
        while not done.done():
            try:
                await asyncio.shield(done)
            except asyncio.CancelledError:
                continue
            except Exception:  # noqa: BLE001 - the caller asked for the end, not for how it ended
                break
        raise


class _Run:
    """One migration in a worker thread, and the way to cancel it from outside."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], schema: str, to: str) -> None:
        self._connect = connect
        self._schema = schema
        self._to = to
        self._guard = threading.Lock()
        self._cancelled = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def __call__(self) -> None:
        # In short waits, because a thread that waits for a lock cannot be cancelled.
        while not _alembic.acquire(timeout=0.05):
            if self._cancelled:
                return
        try:
            asyncio.run(self._supervised())
        except asyncio.CancelledError:
            return
        finally:
            _alembic.release()

    def cancel(self) -> None:
        with self._guard:
            self._cancelled = True
            if self._running is not None:
                loop, task = self._running
                loop.call_soon_threadsafe(task.cancel)

    async def _supervised(self) -> None:
        task = asyncio.create_task(self._migrate(), name="migrate")
        with self._guard:
            if self._cancelled:
                task.cancel()
            self._running = asyncio.get_running_loop(), task
        try:
            await asyncio.wait([task])
        finally:
            # Before the loop closes: nobody may call into a closed one.
            with self._guard:
                self._running = None
        await task

    async def _migrate(self) -> None:
        engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            poolclass=NullPool,
            # Behind a transaction pooler another client's statement may already have a name that is counted up.
            connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: ""},
        )
        try:
            async with engine.connect() as connection:
                await self._step(connection)
        except DBAPIError as error:
            raise self._translated(error) from error
        finally:
            await engine.dispose()

    async def _step(self, connection: AsyncConnection) -> None:
        # Without the lock: it only tells forwards from backwards. What there is to do is read again under the lock.
        sql = load(SchemaSql, "schema", schema=self._schema)
        stored: str | None = None
        if (await connection.exec_driver_sql(sql.has_revision)).scalar_one():
            stored = (await connection.exec_driver_sql(sql.find_revision)).scalar_one_or_none()
        await connection.rollback()
        known = ["base", *revisions()]
        if stored is not None and stored not in known:
            check(stored, self._schema)
        goal = head() if self._to == "head" else self._to
        move = command.downgrade if known.index(goal) < known.index(stored or "base") else command.upgrade
        await connection.run_sync(lambda sync: move(_config(self._schema, connection=sync), goal))

    def _translated(self, error: DBAPIError) -> Exception:
        cause = error.orig.__cause__ if error.orig is not None else None
        translated = translate(cause) if isinstance(cause, Exception) else error
        if isinstance(translated, DatabaseError) and translated.sqlstate == _LOCK_NOT_AVAILABLE:
            return DatabaseError(
                f"Schema {quote_ident(self._schema)} was not migrated, because a transaction keeps one of its tables "
                "locked. End that transaction, or run `pgbackend migrate` again later.",
                sqlstate=_LOCK_NOT_AVAILABLE,
            )
        if isinstance(translated, DatabaseError) and translated.sqlstate == INSUFFICIENT_PRIVILEGE:
            return DatabaseError(
                f"Schema {quote_ident(self._schema)} was not migrated: {cause}. Run `pgbackend migrate` as the owner "
                "of its tables, or where there are none as a role that may create them.",
                sqlstate=INSUFFICIENT_PRIVILEGE,
            )
        return translated


def offline_sql(schema: str, to: str = "head") -> str:
    """The SQL that brings a schema without a log to revision `to`; with `to` = "0002:0001", from the one to the other.

    Raises ConfigError for an unknown revision.
    """
    quote_ident(schema)
    start, _, end = to.rpartition(":")
    start = start or "base"
    _check_known(start)
    _check_known(end)
    known = ["base", *revisions(), "head"]
    move = command.downgrade if known.index(end) < known.index(start) else command.upgrade
    text = io.StringIO()
    with _alembic:
        move(_config(schema, output=text), f"{start}:{end}", sql=True)
    return text.getvalue()


def _check_known(revision: str) -> None:
    if revision not in ("base", "head", *revisions()):
        raise ConfigError(f"There is no revision {revision!r}: expected head, base or one of {', '.join(revisions())}.")


def _config(schema: str, *, output: TextIO | None = None, **attributes: object) -> Config:
    config = Config(output_buffer=output, stdout=io.StringIO(), attributes={"schema": schema, **attributes})
    config.set_main_option("script_location", str(_location()).replace("%", "%%"))
    # Alembic would split the path of the revisions at spaces.
    config.set_main_option("path_separator", "os")
    return config


def _location() -> Path:
    installed = Path(str(files("pgbackend"))) / "_migrations"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "migrations"
