"""Orders over HTTP, with FastAPI and SQLAlchemy: an order and its event are stored in one transaction.

PGBACKEND_DSN=postgresql://localhost/shop uvicorn --app-dir examples fastapi_orders:app

curl localhost:8000/orders -H 'content-type: application/json' -d '{"item": "book", "quantity": 2}'
curl localhost:8000/orders/1
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloudevents.core.v1.event import CloudEvent
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, PositiveInt
from sqlalchemy import make_url, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgbackend import Backend, Event, filters

DSN = os.environ["PGBACKEND_DSN"]

backend = Backend(DSN)
engine = create_async_engine(make_url(DSN).set(drivername="postgresql+asyncpg"))
new_session = async_sessionmaker(engine)


class Base(DeclarativeBase):
    """The application's tables."""


class Order(Base):
    """An order of a customer."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    quantity: Mapped[int]
    status: Mapped[str] = mapped_column(default="placed")


class Stock(Base):
    """How much of an item is left."""

    __tablename__ = "stock"

    item: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """The backend runs as long as the application."""
    async with engine.begin() as connection:  # an application has migrations for this
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Stock).values(item="book", left=100).on_conflict_do_nothing())
    async with backend:
        await backend.subscribe("shipping", ship, filter=filters.Exact({"type": "order.placed"}))
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


class NewOrder(BaseModel):
    """An order, as clients send it."""

    item: str
    quantity: PositiveInt


@app.post("/orders", status_code=201)
async def place(new: NewOrder) -> dict[str, int]:
    """Store the order together with the event that says so."""
    async with new_session.begin() as session:
        taken = await session.execute(
            update(Stock)
            .where(Stock.item == new.item, Stock.left >= new.quantity)
            .values(left=Stock.left - new.quantity)
            .returning(Stock.left)
        )
        if taken.first() is None:
            raise HTTPException(409, f"There is not enough of {new.item!r} left.")
        order = Order(item=new.item, quantity=new.quantity)
        session.add(order)
        await session.flush()  # gives the order its id
        # Last, because others may wait for a transaction with an event in it.
        event = CloudEvent({"type": "order.placed", "source": "/orders", "subject": str(order.id)}, {"order": order.id})
        await backend.produce(event, connection=session)
        return {"order": order.id}


@app.get("/orders/{number}")
async def show(number: int) -> dict[str, object]:
    """Say how far the order is."""
    async with new_session() as session:
        order = await session.get(Order, number)
    if order is None:
        raise HTTPException(404, "There is no such order.")
    return {"order": order.id, "item": order.item, "quantity": order.quantity, "status": order.status}


async def ship(event: Event) -> None:
    """Ship the order. An event may come twice after a crash, so this does the same thing again."""
    async with new_session.begin() as session:
        await session.execute(update(Order).where(Order.id == event.get_data()["order"]).values(status="shipped"))
