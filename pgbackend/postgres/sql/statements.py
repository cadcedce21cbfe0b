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
    append_one_and_notify: str
    append_one_fresh: str
    claim_keys: str
    claim_new_keys: str
    find_blocked: str
    read_page: str
    read_page_and_holes: str
    read_large: str
    find_page: str
    find_position: str
    find_holes: str
    find_segments: str
    find_kept: str
    find_incarnation: str
    compare_landmarks: str
    end_incarnation: str
    begin_incarnation: str
    notify: str
    free_notifications: str


@dataclass(frozen=True, slots=True)
class OutboxSql:
    append_rows: str
    notify_at_commit: str
    notify_after_commit: str


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
    read_clock: str
    bound_transactions: str


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
    list_groups: str
    purge_letters: str
    redeliver_letters: str
    find_start: str
    report_survival: str
    report_survival_of_letter: str
    report_outlived: str


@dataclass(frozen=True, slots=True)
class RetriesSql:
    list_waiting: str
    retry_now: str
    find_requests: str
    find_due_among: str


@dataclass(frozen=True, slots=True)
class SubscriptionsSql:
    find_subscription: str
    create_subscription: str
    delete_subscription: str


@dataclass(frozen=True, slots=True)
class PausesSql:
    pause: str
    resume: str
    pause_for_dispatcher: str
    change_target: str


@dataclass(frozen=True, slots=True)
class ShardsSql:
    read_shards: str
    find_waiting: str
    find_events: str
    count_events: str
    count_by_key: str
    count_waiting: str
    swap_shards: str
    find_standing: str
    skip_event: str
    set_start_bound: str
    request_drain: str
    renew_drain: str
    refuse_drain: str
    end_drain: str
    find_owners: str


@dataclass(frozen=True, slots=True)
class OverviewSql:
    find_figures: str
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
class DeduplicationSql:
    find_window: str
    store_window: str
    forget_keys: str


@dataclass(frozen=True, slots=True)
class RetentionSql:
    find_retention: str
    store_retention: str
    bound_pauses: str
    cut_segment: str
    empty_segment: str
    remove_segments: str
    forget_letters: str
    forget_removed: str
    find_holders: str


@dataclass(frozen=True, slots=True)
class RedactionSql:
    redact: str


@dataclass(frozen=True, slots=True)
class SchemaSql:
    find_revision: str
    find_unversioned: str


@dataclass(frozen=True, slots=True)
class DoctorSql:
    limit_transaction: str
    describe_session: str
    list_settings: str
    find_capacity: str
    find_synchrony: str
    list_sessions: str
    list_prepared: str
    list_slots: str
    list_standbys: str
    list_appenders: str
    list_lock_waits: str
    list_notification_holders: str
    find_notify_waits: str
    list_tables: str
    list_segments: str
    list_privileges: str
    list_additions: str
    list_columns: str
    list_constraints: str
    list_routines: str
    find_rights: str
    list_subscriptions: str
    list_losses: str
    find_retention_state: str
    find_old_keys: str
    list_workers: str
    find_newest_event: str


@dataclass(frozen=True, slots=True)
class ConsoleSql:
    limit_reading: str
    show_log: str
    show_appenders: str
    show_subscriptions: str
    show_subscription: str
    show_shards: str
    show_waiting: str
    show_workers: str
    show_minutes: str
    show_backlogs: str
    show_head: str
    read_in_order: str
    search_events: str
    show_event: str
    show_buried_event: str
    show_outcomes: str
    show_data: str
    show_buried_data: str
    show_letters: str
    count_letters: str
