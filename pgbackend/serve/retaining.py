"""Stores the retention of a configuration file with the log."""

import logging

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.errors import ConnectionLostError, DatabaseError
from pgbackend.postgres.reconnect import GrowingDelay
from pgbackend.serve.config.models import Configuration


async def retain(backend: Backend, configuration: Configuration) -> None:
    """The log has the retention of the configuration, if that has one. While PostgreSQL is away, this waits.

    The log of the broker says so when PostgreSQL refuses it: events are worth more than their removal.
    """
    if configuration.retention is None:
        return
    delay = GrowingDelay()
    while True:
        try:
            wanted = configuration.retention
            await backend.set_retention(
                keep=wanted.keep, max_age=wanted.max_age, max_bytes=wanted.max_bytes, dead_letters=wanted.dead_letters
            )
        except ConnectionLostError:
            await delay.wait()
        except DatabaseError as error:
            facts.emit("retention not set", level=logging.ERROR, error=str(error))
            return
        else:
            return
