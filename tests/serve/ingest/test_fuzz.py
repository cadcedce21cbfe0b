"""Generated requests by the ten thousand, against a broker in its own process.

Three kinds: unusual but valid messages, which must all be accepted; messages with something wrong in them; and octets
that are hardly HTTP. The claims: no 5xx, no traceback, a well-formed answer that says what is wrong, memory that stays
flat, and in the log exactly the events that were answered 202, as they were sent.

Every run makes the same requests. A failure is shrunk to the shortest request that still fails.
"""

import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgbackend.codec.attributes import COLUMNS
from pgbackend.codec.event import Event
from tests.support.figures import report

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One request, and the events that it must be stored as."""

    headers: Sequence[Header]
    body: bytes
    events: Sequence[tuple[dict[str, str], bytes | None]] | None = None
    """Attributes and data of each event; None if the request may be refused."""
    target: bytes = b"/"
    chunks: Sequence[int] | None = None
    """Where a chunked body is cut; None sends a Content-Length."""

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(f"<Message {_short(self.raw())}, meant as {str(self.events)[:1000]}>")

    def raw(self) -> bytes:
        head = [
            b"POST " + self.target + b" HTTP/1.1",
            b"Host: localhost",
            *(name + b": " + value for name, value in self.headers),
        ]
        if self.chunks is None:
            return b"\r\n".join([*head, b"Content-Length: %d" % len(self.body), b"", self.body])
        head.append(b"Transfer-Encoding: chunked")
        cuts = [0, *sorted({cut % (len(self.body) + 1) for cut in self.chunks} - {0}), len(self.body)]
        parts = [self.body[start:end] for start, end in pairwise(cuts) if end > start]
        return b"\r\n".join([*head, b"", *(b"%x\r\n%b" % (len(part), part) for part in parts), b"0", b"", b""])


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """Messages over one connection."""

    messages: Sequence[Message]
    is_ahead: bool = False
    """Whether all messages are sent before the first answer is read."""
    cuts: Sequence[int] = ()
    """Where the bytes are cut into pieces."""

    def beginning(self) -> Iterator[bytes]:
        """The bytes that are sent before the first answer is read, in pieces."""
        raw = b"".join(message.raw() for message in (self.messages if self.is_ahead else self.messages[:1]))
        cuts = sorted({cut % len(raw) for cut in self.cuts})
        return (raw[start:end] for start, end in pairwise([0, *cuts, len(raw)]))


class Octets(bytes):
    """Bytes that are sent as they are."""

    __slots__ = ()

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(_short(bytes(self)))


def _short(octets: bytes) -> str:
    return repr(octets) if len(octets) < 2000 else f"{octets[:1000]!r} … {octets[-500:]!r} ({len(octets)} bytes)"


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_NONCHARACTERS = "".join(chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
characters = st.characters(
    exclude_categories=("Cs", "Cc"), exclude_characters=_NONCHARACTERS + "".join(map(chr, range(0xFDD0, 0xFDF0)))
)
texts = st.one_of(
    st.sampled_from(["1", "a b", "100%", "%41", '"quoted"', "\\", "é☃𝄞", "null", "true", "ce-id", "{}", "a,b;c=d"]),
    st.text(characters, min_size=1, max_size=12),
)
names = st.one_of(
    st.sampled_from(["partitionkey", "traceparent", "count", "a", "0", "specversions", "x" * 60, "knativebrokerttl"]),
    st.text("abcxyz019", min_size=1, max_size=20),
).filter(lambda name: name not in ("data", "id", "source", "type", "time", "subject"))
sources = st.sampled_from(["/", "/shop", "urn:a:b", "https://example.com/a?b=%C3%A9#c", "é", "a/../b", ".", "#", "?"])
times = st.sampled_from(
    [
        "2026-01-01T00:00:00Z",
        "2026-02-28t23:59:60.123456789z",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59.9-00:00",
        "2024-02-29T12:00:00.000000000000000001Z",
    ]
)
json_types = st.sampled_from(["application/json", "Application/JSON; charset=utf-8", "text/json", "application/a+json"])
other_types = st.sampled_from(
    ["text/plain", "text/plain;charset=latin-1", "image/png", 'application/xml; q="a;b"', "x/y"]
)
octets = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"", b"\0", b"null", b'{"a":1}', b"\r\n\r\n", b"0\r\n\r\n"])
)
large = st.builds(lambda unit, times: unit * times, st.binary(min_size=1, max_size=3), st.integers(0, 340_000))
bodies = st.one_of(octets, octets, octets, large)
json_texts = st.one_of(
    st.sampled_from([
        "null", "0", "-0", "1.00", "1e400", "12345678901234567890.000", '""', '"\\ud83d\\ude00"', '"\\u0000"', "[ ]",
        '{"a":1,"a":2}', '{"data":{"data_base64":1}}', '["\\/", "\u2028"]', "[" * 60 + "]" * 60, '{"":{"":[]}}',
    ]),
    st.builds(
        lambda value, ascii_, indent: json.dumps(value, ensure_ascii=ascii_, indent=indent),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
            max_leaves=5,
        ),
        st.booleans(),
        st.sampled_from([None, 0, 2]),
    ),
)  # fmt: skip
targets = st.sampled_from(
    [b"/", b"/a/b?c=d", b"//", b"/%ff%00", b"/healthz", b"/metrics", b"*", b"http://localhost/y", b"/" * 999]
)
noise = st.lists(
    st.sampled_from([
        (b"X-Odd", b"\xff\xfe"), (b"Accept", b"*/*"), (b"Connection", b"keep-alive"),
        (b"Cookie", b"a=b"), (b"Expect", b"100-continue"), (b"Content-Encoding", b"identity"), (b"Origin", b"null"),
        (b"Connection", b"upgrade, http2-settings"), (b"Upgrade", b"h2c"), (b"!#$%&'*+-.^_`|~", b""), (b"ce", b"x"),
    ]),
    max_size=2,
)  # fmt: skip
chunkings = st.one_of(st.none(), st.lists(st.integers(0, 1 << 20), max_size=4))


@st.composite
def attributes(draw: st.DrawFn) -> dict[str, str]:
    """Valid attributes, without a content type."""
    core = {"specversion": "1.0", "id": draw(texts), "source": draw(sources), "type": draw(texts)}
    optional = {"subject": draw(st.none() | texts), "time": draw(st.none() | times)}
    extensions = draw(st.dictionaries(names, texts, max_size=3))
    return extensions | core | {name: text for name, text in optional.items() if text is not None}


@st.composite
def binary_messages(draw: st.DrawFn) -> Message:
    """Valid messages in binary mode, with each header value in one of its possible spellings."""
    values = draw(attributes())
    body = draw(bodies)
    headers = [(_cased(draw, f"ce-{name}"), _written(draw, text)) for name, text in values.items()]
    content_type = draw(st.none() | json_types | other_types)
    if content_type is not None:
        values["datacontenttype"] = content_type
        headers.append((_cased(draw, "content-type"), content_type.encode()))
    headers = [*draw(noise), *draw(st.permutations(headers))]
    return Message(
        headers=headers, body=body, events=[(values, body or None)], target=draw(targets), chunks=draw(chunkings)
    )


def _cased(draw: st.DrawFn, name: str) -> bytes:
    return draw(st.sampled_from([name, name.title(), name.upper()])).encode()


def _written(draw: st.DrawFn, text: str) -> bytes:
    way = draw(st.sampled_from(["plain", "plain", "needless", "quoted", "lower"]))
    safe = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')
    if way == "needless":
        return quote(text, safe="").encode()
    coded = quote(text, safe=safe)
    if way == "lower":
        return re.sub("%..", lambda match: match[0].lower(), coded).encode()
    if way == "quoted":
        return b'"' + coded.replace("\\", "\\\\").encode() + b'"'
    return draw(st.sampled_from([b"", b" ", b"\t"])) + coded.encode() + draw(st.sampled_from([b"", b"  "]))


@st.composite
def envelopes(draw: st.DrawFn) -> tuple[str, tuple[dict[str, str], bytes | None]]:
    """The JSON of a valid event, with its attributes and data."""
    values: dict[str, Any] = draw(attributes())
    texts_of = dict(values)
    typed = draw(st.dictionaries(names, st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.none(), max_size=2))
    for name, value in typed.items():
        texts_of.pop(name, None)
        # The partition key is always text, because it has a column.
        values[name] = value if name != "partitionkey" or value is None else json.dumps(value)
        if value is not None:
            texts_of[name] = json.dumps(value)
    data: bytes | None = None
    data_text = ""
    kind = draw(st.sampled_from(["none", "json", "text", "octets"]))
    if kind == "json":
        content_type = draw(st.none() | json_types)
        text = draw(json_texts)
        data, data_text = text.encode(), f'"data": {text}'
    elif kind == "text":
        content_type = draw(other_types)
        text = draw(texts)
        data, data_text = text.encode(), f'"data":{json.dumps(text)}'
    elif kind == "octets":
        content_type = draw(st.none() | json_types | other_types)
        data = draw(bodies)
        data_text = f'"data_base64":"{base64.b64encode(data).decode()}"'
    else:
        content_type = draw(st.none() | json_types)
    if content_type is not None:
        values["datacontenttype"] = texts_of["datacontenttype"] = content_type
    ascii_ = draw(st.booleans())
    members = [f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=ascii_)}" for name, value in values.items()]
    members = draw(st.permutations([*members, data_text] if data_text else members))
    space = draw(st.sampled_from(["", " ", "\r\n\t"]))
    return space + "{" + space + f"{space},{space}".join(members) + space + "}" + space, (texts_of, data)


@st.composite
def structured_messages(draw: st.DrawFn) -> Message:
    """Valid messages in structured or batch mode."""
    if draw(st.booleans()):
        text, event = draw(envelopes())
        content_types = ["application/cloudevents+json", "Application/CloudEvents+JSON ; charset=UTF-8"]
        events = [event]
    else:
        inner = draw(st.lists(envelopes(), max_size=3))
        text, events = f"[{','.join(text for text, _ in inner)}]", [event for _, event in inner]
        content_types = ["application/cloudevents-batch+json", "APPLICATION/cloudevents-batch+json;x=y"]
    headers = [*draw(noise), (_cased(draw, "content-type"), draw(st.sampled_from(content_types)).encode())]
    if draw(st.booleans()):
        headers.append((b"ce-id", b"the payload wins"))
    return Message(headers=headers, body=text.encode(), events=events, target=draw(targets), chunks=draw(chunkings))


messages = st.one_of(binary_messages(), structured_messages())
_HURT = [
    b"", b" ", b"\xff", b"%C0%A0", b"%FF", b"%", b"%0d%0aX: y", b"\xc3\xa9", b'"', b'"\\"', b"a" * 5000, b"1,2",
    b"%00", b"application/cloudevents", b"application/cloudevents+xml", b"application/cloudevents-batch", b"a/b/c",
    b"text/plain\x0b", b"0.3", b"2.0", b"NaN", b"%ED%A0%80", b"%EF%BF%BF", b"2026-02-30T00:00:00Z", b"gzip",
    b"\x80%41", b"http://[", b"a b",
]  # fmt: skip
_BAD_JSON = [
    b"", b"[", b"]", b"{", b"}", b"{}", b"null", b"NaN", b'"', b"\xff", b"\xef\xbb\xbf", b",", b":", b"\\",
    b"\\u0000", b"\\ud800", b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b'"data":', b'"data_base64":"e!!A=="',
    b'"id":null,', b'"id":1,', b"-", b"1.5", b'"specversion":"0.3",', b'"datacontentencoding":"base64",', b"\0",
    b'"x":[],', b'"X":1,', b"Infinity", b"true", b"1e999",
]  # fmt: skip


@st.composite
def damaged_messages(draw: st.DrawFn) -> Message:
    """Valid messages whose headers, body or both were damaged."""
    message = draw(messages)
    headers, body = list(message.headers), message.body
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["drop", "twice", "value", "name", "add", "cut", "insert", "flip", "replace"]))
        at = draw(st.integers(0, 1 << 16))
        if what in ("drop", "twice", "value", "name") and headers:
            at %= len(headers)
            name, value = headers[at]
            if what == "drop":
                del headers[at]
            elif what == "twice":
                headers.append((name.swapcase(), draw(st.sampled_from([value, b"other"]))))
            elif what == "value":
                headers[at] = (name, draw(st.sampled_from(_HURT)))
            else:
                headers[at] = (
                    draw(st.sampled_from([b"ce-", b"ce-data", b"ce-a_b", b"ce-datacontenttype", b"x"])),
                    value,
                )
        elif what == "add":
            name = draw(st.sampled_from([b"ce-id", b"ce-x", b"content-type", b"content-encoding", b"ce-specversion"]))
            headers.append((name, draw(st.sampled_from(_HURT))))
        elif what == "cut":
            body = body[: at % (len(body) + 1)]
        elif what == "insert":
            at %= len(body) + 1
            body = body[:at] + draw(st.sampled_from(_BAD_JSON)) + body[at:]
        elif what == "flip" and body:
            at %= len(body)
            body = body[:at] + bytes([draw(st.integers(0, 255))]) + body[at + 1 :]
        elif what == "replace":
            body = draw(st.sampled_from([*_BAD_JSON, b"x" * ((1 << 20) + 1), b"[" + b"{}," * 99 + b"{}]"]))
    return Message(headers=headers, body=body, target=message.target, chunks=message.chunks)


_LINES = [
    b"POST / HTTP/1.1", b"GET /healthz HTTP/1.1", b"GET /metrics HTTP/1.0", b"HEAD / HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"PUT / HTTP/1.1", b"CONNECT x:1 HTTP/1.1", b"TRACE / HTTP/1.1", b"BREW / HTTP/1.1",
    b"post / HTTP/1.1", b"POST /", b"POST / HTTP/2.0", b"POST / HTTP/9.9", b"PRI * HTTP/2.0", b"POST  / HTTP/1.1",
    b"POST / HTTP/1.1 ", b"GET /a b HTTP/1.1", b"POST " + b"/" * 70_000 + b" HTTP/1.1", b"\x16\x03\x01\x02\x00\x01",
    b"", b"\0", b"DELETE /readyz HTTP/1.1", b"SSH-2.0-x",
]  # fmt: skip
_FIELDS = [
    b"Content-Length: 3", b"Content-Length: 4", b"Content-Length: -1", b"Content-Length: +3",
    b"Content-Length: 0x3", b"Content-Length: 99999999999999999999", b"Content-Length: 3, 3", b"Content-Length: ",
    b"Content-Length: 00000003", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding: xchunked", b"Transfer-Encoding:", b"Transfer-Encoding: identity",
    b"Transfer-Encoding:\x0bchunked", b"Connection: close", b"Connection: upgrade", b"Upgrade: x",
    b"Expect: 100-continue", b"Expect: 200-ok", b" folded", b"\tfolded: x", b"no colon", b": no name", b"a b: c",
    b"a\0: b", b"a: \0", b"ce-id: 1", b"ce-source: /", b"ce-type: t", b"ce-specversion: 1.0",
    b"content-type: application/cloudevents+json", b"X: " + b"y" * 66_000, b"WebHook-Request-Origin: x",
    b"Authorization: Basic !", b"Content-Length: \xb2", b"Host: a\r\nHost: b",
]  # fmt: skip
_TAILS = [
    b"", b"abc", b"abcd", b"3\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n", b"-1\r\n", b"ffffffffffffffff1\r\n",
    b'3;ext="a"\r\nabc\r\n0\r\n\r\n', b"3\nabc\n0\n\n", b"g\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
    b"0\r\nTrailer: x\r\nce-id: 2\r\n\r\n", b"03\r\nabc\r\n00\r\n\r\n", b"3\r\nab",
    b"0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n",
    b"0\r\n" + b"T: x\r\n" * 9000 + b"\r\n",
]  # fmt: skip


@st.composite
def octet_streams(draw: st.DrawFn) -> bytes:
    """Bytes that are hardly a request: made of bad parts, or a good request that was damaged."""
    if draw(st.booleans()):
        head = [draw(st.sampled_from(_LINES)), *draw(st.lists(st.sampled_from(_FIELDS), max_size=6))]
        return draw(st.sampled_from([b"\r\n", b"\r\n", b"\n"])).join([*head, b"", draw(st.sampled_from(_TAILS))])
    raw = draw(messages).raw()
    at = draw(st.integers(0, 1 << 16)) % (len(raw) + 1)
    what = draw(st.sampled_from(["cut", "insert", "flip", "random", "again"]))
    if what == "cut":
        return raw[:at]
    if what == "insert":
        return raw[:at] + draw(st.sampled_from([b"\0", b"\r\n", b"\n", b"\xff", b": ", b"\r\n\r\n", b" "])) + raw[at:]
    if what == "flip":
        return raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :]
    return raw + raw[:at] if what == "again" else draw(st.binary(max_size=60))


talks = st.builds(
    Talk,
    messages=st.lists(st.one_of(messages, damaged_messages()), min_size=1, max_size=8)
    | st.lists(damaged_messages(), min_size=1, max_size=8),
    is_ahead=st.booleans(),
    cuts=st.lists(st.integers(0, 1 << 16), max_size=3),
)
conversations = st.one_of(talks, talks, octet_streams().map(Octets))


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


_status_line = re.compile(rb"HTTP/1\.1 (\d{3}) [ -~]*").fullmatch
_field = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t\x20-\x7e\x80-\xff]*)").fullmatch


class Conversation:
    """A connection that is read strictly: an answer that is not HTTP fails the test."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def close(self) -> None:
        self.socket.close()

    def send(self, raw: bytes) -> None:
        # If the broker has answered and closed, its answer can still be read.
        with suppress(ConnectionError):
            self.socket.sendall(raw)

    def answer(self, *, bodiless: bool = False) -> Answer | None:
        """The next answer; None if the connection ends instead."""
        while b"\r\n\r\n" not in self._rest:
            if not (some := self._receive()):
                assert not self._rest, f"half an answer: {self._rest!r}"
                return None
            self._rest += some
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        found = _status_line(line)
        assert found, f"no status line: {line!r}"
        if found[1] == b"100":
            return self.answer(bodiless=bodiless)
        headers = {}
        for text in fields:
            matched = _field(text)
            assert matched, f"no header: {text!r}"
            headers[matched[1].decode().lower()] = matched[2].decode("latin-1")
        length = int(headers.get("content-length", "0"))
        if bodiless and not self._rest.startswith(b"{"):
            length = 0
        while len(self._rest) < length:
            some = self._receive()
            assert some, f"an answer without its end: {head!r}"
            self._rest += some
        body, self._rest = self._rest[:length], self._rest[length:]
        return Answer(int(found[1]), headers, body)

    def answers_to_anything(self) -> list[Answer]:
        """All answers until the broker closes, or sends nothing for 50 ms."""
        answers: list[Answer] = []
        self.socket.settimeout(0.05)
        while True:
            try:
                # An answer to HEAD has a length but no body, and the broker may have read a HEAD or not.
                answer = self.answer(bodiless=b"HEAD" in self._sent)
            except TimeoutError:
                return answers
            if answer is None:
                return answers
            answers.append(answer)

    _sent = b""

    def send_anything(self, raw: bytes) -> list[Answer]:
        self._sent = raw[:8]
        self.send(raw)
        return self.answers_to_anything()

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(1 << 16)
        except ConnectionError:
            return b""


def check(answer: Answer) -> None:
    """The answer has a status that may be expected, and a problem is complete."""
    assert answer.status in (200, 202, 204, 400, 404, 405, 408, 413, 415, 417, 431, 501, 505), answer
    if answer.status == 202:
        assert answer.body == b""
    if answer.status >= 400 and answer.body:
        assert answer.headers["content-type"] == "application/problem+json"
        problem = json.loads(answer.body)
        assert problem["status"] == answer.status
        assert problem["title"]
        assert problem["detail"]
    if answer.status == 405:
        assert answer.headers["allow"]


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def meaning(message: Message) -> list[tuple[dict[str, str], bytes | None]]:
    """The events of a message that was accepted, parsed in the simplest way."""
    if message.events is not None:
        return list(message.events)
    headers: dict[str, bytes] = {}
    for name, value in message.headers:
        headers[name.decode().lower()] = value.strip(b" \t")
    content_type = headers.get("content-type", b"").decode("latin-1")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type.startswith("application/cloudevents"):
        envelope = json.loads(message.body)
        return [_envelope_meaning(one) for one in (envelope if "batch" in media_type else [envelope])]
    values = {name[3:]: _header_meaning(value) for name, value in headers.items() if name.startswith("ce-")}
    return [(values | ({"datacontenttype": content_type} if content_type else {}), message.body or None)]


def _header_meaning(value: bytes) -> str:
    if len(value) > 1 and value[:1] == value[-1:] == b'"':
        value = re.sub(rb"\\(.)", rb"\1", value[1:-1], flags=re.DOTALL)
    return unquote_to_bytes(value).decode()


def _envelope_meaning(envelope: dict[str, Any]) -> tuple[dict[str, str], bytes | None]:
    members = dict(envelope)
    is_old = members["specversion"] == "0.3"
    octets = members.pop("data_base64", None) if not is_old else None
    data: bytes | None = None
    if octets is not None:
        data = base64.b64decode(octets)
    elif "data" in members:
        value = members.pop("data")
        content_type = str(members.get("datacontenttype") or "application/json").partition(";")[0].strip().lower()
        if is_old and members.get("datacontentencoding") == "base64":
            data = base64.b64decode(value)
        elif isinstance(value, str) and not content_type.endswith(("/json", "+json")):
            data = value.encode()
        else:
            data = _Json(json.dumps(value).encode())
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in members.items()
        if value is not None
    }, data


class _Json(bytes):
    """JSON data that compares by value, because its spelling is not known."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, bytes) and bool(json.loads(self) == json.loads(other))

    def __hash__(self) -> int:
        return 0


def _meaning_of_stored(event: Event) -> tuple[dict[str, str], bytes | None]:
    return event.attributes_text, event.data_bytes


# ── the broker ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Fuzzed:
    """A broker in its own process, with its output and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    address: tuple[str, int]
    connection: Any
    runner: asyncio.Runner
    position: int = 0
    requests: int = 0
    taken: int = 0
    said_bytes: int = 0
    has_failed: bool = False

    def stored(self) -> list[Event]:
        """The events since the last call."""
        columns = ", ".join(COLUMNS)
        query = f"select {columns}, position from pgbackend.events where position > $1 order by position"
        records = self.runner.run(self.connection.fetch(query, self.position))
        if records:
            self.position = records[-1]["position"]
        return [Event(tuple(record)[:-1]) for record in records]

    def converse(self, what: Talk | Octets) -> None:
        """All claims hold for this conversation."""
        try:
            with closing(Conversation(self.address)) as conversation:
                if isinstance(what, Octets):
                    self._anything(conversation, what)
                else:
                    self._talk(conversation, what)
            self._check_log()
        except BaseException:
            self.has_failed = True
            self.stored()  # these events do not belong to the next conversation
            raise

    def _talk(self, conversation: Conversation, talk: Talk) -> None:
        expected: list[tuple[dict[str, str], bytes | None]] = []
        for piece in talk.beginning():
            conversation.send(piece)
        for index, message in enumerate(talk.messages):
            self.requests += 1
            if index > 0 and not talk.is_ahead:
                conversation.send(message.raw())
            answer = conversation.answer()
            assert answer is not None, "no answer"
            check(answer)
            if message.events is not None:
                assert answer.status == 202, answer
            if answer.status == 202:
                expected += meaning(message)
            if answer.headers.get("connection") == "close":
                break
        stored = [_meaning_of_stored(event) for event in self.stored()]
        assert expected == stored
        self.taken += len(stored)

    def _anything(self, conversation: Conversation, raw: Octets) -> None:
        self.requests += 1
        answers = conversation.send_anything(raw)
        for answer in answers:
            check(answer)
        stored = self.stored()
        if not answers:
            # No answer came in time. Events on their way are stored once a later event is.
            barrier = Message(headers=_BARRIER, body=b"")
            with closing(Conversation(self.address)) as another:
                another.send(barrier.raw())
                said = another.answer()
            assert said is not None
            assert said.status == 202
            stored += self.stored()
            assert stored.pop().id == "barrier"
            assert len(stored) <= raw.count(b"HTTP/1.")
        else:
            taken = sum(answer.status == 202 for answer in answers)
            assert len(stored) == taken or b"batch" in bytes(raw).lower(), (answers, stored)
        octets = bytes(raw)
        is_coded = b"chunked" in octets or b"cloudevents" in octets.lower()
        for event in stored:
            assert is_coded or event.data_bytes is None or event.data_bytes in octets
        self.taken += len(stored)

    def _check_log(self) -> None:
        if self.log.stat().st_size > self.said_bytes:
            said = self.log.read_bytes()[self.said_bytes :].decode()
            self.said_bytes += len(said.encode())
            assert "Traceback" not in said, said
            assert "error" not in said.lower(), said

    def resident_bytes(self) -> int:
        """The resident memory of the process and its children."""
        pids = [self.process.pid]
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[1]) in pids:
                    pids.append(int(stat.parent.name))
            except OSError:
                continue  # it has just ended
        return sum(_resident(pid) for pid in pids)


_BARRIER: Sequence[Header] = (
    (b"ce-specversion", b"1.0"),
    (b"ce-id", b"barrier"),
    (b"ce-source", b"/"),
    (b"ce-type", b"t"),
)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def fuzzed(dsn: str, log: Path) -> Iterator[Fuzzed]:
    command = [sys.executable, "-m", "pgbackend", "serve", "--dsn", dsn, "--port", "0", "--config-inline", "{}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PGBACKEND_")}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            address = _address(process, log)
            with asyncio.Runner() as runner:
                connection: Any = runner.run(asyncpg.connect(dsn))
                try:
                    broker = Fuzzed(process, log, address, connection, runner)
                    broker.said_bytes = log.stat().st_size
                    yield broker
                finally:
                    runner.run(connection.close())
        finally:
            process.terminate()
            process.wait(timeout=30)


def _address(process: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(rb"http://(127\.0\.0\.1):(\d+)[^\n]*\n", log.read_bytes()):
            return found[1].decode(), int(found[2])
        time.sleep(0.05)
    raise TimeoutError(f"the broker does not listen: {log.read_text()}")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_the_broker_answers_any_bytes_and_stores_what_it_accepted(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wanted = 50_000 if request.config.getoption("--long") else 500
    # In a thread: hypothesis has no asynchronous tests, and the connection to the log has its own loop.
    await asyncio.to_thread(_fuzz, database, tmp_path / "log", wanted)


def _fuzz(dsn: str, log: Path, wanted: int) -> None:
    with fuzzed(dsn, log) as broker:
        resident: list[tuple[int, int]] = []

        def converse(what: Talk | Octets) -> None:
            if broker.requests >= wanted and not broker.has_failed:  # hypothesis still shrinks a failure
                return
            broker.converse(what)
            if broker.requests >= len(resident) * wanted / 10:
                resident.append((broker.requests, broker.resident_bytes()))

        began = time.monotonic()
        run: Callable[[], None] = given(what=conversations)(converse)
        settings(
            max_examples=wanted, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )(run)()
        seconds = time.monotonic() - began
        resident.append((broker.requests, broker.resident_bytes()))
        broker.converse(Talk(messages=[Message(headers=_BARRIER, body=b"", events=[(_texts(_BARRIER), None)])]))
        figures = ", ".join(f"{requests}: {size / 2**20:.1f} MiB" for requests, size in resident)
        report(f"{broker.requests} requests in {seconds:.0f} s, {broker.taken} events taken; resident after {figures}")

        # By then, caches, pools and the allocator have what they keep.
        settled = max(size for requests, size in resident if requests <= wanted * 0.3)
        assert resident[-1][1] < settled + (24 << 20), figures


def _texts(headers: Sequence[Header]) -> dict[str, str]:
    return {name.decode()[3:]: value.decode() for name, value in headers}
