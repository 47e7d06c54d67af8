"""The names lint, tools/lint_names.py, on small sources."""

import ast
import importlib.util
from pathlib import Path

import pytest

from helpers.paths import ROOT

TOOL = ROOT / "tools" / "lint_names.py"
spec = importlib.util.spec_from_file_location("lint_names", TOOL)
lint_names = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lint_names)

BANNED = lint_names.BannedNames(
    words={"kept": "saved", "whole": "full"}, whole_names={"own": "local"}, allowed_terms=("whole_word",)
)


def findings(sources, banned=BANNED):
    """The findings in {path: source}."""
    return lint_names.lint_modules({Path(path): ast.parse(text) for path, text in sources.items()}, banned)


@pytest.mark.parametrize(
    "source",
    [
        "def _kept(): ...",
        "async def _kept(): ...",
        "class _KeptSteps: ...",
        "def _f(kept): ...",
        "def _f(*, kept_steps=1): ...",
        "def _f(*kept): ...",
        "def _f(**kept): ...",
        "_f = lambda kept: 1",
        "_KEPT_STEPS = 1",
        "_f = [kept for kept in ()]",
        "def _f():\n    steps_kept: int = 1",
        "def _f():\n    for i, (_, kept) in (): ...",
        "def _f(x):\n    x.kept = 1",
        "def _f(x):\n    if (kept := x): ...",
        "class _C:\n    kept: int",
        "with open('x') as kept: ...",
        "import os as kept",
        "from os import path as kept",
        "try: ...\nexcept OSError as kept: ...",
        "match 1:\n    case [kept, *_]: ...",
        "match 1:\n    case [*kept]: ...",
        "own = 1",
        "_OWN = 1",
        "whole_words_whole = 1",
    ],
)
def test_banned_name_wherever_bound_is_rejected(source):
    (finding,) = findings({"dwt_jax/a.py": source})
    assert finding.startswith("dwt_jax/a.py:")
    assert "write: " in finding


@pytest.mark.parametrize(
    "source",
    [
        "keep_mask = 1",
        "keptness = 1",
        "own_rows = 1",
        "whole_word = 1",
        "_mask_whole_word = 1",
        "import kept",
        "x = object.kept",
        "dict(kept=1)",
        "x = 'kept'  # kept",
    ],
)
def test_other_name_and_use_of_a_foreign_name_is_accepted(source):
    assert findings({"dwt_jax/a.py": source}) == []


def test_finding_names_path_line_name_and_replacement():
    assert findings({"dwt_jax/a.py": "x = 1\nkept_steps = 2\n"}) == [
        "dwt_jax/a.py:2: kept_steps: 'kept' is banned in names, write: saved"
    ]


def test_module_with_a_banned_name_is_rejected():
    (finding,) = findings({"dwt_jax/kept.py": ""})
    assert finding.startswith("dwt_jax/kept.py:1: kept: ")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("kept_steps", ["kept", "steps"]),
        ("_KeptSteps", ["kept", "steps"]),
        ("KEPT_STEPS", ["kept", "steps"]),
        ("HFConfig2", ["hf", "config2"]),
        ("__init__", ["init"]),
        ("_", []),
    ],
)
def test_split_name(name, parts):
    assert lint_names.split_name(name) == parts


def test_public_name_in_two_modules_is_rejected_in_both():
    source = 'def load():\n    """Load."""\n'
    assert findings({"dwt_jax/a.py": source, "dwt_jax/b/c.py": "\n" + source}) == [
        "dwt_jax/a.py:1: load: also defined in dwt_jax/b/c.py",
        "dwt_jax/b/c.py:2: load: also defined in dwt_jax/a.py",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "def _load(): ...",
        "class _Load: ...",
        "class _C:\n    def load(self): ...",
        "def _f():\n    def load(): ...",
        "load = 1",
    ],
)
def test_private_name_method_and_variable_in_two_modules_is_accepted(source):
    assert findings({"dwt_jax/a.py": source, "dwt_jax/b.py": source}) == []


PROTOCOL = '''
from typing import Protocol
class Family(Protocol):
    """What a family module defines."""
    Config: type
    def init(self, config): ...
'''
FAMILY = '''
class Config:
    """Sizes."""
def init(config):
    """Return parameters."""
'''


def test_members_of_a_protocol_may_be_defined_by_every_module_of_its_package():
    family_modules = {"dwt_jax/models/bert.py": FAMILY, "dwt_jax/models/llama.py": FAMILY}
    assert findings({"dwt_jax/models/protocol.py": PROTOCOL, **family_modules}) == []
    assert len(findings({"dwt_jax/hf/protocol.py": PROTOCOL, **family_modules})) == 4
    assert (
        len(findings({"dwt_jax/models/protocol.py": PROTOCOL.replace("(Protocol)", ""), **family_modules}))
        == 4
    )
    other = 'def config():\n    """Return a parameter of a member: no member."""\n'
    modules = {
        "dwt_jax/models/protocol.py": PROTOCOL,
        "dwt_jax/models/a.py": other,
        "dwt_jax/models/b.py": other,
    }
    assert len(findings(modules)) == 2


@pytest.mark.parametrize(
    "docstring",
    [
        '"""Load a model."""',
        '"""Load:\n\n    more\n    """',
        '"""Load a model.\n\n    From a file → a tree\n    """',
    ],
)
def test_docstring_with_a_sentence_as_its_first_line_is_accepted(docstring):
    assert findings({"dwt_jax/a.py": f"def load():\n    {docstring}\n"}) == []
    assert findings({"dwt_jax/a.py": f"class Load:\n    {docstring}\n"}) == []


@pytest.mark.parametrize(
    "docstring",
    ["...", '""""""', '"""Load a model"""', '"""Load a model, from\n    a file."""', '"""File → model."""'],
)
def test_docstring_missing_or_without_a_sentence_as_its_first_line_is_rejected(docstring):
    for definition in ("def load()", "async def load()", "class Load"):
        (finding,) = findings({"dwt_jax/a.py": f"{definition}:\n    {docstring}\n"})
        assert finding.startswith(f"dwt_jax/a.py:1: {definition.split()[-1].removesuffix('()')}: ")
        assert "docstring" in finding
    assert findings({"dwt_jax/a.py": f"def _load():\n    {docstring}\n"}) == []


def test_list_of_banned_names_has_replacements_and_rejects_the_projects_old_names():
    banned = lint_names.BannedNames.read(TOOL.with_name("banned_names.txt"))
    for replacement in [*banned.words.values(), *banned.whole_names.values()]:
        assert replacement
    for name in ("found", "kept_steps", "_told", "Borrowed", "knob_table", "laid_out", "words", "_own"):
        assert banned.message(name), name
    for name in (
        "keep_mask",
        "whole_word",
        "trip_counts_known",
        "lookup",
        "placement",
        "key_words",
        "foundation",
    ):
        assert not banned.message(name), name
