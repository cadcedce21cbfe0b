"""Small events, as the SDK makes them and as a row of the log."""

from cloudevents.core.v1.event import CloudEvent


def make_event(id_: str, data: bytes | str = b"", *, key: str | None = None) -> CloudEvent:
    attributes = {"id": id_, "source": "test", "type": "test", "datacontenttype": "text/plain"}
    return CloudEvent(attributes | ({"partitionkey": key} if key else {}), data)


def log_row(position: int, *, key_hash: int | None = 1) -> tuple[object, ...]:
    """A row as the log's statements return it, of a small event."""
    event = ("1.0", str(position), "/s", "t", None, None, None, None, None, "{}", None, None)
    return (*event, position, bytes(8), key_hash, 1000)
