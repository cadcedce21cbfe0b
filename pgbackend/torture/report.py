"""The report on a run, for people: as text, and as Markdown. Pure."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pgbackend.torture.plan import Plan
from pgbackend.torture.verdict import RULES, SECOND, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run and its verdict."""

    plan: Plan
    server: str
    """What it ran on."""
    verdict: Verdict
    drained: float
    """Seconds from the end of producing until everything was settled."""

    def text(self) -> str:
        """As a terminal shows it."""
        parts = [self._title(), ""]
        width = max(len(name) for name, _ in self._figures())
        parts += [f"{name:<{width}}  {value}" for name, value in self._figures()]
        parts += ["", *_columns([_HEAD, *self._subscriptions()]), ""]
        width = max(map(len, RULES))
        for rule, ruling in self.verdict.rulings.items():
            parts.append(f"{rule:<{width}}  {self._judged(rule)}")
            parts += [f"    {line}" for line in ruling.evidence]
        return "\n".join(parts)

    def markdown(self) -> str:
        """The same as a page."""
        parts = [f"# {self._title()}", "", "| figure | |", "|---|---|"]
        parts += [f"| {name} | {value} |" for name, value in self._figures()]
        parts += ["", f"| {' | '.join(_HEAD)} |", f"|{'---|' * len(_HEAD)}"]
        parts += [f"| {' | '.join(row)} |" for row in self._subscriptions()]
        parts += ["", "| promise | verdict |", "|---|---|"]
        parts += [f"| {rule} | {self._judged(rule)} |" for rule in self.verdict.rulings]
        for rule, ruling in self.verdict.rulings.items():
            if ruling.evidence:
                parts += ["", f"## {rule}", "", *(f"    {line}" for line in ruling.evidence)]
        plan = f"`pgbackend torture --minutes {self.plan.seconds / 60:g} --seed {self.plan.seed} --plan`"
        parts += ["", f"What was done to whom, and when: {plan} (with `--dsn` where there was one)."]
        return "\n".join([*parts, ""])

    def _title(self) -> str:
        kept = "every promise was kept" if self.verdict.kept else "PROMISES WERE BROKEN"
        return f"pgbackend torture, seed {self.plan.seed}, {self.plan.seconds:g} s: {kept}"

    def _figures(self) -> Sequence[tuple[str, str]]:
        verdict = self.verdict
        outcomes = verdict.outcomes
        takeovers = [nanoseconds / SECOND for nanoseconds in verdict.takeovers]
        return [
            ("ran on", self.server),
            ("blows", ", ".join(f"{count} × {kind}" for kind, count in sorted(verdict.blows.items())) or "none"),
            ("events acknowledged", f"{outcomes['acknowledged']:,}"),
            ("refused, rolled back", f"{outcomes['refused']:,}, {outcomes['rolled back']:,}"),
            ("uncertain", f"{outcomes['uncertain']:,}, {verdict.uncertain_stored:,} of them in the log"),
            ("in the log", f"{verdict.stored:,}"),
            ("offset commits", f"{verdict.commits:,}"),
            ("takeovers of a shard", _takeovers(takeovers)),
            ("ended beside the new owner", f"{verdict.finished_beside:,} handlings that had begun before"),
            (
                "begun beside the new owner",
                f"{verdict.begun_waking:,} on waking, {verdict.begun_unaware:,} before the loss was heard of",
            ),
            ("lost or starved without a blow", f"{verdict.unprovoked:,}"),
            ("settled after the last event", f"{self.drained:.1f} s"),
        ]

    def _subscriptions(self) -> list[tuple[str, ...]]:
        return [
            (
                name,
                f"{tally.handled:,}",
                f"{tally.retries:,}",
                f"{tally.letters:,}",
                f"{tally.late:,}",
                _causes(tally.repeats),
                f"{tally.longest_gap / SECOND:.1f} s",
            )
            for name, tally in self.verdict.tallies.items()
        ]

    def _judged(self, rule: str) -> str:
        ruling = self.verdict.rulings[rule]
        if ruling.violations:
            return f"BROKEN {ruling.violations:,} times in {ruling.checked:,}"
        return f"kept, {ruling.checked:,} times"


_HEAD = ("subscription", "handled", "retries", "dead letters", "late", "repeats by cause", "longest gap")


def _takeovers(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    return f"{len(seconds):,}: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s after the blow"


def _causes(causes: Counter[str]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in causes.most_common()) or "none"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
