"""A configuration file that is in force, and what becomes of it when the file changes.

`ConfigurationFile.changes()` yields each valid configuration that differs from the one in force. The promise: an
invalid file changes nothing, and is reported once with all its mistakes.
"""

import logging
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from pathlib import Path

from pgbackend import facts
from pgbackend.errors import ConfigError
from pgbackend.serve.config import watch
from pgbackend.serve.config.load import load_file
from pgbackend.serve.config.models import Configuration


class ConfigurationFile:
    """The file at `path`, and `current`, the configuration in force."""

    def __init__(self, path: Path, current: Configuration) -> None:
        self.current = current
        self._path = path
        self._secrets: frozenset[Path] = frozenset()
        self._refused: str | None = None
        """The mistakes of the file, while it is invalid."""

    async def changes(self) -> AsyncGenerator[Configuration]:
        """Yield each configuration with something new, be it only a secret. Never ends: close it with `aclosing()`."""
        async with aclosing(watch.changes(self.read, self.files)) as reads:
            async for found in reads:
                if self.accept(found):
                    yield self.current

    def files(self) -> Collection[Path]:
        """The configuration file and the files of its secrets."""
        return (self._path, *self._secrets)

    def read(self) -> Configuration | ConfigError:
        """The configuration in the file, or its mistakes."""
        secrets: set[Path] = set()
        try:
            found: Configuration | ConfigError = load_file(self._path, files=secrets)
        except ConfigError as error:
            found = error
            # A mistake in YAML hides the secrets of the file, so keep watching those of the configuration in force.
            secrets |= self._secrets
        self._secrets = frozenset(secrets)
        return found

    def accept(self, found: Configuration | ConfigError) -> bool:
        """Whether this is a new configuration, which is `current` then. Mistakes are reported once."""
        if isinstance(found, ConfigError):
            if str(found) != self._refused:
                self._refused = str(found)
                facts.emit("configuration refused", level=logging.ERROR, file=str(self._path), error=str(found))
            return False
        was_refused, self._refused = self._refused is not None, None
        if found != self.current:
            self.current = found
            return True
        if was_refused:
            # Somebody has removed the mistakes, and the file says again what is in force.
            facts.emit("configuration reloaded", file=str(self._path))
        return False
