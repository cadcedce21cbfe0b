"""Produces events in your own transaction, on your own synchronous connection. For asyncio, `Backend.produce` does it.

    with Session(engine) as session, session.begin():
        session.add(Order(id=17))
        outbox.produce(session, event)

The event appears if and when that transaction commits. No `Backend`, no `init()` and no event loop are needed, only a
log in the connection's database. These connections will do:

- a psycopg 3 `Connection`, from a pool, too;
- an SQLAlchemy `Connection`, `Session` or `scoped_session`, with any driver of PostgreSQL;
- Django's `connection`, inside `transaction.atomic()`.

The transaction stays yours: nothing is committed or rolled back here. As always with these libraries, psycopg and
SQLAlchemy begin a transaction with the first statement. The driver's errors reach you as they are.

The flow: `codec/sdk.py` makes rows, `appends.py` statements, `synchronous.py` or `asynchronous.py` executes them, and
`commits.py` learns when a transaction of this process has ended.
"""

from typing import TYPE_CHECKING

from pgbackend.codec.sdk import encode_many
from pgbackend.outbox.appends import Append
from pgbackend.outbox.synchronous import execute
from pgbackend.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cloudevents.core.base import BaseCloudEvent

__all__ = ["produce", "produce_many"]

_MAX_EVENT_BYTES = Settings().max_event_bytes


def produce(
    connection: object, event: "BaseCloudEvent | bytes", *, schema: str = "pgbackend", notify: bool = False
) -> None:
    """Return once the event was inserted in the connection's transaction. It appears if and when that commits.

    `event`: any SDK event, one that a dispatcher got, or bytes in the JSON format, of at most 1 MiB.
    `schema`: the schema of the log.
    `notify`: consumers find the event at once, by a NOTIFY in the transaction, and not with their next poll
    (`poll_interval`, 1 s). It costs: all commits of the server that notify go one after another, so busy producers
    should do without. Through Django, a NOTIFY follows the commit by itself.

    Raises EventError when it is not a valid CloudEvent or too large, and ConfigError for a connection that is in no
    transaction, or is none that this function takes: nothing was sent, and the transaction can go on. Raises
    SchemaError when the connection's database has no log in `schema`, and any other error as the driver raises it.
    """
    produce_many(connection, (event,), schema=schema, notify=notify)


def produce_many(
    connection: object, events: "Iterable[BaseCloudEvent | bytes]", *, schema: str = "pgbackend", notify: bool = False
) -> None:
    """Return once the events were inserted in the connection's transaction, in their order and by one statement.

    Takes and raises the same as `produce()`. After an error none of them is stored.
    """
    rows, _ = encode_many(list(events), max_event_bytes=_MAX_EVENT_BYTES)
    if rows:
        execute(connection, Append.of(rows, schema=schema, notify=notify))
