"""The home of an embedded server, `postgresql` in the user's directory, and who owns it. Part of the keeper's program.

    directory/postgresql/    0700, of the user that the server runs as
        data/                the database: PGDATA. data.new-… is one that is not finished
        run                  where the socket is: a directory, or a link to one when its path would be too long
        postgresql.log       what the server and the keepers say; postgresql.log.1 is the part before
        keepers, server      the locks of `keeper.py`

As root, PostgreSQL runs as the owner of the directory; when that is root, as the account `pgbackend` if there is one,
else under a user id that nobody has. The promise: only the owner of a directory makes anything in it, root follows no
link on the way, and in the home this process acts as its owner. So a link there leads it nowhere that the owner could
not go. No account is made, and no permission of a directory above is needed or changed: programs work in their current
directory.
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
USER_ID = 20551
"""The user id that root's servers run as when there is no account `pgbackend`, or the first free one after it."""
PROC = Path("/proc/self")
"""Linux has it. Its `cwd` is a name of the current directory that needs no right to the directories above."""
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin", "LC_ALL": "C", "TZ": "UTC"}

_NEW = "data.new-"


class Failure(Exception):  # noqa: N818 - goes to the user as text, which makes an error of it
    """No server, and why."""


def enter(directory: Path, *, create: bool) -> None:
    """The home is the current directory, and root acts as its owner. `directory` has no links. Raises Failure."""
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
        outer = Path().stat()
        try:
            _step_into(name)
        except FileNotFoundError:
            if not create:
                raise Failure(f"{home} was deleted. Stop, and start again for a new database.") from None
            with acting_as(outer.st_uid), suppress(FileExistsError):
                Path(name).mkdir(0o700 if name == NAME else 0o777)
            _step_into(name)
    found, root = Path().stat(), os.geteuid() == 0
    user = _user(outer, found.st_uid) if root else os.geteuid()
    if root and found.st_uid == 0 and not any(Path().iterdir()):
        os.chown(".", user, _group(user))
    elif found.st_uid != user:
        raise Failure(f"{home} belongs to user {found.st_uid}, not to {user}. Name another directory.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise Failure(f"{home} is open to others: anybody could be the database's superuser. Close it.")
    if root:
        os.setgroups([])
        _act_as(user)


def _step_into(name: str) -> None:
    """The directory of that name is the current one. Root follows no link."""
    if os.geteuid():
        os.chdir(name)
    else:
        inside = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        os.fchdir(inside)
        os.close(inside)


def _user(outer: os.stat_result, owner: int) -> int:
    """As root: the user whose server it is, by the directory and by the owner of the home in it."""
    if outer.st_uid:
        return outer.st_uid
    try:
        ours = pwd.getpwnam("pgbackend").pw_uid
    except KeyError:
        ours = next(number for number in range(USER_ID, 60000) if not _has_name(number))
    if owner in (0, ours):
        return ours
    if outer.st_mode & 0o022:
        raise Failure(
            f"the home belongs to user {owner}, and others than root can write to the directory around it: "
            "anybody could have made it. Name another directory."
        )
    return owner


def make_database(home: Path, programs: str, *, lock: int, durable: bool) -> None:
    """A complete database is in `data`, and on disk. Its makers have the lock, while any is left. Raises Failure.

    initdb wants its user in the password file, PostgreSQL itself does not. For an owner without a name, root has an
    account make the database that is always there. Other processes of that account cannot come near: the home is
    closed to them, and another group bars them from /proc/…/cwd.
    """
    if os.path.lexists(DATA):
        raise Failure(f"{home / DATA} is there but holds no database. Remove it.")
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir="."))
    outside, inside = (os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) for path in (".", new))
    os.fchdir(inside)
    try:
        if os.getuid() == 0 and not _has_name(os.geteuid()):
            _make_for(os.geteuid(), home / new, programs, lock=lock, durable=durable)
        else:
            become_owner()
            _initdb(home / new, programs, lock=lock, durable=durable)
    finally:
        os.fchdir(outside)
    new.rename(DATA)
    os.fsync(outside)
    os.close(outside)
    os.close(inside)


def _make_for(owner: int, path: Path, programs: str, *, lock: int, durable: bool) -> None:
    """As root: a database is in the current directory, which is the owner's. The account nobody makes it."""
    maker, group = pwd.getpwnam("nobody").pw_uid, _group(owner)
    with acting_as(0):
        if Path().stat().st_uid != owner:
            raise Failure(f"{path} was replaced. Name another directory.")
        os.chown(".", maker, group)
        Path().chmod(0o700)
        if any(Path().iterdir()):  # from here on its owner cannot put anything there
            raise Failure(f"{path} was replaced. Name another directory.")
        _initdb(path, programs, lock=lock, durable=durable, user=maker, group=group)
        for _, directories, files, at in os.fwalk():
            for name in (*directories, *files):
                os.chown(name, owner, group, dir_fd=at, follow_symlinks=False)
        os.chown(".", owner, group)


def delete_unfinished() -> None:
    """What a killed initdb left is gone, unless it is another account's and we are not root."""
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


def _initdb(
    path: Path, programs: str, *, lock: int, durable: bool, user: int | None = None, group: int | None = None
) -> None:
    """A database is in the current directory, whose path that is."""
    command = [
        f"{programs}/initdb",
        f"--pgdata={name_of(path, Path())}",
        "--username=postgres",
        "--auth-local=trust",  # the socket's directory is closed to others
        "--auth-host=scram-sha-256",  # without a password nobody comes in
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
        pass_fds=(lock,),
        user=user,
        group=group,
        extra_groups=None if user is None else [],
    )
    if done.returncode:
        raise Failure("initdb failed: " + last_lines(done.stdout))


def name_of(above: Path, directory: Path) -> str:
    """A name of the directory for a program that starts in it: its path, if the program's user reaches that."""
    with suppress(OSError):
        if os.geteuid() and (above / directory).samefile(directory):
            return str(above / directory)
    if not PROC.exists():
        raise Failure(f"PostgreSQL's user does not reach {above}. Name another directory, or run as that user.")
    return str(PROC / "cwd")


def become_owner() -> None:
    """Root does not only act as the owner of the home, but is that user for good."""
    user, group = os.geteuid(), os.getegid()
    if os.getuid() == 0 != user:
        os.seteuid(0)
        os.setgid(group)
        os.setuid(user)


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Root, as whom it acts before, acts as that user. For others nothing changes."""
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
    """The user's own group. Never that of a directory, whose owner need not be a member."""
    return pwd.getpwuid(user).pw_gid if _has_name(user) else user


def _has_name(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def last_lines(output: bytes) -> str:
    """The end of what a program said."""
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-12:])
