"""The application of the plan "bank": transfers between accounts.

Each subscription is a bank with books of its own: it debits and credits its accounts in the dispatcher's transaction,
and notes the transfer. No key of the table of noted transfers is unique, so one that takes effect twice is there twice.
A transfer that its account cannot pay is declined: it is noted, and moves nothing. One to a closed account is rejected
after it was debited, and some fail at first after all they did: a rollback must leave nothing of these.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from cloudevents.core.v1.event import CloudEvent

from pgbackend.codec.event import Event
from pgbackend.errors import Failed, Reject
from pgbackend.retry import Retry
from pgbackend.torture.applications.application import AGREEMENT, Application, Connection
from pgbackend.torture.load import Terms, failures

ACCOUNTS = tuple(f"account-{number}" for number in range(40))
OPENING = 1_000
"""The balance of each account at the start."""
CLOSED = "closed"
"""An account that no bank has."""
_MOST = 400
"""The largest amount of a transfer: some accounts cannot pay it."""
_CLOSED_SHARE = 50
"""One transfer in so many goes to the closed account."""
_RETRY = Retry(attempts=15, delay=0.05, max_delay=0.2)
"""A connection that is lost during a transaction costs an attempt. No fault may cost a transfer all of them."""

SUBSCRIPTIONS: dict[str, Terms] = {
    "single": Terms(order="none", shards=1, concurrency=1, delay=0.001, long=0.3, retry=_RETRY, failing=0.03,
                    transactional=True),
    "batched": Terms(order="none", shards=4, concurrency=1, delay=0.005, long=0.3, retry=_RETRY, failing=0.01,
                     transactional=True, batches=(50, 7, None)),
    "keyed": Terms(order="key", shards=3, concurrency=1, delay=0.005, long=0.3, retry=_RETRY, failing=0.02,
                   transactional=True, batches=(None, 20, 5)),
}  # fmt: skip


class Transfer(NamedTuple):
    """An order to move an amount."""

    source: str
    target: str
    amount: int


class Applied(NamedTuple):
    """A transfer that a bank has noted."""

    subscription: str
    position: int
    id: str
    declined: bool
    transaction: int
    """The number of the transaction that made it."""


class Balance(NamedTuple):
    """An account at the end."""

    subscription: str
    account: str
    balance: int


def transfer(id_: str) -> Transfer:
    """The transfer of the event with this id, so that the verdict knows it without asking.

    >>> transfer("producer-0-1")
    Transfer(source='account-34', target='account-5', amount=367)
    """
    lot = int.from_bytes(hashlib.blake2b(id_.encode(), digest_size=8).digest())
    lot, source = divmod(lot, len(ACCOUNTS))
    lot, steps = divmod(lot, len(ACCOUNTS) - 1)
    lot, amount = divmod(lot, _MOST)
    target = ACCOUNTS[(source + 1 + steps) % len(ACCOUNTS)]
    return Transfer(ACCOUNTS[source], CLOSED if lot % _CLOSED_SHARE == 0 else target, amount + 1)


def make_event(id_: str, draws: random.Random) -> CloudEvent:  # noqa: ARG001 - all follows from the id
    """The event that orders a transfer. Its key is the account that pays."""
    source, target, amount = transfer(id_)
    attributes = {"id": id_, "source": "torture", "type": "transfer", "partitionkey": source}
    return CloudEvent(attributes, {"from": source, "to": target, "amount": amount})


async def apply(schema: str, name: str, terms: Terms, events: Sequence[Event], connection: Connection) -> None:
    """The transfers are made and noted in the connection's transaction. Raises what is wrong with one of them."""
    transfers = [(event, _ordered(event)) for event in events]
    # All at once and in their order: transactions of other shards lock them too.
    accounts = sorted({account for _, order in transfers for account in (order.source, order.target)})
    await connection.execute(_LOCK.format(schema=schema), name, accounts)
    errors: dict[Event, Exception] = {}
    for event, order in transfers:
        error = await _transfer(schema, name, event, order, connection)
        if error is None and event.attempt <= failures(name, terms, event.id):
            error = RuntimeError("as planned")
        if error is None:
            continue
        if len(events) == 1 or event.position % 2:
            raise error
        errors[event] = error
    if errors:
        raise Failed(errors)


def _ordered(event: Event) -> Transfer:
    data = event.get_data()
    assert isinstance(data, dict)  # noqa: S101 - for the type checker
    return Transfer(data["from"], data["to"], data["amount"])


async def _transfer(schema: str, name: str, event: Event, order: Transfer, connection: Connection) -> Exception | None:
    """Debit, credit and note. Returns what is wrong with the transfer."""
    is_paid = await connection.fetchval(_DEBIT.format(schema=schema), name, order.source, order.amount) is not None
    amount = order.amount if is_paid else 0
    if await connection.fetchval(_CREDIT.format(schema=schema), name, order.target, amount) is None:
        return Reject(f"{order.target} is closed")
    await connection.execute(_NOTE.format(schema=schema), name, event.position, event.id, not is_paid)
    return None


_TABLES = f"""
CREATE TABLE {{schema}}.torture_accounts (
    subscription text,
    account text,
    balance bigint NOT NULL,
    PRIMARY KEY (subscription, account)
);
INSERT INTO {{schema}}.torture_accounts (subscription, account, balance)
SELECT subscription, account, {OPENING}
FROM
    unnest('{{{{{",".join(SUBSCRIPTIONS)}}}}}'::text[]) AS subscription,
    unnest('{{{{{",".join(ACCOUNTS)}}}}}'::text[]) AS account;
CREATE TABLE {{schema}}.torture_effects (
    effect bigint GENERATED ALWAYS AS IDENTITY,
    subscription text NOT NULL,
    position bigint NOT NULL,
    id text NOT NULL,
    declined boolean NOT NULL,
    transaction bigint NOT NULL DEFAULT txid_current()
);
CREATE INDEX ON {{schema}}.torture_effects (subscription, position);
"""  # noqa: S608 - constants
_LOCK = """
SELECT 1
FROM {schema}.torture_accounts
WHERE subscription = $1 AND account = ANY ($2)
ORDER BY account
FOR UPDATE
"""
_DEBIT = """
UPDATE {schema}.torture_accounts
SET balance = balance - $3
WHERE subscription = $1 AND account = $2 AND balance >= $3
RETURNING true
"""
_CREDIT = """
UPDATE {schema}.torture_accounts
SET balance = balance + $3
WHERE subscription = $1 AND account = $2
RETURNING true
"""
_NOTE = "INSERT INTO {schema}.torture_effects (subscription, position, id, declined) VALUES ($1, $2, $3, $4)"
_MOMENT = f"""
SELECT subscription || ':' || total.what AS what, found, wanted
FROM (
    SELECT subscription, sum(balance)::bigint AS total, count(*) FILTER (WHERE balance < 0) AS overdrawn
    FROM {{schema}}.torture_accounts
    GROUP BY subscription
) AS books
CROSS JOIN LATERAL (
    VALUES ('total', total, {OPENING * len(ACCOUNTS)}::bigint), ('overdrawn_accounts', overdrawn, 0)
) AS total (what, found, wanted)
UNION ALL
{AGREEMENT.format(effects="torture_effects", subscriptions=", ".join(f"'{name}'" for name in SUBSCRIPTIONS))}
"""  # noqa: S608 - constants
_RECORDS = {
    "effects": """
        SELECT subscription, position, id, declined, transaction FROM {schema}.torture_effects ORDER BY effect
    """,
    "balances": """
        SELECT subscription, account, balance FROM {schema}.torture_accounts ORDER BY subscription, account
    """,
}

APPLICATION = Application(
    subscriptions=SUBSCRIPTIONS,
    make_event=make_event,
    callers=1,
    effect=apply,
    tables=_TABLES,
    moment=_MOMENT,
    records=_RECORDS,
)
