"""How the request that a connection receives arrives: how much of it, and how fast. `protocol` keeps one a connection.

The promise: a request that is too large outside its body, or too slow, is found after `limits` bytes or seconds,
whatever the parser has made of it. Counts of a head are upper bounds: only the parser knows where in a piece it begins.
"""

from pgbackend.serve.ingest import limits


class Arrival:
    """The part of one request that has arrived; `begin` starts over with the next.

    A connection that has sent nothing yet is `receiving`, because its client has to send a request in time.
    """

    __slots__ = (
        "_body_before",
        "_credit",
        "_credited_bytes",
        "_looked_at",
        "_since_body",
        "_started_at",
        "body_bytes",
        "head_bytes",
        "in_head",
        "received_bytes",
        "receiving",
        "unfinished_bytes",
    )

    def __init__(self, now: float) -> None:
        self.in_head = True
        """The parser is in a head, or between two requests."""
        self.head_bytes = 0
        """Bytes of the head, at most."""
        self._body_before = 0
        self.begin(now)

    def begin(self, now: float) -> None:
        """The first byte of a request has arrived."""
        self.receiving = True
        self.received_bytes = 0
        self.body_bytes = 0
        self.unfinished_bytes = 0
        """Bytes of an incomplete head, at most. The connection counts them while they take memory."""
        self._since_body = 0
        self._started_at = self._looked_at = now
        self._credit = limits.PATIENCE
        self._credited_bytes = 0

    def add(self, size: int) -> None:
        """A piece of this size is about to be parsed."""
        self.received_bytes += size
        self._body_before = self.body_bytes
        if self.in_head:
            self.head_bytes += size

    def end_head(self) -> None:
        self.in_head = False
        self.head_bytes = 0

    def end(self) -> None:
        """The request is complete."""
        self.receiving = False
        self.in_head = True

    def is_too_large(self, size: int, headers: int) -> bool:
        """Whether the request is too large outside its body, now that a piece of this size is parsed.

        `headers`: how many it has so far.
        """
        if self.in_head:
            return self.head_bytes > limits.HEAD_BYTES or headers > limits.HEADERS
        # The parser keeps trailers, which bring no body. Chunks of one byte have five bytes around it.
        self._since_body = self._since_body + size if self.body_bytes == self._body_before else 0
        around = self.received_bytes - self.body_bytes
        return self.receiving and (
            self._since_body > limits.HEAD_BYTES or around > 2 * limits.HEAD_BYTES + 8 * self.body_bytes
        )

    def is_too_slow(self, now: float) -> bool:
        """Whether the request has taken too long, or brought too little since the last calls.

        Its bytes buy it time, but never more than PATIENCE from now.
        """
        passed, self._looked_at = now - self._looked_at, now
        brought, self._credited_bytes = self.received_bytes - self._credited_bytes, self.received_bytes
        self._credit = min(limits.PATIENCE, self._credit - passed + brought / limits.BYTES_A_SECOND)
        return self._credit < 0 or now - self._started_at > limits.LONGEST_ARRIVAL
