"""A target for the broker that prints the events that arrive. With `-- COMMAND` it runs a command, and ends with it.

python examples/receiver.py
python examples/receiver.py --port 8888 -- pgbackend serve --config examples/broker.yaml
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class Arrival(NamedTuple):
    """One event that has arrived."""

    path: str
    mode: str
    type: str
    id: str
    source: str
    data: str

    def __str__(self) -> str:
        return f"arrived at {self.path} ({self.mode}): {self.type} id={self.id} source={self.source} {self.data}"


OnArrival = Callable[[Arrival], int | None]


class Receiver(ThreadingHTTPServer):
    """Answers each POST with the status that `on_arrival` returns, or with 204 if it returns None.

    `on_arrival` is called for one request at a time.
    """

    daemon_threads = True

    def __init__(self, port: int, on_arrival: OnArrival) -> None:
        self.on_arrival = on_arrival
        self.one_at_a_time = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)
        threading.Thread(target=self.serve_forever, name="receiver", daemon=True).start()

    @property
    def url(self) -> str:
        """The URL of the receiver."""
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        if self.headers.get("content-type", "").startswith("application/cloudevents"):
            event = json.loads(body)
            mode, data = "structured", json.dumps(event.get("data"))
        else:
            event = {name[3:].lower(): value for name, value in self.headers.items() if name.lower().startswith("ce-")}
            mode, data = "binary", body.decode(errors="replace")
        type_, id_, source = (str(event.get(name, "?")) for name in ("type", "id", "source"))
        with self.server.one_at_a_time:
            status = self.server.on_arrival(Arrival(self.path, mode, type_, id_, source, data)) or 204
        self.send_response(status)
        if status != 204:
            self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print no access log."""


def show(arrival: Arrival) -> None:
    """Print it."""
    print(arrival, flush=True)


def main(on_arrival: OnArrival = show) -> int:
    """Receive until interrupted, or until the command ends. Return the command's exit code, or 0."""
    parser = argparse.ArgumentParser(description="Print the events that a broker delivers.")
    parser.add_argument("--port", type=int, default=8888)
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --: a command to run; end when it ends")
    given = parser.parse_args()
    try:
        receiver = Receiver(given.port, on_arrival)
    except OSError as error:
        print(f"Error: the receiver cannot listen on port {given.port}: {error.strerror}.", file=sys.stderr)
        return 1
    if given.command:
        return run_beside(given.command)
    print(f"Receiving at {receiver.url}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


def run_beside(command: list[str]) -> int:
    """Run the command to its end, and pass signals on to it. Return its exit code."""
    # The new session keeps Ctrl-C from reaching the command twice: the broker would then exit without draining.
    child = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - the user's own command
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: child.send_signal(number))
    return child.wait()


if __name__ == "__main__":
    sys.exit(main())
