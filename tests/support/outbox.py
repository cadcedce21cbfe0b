"""A harness for each kind of connection that events can be produced on: the same steps, by its library's own means.

Synchronous connections live in a thread of their own, so that the event loop goes on meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import asyncpg
import django
import django.db
import psycopg
import sqlalchemy
from cloudevents.core.base import BaseCloudEvent
from django.conf import settings
from django.db import transaction
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.utils import ConnectionHandler
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import NullPool

from pgbackend import Backend, outbox

if not settings.configured:
    settings.configure()
    django.setup()


class Client:
    """A connection of one kind. Its methods are all coroutines if `is_async`, else all plain functions."""

    is_async: ClassVar[bool] = False
    errors: ClassVar[tuple[type[Exception], ...]]
    """The library's own errors."""
    conflict: ClassVar[type[Exception]]
    """Its error for a unique violation."""
    reconnects: ClassVar[bool] = False
    """Whether it connects again when it is used after `close()`."""
    connection: Any
    """The connection that events are produced on."""

    def open(self, dsn: str, *, autocommit: bool) -> Any:
        """Connect to the database. `autocommit`: each statement outside a transaction commits."""
        raise NotImplementedError

    def close(self) -> Any:
        raise NotImplementedError

    def begin(self) -> Any:
        raise NotImplementedError

    def commit(self) -> Any:
        raise NotImplementedError

    def rollback(self) -> Any:
        raise NotImplementedError

    def execute(self, statement: str) -> Any:
        raise NotImplementedError

    def savepoint(self) -> Any:
        raise NotImplementedError

    def rollback_to_savepoint(self) -> Any:
        raise NotImplementedError


class Asyncpg(Client):
    is_async = True
    errors = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)
    conflict = asyncpg.UniqueViolationError

    async def open(self, dsn: str, *, autocommit: bool) -> None:  # noqa: ARG002 - it always commits so
        self.connection = await asyncpg.connect(dsn)

    async def close(self) -> None:
        await self.connection.close()

    async def begin(self) -> None:
        self.transactions = [self.connection.transaction()]
        await self.transactions[0].start()

    async def commit(self) -> None:
        await self.transactions.pop().commit()

    async def rollback(self) -> None:
        await self.transactions.pop().rollback()

    async def execute(self, statement: str) -> None:
        await self.connection.execute(statement)

    async def savepoint(self) -> None:
        self.transactions.append(self.connection.transaction())
        await self.transactions[-1].start()

    async def rollback_to_savepoint(self) -> None:
        await self.rollback()


class AsyncpgPool(Asyncpg):
    async def open(self, dsn: str, *, autocommit: bool) -> None:  # noqa: ARG002 - as above
        self.pool = await asyncpg.create_pool(dsn, min_size=1, max_size=1)
        self.connection = await self.pool.acquire()

    async def close(self) -> None:
        await self.pool.release(self.connection)
        await self.pool.close()


class PsycopgAsync(Client):
    is_async = True
    errors = (psycopg.Error,)
    conflict = psycopg.errors.UniqueViolation

    async def open(self, dsn: str, *, autocommit: bool) -> None:
        self.connection = await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit)

    async def close(self) -> None:
        await self.connection.close()

    async def begin(self) -> None:
        """It begins by itself."""

    async def commit(self) -> None:
        await self.connection.commit()

    async def rollback(self) -> None:
        await self.connection.rollback()

    async def execute(self, statement: str) -> None:
        await self.connection.execute(statement)

    async def savepoint(self) -> None:
        self.inner = self.connection.transaction()
        await self.inner.__aenter__()

    async def rollback_to_savepoint(self) -> None:
        await self.inner.__aexit__(psycopg.Rollback, psycopg.Rollback(), None)


class SqlalchemyAsync(Client):
    is_async = True
    errors = (sqlalchemy.exc.SQLAlchemyError,)
    conflict = sqlalchemy.exc.IntegrityError
    driver = "asyncpg"

    async def open(self, dsn: str, *, autocommit: bool) -> None:
        connect: Any = asyncpg.connect if self.driver == "asyncpg" else psycopg.AsyncConnection.connect
        level: Any = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
        self.engine = create_async_engine(
            f"postgresql+{self.driver}://", async_creator=lambda: connect(dsn), poolclass=NullPool, **level
        )
        await self.connect()

    async def connect(self) -> None:
        self.connection = await self.engine.connect()

    async def close(self) -> None:
        await self.connection.close()
        await self.engine.dispose()

    async def begin(self) -> None:
        await self.connection.begin()

    async def commit(self) -> None:
        await self.connection.commit()

    async def rollback(self) -> None:
        await self.connection.rollback()

    async def execute(self, statement: str) -> None:
        await self.connection.execute(text(statement))

    async def savepoint(self) -> None:
        self.inner = await self.connection.begin_nested()

    async def rollback_to_savepoint(self) -> None:
        await self.inner.rollback()


class SqlalchemyAsyncPsycopg(SqlalchemyAsync):
    driver = "psycopg"


class SqlalchemyAsyncSession(SqlalchemyAsync):
    reconnects = True

    async def connect(self) -> None:
        self.connection = AsyncSession(self.engine)


class SqlalchemyAsyncScopedSession(SqlalchemyAsyncSession):
    async def connect(self) -> None:
        task = asyncio.current_task()
        self.connection = async_scoped_session(async_sessionmaker(self.engine), scopefunc=lambda: task)


class Psycopg(Client):
    errors = (psycopg.Error,)
    conflict = psycopg.errors.UniqueViolation

    def open(self, dsn: str, *, autocommit: bool) -> None:
        self.connection = psycopg.connect(dsn, autocommit=autocommit)

    def close(self) -> None:
        self.connection.close()

    def begin(self) -> None:
        """It begins by itself."""

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def execute(self, statement: str) -> None:
        self.connection.execute(statement)

    def savepoint(self) -> None:
        self.inner = self.connection.transaction()
        self.inner.__enter__()

    def rollback_to_savepoint(self) -> None:
        self.inner.__exit__(psycopg.Rollback, psycopg.Rollback(), None)


class Sqlalchemy(Client):
    errors = (sqlalchemy.exc.SQLAlchemyError,)
    conflict = sqlalchemy.exc.IntegrityError

    def open(self, dsn: str, *, autocommit: bool) -> None:
        level: Any = {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
        self.engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool, **level
        )
        self.connect()

    def connect(self) -> None:
        self.connection = self.engine.connect()

    def close(self) -> None:
        self.connection.close()
        self.engine.dispose()

    def begin(self) -> None:
        self.connection.begin()

    def commit(self) -> None:
        self.connection.commit()

    def rollback(self) -> None:
        self.connection.rollback()

    def execute(self, statement: str) -> None:
        self.connection.execute(text(statement))

    def savepoint(self) -> None:
        self.inner = self.connection.begin_nested()

    def rollback_to_savepoint(self) -> None:
        self.inner.rollback()


class SqlalchemySession(Sqlalchemy):
    reconnects = True

    def connect(self) -> None:
        self.connection = Session(self.engine)


class SqlalchemyScopedSession(Sqlalchemy):
    reconnects = True

    def connect(self) -> None:
        self.connection = scoped_session(sessionmaker(self.engine))


class Django(Client):
    reconnects = True
    errors = (django.db.Error,)
    conflict = django.db.IntegrityError

    def open(self, dsn: str, *, autocommit: bool) -> None:  # noqa: ARG002 - Django's default
        given = conninfo_to_dict(dsn)
        names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
        database = {"ENGINE": "django.db.backends.postgresql"} | {
            names[name]: str(value) for name, value in given.items() if name in names
        }
        database["OPTIONS"] = {name: value for name, value in given.items() if name not in names}  # type: ignore[assignment]
        configured = ConnectionHandler({"default": database}).settings["default"]
        django.db.connections["default"] = DatabaseWrapper(configured, "default")
        self.connection = django.db.connection

    def close(self) -> None:
        self.connection.close()

    def begin(self) -> None:
        self.atomic = transaction.atomic()
        self.atomic.__enter__()

    def commit(self) -> None:
        self.atomic.__exit__(None, None, None)

    def rollback(self) -> None:
        transaction.set_rollback(True)
        self.commit()

    def execute(self, statement: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(statement)

    def savepoint(self) -> None:
        self.inner = transaction.savepoint()

    def rollback_to_savepoint(self) -> None:
        transaction.savepoint_rollback(self.inner)


KINDS: dict[str, type[Client]] = {
    "asyncpg": Asyncpg,
    "asyncpg-pool": AsyncpgPool,
    "psycopg-async": PsycopgAsync,
    "sqlalchemy-async": SqlalchemyAsync,
    "sqlalchemy-async-psycopg": SqlalchemyAsyncPsycopg,
    "sqlalchemy-async-session": SqlalchemyAsyncSession,
    "sqlalchemy-async-scoped-session": SqlalchemyAsyncScopedSession,
    "psycopg": Psycopg,
    "sqlalchemy": Sqlalchemy,
    "sqlalchemy-session": SqlalchemySession,
    "sqlalchemy-scoped-session": SqlalchemyScopedSession,
    "django": Django,
}


class Harness:
    """A client whose steps are all coroutines, and which produces events in its transactions."""

    def __init__(self, client: Client, backend: Backend | None, *, schema: str) -> None:
        self.errors, self.conflict = client.errors, client.conflict
        self._client = client
        self._backend = backend
        self._schema = schema
        self._thread = ThreadPoolExecutor(1)

    async def produce(self, *events: BaseCloudEvent | bytes, notify: bool = False) -> None:
        """The events were inserted: one by `produce()`, several or none by `produce_many()`."""
        if len(events) == 1:
            if self._backend is not None:
                await self._backend.produce(events[0], connection=self._client.connection, notify=notify)
            else:
                await self._in_thread(outbox.produce, self._client.connection, events[0], notify=notify)
        else:
            await self.produce_many(events, notify=notify)

    async def produce_many(self, events: Iterable[BaseCloudEvent | bytes], *, notify: bool = False) -> None:
        if self._backend is not None:
            await self._backend.produce_many(events, connection=self._client.connection, notify=notify)
        else:
            await self._in_thread(outbox.produce_many, self._client.connection, events, notify=notify)

    async def begin(self) -> None:
        await self._call("begin")

    async def commit(self) -> None:
        await self._call("commit")

    async def rollback(self) -> None:
        await self._call("rollback")

    async def execute(self, statement: str) -> None:
        await self._call("execute", statement)

    async def savepoint(self) -> None:
        await self._call("savepoint")

    async def rollback_to_savepoint(self) -> None:
        await self._call("rollback_to_savepoint")

    async def open(self, dsn: str, *, autocommit: bool) -> None:
        await self._call("open", dsn, autocommit=autocommit)

    async def close(self) -> None:
        await self._call("close")

    def end(self) -> None:
        self._thread.shutdown()

    async def _call(self, name: str, *args: object, **options: object) -> None:
        method = getattr(self._client, name)
        if self._client.is_async:
            await method(*args, **options)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, lambda: method(*args, **options))

    async def _in_thread(self, call: Any, *args: object, notify: bool) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, lambda: call(*args, schema=self._schema, notify=notify))


@asynccontextmanager
async def opened(
    kind: str, dsn: str, *, log: str | None = None, schema: str = "pgbackend", autocommit: bool = False
) -> AsyncIterator[Harness]:
    """A connection of this kind to the database of `dsn`. `log`: the DSN of the log, if that is another one."""
    client = KINDS[kind]()
    backend = Backend(log or dsn, schema=schema) if client.is_async else None
    if backend is not None:
        await backend.init()
    harness = Harness(client, backend, schema=schema)
    try:
        await harness.open(dsn, autocommit=autocommit)
        try:
            yield harness
        finally:
            with suppress(*client.errors):
                await harness.close()
    finally:
        harness.end()
        if backend is not None:
            await backend.stop()
