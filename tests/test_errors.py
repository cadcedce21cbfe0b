"""The errors' tree, as drawn in the docstring, and their pickling."""

import copy
import inspect
import pickle
import re
from collections.abc import Iterator

import pytest

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


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError("one", "two"),
        errors.DatabaseError("refused", sqlstate="42501"),
        errors.SchemaError("behind", found="0001", expected="0002"),
        errors.SubscriptionBusyError("busy", workers=["a:1"]),
        errors.ProbeError("broken", checks={"log": "broken"}),
        errors.Reject("never", details={"code": "404"}),
        errors.RetryAfter("closed", delay=60, details={"code": "503"}),
        errors.Pause("gone", details={"code": "410"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled_and_copied(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301 - our own
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__
