"""Whether the log can be worked with at all: its revision, the assumptions of the fence, the stored offsets.

`Backend.init()` decides by the same functions. These checks only put their words into findings.
"""

from collections.abc import Iterator, Sequence

from pgbackend.doctor.finding import Finding
from pgbackend.doctor.look import Scene
from pgbackend.errors import SchemaError
from pgbackend.log.requirements import Fault
from pgbackend.postgres import schema as revisions
from pgbackend.subscriptions.overview import Mistrust


def check_revision(found: str | None, scene: Scene) -> Iterator[Finding]:
    """Whether the log is at the revision that this version works with."""
    try:
        revisions.check(found, scene.schema)
    except SchemaError as error:
        can_migrate = found is None or found in revisions.revisions()
        yield Finding(
            check="revision",
            severity="error",
            subject=f"schema {scene.schema}",
            what=str(error),
            cure=scene.command("migrate") if can_migrate else None,
        )


def check_fence(faults: Sequence[Fault], scene: Scene) -> Iterator[Finding]:
    """Whether readers could miss events."""
    for fault in faults:
        yield Finding(
            check="fence",
            severity="error",
            subject=f"schema {scene.schema}",
            what=f"Readers could miss events, so `init()` refuses this log: {fault.text}",
            cure=fault.cure,
        )


def check_offsets(mistrust: Mistrust | None, scene: Scene) -> Iterator[Finding]:
    """Whether the stored offsets can be trusted."""
    if mistrust is not None:
        yield Finding(
            check="log-set-back",
            severity="error",
            subject=f"schema {scene.schema}",
            what=mistrust.text,
            cure=mistrust.cure,
            destroys="the places that the subscriptions had reached" if mistrust.moves_offsets else None,
        )
