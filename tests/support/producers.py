"""Producers in plain SQL that behave as applications do: slow to commit, rolling back, several at a time."""

import asyncio
import random
import time
from dataclasses import dataclass, field

import asyncpg

INSERT = "INSERT INTO pgbackend.events (id, source, type) VALUES ($1, 'test', 'test')"


@dataclass
class Crowd:
    """Producers that each commit, or roll back, one transaction after the other."""

    dsn: str
    producers: int
    transactions: int
    """By each of them."""
    rollbacks: float = 0.2
    """Share of transactions that are rolled back."""
    pause: float = 0.01
    """The longest time between insert and commit, in seconds."""
    seed: int = 1
    committed: dict[str, float] = field(default_factory=dict)
    """Ids that are in the log, and when their COMMIT came back, in monotonic seconds."""
    rolled_back: int = 0

    async def run(self) -> None:
        """Return once every producer has made all its transactions."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.producers):
                tasks.create_task(self._produce(number))

    async def _produce(self, number: int) -> None:
        chance = random.Random(self.seed * 1000 + number)
        connection = await asyncpg.connect(self.dsn)
        try:
            for turn in range(self.transactions):
                ids = [f"{number}-{turn}-{part}" for part in range(chance.choice((1, 1, 1, 3)))]
                transaction = connection.transaction()
                await transaction.start()
                for id_ in ids:
                    await connection.execute(INSERT, id_)
                    if chance.random() < 0.3:
                        await asyncio.sleep(chance.random() * self.pause)
                if chance.random() < self.rollbacks:
                    await transaction.rollback()
                    self.rolled_back += len(ids)
                else:
                    await transaction.commit()
                    self.committed.update(dict.fromkeys(ids, time.monotonic()))
        finally:
            await connection.close()
