"""The SQL function `produce`: it takes what Python takes, refuses what Python refuses, and stores the same."""

import json
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import asyncpg
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pgbackend import Backend
from pgbackend.codec.attributes import COLUMNS, Row, read_extensions
from pgbackend.codec.event import Event
from pgbackend.codec.sdk import encode
from pgbackend.errors import EventError
from tests.support import codec
from tests.support.backends import SOON
from tests.support.databases import Sql, connected
from tests.support.polling import eventually

Form = Literal["text", "jsonb", "bytea", "absent"]

_CALL = """
    SELECT pgbackend.produce(
        $1, $2, data => $3::{form}, subject => $4, id => $5, "time" => $6, datacontenttype => $7, dataschema => $8,
        partitionkey => $9, extensions => $10::jsonb
    )"""
_ROW = f"SELECT {', '.join(COLUMNS)} FROM pgbackend.events WHERE position = $1"
OPTIONAL = ("subject", "id", "time", "datacontenttype", "dataschema", "partitionkey")


async def produce(connection: Sql, form: Form, attributes: Mapping[str, Any], data: Any) -> Row | None:
    """The row that the function stores; None when it refuses. Stores nothing for good."""
    statement = _CALL.format(form="text" if form == "absent" else form)
    transaction = connection.transaction()
    await transaction.start()
    try:
        position = await connection.fetchval(
            statement, attributes.get("type"), attributes.get("source"), data,
            *[attributes.get(name) for name in OPTIONAL],
            None if "extensions" not in attributes else json.dumps(attributes["extensions"]),
        )  # fmt: skip
        row: Any = await connection.fetchrow(_ROW, position)
        return tuple(row)
    except asyncpg.CheckViolationError as error:
        assert str(error).startswith("The event was not stored: ")  # noqa: PT017 - every other error fails the test
        return None
    finally:
        await transaction.rollback()


def structured(form: Form, attributes: Mapping[str, Any], data: Any) -> bytes:
    """The same event in the JSON format, as Python's `produce()` takes it."""
    members: dict[str, Any] = {"specversion": "1.0", **attributes}
    members.update(members.pop("extensions", {}))
    if form != "absent":
        members["datacontenttype"] = content_type = attributes.get("datacontenttype") or "application/json"
    if form == "absent":
        value = ""
    elif form == "bytea":
        value = f', "data_base64": {json.dumps(b64encode(data).decode())}'
    elif form == "jsonb" or content_type.partition(";")[0].rstrip().lower().endswith(("/json", "+json")):
        value = f', "data": {data}'
    else:
        value = f', "data": {json.dumps(data)}'
    return (json.dumps(members)[:-1] + value + "}").encode()


def encoded(event: bytes) -> Row | None:
    try:
        return encode(event, max_event_bytes=1 << 20)[0]
    except EventError:
        return None


def same(row: Row | None) -> tuple[object, ...] | None:
    """The row as consumers see it: neither the order of extensions nor the white space of jsonb counts."""
    if row is None:
        return None
    event = Event(row)
    return (*row[:9], read_extensions(row[9]), row[11], event.get_data(), row[10] is None)


# Texts that attributes may and may not have. PostgreSQL's own types exclude zeros and surrogates.
_characters = st.one_of(
    codec.legal_characters,
    st.sampled_from(
        '\x01\x1f\x7f\x85\x9f\u00a0\u1680\u2003\u2028\u3000\ufdd0\ufdef\ufffe\uffff\U0001ffff\U0010fffe "<>\\^`{|}%ü🐘'
    ),
)
_text = st.text(_characters, max_size=6)
_uri = st.one_of(
    codec.uri_reference,
    _text,
    st.sampled_from(["%", "%4", "%41", "a%4G", "%zz", "urn:x", "urn:", "#", "#a", "1:a", "a b", "http://[::1]/?q#f"]),
)
_digits = st.text(st.sampled_from("0123456789"), min_size=2, max_size=2)
_time = st.one_of(
    codec.time,
    st.builds("{}{}-{}-{}{}{}:{}:{}{}{}".format, _digits, _digits, st.sampled_from(["02", "04", "12", "13", "00"]),
              st.sampled_from(["00", "01", "28", "29", "30", "31", "32"]), st.sampled_from("Tt "), _digits, _digits,
              st.sampled_from(["00", "59", "60", "61"]), st.sampled_from(["", ".", ".5", ".123456789012"]),
              st.sampled_from(["Z", "z", "+00:00", "-23:59", "+24:00", "", "+0000"])),
)  # fmt: skip
_type = st.one_of(
    codec.content_type,
    st.sampled_from(["", "json", "application/json;", "a/b; c=\u00e9", "a/b ; x", "a/b\t;x", "/json", "a/", "a/+json",
                     "A/B+JSON ;v=1", "text/" + "x" * 995, "text/" + "x" * 996, "a'b/c", "a/b,c"]),
)  # fmt: skip
_value = st.one_of(
    _text, st.booleans(), st.integers(-(2**31) - 1, 2**31), st.none(), st.sampled_from([1.5, [1], {"a": 1}])
)
_name = st.one_of(codec.name, st.sampled_from(["Upper", "under_score", "", "data", "ü", "a b"]))
_attributes = st.fixed_dictionaries(
    {"id": st.one_of(codec.non_empty, _text), "source": _uri, "type": st.one_of(codec.non_empty, _text)},
    optional={
        "subject": _text, "time": _time, "datacontenttype": _type, "dataschema": _uri, "partitionkey": _text,
        "extensions": st.dictionaries(_name, _value, max_size=3),
    },
)  # fmt: skip
# Most of these are valid.
_valid = st.fixed_dictionaries(
    {"id": codec.non_empty, "source": codec.uri_reference, "type": codec.non_empty},
    optional={
        "subject": codec.non_empty, "time": codec.time, "datacontenttype": codec.content_type,
        "dataschema": st.just("urn:x"), "partitionkey": codec.non_empty,
        "extensions": st.dictionaries(codec.name, codec.extension, max_size=3),
    },
)  # fmt: skip
_no_zeros = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
_json_without_zeros = codec.json_text.filter(lambda text: "\0" not in text and "\\u0000" not in text)
_data = st.one_of(
    st.tuples(st.just("absent"), st.none()),
    st.tuples(st.just("text"), st.one_of(_no_zeros, _json_without_zeros, st.sampled_from([
        "", " ", "{", "nul", "NaN", "01", "1.", '"\\x"', '"\\ud800"', " [1, 2]\n", "\u00a01", "1e400", "-0", '"\t"'
    ]))),
    st.tuples(st.just("jsonb"), _json_without_zeros.filter(lambda text: "\\ud" not in text)),
    st.tuples(st.just("bytea"), st.binary(max_size=8)),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.lists(st.tuples(st.one_of(_valid, _attributes), _data), min_size=5, max_size=5))
@example([])
def examples_of(batch: list[tuple[dict[str, Any], tuple[Form, Any]]]) -> None:
    _collected.extend(batch)


_collected: list[tuple[dict[str, Any], tuple[Form, Any]]] = []


async def test_it_accepts_refuses_and_stores_as_python_does(database: str) -> None:
    _collected.clear()
    examples_of()
    accepted = 0
    async with connected(database) as connection:
        for attributes, (form, given_data) in _collected:
            # jsonb writes numbers in its own way, 1e3 as 1000.
            data = await connection.fetchval("SELECT $1::jsonb::text", given_data) if form == "jsonb" else given_data
            expected = encoded(structured(form, attributes, data))
            found = await produce(connection, form, attributes, data)
            assert same(found) == same(expected), (form, attributes, data)
            accepted += found is not None
    assert 0 < accepted < len(_collected)


@pytest.mark.parametrize("name", ["type", "source", "id"])
async def test_a_missing_attribute_is_named(database: str, name: str) -> None:
    given = {"type": "'t'", "source": "'/s'", "id": "'1'"} | {name: "NULL"}
    arguments = ", ".join(f"{key} => {value}" for key, value in given.items())
    async with connected(database) as connection:
        with pytest.raises(asyncpg.CheckViolationError, match=f'^The event was not stored: attribute "{name}" is miss'):
            await connection.fetchval(f"SELECT pgbackend.produce({arguments})")


async def test_sizes_are_limited_as_in_python(database: str) -> None:
    """Just the limit passes, and a byte more does not."""
    bare = {"id": "1", "source": "/s", "type": "t"}
    plain: dict[str, Any] = bare | {"datacontenttype": "text/plain"}
    others = len("1.0") + len("1/st") + len("{}")
    cases: list[tuple[Form, dict[str, Any], Any]] = []
    for more in (0, 1):
        cases.append(("absent", bare | {"subject": "ü" + "s" * (65536 - others - 2 + more)}, None))
        names = {"extensions": {"a": "x" * (65536 - others - len('"a":""') + more)}}
        cases.append(("absent", bare | names, None))
        cases.append(("text", plain, "x" * ((1 << 20) - others - len("text/plain") + more)))
    async with connected(database) as connection:
        for form, attributes, data in cases:
            found = await produce(connection, form, attributes, data)
            assert same(found) == same(encoded(structured(form, attributes, data))), (form, len(str(attributes)))
    assert [encoded(structured(*case)) is None for case in cases] == [False] * 3 + [True] * 3


async def test_members_that_have_a_parameter_do_not_go_into_extensions(database: str) -> None:
    names = (*COLUMNS[:9], "data")
    async with connected(database) as connection:
        for name in names:
            assert await produce(connection, "absent", {**codec.BARE, "extensions": {name: "x"}}, None) is None
        extensions: object
        for extensions in ([], "x", 1):
            assert await produce(connection, "absent", {**codec.BARE, "extensions": extensions}, None) is None


async def test_everything_but_type_and_source_has_a_default(database: str) -> None:
    async with connected(database) as connection:
        position = await connection.fetchval("SELECT pgbackend.produce('t', '/s')")
        row = tuple(await connection.fetchrow(_ROW, position))  # type: ignore[arg-type]
        other = await connection.fetchval("SELECT pgbackend.produce('t', '/s', '{\"n\": 1}')")
        stored = tuple(await connection.fetchrow(_ROW, other))  # type: ignore[arg-type]

    assert row[0] == "1.0"
    assert len(row[1]) == 36
    assert row[2:] == ("/s", "t", None, None, None, None, None, "{}", None, None)
    assert stored[6:] == ("application/json", None, None, "{}", b'{"n": 1}', "json")
    assert stored[1] != row[1]


async def test_what_consumers_get_is_what_they_get_from_python(database: str) -> None:
    """The same events, given to Python as the SDK has them."""
    events = [
        codec.sdk({"n": [1.5, None, "ü"]}, id="json", datacontenttype="application/json", priority=7, urgent=True),
        codec.sdk("plain ü", id="text", datacontenttype="text/plain", subject="s", partitionkey="k"),
        codec.sdk(b"\x00\xff", id="bytes", datacontenttype="image/png", dataschema="urn:x"),
        codec.sdk(None, id="none"),
    ]
    calls = """
        SELECT pgbackend.produce('t', '/s', '{"n": [1.5, null, "ü"]}'::jsonb, id => 'json', "time" => $1,
            extensions => '{"priority": 7, "urgent": true}');
        SELECT pgbackend.produce('t', '/s', 'plain ü', 's', 'text', $1, 'text/plain', partitionkey => 'k');
        SELECT pgbackend.produce('t', '/s', decode('00ff', 'hex'), id => 'bytes', "time" => $1,
            datacontenttype => 'image/png', dataschema => 'urn:x');
        SELECT pgbackend.produce('t', '/s', id => 'none', "time" => $1)"""
    caught: list[Event] = []
    async with Backend(database, **SOON) as backend:
        await backend.subscribe("all", caught.append, start="earliest")
        await backend.produce_many(events)
        async with connected(database) as connection:
            for call in calls.split(";"):
                await connection.execute(call, "2026-01-02T00:00:00Z")
        await eventually("all are handled", lambda: len(caught) == 2 * len(events))

    caught.sort(key=lambda event: event.position)
    found = [(event.get_attributes(), event.get_data()) for event in caught]
    assert found[:4] == found[4:]
    assert found[0][0]["time"] == datetime(2026, 1, 2, tzinfo=UTC)


async def test_it_belongs_to_its_callers_transaction(database: str) -> None:
    """As psycopg calls it, which names no types: a text is text, and its errors end no session."""

    def use() -> list[str]:
        with psycopg.connect(database) as connection:
            with connection.transaction(force_rollback=True):
                connection.execute("SELECT pgbackend.produce('t', %s, %s, id => %s)", ("/s", '{"a": 1}', "undone"))
            with connection.transaction():
                connection.execute("SELECT pgbackend.produce('t', %s, %s, id => %s)", ("/s", '{"a": 1}', "kept"))
                with pytest.raises(psycopg.errors.CheckViolation, match="no JSON"), connection.transaction():
                    connection.execute("SELECT pgbackend.produce('t', '/s', %s)", ("{",))
            return [id_ for (id_,) in connection.execute("SELECT id FROM pgbackend.events ORDER BY position")]

    assert use() == ["kept"]


async def test_the_search_path_of_its_caller_does_no_harm(database: str) -> None:
    """Different collations and a session that reads backslashes in its own way do none either."""
    async with connected(database, standard_conforming_strings="off", escape_string_warning="off") as connection:
        await connection.execute("""
            CREATE SCHEMA trap;
            CREATE FUNCTION trap.refuse(text, text) RETURNS boolean LANGUAGE plpgsql
                AS $$BEGIN RAISE 'the trap was called'; END$$;
            CREATE OPERATOR trap.~ (FUNCTION = trap.refuse, LEFTARG = text, RIGHTARG = text);
            CREATE OPERATOR trap.= (FUNCTION = trap.refuse, LEFTARG = text, RIGHTARG = text);
            CREATE FUNCTION trap.octet_length(text) RETURNS int LANGUAGE sql AS $$SELECT 0$$;
            SET search_path = trap, pg_catalog""")
        await connection.fetchval("SELECT pgbackend.produce('t', '/s%41', '{}', extensions => '{\"a\": \"b\"}')")
        await connection.fetchval("""
            SELECT pgbackend.produce(one.type, two.source, '[1]', extensions => '{"a": "b"}')
            FROM (SELECT 't' COLLATE "C" AS type) AS one, (SELECT '/s' COLLATE "POSIX" AS source) AS two""")
        with pytest.raises(asyncpg.CheckViolationError, match="URI-reference"):
            await connection.fetchval("SELECT pgbackend.produce('t', '/s' || chr(92), '[1]')")
