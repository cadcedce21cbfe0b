"""The application of the plan "log": events of every kind, produced in every way there is."""

import random

from cloudevents.core.v1.event import CloudEvent

from pgbackend.backend import Backend
from pgbackend.torture.applications.application import Application, Connection
from pgbackend.torture.load import SUBSCRIPTIONS

KEYS = 24


def make_event(id_: str, draws: random.Random) -> CloudEvent:
    """An event with a key, a subject or neither."""
    attributes = {"id": id_, "source": "torture", "type": "produced", "datacontenttype": "text/plain"}
    kind = draws.random()
    if kind < 0.85:
        attributes["partitionkey" if kind < 0.7 else "subject"] = f"key-{draws.randrange(KEYS)}"
    return CloudEvent(attributes, "x" * draws.randrange(600))


async def append(backend: Backend, schema: str, id_: str, key: str | None, connection: Connection) -> None:  # noqa: ARG001 - an Append
    """The event is inserted in the connection's transaction, by plain SQL."""
    await connection.execute(
        f"INSERT INTO {schema}.events (id, source, type, partitionkey) VALUES ($1, 'torture', 'inserted', $2)",  # noqa: S608 - our own name
        id_, key, timeout=10,
    )  # fmt: skip


APPLICATION = Application(subscriptions=SUBSCRIPTIONS, make_event=make_event, append=append, appenders=2)
