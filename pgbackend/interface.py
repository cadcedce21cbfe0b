"""TriggerMesh's interface of a broker's backend, as protocols. `Backend` implements all of them."""

from typing import TYPE_CHECKING, Protocol

from pgbackend.model import ConsumerDispatcher, Info

if TYPE_CHECKING:
    from cloudevents.core.base import BaseCloudEvent


class EventProducer(Protocol):
    """TriggerMesh's `backend.EventProducer`: takes events in."""

    async def produce(self, event: "BaseCloudEvent") -> None:
        """Return once the event is durable. Raises when it is not stored, or when nobody knows."""
        ...


class Subscribable(Protocol):
    """TriggerMesh's `backend.Subscribable`: hands events out."""

    async def subscribe(self, name: str, dispatcher: ConsumerDispatcher) -> None:
        """Return once every event produced from now on is sure to be dispatched to the subscription."""
        ...

    async def unsubscribe(self, name: str) -> None:
        """Return once nothing of the subscription is in flight and its offset is committed."""
        ...


class Interface(EventProducer, Subscribable, Protocol):
    """TriggerMesh's `backend.Interface`."""

    def info(self) -> Info:
        """Name, version, schema and server. Known before `init()`."""
        ...

    async def init(self) -> None:
        """Return once the backend can be used."""
        ...

    async def start(self) -> None:
        """Dispatch events until stopped or cancelled."""
        ...

    async def probe(self) -> None:
        """Return when the backend works. Raises what is wrong."""
        ...
