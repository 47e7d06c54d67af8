"""Reports without charts, which take most of the time to write."""

from html import escape

import pytest

from dwt_jax.study import report


@pytest.fixture
def with_charts():
    """Draw the charts after all."""


@pytest.fixture(autouse=True)
def _without_charts(request, monkeypatch):
    if "with_charts" not in request.fixturenames:
        monkeypatch.setattr(report, "chart_svg", lambda chart, small: f"<svg>{escape(chart.title)}</svg>")
        monkeypatch.setattr(report, "write_chart_files", lambda charts, directory: None)
