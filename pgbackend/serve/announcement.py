"""Announces to people, and to systemd, that the broker serves."""

import os
import shlex
import socket
from collections.abc import Callable
from contextlib import suppress

from pgbackend.model import Info
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.console import closed_because
from pgbackend.serve.egress.outcomes import public_url
from pgbackend.serve.ingest.ports import Ports
from pgbackend.serve.options import Options


def announce(
    options: Options, info: Info, configuration: Configuration, ports: Ports, say: Callable[[str], None]
) -> None:
    """`say` got the text for people, and systemd, if it started the broker, the READY=1 of sd_notify(3)."""
    with suppress(OSError):  # nobody reads standard output any more, or its disk is full
        say(_welcome(options, info, configuration, ports))
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            systemd.sendall(b"READY=1")


def _welcome(options: Options, info: Info, configuration: Configuration, ports: Ports) -> str:
    """Where the broker listens, what it does, and a command to try it with."""
    url = f"{'http' if options.tls_cert is None else 'https'}://{_host_and_port(ports.events)}/"
    lines = [f"Broker takes CloudEvents at {url}", f"  log: schema {info.schema}, {info.server}"]
    if ports.admin is not None:
        lines.append(f"  probes and metrics: http://{_host_and_port(ports.admin)}/healthz, /readyz and /metrics")
    lines.append(f"  console: {_console(url, configuration, ports)}")
    for name, trigger in configuration.triggers.items():
        target = "no target URL" if trigger.target.url is None else public_url(trigger.target.url)
        lines.append(f"  trigger: {name} -> {target}")
    if not configuration.triggers:
        reason = "the configuration has none" if options.config or options.config_inline else "no --config is given"
        lines.append(f"  trigger: none, {reason}: events are stored and not delivered")
    lines.append(f"Try: {_curl(url, options, configuration)}")
    return "\n".join(lines)


def _console(url: str, configuration: Configuration, ports: Ports) -> str:
    """Where the console is, and who may look."""
    if not configuration.console.enabled:
        return "none, the configuration switches it off"
    bound, *_ = ports.events.getsockname()
    if configuration.console.user is not None:
        rule = "asks for its user and password"
    elif (reason := closed_because(configuration, bound=bound)) is not None:
        rule = f"closed, because {reason}: give it a user and a password in the configuration"
    else:
        rule = "open to this machine only"
    shown = "" if configuration.console.actions else "; it only shows"
    return f"{url}console/ ({rule}{shown})"


def _curl(url: str, options: Options, configuration: Configuration) -> str:
    """A command that sends one event."""
    headers = ["ce-specversion: 1.0", "ce-id: 1", "ce-source: /try", "ce-type: com.example.tried"]
    headers += ["content-type: application/json"]
    if configuration.ingest.user is not None:
        headers += ["authorization: Basic …"]
    elif configuration.ingest.token is not None:
        headers += ["authorization: Bearer …"]
    arguments = " ".join(f"-H {shlex.quote(header)}" for header in headers)
    if options.tls_cert is not None:
        # -k: the certificate is for a name that is unknown here.
        arguments = f"-k {arguments}" if options.tls_client_ca is None else f"-k --cert … {arguments}"
    data = shlex.quote('{"hello": "world"}')
    return f"curl -i {url} {arguments} -d {data}"


def _host_and_port(bound: socket.socket) -> str:
    """The host and port of a URL that leads to this socket from the same machine."""
    host, port = bound.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - to be replaced
    return f"[{reachable}]:{port}" if ":" in reachable else f"{reachable}:{port}"
