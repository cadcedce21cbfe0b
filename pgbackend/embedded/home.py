"""The home of an embedded server and its owner. Part of the keeper's program.

The home is `postgresql` in the user's directory. It has mode 0700 and belongs to the user that the server runs as.

    data/                PostgreSQL's data directory; data.new-… is one that initdb has not finished
    run                  the socket's directory, or a link to one in /tmp when the path would be too long
    postgresql.log       what the server and the keepers report; postgresql.log.1 is the part before
    keepers, server      the locks of `keeper.py`

PostgreSQL refuses to run as root. Root's server runs as the owner of the directory. If that is root too, it runs as the
account `pgbackend` or, without such an account, under a user id that nobody has. The promise: nothing is made in a
directory but by its owner, root follows no link on the way, and in the home root acts as the owner. So a link there
leads only where its owner could go anyway. pgbackend makes no account, and changes no permission of a directory above.
"""

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "postgresql"
DATA = Path("data")
CLUSTER = DATA / "PG_VERSION"
"""The file that every complete database has."""
USER_ID = 20551
"""The user id of root's servers when there is no account `pgbackend`. A later one if an account has it."""
PROC = Path("/proc/self")
"""Only Linux has it. Its `fd` names open directories even if those above are closed."""
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin", "LC_ALL": "C", "TZ": "UTC"}

_NEW = "data.new-"


class Failure(Exception):  # noqa: N818 - the user gets its text, and makes an error of it
    """The reason why there is no server."""


def enter(directory: Path, *, create: bool) -> None:
    """The home is the current directory, and root acts as its owner. Raises Failure.

    `directory` is absolute and has no links. With `create`, directories that are missing are made.
    """
    try:
        _enter(directory / NAME, create=create)
    except OSError as error:
        step = "Name another directory." if os.geteuid() else "Name another directory, or run as an ordinary user."
        raise Failure(
            f"PostgreSQL cannot keep its data in {directory}: {error.strerror} ({error.filename or NAME}). {step}"
        ) from error


def _enter(home: Path, *, create: bool) -> None:
    os.chdir("/")
    for name in home.parts[1:]:
        above = Path().stat()
        try:
            _step_into(name)
        except FileNotFoundError:
            if not create:
                raise Failure(f"{home} was deleted. Stop, and start again for a new database.") from None
            with acting_as(above.st_uid), suppress(FileExistsError):
                Path(name).mkdir(0o700 if name == NAME else 0o777)
            _step_into(name)
    found, root = Path().stat(), os.geteuid() == 0
    owner = _server_user(above, found.st_uid) if root else os.geteuid()
    if root and found.st_uid == 0 and not any(Path().iterdir()):
        os.chown(".", owner, _group(owner))
    found = Path().stat()  # another keeper may have given it away meanwhile
    if found.st_uid != owner:
        raise Failure(f"{home} belongs to user {found.st_uid}, not to {owner}. Name another directory.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise Failure(f"{home} is open to others, who could become the database's superuser. Close it (chmod 700).")
    if root:
        os.setgroups([])
        _act_as(owner)


def _step_into(name: str) -> None:
    """The directory of that name is the current one. Root follows no link."""
    if os.geteuid():
        os.chdir(name)
    else:
        inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        os.fchdir(inside)
        os.close(inside)


def _server_user(above: os.stat_result, owner: int) -> int:
    """The user that root's server runs as, given the directory around the home and the home's owner. Raises Failure."""
    if above.st_uid:
        return above.st_uid
    try:
        ours = pwd.getpwnam("pgbackend").pw_uid
    except KeyError:
        ours = next(number for number in range(USER_ID, 60000) if not _has_name(number))
    if owner in (0, ours):
        return ours
    if above.st_mode & 0o022:
        raise Failure(
            f"the home belongs to user {owner}, and users other than root can write to the directory around it: "
            "anybody could have made it. Name another directory."
        )
    return owner


def make_database(home: Path, programs: str, *, lock: int, durable: bool) -> None:
    """A complete database is in `data`, on disk if `durable`. Its makers inherit the lock. Raises Failure.

    initdb refuses a user id without a name in the password file; PostgreSQL itself does not. For such an owner, root
    has the account `nobody` make the database. Other processes of that account cannot reach it: the home is closed to
    them, and the owner's group keeps them from /proc/…/fd.
    """
    if os.path.lexists(DATA):
        raise Failure(f"{home / DATA} is there but holds no database. Remove it.")
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir="."))
    outside, inside = (os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) for path in (".", new))
    os.fchdir(inside)
    try:
        if os.getuid() == 0 and not _has_name(os.geteuid()):
            _make_as_nobody(os.geteuid(), home / new, programs, lock=lock, durable=durable)
        else:
            become_owner()
            _initdb(home / new, programs, lock=lock, durable=durable)
    finally:
        os.fchdir(outside)
    new.rename(DATA)
    os.fsync(outside)
    os.close(outside)
    os.close(inside)


def _make_as_nobody(owner: int, path: Path, programs: str, *, lock: int, durable: bool) -> None:
    """A database is in the current directory, which is the owner's before and after. Only root can do this."""
    nobody, group = pwd.getpwnam("nobody").pw_uid, _group(owner)
    with acting_as(0):
        if Path().stat().st_uid != owner:
            raise Failure(f"{path} was replaced while it was made. Start again.")
        os.chown(".", nobody, group)
        Path().chmod(0o700)
        # From here on the owner can add nothing. Files that were there before must not become the owner's.
        if any(Path().iterdir()):
            raise Failure(f"{path} was replaced while it was made. Start again.")
        _initdb(path, programs, lock=lock, durable=durable, user=nobody, group=group)
        for _, directories, files, at in os.fwalk():
            for name in (*directories, *files):
                os.chown(name, owner, group, dir_fd=at, follow_symlinks=False)
        os.chown(".", owner, group)


def _initdb(
    path: Path, programs: str, *, lock: int, durable: bool, user: int | None = None, group: int | None = None
) -> None:
    """A database is in the current directory, whose path is `path`."""
    current = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    command = [
        f"{programs}/initdb",
        f"--pgdata={name_of(path, Path(), current)}",
        "--username=postgres",
        "--auth-local=trust",  # the socket's directory is closed to others
        "--auth-host=scram-sha-256",  # no role has a password, so TCP lets nobody in
        "--encoding=UTF8",
        "--locale=C",
        "--data-checksums",
        "--no-instructions",
        *([] if durable else ["--no-sync"]),
    ]
    done = subprocess.run(  # noqa: S603 - PostgreSQL's program
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        pass_fds=(lock, current),
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )
    os.close(current)
    if done.returncode:
        raise Failure("initdb failed: " + last_lines(done.stdout))


def delete_unfinished() -> None:
    """Databases that initdb has not finished are gone, except those of another account if we are not root."""
    with acting_as(os.getuid()):
        for unfinished in Path().glob(f"{_NEW}*"):
            with suppress(PermissionError):
                delete(unfinished)


def delete(path: Path) -> None:
    """The directory, or the link, is gone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def name_of(above: Path, directory: Path, opened: int) -> str:
    """A name of the directory for a program: its path, if the program's user can reach that.

    `opened` is a descriptor of the directory that the program inherits. PostgreSQL 14 and 15 leave their working
    directory and cannot come back, so that is no name for them.
    """
    with suppress(OSError):
        if os.geteuid() and (above / directory).samefile(directory):
            return str(above / directory)
    if not PROC.exists():
        raise Failure(f"PostgreSQL's user cannot reach {above}. Name another directory, or run as that user.")
    return str(PROC / "fd" / str(opened))


def become_owner() -> None:
    """Root is the owner of the home for good, and no longer only acts as the owner."""
    user, group = os.geteuid(), os.getegid()
    if os.getuid() == 0 != user:
        os.seteuid(0)
        os.setgid(group)
        os.setuid(user)


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Root acts as that user inside, and as before afterwards. Nothing changes if we are not root."""
    former = os.geteuid()
    if os.getuid() == 0:
        _act_as(user)
    try:
        yield
    finally:
        if os.getuid() == 0:
            _act_as(former)


def _act_as(user: int) -> None:
    os.seteuid(0)
    os.setegid(_group(user))
    os.seteuid(user)


def _group(user: int) -> int:
    """The user's own group. The directory's group would be wrong: its owner need not be a member."""
    return pwd.getpwuid(user).pw_gid if _has_name(user) else user


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def last_lines(output: bytes) -> str:
    """The last twelve lines of a program's output."""
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-12:])
