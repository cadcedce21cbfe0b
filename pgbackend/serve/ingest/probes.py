"""The broker's reports about itself: `/healthz`, `/readyz` and `/metrics`, for load balancers and Prometheus.

`handler` answers with it at the port for events, `admin` at the admin port. The promise: an answer comes within
seconds, whatever PostgreSQL does, and PostgreSQL is asked at most once a second.
"""

import asyncio
from typing import TYPE_CHECKING

from pgbackend.errors import PgBackendError
from pgbackend.recent import Recent
from pgbackend.serve.ingest.responses import STOPPING, Message, Problem, Send, respond, unavailable

if TYPE_CHECKING:
    from pgbackend.backend import Backend
    from pgbackend.serve.operations.metrics import Metrics

PATHS = (b"/healthz", b"/readyz", b"/metrics")
TIMEOUT = 3.0
"""Seconds until PostgreSQL counts as silent. Load balancers give up after ten at most, and learn more from a 503."""

_AGE = 1.0
"""Seconds for which PostgreSQL's answer is used again."""
_ACCEPT_BYTES = 1 << 12
"""No more of an Accept header is read: 64 KiB took 20 ms, for clients that need no authorization."""
_JSON = (b"content-type", b"application/json")


class Probes:
    """Answers GET and HEAD."""

    def __init__(self, backend: "Backend", metrics: "Metrics") -> None:
        self._backend = backend
        self._metrics = metrics
        self._retired = False
        self._commits = Recent(self._check_commits, age=_AGE)

    def retire(self) -> None:
        """From now on the broker is not ready, because it stops."""
        self._retired = True

    async def answer(self, scope: Message, send: Send, *, has_metrics: bool) -> None:
        """The request is answered. Raises Problem for paths that have nothing, and if the broker is not ready.

        `has_metrics`: whether this port tells them.
        """
        path = scope["raw_path"]  # as a proxy in front sees it: %6d must not get around its rule for /metrics
        if path == b"/healthz":
            await respond(send, 200, b'{"ok": "true"}', _JSON)
        elif path == b"/readyz":
            wrong = STOPPING if self._retired else await self._commits.get()
            if wrong is not None:
                raise unavailable(wrong)
            await respond(send, 200, b'{"ok": "true"}', _JSON)
        elif path == b"/metrics" and has_metrics:
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"")[:_ACCEPT_BYTES]
            body, content_type = await self._metrics.exposition(accept.decode("latin-1"))
            await respond(send, 200, body, (b"content-type", content_type.encode()))
        else:
            raise Problem(
                404, "Nothing to read at this path. Send events by POST to any path; health is at /healthz and /readyz."
            )

    async def _check_commits(self) -> str | None:
        """Why events cannot be committed; None if they can."""
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._backend.probe()
        except TimeoutError:
            return f"PostgreSQL did not answer within {TIMEOUT:g} s. Check that it runs and can be reached."
        except PgBackendError as error:
            return str(error)
        return None
