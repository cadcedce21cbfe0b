"""The console as the broker has it: at `/console` on the port for events, as its section of the configuration says.

`ingest.handler` hands over each request whose path is here, before anything else looks at it: such a request is never
an event. The promise: without credentials of its own the console is open only if the port is at a loopback address,
the senders need no credentials, and the request comes from this machine. Credentials of `ingest` do not open it.
"""

from pgbackend.backend import Backend
from pgbackend.console.access import Access, Basic, Closed, Local, is_loopback
from pgbackend.console.application import Console
from pgbackend.serve.config.models import Configuration
from pgbackend.serve.ingest.protocol import CONSOLE
from pgbackend.serve.ingest.responses import Message, Receive, Send

_CURE = "Add `user` and `password` in the `console` section of the broker's configuration."


class BrokerConsole:
    """The console of one broker process, whose port for events is at the address `bound`."""

    def __init__(self, backend: Backend, configuration: Configuration, *, bound: str) -> None:
        self._bound = bound
        self._console = Console(backend, access=Closed(_CURE), actions=False)
        self.configure(configuration)

    def configure(self, configuration: Configuration) -> None:
        """From the next request on, this configuration says who may look, and what the console can do."""
        self._is_enabled = configuration.console.enabled
        self._console.configure(
            access=access_of(configuration, bound=self._bound), actions=configuration.console.actions
        )

    def has(self, path: bytes) -> bool:
        """Whether a request with this path is for the console."""
        return self._is_enabled and (path == CONSOLE or path.startswith(CONSOLE + b"/"))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """The request is answered."""
        await self._console({**scope, "root_path": CONSOLE.decode()}, receive, send)


def access_of(configuration: Configuration, *, bound: str) -> Access:
    """The rule that says who may look into the console of a broker at the address `bound`."""
    section = configuration.console
    if section.user is not None and section.password is not None:
        return Basic(section.user.get_secret_value(), section.password.get_secret_value())
    if (reason := closed_because(configuration, bound=bound)) is not None:
        return Closed(f"The console is closed: {reason}. {_CURE}")
    return Local(_CURE)


def closed_because(configuration: Configuration, *, bound: str) -> str | None:
    """Why nobody may look without credentials of the console; None if this machine may."""
    if not is_loopback(bound):
        return "the broker can be reached from other machines"
    if configuration.ingest.user is not None or configuration.ingest.token is not None:
        return "senders need credentials, and those of senders do not open it"
    return None
