"""The orders and events of the two web applications, seen in their database."""

from tests.support.databases import Sql
from tests.support.polling import eventually

FAIL_AT_COMMIT = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no room for it''; END';
    CREATE CONSTRAINT TRIGGER fail_at_commit AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (new.quantity = 13) EXECUTE FUNCTION fail()"""


class Orders:
    """The orders in a table, beside the events about them."""

    def __init__(self, sql: Sql, *, table: str) -> None:
        self._sql = sql
        self._table = table

    async def refuse_thirteen(self) -> None:
        """From now on the COMMIT of an order of 13 fails."""
        await self._sql.execute(FAIL_AT_COMMIT.format(table=self._table))

    async def shipped(self) -> list[int]:
        """All orders, once they are shipped. Each has an event, and each event an order, at any time."""

        async def are_shipped() -> list[int] | None:
            rows = await self._sql.fetch(f"""
                SELECT orders.id, orders.status, events.subject
                FROM {self._table} AS orders
                FULL JOIN pgbackend.events ON subject = orders.id::text
                ORDER BY 1""")
            assert all(str(row["id"]) == row["subject"] for row in rows)
            return [row["id"] for row in rows] if {row["status"] for row in rows} == {"shipped"} else None

        return await eventually("all orders are shipped", are_shipped)
