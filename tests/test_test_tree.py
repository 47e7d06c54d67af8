"""The tests mirror the package, and share code through helpers alone."""

import ast

import pytest

from helpers.paths import ROOT

TESTS = ROOT / "tests"
OTHER_FOLDERS = {
    "helpers",
    "golden",
    "launch",  # the scripts of launch/
    "multidevice",
}
MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))


def imported_modules(source: str) -> set[str]:
    """Modules imported anywhere in a source, in functions too, with what `from` takes from them."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module or "", *(f"{node.module or ''}.{alias.name}" for alias in node.names)}
    return modules


def subfolders() -> set[str]:
    return {str(path.parent) for path in MODULES} - {"."}


def test_no_module_imports_a_test_module_or_conftest():
    tests = {path.stem for path in MODULES if path.stem.startswith("test_")} | {"conftest"}
    offenders = {}
    for path in MODULES:
        parts = {part for name in imported_modules((TESTS / path).read_text()) for part in name.split(".")}
        if parts & tests:
            offenders[str(path)] = parts & tests
    assert not offenders


@pytest.mark.parametrize("folder", sorted(subfolders() - OTHER_FOLDERS))
def test_each_folder_is_a_package(folder):
    assert (ROOT / "dwt_jax" / folder / "__init__.py").is_file()


def test_imported_modules_sees_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from . import test_e\n"
    assert imported_modules(source) == {"a.b", "c", "c.d", "", ".test_e"}
