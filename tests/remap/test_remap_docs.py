"""docs/remapping.md: its table equals the benchmark's, its example runs."""

import importlib.util
import math
import re
import subprocess
import sys

import pytest

from dwt_jax.remap.depth_maps import DEPTH_MAPS
from dwt_jax.remap.methods import METHODS
from helpers.paths import ROOT
from helpers.runs import environment

PAGE = (ROOT / "docs" / "remapping.md").read_text()


def load_benchmark():
    """benchmarks/remap_table.py as a module."""
    spec = importlib.util.spec_from_file_location("remap_table", ROOT / "benchmarks" / "remap_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_cells(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(row[0], case): cell for row in rows[2:] for case, cell in zip(rows[0][1:], row[1:], strict=True)}


def parse_claim(cell):
    """('exact', 'moves' or the refusal; the number)."""
    if cell.startswith("refused"):
        return cell, 0.0
    exact, _, number = cell.rpartition(" ")
    return ("exact" if exact == "**exact**" else "moves"), float(number)


def check_tables_agree(written, computed):
    """Compare claims exactly, and numbers that are no rounding error within a factor of 10."""
    assert written.keys() == computed.keys()
    for key, cell in computed.items():
        (written_claim, number), (computed_claim, value) = parse_claim(written[key]), parse_claim(cell)
        assert written_claim == computed_claim, key
        if computed_claim == "exact":
            assert max(number, value) < 1e-9, key
        elif computed_claim == "moves":
            assert abs(math.log10(number / value)) < 1, key


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_table_equals_benchmark(number):
    benchmark = load_benchmark()
    table = benchmark.TABLES[number]
    computed = benchmark.markdown(table, benchmark.compute(table))
    check_tables_agree(table_cells(benchmark.split_page(PAGE, table)[1]), table_cells(computed))


@pytest.mark.parametrize(
    ("old", "new"), [("**exact** 2e-14", "2.0"), ("2.1", "**exact** 1e-15"), ("2.1", "0.02")]
)
def test_outdated_table_fails(old, new):
    benchmark = load_benchmark()
    table = benchmark.split_page(PAGE, benchmark.TABLES[0])[1]
    assert old in table
    with pytest.raises(AssertionError):
        check_tables_agree(table_cells(table.replace(f" {old} ", f" {new} ", 1)), table_cells(table))


def test_python_example_runs():
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    env = environment(PYTHONPATH=str(ROOT))
    result = subprocess.run([sys.executable, "-c", example], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "function    preserved exactly" in result.stdout


def test_every_method_is_documented():
    section = PAGE.partition("\n## Methods\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(METHODS)
    for name, depth in rows:
        if name in DEPTH_MAPS:
            layers = ["new" if layer < 0 else str(layer) for layer in DEPTH_MAPS[name](4, 6)]
            assert depth.split() == layers
        elif depth not in ("–", "refuses"):
            assert METHODS[name]().depth == depth
