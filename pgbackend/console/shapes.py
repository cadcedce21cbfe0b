"""Shapes readings into the JSON that the console's page gets. Pure.

The promise: a number that JavaScript could change (a position, an id, a count of bytes) is a text, and the data of an
event is the text that came in, which nothing here parses.
"""

import base64
import codecs
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pgbackend.codec.data import kind_of
from pgbackend.console.readings import History, Overview, Page, Story, Subscription
from pgbackend.delivery.history import parse_history
from pgbackend.model import DeadLetterGroup, Info
from pgbackend.postgres.connections import Record

Json = dict[str, Any]

_PREVIEW = 200
_STEPS = {"failed": "attempt failed", "buried": "dead letter"}
"""Other words for steps of a history, which say on a page what they are about."""
_REDACTED = "redacted"


def overview(found: Overview, info: Info, *, actions: bool) -> Json:
    """The answer of `overview`."""
    return {
        "now": found.log["now"],
        "schema": info.schema,
        "server": info.server,
        "version": info.version,
        "actions": actions,
        "log": {
            "head": str(found.log["head"]),
            "events_per_second": found.log["events_per_second"],
            "segments": found.log["segments"],
            "bytes_on_disk": str(found.log["bytes_on_disk"]),
            "retention": str(found.retention),
            "open_appenders": [dict(row) for row in found.appenders],
        },
        "subscriptions": [_status(row) for row in found.subscriptions],
        "workers": [{**row, "id": str(row["id"])} for row in found.workers],
    }


def history(found: History) -> Json:
    """The answer of `history`."""
    backlogs: Sequence[int | None] = found.backlogs or [None] * len(found.minutes)
    return {
        "minutes": [
            {
                "minute": row["minute"],
                "events": row["events"],
                # The present minute has just begun, perhaps.
                "events_per_second": row["events"] / max(row["seconds"], 1.0),
                "backlog": backlog,
            }
            for row, backlog in zip(found.minutes, backlogs, strict=True)
        ]
    }


def subscription(found: Subscription) -> Json:
    """The answer of `subscriptions/{name}`."""
    return {
        "subscription": _status(found.status),
        "shards": [
            {
                "shard": row["shard"],
                "shards": row["shards"],
                "position": str(row["position"]),
                "lag": row["lag_events"],
                "lag_seconds": row["lag_seconds"],
                "pending": row["pending"],
                "in_flight": row["in_flight"],
                "epoch": str(row["epoch"]),
                "owner_name": row["owner_name"],
                "until": _text(row["until"]),
            }
            for row in found.shards
        ],
        "waiting": [{**row, "position": str(row["position"])} for row in found.waiting],
        "waiting_total": found.status["redeliveries"],
    }


def _status(row: Record) -> Json:
    return {
        "name": row["name"],
        "order": row["ordering"],
        "shards": row["shards"],
        "state": row["state"],
        "owners": row["owners"],
        "lag": row["lag_events"],
        "lag_seconds": row["lag_seconds"],
        "in_flight": row["in_flight"],
        "redeliveries": row["redeliveries"],
        "dead_letters": row["dead_letters"],
        "skipped": row["skipped"],
        "last_error": row["last_error"],
        "paused": None
        if row["paused_at"] is None
        else {"at": row["paused_at"], "by": row["paused_by"], "reason": row["pause_reason"]},
    }


def events(page: Page) -> Json:
    """The answer of `events`."""
    return {
        "events": [
            {
                **{name: row[name] for name in ("id", "source", "type", "subject", "recorded_at")},
                "position": str(row["position"]),
                "size": str(row["size"] or 0),
                "preview": _preview(row["beginning"]),
            }
            for row in page.rows
        ],
        "head": str(page.head),
        "read_down_to": str(page.read_down_to),
        "more": page.more,
    }


def _preview(beginning: bytes | None) -> str | None:
    """The first characters of data; None if it is not text."""
    text = _text_of(beginning or b"", is_all=False)
    return None if text is None else text[:_PREVIEW]


def event(story: Story) -> Json:
    """The answer of `events/{position}`."""
    return {
        "event": {
            "position": str(story.event.position),
            "recorded_at": story.event.recorded_at,
            "attributes": story.event.attributes_text,
            "data": _data(story),
            "redacted": story.encoding == _REDACTED,
        },
        "subscriptions": [_outcome(story.event.position, story.event.recorded_at, row) for row in story.outcomes],
    }


def _data(story: Story) -> Json:
    data = story.event.data_bytes
    shown: Json = {"text": None, "base64": None, "size": str(story.size or 0), "truncated": False}
    if data is None:
        return {"kind": "none", **shown}
    shown["truncated"] = (story.size or 0) > len(data)
    text = _text_of(data, is_all=not shown["truncated"])
    if text is None:
        return {"kind": "binary", **shown, "base64": base64.b64encode(data).decode()}
    is_json = "json" in (story.encoding, kind_of(story.event.get_datacontenttype()))
    return {"kind": "json" if is_json else "text", **shown, "text": text}


def _text_of(data: bytes, *, is_all: bool) -> str | None:
    """The data as text, without a character that is cut off unless this is all of it. None if it is not text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=is_all)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _outcome(position: int, recorded_at: datetime | None, row: Record) -> Json:
    letter_id = row["letter_id"]
    state = state_of(position, row)
    return {
        "name": row["name"],
        "state": state,
        "attempts": row["letter_attempts"] or 0 if row["due_at"] is None else row["attempt"],
        "due_at": row["letter_due_at"] if row["due_at"] is None else row["due_at"],
        "letter_id": _text(letter_id),
        "timeline": [
            _moment(recorded_at, "recorded"),
            *(_letter_steps(row) if letter_id is not None else ()),
            *(_waiting_steps(row) if row["due_at"] is not None else ()),
            *([_moment(row["skipped_at"], "skipped")] if row["skipped_at"] is not None else ()),
            *([_moment(None, "settled")] if state == "settled" else ()),
        ],
    }


def _letter_steps(row: Record) -> list[Json]:
    steps = _steps(row["letter_history"])
    if not {"dead letter", "skipped"} & {step["what"] for step in steps}:
        # It became one before the log kept histories.
        steps.append(
            _moment(row["buried_at"], "dead letter", attempt=row["letter_attempts"], error=row["letter_error"])
        )
    if row["letter_due_at"] is not None:
        steps.append(_moment(row["letter_due_at"], "due again"))
    return steps


def _waiting_steps(row: Record) -> list[Json]:
    steps = _steps(row["history"])
    if not steps and row["attempt"]:
        # As above: the last failure is all that is known.
        steps.append(_moment(None, "attempt failed", attempt=row["attempt"], error=row["last_error"]))
    return [*steps, _moment(row["due_at"], "due again")]


def _steps(history: str) -> list[Json]:
    return [
        _moment(entry.at, _STEPS.get(entry.what, entry.what), attempt=entry.attempt, error=entry.error)
        for entry in parse_history(history)
    ]


def state_of(position: int, row: Mapping[str, Any] | Record) -> str:
    """The state of the event at `position` in the subscription of this row of `show_outcomes`.

    As `subscriptions.skipping` decides it: settled is what is neither pending nor above the offset of its shard.
    """
    if row["due_at"] is not None:
        return "waiting"
    if row["letter_id"] is not None:
        return "dead letter"
    if row["skipped_at"] is not None:
        return "skipped"
    if row["is_pending"]:
        # A hole is a position that was open when the offset passed it. Without a worker nothing is at work.
        return "in flight" if row["is_run"] and not row["is_hole"] else "open"
    if position > row["reached"] and not row["is_complete"]:
        return "not read yet"
    return "settled"


def _moment(at: datetime | None, what: str, *, attempt: int | None = None, error: str | None = None) -> Json:
    return {"at": at, "what": what, "attempt": attempt, "error": error}


def groups(found: Sequence[DeadLetterGroup]) -> Json:
    """The answer of `dead-letter-groups`."""
    names = ("name", "subscription", "letters", "due", "first_at", "last_at", "error")
    return {
        "groups": [{name: getattr(group, name) for name in names} for group in found],
        "total": sum(group.letters for group in found),
    }


def letters(rows: Sequence[Record], limit: int) -> Json:
    """The answer of `dead-letters`, from up to `limit` letters and one more if there are more."""
    return {
        "letters": [
            {
                "id": str(row["letter_id"]),
                "position": _text(row["position"]),
                "event_id": row["id"],
                "details": json.loads(row["details"]),
                "group": row["failure_group"],
                **{
                    name: row[name]
                    for name in ("subscription", "source", "type", "attempts", "error", "buried_at", "due_at")
                },
            }
            for row in rows[:limit]
        ],
        "more": len(rows) > limit,
    }


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)
