"""Keeps one PostgreSQL alive while somebody uses it. A program that `embedded` starts, never imported.

It stands between the users of a data directory and the server, in a session of its own: a user may be killed, with its
whole process group, and this process is still there to stop the server; the server may be killed, and this process, its
parent, learns of it, reaps it and starts it again. The promise: while a user lives there is a server, and when the last
one has left there is none.

Who lives is the kernel's word, never a process id's. Each of these files is locked with flock(), and such a lock goes
when the last process that holds it is gone, however it went:

    users    shared, by each user; exclusively by a keeper that found no user, until the server is stopped: who comes
             meanwhile waits for that
    keeper   by the keeper. Its starter took it and handed it down: two users that want one never start two
    server   by the postmaster or initdb and every process of their making, which inherit it: free means that none of
             them is left, that a `postmaster.pid` is a remnant, whatever process has that number by now, and that an
             unfinished database can be deleted

    initialize ─▶ launch ─▶ ready ─▶ running ──no user left──▶ stop ─▶ end
                    ▲                   │
                    └── the server died ┘

It imports nothing but the standard library and runs without site-packages, which keeps it small and starts it fast.
Started as root, it becomes the server's user before it touches anything in the home directory, so that a link there
leads it nowhere that this user could not go. It works from its current directory, which it was handed as a descriptor:
no directory above has to let the server's user in.
"""

import contextlib
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NoReturn, TypedDict

TICK = 0.1
"""Seconds between two looks at the users and the server."""
PATIENCE = 60.0
"""Seconds that an orderly stop may take. After that the server is stopped as by a crash, which loses nothing."""
LOG_BYTES = 8 << 20
"""The server's log begins anew at this size; one older part is kept."""
SHORT_DIRECTORIES = ("/var/lib/pgbackend/run", "/tmp")  # noqa: S108 - a directory 0700 of our own in it
"""Where the socket is when its path would be too long, or out of the server's reach, in the data directory."""
SOCKET_PATH_BYTES = 107
"""What the kernel's address of a Unix socket holds."""

_DATA = Path("data")
_CLUSTER = _DATA / "PG_VERSION"
_NOTE = _DATA / "postmaster.pid"
_RUN = Path("run")
_LOG = Path("postgresql.log")
_RULES = _DATA / "pg_hba.conf"
_TRUSTED_HOST = re.compile(
    rb"^(host[ \t]+(?:all|replication)[ \t]+all[ \t]+(?:127\.0\.0\.1/32|::1/128)[ \t]+)trust\b", re.MULTILINE
)
"""The lines that `initdb --auth=trust` wrote for TCP."""
_HERE = "/proc/self/cwd"
"""A name of the current directory that needs no right to the directories above it."""
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
_SOCKET_NAME = ".s.PGSQL.5432"
_PR_SET_PDEATHSIG = 1


class Plan(TypedDict):
    """What the starter decided."""

    home: str
    """Absolute path, for messages and arguments."""
    at: int
    """Descriptor of that directory, which becomes the current one."""
    programs: str
    """Directory of `postgres` and `initdb`."""
    user: list[int]
    """User and group to run as; empty: as we are."""
    scratch: str
    """With a user to become: a directory that only root can enter."""
    settings: dict[str, str]


class Order(TypedDict):
    """Root has the owner of a directory make these in it."""

    at: int
    """Descriptor of that directory."""
    user: list[int]
    directory: str
    """The name of a directory; empty: none."""
    mode: int
    files: list[str]
    """The names of empty files."""


class Failure(Exception):  # noqa: N818 - goes to the starter as text, which makes an error of it
    """No server, and why."""


class Keeper:
    """One keeper's life. Paths are relative to the current directory, which the plan calls home."""

    def __init__(self, plan: Plan, bind: Callable[[], None] | None, template: IO[bytes] | None) -> None:
        self._plan = plan
        self._bind = bind
        self._template = template
        self._users = _open_lock("users")
        self._server: subprocess.Popen[bytes] | None = None
        self._sockets = Path()
        self._log = -1
        self._launched_at = 0  # where the log was then

    def run(self) -> None:
        """Return when no user is left and the server is stopped. Raises Failure when it cannot be started at first."""
        self._log = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._rotate_log()
        self._initialize()
        self._close_tcp()
        self._sockets = _socket_directory(Path(self._plan["home"]))
        try:
            self._launch()
            if self._await_ready():
                _tell("ready")
                os.dup2(self._log, 1)
                os.dup2(self._log, 2)
                self._keep()
        finally:
            self._stop()
            if self._unused():  # else their DSN must stay true
                _remove_socket_directory()

    def _initialize(self) -> None:
        """A complete, synced database stands in `data`. Killed at any moment, the next keeper begins anew."""
        lock = _open_lock("server")
        try:
            # The initdb of a killed keeper still writes: what is deleted under its hands comes back.
            self._outlive_former(lock)
            for former in Path().glob(f"{_DATA}.new-*"):
                try:
                    _remove(former)
                except OSError as error:
                    self._say(f"an unfinished database is left: {error}")
            if _CLUSTER.exists():
                return
            if os.path.lexists(_DATA):
                raise Failure(f"{self._plan['home']}/{_DATA} is there but holds no database. Remove it.")
            new = Path(Path(tempfile.mkdtemp(prefix=f"{_DATA}.new-", dir=".")).name)
            if self._template:
                _unpack(self._template, new)
            elif not _has_name(os.geteuid()):
                raise Failure(
                    f"initdb needs a name for user id {os.geteuid()}. Add one to the password file, or use a "
                    "PostgreSQL elsewhere by its DSN."
                )
            else:
                _initdb(self._plan["programs"], self._argument(new), cwd=new, lock=lock)
        finally:
            os.close(lock)
        if self._plan["settings"].get("fsync") != "off":
            for path in _tree(new):
                _sync(path)
        new.rename(_DATA)
        _sync(Path())

    def _close_tcp(self) -> None:
        """Trust ends at the socket: a database of former versions trusted everybody on this machine, too."""
        found = _RULES.read_bytes()
        mended = _TRUSTED_HOST.sub(rb"\1scram-sha-256", found)
        if mended != found:
            new = _RULES.with_name(f"{_RULES.name}.new")
            new.write_bytes(mended)
            _sync(new)
            new.replace(_RULES)
            _sync(_DATA)

    def _launch(self) -> None:
        """A new server runs, with nothing left of a former one."""
        lock = _open_lock("server")
        try:
            self._outlive_former(lock)
            self._remove_remnants()
            settings = {
                "listen_addresses": "",
                "logging_collector": "off",
                "log_destination": "stderr",
                **self._plan["settings"],
                # Not for others to choose: the DSN says so.
                "port": "5432",
                "unix_socket_directories": str(self._sockets),
                "unix_socket_permissions": "0700",
            }
            command = [f"{self._plan['programs']}/postgres", "-D", self._argument(_DATA)]
            for name, value in settings.items():
                command += ["-c", f"{name}={value}"]
            self._launched_at = os.fstat(self._log).st_size
            self._server = subprocess.Popen(  # noqa: S603 - the wheel's program
                command,
                cwd=_DATA,
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                pass_fds=(lock,),
                preexec_fn=self._bind,  # noqa: PLW1509 - there is one thread
            )
        finally:
            # The server's own copies hold the lock from here on: ours would hide that the server is gone.
            os.close(lock)

    def _outlive_former(self, lock: int) -> None:
        """No process of a former server is left, and `lock` is held."""
        began = time.monotonic()
        sent: set[signal.Signals] = set()
        while not _locked(lock, fcntl.LOCK_EX):
            waited = time.monotonic() - began
            former = _holders(lock)
            leader = _noted_pid()
            # Its keeper's death has asked a postmaster to end in order. Without a postmaster they are orphans.
            if leader in former and waited < 15.0:
                self._signal(sent, signal.SIGINT, [leader])
            elif waited < 20.0:
                self._signal(sent, signal.SIGQUIT, former)
            else:
                self._signal(sent, signal.SIGKILL, former)
            if waited > 30.0:
                raise Failure(f"a former server does not end: processes {former or 'of another container'}.")
            time.sleep(0.02)

    def _signal(self, sent: set[signal.Signals], number: signal.Signals, processes: Sequence[int]) -> None:
        if processes and number not in sent:
            sent.add(number)
            self._say(f"a former server is still there: {number.name} to {processes}")
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, number)

    def _remove_remnants(self) -> None:
        if _NOTE.exists() and (strangers := _postgres_processes()):
            raise Failure(
                f"a PostgreSQL that pgbackend did not start uses {self._plan['home']}/{_DATA}: "
                f"processes {strangers}. Stop it with pg_ctl."
            )
        # PostgreSQL takes any living process with that number for a postmaster, and in a container numbers repeat.
        for remnant in (_NOTE, self._sockets / _SOCKET_NAME, self._sockets / f"{_SOCKET_NAME}.lock"):
            remnant.unlink(missing_ok=True)

    def _argument(self, directory: Path) -> str:
        path = Path(self._plan["home"]) / directory
        with contextlib.suppress(OSError):
            if path.samefile(directory):
                return str(path)
        return _HERE  # the program begins there, and every process of its making stays there

    def _await_ready(self) -> bool:
        """Whether the server accepts connections; else no user is left. Raises Failure when it ended."""
        server = self._server
        assert server  # noqa: S101 - for the type checker
        while not _is_ready(server.pid):
            if server.poll() is not None:
                with _LOG.open("rb") as log:
                    log.seek(self._launched_at)
                    raise Failure("PostgreSQL ended while starting: " + _last_lines(log.read()))
            if self._unused():
                return False
            time.sleep(0.01)
        return True

    def _keep(self) -> None:
        """Return when no user is left, or the database was deleted under us."""
        delay = TICK
        launched = rotated = time.monotonic()
        while not self._unused() and _CLUSTER.exists():
            time.sleep(TICK)
            now = time.monotonic()
            if self._server and self._server.poll() is None:
                if now - rotated > 1.0:
                    self._rotate_log()
                    rotated = now
                continue
            if now - launched > 30.0:
                delay = TICK
            if self._server:
                self._say(f"the server ended with status {self._server.returncode}; it is started again")
                self._server = None
            if now - launched > delay:
                delay = min(delay * 2, 10.0)
                launched = now
                try:
                    self._launch()
                except (Failure, OSError) as error:
                    self._say(f"the server was not started: {error}")

    def _unused(self) -> bool:
        """Whether no user is left. When it is so, none can come before this process has ended."""
        return _locked(self._users, fcntl.LOCK_EX)

    def _stop(self) -> None:
        """The server is stopped, in order if it can be."""
        if not self._server:
            return
        for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
            if self._server.poll() is None:
                self._server.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(patience)
                return

    def _rotate_log(self) -> None:
        """The log is short enough. It is copied and cut: the server writes at its end, wherever that is."""
        if os.fstat(self._log).st_size > LOG_BYTES:
            shutil.copyfile(_LOG, f"{_LOG}.1")
            os.ftruncate(self._log, 0)

    def _say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        os.write(self._log, f"{stamp} [{os.getpid()}] KEEPER:  {text}\n".encode())


def _become(user: int, group: int) -> None:
    """This process is that user's for good."""
    try:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)
    except PermissionError as error:
        raise _may_not_become(user) from error


def _may_not_become(user: int) -> Failure:
    return Failure(
        f"PostgreSQL refuses to run as root, which may not become user {user} here. Run as an ordinary user."
    )


def _initdb(
    programs: str, directory: str, *, cwd: Path, lock: int, user: int | None = None, group: int | None = None
) -> None:
    """A new database is in `cwd`, by that user or by us. Its processes hold `lock`."""
    command = [
        f"{programs}/initdb",
        f"--pgdata={directory}",
        "--username=postgres",
        "--auth-local=trust",  # the socket's directory is closed to others
        "--auth-host=scram-sha-256",  # without a password nobody comes in
        "--encoding=UTF8",
        "--locale=C",
        "--data-checksums",
        "--no-sync",
        "--no-instructions",
    ]
    try:
        done = subprocess.run(  # noqa: S603 - the wheel's program
            command,
            cwd=cwd,
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            pass_fds=(lock,),
            user=user,
            group=group,
            extra_groups=None if user is None else [],
        )
    except PermissionError as error:
        raise _may_not_become(user) if user else Failure(f"{command[0]} is not executable here.") from error
    if done.returncode:
        raise Failure("initdb failed: " + _last_lines(done.stdout))


def _template(plan: Plan) -> IO[bytes] | None:
    """As root: a new database in a tar file, if one is needed for a user that the password file lacks; else None.

    initdb wants its user in the password file, PostgreSQL itself does not. So an account that always is there makes
    the database, where only root gets to, and the server's user unpacks it. Other processes of that account cannot
    come near: the directory is closed to them, and another group bars them from /proc/…/cwd.
    """
    scratch = Path(plan["scratch"])
    entrance = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(entrance, fcntl.LOCK_EX)
        for former in scratch.iterdir():
            _remove_unlocked(former)
        user, group = plan["user"]
        if os.path.lexists(_DATA) or _has_name(user):
            return None
        new = Path(tempfile.mkdtemp(dir=scratch))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(entrance)
    import tarfile  # noqa: PLC0415 - few need it

    try:
        data = new / _DATA
        data.mkdir(mode=0o700)
        maker = _account()
        os.chown(data, maker, group)
        _initdb(plan["programs"], _HERE, cwd=data, lock=lock, user=maker, group=group)
        packed: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - the caller's
        with tarfile.open(fileobj=packed, mode="w:") as archive:
            for path in data.iterdir():
                archive.add(path, path.name)
        packed.seek(0)
        return packed
    finally:
        shutil.rmtree(new)
        os.close(lock)


def _unpack(template: IO[bytes], directory: Path) -> None:
    import tarfile  # noqa: PLC0415 - loaded by now

    with tarfile.open(fileobj=template, mode="r:") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # 3.11.4 and newer know it
        archive.extractall(directory)  # noqa: S202 - we packed it


def _remove_unlocked(directory: Path) -> None:
    """`directory` is gone, unless an initdb is still at work in it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _locked(fd, fcntl.LOCK_EX):
            shutil.rmtree(directory)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _open_lock(name: str) -> int:
    """A descriptor of its own of the lock file. In home, only root and the server's user reach it."""
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _account() -> int:
    """An unprivileged account that the password file knows."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("nobody").pw_uid
    for entry in pwd.getpwall():
        if entry.pw_uid:
            return entry.pw_uid
    raise Failure("there is no unprivileged account that initdb could run as. Create one called pgbackend.")


def _socket_directory(home: Path) -> Path:
    """Absolute path of a directory 0700 of ours for the socket, which `run` is or points to. It does not change."""
    with contextlib.suppress(OSError):
        if _RUN.is_symlink() and _is_private(target := _RUN.readlink()):
            return target
    # A comma parts the directories of a list; what else may be special, to the server or in a URL, is not worth it.
    path = home / _RUN
    if re.fullmatch(r"[\w./-]+", str(path), re.ASCII) and len(f"{path}/{_SOCKET_NAME}") <= SOCKET_PATH_BYTES:
        with contextlib.suppress(OSError):
            _RUN.mkdir(mode=0o700, exist_ok=True)
            if _is_private(path) and path.samefile(_RUN):
                return path
    if _RUN.is_symlink():
        _RUN.unlink()
    elif _RUN.is_dir():
        shutil.rmtree(_RUN)
    for directory in SHORT_DIRECTORIES:
        with contextlib.suppress(OSError):
            target = Path(tempfile.mkdtemp(prefix="pgbackend-", dir=directory))
            _RUN.symlink_to(target)
            return target
    raise Failure(f"there is no place for a Unix socket: tried {path}, {', '.join(SHORT_DIRECTORIES)}.")


def _is_private(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700


def _remove_socket_directory() -> None:
    """A directory far from home is not left behind; the next keeper makes another."""
    with contextlib.suppress(OSError):
        if _RUN.is_symlink():
            _RUN.readlink().rmdir()
            _RUN.unlink()


def _noted_pid() -> int:
    """The number in `postmaster.pid`, 0 if there is none."""
    try:
        return int(_NOTE.read_bytes().partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return 0


def _is_ready(pid: int) -> bool:
    try:
        lines = _NOTE.read_bytes().split(b"\n")
    except FileNotFoundError:
        return False
    return len(lines) > 7 and lines[0] == b"%d" % pid and lines[7].strip() == b"ready"


def _holders(lock: int) -> list[int]:
    """Processes that have the file of `lock` open, as far as this container sees them."""
    found = set()
    ours = os.fstat(lock)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if os.path.samestat(link.stat(), ours):
                found.add(int(link.parts[2]))
    return sorted(found - {os.getpid()})


def _postgres_processes() -> list[int]:
    """Processes of any PostgreSQL on our data, as far as this container sees them. All of them work there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, a zombie, or somebody else's
            if (process / "exe").readlink().name.startswith("postgres") and (process / "cwd").samefile(_DATA):
                found.append(int(process.name))
    return found


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a child calls first, so that it is asked to end in order once `parent` is gone. Linux only."""
    try:
        import ctypes  # noqa: PLC0415 - a small build of Python may be without

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, AttributeError):
        return None

    def bind() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return bind


def _tree(top: Path) -> Iterator[Path]:
    """Each file, then its directory."""
    for directory, _, names in os.walk(top, topdown=False):
        yield from (Path(directory, name) for name in names)
        yield Path(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _last_lines(output: bytes) -> str:
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-12:])


def _tell(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the starter was killed
        os.write(1, text.encode() + b"\n")


def main() -> NoReturn:
    """Run by `embedded`: the plan is the argument, in JSON; the lock `keeper` is held by an inherited descriptor.

    Or `make` and an order: this process only makes what root must not make itself.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A service manager that ends all processes of a service at once would take the server away from users that still
    # drain. We end when they have. A function and not SIG_IGN, which the server would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        if sys.argv[1] == "make":
            _make(json.loads(sys.argv[2]))
        else:
            _keep(json.loads(sys.argv[1]))
    except (Failure, OSError) as error:
        _tell(str(error))
        sys.exit(1)
    sys.exit()


def _make(order: Order) -> None:
    """The ordered directory and files exist, made by the owner of the directory around them."""
    os.fchdir(order["at"])
    user, group = order["user"]
    _become(user, group)
    if order["directory"]:
        Path(order["directory"]).mkdir(mode=order["mode"], exist_ok=True)
    for name in order["files"]:
        os.close(_open_lock(name))


def _keep(plan: Plan) -> None:
    os.umask(0o077)
    os.fchdir(plan["at"])
    os.close(plan["at"])
    bind = _die_with(os.getpid())  # before it is another's process, which may not read Python's library
    template = None
    if plan["user"]:
        template = _template(plan)
        user, group = plan["user"]
        _become(user, group)
    Keeper(plan, bind, template).run()


if __name__ == "__main__":
    main()
