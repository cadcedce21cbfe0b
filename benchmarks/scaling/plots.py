"""The plots of docs/scale.md."""

from pathlib import Path
from typing import Any

from benchmarks.scaling.runs import Row
from benchmarks.scaling.sections import Panel, Section, middle

try:
    import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]  # comes with an extra
    from matplotlib import figure, ticker  # type: ignore[import-not-found, unused-ignore]  # as above
except ImportError:
    raise SystemExit('matplotlib is not installed. Run `.venv/bin/pip install -e ".[bench]"`.') from None


def draw(file: Path, section: Section, rows: list[Row]) -> None:
    """Draw the panels of one run beside each other. The same figures make the same file."""
    mpl.rcParams.update({"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9})
    canvas = figure.Figure(figsize=(4.2 * min(len(section.panels), 2), 3.2 * ((len(section.panels) + 1) // 2)))
    for number, panel in enumerate(section.panels):
        axes = canvas.add_subplot((len(section.panels) + 1) // 2, min(len(section.panels), 2), number + 1)
        _draw_panel(axes, section, panel, rows)
    canvas.tight_layout()
    canvas.savefig(file, format="svg", metadata={"Date": None})


def _draw_panel(axes: Any, section: Section, panel: Panel, rows: list[Row]) -> None:
    for line in panel.lines:
        points = [(section.x(row), line.figure(row)) for row in rows]
        points = [(x, value if isinstance(value, list) else [value]) for x, value in points if value is not None]
        xs = [x for x, _ in points]
        middles = [middle(values) for _, values in points]
        spread = [
            [center - min(values) for center, (_, values) in zip(middles, points, strict=True)],
            [max(values) - center for center, (_, values) in zip(middles, points, strict=True)],
        ]
        style = "o-" if len(xs) < 20 else "-"
        axes.errorbar(xs, middles, yerr=spread, fmt=style, markersize=4, capsize=2, linewidth=1.2, label=line.label)
    if panel.limit is not None:
        axes.axhline(panel.limit, linestyle="--", color="grey", linewidth=1, label="goal: below this")
    if held := [section.x(row) for row in rows if row.get("held")]:
        first = next((section.x(row) for row in reversed(rows) if section.x(row) < held[0]), 0)
        axes.axvspan(first, held[-1], color="lightgrey", alpha=0.5)
    if section.is_logarithmic:
        axes.set_xscale("log")
        name = next(iter(section.columns.values()))
        axes.set_xticks([section.x(row) for row in rows], [name(row) for row in rows])
        axes.minorticks_off()
    if panel.is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_title(panel.title)
    axes.set_xlabel(section.x_label)
    axes.set_ylabel(panel.unit)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
