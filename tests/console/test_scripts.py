"""The console's pure modules, in Node.js: how data is laid out, how the live tail is put together."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgbackend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("node") is None, reason="node not found: install it (Debian: apt-get install nodejs)"
    ),
]

STATIC = Path(pgbackend.__file__).parent / "console" / "static"
NUMBER = "12345678901234567890.10"


def run(module: str, expression: str, given: object) -> Any:
    """The value of an expression in which `m` is the module and `given` a value."""
    url = "data:text/javascript;base64," + base64.b64encode((STATIC / module).read_bytes()).decode()
    script = f"""
        import * as m from {json.dumps(url)};
        import {{readFileSync}} from "node:fs";
        const given = JSON.parse(readFileSync(0, "utf8"));
        const text = JSON.stringify({expression}, (_, value) => typeof value === "bigint" ? String(value) : value);
        process.stdout.write(text);
    """
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script], input=json.dumps(given), check=False, timeout=60,
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pretty(*texts: str, truncated: bool = False) -> list[str | None]:
    found: list[str | None] = run(
        "pretty.js", "given.texts.map(text => m.pretty(text, given.options))",
        {"texts": texts, "options": {"truncated": truncated}},
    )  # fmt: skip
    return found


def tokens(text: str) -> str:
    """The text without the white space that is outside its strings."""
    kept, is_string, is_escaped = [], False, False
    for character in text:
        if is_string or character not in " \t\r\n":
            kept.append(character)
        if character == '"' and not is_escaped:
            is_string = not is_string
        is_escaped = is_string and character == "\\" and not is_escaped
    return "".join(kept)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# ── data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=20)  # each starts Node.js, for up to 20 documents
@given(st.lists(st.tuples(json_values, st.booleans(), st.sampled_from([None, 1])), min_size=1, max_size=20))
def test_laying_json_out_changes_nothing_but_white_space(values: list[tuple[object, bool, int | None]]) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value, ascii_only, indent in values]
    for text, laid in zip(texts, pretty(*texts), strict=True):
        assert laid is not None
        assert tokens(laid) == tokens(text)


def test_numbers_stay_as_they_were_written() -> None:
    (laid,) = pretty(f'{{"total":{NUMBER},"id":9007199254740993,"small":1e-400,"zero":-0.0,"one":1.00}}')
    lines = [f'"total": {NUMBER},', '"id": 9007199254740993,', '"small": 1e-400,', '"zero": -0.0,', '"one": 1.00']
    assert laid == "\n  ".join(["{", *lines]) + "\n}"


@pytest.mark.parametrize(
    "text", ["", "{", '{"a":}', "[1,]", "[1 2]", "1 2", "plain text", "{]", '"open', "<p>", "]", ",", "NaN"]
)
def test_what_is_not_json_is_shown_as_it_is(text: str) -> None:
    assert pretty(text) == [None]


def test_json_that_is_cut_off_is_laid_out_as_far_as_it_goes() -> None:
    assert pretty('{"a":[1,"tw', truncated=True) == ['{\n  "a": [\n    1,"tw']


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, json.dumps('\\"' * 100_000), "[" + "1," * 100_000 + "1]"]
)
def test_large_documents_take_little_time_and_room(text: str) -> None:
    (laid,) = pretty(text)
    assert laid is None or len(laid) <= 4 * len(text) + 300_000


# ── the live tail ─────────────────────────────────────────────────────────────────────────────────────────────────────


def page(first: int, last: int, *, head: int, more: bool, read_down_to: int | None = None) -> dict[str, object]:
    """An answer with the events of these positions, the newest first."""
    events = [{"position": str(position)} for position in range(last, first - 1, -1)]
    return {"events": events, "head": str(head), "more": more, "read_down_to": str(read_down_to or first)}


def held(*pages: dict[str, object]) -> Any:
    """The tail after these answers, each to a request as the page makes it."""
    return run("tail.js", "given.reduce((tail, page) => m.withNewer(tail, page, m.after(tail)), m.EMPTY)", pages)


def positions(tail: Any) -> list[int]:
    return [int(row["position"]) for row in tail["rows"] if "missed" not in row]


def test_a_tail_has_each_event_once_and_in_order() -> None:
    tail = held(page(1, 10, head=10, more=False), page(8, 13, head=13, more=False))
    assert positions(tail) == list(range(13, 0, -1))
    assert tail["missed"] == "0"


def test_an_event_that_was_committed_late_comes_to_its_place() -> None:
    tail = held(
        {**page(1, 10, head=10, more=False), "events": [{"position": "10"}, {"position": "8"}]},
        {**page(1, 10, head=10, more=False), "events": [{"position": "10"}, {"position": "9"}, {"position": "8"}]},
    )
    assert positions(tail) == [10, 9, 8]


def test_positions_are_ordered_as_numbers_however_large_they_are() -> None:
    large = [9, 10, 99, 100, 9_007_199_254_740_992, 9_007_199_254_740_993, 9_223_372_036_854_775_807]
    answer = {"events": [], "head": "8", "more": False, "read_down_to": "1"}
    tail = held(answer, {**answer, "events": [{"position": str(one)} for one in large], "head": str(large[-1])})
    assert positions(tail) == large[::-1]


def test_a_tail_counts_and_marks_events_that_it_did_not_get() -> None:
    tail = held(page(1, 10, head=10, more=False), page(1001, 1200, head=1200, more=True))
    assert tail["missed"] == "990"
    assert tail["rows"][200] == {"position": "1001", "missed": "990"}


def test_events_of_a_transaction_that_was_open_are_counted_too() -> None:
    # The head moves when positions are drawn, and the events appear when the transaction commits.
    drawn = {"events": [], "head": "1210", "more": False, "read_down_to": "1"}
    tail = held(page(1, 10, head=10, more=False), drawn, page(1011, 1210, head=1210, more=True))
    assert tail["missed"] == "1000"
    assert tail["rows"][200] == {"position": "1011", "missed": "1000"}


@pytest.mark.parametrize(
    ("heads", "overlap", "asked"),
    [([10], 0, "0"), ([5000], 0, "4936"), ([5000], 1000, "4000"), ([4500, 5000], 0, "4500"), ([100, 5000], 0, "3000")],
)
def test_a_request_looks_back_at_what_may_have_been_committed_late(heads: list[int], overlap: int, asked: str) -> None:
    tail = {"start": "1", "heads": [str(head) for head in heads]}
    assert run("tail.js", "m.after(given.tail, BigInt(given.overlap))", {"tail": tail, "overlap": overlap}) == asked


def test_a_tail_keeps_500_rows_and_knows_where_older_ones_begin() -> None:
    pages = [page(200 * part + 1, 200 * part + 200, head=200 * part + 200, more=False) for part in range(4)]
    tail = held(*pages)
    assert positions(tail) == list(range(800, 300, -1))
    assert (tail["downTo"], tail["more"]) == ("301", True)


def test_older_pages_follow_without_a_gap() -> None:
    pages = [page(5, 10, head=10, more=True), page(4, 4, head=10, more=False)]
    found = run("tail.js", "m.withOlder(m.withNewer(m.EMPTY, given[0], null), given[1])", pages)
    assert positions(found) == [10, 9, 8, 7, 6, 5, 4]
    assert (found["downTo"], found["more"], found["paged"]) == ("4", False, True)
