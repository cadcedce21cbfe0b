"""One SVG for each measurement: the systems' medians as bars, with a line from the least to the greatest figure."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.compare.measurements import MEASUREMENTS, Measurement
from benchmarks.compare.report import Report, Row

_OURS = "#1f6feb"
_PEERS = "#8c959f"


def write(report: Report, directory: Path) -> list[Path]:
    """Write the plots into this directory, which is made if it is missing. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for measurement in MEASUREMENTS:
        rows = [row for row in report.rows.values() if row.figures.get(measurement.name)]
        if rows:
            written.append(directory / f"{measurement.name}.svg")
            # No date in the file: the same figures give the same file.
            _plot(measurement, rows).savefig(written[-1], format="svg", metadata={"Date": None})
    return written


def _plot(measurement: Measurement, rows: Sequence[Row]) -> Figure:
    figures = [row.figures[measurement.name] for row in rows]
    medians = [statistics.median(one) for one in figures]
    spreads = [
        [median - min(one) for median, one in zip(medians, figures, strict=True)],
        [max(one) - median for median, one in zip(medians, figures, strict=True)],
    ]
    figure = Figure(figsize=(8, 0.5 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colours = [_OURS if "**" in row.title else _PEERS for row in rows]
    axes.barh([row.title.replace("*", "") for row in rows], medians, xerr=spreads, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_title(measurement.title, loc="left")
    is_latency = measurement.unit == "ms"
    axes.set_xlabel("ms: less is better" if is_latency else "events a second: more is better")
    if is_latency:
        axes.set_xscale("log")  # the systems differ by a factor of a hundred
        axes.set_xlim(left=0.1)
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
