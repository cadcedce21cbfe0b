"""Arguments are checked before anything is stored."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import pytest

from pgbackend import Backend, ConfigError, Event
from pgbackend.arguments import check_letters, checked_definition, checked_handling, checked_terms
from pgbackend.errors import shown
from pgbackend.subscriptions.places import checked_place
from tests.support.handling import make_handling

NAIVE = datetime(2026, 1, 1)  # noqa: DTZ001 - the point


def shown_ids(option: dict[str, Any]) -> str:
    """Without addresses, so that every test process names the test alike."""
    return ascii({name: getattr(value, "__name__", shown(value)) for name, value in option.items()})


def generate(event: Event) -> Iterator[None]:
    yield


async def generate_async(event: Event) -> AsyncIterator[None]:
    yield


class Generator:
    def __call__(self, _event: Event) -> Iterator[None]:
        yield

    async def generate(self, _event: Event) -> AsyncIterator[None]:
        yield


class AsyncFilter:
    async def __call__(self, _event: Event) -> bool:
        return True


@pytest.mark.parametrize(
    "option",
    [
        {"name": ""}, {"name": "a\0b"}, {"name": 7}, {"name": "lone \ud800"}, {"name": "ä" * 513}, {"order": "fifo"},
        {"shards": 0}, {"shards": 2.0}, {"shards": 1025}, {"order": "strict", "shards": 2},
        {"end": 0}, {"end": "latest"}, {"end": NAIVE},
    ],
    ids=shown_ids,
)  # fmt: skip
def test_a_definition_out_of_its_bounds_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        checked_definition(**{"name": "s", "order": "none", "shards": 1, "end": None, **option})


@pytest.mark.parametrize("start", ["now", True, -1, NAIVE], ids=str)
def test_a_start_that_is_no_place_is_refused(start: Any) -> None:
    with pytest.raises(ConfigError, match="start of 's'"):
        checked_place(start, "start of 's'")
    with pytest.raises(ConfigError, match="start of 's'"):
        checked_terms("s", order="none", end=None, start=start)


def dispatching(**options: Any) -> None:
    checked_handling("s", make_handling(**options))


@pytest.mark.parametrize(
    "option",
    [
        {"dispatcher": None}, {"concurrency": 0}, {"concurrency": 10_001}, {"concurrency": 10**5000}, {"retry": 5},
        {"dead_letter": "nobody"}, {"filter": "type = 'a'"},
    ],
    ids=shown_ids,
)  # fmt: skip
def test_an_option_out_of_its_bounds_is_refused(option: dict[str, Any]) -> None:
    dispatching()
    with pytest.raises(ConfigError):
        dispatching(**option)


@pytest.mark.parametrize(
    ("option", "function"),
    [
        ("dispatcher", generate), ("dispatcher", generate_async), ("dispatcher", partial(partial(generate))),
        ("dispatcher", Generator()), ("dispatcher", partial(Generator())), ("dispatcher", Generator().generate),
        ("dead_letter", generate), ("dead_letter", Generator().generate),
        ("filter", AsyncFilter()), ("filter", partial(partial(asyncio.sleep), 1)), ("filter", asyncio.sleep),
        ("filter", AsyncFilter().__call__), ("filter", generate), ("filter", generate_async),
    ],
    ids=[*"abcdefghijklmn"],
)  # fmt: skip
def test_a_function_whose_call_runs_nothing_is_refused(option: str, function: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} of 's'"):
        dispatching(**{option: function})


@pytest.mark.parametrize("ids", [(), (0,), (True,), ("1",), (1, 2**63)], ids=str)
def test_something_that_is_no_dead_letter_is_refused(ids: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        check_letters(ids, None, None)


async def test_a_refused_call_stores_nothing(backend: Backend) -> None:
    refused: tuple[dict[str, Any], ...] = (
        {"order": "fifo"}, {"start": "now"}, {"end": 0}, {"concurrency": 0}, {"filter": generate},
    )  # fmt: skip
    for options in refused:
        with pytest.raises(ConfigError):
            await backend.subscribe("s", print, **options)
    assert (await backend.status()).subscriptions == ()

    await backend.subscribe("s", print)
    with pytest.raises(ConfigError):
        await backend.reconfigure("s", generate)
    with pytest.raises(ConfigError):
        await backend.alter_subscription("s", order="key", end=0, start="latest")
    with pytest.raises(ConfigError):
        await backend.reshard("s", 0)
    (status,) = (await backend.status()).subscriptions
    assert (status.order, len(status.shards)) == ("none", 1)
