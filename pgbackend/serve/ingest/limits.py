"""All limits of what clients may send and make the broker hold. docs/broker.md tells users the same numbers.

`protocol` and `listener` apply the constants, which are about connections; `handler` applies `Limits`, which is about
events.
"""

import resource
from contextlib import suppress
from dataclasses import dataclass

CONNECTIONS = 10_000
"""Open at a time at the port for events, TLS handshakes included."""
ADMIN_CONNECTIONS = 200
"""Open at a time at the admin port."""
HANDSHAKE = 10.0
"""Seconds that a TLS handshake may take."""
PATIENCE = 20.0
"""Seconds for a request to arrive, for a client to send its first byte, and for a client to read an answer."""
BYTES_A_SECOND = 4096
"""A request that arrives at this rate may take longer than PATIENCE."""
LONGEST_ARRIVAL = 120.0
"""Seconds that a request may take to arrive at any rate."""
KEEP_ALIVE = 75.0
"""Seconds that a connection may be idle between two requests."""
LINGER = 0.5
"""Seconds for which idle connections stay open when the broker stops: their clients may just be sending."""
GRACE = 3.0
"""Seconds that requests have to arrive once the broker stops."""
LAST_ANSWERS = 11.0
"""Seconds after that in which the events are committed, which takes 10 at most, and clients read the answers."""

HEAD_BYTES = 1 << 16
"""Request line and headers of one request; trailers, too."""
HEADERS = 500
"""In one request: tiny headers take far more memory than their bytes."""
REQUESTS_AHEAD = 100
"""Requests that a connection may send ahead of their answers."""
HELD_HEAD_BYTES = 64 << 20
"""Memory of all requests sent ahead and of all heads that are arriving."""
REQUEST_MEMORY = 2_500
"""Bytes of memory that a request takes besides its head and body."""
HEADER_MEMORY = 170
"""Bytes of memory that a header takes besides its text: 500 tiny ones are 2 KB of text and 85 KB of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of events and batches, and the memory for all of them."""

    event_bytes: int = 1 << 20
    """The largest event, as the backend's `max_event_bytes`."""
    batch_bytes: int = 8 << 20
    """Bytes of the body of a batch. A batch is one transaction."""
    batch_events: int = 10_000
    """In one batch."""
    held_bytes: int = 256 << 20
    """Bytes of all bodies that are arriving and of all events that are being committed. A request beyond it, or
    beyond its address's share of it, is answered 503."""


def connections(wanted: int) -> int:
    """`wanted`, or fewer: half of the files that the process may open are left for other uses."""
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may, up to what the broker can use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # macOS refuses more than OPEN_MAX, although its hard limit is infinite.
        for files in (wanted, max(soft, 10_240)):
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
                return
