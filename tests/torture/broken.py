"""A process that is broken on purpose. The torture test must find it out. BROKEN in the environment says how. A worker:

fence      it takes every missing position for a dead one
epochs     it goes on with a shard that it has lost, and commits offsets whoever owns the shard
doubt      it goes on while others may have taken over, until a round shows who owns which shard
apart      it commits what a transactional subscription did before it commits the offset

A producer of the plan "orders":

halves     it commits an order before it appends its event
"""

import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pgbackend.backend import Backend
from pgbackend.delivery.delivery import Delivery
from pgbackend.delivery.offsets import Offsets
from pgbackend.delivery.transactions import Transactions
from pgbackend.delivery.worker import Worker
from pgbackend.log.fence import Evidence, Fence
from pgbackend.postgres.connections import Transaction
from pgbackend.subscriptions.presence import Tenure
from pgbackend.torture import producer, worker
from pgbackend.torture.applications import APPLICATIONS
from pgbackend.torture.applications.application import Connection

FENCED = (
    "AND stored.epoch = marks.epoch\n        AND stored.owner = (SELECT worker FROM given)\n"
    "        AND stored.position <= marks.position\n"
)


def break_fence() -> None:
    apply_evidence = Fence.apply_evidence

    def nobody(self: Fence, evidence: Evidence) -> None:
        apply_evidence(self, replace(evidence, appenders=frozenset()))

    Fence.apply_evidence = nobody  # type: ignore[method-assign]


def break_epochs() -> None:
    # Otherwise its commits would come too late only if it was frozen with one under way.
    break_doubt()
    setattr(Worker, "_on_lost", lambda *_: None)  # noqa: B010 - not its own
    init = Offsets.__init__

    def unfenced(self: Offsets, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        statement = self._sql.commit_by_key
        assert FENCED in statement
        self._sql = replace(self._sql, commit_by_key=statement.replace(FENCED, ""))

    Offsets.__init__ = unfenced  # type: ignore[method-assign]


def break_doubt() -> None:
    setattr(Tenure, "valid_until", property(lambda _: math.inf, lambda *_: None))  # noqa: B010 - one of its slots
    setattr(Worker, "_on_held", lambda *_: None)  # noqa: B010 - not its own


def break_apart() -> None:
    commit = Transactions._commit

    async def apart(
        self: Transactions,
        connection: Connection,
        transaction: Transaction,
        deliveries: Sequence[Delivery],
        *,
        are_fresh: bool,
    ) -> None:
        await connection.execute("COMMIT")
        await connection.execute("BEGIN")
        await commit(self, connection, transaction, deliveries, are_fresh=are_fresh)

    Transactions._commit = apart  # type: ignore[method-assign]


def break_halves() -> None:
    shop = APPLICATIONS["orders"]

    async def place(backend: Backend, schema: str, id_: str, key: str | None, connection: Connection) -> None:
        await connection.execute(f"INSERT INTO {schema}.torture_orders (id) VALUES ($1)", id_)
        await connection.execute("COMMIT")
        await connection.execute("BEGIN")
        insert = f"INSERT INTO {schema}.events (id, source, type, partitionkey) VALUES ($1, 'torture', 'ordered', $2)"
        await connection.execute(insert, id_, key)

    APPLICATIONS["orders"] = replace(shop, append=place)


if __name__ == "__main__":
    what = os.environ["BROKEN"]
    {
        "fence": break_fence, "epochs": break_epochs, "doubt": break_doubt, "apart": break_apart,
        "halves": break_halves,
    }[what]()  # fmt: skip
    asyncio.run((producer if what == "halves" else worker).main())
