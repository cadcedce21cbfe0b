"""DSNs as people have them: read by libpq's rules, and said without their secrets. Pure but for libpq's variables.

A DSN is a URL or `name=value …`. It is taken apart here, and asyncpg gets separate arguments: asyncpg reads a `#`, `[`
or `]` in a password as a part of the URL's structure, and then connects to another database, as another user. A DSN may
name several hosts: the one that is the primary is meant.

The promise: no message shows a password, nor text of a DSN that could not be read, because it may be one.
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
"""What asyncpg does for a connection's encryption, and reads from a DSN alone."""
_FOR_ASYNCPG = (*_TLS, "krbsrvname", "gsslib")
_WITH_SYSTEM_ROOTS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslnegotiation")
DEFAULT_HOSTS = ("/run/postgresql", "/var/run/postgresql", "/tmp", "localhost")  # noqa: S108 - where PostgreSQL puts its sockets
"""Where PostgreSQL may be when nobody says where."""


def _is(*values: str) -> Callable[[str], bool]:
    return lambda value: value.lower() in values


_IGNORED: dict[str, Callable[[str], bool]] = {
    # The kernel watches each connection of ours, with times that these could only make longer.
    **dict.fromkeys(
        ("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"), lambda _: True
    ),
    # All hosts are asked, and only one of them is the primary.
    "load_balance_hosts": _is("disable", "random"),
    # asyncpg binds no channel: see channel_binding below.
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
    # SQLAlchemy's, for asyncpg.
    "prepared_statement_cache_size": lambda _: True,
}
"""Options of libpq and of others that change nothing here, with the values for which that is true."""

_REFUSED = (
    "require_auth", "requirepeer", "sslcrldir", "sslkeylogfile", "scram_client_key", "scram_server_key", "oauth_issuer",
    "oauth_client_id", "oauth_client_secret", "oauth_scope",
)  # fmt: skip
"""Options of libpq that ask for something which asyncpg cannot do."""


@dataclass(frozen=True, slots=True)
class Host:
    """One server of a DSN."""

    name: str
    """A host's name or address, the directory of a Unix socket, or "" for wherever PostgreSQL is by default."""
    port: int | None
    """None: 5432."""
    address: str | None = None
    """Where it is, when the name is not to be looked up."""

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name and self.port is not None else self.name or "localhost"
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a DSN says, for whoever connects."""

    hosts: tuple[Host, ...]
    """In their order; at least one."""
    user: str
    password: str | None = field(repr=False)
    """None: as PGPASSWORD or the password file says."""
    passfile: str | None
    database: str | None
    """None: as PGDATABASE says, or named like the user."""
    options: tuple[tuple[str, str], ...] = field(repr=False)
    """What asyncpg reads from a DSN alone."""
    settings: tuple[tuple[str, str], ...] = field(repr=False)
    """Settings of the server for its sessions."""
    connect_timeout: float | None
    """Seconds, for each host."""
    read_write: bool
    """Whether a primary is passed over whose transactions are read-only by default."""
    where: str
    """Hosts, ports and database, fit to be printed: no user, no password."""
    application_name: str | None
    """What its connections are to be called, if it says so."""

    @classmethod
    def of(cls, dsn: str) -> Self:
        """Raises ConfigError for what cannot be meant, or cannot be done."""
        options = {name: value for name, value in _with_service(parse_dsn(dsn)).items() if value}
        hosts = _hosts(options)
        wanted = options.pop("target_session_attrs", "") or os.environ.get("PGTARGETSESSIONATTRS", "")
        if wanted not in ("", "any", "primary", "read-write"):
            raise ConfigError(
                f"target_session_attrs is {wanted!r}: the log needs the primary. Leave it away, or say read-write."
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
        """One of the hosts as errors name it: like the whole DSN when that has only one."""
        return str(host) if len(self.hosts) > 1 else self.where


def parse_dsn(dsn: str) -> dict[str, str]:
    r"""The options of a DSN by libpq's names, as libpq reads it.

    >>> parse_dsn("postgresql://me:p%40#[w]@db,[::1]:6000/app?sslmode=require")["password"]
    'p@#[w]'
    >>> parse_dsn(r"host=/run/postgresql user=me password='it\'s'")["password"]
    "it's"

    Raises ConfigError for what libpq does not take either, but for other spellings of the scheme and `ssl=…`.
    """
    text = dsn if isinstance(dsn, str) else ""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = ""
    # Read from a file, it ends in a newline.
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
    # asyncpg's word for it; and SQLAlchemy's for asyncpg, where libpq takes no other value than true.
    if "database" in options:
        options.setdefault("dbname", options.pop("database"))
    if "ssl" in options:
        mode = options.pop("ssl")
        options["sslmode"] = "require" if mode.lower() == "true" else mode
    return options


def normalize_dsn(dsn: str) -> str:
    """The DSN as a URL that everybody reads in the same way.

    >>> normalize_dsn("postgres+asyncpg://me:#@db/app?ssl=require")
    'postgresql://me:%23@db/app?sslmode=require'

    Raises ConfigError as `Target.of()` does.
    """
    Target.of(dsn)
    return build_dsn(parse_dsn(dsn))


def build_dsn(options: Mapping[str, str]) -> str:
    """The URL that `parse_dsn()` reads as these options."""
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
    """Hosts, ports and database of a DSN, fit to be printed: no user, no password.

    >>> describe_dsn("postgresql://me:secret@a:1,[::1]:2/app"), describe_dsn("postgresql:///app?host=/run/a,/run/b")
    ('a:1,[::1]:2/app', '/run/a,/run/b/app')
    """
    return Target.of(dsn).where


def _parse_url(text: str) -> dict[str, str]:
    """As conninfo_uri_parse_options() of libpq has it: user and password end at the first @ before a slash."""
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
        # libpq takes it for the database, and so would show most of a password that has a slash.
        raise ConfigError("The DSN has an @ behind its first slash: write %2F for a / in the password, %40 for this @.")
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
    # The cause of an error has the text, so it is not shown.
    if _NO_ENCODING.search(text) or "\0" in text:
        raise ConfigError(f"The DSN's {what} has a % that begins no encoded character: write %25 for a % itself.")
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ConfigError(f"The DSN's {what} is not UTF-8.") from None


def _parse_words(text: str) -> dict[str, str]:
    """As conninfo_parse() of libpq has it: values with spaces stand in quotes, and a backslash escapes."""
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
    """The options, and those of the service that is asked for; what the DSN says itself counts more."""
    file = options.pop("servicefile", "") or os.environ.get("PGSERVICEFILE") or str(Path("~/.pg_service.conf"))
    service = options.pop("service", "") or os.environ.get("PGSERVICE")
    if not service:
        return options
    for path in (Path(file), Path(os.environ.get("PGSYSCONFDIR") or "/etc/postgresql-common") / "pg_service.conf"):
        services = configparser.RawConfigParser(strict=False, comment_prefixes=("#",), delimiters=("=",))
        try:
            services.read(os.path.expanduser(path), "utf-8")  # noqa: PTH111 - Path's raises where there is no home
        except (configparser.Error, UnicodeDecodeError):
            # Its text may be a password.
            raise ConfigError(f"The service file {path} cannot be read: expected [service] and name=value.") from None
        if service in services:
            return {**services[service], **options}
    raise ConfigError(f"The DSN's service {service!r} is in no service file: add it to ~/.pg_service.conf.")


def _hosts(options: dict[str, str]) -> tuple[Host, ...]:
    """The hosts of the DSN. `port`: one for all, or as many as hosts; so `hostaddr`."""
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
        # As asyncpg takes them in `?host=`.
        name, port = bracketed[1], bracketed[2] or port
    if not name.startswith("/"):
        try:
            usable = "@" not in name and (not name or ":" in name or bool(name.encode("idna")))
        except UnicodeError:
            usable = False
        if not usable:
            # Not shown: it is a part of the password where that has an @ or a / of its own.
            raise ConfigError(
                "The DSN has a host that cannot be one: expected a name, an address, or a socket's directory. "
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
        raise ConfigError("sslrootcert=system needs sslmode=verify-full: anybody can get a certificate for some name.")
    if options.get("sslrootcert") == "system" and (others := set(options) & set(_TLS) - set(_WITH_SYSTEM_ROOTS)):
        raise ConfigError(f"sslrootcert=system does not go together with {', '.join(sorted(others))}.")
    if options.get("channel_binding") == "require" and mode not in _ENCRYPTED:
        raise ConfigError("channel_binding=require needs sslmode=require, verify-ca or verify-full.")
    if mode == "verify-full" and any(host.address for host in hosts):
        raise ConfigError("hostaddr does not go together with sslmode=verify-full: leave it away, or say verify-ca.")


def _drop_ignored(options: dict[str, str]) -> None:
    for name in [name for name in options if name in _IGNORED or name in _REFUSED]:
        value = options.pop(name)
        if name in _REFUSED or not _IGNORED[name](value):
            raise ConfigError(f"The DSN's option {name} asks for what pgbackend cannot do: leave it away.")


def _connect_timeout(text: str) -> float | None:
    try:
        seconds = int(text or 0)
    except ValueError:
        raise ConfigError("connect_timeout is no whole number of seconds.") from None
    # As libpq has it: nothing, 0 and less mean no limit of the DSN's, and 2 is the least.
    return float(min(max(seconds, 2), 86_400)) if seconds > 0 else None


def _account() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        raise ConfigError("The DSN names no user, and this process's account has no name: add user@.") from None
