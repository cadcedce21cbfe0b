"""The report on a run, for people: as text, and as Markdown. Pure."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pgbackend.torture.plan import Plan
from pgbackend.torture.verdict.rulings import SECOND, Ruling, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run and its verdict."""

    plan: Plan
    server: str
    """The machine and the server."""
    verdict: Verdict
    drained: float
    """Seconds from the end of producing until everything was settled."""

    def text(self) -> str:
        """For a terminal."""
        figures = self._figures()
        width = max(len(name) for name, _ in figures)
        parts = [self._title(), "", *(f"{name:<{width}}  {value}" for name, value in figures)]
        parts += ["", *_columns(self._subscriptions()), ""]
        width = max(map(len, self.verdict.rulings))
        for rule, ruling in self.verdict.rulings.items():
            parts.append(f"{rule:<{width}}  {_describe(ruling)}")
            parts += [f"    {line}" for line in ruling.evidence]
        return "\n".join(parts)

    def markdown(self) -> str:
        """As a page."""
        parts = [f"# {self._title()}", "", "| figure | |", "|---|---|"]
        parts += [f"| {name} | {value} |" for name, value in self._figures()]
        head, *rows = self._subscriptions()
        parts += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        parts += [f"| {' | '.join(row)} |" for row in rows]
        parts += ["", "| promise | verdict |", "|---|---|"]
        parts += [f"| {rule} | {_describe(ruling)} |" for rule, ruling in self.verdict.rulings.items()]
        for rule, ruling in self.verdict.rulings.items():
            if ruling.evidence:
                parts += ["", f"## {rule}", "", *(f"    {line}" for line in ruling.evidence)]
        plan = (
            f"`pgbackend torture --plan {self.plan.name} --minutes {self.plan.seconds / 60:g} "
            f"--seed {self.plan.seed} --print-plan`"
        )
        parts += ["", f"The faults: {plan} (with `--dsn`, if the run had one)."]
        return "\n".join([*parts, ""])

    def _title(self) -> str:
        verdict = self.verdict
        match verdict.outcome:
            case "kept":
                text = "every promise was kept"
            case "broken":
                text = "PROMISES WERE BROKEN"
            case _:
                text = "NOT JUDGED: " + "; ".join(
                    (*verdict.void, *(f"the machine had a {one}" for one in verdict.stalls))
                )
        return f"pgbackend torture, plan {self.plan.name}, seed {self.plan.seed}, {self.plan.seconds:g} s: {text}"

    def _figures(self) -> Sequence[tuple[str, str]]:
        verdict, outcomes = self.verdict, self.verdict.outcomes
        return [
            ("ran on", self.server),
            ("faults", _counts(verdict.faults)),
            ("events acknowledged", f"{outcomes['acknowledged']:,}"),
            ("refused, rolled back", f"{outcomes['refused']:,}, {outcomes['rolled back']:,}"),
            ("uncertain", f"{outcomes['uncertain']:,}, {verdict.uncertain_stored:,} of them in the log"),
            ("in the log", f"{verdict.stored:,}"),
            ("offset commits", f"{verdict.commits:,}"),
            *(self._leases() if self.plan.name == "log" else self._transactions()),
            ("the machine stood still", "; ".join((*verdict.stalls, *verdict.void)) or "never"),
            ("settled after the last event", f"{self.drained:.1f} s"),
        ]

    def _transactions(self) -> Sequence[tuple[str, str]]:
        return [("transactions in doubt", f"{self.verdict.doubts:,}: COMMIT was not answered, or the lease was lost")]

    def _leases(self) -> Sequence[tuple[str, str]]:
        verdict, overlaps = self.verdict, self.verdict.overlaps
        return [
            ("takeovers of a shard", _takeovers([nanoseconds / SECOND for nanoseconds in verdict.takeovers])),
            ("overlaps with the new owner", f"{overlaps.finished:,} dispatches had started before"),
            (
                "started after the takeover",
                f"{overlaps.about_to_start:,} just about to start, {overlaps.unaware:,} before the loss was heard of",
            ),
            ("attempts that count unseen", _counts(verdict.counted)),
            ("unplanned, excuses nothing", _counts(verdict.unplanned)),
        ]

    def _subscriptions(self) -> Sequence[tuple[str, ...]]:
        if self.verdict.table:
            return self.verdict.table
        return [_HEAD] + [
            (
                name,
                f"{tally.handled:,}",
                f"{tally.retries:,}",
                f"{tally.letters:,}",
                f"{tally.late:,}",
                _counts(tally.repeats),
                f"{tally.longest_gap / SECOND:.1f} s",
            )
            for name, tally in self.verdict.tallies.items()
        ]


_HEAD = ("subscription", "handled", "retries", "dead letters", "late", "repeats by cause", "longest gap")


def _describe(ruling: Ruling) -> str:
    if ruling.violations:
        return f"BROKEN {ruling.violations:,} times in {ruling.checked:,}"
    if ruling.unjudged:
        return f"NOT JUDGED {ruling.unjudged:,} times in {ruling.checked:,}"
    return f"kept, {ruling.checked:,} times"


def _takeovers(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds):,}: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s after the fault"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} × {what}" for what, count in sorted(counts.items())) or "none"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
