"""The admin port: probes and metrics, for those who watch the broker.

`app` runs a `Listener` with it beside the one for events. Its connections are its own, so clients that use up all of
the other port's do not make the broker look dead.
"""

from collections.abc import Callable, Sequence

from pgbackend.serve.ingest.handler import Header, Ingest, Message, Problem, Receive, Send


class Admin:
    """The ASGI application: what `ingest` tells to GET and HEAD, and nothing else."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest

    async def __call__(self, scope: Message, _receive: Receive, send: Send) -> None:
        """The request is answered."""
        await self._ingest.tell(scope, send)

    def take_whole(self, _headers: Sequence[Header], _body: bytes, _answer: Callable[[Problem | None], None]) -> bool:
        """No: events go to the other port."""
        return False

    def count_refused(self, status: int) -> None:
        """Nothing: the metric is about requests that bring events."""

    def retire(self) -> None:
        """Nothing: how things are is told until the end."""

    def stop_taking(self) -> None:
        """Nothing, as above."""
