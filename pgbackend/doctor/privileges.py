"""The rights of the role that looks, held against those that `pgbackend grants` prints."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.look import Look, Scene
from pgbackend.postgres.grants import Right, grant_lines, rights

_WANTED: tuple[Right, ...] = tuple(
    sorted(
        frozenset[Right]().union(*rights().values()),
        key=lambda right: (right.kind, right.object, right.privilege, right.column or ""),
    )
)

_MOST = 0.6
"""The share of a kind's rights with which a role counts as of that kind."""
_READING = ("SELECT", "USAGE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A row of `find_rights`."""

    number: int
    is_held: bool | None
    """None where the object is missing."""


def wanted_rights(_: Scene) -> tuple[object, ...]:
    """The parameters of `find_rights`."""
    return (
        list(range(len(_WANTED))),
        [right.kind for right in _WANTED],
        [right.object for right in _WANTED],
        [right.privilege for right in _WANTED],
        [right.column for right in _WANTED],
    )


def check_rights(rows: Sequence[Held], scene: Scene) -> Iterator[Finding]:
    """Whether the role has all rights of the kinds of role that it seems to be."""
    if scene.session.is_owner:
        return
    role = scene.session.role
    held = frozenset(_WANTED[row.number] for row in rows if row.is_held)
    there = frozenset(_WANTED[row.number] for row in rows if row.is_held is not None)
    if not held:
        yield Finding(
            check="missing-privilege",
            severity="error",
            subject=f"role {role}",
            what="This role may do nothing with the log. Choose what it is for: --producer, --consumer, --reader or "
            "--operator. Run what the line prints as the owner.",
            cure=scene.command("grants", "--consumer", role),
        )
        return
    kind, lacking = _lacking(held, rights())
    if lacking & there:
        yield Finding(
            check="missing-privilege",
            severity="warning",
            subject=f"role {role}",
            what=f"This role has most rights of a {kind}, and lacks others, so some of its calls fail. A new revision "
            "may have brought tables. Run the lines as the owner of the log.",
            cure="\n".join(
                grant_lines([right for right in _WANTED if right in lacking & there], schema=scene.schema, role=role)
            ),
        )


def _lacking(held: frozenset[Right], kinds: Mapping[str, frozenset[Right]]) -> tuple[str, frozenset[Right]]:
    """The kind of role that this one is but for some rights, and those rights; none when its kinds are complete.

    Kinds share rights. A kind counts only if the role has most of its rights, one of which neither its complete kinds
    nor the right to read all tables explains.
    """
    explained = _union(own for own in kinds.values() if own <= held)
    special = {
        right
        for right in held
        if right.privilege not in _READING and right not in explained and right.whole not in explained
    }
    shares = {kind: len(own & held) / len(own) for kind, own in kinds.items() if own & special}
    kind = max(shares, key=lambda kind: shares[kind], default="")
    if not kind or shares[kind] < _MOST:
        return "", frozenset()
    return kind, kinds[kind] - held


def _union(parts: Iterable[frozenset[Right]]) -> frozenset[Right]:
    return frozenset[Right]().union(*parts)


RIGHTS = Look(
    title="privileges of this role",
    statement=lambda statements: statements.doctor_sql.find_rights,
    fact=Held,
    checks=(check_rights,),
    arguments=wanted_rights,
)
