"""Line charts as inline SVG, without scripts.

Colours are variables of the page's style sheet (`--c0` … `--c6`), so that one chart works in light mode,
in dark mode and in print.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from dwt_jax.text_format import format_float

COLOURS = 7  # --c0 is for the baseline, the others for the runs that are compared with it
DASHES = ("none", "2 5", "9 4")
CSS = (
    """
.chart{width:100%;height:auto;display:block;font-size:12.5px}
.chart text{fill:var(--muted)}.chart .name{font-size:12px}.chart .note{font-size:11.5px}
.chart .tick{font-variant-numeric:tabular-nums}.chart .end{fill:var(--ink)}
.chart .value{font-weight:650;fill:var(--c);font-variant-numeric:tabular-nums}
.chart .end.grey{fill:var(--muted)}
.grid{stroke:var(--rule);stroke-width:1;fill:none}.axis{stroke:var(--muted);stroke-width:1;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.leader{fill:none;stroke:var(--c);stroke-width:1;opacity:.55}.dot{fill:var(--c)}.grey{--c:var(--muted)}
.level{fill:none;stroke:var(--muted);stroke-width:1.5;stroke-dasharray:6 5}
.band{fill:var(--muted);opacity:.14}
"""
    + "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(COLOURS))
    + "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES))
)
"""Style sheet of the charts. The page must define --ink, --muted, --rule and --c0 to --c6."""
FLOP_UNITS = ((1e21, "ZFLOPs"), (1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))


class ChartLine(NamedTuple):
    """One curve. Points that are not finite are skipped."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: int = 0
    spread: Sequence[float] = ()  # half the height of each point's error bar; empty: no bars


class ChartAxes(NamedTuple):
    """Axes of a chart, in the units of its data."""

    title: str  # for screen readers
    x_label: str
    y_label: str
    x_scale: float = 1.0  # data units in one unit of x_label
    reference_lines: tuple[tuple[str, float], ...] = ()  # dashed horizontal lines
    band: float = 0.0  # half the width of a shaded band around 0
    cut: bool = False  # crop the first part of the curves if it is far above the rest
    signed: bool = False  # print values with their sign
    decimals: int = 3  # of the values in end labels and tool tips
    from_zero: bool = False
    step_line: tuple[tuple[float, float], ...] = ()  # (x, y), increasing: a dashed step line


class _Frame(NamedTuple):
    """Layout: the plot's rectangle in pixels and the ranges of the data."""

    width: int
    height: int
    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def px(self, x: float) -> float:
        return (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        return (self.y[1] - y) / (self.y[1] - self.y[0]) * (self.bottom - self.top)


def flop_unit(largest: float) -> tuple[float, str]:
    """Return (FLOPs per unit, its name) such that `largest` is a number from 1 to 999."""
    for size, name in FLOP_UNITS:
        if largest >= size:
            return size, name
    return 1e6, "MFLOPs"


def axis_ticks(low: float, high: float, target_count: int) -> list[float]:
    """Return about `target_count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / target_count))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda step: abs(span / step - target_count))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def dodge_labels(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near `targets` without overlap.

    They keep the order, are at least `gap` apart and, as long as they fit, in [low, high].
    """
    order = sorted(range(len(targets)), key=lambda i: targets[i])
    positions = [0.0] * len(targets)
    floor = low
    for i in order:
        positions[i] = floor = max(targets[i], floor)
        floor += gap
    ceiling = high
    for i in reversed(order):
        positions[i] = min(positions[i], ceiling)
        ceiling = positions[i] - gap
    return positions


def downsample(
    x: Sequence[float], y: Sequence[float], max_points: int = 120
) -> tuple[list[float], list[float]]:
    """Average neighbouring points to get at most `max_points`."""
    size = -(-len(x) // max_points) if x else 1
    groups = [slice(i, i + size) for i in range(0, len(x), size)]
    return [sum(x[g]) / len(x[g]) for g in groups], [sum(y[g]) / len(y[g]) for g in groups]


def svg_chart(
    lines: Sequence[ChartLine], axes: ChartAxes, width: int, height: int, direct: bool = True
) -> str:
    """Draw an `<svg>` of `width` × `height` pixels, '' if there are no points.

    With `direct`, names and last values are printed at the ends of the curves; without it a
    `svg_legend` is needed.
    """
    lines = [_finite(line, axes.x_scale) for line in lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    frame = _frame(lines, axes, width, height, direct)
    parts = [_grid(frame, axes)]
    content = [_band(frame, axes), *(_reference_line(frame, value) for _, value in axes.reference_lines)]
    content += [_step_line(frame, axes)]
    content += [_curve(frame, line, axes) for line in reversed(lines)]  # the first one is drawn last, on top
    # A nested svg clips its content.
    parts.append(
        f'<svg x="{frame.left:g}" y="{frame.top:g}" width="{frame.right - frame.left:g}" '
        f'height="{frame.bottom - frame.top:g}">{"".join(content)}</svg>'
    )
    parts.append(_end_labels(frame, lines, axes) if direct else _reference_line_names(frame, axes))
    if any(y > frame.y[1] for line in lines for y in line.y):
        parts.append(
            f'<text class="note" x="{frame.right:g}" y="{height - 6}" text-anchor="end">↑ starts above</text>'
        )
    kind = "wide" if direct else "small"
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(axes.title)}">{"".join(parts)}</svg>'
    )


def svg_legend(lines: Iterable[ChartLine]) -> str:
    """Return a legend of the lines' colours and dashes."""
    items = "".join(
        f'<li><svg width="26" height="10" aria-hidden="true"><path class="{_style(line)}" d="M1 5H25"/></svg>'
        f"{escape(line.label)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _finite(line: ChartLine, scale: float) -> ChartLine:
    spreads = line.spread or [0.0] * len(line.x)
    points = [
        (x / scale, y, half_height)
        for x, y, half_height in zip(line.x, line.y, spreads, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    x, y, spreads = ([point[i] for point in points] for i in range(3))
    return line._replace(x=x, y=y, spread=spreads if line.spread else ())


def _frame(lines: Sequence[ChartLine], axes: ChartAxes, width: int, height: int, direct: bool) -> _Frame:
    last = max(max(line.x) for line in lines) or 1.0
    first_x = 0.12 * last if axes.cut and min(len(line.x) for line in lines) > 6 else 0.0
    values = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if x >= first_x]
    values += [
        y + side * half_height
        for line in lines
        if line.spread
        for y, half_height in zip(line.y, line.spread, strict=True)
        for side in (-1, 1)
    ]
    values += [value for _, value in axes.reference_lines] + ([axes.band, -axes.band] if axes.band else [])
    low, high = min(values), max(values)
    if axes.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low = low if axes.from_zero and low == 0 else low - margin
    label_width = max(_text_width(_end_text(line, axes)) for line in lines) if direct else 0
    reference_widths = [_text_width(name) for name, _ in axes.reference_lines]
    label_width = max([label_width, *reference_widths]) if direct else 0
    right = width - (min(label_width + 34, 0.36 * width) if direct else 20)
    frame = _Frame(width, height, 0, 10, right, height - 44, (0.0, last * 1.012), (low, high + margin))
    return frame._replace(left=30 + max(_text_width(text) for _, text in _axis_rows(frame, axes)))


def _axis_rows(frame: _Frame, axes: ChartAxes) -> list[tuple[float, str]]:
    """Return the ticks of the vertical axis with their labels."""
    values = axis_ticks(*frame.y, max(3, int((frame.bottom - frame.top) / 55)))
    return [(value, format_float(value, _decimals(values), axes.signed and value != 0)) for value in values]


def _text_width(text: str) -> float:
    """Estimate the width of a label in pixels; fonts differ."""
    return 7.0 * len(text)


def _decimals(ticks: Sequence[float]) -> int:
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else (abs(ticks[0]) or 1.0) if ticks else 1.0
    return max(0, -math.floor(math.log10(step) + 1e-9))


def _grid(frame: _Frame, axes: ChartAxes) -> str:
    parts = []
    for value, text in _axis_rows(frame, axes):
        y = frame.top + frame.py(value)
        parts.append(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{frame.right:g}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    columns = axis_ticks(*frame.x, max(3, int((frame.right - frame.left) / 95)))
    for value in columns:
        x = frame.left + frame.px(value)
        text = format_float(value, _decimals(columns))
        parts.append(f'<path class="axis" d="M{x:.1f} {frame.bottom:g}v4"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 18:g}" text-anchor="middle">{text}</text>'
        )
    middle = (frame.left + frame.right) / 2
    parts.append(f'<path class="axis" d="M{frame.left:g} {frame.bottom:g}H{frame.right:g}"/>')
    parts.append(
        f'<text class="name" x="{middle:.0f}" y="{frame.height - 6}" text-anchor="middle">'
        f"{escape(axes.x_label)}</text>"
    )
    centre = (frame.top + frame.bottom) / 2
    parts.append(
        f'<text class="name" transform="translate(12 {centre:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return "".join(parts)


def _style(line: ChartLine) -> str:
    return f"line c{line.colour % COLOURS} d{line.dash % len(DASHES)}"


def _band(frame: _Frame, axes: ChartAxes) -> str:
    if not axes.band:
        return ""
    top, bottom = frame.py(axes.band), frame.py(-axes.band)
    return f'<rect class="band" x="0" y="{top:.1f}" width="{frame.width}" height="{bottom - top:.1f}"/>'


def _reference_line(frame: _Frame, value: float) -> str:
    return f'<path class="level" d="M0 {frame.py(value):.1f}H{frame.right - frame.left:g}"/>'


def _step_line(frame: _Frame, axes: ChartAxes) -> str:
    if not axes.step_line:
        return ""
    points = [(frame.px(x / axes.x_scale), frame.py(y)) for x, y in axes.step_line]
    path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in points[1:])
    start = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    return f'<path class="level" d="{start}{path}H{frame.right - frame.left:g}"/>'


def _curve(frame: _Frame, line: ChartLine, axes: ChartAxes) -> str:
    points = [(frame.px(x), frame.py(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [f'<path class="{_style(line)}" d="M{path}"/>']
    for (x, _), y, half_height in zip(points, line.y, line.spread or [0.0] * len(points), strict=True):
        if half_height:
            parts.append(
                f'<path class="line c{line.colour % COLOURS}" '
                f'd="M{x:.1f} {frame.py(y + half_height):.1f}V{frame.py(y - half_height):.1f}"/>'
            )
    radius = 4 if line.spread else 2.6
    if len(points) <= 60:
        for (x, y), x_value, y_value in zip(points, line.x, line.y, strict=True):
            value = format_float(y_value, axes.decimals, axes.signed)
            tip = f"{line.label}: {value} at {x_value:,.4g} {axes.x_label}"
            parts.append(
                f'<circle class="dot c{line.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    return "".join(parts)


def _end_text(line: ChartLine, axes: ChartAxes) -> str:
    return f"{format_float(line.y[-1], axes.decimals, axes.signed)} {line.label}"


def _end_labels(frame: _Frame, lines: Sequence[ChartLine], axes: ChartAxes) -> str:
    """Draw values and names at the ends of the curves, without overlap, with leader lines."""
    ends = [(frame.left + frame.px(line.x[-1]), frame.top + frame.py(line.y[-1])) for line in lines]
    ends += [(frame.right, frame.top + frame.py(value)) for _, value in axes.reference_lines]
    ends = [(x, min(max(y, frame.top), frame.bottom)) for x, y in ends]
    heights = dodge_labels([y for _, y in ends], 17, frame.top + 6, frame.bottom - 2)
    max_chars = int((frame.width - frame.right - 26) / 6.6)
    parts = []
    for i, ((x, y), height) in enumerate(zip(ends, heights, strict=True)):
        label_x = frame.right + 16
        if i < len(lines):
            value = format_float(lines[i].y[-1], axes.decimals, axes.signed)
            style, label = f"c{lines[i].colour % COLOURS}", _end_text(lines[i], axes)
            name = _shorten(lines[i].label, max_chars - len(value) - 1)
            text = f'<tspan class="value">{value}</tspan> {escape(name)}'
        else:
            style, label = "grey", axes.reference_lines[i - len(lines)][0]
            text = escape(_shorten(label, max_chars))
        parts.append(
            f'<path class="leader {style}" d="M{x + 4:.1f} {y:.1f}L{max(frame.right + 4, x + 4):.1f} {y:.1f}'
            f'L{label_x - 3:.1f} {height:.1f}"/>'
            f'<text class="end {style}" x="{label_x:.1f}" y="{height + 4:.1f}">'
            f"<title>{escape(label)}</title>{text}</text>"
        )
    return "".join(parts)


def _reference_line_names(frame: _Frame, axes: ChartAxes) -> str:
    if axes.signed:  # the reference line is zero
        return ""
    parts = []
    for name, value in axes.reference_lines:
        y = frame.top + frame.py(value) - 5
        text = escape(_shorten(name, int((frame.right - frame.left) / 7)))
        parts.append(
            f'<text class="end grey" x="{frame.right - 4:g}" y="{y:.1f}" text-anchor="end">{text}</text>'
        )
    return "".join(parts)


def _shorten(text: str, max_chars: int) -> str:
    """Replace the middle by an ellipsis: the names of a study's runs often differ only at the end."""
    if len(text) <= max_chars:
        return text
    tail = max(max_chars // 2 - 1, 1)
    return f"{text[: max(max_chars - tail - 1, 1)].rstrip()}…{text[-tail:].lstrip()}"
