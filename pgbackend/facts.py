"""Facts: what happened, as a log record for people and a call for observers such as tests.

Every module calls `emit()` when something happens. The name of a fact is constant and its fields are data, so that logs
can be counted and tests can wait for a fact instead of sleeping. Facts are emitted once per batch or less often, never
per event. They cost almost nothing when their level is off and there is no observer.
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
"""The most characters of a text in a log line: texts of events, clients and targets have no limit."""

Observer = Callable[[str, Mapping[str, object]], None]

# Replaced, never changed: `emit()` runs in any thread and reads it without a lock.
_observers: tuple[Observer, ...] = ()


def emit(name: str, /, *, level: int = logging.INFO, exc_info: BaseException | None = None, **fields: object) -> None:
    """The fact is in the log as `name key=value …`, and every observer was called.

    The record has the attributes `fact` (the name) and `fields` for structured handlers. When a logging filter or
    handler raises, its error goes to stderr, as in logging, and this call returns. When an observer raises, this call
    raises, because observers belong to tests and metrics, which must notice.
    """
    if logger.isEnabledFor(level):
        # stacklevel 2: the record names the caller's line.
        extra = {"fact": name, "fields": fields}
        try:
            logger.log(level, name + "%s", _Fields(fields), exc_info=exc_info, stacklevel=2, extra=extra)  # noqa: G003 - a constant
        except Exception:  # noqa: BLE001 - logging itself catches only errors of its handlers' writing
            if logging.raiseExceptions and sys.stderr:
                traceback.print_exc()
    for observer in _observers:
        observer(name, fields)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Within the context, `observer(name, fields)` is called for each fact, in the thread that emits it."""
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
    """Keeps every fact that is emitted within its context.

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
        """The fields of all facts of this name so far whose fields include `match`, in order."""
        return self._matching(name, match)

    async def wait(self, name: str, timeout: float = 30.0, *, count: int = 1, **match: object) -> Mapping[str, object]:
        """The fields of fact number `count` of this name whose fields include `match`. At once if it has happened.

        Raises TimeoutError, which names the fact and lists the facts that happened.
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
    """The text of any object. Lists and mappings are cut to what people can read. Does not raise."""
    try:
        if isinstance(value, list | tuple | set | frozenset | dict):
            return _containers.repr(value)
        return f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    except Exception:  # noqa: BLE001 - a user's object may raise anything, and the record must be written
        return f"({type(value).__name__} that cannot be shown)"


def cut(text: str, most: int = TEXT) -> str:
    """The text. If it has more than `most` characters: its beginning, and how long it was.

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
    # Quoted when a person or a log shipper could not see where the value ends.
    return text if text and text.isprintable() and not set(text) & set(' "=') else repr(text)


def _includes(fields: Mapping[str, object], match: Mapping[str, object]) -> bool:
    return all(key in fields and fields[key] == value for key, value in match.items())
