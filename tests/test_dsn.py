import pytest

from pgbackend.backend import Backend
from pgbackend.dsn import Host, Target, describe_dsn, normalize_dsn
from pgbackend.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGTARGETSESSIONATTRS"):
        monkeypatch.delenv(name, raising=False)


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
        ("postgresql:///db", []),
    ],
)
def test_hosts_are_found_wherever_libpq_lets_them_stand(dsn: str, hosts: list[tuple[str, int | None]]) -> None:
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
def test_of_several_hosts_one_that_takes_writes_is_meant(dsn: str, read_write: bool) -> None:
    assert Target.of(dsn).read_write == read_write


@pytest.mark.parametrize(
    ("dsn", "rest"),
    [
        ("postgresql://me:p%40w@a:1,b:2/db?sslmode=require", "postgresql://me:p%40w@/db?sslmode=require"),
        ("postgresql://a/db?target_session_attrs=any&options=-c%20x%3Dy", "postgresql:///db?options=-c%20x%3Dy"),
        ("postgresql:///db?port=7", "postgresql:///db?port=7"),
    ],
)
def test_what_is_left_for_asyncpg_has_no_hosts(dsn: str, rest: str) -> None:
    assert Target.of(dsn).dsn == rest


@pytest.mark.parametrize(
    ("dsn", "message"),
    [
        ("localhost/db", "is not a URL"),
        ("mysql://a/db", "scheme is 'mysql'"),
        ("postgresql://a,,b/db", "'' for a host"),
        ("postgresql://[::1/db", "for a host"),
        ("postgresql://a:x/db", "'x' for a port"),
        ("postgresql://a:70000/db", "'70000' for a port"),
        ("postgresql:///db?host=a,b,c&port=1,2", "2 ports for 3 hosts"),
        ("postgresql://a,b/db?target_session_attrs=standby", "needs the primary"),
        ("postgresql://a/db?target_session_attrs=prefer-standby", "needs the primary"),
        ("postgresql://a/db?target_session_attrs=primaty", "needs the primary"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_connected(dsn: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backend(dsn)
    with pytest.raises(ConfigError, match=message):
        Backend("postgresql://a/db", listen_dsn=dsn)


@pytest.mark.parametrize("dsn", ["postgresql://me:secret@a:1,[::1]:2/db", "postgresql://me@a,b/db?password=secret"])
def test_a_password_is_never_shown(dsn: str) -> None:
    assert "secret" not in describe_dsn(dsn)


def test_what_is_no_url_is_not_shown_at_all() -> None:
    with pytest.raises(ConfigError) as refused:
        Backend("me:secret@a/db")
    assert "secret" not in str(refused.value)
