"""The meaning of a configuration file, and the messages about its mistakes."""

import os
import textwrap
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pgbackend.codec.event import Event
from pgbackend.codec.wire import parse_structured
from pgbackend.errors import ConfigError
from pgbackend.retry import Retry
from pgbackend.serve.config.load import load, load_file
from pgbackend.serve.config.models import Configuration, Trigger
from pgbackend.serve.config.values import seconds

EVERYTHING = """
    ingest:
      user: shop
      password: {env: INGEST_PASSWORD}
      token: {env: INGEST_TOKEN}
    triggers:
      billing:
        filters:
          - exact: {type: com.example.order.created}
          - any: [{prefix: {source: /shop/}}, {not: {suffix: {subject: .draft}}}]
        target:
          url: http://localhost:8888/orders
          headers: {Authorization: {env: BILLING_AUTH}}
          mode: structured
        deliveryOptions:
          retry: 5
          backoffPolicy: exponential
          backoffDelay: PT2S
          backoffMax: PT5M
          timeout: PT10S
          deadLetterURL: http://localhost:9000/
        order: key
        concurrency: 8
        shards: 2
        start: earliest
        bounds: {byId: {start: "10", end: "20"}, byDate: {start: 2026-01-01T00:00:00Z}}
    """


def loaded(text: str) -> Configuration:
    return load(textwrap.dedent(text), origin="broker.yaml")


def trigger(body: str) -> Trigger:
    """The trigger with this body."""
    return loaded(f"triggers: {{only: {{{body}}}}}").triggers["only"]


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    return str(caught.value)


def event(**attributes: str) -> Event:
    members = {"specversion": "1.0", "id": "1", "source": "/shop/1", "type": "t"} | attributes
    text = ",".join(f'"{name}":"{value}"' for name, value in members.items())
    return parse_structured(f"{{{text}}}".encode())


def test_every_key_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INGEST_PASSWORD": "pw", "INGEST_TOKEN": "tok", "BILLING_AUTH": "Bearer b"}.items():
        monkeypatch.setenv(name, value)

    configuration = loaded(EVERYTHING)

    assert configuration.ingest.user is not None
    assert configuration.ingest.password is not None
    assert configuration.ingest.token is not None
    assert configuration.ingest.user.get_secret_value() == "shop"
    assert configuration.ingest.password.get_secret_value() == "pw"
    assert configuration.ingest.token.get_secret_value() == "tok"
    billing = configuration.triggers["billing"]
    assert str(billing.target.url) == "http://localhost:8888/orders"
    assert billing.target.headers == {"Authorization": "Bearer b"}
    assert billing.target.mode == "structured"
    options = billing.delivery_options
    assert options.policy() == Retry(attempts=6, delay=4.0, backoff="exponential", max_delay=300.0, jitter=0.1)
    assert options.timeout == 10.0
    assert str(options.dead_letter_url) == "http://localhost:9000/"
    assert (billing.order, billing.concurrency, billing.shards) == ("key", 8, 2)
    assert (billing.start, billing.end) == (10, 20)
    predicate = billing.predicate
    assert predicate is not None
    assert predicate(event(type="com.example.order.created"))
    assert predicate(event(type="com.example.order.created", source="/other", subject="final"))
    assert not predicate(event(type="com.example.order.created", source="/other", subject="a.draft"))
    assert not predicate(event(type="com.example.order.deleted"))


def test_defaults_are_as_documented() -> None:
    only = trigger("target: {url: http://localhost/}")

    assert only.predicate is None
    assert only.delivery_options.policy() == Retry(attempts=6, delay=2.0, max_delay=600.0, jitter=0.1)
    assert only.delivery_options.timeout == 30.0
    assert only.delivery_options.dead_letter_url is None
    assert (only.target.mode, only.target.headers) == ("binary", {})
    assert (only.order, only.concurrency, only.shards) == ("none", 64, 1)
    assert (only.start, only.end) == ("latest", None)


def test_json_may_be_indented_by_tabs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """{
    \t"triggers": {
    \t\t"a\\u00e9\\ud83d\\ude00": {"deliveryOptions": {"retry": 3, "backoffDelay": "PT1S"}, "filters": null}
    \t}
    }"""
    assert loaded(text).triggers["aé😀"].delivery_options.retry == 3


def test_scalars_in_text_fields_stay_text() -> None:
    only = trigger("filters: [{exact: {type: 42, time: 2026-01-01, a: true, b: 1e3, c: 0x10, d: 1_000}}]")
    assert only.filters[0].exact == {
        "type": "42",
        "time": "2026-01-01",
        "a": "true",
        "b": "1e3",
        "c": "0x10",
        "d": "1_000",
    }


def test_keys_match_in_any_case() -> None:
    only = loaded("Triggers: {Only: {Target: {URL: http://h/}, deliveryoptions: {DeadLetterUrl: http://d/}}}")
    assert str(only.triggers["Only"].delivery_options.dead_letter_url) == "http://d/"


class TestFilesOfTriggerMesh:
    """The files in the documentation of TriggerMesh's brokers."""

    def test_delivery_options_beside_the_target(self) -> None:
        only = loaded("""
            triggers:
              first:
                filters:
                - exact:
                    type: com.example.order
                target:
                  url: http://localhost:9000
                deliveryOptions:
                  retry: 2
                  backoffDelay: PT5S
                  backoffPolicy: linear
            """).triggers["first"]
        assert str(only.target.url) == "http://localhost:9000"
        assert only.delivery_options.policy().waits() == (5.0, 10.0)
        assert only.filters[0].exact == {"type": "com.example.order"}

    def test_json_on_the_command_line_with_the_options_of_the_target(self) -> None:
        only = loaded("""
            {"triggers": {
              "first": {
                "filters": [{"exact": {"type": "com.example.order"}}],
                "target": {
                  "url": "http://localhost:9000",
                  "deliveryOptions": {"retry": 2, "backoffDelay": "PT5S", "backoffPolicy": "linear"}
                }
              }
            }}
            """).triggers["first"]
        assert only.delivery_options.policy().waits() == (5.0, 10.0)

    def test_old_bounds_are_refused_with_what_to_write(self) -> None:
        said = complaint("""\
            triggers:
              replay:
                bounds:
                  startId: 1686851639344-0
                  endId: 1686851697104-0
                target:
                  url: http://localhost:9000
            """)
        expected = "unknown key: expected byId or byDate; did you mean byId"
        assert said.splitlines() == [
            f"broker.yaml:4: triggers.replay.bounds.startId: {expected}: {{start: …}}?",
            f"broker.yaml:5: triggers.replay.bounds.endId: {expected}: {{end: …}}?",
        ]

    def test_a_redis_id_is_refused_with_its_time(self) -> None:
        said = complaint("triggers: {replay: {bounds: {byId: {start: 1686851639344-0}}}}")
        assert "triggers.replay.bounds.byId.start: expected a position of this log" in said
        assert "use byDate with 2023-06-15T17:53:59.344Z" in said


def test_anchors_aliases_and_merges_are_resolved() -> None:
    configuration = loaded("""
        triggers:
          a: &a
            target: {url: http://a/}
            concurrency: 2
          b:
            <<: *a
            concurrency: 3
        """)
    assert str(configuration.triggers["b"].target.url) == "http://a/"
    assert configuration.triggers["b"].concurrency == 3


def test_without_filters_every_event_passes() -> None:
    for body in ("", "filters: []", "filters: ", "filters: null"):
        assert trigger(body).predicate is None


def test_several_attributes_of_a_filter_must_all_match() -> None:
    predicate = trigger("filters: [{prefix: {source: /shop, type: t}}]").predicate
    assert predicate is not None
    assert predicate(event(type="tx"))
    assert not predicate(event(type="x"))


def test_cesql_combines_with_the_other_dialects() -> None:
    predicate = trigger("""filters: [{cesql: "type LIKE 'order.%'"}, {not: {cesql: subject = 'draft'}}]""").predicate
    assert predicate is not None
    assert predicate(event(type="order.created"))
    assert predicate(event(type="order.created", subject="final"))
    assert not predicate(event(type="order.created", subject="draft"))
    assert not predicate(event(type="orders"))


def test_an_unknown_function_in_cesql_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"filters\[0\]\.cesql: CESQL, line 1, column 1: there is no function 'LEN'"):
        trigger("filters: [{cesql: LEN(type) > 2}]")


class TestDeliveryOptions:
    def test_without_a_policy_the_wait_is_constant(self) -> None:
        policy = trigger("deliveryOptions: {retry: 2, backoffDelay: PT3S}").delivery_options.policy()
        assert policy.waits() == (3.0, 3.0)

    def test_without_a_delay_the_wait_is_one_second(self) -> None:
        policy = trigger("deliveryOptions: {retry: 3, backoffPolicy: linear}").delivery_options.policy()
        assert policy.waits() == (1.0, 2.0, 3.0)

    def test_the_exponential_wait_before_retry_n_is_the_delay_times_two_to_the_n(self) -> None:
        options = "deliveryOptions: {retry: 4, backoffPolicy: exponential, backoffDelay: PT1.5S, backoffMax: PT10S}"
        assert trigger(options).delivery_options.policy().waits() == (3.0, 6.0, 10.0, 10.0)

    def test_options_without_retry_have_no_retries(self) -> None:
        assert trigger("deliveryOptions: {deadLetterURL: http://d/}").delivery_options.policy().attempts == 1

    def test_the_deprecated_place_applies_without_the_other(self) -> None:
        assert trigger("target: {url: http://h/, deliveryOptions: {retry: 7}}").delivery_options.retry == 7

    def test_the_proper_place_replaces_the_deprecated_one_as_a_whole(self) -> None:
        both = "deliveryOptions: {retry: 1}, target: {url: http://h/, deliveryOptions: {retry: 7, timeout: PT1S}}"
        options = trigger(both).delivery_options
        assert (options.retry, options.timeout) == (1, 30.0)

    def test_an_empty_url_is_no_url(self) -> None:
        for body in ("", 'target: {url: ""}', "target: ", "target: {url: null}"):
            assert trigger(body).target.url is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PT2S", 2),
        ("PT0.25S", 0.25),
        ("PT0,25S", 0.25),
        ("P1DT1H", 90_000),
        ("PT1M1H", 3660),
        ("P1W", 604_800),
        ("P1Y", 365.2425 * 86_400),
        ("P1M", 365.2425 * 86_400 / 12),
        ("PT86400S", 86_400),
        ("+PT1S", 1),
        ("-PT1S", -1),
        ("P0", 0),
    ],
)
def test_durations_are_iso_8601(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "P",
        "PT",
        "P1",
        "P1DT",
        "2s",
        "5",
        "pt1s",
        "PT.5S",
        "PT1.S",
        "PT1S1S",
        "P1S",
        "PT1D",
        "P0.5DT0.5H",
        "P٣D",
        "PT1S ",
        "P1D\n",
        "--PT1S",
        "P1000000D",
        "PT" + "9" * 400 + "S",
    ],
)
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a"):
        seconds(text)


@pytest.mark.parametrize("text", ["P" + "9" * 50_000, "PT" + "1." * 25_000, "PT1." + "9" * 50_000, "P1D" * 20_000])
def test_a_long_duration_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="expected an ISO 8601 duration"):
        trigger(f"deliveryOptions: {{timeout: {text}}}")
    assert time.process_time() - began < 1


class TestBounds:
    def test_a_position_overrides_a_date_on_its_own_side_only(self) -> None:
        only = trigger(
            "bounds: {byId: {start: 5}, byDate: {start: 2026-01-01T00:00:00Z, end: 2026-02-01T01:00:00+01:00}}"
        )
        assert only.start == 5
        assert only.end == datetime(2026, 2, 1, tzinfo=UTC)

    def test_bounds_override_start(self) -> None:
        assert trigger("start: earliest, bounds: {byDate: {start: 2026-01-01t00:00:00z}}").start == datetime(
            2026, 1, 1, tzinfo=UTC
        )

    def test_a_bound_finer_than_a_microsecond_stays_exclusive(self) -> None:
        only = trigger("bounds: {byDate: {start: 2026-01-01T00:00:00.0000019Z, end: 2026-01-01T00:00:00.0000021Z}}")
        assert only.start == datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)
        assert only.end == datetime(2026, 1, 1, 0, 0, 0, 3, tzinfo=UTC)

    def test_a_time_that_does_not_exist_in_utc_is_refused(self) -> None:
        for bound in ("start: 0001-01-01T00:00:00+00:01", "end: 9999-12-31T23:59:59-00:01"):
            assert "expected a time such as" in complaint(f"triggers: {{a: {{bounds: {{byDate: {{{bound}}}}}}}}}")
        assert trigger("bounds: {byDate: {start: 0001-01-01T00:00:00Z}}").start == datetime(1, 1, 1, tzinfo=UTC)


class TestDigest:
    """By which a restart finds that a trigger has changed."""

    BODY = (
        "target: {url: 'https://a:b@x/y', headers: {X: one}}, filters: [{exact: {type: t}}], concurrency: 8, "
        "deliveryOptions: {deadLetterURL: 'https://d:e@dead/'}"
    )

    def test_it_is_the_same_for_the_same_trigger_however_it_is_written(self) -> None:
        digest = trigger(self.BODY).digest()
        assert digest == trigger(self.BODY + ", start: latest, shards: 1").digest(), "defaults"
        assert digest == trigger(self.BODY.replace("concurrency", "CONCURRENCY")).digest()

    @pytest.mark.parametrize(
        ("old", "new"), [("x/y", "x/z"), ("https", "http"), ("X: one", "Y: one"), ("type: t", "type: u"), ("8", "9")]
    )
    def test_it_differs_for_another_trigger(self, old: str, new: str) -> None:
        assert trigger(self.BODY).digest() != trigger(self.BODY.replace(old, new)).digest()

    @pytest.mark.parametrize(("old", "new"), [("a:b@", "a:c@"), ("d:e@", ""), ("X: one", "X: two")])
    def test_credentials_do_not_count(self, old: str, new: str) -> None:
        assert trigger(self.BODY).digest() == trigger(self.BODY.replace(old, new)).digest()


class TestSecrets:
    def test_a_secret_file_is_relative_to_the_configuration_and_loses_its_last_line_break(self, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("Bearer of news\r\n", encoding="utf-8")
        file = tmp_path / "broker.yaml"
        file.write_text("triggers: {a: {target: {url: http://h/, headers: {Authorization: {file: secret}}}}}")
        assert load_file(file).triggers["a"].target.headers == {"Authorization": "Bearer of news"}

    def test_no_message_and_no_repr_shows_a_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HIDDEN", "hun\nter2")
        said = complaint("triggers: {a: {target: {url: http://h/, headers: {X: {env: HIDDEN}}}}}")
        said += complaint("triggers: {a: {target: {url: 'http://me:hunter2@ h/?token=hunter2'}}}")
        said += complaint("triggers: {a: {target: {url: 'http://me:hunter2@/'}}}")
        said += complaint("triggers: {a: {target: {url: 'http://me:hunter2?x@h/'}}}")
        said += complaint("ingest: {user: u, password: {hunter2: x}}")
        # These secrets lack quotes, and begin with a character that YAML interprets.
        said += complaint("ingest: {user: u, password: *hunter2}")
        said += complaint("ingest: {user: u, password: !hunter2 }")
        said += complaint("ingest: {user: u, password: !hunter2!x }")
        said += complaint("{ingest: &hunter2 {}, triggers: &hunter2 {}}")
        monkeypatch.setenv("HIDDEN", "hunter2")
        said += repr(loaded("ingest: {user: u, password: hunter2, token: {env: HIDDEN}}"))
        said += repr(trigger("target: {url: 'http://me:hunter2@h/', headers: {X: {env: HIDDEN}}}"))
        said += repr(trigger("deliveryOptions: {deadLetterURL: 'http://h/?token=hunter2'}"))
        assert "ter2" not in said

    def test_a_secret_that_is_not_utf_8_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(os.environ, "LATIN", os.fsdecode(b"caf\xe9"))
        assert "ingest.token: expected a value in UTF-8" in complaint("ingest: {token: {env: LATIN}}")
        with_header = "triggers: {a: {target: {url: http://h/, headers: {X: {env: LATIN}}}}}"
        assert "target.headers.X: expected a value in UTF-8" in complaint(with_header)

    def test_an_empty_user_and_password_mean_no_credentials(self) -> None:
        ingest = loaded('ingest: {user: "", password: ""}').ingest
        assert ingest.user is None
        assert ingest.token is None


MISTAKES = [
    ("trigers: {}", "trigers: unknown key: expected ingest, console, deduplicate, retention or triggers"),
    ("deduplicate: 1d", 'deduplicate: expected an ISO 8601 duration such as PT2S, found "1d"'),
    ("deduplicate: PT0.05S", 'deduplicate: expected a duration from PT0.1S to P366D, or P0D, found "PT0.05S"'),
    ("deduplicate: -P1D", "deduplicate: expected a duration from PT0.1S to P366D, or P0D"),
    ("triggers: {a: {filter: []}}", "triggers.a.filter: unknown key: expected filters, target,"),
    ("triggers: {a: {bounds: {startId: 1}}}", "triggers.a.bounds.startId: unknown key: expected byId or byDate"),
    ("triggers: {a: {filters: [{regex: {type: x}}]}}", "triggers.a.filters[0].regex: unknown dialect: expected exact,"),
    ("triggers: {a: {filters: [{exact: {type: x}, prefix: {type: y}}]}}", "not or cesql, found exact and prefix"),
    ("triggers: {a: {filters: [{}]}}", "triggers.a.filters[0]: expected exactly one of"),
    (
        "triggers:\n  a:\n    filters:\n    - cesql: |\n        EXISTS subject\n          AND type =",
        "broker.yaml:4: triggers.a.filters[0].cesql: CESQL, line 2, column 13: expected a value, found the end",
    ),
    ('triggers: {a: {filters: [{exact: {type: ""}}]}}', "triggers.a.filters[0].exact.type: expected text that is not"),
    ('triggers: {a: {filters: [{exact: {"": x}}]}}', 'triggers.a.filters[0].exact."": expected text that is not empty'),
    ("triggers: {a: {filters: [{exact: {type: }}]}}", "exact.type: expected text, found nothing"),
    ("triggers: {a: {filters: [{exact: {type: [x]}}]}}", "exact.type: expected text, found a list"),
    ("triggers: {a: {filters: [{exact: {}}]}}", "filters[0].exact: expected at least one attribute"),
    ("triggers: {a: {filters: [{any: []}]}}", "filters[0].any: expected at least one filter"),
    ("triggers: {a: {filters: [{exact: {Type: x}}]}}", "filters[0].exact.Type: expected an attribute name"),
    ("triggers: {a: {filters: [{prefix: {data: x}}]}}", "filters[0].prefix.data: expected an attribute name"),
    (
        "triggers: {a: {filters: [{not: {all: [{exact: {a: ''}}]}}]}}",
        "filters[0].not.all[0].exact.a: expected text that",
    ),
    ("triggers: {a: {filters: {exact: {type: x}}}}", "triggers.a.filters: expected a list, found a mapping"),
    (
        "triggers: {a: {deliveryOptions: {backoffDelay: 2s}}}",
        'backoffDelay: expected an ISO 8601 duration such as PT2S, found "2s"',
    ),
    ("triggers: {a: {deliveryOptions: {backoffDelay: PT0S}}}", "backoffDelay: expected a duration above zero"),
    ("triggers: {a: {deliveryOptions: {timeout: -PT1S}}}", "timeout: expected a duration above zero"),
    ("triggers: {a: {deliveryOptions: {retry: -1}}}", 'retry: expected a whole number, found "-1"'),
    ("triggers: {a: {deliveryOptions: {retry: 5.0}}}", "retry: expected a whole number"),
    ("triggers: {a: {deliveryOptions: {backoffPolicy: random}}}", "backoffPolicy: expected constant, linear or expo"),
    (
        "triggers: {a: {deliveryOptions: {deadLetterURL: dead}}}",
        "deadLetterURL: expected an absolute http or https URL",
    ),
    (
        "triggers: {a: {target: {url: /relative}}}",
        'target.url: expected an absolute http or https URL, found "/relative"',
    ),
    ("triggers: {a: {target: {url: //host/path}}}", "target.url: expected an absolute http or https URL"),
    ("triggers: {a: {target: {url: ftp://host/}}}", "target.url: expected an absolute http or https URL"),
    ("triggers: {a: {target: {url: http://}}}", "target.url: expected an absolute http or https URL"),
    ("triggers: {a: {target: {url: 'http://h:99999/'}}}", "target.url: expected an absolute http or https URL"),
    (
        'triggers: {a: {target: {url: "http://h/\\r\\nX: y"}}}',
        "target.url: expected an absolute http or https URL without",
    ),
    ("triggers: {a: {target: {mode: batch}}}", 'target.mode: expected binary or structured, found "batch"'),
    (
        "triggers: {a: {target: {headers: {X: {env: NOT_SET_AT_ALL}}}}}",
        'headers.X.env: the environment variable "NOT_SET',
    ),
    (
        "triggers: {a: {target: {headers: {X: {file: /not/there}}}}}",
        'headers.X.file: the file "/not/there" cannot be read',
    ),
    (
        "triggers: {a: {target: {headers: {X: {file: /dev/zero}}}}}",
        'headers.X.file: the file "/dev/zero" has more than 65536 bytes: expected a secret',
    ),
    ("triggers: {a: {target: {headers: {X: {vault: x}}}}}", "headers.X: expected text, {env: NAME} or {file: PATH}"),
    ('triggers: {a: {target: {headers: {X: "a\\r\\nY: b"}}}}', "headers.X: expected a single line"),
    ('triggers: {a: {target: {headers: {"X: a": b}}}}', "expected an HTTP header name"),
    (
        "triggers: {a: {target: {headers: {Content-Length: 5}}}}",
        "headers.Content-Length: the broker sets the header Content-Length itself",
    ),
    ("triggers: {a: {target: {headers: {ce-id: 5}}}}", "headers.ce-id: the broker sets the header ce-id itself"),
    ("triggers: {a: {target: {url: 'http://a%3Ab:c@x/'}}}", "target.url: expected a user without a colon"),
    (
        "triggers: {a: {target: {url: 'http://a..b/'}}}",
        "target.url: expected an absolute http or https URL with a host",
    ),
    (
        f"triggers: {{a: {{deliveryOptions: {{deadLetterURL: 'http://{'x' * 64}.de/'}}}}}}",
        "deadLetterURL: expected an absolute http or https URL with a host",
    ),
    ("triggers: {a: {target: {headers: {PgBackend-Attempt: 5}}}}", "sets the header PgBackend-Attempt itself"),
    ("triggers: {a: {target: {headers: {x: 1, X: 2}}}}", "target.headers: "),
    ("triggers: {a: {bounds: {byId: {start: 5-0}}}}", 'byId.start: expected a whole number, found "5-0"'),
    ("triggers: {a: {bounds: {byId: {start: 5, end: 5}}}}", "bounds.byId.end: expected an end after the start"),
    ("triggers: {a: {bounds: {byDate: {end: 2026-02-30T00:00:00Z}}}}", "byDate.end: expected a time such as"),
    ("triggers: {a: {bounds: {byDate: {end: 2026-02-03}}}}", "byDate.end: expected a time such as"),
    ("triggers: {a: {order: sorted}}", "triggers.a.order: expected none, key or strict"),
    ("triggers: {a: {order: strict, shards: 2}}", "triggers.a.shards: expected a single shard: strict order"),
    ("triggers: {a: {bounds: {byId: {end: 0}}}}", "bounds.byId.end: expected a whole number from 1 to"),
    ("triggers: {a: {start: now}}", "triggers.a.start: expected earliest or latest"),
    ("triggers: {a: {concurrency: 0}}", "triggers.a.concurrency: expected a whole number from 1 to"),
    ("triggers: {a: {shards: 0}}", "triggers.a.shards: expected a whole number from 1 to"),
    ("triggers: [a]", "triggers: expected a mapping from names to triggers, found a list"),
    ('triggers: {"": {}}', "expected a printable trigger name"),
    ("triggers: {a: b}", 'triggers.a: expected a mapping, found "b"'),
    ("triggers: {a: {}, a: {}}", "'a' occurs twice in this mapping"),
    ("triggers: {a: {order: key, Order: none}}", "triggers.a.Order: order occurs twice"),
    ("ingest: {password: x}", "ingest: expected user as well"),
    ("ingest: {user: 'a:b', password: x}", "ingest.user: expected a user without a colon"),
    ("ingest: {user: a, password: {env: NOT_SET_AT_ALL}}", 'ingest.password.env: the environment variable "NOT_SET'),
    ("just text", 'expected a mapping, found "just text"'),
    ('ingest: {token: {env: "a\\nb"}}', r'the environment variable "a\nb" is unset or empty: set it'),
    ("", "is empty: expected a mapping with `triggers`"),
    ("a: [", "not valid YAML"),
    ("a: b: c", "not valid YAML"),
    ("a: 1\n--- \nb: 2", "not valid YAML"),
    ("a: \x00", "not valid YAML"),
    ("triggers: !!python/object/apply:os.system {}", "expected plain YAML, found a tag"),
    ("triggers: {a: {<<: b}}", "expected a mapping, or a list of mappings, to merge"),
    ("triggers: {[a]: {}}", "expected text as the key"),
    ("&a [*a]", "expected at most 64 levels"),
    ("[" * 500, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[text[:60] for text, _ in MISTAKES])
def test_a_mistake_is_reported_with_its_path_and_what_was_expected(text: str, expected: str) -> None:
    said = complaint(text)
    assert said.startswith("broker.yaml:")
    assert expected in said
    assert "\n" not in said


def test_a_mistake_is_reported_with_its_line() -> None:
    text = """\
        triggers:
          good:
            target: {url: http://h/}
          bad:
            target:
              url: http://h/
            deliveryOptions:
              retry: 3
              backoffDelay: soon
        """
    assert complaint(text).startswith("broker.yaml:9: triggers.bad.deliveryOptions.backoffDelay: expected")


def test_a_missing_value_is_reported_at_the_line_of_its_parent() -> None:
    assert complaint("\ntriggers:\n  a:\n    filters:\n    - {}\n").startswith("broker.yaml:5: triggers.a.filters[0]:")


def test_all_mistakes_are_reported_in_the_order_of_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        loaded("""\
            triggers:
              b: {order: strict, shards: 2, target: {url: nowhere}}
              b: {}
              a:
                filters:
                - exact: {type: ""}
                  prefix: {type: x}
                - not: {all: [{exact: {Type: x, id: ""}}]}
                retry: 5
                deliveryOption: {timeout: soon}
                bounds: {byId: {start: 5, end: 4}, byDate: {end: later}}
              "": {start: now}
            ingest: {user: me, pasword: x}
            """)
    assert [problem.removeprefix("broker.yaml:").split(": expected")[0] for problem in caught.value.problems] == [
        "2: triggers.b.target.url",
        "2: triggers.b.shards",
        "3: 'b' occurs twice in this mapping",
        "6: triggers.a.filters[0]",
        "8: triggers.a.filters[1].not.all[0].exact.Type",
        "8: triggers.a.filters[1].not.all[0].exact.id",
        "9: triggers.a.retry: unknown key",
        "10: triggers.a.deliveryOption: unknown key",
        "11: triggers.a.bounds.byId.end",
        "11: triggers.a.bounds.byDate.end",
        '12: triggers.""',
        '12: triggers."".start',
        "13: ingest.pasword: unknown key",
    ]
    assert str(caught.value).splitlines() == list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "suggested"),
    [
        ("trigger: {}", "triggers"),
        ("triggers: {a: {filter: []}}", "filters"),
        ("triggers: {a: {deliveryoption: {}}}", "deliveryOptions"),
        ("triggers: {a: {filters: [{excat: {type: x}}]}}", "exact"),
        ("triggers: {a: {deliveryOptions: {retries: 5}}}", "retry"),
        ("triggers: {a: {deliveryOptions: {deadLetterSink: x}}}", "deadLetterURL"),
        ("triggers: {a: {target: {uri: x}}}", "url"),
        ("triggers: {a: {bounds: {startId: 1686851639344-0}}}", "byId: {start: …}"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(text: str, suggested: str) -> None:
    assert complaint(text).endswith(f"; did you mean {suggested}?")


def test_thousands_of_mistakes_are_found_quickly() -> None:
    """Finding each line by a search through the whole file would take time by the square of its size."""
    began = time.process_time()
    said = complaint("triggers:\n" + "".join(f"  t{number}: {{concurrency: x}}\n" for number in range(3000)))
    assert time.process_time() - began < 3
    assert "3001: triggers.t2999.concurrency" in said


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    assert complaint("triggers: {a: {sidecar: x}}").endswith("start or bounds.")


def test_a_mistake_that_an_alias_repeats_is_reported_once() -> None:
    assert complaint("triggers: {a: &a {order: x, order: y}, b: *a}").count("occurs twice") == 1


@pytest.mark.parametrize(("first", "others"), [("[x, x]", "[{}]"), ("{}", "{{<<: [{}]}}")], ids=["lists", "merges"])
def test_aliases_cannot_blow_up_a_file(first: str, others: str) -> None:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {others.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, 10)]
    assert "expected at most 100000 values" in complaint("\n".join(lines))


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_file(tmp_path / "nowhere.yaml")
    (tmp_path / "latin").write_bytes(b"triggers: {\xe9: {}}")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 11"):
        load_file(tmp_path / "latin")


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """It may be a dump of a database, or a device without an end."""
    large = tmp_path / "large.yaml"
    large.write_bytes(b"triggers: {}\n#" + b"x" * (8 << 20))
    for path in (large, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: too large: expected at most 8 MiB"):
            load_file(path)


def test_a_retention_that_is_given_has_defaults_and_one_that_is_not_leaves_the_logs() -> None:
    assert loaded("triggers: {}").retention is None
    given = loaded("retention: {keep: PT12H, maxBytes: 2097152, deadLetters: forever}").retention
    assert given is not None
    assert (given.keep, given.max_age, given.max_bytes, given.dead_letters) == (
        timedelta(hours=12),
        None,
        1 << 21,
        None,
    )
    empty = loaded("retention: {}").retention
    assert empty is not None
    assert (empty.keep, empty.dead_letters) == (timedelta(days=7), timedelta(days=30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "retention: {keep: 7d}",
            'retention.keep: expected an ISO 8601 duration such as PT2S, found "7d", or "forever"',
        ),
        (
            "retention: {maxAge: PT0.5S}",
            'expected a duration from a second to 36500 days, or "forever", found "PT0.5S"',
        ),
        ("retention: {maxBytes: 1000}", "retention.maxBytes: expected a whole number from 1048576"),
    ],
)
def test_a_retention_that_cannot_be_stored_is_a_mistake(text: str, message: str) -> None:
    assert message in complaint(text)
