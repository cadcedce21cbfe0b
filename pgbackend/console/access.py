"""The doors of the console: who may look, and which requests may change something.

`application` asks an `Access` about each request, and `check_action` about each POST. The promise: without credentials
or a decision of the application, the console is open to this machine alone, and to no web page of another origin:

    Basic        a user and a password, compared in constant time
    Decided      a function of the application's decides
    Local        a client at a loopback address, addressed to a loopback name, with no sign of a proxy in between
    Closed       nobody

Any site can let its own name lead to 127.0.0.1 (DNS rebinding), but the browser still sends that name as the Host.
"""

import re
from base64 import b64decode
from collections.abc import Awaitable, Callable
from hmac import compare_digest
from inspect import isawaitable
from ipaddress import IPv6Address, ip_address
from typing import Protocol
from urllib.parse import urlsplit

from starlette.requests import Request

from pgbackend.console.problems import Problem

Authorize = Callable[[Request], Awaitable[bool] | bool]
"""Whether this request may use the console."""

HEADER = "x-pgbackend-console"
"""No form can send it, and no page of another origin may."""

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_host = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE).fullmatch


class Access(Protocol):
    """A rule that says who may look."""

    async def check(self, request: Request, /) -> None:
        """Return if the request may look. Raises Problem."""


class Basic:
    """Requests with these credentials of HTTP Basic."""

    def __init__(self, user: str, password: str) -> None:
        self._expected = f"{user}:{password}".encode()

    async def check(self, request: Request, /) -> None:
        """Return if it has the credentials. Raises Problem."""
        given = request.headers.getlist("authorization")
        scheme, _, credentials = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "basic" or not compare_digest(_decoded(credentials.strip()), self._expected):
            raise Problem(
                401,
                "Authorization is missing or wrong. Give the user and the password of the console.",
                headers={"www-authenticate": 'Basic realm="pgbackend console", charset="UTF-8"'},
            )


class Decided:
    """Requests for which the application's function is true."""

    def __init__(self, authorize: Authorize) -> None:
        self._authorize = authorize

    async def check(self, request: Request, /) -> None:
        """Return if the function says so. Raises Problem, and what the function raises."""
        allowed = self._authorize(request)
        if isawaitable(allowed):
            allowed = await allowed
        if allowed is not True:
            raise Problem(403, "This request may not use the console: the application's `authorize` refused it.")


class Local:
    """Requests from this machine. `cure` says how to open the console to others."""

    def __init__(self, cure: str) -> None:
        self._cure = cure

    async def check(self, request: Request, /) -> None:
        """Return if it comes from this machine, and is meant for it. Raises Problem."""
        if (reason := _foreign(request)) is not None:
            raise Problem(403, f"{reason} Without credentials the console is open to this machine only. {self._cure}")


class Closed:
    """No requests. `reason` says why, and how to open the console."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def check(self, _request: Request, /) -> None:
        """Raises Problem."""
        raise Problem(403, self._reason)


def check_reading(request: Request) -> None:
    """Return if no page of another site asks for this. Raises Problem.

    Such a page could not read the answer, but make PostgreSQL search for it.
    """
    if request.headers.getlist("sec-fetch-site") not in ([], ["same-origin"], ["none"]):
        raise Problem(403, "Another site made this request (Sec-Fetch-Site). Only the console's own page may do this.")


def check_action(request: Request) -> None:
    """Return if no page of another origin can have made this POST. Raises Problem."""
    if request.headers.getlist(HEADER) != ["1"]:
        raise Problem(403, "Header X-Pgbackend-Console: 1 is missing. Only the console's own page may do this.")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Problem(403, "The Content-Type is not application/json. Only the console's own page may do this.")
    sites = request.headers.getlist("sec-fetch-site")
    if sites not in ([], ["same-origin"]):
        raise Problem(403, "Another site made this request (Sec-Fetch-Site). Only the console's own page may do this.")
    origins = request.headers.getlist("origin")
    if origins and (len(origins) > 1 or not _is_origin_of(origins[0], request.headers.getlist("host"))):
        raise Problem(
            403,
            "Another origin made this request: Origin and Host differ. A proxy in front of the console must pass on "
            "the Host header of its clients.",
        )


def _foreign(request: Request) -> str | None:
    """Why the request is not from this machine; None if it is."""
    if request.client is None or not is_loopback(request.client.host):
        return "The client is not at a loopback address."
    # nginx speaks HTTP/1.0 unless it is told otherwise, and browsers do not. It adds no header by itself.
    if request.scope.get("http_version") == "1.0" or any(name in request.headers for name in _FORWARDED):
        return "The request came through a proxy."
    hosts = request.headers.getlist("host")
    found = _host(hosts[0]) if len(hosts) == 1 else None
    if found is None or not _is_own_name(found["name"].lower().removesuffix(".")):
        return "The Host header is not a name of this machine for itself, such as localhost."
    return None


def is_loopback(address: str) -> bool:
    """Whether this is a loopback address.

    >>> [is_loopback(address) for address in ("127.0.0.1", "::1", "::ffff:127.0.0.2", "10.0.0.1", "testclient")]
    [True, True, True, False, False]
    """
    try:
        found = ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback


def _is_own_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name.removeprefix("[").removesuffix("]"))


def _is_origin_of(origin: str, hosts: list[str]) -> bool:
    """Whether the Origin is at the Host. The scheme does not count, because a proxy may end TLS."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    found = _host(hosts[0]) if len(hosts) == 1 else None
    if found is None or parts.scheme not in _DEFAULT_PORTS:
        return False
    default = _DEFAULT_PORTS[parts.scheme]
    name = found["name"].lower().removeprefix("[").removesuffix("]")
    return (parts.hostname, port or default) == (name, int(found["port"] or default))


def _decoded(credentials: str) -> bytes:
    try:
        return b64decode(credentials, validate=True)
    except ValueError:
        return b""
