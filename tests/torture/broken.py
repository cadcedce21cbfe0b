"""A worker that is broken on purpose. The torture test must find it out. BROKEN in the environment says how:

fence      it takes every missing position for a dead one
epochs     it goes on with a shard that it has lost, and commits offsets whoever owns the shard
doubt      it goes on while others may have taken over, until a round shows who owns which shard
"""

import asyncio
import math
import os
from dataclasses import replace
from typing import Any

from pgbackend.delivery.offsets import Offsets
from pgbackend.delivery.worker import Worker
from pgbackend.log.fence import Evidence, Fence
from pgbackend.subscriptions.presence import Tenure
from pgbackend.torture.worker import main

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


if __name__ == "__main__":
    {"fence": break_fence, "epochs": break_epochs, "doubt": break_doubt}[os.environ["BROKEN"]]()
    asyncio.run(main())
