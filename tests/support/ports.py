"""Ports for programs that must be told one."""

import random
import socket
from contextlib import suppress


def unasked_port() -> int:
    """A free port below those that the system gives to programs that ask for any (from 32,768)."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
