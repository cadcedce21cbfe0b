"""Reads a configuration: from its text, or from its file, to a `Configuration` in which everything is resolved.

A configuration is used only when all of it is valid. Otherwise `load()` raises a ConfigError that lists every mistake,
each with file, line, path and what was expected. No message shows a secret.
"""

from collections.abc import Iterator
from pathlib import Path as FilePath

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pgbackend.errors import ConfigError
from pgbackend.serve.config.document import Document, Path
from pgbackend.serve.config.models import Configuration, UnknownKey
from pgbackend.serve.config.values import Surroundings, described

FILE_BYTES = 8 << 20
"""The largest file. Thousands of triggers fit; a larger file is a mistake, and YAML would take minutes to read it."""


def load(
    text: str, *, origin: str, directory: FilePath | None = None, files: set[FilePath] | None = None
) -> Configuration:
    """The configuration in `text`, which is YAML or JSON.

    `origin` names the text in messages. `{file: …}` secrets are relative to `directory`, and their paths are added to
    `files` whether or not they can be read. Raises ConfigError, whose `problems` are all mistakes in the text.
    """
    document = Document(text, origin=origin)
    if document.value is None and not document.mistakes:
        raise ConfigError(f"{origin}: is empty: expected a mapping with `triggers`.")
    mistakes = document.mistakes
    surroundings = Surroundings(directory or FilePath(), set() if files is None else files)
    try:
        configuration = Configuration.model_validate(document.value, context=surroundings)
    except ValidationError as error:
        for path, message in _problems(error):
            sentence = message if message.endswith("?") else f"{message}."
            mistakes.append((document.line(path), f"{document.where(path)}: {sentence}"))
    else:
        if not mistakes:
            return configuration
    # dict.fromkeys(): an alias repeats the mistakes of what it names.
    raise ConfigError(*dict.fromkeys(message for _, message in sorted(mistakes, key=lambda mistake: mistake[0])))


def load_file(path: FilePath, *, files: set[FilePath] | None = None) -> Configuration:
    """The configuration in the file at `path`, as `load()`. Raises ConfigError, also when it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise ConfigError(f"{path}: too large: expected at most {FILE_BYTES >> 20} MiB of YAML or JSON.")
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}: expected YAML or JSON text.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    return load(text, origin=str(path), directory=path.parent, files=files)


def can_be_read_once(path: FilePath) -> bool:
    """Whether the path is a pipe or the like. A second read of one blocks its thread for ever."""
    return path.exists() and not path.is_file()


def _problems(error: ValidationError) -> Iterator[tuple[Path, str]]:
    """Each mistake that pydantic found: its path and what is wrong there."""
    for details in error.errors(include_url=False):
        # pydantic marks a mistake in a key, not in its value, by this last step.
        path: Path = details["loc"][:-1] if details["loc"][-1:] == ("[key]",) else details["loc"]
        if (key := details.get("ctx", {}).get("key")) is not None:
            path = (*path, key)
        yield path, _message(details)


def _message(details: ErrorDetails) -> str:
    value = details["input"]
    match details["type"]:
        case "extra_forbidden" if isinstance(value, UnknownKey):
            return value.message
        case "list_type":
            return f"expected a list, found {described(value)}"
        case "dict_type":
            return f"expected a mapping, found {described(value)}"
        case "too_short":
            return f"expected at least one {'filter' if isinstance(value, list) else 'attribute'}"
        case "literal_error":
            return f"expected {details['ctx']['expected']}, found {described(value)}".replace("'", "")
        case _:
            return details["msg"]
