"""How many connections the broker may have."""

import resource

import pytest

from pgbackend.serve.ingest.limits import allow_many_connections


def test_a_system_that_refuses_many_files_gives_as_many_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS does, whose hard limit says otherwise."""
    limit = [256, resource.RLIM_INFINITY]

    def set_limit(_: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > 10_240:
            raise ValueError("current limit exceeds maximum limit")
        limit[:] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    allow_many_connections()
    assert limit == [10_240, resource.RLIM_INFINITY]
