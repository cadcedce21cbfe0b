"""The options of `pgbackend serve`, as its command line and its environment give them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgbackend.embedded import server as embedded
from pgbackend.serve.config.load import load, load_file
from pgbackend.serve.config.models import Configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every option of `pgbackend serve`, checked by `pgbackend.cli.serve`."""

    dsn: str | None = None
    """The database. Without it the broker starts an embedded PostgreSQL."""
    listen_dsn: str | None = None
    schema: str = "pgbackend"
    data_dir: Path | None = None
    """The directory of the embedded PostgreSQL. Default: the user's data directory."""
    startup_timeout: float = 60.0
    """Seconds to wait for PostgreSQL at the start. 0: a single try."""
    config: Path | None = None
    config_inline: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    """0 picks a free port."""
    admin_port: int | None = None
    """A port for probes and metrics alone, without TLS; 0 picks a free one. Without it they are at `port`."""
    allowed_hosts: tuple[str, ...] = ()
    """Host headers to accept besides the broker's own names."""
    tls_cert: Path | None = None
    """The certificate chain. Without it the broker serves plain HTTP."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    deny_private_targets: bool = False
    max_hops: int = 255
    """How long a chain of replies may be."""
    workers: int = 1
    """Broker processes."""
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def configuration(self) -> Configuration:
        """The configuration that the file, or the inline text, contains now. Raises ConfigError."""
        if self.config is not None:
            return load_file(self.config)
        if self.config_inline is not None:
            return load(self.config_inline, origin="inline configuration")
        return Configuration()

    @property
    def embedded_directory(self) -> Path:
        """Where the embedded PostgreSQL keeps its data."""
        return self.data_dir or embedded.default_directory()

    @property
    def certificate_files(self) -> tuple[Path, ...]:
        """The files that TLS is made of."""
        return tuple(file for file in (self.tls_cert, self.tls_key, self.tls_client_ca) if file is not None)
