from collections.abc import Iterator, Mapping
from types import MappingProxyType

import pytest

from pgbackend.thrown import Thrown, describe


class Rude(Exception):  # noqa: N818 - as users name them
    def __str__(self) -> str:
        raise ValueError("no text for you")

    @property
    def details(self) -> Mapping[str, str]:
        raise ValueError("nor details")


class Detailed(Exception):  # noqa: N818 - as users name them
    def __init__(self, details: object) -> None:
        super().__init__("no")
        self.details = details


class Endless(Mapping[str, str]):
    def __getitem__(self, key: str) -> str:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("changed while it was read")

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("no"), "RuntimeError: no"),
        (RuntimeError("nul \0 and a lone \ud800"), "RuntimeError: nul \\0 and a lone \\ud800"),
        (Rude(), "Rude: (its message cannot be read)"),
    ],
)
def test_an_exception_is_described_by_its_type_and_message(error: Exception, text: str) -> None:
    assert describe(error) == text


def test_a_long_message_is_cut() -> None:
    assert len(describe(RuntimeError("x" * 100_000))) == 2000


@pytest.mark.parametrize(
    ("error", "details"),
    [
        (RuntimeError("no"), {}),
        (Detailed({"status": 503}), {"status": "503"}),
        (Detailed(MappingProxyType({1: "a\0b"})), {"1": "a\\0b"}),
        (Detailed(["status"]), {}),
        (Detailed(Endless()), {}),
        (Rude(), {}),
    ],
)
def test_details_are_kept_as_text_when_they_are_a_mapping(error: Exception, details: dict[str, str]) -> None:
    assert Thrown.of(error).details == details
