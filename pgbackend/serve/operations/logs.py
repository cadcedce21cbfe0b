"""Log lines on stderr: one JSON object a line, or lines for a person's terminal.

`configure` sets up logging once for each process; facts with their fields and the records of libraries look alike. The
promise: whatever an event, a client or a target says, it cannot break out of its record or control a terminal; no text
or list is longer than people read; credentials in URLs are not shown; a log that cannot be written stops nothing.
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
"""Characters of a stack trace. The last lines matter most, so the first ones are cut."""
_ITEMS = 20
"""Items shown of a list or mapping."""
_DEPTH = 4
"""Levels shown of nested lists and mappings."""
_LIBRARIES = logging.WARNING
"""Below this level, records of libraries help only their own developers."""


def configure(format: Literal["console", "json"], level: str) -> None:  # noqa: A002 - as the option is called
    """From now on, records at `level` or above go to stderr in this format. A second call replaces the first.

    `level` is debug, info, warning or error, else ValueError is raised. Libraries are shown from warning on.
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
    """Formats any record as one line; on the console, a traceback adds lines."""
    written: Processor = _as_json if format == "json" else _Console(colors=colors)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_describe], processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, written]
    )


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # of whatever sys.stderr is
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing: stderr is what failed, so there is no place to report it."""


class _Flood(logging.Filter):
    """Passes `_A_SECOND` records a second of each text, trigger and shard; the next one says how many it dropped.

    Otherwise a target that refuses every event would fill disks and keep the broker busy with logging.
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
            # Current texts stay, however many: hundreds of triggers can have more of them in one second.
            self._forgot_in = second
            self._seen = {key: seen for key, seen in self._seen.items() if seen[0] >= second - 1}
        self._seen[key] = (second, 1)
        if count > _A_SECOND:
            record.fields = {**fields, "not_shown": count - _A_SECOND}
        return True


_A_SECOND = 10
_TEXTS = 1000
"""Texts that are remembered. Facts have constant texts, but some libraries do not."""


def _describe(_logger: WrappedLogger, _method: str, entry: EventDict) -> EventDict:
    """A record as a flat dict: a fact by its constant text and its fields, others by their message."""
    record: logging.LogRecord = entry["_record"]
    described: EventDict = {
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
        described[f"{name}_" if name in described or name in _RESERVED else name] = value
    if record.exc_info and record.exc_info[1] is not None:
        described["exception"] = record.exc_info[1]
    if record.stack_info:
        described["stack"] = record.stack_info
    return {**described, "_record": record, "_from_structlog": False}


_RESERVED = frozenset({"exception", "stack", "_record", "_from_structlog"})


def _as_json(_logger: WrappedLogger, _method: str, entry: EventDict) -> str:
    """One line of ASCII: JSON's escapes cannot end the line or control a terminal."""
    error = entry.pop("exception", None)
    written = {name: _json(value) for name, value in entry.items()}
    if error is not None:
        written["exception"] = {
            "type": type(error).__qualname__,
            "message": _message(error),
            "stacktrace": _traceback(error),
        }
    if (stack := entry.get("stack")) is not None:
        written["stack"] = _end_of(_text(stack, most=None))
    return json.dumps(written)


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
        written = {_text(name): _json(one, depth - 1) for name, one in islice(value.items(), _ITEMS)}
        return written | {"…": f"{len(value)} items"} if len(value) > _ITEMS else written
    return _text(value)


_INTEGER_BITS = 128
"""Longer integers help no reader, and Python refuses to print thousands of digits."""


class _Console:
    """Writes lines for a person; ambiguous and unprintable text is quoted as in Python."""

    def __init__(self, *, colors: bool) -> None:
        self._render = structlog.dev.ConsoleRenderer(
            colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        )

    def __call__(self, logger: WrappedLogger, method: str, entry: EventDict) -> str:
        exception = entry.pop("exception", None)
        stack = entry.pop("stack", None)
        del entry["process"]
        if entry["logger"] == facts.logger.name:
            del entry["logger"]  # facts have telling texts
        # The renderer quotes values in which spaces would hide the end.
        shown_fields: EventDict = {name: _printable(_shown(value)) for name, value in entry.items()}
        line = str(self._render(logger, method, shown_fields))
        for block in (stack, None if exception is None else _traceback(exception)):
            if block is not None:
                text = _end_of(_text(block, most=None))
                line += "".join(f"\n    {_printable(one)}" for one in text.splitlines())
        return line


def _colourful() -> bool:
    # sys.stderr is None if the parent process closed it.
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
    """The text of any value: without credentials in URLs, and cut to `most` characters."""
    text = facts.text_of(value)
    # Before the text is cut: without its @, a password is not recognized.
    text = _CREDENTIALS.sub("://…@", text) if "@" in text else text
    return text if most is None else facts.cut(text, most)


# Up to the last @ before the path, because passwords may contain one.
_CREDENTIALS = re.compile(r"://[^\s/?#]*@")
