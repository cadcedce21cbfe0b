"""The ledger finds what was lost, doubled and reordered."""

from pathlib import Path

from tests.support.ledger import Handling, Ledger


def _handling(id_: str, position: int, key: str | None = None) -> Handling:
    return Handling(id_, position, 1, key, 0)


def test_order_counts_first_handlings_only(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for id_, position in (("a", 1), ("b", 2), ("a", 1), ("c", 3)):
        ledger.note(_handling(id_, position))
    assert ledger.reordered() == []
    ledger.note(_handling("e", 5))
    ledger.note(_handling("d", 4))
    assert [(first.id, second.id) for first, second in ledger.reordered()] == [("e", "d")]


def test_order_within_keys_lets_other_keys_pass(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for id_, position, key in (("a", 7, "x"), ("b", 1, "y"), ("c", 4, None), ("d", 3, None)):
        ledger.note(_handling(id_, position, key))
    assert ledger.reordered(by_key=True) == []
    ledger.note(_handling("e", 5, "y"))
    ledger.note(_handling("f", 6, "x"))
    assert [(first.id, second.id) for first, second in ledger.reordered(by_key=True)] == [("a", "f")]


def test_a_line_cut_off_by_a_kill_is_no_handling(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", produced=["a", "b"])
    ledger.note(_handling("a", 1))
    with ledger.path.open("a") as file:
        file.write('["b", 2')
    assert ledger.lost() == ["b"]
