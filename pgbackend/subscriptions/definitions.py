"""Definitions of subscriptions: created, found, compared and deleted.

Once `ensure()` has returned, the subscription's rows are committed: whatever is acknowledged afterwards is delivered.
`alterations` changes what is stored.
"""

from dataclasses import dataclass, replace
from datetime import datetime

from pgbackend.errors import ConfigError, SubscriptionExistsError, SubscriptionMismatchError, SubscriptionNotFoundError
from pgbackend.log.log import Log
from pgbackend.model import Order
from pgbackend.postgres.connections import Record
from pgbackend.postgres.sql import load
from pgbackend.postgres.sql.statements import SubscriptionsSql
from pgbackend.subscriptions.locator import Locator
from pgbackend.subscriptions.places import Place, start_bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """The stored options of a subscription, without its offsets."""

    name: str
    order: Order
    shards: int
    end_position: int | None
    """Events at or behind it are not delivered."""
    end_at: datetime | None
    """Events recorded at or after it are not delivered."""
    start_position: int | None = None
    """Events at or below it are not delivered: the start was ahead of the log."""
    start_at: datetime | None = None
    """Events recorded at or before it are not delivered."""
    start_bound: str | None = None
    """The position or date where it was last told to start; None for the log's beginning or end."""

    @classmethod
    def of(cls, row: Record) -> "Definition":
        return cls(
            name=row["name"],
            order=row["ordering"],
            shards=row["shards"],
            end_position=row["end_position"],
            end_at=row["end_at"],
            start_position=row["start_position"],
            start_at=row["start_at"],
            start_bound=row["start_bound"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The part of a definition that `alter_subscription()` changes."""

    order: Order
    end_position: int | None
    end_at: datetime | None
    start: Place

    def check(self, stored: Definition) -> None:
        """Raises ConfigError when the subscription cannot have these terms."""
        if self.order == "strict" and stored.shards != 1:
            raise ConfigError(
                f"Subscription {stored.name!r} cannot be strict with {stored.shards} shards: log order needs a single "
                "one."
            )

    def match(self, stored: Definition) -> bool:
        """Whether the subscription has these terms already."""
        return self.apply(stored) == stored

    def need_drain(self, stored: Definition) -> bool:
        """Whether workers must release the subscription's shards before it gets these terms."""
        mine = self.order, self.end_position, self.end_at
        return self.move(stored) or mine != (stored.order, stored.end_position, stored.end_at)

    def move(self, stored: Definition) -> bool:
        """Whether they move the offsets: to a position or date that is not the one it was last told."""
        wanted = start_bound(self.start)
        return wanted is not None and wanted != stored.start_bound

    def apply(self, stored: Definition) -> Definition:
        """The definition with these terms, before its offsets are moved."""
        return replace(
            stored,
            order=self.order,
            end_position=self.end_position,
            end_at=self.end_at,
            start_bound=start_bound(self.start),
        )


class Subscriptions:
    """Creates, finds and deletes subscriptions."""

    def __init__(self, log: Log, *, schema: str) -> None:
        self._log = log
        self._locator = Locator(log)
        self._sql = load(SubscriptionsSql, "subscriptions", schema=schema)

    async def ensure(self, wanted: Definition, place: Place) -> Definition:
        """The subscription exists: created at `place`, or as it was. Returns its definition.

        Raises SubscriptionMismatchError when the existing one has another order, number of shards or end.
        """
        stored = await self.find(wanted.name)
        if stored is None:
            incarnation = self._log.incarnation.id
            start = await self._locator.locate(place)
            created = await self._log.database.fetchval(
                self._sql.create_subscription,
                wanted.name, wanted.order, wanted.shards, wanted.end_position, wanted.end_at, start_bound(place),
                start.start_position, start.start_at, start.position, str(start.pending), incarnation,
            )  # fmt: skip
            if created is None:
                await self._log.incarnation.verify(incarnation)
            stored = await self.find(wanted.name)
            if stored is None:
                raise SubscriptionNotFoundError(f"Subscription {wanted.name!r} was deleted while it was being created.")
            if created is not None:
                return stored
        _compare(wanted, stored)
        return stored

    async def find(self, name: str) -> Definition | None:
        row = await self._log.database.fetchrow(self._sql.find_subscription, name)
        return None if row is None else Definition.of(row)

    async def delete(self, name: str) -> None:
        """Nothing is stored of the subscription any more. Raises SubscriptionNotFoundError."""
        if await self._log.database.fetchval(self._sql.delete_subscription, name) is None:
            raise not_found(name)


def _compare(wanted: Definition, stored: Definition) -> None:
    """Raises SubscriptionMismatchError when the two differ in what `subscribe()` says."""
    labels = {
        "order": "its order",
        "shards": "its shard count",
        "end_position": "its end position",
        "end_at": "its end date",
    }
    differences = [
        f"{label} is {getattr(stored, name)!r}, not {getattr(wanted, name)!r}"
        for name, label in labels.items()
        if getattr(stored, name) != getattr(wanted, name)
    ]
    if differences:
        raise SubscriptionMismatchError(
            f"Subscription {wanted.name!r} exists, and {', '.join(differences)}. Subscribe with what is stored, or "
            "change that first: order and end with `alter_subscription()`, the shard count with `reshard()`."
        )


def not_found(name: str) -> SubscriptionNotFoundError:
    return SubscriptionNotFoundError(f"There is no subscription {name!r}. `pgbackend status` lists those that exist.")


def exists(name: str) -> SubscriptionExistsError:
    return SubscriptionExistsError(
        f"Subscription {name!r} is running in this backend already. Use another name, or unsubscribe it first."
    )
