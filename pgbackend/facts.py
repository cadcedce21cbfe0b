"""What happened, said once: a log record for people, a call for observers such as tests.

Every module that has something to tell calls `emit()`. The text of a fact is constant and its fields are data, so that
logs can be counted and tests can wait for what happened instead of sleeping. A fact is told per batch or rarer, never
per event, and costs next to nothing when its level is off and nobody observes.
"""

import asyncio
import logging
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self

logger = logging.getLogger("pgbackend")

TEXT = 1000
"""Characters that a text may have in a log line: what events, clients and targets say has no end of its own."""

Observer = Callable[[str, Mapping[str, object]], None]

# Replaced, never changed: `emit()` runs in any thread and reads it without a lock.
_observers: tuple[Observer, ...] = ()


def emit(name: str, /, *, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: object) -> None:
    """The fact is logged as `name key=value …` and every observer has been told.

    The record carries `fact` (the name) and `fields` for structured handlers. A logging filter or handler that raises
    is shown on stderr, as logging does it, and harms nothing else. An observer that raises makes this call raise:
    observers belong to tests and metrics, which want to know.
    """
    if logger.isEnabledFor(level):
        # stacklevel 2: the line that saw it happen, not this one.
        extra = {"fact": name, "fields": fields}
        try:
            logger.log(level, name + "%s", _Fields(fields), exc_info=exc_info, stacklevel=2, extra=extra)  # noqa: G003 - a constant
        except Exception:  # noqa: BLE001 - logging guards only what its own handlers write
            if logging.raiseExceptions and sys.stderr:
                traceback.print_exc()
    for observer in _observers:
        observer(name, fields)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """While it is open, `observer(name, fields)` is called for each fact, in the thread that emits it."""
    global _observers  # noqa: PLW0603 - process-wide by nature, like logging
    _observers = (*_observers, observer)
    try:
        yield
    finally:
        remaining = list(_observers)
        remaining.remove(observer)
        _observers = tuple(remaining)


class Fact(NamedTuple):
    """One thing that happened."""

    name: str
    fields: Mapping[str, object]


class Recorder:
    """Keeps every fact since it was entered.

    >>> with Recorder() as recorder:
    ...     emit("lease claimed", level=logging.DEBUG, shard=3)
    >>> recorder.all("lease claimed")
    [{'shard': 3}]
    """

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._observing = observe(self._keep)

    def __enter__(self) -> Self:
        self._observing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._observing.__exit__(kind, error, traceback)

    def all(self, name: str, **match: object) -> list[Mapping[str, object]]:
        """The fields of the facts of that name so far which include `match`, in order."""
        return self._matching(name, match)

    async def wait(self, name: str, timeout: float = 30.0, *, count: int = 1, **match: object) -> Mapping[str, object]:
        """The fields of fact number `count` of that name which includes `match`; at once when it has happened.

        Raises TimeoutError that names what was waited for.
        """
        happened = asyncio.Event()
        waiting = (asyncio.get_running_loop(), happened)
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(timeout):
                while len(found := self._matching(name, match)) < count:
                    await happened.wait()
                    happened.clear()
        except TimeoutError:
            heard = ", ".join(sorted({fact.name for fact in self.facts})) or "nothing"
            raise TimeoutError(
                f"{len(self._matching(name, match))} of {count} facts {name!r}{_Fields(match)} within {timeout} s; "
                f"heard: {heard}"
            ) from None
        finally:
            self._waiting.remove(waiting)
        return found[count - 1]

    def _matching(self, name: str, match: Mapping[str, object]) -> list[Mapping[str, object]]:
        return [fact.fields for fact in list(self.facts) if fact.name == name and _includes(fact.fields, match)]

    def _keep(self, name: str, fields: Mapping[str, object]) -> None:
        self.facts.append(Fact(name, fields))
        for loop, happened in list(self._waiting):
            loop.call_soon_threadsafe(happened.set)


_containers = reprlib.Repr()
_containers.maxlevel = 4
_containers.maxlist = _containers.maxtuple = _containers.maxset = _containers.maxfrozenset = _containers.maxdict = 20
_containers.maxstring = _containers.maxother = TEXT


def text_of(value: object) -> str:
    """The text of anything: of a list or mapping no more than people read, whatever is in it. Does not raise."""
    try:
        if isinstance(value, list | tuple | set | frozenset | dict):
            return _containers.repr(value)
        return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    except Exception:  # noqa: BLE001 - a user's object may fail at that, and its record is to be written all the same
        return f"({type(value).__name__} that cannot be shown)"


def cut(text: str, most: int = TEXT) -> str:
    """The text, or its beginning and how long it was.

    >>> cut("long text", 4)
    'long… (9 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


class _Fields:
    """` key=value …`, rendered only when a handler writes the record."""

    __slots__ = ("fields",)

    def __init__(self, fields: Mapping[str, object]) -> None:
        self.fields = fields

    def __str__(self) -> str:
        return "".join(f" {key}={_render(value)}" for key, value in self.fields.items())


def _render(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = cut(text_of(value))
    # Quoted when a reader, or a log shipper, could not tell where the value ends.
    return text if text and text.isprintable() and not set(text) & set(' "=') else repr(text)


def _includes(fields: Mapping[str, object], match: Mapping[str, object]) -> bool:
    return all(key in fields and fields[key] == value for key, value in match.items())
