from collections.abc import Iterable

import pytest

from pgbackend import Retry
from pgbackend.codec.event import Event
from pgbackend.delivery.due import Due
from pgbackend.delivery.health import TargetHealth
from pgbackend.model import Failure
from tests.delivery.test_shard import make_shard
from tests.support.events import log_row

GIVEN_UP = Failure(error="no", attempts=1, details={})


def due() -> Due:
    shard = make_shard()
    shard.window.max_bytes = 1 << 30
    return Due(shard)


def begin(account: Due, positions: Iterable[int], failure: Failure | None = None) -> None:
    for position in positions:
        account.begin(Event(log_row(position), 1, failure))


def asked(account: Due, *, down: bool, dead_letters: bool = True) -> tuple[int, bool] | None:
    """The room that it has, and whether that is only for what was given up."""
    health = TargetHealth(Retry())
    health.down = down
    request = account.request(health, dead_letters=dead_letters)
    return None if request is None else (request.room, request.given_up)


def test_what_was_given_up_has_room_of_its_own_while_a_target_is_down() -> None:
    account = due()
    assert asked(account, down=True) == (20, False)
    begin(account, range(1, 201))
    assert asked(account, down=True) == (200, True)
    assert asked(account, down=True, dead_letters=False) is None
    begin(account, range(201, 401), GIVEN_UP)
    assert asked(account, down=True) is None


@pytest.mark.parametrize("down", [False, True])
def test_a_dead_letter_dispatcher_that_hangs_does_not_fill_memory(*, down: bool) -> None:
    account = due()
    for position in range(1, 1001):
        if asked(account, down=down) is None:
            break
        begin(account, [position], GIVEN_UP)
    assert len(account) == 400
