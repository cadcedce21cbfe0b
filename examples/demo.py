"""Sends events in every mode through a broker with an embedded PostgreSQL, and prints what two triggers deliver."""

import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request

from receiver import Arrival, Receiver

TYPE = "com.example.order.created"
JSON = "application/cloudevents+json"


def main() -> int:
    """Return 0 when every event has arrived at its targets."""
    arrivals: queue.Queue[Arrival] = queue.Queue()
    receiver = Receiver(0, arrivals.put)
    configuration = {
        "triggers": {
            "billing": {"target": {"url": receiver.url + "billing"}, "filters": [{"exact": {"type": TYPE}}]},
            "audit": {"target": {"url": receiver.url + "audit", "mode": "structured"}, "order": "strict"},
        }
    }
    with tempfile.TemporaryDirectory(prefix="pgbackend-demo-", ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", "pgbackend", "serve", "--port", "0", "--data-dir", directory]
        command += ["--log-level", "warning"]  # this demo prints enough itself
        command += ["--config-inline", json.dumps(configuration)]
        broker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the command above
        try:
            url = announced_url(broker)
            if url is None:
                return broker.wait() or 1
            send_in_every_mode(url)
            for number in range(7):  # audit gets all four events, billing the three of its type
                try:
                    print(arrivals.get(timeout=30), flush=True)
                except queue.Empty:
                    print(f"Error: only {number} of 7 deliveries arrived within 30 s.", file=sys.stderr)
                    return 1
        finally:
            broker.send_signal(signal.SIGTERM)
            broker.wait()
    print("All events arrived. Run `make serve` and send some of your own.")
    return 0


def announced_url(broker: "subprocess.Popen[str]") -> str | None:
    """Print the broker's output while it starts. Return its URL, or None if it ended."""
    url = None
    for line in broker.stdout or ():
        if line.startswith("Try: "):
            return url
        print(line, end="", flush=True)
        if found := re.match(r"Broker takes CloudEvents at (\S+)", line):
            url = found[1]
    return None


def send_in_every_mode(url: str) -> None:
    """Send four events: one in binary mode, one in structured mode, two in a batch."""
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/shop", "ce-type": TYPE}
    post(url, "binary mode", headers | {"content-type": "application/json"}, b'{"order": 17}')
    post(url, "structured mode", {"content-type": JSON}, json.dumps(event("2", {"order": 18})).encode())
    batch = [event("3", {"order": 19}), event("4", "cancelled") | {"type": "com.example.order.cancelled"}]
    post(url, "a batch of 2", {"content-type": "application/cloudevents-batch+json"}, json.dumps(batch).encode())


def event(id_: str, data: object) -> dict[str, object]:
    """Return an event in the JSON format."""
    return {"specversion": "1.0", "id": id_, "source": "/shop", "type": TYPE, "data": data}


def post(url: str, what: str, headers: dict[str, str], body: bytes) -> None:
    """Send one request and print the answer."""
    request = urllib.request.Request(url, body, headers)  # noqa: S310 - http, to the broker above
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        print(f"sent in {what}: {answer.status} {answer.reason}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
