"""Maintenance: while a worker runs, the log stays one that the fence can be trusted on, and has segments ahead.

It makes a pass after appends, and now and then while the log is quiet. The promise: an altered log ends the worker
with an error that says what was altered, and an append finds its segment unless workers were away for very long.
"""

import asyncio
import logging

from pgbackend import facts
from pgbackend.errors import DatabaseError, SchemaError
from pgbackend.log.notify import Wakeup
from pgbackend.log.requirements import Requirements
from pgbackend.log.segments import Segments

_QUIET_INTERVAL = 5.0
"""Seconds between two passes while the log is quiet."""
_BUSY_INTERVAL = 0.2
"""Seconds between two passes while events are appended."""


class Maintenance:
    """Looks after one log."""

    def __init__(self, requirements: Requirements, segments: Segments, wakeup: Wakeup) -> None:
        self._requirements = requirements
        self._segments = segments
        self._wakeup = wakeup

    async def run(self) -> None:
        """Make passes until cancelled. Raises SchemaError when the log was altered."""
        while True:
            try:
                await self.run_once()
            except SchemaError:
                raise
            except DatabaseError as error:
                facts.emit("segments not extended", level=logging.WARNING, error=str(error))
            known = self._wakeup.count
            await asyncio.sleep(_BUSY_INTERVAL)
            await self._wakeup.wait(since=known, timeout=_QUIET_INTERVAL)

    async def run_once(self) -> None:
        """The fence's requirements hold, and enough segments are ahead. Raises SchemaError and DatabaseError."""
        await self._requirements.verify()
        await self._segments.extend()
