"""Events in each form that the codec knows, a round trip through each, and Hypothesis strategies for them."""

import json
from datetime import UTC, datetime
from typing import Any

from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.v1.event import CloudEvent
from hypothesis import strategies as st

from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.codec.wire import parse_batch, parse_binary, parse_structured, write_binary, write_structured

BARE: dict[str, Any] = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}


def structured(**members: object) -> bytes:
    return json.dumps({**BARE, **members}).encode()


def binary(body: bytes = b"", /, content_type: str | None = None, **headers: str | bytes) -> Event:
    octets = {name: value if isinstance(value, bytes) else value.encode() for name, value in headers.items()}
    given_headers = {b"ce-" + k.encode(): v for k, v in ({k: v.encode() for k, v in BARE.items()} | octets).items()}
    if content_type is not None:
        given_headers[b"Content-Type"] = content_type.encode()
    return parse_binary(given_headers.items(), body)


def again_binary(event: Event) -> Event:
    headers, body = write_binary(event)
    return parse_binary([(name.encode("ascii"), value.encode("ascii")) for name, value in headers], body)


def again_structured(event: Event) -> Event:
    return parse_structured(write_structured(event))


def again_batch(event: Event) -> Event:
    written = write_structured(event)
    first, second = parse_batch(b"[" + written + b"," + written + b"]")
    assert first == second
    return first


def sdk(data: object = None, **attributes: object) -> CloudEvent:
    return CloudEvent({**BARE, "time": datetime(2026, 1, 2, tzinfo=UTC), **attributes}, data)  # type: ignore[arg-type]


def put(event: BaseCloudEvent) -> Event:
    return Event(encode(event, max_event_bytes=1 << 20)[0])


name = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(
    lambda name: name not in {"data", "dataschema", "datacontenttype", "partitionkey", "time", "subject", *BARE}
)
legal_characters = st.characters(exclude_categories=("Cc", "Cs", "Cn"))
text = st.text(legal_characters)
non_empty = st.text(legal_characters, min_size=1)
uri_reference = st.from_regex(r"[A-Za-z0-9/:._~é-]{1,20}(%[0-9A-F]{2}){0,2}", fullmatch=True)
extension = st.one_of(text, st.booleans(), st.integers(-(2**31), 2**31 - 1))
time = st.builds(
    lambda moment, fraction, zone: moment.strftime("%Y-%m-%dT%H:%M:%S").zfill(19) + fraction + zone,
    st.datetimes(min_value=datetime(1, 1, 1)),  # noqa: DTZ001 - the zone is drawn apart
    st.sampled_from(["", ".1", ".123456789", ".000000000000"]),
    st.sampled_from(["Z", "z", "+00:00", "-00:00", "+23:59"]),
)
attributes = st.builds(
    lambda required, optional, extensions: {**extensions, **required, **optional},
    st.fixed_dictionaries({"specversion": st.just("1.0"), "id": non_empty, "source": uri_reference, "type": non_empty}),
    st.fixed_dictionaries(
        {}, optional={"subject": non_empty, "time": time, "partitionkey": non_empty, "dataschema": st.just("urn:x")}
    ),
    st.dictionaries(name, extension, max_size=4),
)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
json_text = st.builds(
    lambda value, indent, ascii_only: json.dumps(value, indent=indent, ensure_ascii=ascii_only),
    json_value,
    st.sampled_from([None, 0, 1, "\t"]),
    st.booleans(),
)
content_type = st.sampled_from(
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "text/plain",
        "text/plain; charset=latin1",
        "text/json",
        "application/octet-stream",
        "application/x+json",
        "image/png",
        "text/csv ;header=present",
    ]
)
