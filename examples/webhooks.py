r"""Webhooks behind `pgbackend serve`: one fails at first, one refuses some events, and neither disturbs the other.

python examples/webhooks.py --port 8888 -- pgbackend serve --config examples/webhooks.yaml

for n in 1 2 3; do
    curl localhost:8080 -H 'ce-specversion: 1.0' -H "ce-id: $n" -H 'ce-source: /shop' -H 'ce-type: order.placed' \
         -H 'ce-cents: 25000' -H 'content-type: application/json' -d "{\"order\": $n}"
done

A webhook answers 2xx for an event that it has handled, 503 for one that is to come again, and 422 for one that it will
never take. It may get an event twice: `source` and `id` together say that it is the same one.
"""

import sys
from collections import Counter

import receiver
from receiver import Arrival

tries: Counter[tuple[str, str, str]] = Counter()


def answer(arrival: Arrival) -> int:
    """Print the event and the status that the webhook at this path answers."""
    tries[arrival.path, arrival.source, arrival.id] += 1
    status = {"/billing": bill, "/sales": sell}.get(arrival.path, take)(arrival)
    print(f"{status} {arrival}", flush=True)
    return status


def bill(arrival: Arrival) -> int:
    """Fail: twice for most events, each time for the order 2."""
    if arrival.id == "2" or tries[arrival.path, arrival.source, arrival.id] <= 2:
        return 503
    return 204


def sell(arrival: Arrival) -> int:
    """Refuse the order 3."""
    return 422 if arrival.id == "3" else 204


def take(_: Arrival) -> int:
    """Take everything."""
    return 204


if __name__ == "__main__":
    sys.exit(receiver.main(answer))
