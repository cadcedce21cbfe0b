"""An application's parts, as the processes of a run use them. Its statements name the log's schema as {schema}."""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import asyncpg
from cloudevents.core.v1.event import CloudEvent

from pgbackend.backend import Backend
from pgbackend.codec.event import Event
from pgbackend.torture.load import Terms

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # generic in its stubs only

Effect = Callable[[str, str, Terms, Sequence[Event], Connection], Awaitable[None]]
"""The handler of a transactional subscription. Gets the quoted schema and the subscription first."""
MakeEvent = Callable[[str, random.Random], CloudEvent]
"""Makes the event with this id."""
Append = Callable[[Backend, str, str, str | None, Connection], Awaitable[None]]
"""Appends an event in the caller's transaction. Gets the quoted schema, the event's id and its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """Everything in which the run of one plan differs from that of another, except the faults."""

    subscriptions: Mapping[str, Terms]
    make_event: MakeEvent | None = None
    """For `produce()` and `produce_many()`; None if nothing is produced so."""
    callers: int = 3
    """Tasks of each producer that call `produce()` for one event after the other."""
    append: Append | None = None
    """None if nothing is produced in transactions of the producer's own."""
    appenders: int = 0
    """Tasks of each producer that append in their own transactions."""
    patience: float = 0.4
    """Seconds between two events of such a transaction, at most. Some are open for longer than `hole_wait`."""
    effect: Effect | None = None
    tables: str = ""
    """Creates the application's tables."""
    moment: str = ""
    """The condition that must hold at each moment of the run. See moments.py."""
    records: Mapping[str, str] = field(default_factory=dict)
    """By the name of a file: the query of what the verdict needs of the tables."""


AGREEMENT = """
SELECT subscription || ':' || placed.what AS what, found, 0::bigint AS wanted
FROM (
    SELECT
        stored.subscription,
        count(*) FILTER (
            WHERE effects.id IS NOT NULL AND (
                events.position > stored.position OR stored.pending @> events.position
                OR waiting.position IS NOT NULL OR letters.position IS NOT NULL
            )
        ) AS too_many,
        count(*) FILTER (
            WHERE effects.id IS NULL AND NOT (
                events.position > stored.position OR stored.pending @> events.position
                OR waiting.position IS NOT NULL OR letters.position IS NOT NULL
            )
        ) AS too_few
    FROM {{schema}}.offsets AS stored
    JOIN {{schema}}.events AS events
        ON {{schema}}.key_hash(events.partitionkey, events.subject, events.source, events.id) % stored.shards
            = stored.shard
    LEFT JOIN {{schema}}.redeliveries AS waiting
        ON waiting.subscription = stored.subscription AND waiting.position = events.position
    LEFT JOIN {{schema}}.dead_letters AS letters
        ON letters.subscription = stored.subscription AND letters.position = events.position
    LEFT JOIN {{schema}}.{effects} AS effects
        ON effects.subscription = stored.subscription AND effects.position = events.position
    WHERE stored.subscription IN ({subscriptions})
    GROUP BY stored.subscription
) AS counted
CROSS JOIN LATERAL (
    VALUES ('effects_of_unsettled_events', too_many), ('settled_without_effect', too_few)
) AS placed (what, found)
"""
"""Every event has an effect exactly if the offset settles it, and it neither waits nor has a dead letter. In one
statement, so in one snapshot. {effects}: the table of the effects."""
