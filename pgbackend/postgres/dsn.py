"""Reads DSNs by libpq's rules, and describes them without their secrets.

A DSN is a URL or `name=value …`. It is parsed here, and asyncpg gets separate arguments: asyncpg reads a `#`, `[` or
`]` in a password as a part of the URL's structure, and then connects to another database, as another user. A DSN may
name several hosts, one of which is the primary. libpq's environment variables and service files count as well.

The promise: no message shows a password, nor any text of a DSN that cannot be parsed, because it may be one.
"""

import configparser
import getpass
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlencode

from pgbackend.errors import ConfigError

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SCHEMES = ("postgres", "postgresql")
_DRIVERS = ("", "asyncpg", "psycopg", "psycopg2")
_HOST = re.compile(r"(?:\[([^\]]+)\](?=[:/?,]|$)|((?!\[)[^:/?,]*))(?::([^/?,]*))?")
_SPACES = " \t\n\r\f\v"
_WORD = re.compile(r"\s*([^=\s]+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|(?!')((?:[^\s\\]|\\.|\\\Z)*))", re.ASCII | re.DOTALL)
_ESCAPED = re.compile(r"\\(.?)", re.DOTALL)
_NO_ENCODING = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")

_SSLMODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_ENCRYPTED = ("require", "verify-ca", "verify-full")
_FILES = ("sslcert", "sslkey", "sslrootcert", "sslcrl")
_TLS = ("sslmode", *_FILES, "sslpassword", "sslnegotiation", "ssl_min_protocol_version", "ssl_max_protocol_version")
"""Options of encryption, which asyncpg reads only from a DSN."""
_FOR_ASYNCPG = (*_TLS, "krbsrvname", "gsslib")
_WITH_SYSTEM_ROOTS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslnegotiation")
DEFAULT_HOSTS = ("/run/postgresql", "/var/run/postgresql", "/tmp", "localhost")  # noqa: S108 - where PostgreSQL puts its sockets
"""Where to look for PostgreSQL when the DSN names no host."""


def _is(*values: str) -> Callable[[str], bool]:
    return lambda value: value.lower() in values


_IGNORED: dict[str, Callable[[str], bool]] = {
    # The kernel watches each connection, with shorter times than these would set.
    **dict.fromkeys(
        ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"), lambda _: True
    ),
    # All hosts are asked, and only one is the primary.
    "load_balance_hosts": _is("disable", "random"),
    # asyncpg has no channel binding; "require" is accepted with encryption, see _check_encryption().
    "channel_binding": _is("disable", "prefer", "require"),
    "gssencmode": _is("disable", "prefer"),
    "gssdelegation": _is("0"),
    "client_encoding": _is("utf8", "utf-8", "unicode", "auto"),
    "sslcompression": _is("0", "1"),
    "sslcertmode": _is("allow"),
    "sslsni": _is("1"),
    "replication": _is("false", "off", "no", "0"),
    "min_protocol_version": _is("3.0"),
    "max_protocol_version": _is("3.0", "3.2", "latest"),
    # SQLAlchemy's option for asyncpg.
    "prepared_statement_cache_size": lambda _: True,
}
"""Options that change nothing here, as long as their value passes the check."""

_REFUSED = (
    "require_auth", "requirepeer", "sslcrldir", "sslkeylogfile", "scram_client_key", "scram_server_key", "oauth_issuer",
    "oauth_client_id", "oauth_client_secret", "oauth_scope",
)  # fmt: skip
"""Options of libpq that asyncpg does not support."""


@dataclass(frozen=True, slots=True)
class Host:
    """One server of a DSN."""

    name: str
    """A host's name or address, the directory of a Unix socket, or "" for the places in `DEFAULT_HOSTS`."""
    port: int | None
    """None means 5432."""
    address: str | None = None
    """Its IP address (hostaddr), if the DSN has one; the name is not looked up then."""

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name and self.port is not None else self.name or "localhost"
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """The contents of a DSN, ready to connect with."""

    hosts: tuple[Host, ...]
    """At least one, in the DSN's order."""
    user: str
    password: str | None = field(repr=False)
    """None means PGPASSWORD, or the password file."""
    passfile: str | None
    database: str | None
    """None means PGDATABASE, or the user's name."""
    options: tuple[tuple[str, str], ...] = field(repr=False)
    """Options that asyncpg reads only from a DSN."""
    settings: tuple[tuple[str, str], ...] = field(repr=False)
    """Server settings for the session."""
    connect_timeout: float | None
    """Seconds, for each host."""
    read_write: bool
    """Whether to pass over a primary whose transactions are read-only by default."""
    where: str
    """Hosts, ports and database, safe to print: no user, no password."""
    application_name: str | None

    @classmethod
    def of(cls, dsn: str) -> Self:
        """The target of a DSN. Raises ConfigError for a DSN that is wrong, or that asks for something unsupported."""
        options = {name: value for name, value in _with_service(parse_dsn(dsn)).items() if value}
        hosts = _hosts(options)
        wanted = options.pop("target_session_attrs", "") or os.environ.get("PGTARGETSESSIONATTRS", "")
        if wanted not in ("", "any", "primary", "read-write"):
            raise ConfigError(
                f"target_session_attrs is {wanted!r}: the log needs the primary. Leave it out, or set it to read-write."
            )
        _check_encryption(options, hosts)
        _drop_ignored(options)
        database = options.pop("dbname", None)
        where = ",".join(map(str, hosts))
        name, fallback = options.pop("application_name", None), options.pop("fallback_application_name", None)
        return cls(
            hosts=hosts,
            user=options.pop("user", "") or os.environ.get("PGUSER") or _account(),
            password=options.pop("password", None),
            passfile=options.pop("passfile", None),
            database=database,
            connect_timeout=_connect_timeout(options.pop("connect_timeout", "")),
            options=tuple((name, options.pop(name)) for name in _FOR_ASYNCPG if name in options),
            settings=tuple(options.items()),
            read_write=wanted == "read-write" or (not wanted and len(hosts) > 1),
            where=f"{where}/{database}" if database else where,
            application_name=name or fallback,
        )

    def name_of(self, host: Host) -> str:
        """A host as messages name it: with the database when the DSN has only one host."""
        return str(host) if len(self.hosts) > 1 else self.where


def parse_dsn(dsn: str) -> dict[str, str]:
    r"""The options of a DSN by libpq's names, parsed as libpq does.

    >>> parse_dsn("postgresql://me:p%40#[w]@db,[::1]:6000/app?sslmode=require")["password"]
    'p@#[w]'
    >>> parse_dsn(r"host=/run/postgresql user=me password='it\'s'")["password"]
    "it's"

    Accepts what libpq accepts, and also other spellings of the scheme and `ssl=…`. Raises ConfigError for the rest.
    """
    text = dsn if isinstance(dsn, str) else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    # A DSN from a file ends in a newline.
    if scheme := _SCHEME.match(text.strip(_SPACES)):
        base, _, driver = scheme[1].lower().partition("+")
        if base not in _SCHEMES or driver not in _DRIVERS:
            raise ConfigError(f"The DSN's scheme is {scheme[1]!r}: expected postgresql:// or postgres://.")
        options = _parse_url(text.strip(_SPACES)[scheme.end() :])
    elif "=" in text and "\0" not in text:
        options = _parse_words(text)
    else:
        raise ConfigError(
            "The DSN is not a URL: expected postgresql://user@host:port/database, or host=… port=… user=… dbname=…."
        )
    # `database` is asyncpg's name for it, `ssl` is SQLAlchemy's for asyncpg; libpq knows ssl=true only.
    if "database" in options:
        options.setdefault("dbname", options.pop("database"))
    if "ssl" in options:
        mode = options.pop("ssl")
        options["sslmode"] = "require" if mode.lower() == "true" else mode
    return options


def normalize_dsn(dsn: str) -> str:
    """The DSN as a URL that every driver reads in the same way.

    >>> normalize_dsn("postgres+asyncpg://me:#@db/app?ssl=require")
    'postgresql://me:%23@db/app?sslmode=require'

    Raises ConfigError as `Target.of()` does.
    """
    Target.of(dsn)
    return build_dsn(parse_dsn(dsn))


def build_dsn(options: Mapping[str, str]) -> str:
    """The URL that `parse_dsn()` parses into these options."""
    rest = {name: value for name, value in options.items() if value}
    user, password, database = (quote(rest.pop(name, ""), safe="") for name in ("user", "password", "dbname"))
    credentials = user + (f":{password}" if password else "")
    hosts = ""
    if "[" not in rest.get("host", "["):
        names, ports = rest.pop("host").split(","), rest.pop("port", "").split(",")
        ports = ports * len(names) if len(ports) == 1 else ports
        hosts = ",".join(_authority(*one) for one in zip(names, ports, strict=True))
    query = urlencode(rest, quote_via=quote)
    return f"postgresql://{credentials}{'@' if credentials else ''}{hosts}/{database}{'?' if query else ''}{query}"


def _authority(name: str, port: str) -> str:
    text = quote(name, safe=":" if ":" in name else "")
    return (f"[{text}]" if ":" in name else text) + (f":{port}" if port else "")


def describe_dsn(dsn: str) -> str:
    """Hosts, ports and database of a DSN, safe to print: no user, no password.

    >>> describe_dsn("postgresql://me:secret@a:1,[::1]:2/app"), describe_dsn("postgresql:///app?host=/run/a,/run/b")
    ('a:1,[::1]:2/app', '/run/a,/run/b/app')
    """
    return Target.of(dsn).where


def _parse_url(text: str) -> dict[str, str]:
    """Like conninfo_uri_parse_options() of libpq: user and password end at the first @ before a slash."""
    options: dict[str, str] = {}
    end = 0
    if "@" in text.partition("/")[0]:
        credentials = text[: text.index("@")]
        end = len(credentials) + 1
        user, _, password = credentials.partition(":")
        options |= {"user": _decoded(user, "user"), "password": _decoded(password, "password")}
    names, ports = [], []
    while True:
        found = _HOST.match(text, end)
        if found is None:
            raise ConfigError("The DSN has a host whose brackets do not enclose an IPv6 address.")
        names.append(found[1] or found[2])
        ports.append(found[3] or "")
        end = found.end()
        if text[end : end + 1] != ",":
            break
        end += 1
    path, _, query = text[end:].partition("?")
    if "@" in path and "user" not in options:
        # libpq reads it as the database, and so would print most of a password that contains a slash.
        raise ConfigError("The DSN has an @ after its first slash: write %2F for a / in the password, %40 for this @.")
    options |= {
        "host": _decoded(",".join(names), "host"),
        "port": _decoded(",".join(ports), "port"),
        "dbname": _decoded(path[1:], "database"),
    }
    options = {name: value for name, value in options.items() if value}
    for pair in query.removesuffix("&").split("&") if query else ():
        name, separator, value = pair.partition("=")
        if not separator or not name or "=" in value:
            raise ConfigError("The DSN's options are not name=value&name=value: write %3D for an = in a value.")
        options[_decoded(name, "option")] = _decoded(value, "option")
    return options


def _decoded(text: str, what: str) -> str:
    # "from None": the cause contains the text, which may be a password.
    if _NO_ENCODING.search(text) or "\0" in text:
        raise ConfigError(f"The DSN's {what} has a % that does not begin an encoded character: write %25 for a %.")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"The DSN's {what} is not UTF-8.") from None


def _parse_words(text: str) -> dict[str, str]:
    """Like conninfo_parse() of libpq: values with spaces are quoted, and a backslash escapes."""
    options: dict[str, str] = {}
    end = 0
    while text[end:].strip(_SPACES):
        found = _WORD.match(text, end)
        if found is None:
            raise ConfigError("The DSN is not name=value name=value: put values with spaces or quotes in quotes.")
        options[found[1]] = _ESCAPED.sub(r"\1", found[3] if found[2] is None else found[2])
        end = found.end()
    return options


def _with_service(options: dict[str, str]) -> dict[str, str]:
    """The options, completed by those of the DSN's service, if it names one."""
    file = options.pop("servicefile", "") or os.environ.get("PGSERVICEFILE") or str(Path("~/.pg_service.conf"))
    service = options.pop("service", "") or os.environ.get("PGSERVICE")
    if not service:
        return options
    for path in (Path(file), Path(os.environ.get("PGSYSCONFDIR") or "/etc/postgresql-common") / "pg_service.conf"):
        services = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
        try:
            services.read(os.path.expanduser(path), "utf-8")  # noqa: PTH111 - Path's raises where there is no home
        except (configparser.Error, UnicodeDecodeError):
            # "from None": the cause quotes the file, which may contain a password.
            raise ConfigError(f"The service file {path} cannot be read: expected [service] and name=value.") from None
        if service in services:
            return {**services[service], **options}
    raise ConfigError(f"The DSN's service {service!r} is in no service file: add it to ~/.pg_service.conf.")


def _hosts(options: dict[str, str]) -> tuple[Host, ...]:
    """The hosts of the DSN, with one port for all or one for each."""
    addresses = options.pop("hostaddr", "")
    names = (options.pop("host", "") or ("" if addresses else os.environ.get("PGHOST", ""))).split(",")
    ports = (options.pop("port", "") or os.environ.get("PGPORT", "")).split(",")
    given = addresses.split(",") if addresses else [""] * len(names)
    if names == [""]:
        names = names * len(given)
    if len(given) != len(names):
        raise ConfigError(f"The DSN has {len(given)} addresses for {len(names)} hosts: expected as many.")
    if len(ports) not in (1, len(names)):
        raise ConfigError(f"The DSN has {len(ports)} ports for {len(names)} hosts: expected one for all, or one each.")
    ports = ports * len(names) if len(ports) == 1 else ports
    return tuple(_host(*one) for one in zip(names, given, ports, strict=True))


def _host(name: str, address: str, port: str) -> Host:
    if bracketed := re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", name):
        # asyncpg allows a port here, in `?host=`.
        name, port = bracketed[1], bracketed[2] or port
    if not name.startswith("/"):
        try:
            usable = "@" not in name and (not name or ":" in name or bool(name.encode("idna")))
        except UnicodeError:
            usable = False
        if not usable:
            # Never print this host: it is part of the password when that contains an @ or a /.
            raise ConfigError(
                "The DSN has an invalid host: expected a name, an address, or the directory of a socket. "
                "Write %40 for an @ and %2F for a / in user and password."
            )
    if port and not (port.isascii() and port.isdigit() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise ConfigError(
            "The DSN has a port that is not a number from 1 to 65535. Write %40 for an @ and %2F for a / in user and "
            "password."
        )
    return Host(name or address, int(port) if port else None, address or None)


def _check_encryption(options: dict[str, str], hosts: tuple[Host, ...]) -> None:
    mode = options.get("sslmode") or os.environ.get("PGSSLMODE", "")
    if mode not in ("", *_SSLMODES):
        raise ConfigError(f"sslmode is {mode!r}: expected one of {', '.join(_SSLMODES)}.")
    if options.get("sslrootcert") == "system" and mode != "verify-full":
        raise ConfigError("sslrootcert=system needs sslmode=verify-full: anyone can get a certificate for some name.")
    if options.get("sslrootcert") == "system" and (others := set(options) & set(_TLS) - set(_WITH_SYSTEM_ROOTS)):
        raise ConfigError(f"sslrootcert=system cannot be combined with {', '.join(sorted(others))}.")
    if options.get("channel_binding") == "require" and mode not in _ENCRYPTED:
        raise ConfigError("channel_binding=require needs sslmode=require, verify-ca or verify-full.")
    if mode == "verify-full" and any(host.address for host in hosts):
        raise ConfigError("hostaddr cannot be combined with sslmode=verify-full: leave it out, or use verify-ca.")


def _drop_ignored(options: dict[str, str]) -> None:
    for name in [name for name in options if name in _IGNORED or name in _REFUSED]:
        value = options.pop(name)
        if name in _REFUSED or not _IGNORED[name](value):
            raise ConfigError(f"The DSN's option {name} asks for something that pgbackend cannot do: leave it out.")


def _connect_timeout(text: str) -> float | None:
    try:
        seconds = int(text or 0)
    except ValueError:
        raise ConfigError("connect_timeout is not a whole number of seconds.") from None
    # As in libpq: nothing, 0 and less mean no limit, and the shortest limit is 2.
    return float(min(max(seconds, 2), 86_400)) if seconds > 0 else None


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        raise ConfigError("The DSN names no user, and this process's account has no name: add user@.") from None
