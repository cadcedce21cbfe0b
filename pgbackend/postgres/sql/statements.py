"""One frozen dataclass for each `.sql` file, with a field for each statement. `load()` compares the two."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrimariesSql:
    examine_server: str
    find_timeline: str


@dataclass(frozen=True, slots=True)
class ConnectionsSql:
    prepare_session: str
    hides_warnings: str


@dataclass(frozen=True, slots=True)
class LogSql:
    append_one: str
    read_page: str
    read_page_and_holes: str
    read_large: str
    find_page: str
    find_position: str
    find_holes: str
    find_segments: str
    find_incarnation: str
    compare_landmarks: str
    end_incarnation: str
    begin_incarnation: str
    notify: str
    free_notifications: str


@dataclass(frozen=True, slots=True)
class FenceSql:
    take_evidence: str
    describe_appenders: str


@dataclass(frozen=True, slots=True)
class RequirementsSql:
    find_properties: str
    find_distributed: str
    open_appender: str


@dataclass(frozen=True, slots=True)
class OffsetsSql:
    commit_offsets: str
    commit_by_key: str


@dataclass(frozen=True, slots=True)
class LeasesSql:
    renew: str
    find_worker: str
    announce: str
    survey_workers: str
    survey_shards: str
    claim: str
    release: str
    leave: str
    delete_dead_workers: str


@dataclass(frozen=True, slots=True)
class RedeliverySql:
    find_due: str
    find_gone: str
    find_due_letters: str
    find_attempts: str
    list_letters: str
    redeliver_letters: str
    find_start: str
    report_survival: str
    report_survival_of_letter: str
    report_outlived: str


@dataclass(frozen=True, slots=True)
class SubscriptionsSql:
    find_subscription: str
    create_subscription: str
    delete_subscription: str


@dataclass(frozen=True, slots=True)
class ShardsSql:
    read_shards: str
    find_waiting: str
    find_events: str
    swap_shards: str
    set_start_bound: str
    request_drain: str
    renew_drain: str
    refuse_drain: str
    end_drain: str
    find_owners: str


@dataclass(frozen=True, slots=True)
class OverviewSql:
    list_status: str
    find_extremes: str


@dataclass(frozen=True, slots=True)
class LogCheckSql:
    examine: str
    write: str


@dataclass(frozen=True, slots=True)
class SegmentsSql:
    find_reach: str
    make_segment: str


@dataclass(frozen=True, slots=True)
class SchemaSql:
    find_revision: str
    find_unversioned: str
