"""Where log lines go and what they look like: one JSON object a line, or a line for a person's terminal, on stderr.

Everything that is logged comes out alike, whoever logs it: facts with their fields, and the libraries' records. The
promise: whatever an event, a client or a target says, a record is one record (it cannot break out of its line, nor
paint a terminal), no text or list in it is longer than people read, credentials in URLs are not shown, and a log that
cannot be written stops nobody.
"""

import json
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from pgbackend import facts
from pgbackend.errors import shown

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_LINES = 16_000
"""Characters of a stack trace. Its last lines count most, so the first ones go."""
_ITEMS = 20
"""Items of a list or mapping."""
_DEPTH = 4
"""Lists and mappings within one another."""
_LIBRARIES = logging.WARNING
"""What libraries have to say below this level is of use to their own developers."""


def configure(format: Literal["console", "json"], level: str) -> None:  # noqa: A002 - as the option is called
    """What is logged from now on, at `level` or above, goes to stderr in this format. Again, it starts anew.

    `level` is debug, info, warning or error; of libraries only warnings and worse are shown. Raises ValueError for
    another one.
    """
    number = _LEVELS.get(level)
    if number is None:
        raise ValueError(f"The log level is {level!r}: expected debug, info, warning or error.")
    handler = _Handler(sys.stderr)
    handler.setFormatter(formatter(format, colors=_colourful()))
    if number > logging.DEBUG:
        handler.addFilter(_Flood())
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[handler], level=max(number, _LIBRARIES), force=True)
    facts.logger.setLevel(number)


def formatter(format: Literal["console", "json"], *, colors: bool = False) -> logging.Formatter:  # noqa: A002 - as above
    """Makes a line of any record, or, on the console, several when there is a traceback."""
    written: Processor = _as_json if format == "json" else _Console(colors=colors)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_describe], processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, written]
    )


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # of whatever sys.stderr is
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Nowhere to say it: stderr is what failed. The broker goes on."""


class _Flood(logging.Filter):
    """Of each text lets `_A_SECOND` through, for each trigger and shard; the next one says how many were kept back.

    A target that refuses every event would otherwise fill disks, and keep the broker busy with telling so.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[object, ...], tuple[int, int]] = {}
        self._forgot_in = -1

    def filter(self, record: logging.LogRecord) -> bool:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        about = (fields.get(name) for name in ("subscription", "trigger", "shard"))
        key = (record.name, facts.cut(str(record.msg)), *about)
        second = int(record.created)
        before, count = self._seen.get(key, (-1, 0))
        if before == second:
            self._seen[key] = (second, count + 1)
            return count < _A_SECOND
        if len(self._seen) > _TEXTS and self._forgot_in != second:
            # Not those of now, however many: with hundreds of triggers there are more than that in a bad second.
            self._forgot_in = second
            self._seen = {key: seen for key, seen in self._seen.items() if seen[0] >= second - 1}
        self._seen[key] = (second, 1)
        if count > _A_SECOND:
            record.fields = {**fields, "not_shown": count - _A_SECOND}
        return True


_A_SECOND = 10
_TEXTS = 1000
"""Texts that are remembered longer than for some seconds: facts have constant ones, but not every library."""


def _describe(_logger: WrappedLogger, _method: str, entry: EventDict) -> EventDict:
    """What a record says, as a flat dict: a fact by its constant text and its fields, others by their message."""
    record: logging.LogRecord = entry["_record"]
    said: EventDict = {
        "timestamp": datetime.fromtimestamp(record.created, UTC)
        .isoformat(timespec="microseconds")
        .replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": getattr(record, "fact", None) or entry["event"],
        "logger": record.name,
        "process": record.process,
    }
    fields: Mapping[str, object] = getattr(record, "fields", {})
    for name, value in fields.items():
        said[f"{name}_" if name in said or name in _RESERVED else name] = value
    if record.exc_info and record.exc_info[1] is not None:
        said["exception"] = record.exc_info[1]
    if record.stack_info:
        said["stack"] = record.stack_info
    return {**said, "_record": record, "_from_structlog": False}


_RESERVED = frozenset({"exception", "stack", "_record", "_from_structlog"})


def _as_json(_logger: WrappedLogger, _method: str, entry: EventDict) -> str:
    """One line of ASCII: JSON's escapes leave no way to end it, or to reach a terminal."""
    error = entry.pop("exception", None)
    said = {name: _json(value) for name, value in entry.items()}
    if error is not None:
        said["exception"] = {
            "type": type(error).__qualname__,
            "message": _message(error),
            "stacktrace": _traceback(error),
        }
    if (stack := entry.get("stack")) is not None:
        said["stack"] = _end_of(_text(stack, most=None))
    return json.dumps(said)


def _json(value: object, depth: int = _DEPTH) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _INTEGER_BITS else _text(shown(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple | set | frozenset) and depth:
        rest = [f"… ({len(value)} items)"] if len(value) > _ITEMS else []
        return [_json(one, depth - 1) for one in islice(value, _ITEMS)] + rest
    if isinstance(value, Mapping) and depth:
        said = {_text(name): _json(one, depth - 1) for name, one in islice(value.items(), _ITEMS)}
        return said | {"…": f"{len(value)} items"} if len(value) > _ITEMS else said
    return _text(value)


_INTEGER_BITS = 128
"""Longer integers are no use to a reader, and Python prints none of thousands of digits."""


class _Console:
    """A line for a person; what would be ambiguous or unprintable in it is quoted as Python does."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(
            colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )

    def __call__(self, logger: WrappedLogger, method: str, entry: EventDict) -> str:
        exception = entry.pop("exception", None)
        stack = entry.pop("stack", None)
        del entry["process"]
        if entry["logger"] == facts.logger.name:
            del entry["logger"]  # its text says enough
        # What is left for the renderer to do is quoting where spaces would hide a value's end.
        said: EventDict = {name: _printable(_shown(value)) for name, value in entry.items()}
        line = str(self._render(logger, method, said))
        for block in (stack, None if exception is None else _traceback(exception)):
            if block is not None:
                text = _end_of(_text(block, most=None))
                line += "".join(f"\n    {_printable(one)}" for one in text.splitlines())
        return line


def _colourful() -> bool:
    # There is no stderr where the one who started us has closed it.
    return sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _traceback(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return _end_of("\n".join(_text(line) for line in lines))


def _message(error: BaseException) -> str:
    return _text(facts.text_of(error).removeprefix(f"{type(error).__name__}: "))


def _end_of(text: str) -> str:
    return text if len(text) <= _LINES else f"({len(text)} characters) …{text[-_LINES:]}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _text(value)


def _text(value: object, most: int | None = facts.TEXT) -> str:
    """The text of anything, without the credentials of the URLs in it; of a longer one the first `most` characters."""
    text = facts.text_of(value)
    # Before it is cut: without its @ nobody could tell what is a password.
    text = _CREDENTIALS.sub("://…@", text) if "@" in text else text
    return text if most is None else facts.cut(text, most)


# Up to the last @ before the path: passwords hold that sign, too.
_CREDENTIALS = re.compile(r"://[^\s/?#]*@")
