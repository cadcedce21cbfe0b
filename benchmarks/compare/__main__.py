"""pgbackend beside its peers: seven measurements of each system, on this machine, in one run.

    python -m benchmarks.compare
    python -m benchmarks.compare --systems bare,pgbackend,redis --rounds 5 --json compare.json --plots plots

Appends: one event at a time; 32 tasks in one process; batches of 1,000. Reads a backlog: by one process, and by four.
Latency: from one process to another at 100 events a second. Both at once: one process produces batches while another
one consumes. Every system gets the same 500 bytes and a handler that gets the data. What is acknowledged is on the
disk, where the table does not say otherwise. A run with three rounds takes about ten minutes on two cores. Machines are
noisy: compare the ratios, and look at the spread.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
from pathlib import Path

from benchmarks.compare.report import Report
from benchmarks.compare.runner import run
from benchmarks.compare.systems import NAMES


def main() -> int:
    options = _parser().parse_args()
    if options.plots and not importlib.util.find_spec("matplotlib"):
        _tell("--plots needs matplotlib: pip install '.[bench]'")
        return 2
    report = asyncio.run(run(options.systems, rounds=options.rounds, seconds=options.seconds, progress=_tell))
    print(report.markdown())
    if options.json:
        options.json.write_text(json.dumps(report.data(), indent=2, ensure_ascii=False) + "\n")
    if options.plots:
        from benchmarks.compare import plots  # noqa: PLC0415 - matplotlib comes with an extra

        for path in plots.write(report, options.plots):
            _tell(f"wrote {path}")
    return _status(report)


def _status(report: Report) -> int:
    """1 when a measurement has failed. A system that cannot run here is no failure."""
    return int(any(row.failures for row in report.rows.values()))


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(NAMES)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how many of each measurement; the medians are shown")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long an append takes; all else scales with it")
    parser.add_argument("--systems", type=_names, default=list(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    parser.add_argument("--plots", type=Path, help="write an SVG for each measurement into this directory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
