"""The names that `pgbackend` exports are public, and no others."""

import inspect
import types

import pgbackend
from pgbackend import errors

MODULES = ("doctor", "filters", "outbox", "schema")


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(pgbackend).items()
        if not name.startswith("_") and (not isinstance(value, types.ModuleType) or name in MODULES)
    }
    assert list(pgbackend.__all__) == sorted(pgbackend.__all__)
    assert set(pgbackend.__all__) == public


def test_every_error_can_be_caught_by_its_public_name() -> None:
    defined = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert defined <= set(pgbackend.__all__)


def test_every_public_class_and_method_says_what_it_is_for() -> None:
    classes = [value for name in pgbackend.__all__ if inspect.isclass(value := getattr(pgbackend, name))]
    silent = [kind.__name__ for kind in classes if not kind.__doc__]
    silent += [
        f"{kind.__name__}.{name}"
        for kind in classes
        for name, member in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property | classmethod))
        if not inspect.getdoc(member)
    ]
    assert silent == []


def test_the_backend_is_what_its_protocols_ask_for() -> None:
    backend: pgbackend.Interface = pgbackend.Backend("postgresql://nobody@localhost/nowhere")
    producer: pgbackend.EventProducer = backend
    subscribable: pgbackend.Subscribable = backend
    assert (id(producer), id(subscribable)) == (id(backend), id(backend))
