"""What `pgbackend` exports, and nothing else, is public."""

import inspect
import types

import pgbackend
from pgbackend import errors


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(pgbackend).items()
        if not name.startswith("_") and (not isinstance(value, types.ModuleType) or name == "filters")
    }
    assert list(pgbackend.__all__) == sorted(pgbackend.__all__)
    assert set(pgbackend.__all__) == public


def test_every_error_can_be_caught_by_its_public_name() -> None:
    defined = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
    assert defined <= set(pgbackend.__all__)


def test_every_public_class_and_function_says_what_it_is_for() -> None:
    silent = [
        name
        for name in pgbackend.__all__
        if (inspect.isclass(value := getattr(pgbackend, name)) or inspect.isfunction(value)) and not value.__doc__
    ]
    assert silent == []


def test_the_backend_is_what_its_protocols_ask_for() -> None:
    backend: pgbackend.Interface = pgbackend.Backend("postgresql://nobody@localhost/nowhere")
    producer: pgbackend.EventProducer = backend
    subscribable: pgbackend.Subscribable = backend
    assert producer is subscribable
