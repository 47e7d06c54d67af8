"""Charts of a report, drawn by Matplotlib: SVG inside the page, PDF and PNG files beside it.

Matplotlib is imported when the first chart is drawn, which takes half a second. pyplot is not used: it has
a global state and may open a display. Lengths are in points.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dwt_jax.files import atomic_write
from dwt_jax.text_format import format_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1f24", "#59636e", "#dfe3e8"
LINE_COLOURS = (INK, "#0b62a4", "#b84a00", "#00795a", "#a3447f", "#2b7fae", "#8a6800")
"""The first is the baseline's. A page has a variable for each colour: `--c0`, …, `--muted`, `--rule`."""
DASHES: tuple[Any, ...] = ("solid", (0, (1, 2)), (0, (5, 2.5)))
WIDE, SMALL, FONT_SIZE, ROW = 620.0, 300.0, 8.5, 12.0  # widths of the charts; height of a label
STYLE = {
    "font.family": "DejaVu Sans",  # Matplotlib has it
    "text.parse_math": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-5, 7),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.markersize": 3,
    "text.color": INK,
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor"), MUTED),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), FONT_SIZE),
    "legend.fontsize": FONT_SIZE,
}


class ChartLine(NamedTuple):
    """One curve. Points that are not finite are skipped."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    spread: Sequence[float] = ()  # half the height of each point's error bar; empty: no bars


class Chart(NamedTuple):
    """Curves and their axes, in the units of the data."""

    title: str
    lines: Sequence[ChartLine]
    x_label: str
    y_label: str
    caption: str = ""
    x_scale: float = 1.0  # data units in one unit of x_label
    reference_lines: Sequence[tuple[str, float]] = ()  # dashed horizontal lines
    band: float = 0.0  # half the width of a shaded band around 0
    cut: bool = False  # crop the first part of the curves if it is far above the rest
    signed: bool = False  # print values with their sign
    decimals: int = 3  # of the values in end labels and tool tips
    from_zero: bool = False
    step_line: Sequence[tuple[float, float]] = ()  # (x, y), increasing: a dashed step line
    is_panel: bool = False  # small in a page, beside others

    @property
    def name(self) -> str:
        """The title as a file name."""
        return "-".join(re.findall(r"\w+", self.title.lower()))


def line_styles(
    baseline: str | None, others: Iterable[str], alike: Iterable[str] = ()
) -> dict[str, tuple[int, int]]:
    """Return (colour, dash) by name: colour 0 for the baseline and, dashed, those that are `alike`."""
    colours, dashes = len(LINE_COLOURS) - 1, len(DASHES)
    styles = {} if baseline is None else {baseline: (0, 0)}
    styles |= {name: (1 + i % colours, i // colours % dashes) for i, name in enumerate(others)}
    return styles | {name: (0, 1 + i % (dashes - 1)) for i, name in enumerate(alike)}


def flop_unit(largest: float) -> tuple[float, str]:
    """Return (FLOPs per unit, its name) such that `largest` is a number from 1 to 999."""
    thousands = min(max(int(math.log10(max(largest, 1.0))) // 3, 2), 7)
    return 1000.0**thousands, f"{'kMGTPEZ'[thousands - 1]}FLOPs"


def flop_chart(title: str, lines: Sequence[ChartLine], y_label: str, caption: str, **more: Any) -> Chart:
    """Return a chart whose horizontal axis is FLOPs. UNIT in the caption is its unit."""
    size, unit = flop_unit(max((x for line in lines for x in line.x), default=1.0))
    return Chart(title, lines, unit, y_label, caption.replace("UNIT", unit), x_scale=size, **more)


def dodge_labels(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near `targets` without overlap.

    They keep the order, are at least `gap` apart and, as long as they fit, in [low, high].
    """
    order, shifts = np.argsort(targets, kind="stable"), gap * np.arange(len(targets))
    rising = np.maximum.accumulate(np.maximum(np.asarray(targets)[order], low) - shifts) + shifts
    falling = np.minimum.accumulate((np.minimum(rising, high) - shifts)[::-1])[::-1] + shifts
    return [float(x) for x in falling[np.argsort(order)]]


def downsample(
    x: Sequence[float], y: Sequence[float], max_points: int = 120
) -> tuple[list[float], list[float]]:
    """Average neighbouring points to get at most `max_points`."""
    size = -(-len(x) // max_points) if x else 1
    groups = [slice(i, i + size) for i in range(0, len(x), size)]
    return [sum(x[g]) / len(x[g]) for g in groups], [sum(y[g]) / len(y[g]) for g in groups]


def file_names(charts: Iterable[Chart]) -> list[str]:
    """Return the names of the charts' files without suffix, no two of which are equal."""
    names: list[str] = []
    for chart in charts:
        numbered = (chart.name, *(f"{chart.name}-{i}" for i in range(2, len(names) + 2)))
        names.append(next(name for name in numbered if name not in names))
    return names


def finite_charts(charts: Iterable[Chart]) -> list[Chart]:
    """Return charts in units of their axes, without points that are not finite and charts without points."""
    return [chart for chart in map(_finite_chart, charts) if chart.lines]


def _finite_chart(chart: Chart) -> Chart:
    lines = []
    for line in chart.lines:
        points = zip(line.x, line.y, line.spread or [0.0] * len(line.x), strict=True)
        finite = [(x / chart.x_scale, y, s) for x, y, s in points if math.isfinite(x) and math.isfinite(y)]
        if finite:
            x, y, spread = zip(*finite, strict=True)
            lines.append(line._replace(x=x, y=y, spread=spread))
    steps = [(x / chart.x_scale, y) for x, y in chart.step_line]
    return chart._replace(lines=lines, step_line=steps, x_scale=1.0)


def draw_chart(chart: Chart, small: bool = False) -> "Figure":
    """Draw a chart with values and names at the ends of its curves.

    Args:
        chart: one of what `finite_charts` returned.
        small: draw it for a narrow screen, with a legend below.
    """
    from matplotlib.figure import Figure

    labels = [line.label for line in chart.lines] + [name for name, _ in chart.reference_lines]
    width, left, top, bottom = (SMALL if small else WIDE), 50.0, 8.0, 34.0
    plot_height = 170.0 if small else max(192.0, ROW * len(labels))
    with _style():
        value_width = 1.15 * max(_text_width(_end_value(line, chart)) for line in chart.lines)  # bold
        label_width = 24 + value_width + max(map(_text_width, labels))
        right = 10.0 if small else min(0.43 * width, label_width)
        legend_height = 11.2 * len(labels) + 4 if small else 0.0
        height = top + plot_height + bottom + legend_height
        figure = Figure((width / 72, height / 72), dpi=72)
        sides = left / width, (bottom + legend_height) / height, 1 - right / width, 1 - top / height
        figure.subplots_adjust(*sides)
        axes = figure.add_subplot()
        _draw_axes(axes, chart)
        if small:
            spacing = {"frameon": False, "labelspacing": 0.3, "borderaxespad": 0.2}
            # Given explicitly: Matplotlib leaves out names that begin with an underscore.
            handles = [line for line in axes.get_lines() if line.get_label() in labels]
            legend = figure.legend(handles, labels, loc="lower left", **spacing)
            for text in legend.get_texts():
                text.set_text(_fit(text.get_text(), width - 36))
        else:
            _label_ends(axes, chart, value_width, right)
    return figure


def _draw_axes(axes: "Axes", chart: Chart) -> None:
    """Draw axes, curves with their points and error bars, the band and reference lines."""
    last = 1.012 * (max(max(line.x) for line in chart.lines) or 1.0)
    axes.set(xlim=(0, last), ylim=_y_range(chart), xlabel=chart.x_label, ylabel=chart.y_label)
    axes.locator_params("x", nbins=max(2, int(axes.get_window_extent().width / 60)))
    axes.locator_params("y", nbins=6)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    dashed: dict[str, Any] = {"color": MUTED, "linewidth": 1.1, "linestyle": (0, (4, 3)), "zorder": 1.8}
    for z, line in enumerate(chart.lines):  # the first one is on top
        style: dict[str, Any] = {"color": LINE_COLOURS[line.colour], "zorder": 3 - 0.9 * z / len(chart.lines)}
        if any(line.spread):
            axes.errorbar(line.x, line.y, line.spread, fmt="none", elinewidth=1.5, **style)
            style["markersize"] = 5
        marker = "o" if len(line.x) <= 25 else ""
        axes.plot(line.x, line.y, label=line.label, linestyle=DASHES[line.dash], marker=marker, **style)
    if chart.band:
        axes.axhspan(-chart.band, chart.band, color=MUTED, alpha=0.14, linewidth=0)
    for name, value in chart.reference_lines:
        axes.axhline(value, label=name, **dashed)
    if chart.step_line:
        axes.step(*zip(*chart.step_line, (last, chart.step_line[-1][1]), strict=True), where="post", **dashed)
    if any(y > axes.get_ylim()[1] for line in chart.lines for y in line.y):
        axes.annotate(
            "↑ starts above", (1, 0), (0, -28), "axes fraction", "offset points", ha="right", color=MUTED
        )


def _y_range(chart: Chart) -> tuple[float, float]:
    last = max(max(line.x) for line in chart.lines)
    first = 0.12 * last if chart.cut and min(len(line.x) for line in chart.lines) > 6 else 0.0
    ranges = [(value, value) for _, value in chart.reference_lines] + [(-chart.band, chart.band)] * bool(
        chart.band
    )
    ranges += [(0.0, 0.0)] * chart.from_zero
    for line in chart.lines:
        points = zip(line.x, line.y, line.spread, strict=True)
        ranges += [(y - spread, y + spread) for x, y, spread in points if x >= first]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if chart.from_zero and low == 0 else low - margin), high + margin


def _end_value(line: ChartLine, chart: Chart) -> str:
    return format_float(line.y[-1], chart.decimals, chart.signed)


def _label_ends(axes: "Axes", chart: Chart, value_width: float, label_width: float) -> None:
    """Write values and names at the ends of the curves, without overlap, with leader lines."""
    (low, high), last, box = axes.get_ylim(), axes.get_xlim()[1], axes.get_window_extent()
    ends = [(line.x[-1] / last, line.y[-1], LINE_COLOURS[line.colour]) for line in chart.lines]
    ends += [(1.0, value, MUTED) for _, value in chart.reference_lines]
    targets = [min(max(y, low), high) for _, y, _ in ends]
    heights = dodge_labels(targets, ROW * (high - low) / box.height, low, high)
    at: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    text = {**at, "verticalalignment": "center_baseline"}
    for i, ((x, _, colour), y, label_y) in enumerate(zip(ends, targets, heights, strict=True)):
        leader = [x + 3 / box.width, max(1, x) + 3 / box.width, 1 + 10 / box.width]
        axes.plot(leader, [y, y, label_y], color=colour, linewidth=0.7, alpha=0.55, **at)
        left = 12.0
        if i < len(chart.lines):
            value = _end_value(chart.lines[i], chart)
            axes.text(1 + left / box.width, label_y, value, color=colour, weight="bold", **text)
            left += value_width + 4
            name, colour = chart.lines[i].label, INK
        else:
            name = chart.reference_lines[i - len(chart.lines)][0]
        axes.text(1 + left / box.width, label_y, _fit(name, label_width - left), color=colour, **text)


def _text_width(text: str) -> float:
    """Estimate the width of a label. Fonts of pages differ; Matplotlib's is wider than most."""
    return 5.15 * len(text)


def _fit(text: str, width: float) -> str:
    """Shorten a label with an ellipsis in the middle: names of runs often differ only at the end."""
    half = max(2, int(width / _text_width("x")) // 2)
    return text if _text_width(text) <= width else f"{text[:half].rstrip()}…{text[1 - half :].lstrip()}"


@contextmanager
def _style(salt: str = "") -> Iterator[None]:
    """Set Matplotlib's parameters, independent of the user's matplotlibrc. `salt` seeds the ids in an SVG."""
    from matplotlib import style

    with style.context(["default", {**STYLE, "svg.hashsalt": salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a page has the reader's fonts
        yield


def chart_svg(chart: Chart, small: bool = False) -> str:
    """Draw an `<svg>` that uses the colours of its page, with a tool tip at each point."""
    figure, buffer = draw_chart(chart, small), io.StringIO()
    with _style(f"{chart.name} {small}"):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().partition("</metadata>")[2].rpartition("</svg>")[0]
    # Without the ids of groups, which several charts would have, and what a page does not need.
    text = re.sub(
        r""" id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"| font-family: 'DejaVu Sans';""", "", text
    )
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text).replace("xlink:href", "href")
    variables = {MUTED: "muted", RULE: "rule", **{colour: f"c{i}" for i, colour in enumerate(LINE_COLOURS)}}
    for colour, name in variables.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = figure.get_size_inches() * 72
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'role="img" aria-label="{escape(chart.title)}">{text}{"".join(_tool_tips(figure, chart))}</svg>'
    )


def _tool_tips(figure: "Figure", chart: Chart) -> Iterator[str]:
    """Yield a transparent circle with a title for each point, of a long curve for the last one."""
    axes, height = figure.axes[0], figure.get_size_inches()[1] * 72
    for line in chart.lines:
        points = [*zip(line.x, line.y, strict=True)]
        for x, y in points if len(points) <= 60 else points[-1:]:
            left, bottom = axes.transData.transform((x, y))
            value = format_float(y, chart.decimals, chart.signed)
            position = f"{x:,.0f}" if float(x).is_integer() else f"{x:,.4g}"
            tip = escape(f"{line.label}: {value} at {position} {chart.x_label}")
            if y <= axes.get_ylim()[1]:
                centre = f'cx="{left:.1f}" cy="{height - bottom:.1f}"'
                yield f'<circle {centre} r="4"><title>{tip}</title></circle>'


def write_chart_files(charts: Sequence[Chart], directory: Path) -> None:
    """Write NAME.pdf and NAME.png of each chart, and remove files of charts that no longer exist."""
    written = set()
    for chart, name in zip(charts, file_names(charts), strict=True):
        directory.mkdir(parents=True, exist_ok=True)
        figure = draw_chart(chart)
        for path, metadata in (
            (directory / f"{name}.pdf", {"Creator": _mark(f"{name}.pdf"), "CreationDate": None}),
            (directory / f"{name}.png", {"Software": _mark(f"{name}.png")}),
        ):
            written.add(path)
            with _style(), atomic_write(path) as partial:
                figure.savefig(partial, format=path.suffix[1:], dpi=200, metadata=metadata)
    for path in (*directory.glob("*.pdf"), *directory.glob("*.png")):
        with suppress(FileNotFoundError):  # another process may remove it
            if path not in written and path.is_file() and _mark(path.name).encode() in path.read_bytes():
                path.unlink()


def _mark(file_name: str) -> str:
    """The mark in the metadata of a chart's file. A copy under another name belongs to the user."""
    return f"dwt report, {hashlib.sha256(file_name.encode()).hexdigest()[:16]}"
