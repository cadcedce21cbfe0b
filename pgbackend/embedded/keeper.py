"""The keeper: a program that keeps one PostgreSQL alive while a process uses it. `server.py` starts one for each user.

A keeper is its user's child, in a session of its own. One of a home's keepers is active: it is the server's parent,
starts the server again when it died, and stops it after the last user. The others wait to take over. The promise: while
a user lives there is a server, and after the last user there is none. No kill blocks the next start or loses committed
data.

Locks tell who lives. The kernel frees a lock when its owner is gone. Process ids cannot tell, since they are reused.

    users     shared by the keepers of all users; exclusive while an active keeper without users stops the server
    active    exclusive: the active keeper
    ready     exclusive: the active keeper, while the server accepts connections
    server    exclusive: all processes of a server or an initdb together. It is free when none of them is left

The first three are fcntl locks on bytes of the file `keepers`. An fcntl lock belongs to one process, and children have
no part in it. The last one is an flock, which PostgreSQL's processes inherit from the active keeper.

    join users ─▶ wait ──active is free──▶ end former server ─▶ start ─▶ keep ──no user left──▶ stop server ─▶ exit
                   │                                              ▲        │
                   └──our user left, others did not──▶ exit       └────────┘ the server died

A keeper whose server does not start prints the reason and exits with status 1. Each kill, in any combination:

    a user               its keeper sees another parent and leaves. After the last user the server is stopped
    the server           the active keeper ends processes that outlived it, and starts it again
    a keeper             its user starts another one. If it was active, a waiting keeper restarts the server
    keepers and users    Linux tells the server to shut down when its parent dies. Elsewhere the next start ends it
    during initdb        a database appears by one rename. The next active keeper deletes unfinished ones
    everything, power    all locks are free, so the next start deletes `postmaster.pid`, even if its number is in use
    home deleted         the active keeper stops the server. Users report it, and no new database is made for them
    disk full            the server may not start. Users report it and start keepers until one succeeds

The program imports the standard library only, without site-packages: it stays small and starts fast.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypedDict

from . import home
from .home import CLUSTER, DATA, Failure

try:
    import ctypes

    _prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
except ImportError:  # Python may be built without it
    _prctl = None

TICK = 0.05
"""Seconds between two checks of the users and the server."""
PATIENCE = 60.0
"""Seconds that an orderly stop may take. After that the server is killed, which loses nothing that is committed."""
LOG_BYTES = 8 << 20
"""A log of this size becomes postgresql.log.1, and a new one begins."""
USERS, ACTIVE, READY = range(3)

_NOTE = DATA / "postmaster.pid"
_RUN = Path("run")
_LOG = Path("postgresql.log")
_SERVER = Path("server")
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103
"""The longest path that a Unix socket may have on macOS. Linux allows four bytes more."""


class Plan(TypedDict):
    """A user's request to its keeper."""

    directory: str
    """Absolute path without links."""
    create: bool
    """Whether a database that is missing is made."""
    programs: str
    """Directory of `postgres` and `initdb`."""
    settings: dict[str, str]
    parent: int
    """Process id of the user."""


class Keeper:
    """The current directory is the home, and paths are relative to it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._home = Path(plan["directory"], home.NAME)
        self._pid = os.getpid()
        self._locks = _open_lock(Path("keepers"))
        self._server_lock = -1
        self._log = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._server: subprocess.Popen[bytes] | None = None
        self._is_ready = self._was_ready = False
        self._told_to_leave = False

    def leave(self, *_: object) -> None:
        """Handle SIGUSR1: our user leaves, and waits to hear that it has left."""
        self._told_to_leave = True

    def run(self) -> None:
        """Return when our user has left and, if it was the last, the server has ended. Raises Failure."""
        while not _lock(self._locks, USERS, fcntl.LOCK_SH):
            time.sleep(TICK)
        while not _lock(self._locks, ACTIVE, fcntl.LOCK_EX):
            self._report(ready=_other_lock(self._locks, READY) != fcntl.F_UNLCK)
            if self._has_left() and _other_lock(self._locks, USERS) == fcntl.F_RDLCK:
                return
            time.sleep(TICK)
        # Not before: the active keeper takes every other process that has this file open for one of the server's.
        self._server_lock = _open_lock(_SERVER)
        try:
            self._end_server()
            home.delete_unfinished()
            while self._is_used():
                self._start()
                self._keep()
        except (Failure, OSError) as error:
            self._say(str(error))
            raise
        finally:
            _unlock(self._locks, READY)
            self._end_server()
            if not self._is_used():  # the DSN of other users must stay valid
                _delete_far_sockets()

    def _has_left(self) -> bool:
        """Whether our user has left. If so, we no longer share the lock `users`."""
        parent = self._plan["parent"]
        if parent and (self._told_to_leave or os.getppid() != parent):
            self._plan["parent"] = 0
            _unlock(self._locks, USERS)
        return not self._plan["parent"]

    def _is_used(self) -> bool:
        """Whether a user is left. If not, no user can join before this process has ended."""
        if not self._has_left():
            return True
        if _lock(self._locks, USERS, fcntl.LOCK_EX):
            return False
        if self._told_to_leave:
            _tell("left")
            self._told_to_leave = False
        return True

    def _report(self, *, ready: bool) -> None:
        """Tell our user the DSN each time the server becomes ready."""
        if ready and not self._is_ready:
            _tell(f"ready postgresql://postgres@/postgres?host={_sockets(self._home)}&port=5432")
            self._was_ready = True
        self._is_ready = ready

    def _end_server(self) -> None:
        """No process of a server or an initdb is left, and the lock `server` is ours. Raises Failure."""
        for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
            if self._is_server_gone():
                break
            signalled = self._signal_server(number)
            deadline = time.monotonic() + (0 if number == signal.SIGINT and not signalled else patience)
            while not self._is_server_gone() and time.monotonic() < deadline:
                time.sleep(0.02)
        if not self._is_server_gone():
            raise Failure(
                f"the former server does not end: processes {signalled or 'of another container'}. Kill them."
            )
        if self._server:
            self._server.wait()

    def _signal_server(self, number: signal.Signals) -> list[int]:
        """Send the signal to the server's processes, and return them. SIGINT is only for a postmaster with its data."""
        with home.acting_as(os.getuid()):  # initdb may run as another account
            processes = _processes_at(_SERVER, self._server_lock)
            if number == signal.SIGINT:
                leader = self._server.pid if self._server and self._server.poll() is None else _noted_pid()
                processes = [process for process in processes if process == leader and CLUSTER.exists()]
            for process in processes:
                self._say(f"{number.name} to process {process}")
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)
        return processes

    def _is_server_gone(self) -> bool:
        try:
            fcntl.flock(self._server_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _start(self) -> None:
        """The server accepts connections, or no user is left. Raises Failure when the server ended."""
        self._end_server()
        if not CLUSTER.exists():
            if self._was_ready or not self._plan["create"]:
                raise Failure(f"the database in {self._home} was deleted. Stop, and start again for a new one.")
            durable = self._plan["settings"].get("fsync") != "off"
            home.make_database(self._home, self._plan["programs"], lock=self._server_lock, durable=durable)
        home.become_owner()
        begin = os.fstat(self._log).st_size
        self._server = server = self._launch()
        while self._is_used():
            note = _note()
            if len(note) > 7 and note[0] == b"%d" % server.pid and note[7].strip() == b"ready":
                break
            if server.poll() is not None:
                with _LOG.open("rb") as log:
                    log.seek(begin)
                    raise Failure("PostgreSQL ended while starting: " + home.last_lines(log.read()))
            time.sleep(0.01)

    def _launch(self) -> subprocess.Popen[bytes]:
        """A new server, with nothing left of the former one. Raises Failure."""
        sockets = _make_sockets(self._home)
        if _NOTE.exists() and (strangers := _processes_at(DATA, of="postgres")):
            raise Failure(
                f"a PostgreSQL that pgbackend did not start uses {self._home / DATA}: "
                f"processes {strangers}. Stop it with pg_ctl."
            )
        # PostgreSQL takes any living process with that id for a postmaster, and containers reuse ids at once.
        for remnant in (_NOTE, sockets / _SOCKET, sockets / f"{_SOCKET}.lock"):
            remnant.unlink(missing_ok=True)
        settings = {
            "listen_addresses": "",
            "logging_collector": "off",
            "log_destination": "stderr",
            **self._plan["settings"],
            # The DSN depends on these.
            "port": "5432",
            "unix_socket_directories": str(sockets),
            "unix_socket_permissions": "0700",
        }
        data = os.open(DATA, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        command = [f"{self._plan['programs']}/postgres", "-D", home.name_of(self._home, DATA, data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        server = subprocess.Popen(  # noqa: S603 - PostgreSQL's program
            command,
            cwd=DATA,
            env=home.ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            pass_fds=(self._server_lock, data),
            preexec_fn=self._bind,  # noqa: PLW1509 - there is one thread
        )
        os.close(data)
        # The server has the lock now. Our copy of the descriptor would keep it after the server's end.
        os.close(self._server_lock)
        self._server_lock = _open_lock(_SERVER)
        return server

    def _bind(self) -> None:
        """In the child, on Linux: ask the kernel for SIGINT, an orderly stop, when this process dies."""
        if _prctl is not None:
            _prctl(1, signal.SIGINT, 0, 0, 0)  # PR_SET_PDEATHSIG
            if os.getppid() != self._pid:  # it died before we asked
                os._exit(1)

    def _keep(self) -> None:
        """Return when the server has ended or no user is left. Raises Failure when the database was deleted."""
        _lock(self._locks, READY, fcntl.LOCK_EX)
        self._report(ready=True)
        while self._is_used():
            if self._server and self._server.poll() is not None:
                self._say(f"the server ended with status {self._server.returncode}")
                break
            if not CLUSTER.exists():
                raise Failure(f"the database in {self._home} was deleted.")
            # Copy and truncate: the server keeps the file open, and appends.
            if os.fstat(self._log).st_size > LOG_BYTES:
                with suppress(OSError):  # the disk is full
                    shutil.copyfile(_LOG, f"{_LOG}.1")
                os.ftruncate(self._log, 0)
            time.sleep(TICK)
        _unlock(self._locks, READY)
        self._report(ready=False)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        with suppress(OSError):  # the disk is full
            os.write(self._log, f"{stamp} [{self._pid}] KEEPER:  {text}\n".encode())


def _tell(text: str) -> None:
    """Write a line to our user."""
    with suppress(BrokenPipeError):
        os.write(1, text.encode() + b"\n")


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _lock(fd: int, which: int, how: int) -> bool:
    """Whether this process has the lock now. Its children never have it."""
    try:
        fcntl.lockf(fd, how | fcntl.LOCK_NB, 1, which)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int, which: int) -> None:
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, which)


def _other_lock(fd: int, which: int) -> int:
    """How another process has the lock: F_RDLCK (shared), F_WRLCK (exclusive) or F_UNLCK (not at all)."""
    # The order of the fields in `struct flock`.
    if sys.platform == "darwin":
        form, asked, place = "qqihh", (which, 1, 0, fcntl.F_WRLCK, os.SEEK_SET), 3
    else:
        form, asked, place = "hhqqi4x", (fcntl.F_WRLCK, os.SEEK_SET, which, 1, 0), 0
    return int(struct.unpack(form, fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack(form, *asked)))[place])


def _note() -> list[bytes]:
    """The lines of `postmaster.pid`; none if it is missing."""
    with suppress(OSError):
        return _NOTE.read_bytes().split(b"\n")
    return []


def _noted_pid() -> int:
    first = (_note() or [b""])[0]
    return int(first) if first.isdigit() else 0


def _processes_at(path: Path, fd: int | None = None, *, of: str = "") -> list[int]:
    """Other processes that have the file open or work in the directory, as far as we may see.

    `of` selects those of one program. `fd` is a descriptor of the file, in case its path is gone.
    """
    if home.PROC.exists():
        found = set()
        wanted = path.stat() if fd is None else os.fstat(fd)
        for process in Path("/proc").glob("[0-9]*"):
            # A process may end at any moment, and we may not look at some.
            with suppress(OSError):
                for link in (process / "cwd", *(process / "fd").iterdir()):
                    with suppress(OSError):
                        if os.path.samestat(link.stat(), wanted) and of in (process / "comm").read_text():
                            found.add(int(process.name))
    else:
        command = ["lsof", "-t", *(["-a", "-c", of] if of else []), "--", str(path)]
        listed = subprocess.run(command, env=home.ENVIRONMENT, stdout=subprocess.PIPE, check=False)  # noqa: S603
        found = {int(line) for line in listed.stdout.split()}
    return sorted(found - {os.getpid()})


def _sockets(at: Path) -> Path:
    """The socket's directory, in the home at that path or far from it."""
    return _RUN.readlink() if _RUN.is_symlink() else at / _RUN


def _make_sockets(at: Path) -> Path:
    """Make the socket's directory, with mode 0700, which `run` is or links to. It stays the same while users live."""
    path = f"{at / _RUN}/{_SOCKET}"
    # Other characters may be special to the server or in a URL.
    near = len(path) <= _SOCKET_PATH_BYTES and re.fullmatch(r"[\w./-]+", path, re.ASCII)
    with suppress(OSError):
        if near:
            _RUN.mkdir(mode=0o700, exist_ok=True)
        found = _sockets(at).lstat()
        private = stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700
        if (near or _RUN.is_symlink()) and private and found.st_uid == os.geteuid() and _sockets(at).samefile(_RUN):
            return _sockets(at)
    if os.path.lexists(_RUN):
        home.delete(_RUN)
    _RUN.symlink_to(tempfile.mkdtemp(prefix="pgbackend-", dir="/tmp"))
    return _sockets(at)


def _delete_far_sockets() -> None:
    """Leave no directory in /tmp. The next active keeper makes another."""
    with suppress(OSError):
        if _RUN.is_symlink():
            _RUN.readlink().rmdir()
            _RUN.unlink()


def main() -> NoReturn:
    """Carry out the plan, which is the last argument, in JSON. Exit with status 1 and print the reason if it fails."""
    plan: Plan = json.loads(sys.argv[-1])
    # A service manager may signal all processes of a service at once, while users still drain. We end after them.
    # A function and not SIG_IGN, which the server would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        home.enter(Path(plan["directory"]), create=plan["create"])
        if CLUSTER.exists():  # making a database may need root
            home.become_owner()
        os.umask(0o077)
        keeper = Keeper(plan)
        signal.signal(signal.SIGUSR1, keeper.leave)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        keeper.run()
    except (Failure, OSError) as error:
        print(error, flush=True)  # noqa: T201 - to our user
        sys.exit(1)
    sys.exit()
