"""A shop's log after a bad hour: 200 subscriptions, 10,000 dead letters, an hour of events, and hostile content.

The rows are written by SQL, because the engine would need minutes to let 10,000 events fail. They are rows as the
engine writes them, and hostile events are stored as a producer in plain SQL may store them. The promise: every call
makes the same world, but for times, which count from now.

    python -m tests.console.world    runs it on an embedded PostgreSQL, with the console on port 8080
"""

import asyncio
import json
import math
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count

from pgbackend import Backend
from pgbackend.embedded.server import EmbeddedServer
from tests.serve.support.process import running
from tests.support.databases import Sql, connected

SUBSCRIPTIONS = 200
LETTERS = 10_000
MINUTES = 62
"""The log begins so long ago: a chart of an hour has no empty end."""

NUMBER = "12345678901234567890.10"
"""A number that JavaScript cannot hold."""
SCRIPT = "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 2'>"
OVERRIDE = "invoice\u202efdp.exe\u202c"
"""A right-to-left override, which shows `invoiceexe.pdf` where nobody isolates it."""


# ── the subscriptions ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A stored subscription, and where it stands."""

    name: str
    order: str = "none"
    shards: int = 1
    worker: str | None = "jobs-1:1207"
    """The worker that runs it."""
    behind: int = 0
    """The positions between its offset and the head."""
    in_flight: int = 0
    waiting: int = 0
    """The events that wait to be tried again."""
    error: str = ""
    paused_by: str | None = None
    pause_reason: str = ""
    is_complete: bool = False


SERVICES = (
    Subscription(name="billing", order="key", shards=4, worker="web-1:412", behind=42, in_flight=12),
    Subscription(
        name="shipping", worker="web-1:412", behind=318, in_flight=64, waiting=37,
        error="TimeoutError: https://carrier.example/labels did not answer within 30 s",
    ),
    Subscription(name="mail", worker="web-2:388", behind=3, in_flight=3),
    Subscription(name="search-index", order="key", shards=8, worker="web-2:388", behind=120, in_flight=16),
    Subscription(name="audit-trail", order="strict", worker="jobs-1:1207"),
    Subscription(name="analytics", worker=None, behind=9_480),
    Subscription(
        name="fraud-check", worker="jobs-1:1207", behind=2_210, paused_by="operator",
        pause_reason="The model is being retrained until noon.",
    ),
    Subscription(
        name="crm-sync", worker="jobs-1:1207", behind=5_120, paused_by="dispatcher",
        pause_reason="HTTP 410 from https://crm.example/hooks/orders: the hook is gone",
    ),
    Subscription(
        name="invoices", order="key", shards=2, worker="web-1:412", behind=88, waiting=9,
        error='PostgresError: duplicate key value violates unique constraint "invoices_number_key"',
    ),
    Subscription(name="migration-2026-10", worker=None, is_complete=True),
    Subscription(name="loyalty", worker="web-2:388", behind=1),
    Subscription(name="push-notifications", worker="web-2:388", behind=17, in_flight=17),
    Subscription(name="returns", worker="jobs-1:1207"),
    Subscription(name="warehouse", order="key", shards=2, worker="jobs-1:1207", behind=5),
)  # fmt: skip

HOSTILE_SUBSCRIPTIONS = (
    Subscription(name=f"<b>bold</b> {SCRIPT}", worker=None, behind=7, waiting=1, error=f"ValueError: {SCRIPT}"),
    Subscription(name=OVERRIDE, worker=None, behind=3),
    Subscription(name="a/b%2Fc?d=e&f#g", worker=None, behind=2),
    Subscription(name="..", worker=None, behind=1),
    Subscription(name="a name that goes on " * 12 + "and ends here", worker=None, behind=11),
    Subscription(name="supercalifragilistic" * 10, worker=None, behind=13),
    Subscription(
        name="Ünïcödé ☃ 納品書", paused_by="operator", pause_reason=f"{OVERRIDE} {SCRIPT}", worker=None, behind=4
    ),
)


def subscriptions() -> list[Subscription]:
    """All of them, by name."""
    named = [*SERVICES, *HOSTILE_SUBSCRIPTIONS]
    tenants = [_tenant(number) for number in range(1, SUBSCRIPTIONS - len(named) + 1)]
    return sorted([*named, *tenants], key=lambda one: one.name)


def _tenant(number: int) -> Subscription:
    worker = ("jobs-1:1207", "web-1:412", "web-2:388")[number % 3]
    plain = Subscription(name=f"tenant-{number:03}.orders", worker=worker, behind=number * 7 % 13)
    if number % 29 == 0:
        return replace(plain, paused_by="operator", pause_reason="The customer asked for it.", behind=number * 11)
    if number % 23 == 0:
        return replace(plain, worker=None, behind=number * 31)
    if number % 19 == 0:
        host = f"tenant-{number:03}.example"
        return replace(plain, waiting=number % 7 + 1, error=f"HTTP 503 from https://{host}/hooks/orders")
    return plain


# ── the dead letters ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Dead letters of one subscription that failed alike. `#` in the error is a number of the event's own."""

    subscription: str
    letters: int
    error: str
    attempts: int = 5


GROUPS = (
    Group(subscription="shipping", letters=4_120, error="TimeoutError: no label for order # within 30 s"),
    Group(subscription="shipping", letters=1_730, error="HTTP 503 from https://carrier.example/labels/#"),
    Group(subscription="billing", letters=1_204, error="CardDeclined: payment # was refused by the bank"),
    Group(subscription="invoices", letters=902, error="ValueError: order # has no tax id", attempts=1),
    Group(subscription="crm-sync", letters=640, error="HTTP 410 from https://crm.example/hooks/orders"),
    Group(subscription="search-index", letters=511, error="IndexFull: shard 3 refused document #"),
    Group(subscription="mail", letters=388, error="SMTPRecipientsRefused: 550 no such user (message #)"),
    Group(subscription="push-notifications", letters=250, error="DeviceGone: token # is not registered", attempts=1),
    Group(subscription="warehouse", letters=120, error="KeyError: 'sku-#'"),
    Group(subscription="returns", letters=96, error=f"ValueError: {SCRIPT} in return #"),
    Group(subscription="loyalty", letters=27, error=f"FileNotFoundError: {OVERRIDE} of member #"),
    Group(subscription=HOSTILE_SUBSCRIPTIONS[0].name, letters=12, error="Error: " + "a long story " * 80 + "#"),
)


# ── hostile events ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileEvent:
    """An event that a console must show, and that must do nothing. Its id names it."""

    id: str
    data: bytes
    datacontenttype: str | None = "application/json"
    source: str = "/shop/orders"
    type: str = "com.example.hostile"
    subject: str | None = None
    dataschema: str | None = None
    partitionkey: str | None = None
    extensions: str = "{}"


_FORGED = json.dumps({"note": SCRIPT, "href": "javascript:window.__pwned = 3", "bidi": OVERRIDE})

HOSTILE_EVENTS = (
    HostileEvent(
        id=f"every-attribute {SCRIPT}", data=_FORGED.encode(), datacontenttype=f"application/json; x={SCRIPT}",
        source=f"javascript:window.__pwned = 4//{SCRIPT}", type=SCRIPT, subject=SCRIPT,
        dataschema="javascript:window.__pwned = 5", partitionkey=SCRIPT, extensions=_FORGED,
    ),
    HostileEvent(id="html", data=f"<!doctype html><body>{SCRIPT}".encode(), datacontenttype="text/html"),
    HostileEvent(
        id="svg", datacontenttype="image/svg+xml",
        data=b"<svg xmlns='http://www.w3.org/2000/svg' onload='window.__pwned = 6'><script>window.__pwned = 7</script>",
    ),
    HostileEvent(
        id="bidi", data=json.dumps({"file": OVERRIDE, "isolates": "\u2067\u2066"}, ensure_ascii=False).encode(),
        subject=OVERRIDE, partitionkey="\u200f\u200b\ufeff",
    ),
    HostileEvent(
        id="control-characters", data=b"\x1b[31mred\x1b[0m\x07\x00\x08end", datacontenttype="text/plain",
        subject="two\nlines\tand a bell \x07",
    ),
    HostileEvent(id="invalid-utf-8", data=b'{"name": "caf\xe9 \xff\xfe\xc0\x80"}'),
    HostileEvent(id="binary", data=bytes(range(256)) * 8, datacontenttype="application/octet-stream"),
    HostileEvent(
        id="numbers",
        data=f'{{"total":{NUMBER},"id":9007199254740993,"small":1e-400,"zero":-0.0,"same":1.0,"same":1.00}}'.encode(),
    ),
    HostileEvent(id="prototype", data=b'{"__proto__":{"polluted":true},"constructor":{"prototype":{"polluted":true}}}'),
    HostileEvent(id="deep", data=b"[" * 20_000 + b"]" * 20_000),
    HostileEvent(id="not-json", data=b'{"open": [1, 2, "no end'),
    HostileEvent(id="one-mebibyte", data=b'{"text":"' + b"<script>x</script>" * 58_000 + b'"}'),
    HostileEvent(id="many-members", data=json.dumps({f"member-{n}": [n, str(n)] for n in range(12_000)}).encode()),
    HostileEvent(id="one-line", data=b"x" * 200_000, datacontenttype="text/plain", subject="y" * 2_000),
    HostileEvent(id="no-data", data=b"", datacontenttype=None),
)  # fmt: skip


# ── filling the log ───────────────────────────────────────────────────────────────────────────────────────────────────


async def populate(dsn: str) -> None:
    """Return once the migrated, empty log at `dsn` is this world. `dsn` is that of the log's owner."""
    async with connected(dsn) as connection, connection.transaction():
        await _append(connection)
        await _append_hostile(connection)
        head: int = await connection.fetchval("SELECT max(position) FROM pgbackend.events")
        workers = await _register_workers(connection)
        for one in subscriptions():
            await _subscribe(connection, one, head=head, worker=workers.get(one.worker or ""))
        for group in GROUPS:
            await _bury(connection, group)
    async with connected(dsn) as connection:
        await connection.execute("ANALYZE")


async def find_hostile(dsn: str) -> dict[str, int]:
    """The position of each hostile event, by the first word of its id."""
    async with connected(dsn) as connection:
        rows = await connection.fetch(
            "SELECT split_part(id, ' ', 1) AS id, position FROM pgbackend.events WHERE id = ANY ($1)",
            [event.id for event in HOSTILE_EVENTS],
        )
    return {row["id"]: row["position"] for row in rows}


_APPEND = """
    INSERT INTO pgbackend.events (
        recorded_at, id, source, type, subject, time, datacontenttype, partitionkey, extensions, data
    )
    SELECT
        made.at, made.id, made.source, made.type, 'order/' || made.number,
        to_char(made.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
        'application/json', 'customer-' || made.number % 997, ('{"traceparent":"00-' || md5(made.id) || '-01"}')::json,
        convert_to(
            '{"order":' || made.number || ',"customer":"customer-' || made.number % 997
            || '","total":' || made.number % 500 || '.' || lpad((made.number % 100)::text, 2, '0')
            || ',"currency":"EUR","items":[{"sku":"sku-' || made.number % 89 || '","count":' || 1 + made.number % 3
            || '}]}', 'UTF8'
        )
    FROM (
        SELECT
            given.at, given.number, given.number || '-' || substr(md5(given.number::text), 1, 12) AS id,
            (ARRAY['/shop/orders', '/shop/payments', '/warehouse/berlin'])[1 + given.number % 3] AS source,
            'com.example.' || (
                ARRAY['order.created', 'order.paid', 'order.shipped', 'payment.failed', 'stock.changed']
            )[1 + given.number % 5] AS type
        FROM (
            SELECT
                now() - make_interval(mins => $1 - minute.number::int, secs => -60.0 * place / minute.events) AS at,
                row_number() OVER (ORDER BY minute.number, place) AS number
            FROM unnest($2::int[]) WITH ORDINALITY AS minute (events, number)
            CROSS JOIN generate_series(0, minute.events - 1) AS place
        ) AS given
        ORDER BY given.number
    ) AS made"""


async def _append(connection: Sql) -> None:
    """An hour of events: a wave, a lull, and a burst."""
    minutes = [round(260 + 120 * math.sin(minute / 8)) for minute in range(MINUTES)]
    minutes[20:24] = [30, 12, 12, 45]
    minutes[44:47] = [900, 1_400, 700]
    await connection.execute(_APPEND, MINUTES, minutes)


async def _append_hostile(connection: Sql) -> None:
    await connection.executemany(
        """
        INSERT INTO pgbackend.events (
            id, source, type, subject, datacontenttype, dataschema, partitionkey, extensions, data
        )
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::json, $9)
        """,
        [
            (
                one.id, one.source, one.type, one.subject, one.datacontenttype, one.dataschema, one.partitionkey,
                one.extensions, one.data or None,
            )
            for one in HOSTILE_EVENTS
        ],
    )  # fmt: skip


async def _register_workers(connection: Sql) -> dict[str, uuid.UUID]:
    """The ids of the workers by name. They have no process: their leases outlast every test."""
    found = {}
    for number, name in enumerate(("web-1:412", "web-2:388", "jobs-1:1207")):
        found[name] = uuid.uuid5(uuid.NAMESPACE_DNS, name)
        await connection.execute(
            """
            INSERT INTO pgbackend.workers (id, name, lease_timeout, started_at, subscriptions)
            VALUES ($1, $2, '1 day', now() - make_interval(hours => $3), $4)
            """,
            found[name],
            name,
            7 * number + 3,
            [one.name for one in subscriptions() if one.worker == name],
        )
    # Killed some seconds ago. Others delete its row after some minutes.
    await connection.execute(
        """
        INSERT INTO pgbackend.workers (id, name, lease_timeout, started_at, heartbeat_at, subscriptions)
        VALUES ($1, 'jobs-2:990', '15 s', now() - interval '2 days', now() - interval '20 s', '{analytics}')
        """,
        uuid.uuid5(uuid.NAMESPACE_DNS, "jobs-2:990"),
    )
    return found


async def _subscribe(connection: Sql, one: Subscription, *, head: int, worker: uuid.UUID | None) -> None:
    position = head - one.behind + one.in_flight
    await connection.execute(
        """
        INSERT INTO pgbackend.subscriptions (
            name, ordering, shards, created_at, end_position, paused_at, paused_by, pause_reason
        )
        SELECT $1, $2, $3, now() - interval '40 days', CASE WHEN $4 THEN $5::bigint END,
            CASE WHEN $6::text IS NOT NULL THEN now() - interval '23 minutes' END, $6,
            CASE WHEN $6::text IS NOT NULL THEN $7::text END
        """,
        one.name, one.order, one.shards, one.is_complete, head - 5_000, one.paused_by, one.pause_reason,
    )  # fmt: skip
    await connection.execute(
        """
        INSERT INTO pgbackend.offsets (subscription, shard, shards, position, pending, epoch, owner, completed_at)
        SELECT $1, shard, $2, CASE WHEN $5 THEN $6::bigint - 5001 ELSE $3::bigint END,
            coalesce(
                (
                    SELECT range_agg(int8range(event.position, event.position + 1))
                    FROM pgbackend.events AS event
                    WHERE event.position > $3 - $4::bigint
                        AND event.position <= $3
                        AND pgbackend.key_hash(event.partitionkey, event.subject, event.source, event.id) % $2 = shard
                ),
                '{}'
            ),
            nextval('pgbackend.epochs'), $7, CASE WHEN $5 THEN now() - interval '2 hours' END
        FROM generate_series(0, $2 - 1) AS shard
        """,
        one.name,
        one.shards,
        position,
        one.in_flight,
        one.is_complete,
        head,
        worker,
    )
    await connection.execute(
        """
        INSERT INTO pgbackend.redeliveries (subscription, position, key_hash, attempt, due_at, last_error, history)
        SELECT $1, event.position, pgbackend.key_hash(event.partitionkey, event.subject, event.source, event.id),
            1 + event.position % 4, now() + make_interval(mins => 10 + (event.position % 50)::int), $2,
            (
                SELECT jsonb_agg(jsonb_build_object(
                    'at', least(event.recorded_at + make_interval(secs => 20 * attempt), now()), 'what', 'failed',
                    'attempt', attempt, 'error', left($2, 500), 'id', substr(md5(event.id || attempt), 1, 8)
                ))
                FROM generate_series(1, 1 + (event.position % 4)::int) AS attempt
            )
        FROM pgbackend.events AS event
        WHERE event.position <= $3
        ORDER BY md5(event.position::text)
        LIMIT $4
        """,
        one.name,
        one.error,
        position - one.in_flight,
        one.waiting,
    )


async def _bury(connection: Sql, group: Group) -> None:
    """The letters are of events all over the hour."""
    await connection.execute(
        """
        INSERT INTO pgbackend.dead_letters (
            subscription, position, recorded_at, key_hash, specversion, id, source, type, subject, time,
            datacontenttype, partitionkey, extensions, data, attempts, error, details, buried_at, history
        )
        SELECT $1, event.position, event.recorded_at,
            pgbackend.key_hash(event.partitionkey, event.subject, event.source, event.id), event.specversion, event.id,
            event.source, event.type, event.subject, event.time, event.datacontenttype, event.partitionkey,
            event.extensions, event.data, $2, replace($3, '#', (100000 + event.position)::text), '{}',
            least(event.recorded_at + make_interval(secs => 20 * $2), now()),
            (
                SELECT jsonb_agg(jsonb_strip_nulls(jsonb_build_object(
                    'at', least(event.recorded_at + make_interval(secs => 20 * least(attempt, $2)), now()),
                    'what', CASE WHEN attempt > $2 THEN 'buried' ELSE 'failed' END,
                    'attempt', CASE WHEN attempt <= $2 THEN attempt END,
                    'error', CASE
                        WHEN attempt <= $2 THEN left(replace($3, '#', (100000 + event.position)::text), 500)
                    END,
                    'id', substr(md5(event.id || attempt), 1, 8)
                )) ORDER BY attempt)
                FROM generate_series(1, $2 + 1) AS attempt
            )
        FROM pgbackend.events AS event
        WHERE event.position NOT IN (
            SELECT letter.position FROM pgbackend.dead_letters AS letter WHERE letter.subscription = $1
        )
        ORDER BY md5($3 || event.position), event.position
        LIMIT $4
        """,
        group.subscription,
        group.attempts,
        group.error,
        group.letters,
    )


# ── the world as a program ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Shop:
    """The world while a broker shows it."""

    dsn: str
    url: str
    """The console's."""
    backend: Backend
    """Runs a worker in this process."""


@asynccontextmanager
async def demonstration(*args: str) -> AsyncIterator[Shop]:
    """The world on an embedded PostgreSQL, which is deleted at the end. Some events arrive each second.

    `args` are options of `pgbackend serve`.
    """
    with tempfile.TemporaryDirectory() as directory:
        async with EmbeddedServer(directory) as server, Backend(server.dsn) as backend:
            await populate(server.dsn)
            async with running("--dsn", server.dsn, *args) as serve, asyncio.TaskGroup() as tasks:
                url = await serve.listening()
                going_on = tasks.create_task(_go_on(server.dsn, backend), name="events and heartbeats")
                yield Shop(dsn=server.dsn, url=f"{url}console/", backend=backend)
                going_on.cancel()


async def _go_on(dsn: str, backend: Backend) -> None:
    """Some events each second, and the heartbeats of the workers that have no process, until it is cancelled."""
    async with connected(dsn) as connection:
        for first in count(1_000_000, 5):
            events = [
                {
                    "specversion": "1.0",
                    "id": str(number),
                    "source": "/shop/orders",
                    "type": "com.example.order.created",
                    "subject": f"order/{number}",
                    "datacontenttype": "application/json",
                    "data": {"order": number, "total": 99.5, "currency": "EUR"},
                }
                for number in range(first, first + 5)
            ]
            await backend.produce_many([json.dumps(event).encode() for event in events])
            await connection.execute(
                """
                UPDATE pgbackend.workers
                SET heartbeat_at = clock_timestamp(), lease_timeout = '15 s'
                WHERE backend_pid IS NULL
                    AND heartbeat_at > clock_timestamp() - lease_timeout
                """
            )
            # The pace of the demonstration: five events and a heartbeat a second.
            await asyncio.sleep(1)


async def main() -> None:
    async with demonstration("--port", "8080") as shop:
        sys.stdout.write(f"The console is at {shop.url} until Ctrl+C.\n")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
