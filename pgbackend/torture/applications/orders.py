"""The application of the plan "orders": a shop that inserts an order and its event in the same transaction.

Some of its transactions roll back, as a whole or to a savepoint, and connections are lost at COMMIT. `billing`, which
is transactional, writes a bill for each order, and notes whether it saw the order; `shipping` is a subscription like
any other. No key of these tables is unique, so whatever is there twice can be counted.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from cloudevents.core.v1.event import CloudEvent

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.retry import Retry
from pgbackend.torture.applications.application import AGREEMENT, Application, Connection
from pgbackend.torture.load import Terms

_RETRY = Retry(attempts=15, delay=0.05, max_delay=0.2)
"""A connection that is lost during a transaction costs an attempt. No fault may cost an order all of them."""
_TIMEOUT = 10.0

SUBSCRIPTIONS: dict[str, Terms] = {
    "billing": Terms(order="key", shards=2, concurrency=1, delay=0.01, long=0.3, retry=_RETRY, transactional=True,
                     batches=(20, None, 5)),
    "shipping": Terms(order="none", shards=2, concurrency=8, delay=0.01, long=0.3),
}  # fmt: skip


class Bill(NamedTuple):
    """A bill, as `billing` wrote it."""

    subscription: str
    position: int
    id: str
    ordered: bool
    """Whether the order was there."""


class Order(NamedTuple):
    """An order in the shop's table."""

    id: str


async def place(backend: Backend, schema: str, id_: str, key: str | None, connection: Connection) -> None:
    """The order and its event are in the connection's transaction. Either may come first."""
    number = int(id_.rpartition("-")[2])
    async with asyncio.timeout(_TIMEOUT):
        if number % 2:
            await connection.execute(_ORDER.format(schema=schema), id_)
        if number % 3:
            await backend.produce(_event(id_, key), connection=connection, notify=number % 10 == 0)
        else:
            # As a program in another language does.
            await connection.execute(_EVENT.format(schema=schema), id_, key)
        if not number % 2:
            await connection.execute(_ORDER.format(schema=schema), id_)


def _event(id_: str, key: str | None) -> CloudEvent:
    attributes = {"id": id_, "source": "torture", "type": "ordered"}
    return CloudEvent(attributes if key is None else attributes | {"partitionkey": key}, None)


async def bill(schema: str, name: str, terms: Terms, events: Sequence[Event], connection: Connection) -> None:  # noqa: ARG001 - an Effect
    """Each order has its bill in the connection's transaction."""
    for event in events:
        await connection.execute(_BILL.format(schema=schema), name, event.position, event.id)


_TABLES = """
CREATE TABLE {schema}.torture_orders (id text NOT NULL);
CREATE INDEX ON {schema}.torture_orders (id);
CREATE TABLE {schema}.torture_effects (
    effect bigint GENERATED ALWAYS AS IDENTITY,
    subscription text NOT NULL,
    position bigint NOT NULL,
    id text NOT NULL,
    ordered boolean NOT NULL
);
CREATE INDEX ON {schema}.torture_effects (subscription, position);
"""
_ORDER = "INSERT INTO {schema}.torture_orders (id) VALUES ($1)"
_EVENT = "INSERT INTO {schema}.events (id, source, type, partitionkey) VALUES ($1, 'torture', 'ordered', $2)"
_BILL = """
INSERT INTO {schema}.torture_effects (subscription, position, id, ordered)
VALUES ($1, $2, $3, EXISTS (SELECT FROM {schema}.torture_orders WHERE id = $3))
"""
_MOMENT = f"""
SELECT pairs.what, found, 0::bigint AS wanted
FROM (
    SELECT
        count(*) FILTER (WHERE events.id IS NULL) AS no_event,
        count(*) FILTER (WHERE orders.id IS NULL) AS no_order
    FROM {{schema}}.torture_orders AS orders
    FULL JOIN {{schema}}.events AS events ON events.id = orders.id
) AS counted
CROSS JOIN LATERAL (
    VALUES ('orders_without_event', no_event), ('events_without_order', no_order)
) AS pairs (what, found)
UNION ALL
{AGREEMENT.format(effects="torture_effects", subscriptions="'billing'")}
"""  # noqa: S608 - constants
_RECORDS = {
    "effects": "SELECT subscription, position, id, ordered FROM {schema}.torture_effects ORDER BY effect",
    "orders": "SELECT id FROM {schema}.torture_orders ORDER BY id",
}

APPLICATION = Application(
    subscriptions=SUBSCRIPTIONS, append=place, appenders=6, patience=0.2, effect=bill, tables=_TABLES, moment=_MOMENT,
    records=_RECORDS,
)  # fmt: skip
