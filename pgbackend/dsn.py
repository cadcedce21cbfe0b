"""DSNs as people have them: read, put into one form, and said without their secrets. Pure but for libpq's variables.

A DSN may name several hosts, as libpq's may, in its host part or in `?host=`: of those the one is meant that is the
primary. It is taken apart here and not by asyncpg, which goes through the hosts within one timeout, so that a machine
that is gone hides all that come after it, and which leaves lists with IPv6 addresses to Python's urlsplit(), which
refuses them.
"""

import os
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlencode

from pgbackend.errors import ConfigError

_SCHEMES = ("postgres", "postgresql")
_DRIVERS = ("", "asyncpg", "psycopg", "psycopg2")
_BRACKETED = re.compile(r"\[([^\[\]]+)\](?::(.*))?")


@dataclass(frozen=True, slots=True)
class Host:
    """One server of a DSN."""

    name: str
    """A host's name or address, or the directory of a Unix socket."""
    port: int | None
    """None: as PGPORT says, or 5432."""

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name and self.port is not None else self.name
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a DSN says, for whoever connects."""

    dsn: str
    """The DSN without its hosts."""
    hosts: tuple[Host, ...]
    """In their order. None at all: wherever asyncpg looks by default."""
    read_write: bool
    """Whether a primary is passed over whose transactions are read-only by default."""
    where: str
    """Hosts, ports and database, fit to be printed: no user, no password."""
    application_name: str | None
    """What its connections are to be called, if it says so."""

    @classmethod
    def of(cls, dsn: str) -> Self:
        """Raises ConfigError for what cannot be meant."""
        scheme, authority, path, query = _split(dsn)
        auth, at, netloc = authority.rpartition("@")
        options = dict(query)
        hosts, ports = options.pop("host", ""), options.pop("port", "")
        wanted = options.pop("target_session_attrs", "") or os.environ.get("PGTARGETSESSIONATTRS", "")
        if netloc:
            # asyncpg does not look for a port elsewhere then.
            found = tuple(Host(unquote(host.name), host.port) for host in _hosts(netloc.split(","), ""))
        elif names := hosts or os.environ.get("PGHOST", ""):
            found = _hosts(names.split(","), ports)
        else:
            found = ()
            if ports:
                options["port"] = ports
        if wanted not in ("", "any", "primary", "read-write"):
            raise ConfigError(
                f"target_session_attrs is {wanted!r}: the log needs the primary. Leave it away, or say read-write."
            )
        rest = f"{scheme}://{auth}{at}{path}" + (f"?{urlencode(options, quote_via=quote)}" if options else "")
        where = ",".join(map(str, found)) or "localhost"
        database = unquote(path.lstrip("/")) or options.get("dbname", options.get("database", ""))
        return cls(
            rest,
            found,
            read_write=wanted == "read-write" or (not wanted and len(found) > 1),
            where=f"{where}/{database}" if database else where,
            application_name=options.get("application_name"),
        )


def normalize_dsn(dsn: str) -> str:
    """The DSN in the one form that the rest of this package takes: any of the spellings that people have.

    >>> normalize_dsn("postgres+asyncpg://me@db/app?ssl=require")
    'postgres://me@db/app?sslmode=require'
    >>> normalize_dsn("postgresql://a:1,[::1]:2/app?target_session_attrs=read-write")
    'postgresql://a:1,[::1]:2/app?target_session_attrs=read-write'

    Raises ConfigError when it is no PostgreSQL URL, or asks for anything but a primary.
    """
    scheme, authority, path, query = _split(dsn)
    # SQLAlchemy's spelling for asyncpg: ?ssl=…; libpq's is ?sslmode=….
    options = [("sslmode" if name == "ssl" else name, value) for name, value in query]
    normalized = f"{scheme}://{authority}{path}" + (f"?{urlencode(options, quote_via=quote)}" if options else "")
    Target.of(normalized)
    return normalized


def describe_dsn(dsn: str) -> str:
    """Hosts, ports and database of a DSN, fit to be printed: no user, no password.

    >>> describe_dsn("postgresql://me:secret@a:1,[::1]:2/app"), describe_dsn("postgresql:///app?host=/run/a,/run/b")
    ('a:1,[::1]:2/app', '/run/a,/run/b/app')
    """
    return Target.of(dsn).where


def _split(dsn: str) -> tuple[str, str, str, list[tuple[str, str]]]:
    """Scheme, user and hosts, path with its slash, options."""
    scheme, separator, rest = dsn.partition("://")
    if not separator:
        # Of what is not even a URL nothing can be shown that is sure to be no password.
        raise ConfigError("The DSN is not a URL: expected postgresql://user@host:port/database.")
    base, _, driver = scheme.lower().partition("+")
    if base not in _SCHEMES or driver not in _DRIVERS:
        raise ConfigError(f"The DSN's scheme is {scheme!r}: expected postgresql:// or postgres://.")
    head, _, query = rest.partition("?")
    authority, slash, path = head.partition("/")
    return base, authority, slash + path, parse_qsl(query, keep_blank_values=True)


def _hosts(names: list[str], ports: str) -> tuple[Host, ...]:
    """`ports`: one for all, or as many as names; those that a name brings along count more."""
    given = ports.split(",")
    if len(given) not in (1, len(names)):
        raise ConfigError(f"The DSN has {len(given)} ports for {len(names)} hosts: expected one for all, or one each.")
    given = given * len(names) if len(given) == 1 else given
    return tuple(_host(name, port) for name, port in zip(names, given, strict=True))


def _host(text: str, port: str) -> Host:
    name, own = text, ""
    if match := _BRACKETED.fullmatch(text):
        name, own = match[1], match[2] or ""
    elif not text.startswith("/") and text.count(":") == 1:
        name, _, own = text.partition(":")
    if not name or name.startswith("["):
        raise ConfigError(f"The DSN has {text!r} for a host: expected a name, an address, or a socket's directory.")
    number = own or port
    if number and not (number.isascii() and number.isdigit() and 0 < int(number) < 1 << 16):
        raise ConfigError(f"The DSN has {number!r} for a port: expected a number from 1 to 65535.")
    return Host(name, int(number) if number else None)
