"""Puts the configuration and the certificates in force again, when their files change or a signal asks for it."""

import asyncio
import logging
from contextlib import aclosing
from pathlib import Path

from pgbackend import facts
from pgbackend.backend import Backend
from pgbackend.errors import ConfigError, PgBackendError
from pgbackend.serve.config import watch
from pgbackend.serve.config.load import can_be_read_once
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.config.reload import ConfigurationFile
from pgbackend.serve.console import BrokerConsole
from pgbackend.serve.egress.triggers import Triggers
from pgbackend.serve.ingest.handler import Ingest
from pgbackend.serve.ingest.tls import TLS
from pgbackend.serve.options import Options
from pgbackend.serve.retaining import retain


class Reloader:
    """Keeps triggers, ingest, the console, retention and TLS as their files say."""

    def __init__(
        self,
        options: Options,
        backend: Backend,
        triggers: Triggers,
        ingest: Ingest,
        console: BrokerConsole,
        tls: TLS | None,
        *,
        certificates: watch.Digests,
    ) -> None:
        """`certificates`: the digests of the certificate files before `tls` read them."""
        self._options = options
        self._backend = backend
        self._triggers = triggers
        self._ingest = ingest
        self._console = console
        self._tls = tls
        self._certificates = certificates
        config = options.config
        self._file = None if config is None or can_be_read_once(config) else config

    async def run(self, reload: asyncio.Event) -> None:
        """Work until cancelled. When `reload` is set, read everything at once, whether or not it has changed."""
        async with asyncio.TaskGroup() as tasks:
            if self._file is not None:
                tasks.create_task(self._follow_configuration(self._file), name="follow the configuration")
            if self._tls is not None:
                tasks.create_task(self._follow_certificates(self._tls), name="follow the certificates")
            while True:
                await reload.wait()
                reload.clear()
                await self._read_again()

    async def _follow_configuration(self, path: Path) -> None:
        file = ConfigurationFile(path, self._triggers.configuration)
        async with aclosing(file.changes()) as configurations:
            async for configuration in configurations:
                await self._put_in_force(configuration)

    async def _follow_certificates(self, tls: TLS) -> None:
        def files() -> tuple[Path, ...]:
            return self._options.certificate_files

        async with aclosing(watch.changes(lambda: None, files, known=self._certificates)) as changes:
            async for _ in changes:
                tls.reload()

    async def _read_again(self) -> None:
        if self._tls is not None:
            self._tls.reload()
        if self._options.config is not None and self._file is None:
            return  # a pipe
        try:
            # Not in a thread: an older version must not come into force after one that the watch finds meanwhile.
            configuration = self._options.configuration()
        except ConfigError as error:
            facts.emit("configuration refused", level=logging.ERROR, file=str(self._options.config), error=str(error))
        else:
            await self._put_in_force(configuration)

    async def _put_in_force(self, configuration: Configuration) -> None:
        # At once, because a trigger may take long to follow: a token that was revoked must not stay valid.
        self._ingest.authorize_by(configuration.ingest)
        self._console.configure(configuration)
        if configuration.deduplicate is not None:
            try:
                await self._backend.set_deduplication(configuration.deduplicate)
            except PgBackendError as error:
                facts.emit("deduplication window not changed", level=logging.ERROR, error=str(error))
        await self._triggers.apply(configuration)
        await retain(self._backend, configuration)
        facts.emit("configuration reloaded", file=str(self._options.config))
