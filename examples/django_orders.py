"""Orders over HTTP, with Django: an order and its event are stored in one transaction.

PGBACKEND_DSN=postgresql://localhost/shop python examples/django_orders.py runserver --noreload
PGBACKEND_DSN=postgresql://localhost/shop python examples/django_orders.py consume   # beside it, as often as you like

curl localhost:8000/orders -d item=book -d quantity=2
curl localhost:8000/orders/1
"""

import asyncio
import os
import signal
import sys

import django
from cloudevents.core.v1.event import CloudEvent
from django.conf import settings
from django.core.management import execute_from_command_line
from django.db import close_old_connections, connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import path
from psycopg.conninfo import conninfo_to_dict

from pgbackend import Backend, Event, filters, outbox

# A project has all of this in files of its own: settings, models, views and a command of manage.py.
DSN = os.environ["PGBACKEND_DSN"]
parts = conninfo_to_dict(DSN)
settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    ROOT_URLCONF=__name__,
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": parts["dbname"],
            **{name.upper(): parts.get(name, "") for name in ("user", "password", "host", "port")},
        }
    },
)
django.setup()


class Order(models.Model):
    """An order of a customer."""

    item = models.CharField(max_length=100)
    quantity = models.PositiveIntegerField()
    status = models.CharField(max_length=20, default="placed")

    class Meta:
        """A project has an app for it."""

        app_label = "shop"

    def __str__(self) -> str:
        return f"{self.quantity} of {self.item}, {self.status}"


def place(request: HttpRequest) -> JsonResponse:
    """Store the order together with the event that says so."""
    with transaction.atomic():
        order = Order.objects.create(item=request.POST["item"], quantity=request.POST["quantity"])
        # Last, because others may wait for a transaction with an event in it.
        event = CloudEvent({"type": "order.placed", "source": "/orders", "subject": str(order.pk)}, {"order": order.pk})
        outbox.produce(connection, event)
    return JsonResponse({"order": order.pk}, status=201)


def show(_: HttpRequest, number: int) -> JsonResponse:
    """Say how far the order is."""
    order = get_object_or_404(Order, pk=number)
    return JsonResponse({"order": order.pk, "item": order.item, "quantity": order.quantity, "status": order.status})


urlpatterns = [path("orders", place), path("orders/<int:number>", show)]


def ship(event: Event) -> None:
    """Ship the order, in a thread. An event may come twice after a crash, so this does the same thing again."""
    close_old_connections()
    Order.objects.filter(pk=event.get_data()["order"]).update(status="shipped")


async def consume() -> None:
    """Handle events until a signal comes. Each of the four threads has a connection of Django's."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with Backend(DSN) as backend:
        await backend.subscribe("shipping", ship, filter=filters.Exact({"type": "order.placed"}), concurrency=4)
        print("Shipping orders.", flush=True)
        await stopping.wait()


async def migrate() -> None:
    """Create the log."""
    backend = Backend(DSN)
    await backend.init()
    await backend.stop()


def create_tables() -> None:
    """Create the table and the log, unless they exist. A project runs `manage.py migrate` and `pgbackend migrate`."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('shop'))")  # two processes may start at once
        if Order._meta.db_table not in connection.introspection.table_names():  # noqa: SLF001 - Django's own name for it
            with connection.schema_editor() as editor:
                editor.create_model(Order)
    connection.close()
    asyncio.run(migrate())


if __name__ == "__main__":
    create_tables()
    if sys.argv[1:] == ["consume"]:
        asyncio.run(consume())
    else:
        execute_from_command_line(sys.argv)
