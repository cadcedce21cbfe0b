"""The patterns of LIKE: `%` is any text, `_` is any character, a backslash before one of them stands for itself.

`parser.py` splits a pattern into runs, the parts between the `%`, and turns them into a matcher. The promise: matching
takes time proportional to the text times the longest run, because no part of the text is tried twice for one run.
"""

import re
from collections.abc import Callable, Sequence


def runs_of(pattern: str) -> list[list[str]]:
    """The runs of a pattern, as lists of characters: `_` is any character, and an escaped one keeps its backslash."""
    runs: list[list[str]] = [[]]
    for part in re.findall(r"\\[%_]|.", pattern, re.DOTALL):
        if part == "%":
            runs.append([])
        else:
            runs[-1].append(part)
    return runs


def matcher(runs: Sequence[Sequence[str]]) -> Callable[[str], bool]:
    """Whether a text begins with the first run, ends with the last, and has the others between them, in order.

    The first place where a run is found is as good as any later one, so no place is tried again. As one regular
    expression, each `%` would multiply the time by the length of the text.
    """
    first, first_size = _finder(runs[0]), len(runs[0])
    if len(runs) == 1:
        return lambda text: len(text) == first_size and first(text, 0, first_size) == 0
    last, last_size = _finder(runs[-1]), len(runs[-1])
    between = [(_finder(run), len(run)) for run in runs[1:-1] if run]

    def matches(text: str) -> bool:
        at, end = first_size, len(text) - last_size
        if end < at or first(text, 0, at) != 0 or last(text, end, len(text)) != end:
            return False
        for find, size in between:
            at = find(text, at, end)
            if at < 0:
                return False
            at += size
        return True

    return matches


def _finder(run: Sequence[str]) -> Callable[[str, int, int], int]:
    """`str.find` for a run, in which `_` is any character."""
    if "_" not in run:
        plain = "".join(part[-1] for part in run)
        return lambda text, start, end: text.find(plain, start, end)
    search = re.compile("".join("." if part == "_" else re.escape(part[-1]) for part in run), re.DOTALL).search
    return lambda text, start, end: found.start() if (found := search(text, start, end)) else -1
