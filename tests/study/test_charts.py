"""Charts: what they show, read from Matplotlib's artists, and their files."""

import math
import re
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from dwt_jax.study import charts, report
from dwt_jax.study.charts import Chart, ChartLine

NAMES = ["baseline (no teacher)", "weak teacher, 1 : 1", "weak teacher, 1 : 4 falling to 1 : 1"]


def make_chart(num_lines=3, **changes):
    lines = [
        ChartLine(
            NAMES[i] if i < 3 else f"arm number {i} of a study with a long name that nobody could ever fit",
            *([100.0 * (j + 1) for j in range(10)], [7 - 0.2 * j - 0.001 * i for j in range(10)]),
            *(i % 7, i // 7),
        )
        for i in range(num_lines)
    ]
    (chart,) = charts.finite_charts([Chart("Loss", lines, "steps", "loss (nats)")._replace(**changes)])
    return chart


def curves_of(figure):
    """Return the curves by label."""
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_chart_has_the_data_and_the_labels_of_each_arm():
    chart = make_chart(x_scale=10.0)
    figure = charts.draw_chart(chart)
    axes, curves = figure.axes[0], curves_of(figure)
    assert list(curves) == NAMES
    for i, curve in enumerate(curves.values()):
        np.testing.assert_allclose(curve.get_xdata(), 10.0 * np.arange(1, 11))
        np.testing.assert_allclose(curve.get_ydata(), 7 - 0.2 * np.arange(10) - 0.001 * i)
        assert curve.get_color() == charts.LINE_COLOURS[i]
        assert curve.get_marker() == "o"
    assert curves[NAMES[0]].get_zorder() > curves[NAMES[1]].get_zorder()  # the baseline is on top
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "loss (nats)")
    assert set(texts_of(figure)) == {*NAMES, "5.200", "5.199", "5.198"}


def test_reference_lines_band_and_steps():
    chart = make_chart(
        reference_lines=[("6.050 teacher", 6.05)],
        band=0.5,
        step_line=[(100.0, 6.0), (500.0, 5.0)],
        signed=True,
    )
    figure = charts.draw_chart(chart)
    axes = figure.axes[0]
    np.testing.assert_allclose(curves_of(figure)["6.050 teacher"].get_ydata(), [6.05, 6.05])
    assert "6.050 teacher" in texts_of(figure)
    assert "+5.200" in texts_of(figure)
    (band,) = axes.patches
    np.testing.assert_allclose((band.get_y(), band.get_height()), (-0.5, 1.0))
    (steps,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    np.testing.assert_allclose(steps.get_xydata()[:2], [(100.0, 6.0), (500.0, 5.0)])
    assert steps.get_xdata()[-1] == axes.get_xlim()[1]
    assert axes.get_ylim()[0] < -0.5


def test_error_bars_are_inside_and_points_that_are_not_finite_are_skipped():
    line = ChartLine("a", [1.0, 2.0, math.nan, 4.0], [5.0, 6.0, 7.0, math.inf], spread=[3.0, 0.0, 100.0, 1.0])
    (chart,) = charts.finite_charts(
        [Chart("a", [line, ChartLine("b", [1.0], [math.nan])], "", ""), Chart("empty", [], "", "")]
    )
    figure = charts.draw_chart(chart)
    assert list(curves_of(figure)) == ["a"]
    (bars,) = figure.axes[0].collections
    np.testing.assert_allclose(bars.get_segments(), [[(1, 2), (1, 8)], [(2, 6), (2, 6)]])
    low, high = figure.axes[0].get_ylim()
    assert low < 2 < 8 < high < 10  # no space for the point that is not finite
    assert "nan" not in charts.chart_svg(chart)


def test_a_curve_far_above_the_others_is_cut():
    chart = make_chart(cut=True)
    steep = chart.lines[0]._replace(y=(100.0, *chart.lines[0].y[1:]))
    figure = charts.draw_chart(chart._replace(lines=[steep, *chart.lines[1:]]))
    assert figure.axes[0].get_ylim()[1] < 8
    assert "↑ starts above" in texts_of(figure)


@pytest.mark.parametrize("num_lines", [1, 3, 12])
def test_labels_do_not_overlap_and_are_inside(num_lines):
    figure = charts.draw_chart(make_chart(num_lines))
    texts = figure.axes[0].texts
    assert len(texts) == 2 * num_lines
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert figure.axes[0].bbox.x1 < box.x0 < box.x1 <= figure.bbox.x1
        assert not any(other.shrunk(0.9, 0.9).overlaps(box) for other in boxes[:i])


def test_labels_are_spread_as_little_as_possible():
    positions = charts.dodge_labels([100, 101, 102, 40, 300], 17, 10, 300)
    assert min(np.diff(sorted(positions))) >= 17 - 1e-9
    assert np.argsort(positions).tolist() == [3, 0, 1, 2, 4]
    assert positions[3] == 40
    assert max(positions) <= 300


def test_a_small_chart_has_a_legend_in_place_of_labels():
    chart = make_chart(reference_lines=[("teacher", 6.0)])
    figure = charts.draw_chart(chart, small=True)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*NAMES, "teacher"]
    assert texts_of(figure) == []
    box = charts.draw_chart(make_chart(12), small=True).legends[0].get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= charts.SMALL


def test_svg_is_the_same_each_time_and_its_text_is_text():
    chart = make_chart(caption="<b>", title="A & B")
    lines = [chart.lines[0]._replace(label="<script>$x_1$"), *chart.lines[1:]]
    svg = charts.chart_svg(chart._replace(lines=lines))
    assert svg == charts.chart_svg(chart._replace(lines=lines))
    assert 'aria-label="A &amp; B"' in svg
    assert re.search(r"<text[^>]*>&lt;script&gt;\$x_1\$</text>", svg)
    assert "<title>&lt;script&gt;$x_1$: 7.000 at 100 steps</title>" in svg
    assert "<script" not in svg
    assert not any(colour in svg for colour in charts.LINE_COLOURS)  # a page sets them
    assert "var(--c2)" in svg
    ids = re.findall(r' id="(.*?)"', svg + charts.chart_svg(chart._replace(title="another")))
    assert len(set(ids)) == len(ids)


def test_tool_tips_are_at_the_points():
    """Of a line through the corners of the axes: pixels are linear in the data."""
    line = ChartLine("a", [0.0, 50.0, 100.0], [0.0, 1.0, 2.0])
    (chart,) = charts.finite_charts([Chart("a", [line], "", "")])
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', charts.chart_svg(chart))
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, circle)) for circle in circles]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2


def test_files(tmp_path):
    """PDF and PNG of each chart are the same each time; those of charts that are gone are removed."""
    chart = make_chart()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of the user")
    charts.write_chart_files([chart, chart._replace(title="Other")], tmp_path)
    names = ["loss.pdf", "loss.png", "other.pdf", "other.png", "photo.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    (tmp_path / "figure1.pdf").write_bytes((tmp_path / "other.pdf").read_bytes())  # a copy is the user's
    (tmp_path / "folder.png").mkdir()
    before = {name: (tmp_path / name).read_bytes() for name in names}
    charts.write_chart_files([chart], tmp_path)
    names = ["figure1.pdf", "folder.png", "loss.pdf", "loss.png", "photo.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes() == before[name] for name in ("loss.pdf", "loss.png"))
    assert before["loss.pdf"].startswith(b"%PDF")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width == round(charts.WIDE / 72 * 200)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_files_of_charts_have_names_of_their_own():
    titles = ["Pairs a.b", "Pairs a-b", "任务一", "任务二", "Pairs A.B"]
    names = charts.file_names([make_chart()._replace(title=title) for title in titles])
    assert names == ["pairs-a-b", "pairs-a-b-2", "任务一", "任务二", "pairs-a-b-3"]


def test_legend_has_names_with_an_underscore():
    lines = [ChartLine("_smoke", [1, 2], [1.0, 2.0], spread=[0, 0]), ChartLine("b", [1], [1.0], spread=[0])]
    figure = charts.draw_chart(make_chart()._replace(lines=lines, reference_lines=()), small=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_smoke", "b"]


def test_styles():
    """The baseline has a colour of its own; after six others, dashes differ."""
    styles = charts.line_styles("base", [f"arm{i}" for i in range(13)], ["seed1", "seed2"])
    assert styles["base"] == (0, 0)
    assert [styles[f"arm{i}"] for i in (0, 5, 6, 12)] == [(1, 0), (6, 0), (1, 1), (1, 2)]
    assert [styles[name] for name in ("seed1", "seed2")] == [(0, 1), (0, 2)]
    assert len(set(styles.values())) == len(styles)


def test_units_and_thinning():
    assert charts.flop_unit(2.59e13) == (1e12, "TFLOPs")
    assert charts.flop_unit(5e15)[1] == "PFLOPs"
    chart = charts.flop_chart("a", [ChartLine("b", [2e9], [1.0])], "loss", "In UNIT.")
    assert (chart.x_label, chart.x_scale, chart.caption) == ("GFLOPs", 1e9, "In GFLOPs.")
    assert charts.flop_chart("a", [], "loss", "").x_label == "MFLOPs"
    x, y = charts.downsample(list(range(1000)), [2.0 * i for i in range(1000)], 100)
    assert len(x) == 100
    assert np.allclose(np.array(y), 2 * np.array(x))


def test_links_of_the_markdown_lead_to_the_files(tmp_path, with_charts):
    chart = make_chart()
    sections = [
        report.Section("Charts", [chart._replace(title="Pairs a.b"), chart._replace(title="Pairs a-b")])
    ]
    contents, target = report.Report("Report", "", sections, []), tmp_path / "my report.html"
    report.write_report(contents, target, chart_files=False)
    assert "![" not in target.with_suffix(".md").read_text()
    report.write_report(contents, target)
    links = re.findall(r"!\[[^]]*\]\((\S*)\)", target.with_suffix(".md").read_text())
    assert len({*links}) == 2
    assert all((tmp_path / unquote(link)).is_file() for link in links)
