"""The error tree as drawn is the error tree as it is."""

import inspect
import re
from collections.abc import Iterator

from pgbackend import errors


def _drawn() -> Iterator[tuple[str, str, str]]:
    """(name, parent, further base) of each line of the drawing."""
    path: list[str] = []
    for line in inspect.cleandoc(errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ((?:[│ ]   )*(?:[├└]── )?)(\w+)(?: \((\w+)\))?", line)
        if match:
            branch, name, other = match.groups()
            depth = len(branch) // 4
            path[depth:] = [name]
            yield name, path[depth - 1] if depth else "Exception", other or ""


def _defined() -> Iterator[tuple[str, str, str]]:
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.PgBackendError):
            parent, *others = [base.__name__ for base in kind.__bases__]
            yield name, parent, others[0] if others else ""


def test_drawing_equals_classes() -> None:
    assert list(_drawn()) == list(_defined())


def test_signals_are_not_errors() -> None:
    assert not issubclass(errors.Reject, errors.PgBackendError)
    assert not issubclass(errors.RetryAfter, errors.PgBackendError)
