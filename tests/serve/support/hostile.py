"""Targets that misbehave, in a process of their own, so that they cost the broker's process nothing.

python -m tests.serve.support.hostile hang reset    prints a port for each, and serves until its standard input ends
"""

import asyncio
import itertools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

_PAUSE = 0.02


def hang(conversation: socket.socket) -> None:
    _read_request(conversation)
    threading.Event().wait()


def never_read(conversation: socket.socket) -> None:
    threading.Event().wait()


def reset(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conversation.close()


def close(conversation: socket.socket) -> None:
    _read_request(conversation)


def garbage(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(os.urandom(1 << 16))


def redirect(conversation: socket.socket) -> None:
    while _read_request(conversation):
        conversation.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")


def trickle_headers(conversation: socket.socket) -> None:
    _read_request(conversation)
    for byte in itertools.chain(b"HTTP/1.1 200 OK\r\nX-Slow: ", itertools.repeat(ord("x"))):
        conversation.sendall(bytes((byte,)))
        time.sleep(_PAUSE)


def trickle_body(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        conversation.sendall(b"x")
        time.sleep(_PAUSE)


def close_in_the_middle(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 200 OK\r\nContent-Le")


def endless_headers(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 200 OK\r\n")
    _pour(conversation, b"X-Header: some value that is not so long\r\n" * 1000)


def endless_header(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 200 OK\r\nX-Header: ")
    _pour(conversation, b"x" * (1 << 16))


def interim_flood(conversation: socket.socket) -> None:
    _read_request(conversation)
    _pour(conversation, b"HTTP/1.1 100 Continue\r\n\r\n" * 2000)


def endless_body(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 500 No\r\n\r\n")
    _pour(conversation, b"x" * (1 << 16))


def endless_chunks(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
    _pour(conversation, b"1\r\nx\r\n" * 10_000)


def endless_reply(conversation: socket.socket) -> None:
    _read_request(conversation)
    conversation.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/cloudevents+json\r\n\r\n")
    _pour(conversation, b'{"data": ' + b" " * (1 << 16))


def _pour(conversation: socket.socket, data: bytes) -> None:
    while True:
        conversation.sendall(data)


def _read_request(conversation: socket.socket) -> bytes:
    """One request; empty when the client has closed the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (some := conversation.recv(1 << 16)):
            return b""
        received += some
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        if not (some := conversation.recv(1 << 16)):
            return b""
        body += some
    return head + body


KINDS: dict[str, Callable[[socket.socket], None]] = {
    kind.__name__: kind
    for kind in (
        hang,
        never_read,
        reset,
        close,
        garbage,
        redirect,
        trickle_headers,
        trickle_body,
        close_in_the_middle,
        endless_headers,
        endless_header,
        interim_flood,
        endless_body,
        endless_chunks,
        endless_reply,
    )
}


@asynccontextmanager
async def behaving(*kinds: str) -> AsyncIterator[list[str]]:
    """The URLs of targets of these kinds, in one process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, *kinds, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        ports = [int(await process.stdout.readline()) for _ in kinds]
        yield [f"http://127.0.0.1:{port}/" for port in ports]
    finally:
        process.kill()
        await process.wait()


def _converse(kind: Callable[[socket.socket], None], conversation: socket.socket) -> None:
    with conversation, suppress(OSError):
        kind(conversation)


def _accept(kind: Callable[[socket.socket], None], server: socket.socket) -> None:
    while True:
        conversation, _ = server.accept()
        threading.Thread(target=_converse, args=(kind, conversation), daemon=True).start()


def main() -> None:
    for kind in (KINDS[name] for name in sys.argv[1:]):
        server = socket.create_server(("127.0.0.1", 0), backlog=512)
        if kind is never_read:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        threading.Thread(target=_accept, args=(kind, server), daemon=True).start()
        print(server.getsockname()[1], flush=True)  # noqa: T201 - for the parent
    # The end of the parent closes this, even if it was killed.
    sys.stdin.read()


if __name__ == "__main__":
    main()
