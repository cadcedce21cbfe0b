"""The admin port: probes and metrics, for operators and their tools.

`app` runs a second `Listener` with it. That listener has its own connections, so clients that use up those of the port
for events do not make the broker look dead.
"""

from collections.abc import Callable, Mapping

from pgbackend.serve.ingest.probes import Probes
from pgbackend.serve.ingest.responses import Message, Problem, Receive, Send, respond, unexpected

_ALLOW = (b"allow", b"GET, HEAD")


class Admin:
    """The ASGI application of the admin port: GET and HEAD as `Probes` answers them, and nothing else."""

    def __init__(self, probes: Probes) -> None:
        self._probes = probes

    async def __call__(self, scope: Message, _receive: Receive, send: Send, /) -> None:
        """The request is answered."""
        try:
            await self._answer(scope, send)
        except Problem as problem:
            await respond(send, problem.status, problem.body(), *problem.headers)
        except Exception as error:  # noqa: BLE001 - a bug must be answered, too, and leave its trace
            bug = unexpected(error)
            await respond(send, bug.status, bug.body(), *bug.headers)

    async def _answer(self, scope: Message, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise Problem(405, "This port takes no events. Send them to the broker's other port.", _ALLOW)
        await self._probes.answer(scope, send, has_metrics=True)

    def take_whole(
        self, _fields: Mapping[bytes, bytes], _body: bytes, _answer: Callable[[Problem | None], None], /
    ) -> bool:
        """False: this port takes no events."""
        return False

    def count_refused(self, status: int) -> None:
        """Do nothing: the metric counts requests that bring events."""

    def retire(self) -> None:
        """Do nothing: this port answers until the broker has drained."""

    def stop_taking(self) -> None:
        """Do nothing, as above."""
