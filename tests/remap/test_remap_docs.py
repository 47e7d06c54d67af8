"""docs/remapping.md: its table is what the command computes, its example runs."""

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


def command():
    """benchmarks/remap_table.py as a module."""
    spec = importlib.util.spec_from_file_location("remap_table", ROOT / "benchmarks" / "remap_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(table):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {(row[0], case): cell for row in rows[2:] for case, cell in zip(rows[0][1:], row[1:], strict=True)}


def claim(cell):
    """('exact', 'moves' or the refusal; the number)"""
    if cell.startswith("refused"):
        return cell, 0.0
    exact, _, number = cell.rpartition(" ")
    return ("exact" if exact == "**exact**" else "moves"), float(number)


def agree(written, found):
    """Claims to the letter; numbers within a factor of 10, where they are no rounding error."""
    assert written.keys() == found.keys()
    for key, cell in found.items():
        (said, number), (is_, value) = claim(written[key]), claim(cell)
        assert said == is_, key
        if is_ == "exact":
            assert max(number, value) < 1e-9, key
        elif is_ == "moves":
            assert abs(math.log10(number / value)) < 1, key


@pytest.mark.slow
def test_the_table_is_what_the_command_computes():
    benchmark = command()
    agree(cells(benchmark.between(PAGE)[1]), cells(benchmark.markdown(benchmark.compute())))


@pytest.mark.parametrize(
    ("old", "new"), [("**exact** 2e-14", "2.0"), ("2.1", "**exact** 1e-15"), ("2.1", "0.02")]
)
def test_a_table_that_is_out_of_date_is_noticed(old, new):
    table = command().between(PAGE)[1]
    assert old in table
    with pytest.raises(AssertionError):
        agree(cells(table.replace(f" {old} ", f" {new} ", 1)), cells(table))


def test_the_python_example_runs():
    example = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", example], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "function    kept exactly" in done.stdout


def test_every_method_is_described():
    section = PAGE.partition("\n## Methods\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, re.MULTILINE)
    assert [name for name, _ in listed] == list(METHODS)
    for name, how in listed:
        if name in DEPTH_MAPS:
            layers = ["new" if layer < 0 else str(layer) for layer in DEPTH_MAPS[name](4, 6)]
            assert how.split() == layers
        elif how not in ("–", "refuses"):
            assert METHODS[name]().depth == how
