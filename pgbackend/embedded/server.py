"""A PostgreSQL of one's own: a directory becomes a DSN, for as long as somebody uses it.

`EmbeddedServer` runs the PostgreSQL that `binaries.py` finds, reachable by a Unix socket only. Any
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
else under a user id that nobody has. That user makes and changes whatever is in the directory, by a process of its own:
root only opens what is there, by descriptors and without following a link, so that the owner cannot have root touch
other files. No account is made, no permission of any directory above is touched or needed, and the programs run from a
copy in /var/lib/pgbackend, since a virtual environment in root's home is out of reach.
"""

import asyncio
import contextlib
import fcntl
import grp
import json
import logging
import os
import pwd
import re
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pgbackend import facts
from pgbackend.embedded import binaries
from pgbackend.embedded.binaries import ROOT_DIRECTORY
from pgbackend.errors import EmbeddedServerError, NotRunningError
from pgbackend.postgres.sockets import in_thread

USER_ID = 20551
"""The user id that root's servers run as when there is no account `pgbackend`, or the first free one after it."""
WATCH_INTERVAL = 0.5
"""Seconds after which a killed keeper is noticed at the latest."""
STOP_TIMEOUT = 90.0
"""Seconds that `stop()` waits for the server to end: longer than the keeper takes, whatever happens."""

_HOME = "postgresql"
_SCRATCH = "initdb"


def default_directory() -> Path:
    """Where a server's data is unless somebody says: the user's data directory; root's /var/lib/pgbackend/default."""
    if os.geteuid() == 0:
        return ROOT_DIRECTORY / "default"
    try:
        import platformdirs  # noqa: PLC0415 - comes with the wheel, which not everybody has
    except ImportError:
        raise binaries.not_installed() from None
    with contextlib.suppress(RuntimeError):  # neither HOME nor a line in the password file
        directory = platformdirs.user_data_path("pgbackend", appauthor=False)
        if directory.is_absolute():
            return directory
    raise EmbeddedServerError("This user has no home directory. Say where the embedded PostgreSQL keeps its data.")


class EmbeddedServer:
    """PostgreSQL on a directory of its own.

        server = EmbeddedServer("./pgdata")
        dsn = await server.start()
        …
        await server.stop()

    `programs` is the directory of another PostgreSQL's `postgres` and `initdb`. `settings` are
    values for postgresql.conf, used if this process is the one that starts the server. `start_timeout` seconds must be
    enough for recovery after a crash.

    A process that ends without `stop()` has left as well. After a fork the child is no user until it calls `start()`
    on a server of its own.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        programs: Path | None = None,
        settings: Mapping[str, str] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        try:
            self.directory = Path(os.path.realpath(Path(directory).expanduser()))
        except RuntimeError as error:
            raise EmbeddedServerError(
                f"{os.fspath(directory)!r} names no directory: {error} Name another directory."
            ) from error
        self._wish = _Wish(programs, dict(settings or {}), start_timeout)
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
        starting = asyncio.create_task(
            in_thread(lambda: self._user.enter(self._wish, abandoned), name="start the embedded server")
        )
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be cancelled, but looks at this before every step. Not to wait for it would leave this
            # process a user that nobody knows of.
            abandoned.set()
            await asyncio.wait([starting])
            if not starting.cancelled() and starting.exception() is None:
                await in_thread(self._user.leave, name="leave the embedded server")
            raise
        self._entered += 1
        return self._user.dsn

    async def stop(self) -> None:
        """Return once this process does not use the server, and when it was the last, once the server is stopped."""
        if self._entered and self._pid == os.getpid():
            self._entered -= 1
            await in_thread(self._user.leave, name="leave the embedded server")

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

    programs: Path | None
    settings: dict[str, str]
    start_timeout: float


class _User:
    """This process as a user of the server in one directory, however many `EmbeddedServer` objects it has for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._entered = 0
        self._home: _Home | None = None
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
                    self._join(wish, _Patience(wish.start_timeout, abandoned, self._directory / _HOME))
                except OSError as error:
                    raise EmbeddedServerError(
                        f"{self._directory / _HOME} cannot be used: {error}. Name another directory."
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
                self._forget_home()

    def _join(self, wish: _Wish, patience: "_Patience") -> None:
        home = _open_home(self._directory)
        self._home = home
        try:
            programs = wish.programs or binaries.programs()
            plan: dict[str, object] = {
                "home": str(home.path),
                "at": home.fd,
                "programs": str(programs),
                "user": home.identity or [],
                "scratch": str(ROOT_DIRECTORY / _SCRATCH),
                "settings": {name: str(value) for name, value in wish.settings.items()},
            }
            self._users = _open_lock("users", home)
            # Held exclusively by a keeper that found no user: it stops the server first.
            while not _locked(self._users, fcntl.LOCK_SH):
                patience.wait("the former server to stop")
            while not self._start_keeper(home, plan, patience):
                if _accepts_connections(home):
                    break
                patience.wait("the server that another process started")
        except BaseException:
            self._release()
            self._forget_home()
            raise
        self.dsn = f"postgresql://postgres@/postgres?host={_sockets(home)}&port=5432"
        self._postmaster = _postmaster(home)
        self._left = threading.Event()
        self._watch = threading.Thread(
            target=self._watch_keeper, args=(home, plan, self._left), name=f"watch {home.path}", daemon=True
        )
        self._watch.start()
        facts.emit("embedded server used", directory=str(self._directory))

    def _start_keeper(self, home: "_Home", plan: Mapping[str, object], patience: "_Patience") -> bool:
        """Whether there was no keeper, and one was started that has the server ready. Raises EmbeddedServerError."""
        lock = _open_lock("keeper", home)
        try:
            if not _locked(lock, fcntl.LOCK_EX):
                return False
            # The lock goes with it: nobody else can have begun one meanwhile.
            keeper, pipe = _run_keeper(json.dumps(plan), pass_fds=(lock, home.fd))
        finally:
            _close(lock)
        self._reap()
        self._keepers.append(keeper)
        answer = _answer(pipe, patience)
        if answer is not None:
            keeper.wait()
            reason = answer or f"its keeper ended with status {keeper.returncode}"
            log = home.path / "postgresql.log"
            more = f"\nSee {log}." if log.exists() else ""
            raise EmbeddedServerError(f"The embedded PostgreSQL in {self._directory} does not start: {reason}{more}")
        facts.emit("embedded server started", directory=str(self._directory), keeper=keeper.pid)
        return True

    def _watch_keeper(self, home: "_Home", plan: Mapping[str, object], left: threading.Event) -> None:
        """While this process is a user there is a keeper, and with it a server."""
        interval = WATCH_INTERVAL
        where = str(self._directory)
        while not left.wait(interval):
            interval = WATCH_INTERVAL
            try:
                if self._start_keeper(home, plan, _Patience(600.0, left, home.path)):
                    facts.emit("embedded keeper replaced", level=logging.WARNING, directory=where)
                now = _postmaster(home)
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
            _close(self._users)
            self._users = None

    def _forget_home(self) -> None:
        if self._home is not None:
            _close(self._home.fd)
            self._home = None

    def _await_end(self) -> None:
        """The keeper has ended, or others use the server."""
        home = self._home
        assert home  # noqa: S101 - for the type checker
        seen_others = 0
        deadline = time.monotonic() + STOP_TIMEOUT
        with contextlib.suppress(FileNotFoundError), _lock("users", home) as users:
            while time.monotonic() < deadline:
                with _lock("keeper", home) as keeper:
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

    def wait(self, what: str, pipe: int | None = None) -> None:
        """A moment has passed, or `pipe` has something to read. Raises EmbeddedServerError when it took too long."""
        if self._abandoned.is_set():
            raise _AbandonedError("The embedded PostgreSQL is not wanted any more.")
        if time.monotonic() > self._deadline:
            raise EmbeddedServerError(
                f"Waited {self._timeout:g} s for {what}. See {self._home / 'postgresql.log'}; "
                f"recovery after a crash may need a longer start_timeout."
            )
        if pipe is not None:
            select.select([pipe], [], [], 0.05)
        else:
            time.sleep(0.05)


def _answer(pipe: int, patience: _Patience) -> str | None:
    """None once the server is ready, or why there is none. `pipe` is closed."""
    said = b""
    try:
        os.set_blocking(pipe, False)
        while not said.endswith(b"ready\n"):
            patience.wait("PostgreSQL to start", pipe)
            with contextlib.suppress(BlockingIOError):
                part = os.read(pipe, 65536)
                if not part:
                    return said.decode(errors="replace").strip()
                said += part
    finally:
        _close(pipe)
    return None


def _run_keeper(*arguments: str, pass_fds: Sequence[int]) -> "tuple[subprocess.Popen[bytes], int]":
    """The keeper's program, and the end of a pipe with what it says. Raises EmbeddedServerError."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")), *arguments]
    # A child that is forked meanwhile would hold the pipe's other end, and nobody would see this program end.
    with _no_fork:
        pipe, said = os.pipe()
        _open.add(pipe)
        try:
            process = subprocess.Popen(  # noqa: S603 - our own program
                command,
                cwd="/",
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            _close(pipe)
            raise EmbeddedServerError(f"{sys.executable!r} cannot be run to keep the server: {error}") from error
        finally:
            os.close(said)
    return process, pipe


@dataclass(frozen=True, slots=True)
class _Home:
    """The directory with our files, held open: this one is meant, wherever its path leads by now."""

    path: Path
    fd: int
    identity: tuple[int, int] | None
    """User and group that do everything in it; None is ourselves."""


def _open_home(directory: Path) -> _Home:
    """The home is there with its lock files, closed to others, and belongs to its user. Raises EmbeddedServerError."""
    home = directory / _HOME
    above = fd = -1
    try:
        if not os.geteuid():
            _prepare_root_directory()
        above = _open_directory(None, "/")
        for name in directory.parts[1:]:
            outer, above = above, _enter(above, name, 0o777)
            _close(outer)
        fd = _enter(above, _HOME, 0o700)
        identity = None if os.geteuid() else _owner_of(home, above, fd)
        _check_home(home, os.fstat(fd), identity[0] if identity else os.geteuid())
        missing = [name for name in ("users", "keeper") if not _is_there(name, fd)]
        if missing:
            _make(fd, files=missing)
    except BaseException as error:
        if fd >= 0:
            _close(fd)
        if not isinstance(error, OSError):
            raise
        reason = f"{error.strerror} ({error.filename or home})"
        step = "Name another directory." if os.geteuid() else "Name another directory, or run as an ordinary user."
        raise EmbeddedServerError(f"PostgreSQL cannot keep its data in {directory}: {reason}. {step}") from error
    finally:
        if above >= 0:
            _close(above)
    return _Home(home, fd, identity)


def _check_home(home: Path, found: os.stat_result, owner: int) -> None:
    if found.st_uid != owner:
        raise EmbeddedServerError(f"{home} belongs to user {found.st_uid}, not to {owner}. Name another directory.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise EmbeddedServerError(f"{home} is open to others: anybody could be the database's superuser. Close it.")


def _owner_of(home: Path, above: int, fd: int) -> tuple[int, int]:
    """As root: the user and group whose server it is, to whom an empty home of root's is given."""
    outer, found = os.fstat(above), os.fstat(fd)
    if outer.st_uid:
        # Never the group of the directory: its owner need not be a member.
        return _identity(outer.st_uid)
    ours = _system_user()
    if found.st_uid == 0:
        if os.listdir(fd):
            raise EmbeddedServerError(f"{home} is root's, and not empty: it is none of ours. Name another directory.")
        try:
            os.fchown(fd, *ours)
        except OSError as error:
            raise EmbeddedServerError(
                f"PostgreSQL refuses to run as root, and {home} cannot be given to user {ours[0]}: "
                f"{error.strerror}. Run as an ordinary user."
            ) from error
    elif found.st_uid != ours[0]:
        if outer.st_mode & 0o022:
            raise EmbeddedServerError(
                f"{home} belongs to user {found.st_uid}, and others than root can write to {home.parent}: "
                "anybody could have made it. Name another directory."
            )
        return _identity(found.st_uid)
    return ours


def _prepare_root_directory() -> None:
    """Root's own directories are there, and nobody else can change them."""
    for path, mode in ((ROOT_DIRECTORY, 0o711), (ROOT_DIRECTORY / "run", 0o711), (ROOT_DIRECTORY / _SCRATCH, 0o700)):
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        found = path.lstat()
        if path.name != "run" and (found.st_uid or found.st_mode & 0o022 or not stat.S_ISDIR(found.st_mode)):
            raise EmbeddedServerError(
                f"Others than root can change {path}, where root keeps PostgreSQL's programs. "
                f"Give it to root with mode {mode:o}, or run as an ordinary user."
            )
    run = ROOT_DIRECTORY / "run"
    if not run.lstat().st_uid:
        os.chown(run, *_system_user(), follow_symlinks=False)


def _enter(at: int, name: str, mode: int) -> int:
    """The directory called `name` in the one at `at`, made by the owner of that if it is missing."""
    try:
        return _open_directory(at, name)
    except FileNotFoundError:
        _make(at, directory=name, mode=mode)
    return _open_directory(at, name)


def _open_directory(at: int | None, name: str) -> int:
    flags = os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return _open_held(name, flags, at=at)
    except PermissionError:  # to be passed through, if not to be read
        return _open_held(name, flags | getattr(os, "O_PATH", 0), at=at)


def _make(at: int, *, directory: str = "", mode: int = 0, files: Sequence[str] = ()) -> None:
    """A directory or files in the one at `at`, made by its owner: what root makes there, its owner could move away."""
    owner = os.fstat(at).st_uid
    if not os.geteuid() and owner:
        order = {"at": at, "user": _identity(owner), "directory": directory, "mode": mode, "files": list(files)}
        process, pipe = _run_keeper("make", json.dumps(order), pass_fds=(at,))
        try:
            with os.fdopen(os.dup(pipe), "rb") as said:
                reason = said.read().decode(errors="replace").strip()
        finally:
            _close(pipe)
        if process.wait():
            raise EmbeddedServerError(f"User {owner} cannot make {directory or ', '.join(files)}: {reason}")
        return
    if directory:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, mode, dir_fd=at)
    for name in files:
        os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=at))


def _is_there(name: str, at: int) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _identity(user: int) -> tuple[int, int]:
    """That user with its own group, or one that nobody has."""
    try:
        return user, pwd.getpwuid(user).pw_gid
    except KeyError:
        return user, _unused(group.gr_gid for group in grp.getgrall())


def _system_user() -> tuple[int, int]:
    """User and group that root's servers run as. Nobody's processes but theirs."""
    with contextlib.suppress(KeyError):
        account = pwd.getpwnam("pgbackend")
        return account.pw_uid, account.pw_gid
    number = _unused(account.pw_uid for account in pwd.getpwall())
    return number, _unused(group.gr_gid for group in grp.getgrall())


def _unused(taken: Iterable[int]) -> int:
    numbers = set(taken)
    return next(number for number in range(USER_ID, 60000) if number not in numbers)


def _sockets(home: _Home) -> str:
    try:
        target = os.readlink("run", dir_fd=home.fd)
    except OSError:
        return str(home.path / "run")
    if not re.fullmatch(r"(?:/var/lib/pgbackend/run|/tmp)/pgbackend-\w+", target):
        raise EmbeddedServerError(f"{home.path / 'run'} leads to {target!r}, which no keeper made. Delete it.")
    return target


def _postmaster(home: _Home) -> int:
    """The number in `postmaster.pid`, 0 if there is none."""
    try:
        return int(_read(home, "postmaster.pid").partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return 0


def _read(home: _Home, name: str) -> bytes:
    """The beginning of a file in `data`. As root, nothing that is reached by a link or waits for a writer."""
    careful = os.O_NOFOLLOW if home.identity else 0
    data = os.open("data", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | careful, dir_fd=home.fd)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | careful, dir_fd=data)
    finally:
        os.close(data)
    try:
        return os.read(fd, 1024)
    finally:
        os.close(fd)


def _accepts_connections(home: _Home) -> bool:
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


def _open_lock(name: str, home: _Home | None = None) -> int:
    """A descriptor of its own of a lock file: one that is there, in `home`, or of root's own."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = _open_held(name, flags, at=home.fd) if home else _open_held(name, flags | os.O_CREAT)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        _close(fd)
        raise EmbeddedServerError(f"{home.path / name if home else name} is no lock file. Delete it.")
    return fd


@contextlib.contextmanager
def _lock(name: str, home: _Home | None = None) -> Iterator[int]:
    fd = _open_lock(name, home)
    try:
        yield fd
    finally:
        _close(fd)


def _open_held(name: str, flags: int, *, at: int | None = None) -> int:
    """A descriptor that no child has, neither of exec() nor of fork()."""
    with _no_fork:
        fd = os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=at)
        _open.add(fd)
    return fd


def _close(fd: int) -> None:
    with _no_fork:
        _open.discard(fd)
        os.close(fd)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_open: set[int] = set()
"""Descriptors that are open: locks, pipes of keepers, directories."""
_no_fork = threading.RLock()
"""Held while `_open` does not tell the truth: a child would keep what it does not know of."""
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
    for fd in _open:
        os.close(fd)
    _open.clear()
    _no_fork.release()


os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_forget_all)
