import asyncio
import getpass
import ssl
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pgbackend.backend import Backend
from pgbackend.errors import ConfigError, ConnectionLostError, DatabaseError
from pgbackend.postgres.dsn import Host, Target, build_dsn, describe_dsn, normalize_dsn, parse_dsn
from pgbackend.postgres.pool import Database

VARIABLES = (
    *("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGPASSFILE", "PGSSLMODE", "PGTARGETSESSIONATTRS"),
    *("PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR"),
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Parsing, compared with libpq.


def by_libpq(dsn: str) -> dict[str, str] | None:
    """The options that libpq reads from a DSN; None if it refuses it."""
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg: install the dev extra anew")
    try:
        options = psycopg.conninfo.conninfo_to_dict(dsn)
    except (psycopg.ProgrammingError, UnicodeDecodeError):
        return None
    return {name: str(value) for name, value in options.items() if value != ""}


def by_us(dsn: str) -> dict[str, str] | None:
    try:
        return {name: value for name, value in parse_dsn(dsn).items() if value}
    except ConfigError:
        return None


SPECIMENS = [
    "postgresql://me:pw@a:1,b:2/db",
    "postgresql://me:p#w@a/db",
    "postgresql://me:p[w@a/db",
    "postgresql://me:p]w@a/db",
    "postgresql://me:[pw]@a:1/db?sslmode=require",
    "postgresql://me:p#w@a/db#x?application_name=n",
    "postgresql://me:p?w&x=y@a/db",
    "postgresql://me:p:w@a/db",
    "postgresql://me:p+w@a/db?application_name=a+b",
    "postgresql://me:p%40%2F%3A%23w@a/db",
    "postgresql://me:p@w@a/db",
    "postgresql://me%3Ayou:%C3%A9@a/d%2Fb",
    "postgresql://:pw@a/db",
    "postgresql://me@a",
    "postgresql://me@/db",
    "postgresql://a/",
    "postgresql://",
    "postgresql:///?",
    "postgresql://?user=me&password=p%23w",
    "postgresql:///db?host=a,b&port=1,2",
    "postgresql://a:1/db?host=b&port=2&user=me",
    "postgresql://[::1]:1,[fe80::1%25eth0],10.0.0.1:3/db",
    "postgresql://%2Frun%2Fa:1,%2Frun%2Fb/db",
    "postgresql://a%2Cb/db",
    "postgresql://a,,b/db",
    "postgresql://,/db",
    "postgresql://a:,b:2/db",
    "postgresql://[::1/db",
    "postgresql://[]/db",
    "postgresql://[::1]x/db",
    "postgresql://a/db?sslmode",
    "postgresql://a/db?sslmode=require=x",
    "postgresql://a/db?sslmode=require&",
    "postgresql://a/db?&sslmode=require",
    "postgresql://a/db?=require",
    "postgresql://a/db?ssl=true",
    "postgresql://a/db?options=-c%20x%3Dy",
    "postgresql://a/db%",
    "postgresql://a/db%zz",
    "postgresql://a/db%00",
    "host=a port=1 user=me password=secret dbname=db",
    " host = a  port=1 ",
    "password='it\\'s #1 [x]' user=me",
    "password=a\\ b user=me",
    "password='' host=a",
    "password= host=a",
    "password=a'b host=a",
    "password='a host=b",
    "password='a'host=b",
    "host",
    "host=a password",
    "=a",
]


@pytest.mark.parametrize("dsn", SPECIMENS)
def test_a_dsn_is_parsed_as_libpq_parses_it(dsn: str) -> None:
    assert by_us(dsn) == by_libpq(dsn)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
SPECIAL = st.text("ab#[]?&=:@/%+,;'\\\" é", max_size=12)


@given(
    user=TEXT | SPECIAL,
    password=TEXT | SPECIAL,
    database=TEXT | SPECIAL,
    hosts=st.lists(
        st.sampled_from(["a", "b.c", "::1", "fe80::1%eth0", "10.0.0.1", "/run/x", ""]), min_size=1, max_size=3
    ),
    port=st.sampled_from(["", "1", "65535"]),
    setting=TEXT | SPECIAL,
)
def test_a_built_url_is_parsed_back_by_us_and_by_libpq(
    user: str, password: str, database: str, hosts: list[str], port: str, setting: str
) -> None:
    options = {
        "user": user, "password": password, "dbname": database, "host": ",".join(hosts), "port": port,
        "application_name": setting,
    }  # fmt: skip
    url = build_dsn(options)
    expected = {name: value for name, value in options.items() if value and name != "port"}

    for read in (by_us(url), by_libpq(url)):
        assert read is not None
        assert set(read.pop("port", "").split(",")) <= {port, ""}
        assert read == expected


@given(text=st.text("ab#[]?&=:@/%+,1 2C\\'é", max_size=30))
def test_any_url_is_parsed_as_libpq_parses_it(text: str) -> None:
    # libpq 17 and newer refuses spaces inside, older versions keep them.
    assume(" " not in text)
    # We refuse an @ after the first slash, because the slash may be part of a password.
    assume("@" not in text.partition("?")[0].partition("/")[2] or "@" in text.partition("/")[0])
    theirs, ours = by_libpq("postgresql://" + text), by_us("postgresql://" + text)
    if theirs is not None:
        assert ours == theirs
    elif ours is not None:
        # We accept options that libpq does not know, as settings of the server.
        assert "?" in text


WORDS = st.lists(st.sampled_from(["user", "password=", "=", "'", "\\", " ", "\t", "a", "1"]), max_size=12)


@given(words=WORDS.map("".join))
def test_any_list_of_words_is_parsed_as_libpq_parses_it(words: str) -> None:
    text = f"host=x {words}"
    theirs, ours = by_libpq(text), by_us(text)
    if theirs is not None or ours is None:
        assert ours == theirs
    else:
        assert parse_dsn(text).keys() - {"host", "user", "password"}


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("postgresql://me:pw@a:1,b:2/db", [("a", 1), ("b", 2)]),
        ("postgresql://a,b:2/db", [("a", None), ("b", 2)]),
        ("postgresql://[::1]:1,[fe80::1%25eth0],10.0.0.1:3/db", [("::1", 1), ("fe80::1%eth0", None), ("10.0.0.1", 3)]),
        ("postgresql:///db?host=a,b&port=1,2", [("a", 1), ("b", 2)]),
        ("postgresql:///db?host=a,b&port=5433", [("a", 5433), ("b", 5433)]),
        ("postgresql:///db?host=a,b&port=,2", [("a", None), ("b", 2)]),
        ("postgresql:///db?host=::1,[::2]:7", [("::1", None), ("::2", 7)]),
        ("postgresql://me@/db?host=/run/a,/run/b&port=1,2", [("/run/a", 1), ("/run/b", 2)]),
        ("postgresql://%2Frun%2Fa:1,%2Frun%2Fb/db", [("/run/a", 1), ("/run/b", None)]),
        ("postgresql:///db", [("", None)]),
        ("postgresql://a,,b/db", [("a", None), ("", None), ("b", None)]),
        ("postgresql://a,b/db?hostaddr=10.0.0.1,::1", [("a", None, "10.0.0.1"), ("b", None, "::1")]),
        ("hostaddr=10.0.0.1 port=7", [("10.0.0.1", 7, "10.0.0.1")]),
    ],
)
def test_hosts_are_found_wherever_libpq_allows_them(dsn: str, hosts: list[tuple[Any, ...]]) -> None:
    assert list(Target.of(normalize_dsn(dsn)).hosts) == [Host(*host) for host in hosts]


def test_hosts_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "a,b")
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "standby")

    assert Target.of("postgresql:///db?port=7&target_session_attrs=primary").hosts == (Host("a", 7), Host("b", 7))
    with pytest.raises(ConfigError, match="needs the primary"):
        Target.of("postgresql:///db")


@pytest.mark.parametrize(
    ("dsn", "read_write"),
    [
        ("postgresql://a/db", False),
        ("postgresql://a,b/db", True),
        ("postgresql://a/db?target_session_attrs=read-write", True),
        ("postgresql://a,b/db?target_session_attrs=primary", False),
        ("postgresql://a,b/db?target_session_attrs=any", False),
    ],
)
def test_a_read_only_primary_is_passed_over_when_there_are_several_hosts(dsn: str, read_write: bool) -> None:
    assert Target.of(dsn).read_write == read_write


# Options.

NEON = "postgresql://me:pw@ep-cool.neon.tech/neondb?sslmode=require&channel_binding=require"


@pytest.mark.parametrize(
    "options",
    [
        "keepalives=0&keepalives_idle=30&keepalives_interval=5&keepalives_count=3&tcp_user_timeout=1000",
        "gssencmode=prefer",
        "gssencmode=disable&krbsrvname=postgres",
        "load_balance_hosts=random",
        "channel_binding=prefer",
        "sslmode=verify-ca&channel_binding=require",
        "client_encoding=utf8",
        "replication=false",
        "prepared_statement_cache_size=0",
    ],
)
def test_options_without_effect_are_ignored(options: str) -> None:
    assert Target.of(f"postgresql://a/db?{options}").settings == ()


def test_the_dsn_of_neon_is_accepted() -> None:
    target = Target.of(NEON)
    assert (target.options, target.settings) == ((("sslmode", "require"),), ())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("channel_binding=require", "channel_binding"),
        ("sslmode=prefer&channel_binding=require", "channel_binding"),
        ("channel_binding=always", "channel_binding"),
        ("client_encoding=latin1", "client_encoding"),
        ("connect_timeout=soon", "connect_timeout"),
        ("gssencmode=require", "gssencmode"),
        ("hostaddr=10.0.0.1&sslmode=verify-full", "hostaddr"),
        ("load_balance_hosts=often", "load_balance_hosts"),
        ("min_protocol_version=3.2", "min_protocol_version"),
        ("replication=database", "replication"),
        ("require_auth=scram-sha-256", "require_auth"),
        ("requirepeer=postgres", "requirepeer"),
        ("service=nowhere", "service"),
        ("sslcertmode=require", "sslcertmode"),
        ("sslcrldir=/etc", "sslcrldir"),
        ("sslmode=on", "sslmode"),
        ("sslmode=require&sslrootcert=system", "sslrootcert"),
        ("sslsni=0", "sslsni"),
        ("target_session_attrs=standby", "target_session_attrs"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(options: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Backend(f"postgresql://a/db?{options}")


def test_an_application_name_and_a_connect_timeout_are_accepted() -> None:
    target = Target.of("postgresql://a/db?fallback_application_name=psql&connect_timeout=30")
    assert (target.application_name, target.connect_timeout) == ("psql", 30.0)
    assert Target.of("postgresql://a/db?fallback_application_name=x&application_name=mine").application_name == "mine"
    assert Target.of("postgresql://a/db?connect_timeout=0").connect_timeout is None
    assert Target.of("postgresql://a/db?connect_timeout=1").connect_timeout == 2.0


def test_a_service_completes_the_dsn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "services"
    file.write_text("[ours]\nhost=a\nport=7\nuser=them\npassword=50%#[x]\ndbname=db\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))

    target = Target.of("postgresql://me@/?service=ours")

    assert target.hosts == (Host("a", 7),)
    assert (target.user, target.password, target.database) == ("me", "50%#[x]", "db")
    monkeypatch.setenv("PGSERVICE", "ours")
    assert Target.of("postgresql:///").user == "them"
    file.write_text("secret")
    with pytest.raises(ConfigError) as refused:
        Target.of("postgresql:///?service=ours")
    assert "secret" not in "".join(traceback.format_exception(refused.value))


# Connecting.


async def test_a_password_may_have_any_characters(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    role = "Any#[Role]? " + urlsplit(empty_database).path[-12:]
    secret = "p#[x]?&=:@/%+ é'\\\""
    given: list[dict[str, Any]] = []
    connect = asyncpg.connect

    async def note(dsn: str | None = None, **arguments: Any) -> Any:
        given.append({"dsn": dsn, **arguments})
        return await connect(dsn, **arguments)

    owner = await asyncpg.connect(empty_database)
    await owner.execute(f'CREATE ROLE "{role}" LOGIN')
    monkeypatch.setattr(asyncpg, "connect", note)
    try:
        # People encode only the characters that have a meaning in a URL's user and password.
        plain = secret.translate({ord(one): quote(one, safe="") for one in "@/% "})
        at, name = Target.of(empty_database), quote(role, safe="#[]?")
        for password in (plain, quote(secret, safe="")):
            host = ",".join(quote(host.name, safe="") for host in at.hosts)
            there = Database(f"postgresql://{name}:{password}@{host}:{at.hosts[0].port}/{at.database}")
            connection = await there.connect()
            assert await connection.fetchval("SELECT current_user::text") == role
            assert await connection.fetchval("SELECT current_database()::text") == at.database
            await connection.close()
        assert {(one["password"], one["database"], one["dsn"]) for one in given} == {(secret, at.database, None)}
    finally:
        await owner.execute(f'DROP ROLE "{role}"')
        await owner.close()


async def test_a_dsn_of_words_works_like_a_url(empty_database: str) -> None:
    at = Target.of(empty_database)
    words = f"host={at.hosts[0].name} port={at.hosts[0].port} user={at.user} dbname='{at.database}'"
    async with Backend(words) as backend:
        await backend.probe()
    assert Target.of(f" {normalize_dsn(words)}\n") == Target.of(words)
    assert backend.info().server == describe_dsn(empty_database)


async def test_options_of_libpq_do_not_reach_the_server(empty_database: str) -> None:
    mark = "&" if "?" in empty_database else "?"
    there = Database(
        f"{empty_database}{mark}channel_binding=prefer&keepalives=1&gssencmode=disable&connect_timeout=7"
        "&fallback_application_name=ours&load_balance_hosts=disable&options=-c%20geqo%3Doff&work_mem=5MB"
    )
    connection = await there.connect()
    settings = [await connection.fetchval(f"SHOW {name}") for name in ("application_name", "geqo", "work_mem")]
    await connection.close()
    assert settings == ["ours", "off", "5MB"]


async def test_a_password_file_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    async def note(*_: object, **arguments: Any) -> Any:
        given.append(arguments["passfile"])
        raise OSError("enough")

    monkeypatch.setattr(asyncpg, "connect", note)
    file = tmp_path / "secrets"
    with pytest.raises(ConnectionLostError):
        await Database(f"postgresql://a/db?passfile={file}").connect()
    assert given == [str(file)]


async def test_a_missing_file_is_named_with_its_option(tmp_path: Path) -> None:
    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        with pytest.raises(ConfigError, match=f"{name} in the DSN"):
            await Database(f"postgresql://a/db?sslmode=verify-ca&{name}={tmp_path / 'nothing'}").connect()


async def test_sslrootcert_system_uses_the_certificates_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    async def note(*_: object, **arguments: Any) -> Any:
        given.append(arguments["ssl"])
        raise OSError("enough")

    monkeypatch.setattr(asyncpg, "connect", note)
    with pytest.raises(ConnectionLostError):
        await Database("postgresql://a/db?sslmode=verify-full&sslrootcert=system").connect()
    (context,) = given
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)


# Refusals, and passwords that no message shows.


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        ("localhost/db", "is not a URL"),
        ("", "is not a URL"),
        ("mysql://a/db", "scheme is 'mysql'"),
        ("mysql://a/db?x=y", "scheme is 'mysql'"),
        ("postgresql://[::1/db", "brackets"),
        ("postgresql://me:p/w@a/db", "an @ after its first slash"),
        ("postgresql://a:x/db", "a port that is not a number"),
        ("postgresql://a:70000/db", "a port that is not a number"),
        ("postgresql://a..b/db", "an invalid host"),
        ("postgresql:///db?host=a,b,c&port=1,2", "2 ports for 3 hosts"),
        ("postgresql://a,b/db?target_session_attrs=standby", "needs the primary"),
        ("postgresql://a/db?target_session_attrs=prefer-standby", "needs the primary"),
        ("postgresql://a/db?target_session_attrs=primaty", "needs the primary"),
        ("postgresql://a/db\ud800", "is not a URL"),
    ],
)
def test_a_wrong_dsn_is_refused_before_connecting(dsn: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backend(dsn)
    with pytest.raises(ConfigError, match=message):
        Backend("postgresql://a/db", listen_dsn=dsn)


def test_an_account_without_a_name_needs_a_user_in_the_dsn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", fail)
    with pytest.raises(ConfigError, match="names no user"):
        Backend("postgresql://a/db")
    Backend("postgresql://me@a/db")


LEAKS = [
    "postgresql://me:{}@host/db%",
    "postgresql://me:{}@host:port/db",
    "postgresql://me:{}@ho..st/db",
    "postgresql://me:{}@host/db?sslmode=no",
    "postgresql://me:{}@127.0.0.1:1/db",
    "postgresql://me@127.0.0.1:1/db?password={}",
    "postgresql+odd://me:{}@host/db",
    "me:{}@host/db",
    "host=127.0.0.1 port=1 user=me password={}",
    "host=127.0.0.1 port=1 user=me password='{}' oops",
]
SECRETS = [
    "sesame",
    "se#same",
    "se[same]",
    "[sesame]",
    "se@same",
    "se/same",
    "se%same",
    "se?same",
    "se:same",
    "1/sesame",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("form", LEAKS)
async def test_no_message_shows_any_part_of_a_password(
    form: str, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    dsn = form.format(secret)
    with pytest.raises((ConfigError, ConnectionLostError, DatabaseError)) as refused:
        async with asyncio.timeout(60):
            await Database(dsn).open()
    text = "".join(traceback.format_exception(refused.value)) + caplog.text
    assert "same" not in text
    if not isinstance(refused.value, ConfigError):
        assert "same" not in repr(Target.of(dsn)) + describe_dsn(dsn)


@pytest.mark.parametrize("dsn", ["postgresql://me:secret@a:1,[::1]:2/db", "postgresql://me@a,b/db?password=secret"])
def test_a_password_is_never_shown(dsn: str) -> None:
    assert "secret" not in describe_dsn(dsn)
    assert "secret" not in repr(Target.of(dsn))
