"""The outcome of each answer of a target."""

from base64 import b64decode
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest
from yarl import URL

from pgbackend.errors import Pause, Reject, RetryAfter
from pgbackend.serve.egress import outcomes
from pgbackend.serve.egress.outcomes import Answer, Failure, TargetError

URL_SHOWN = "http://target/orders"


def failure(status: int, body: bytes = b"", retry_after: str | None = None) -> Failure:
    return outcomes.failure_of(Answer(status, body, retry_after), url=URL_SHOWN, trigger="billing")


def test_each_status_is_delivered_retried_or_final() -> None:
    retried = {404, 408, 409, 413, 425, 429, *range(500, 600)}
    for status in range(200, 1000):
        assert Answer(status).is_success == (status < 300)
        for retry_after in (None, "7"):
            found = failure(status, retry_after=retry_after)
            if status in retried:
                assert type(found) is (RetryAfter if retry_after else TargetError), status
            else:
                assert type(found) is (Pause if status == 410 else Reject), status
            assert str(found).startswith(f"{URL_SHOWN} answered {status}")
            assert outcomes.status_of(found) == status


def test_410_names_the_trigger_and_says_what_to_do() -> None:
    assert str(failure(410)) == (
        f"{URL_SHOWN} answered 410 Gone; change the URL of trigger billing, or run "
        "`pgbackend subscriptions resume billing`"
    )


@pytest.mark.parametrize("text", ["17", " 17 ", "017"])
def test_retry_after_may_be_seconds(text: str) -> None:
    found = failure(503, retry_after=text)
    assert isinstance(found, RetryAfter)
    assert found.delay == 17


def test_retry_after_may_be_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=600)
    found = failure(503, retry_after=format_datetime(later, usegmt=True))
    assert isinstance(found, RetryAfter)
    assert 500 < found.delay <= 600


@pytest.mark.parametrize(
    "text",
    [
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "Sun, 06 Nov 1994 08:49:37 -0500",
    ],
)
def test_a_date_in_the_past_means_no_wait_in_each_form_of_a_date(text: str) -> None:
    found = failure(429, retry_after=text)
    assert isinstance(found, RetryAfter)
    assert found.delay == 0


@pytest.mark.parametrize("text", ["soon", "-5", "1.5", "", "٣", "Sun, 99 Nov 1994 08:49:37 GMT"])
def test_a_malformed_retry_after_is_ignored(text: str) -> None:
    assert type(failure(503, retry_after=text)) is TargetError


def test_a_failure_carries_knative_s_attributes() -> None:
    assert failure(500, b"no \x00 \xff thanks").details == {
        "knativeerrordest": URL_SHOWN,
        "knativeerrorcode": "500",
        "knativeerrordata": "bm8gACD/IHRoYW5rcw==",
    }


def test_a_long_body_is_cut_at_1024_characters_of_base64() -> None:
    assert len(failure(400, b"x" * 100_000).details["knativeerrordata"]) == 1024


def test_no_answer_counts_as_knative_counts_it() -> None:
    found = outcomes.no_answer("connection refused", url=URL_SHOWN)
    assert outcomes.status_of(found) is None
    assert found.details["knativeerrorcode"] == "500"
    assert b64decode(found.details["knativeerrordata"]) == b"dispatch error: connection refused"


def test_the_reason_of_a_broken_response_is_one_short_line() -> None:
    quoted = aiohttp.ClientPayloadError("malformed:\n\n  b'" + "x" * 1000 + "'\n    ^")
    reason = outcomes.why_broken(quoted, timeout=2.5)
    assert reason.startswith("malformed: b'xxx")
    assert len(reason) == 200
    assert outcomes.why_broken(TimeoutError(), timeout=2.5) == "no response within 2.5 s"
    assert outcomes.why_broken(OSError(), timeout=2.5) == "OSError"


def test_the_public_url_has_no_user_query_or_fragment() -> None:
    assert (
        outcomes.public_url(URL("http://me:secret@target:81/orders?token=secret#secret")) == "http://target:81/orders"
    )
