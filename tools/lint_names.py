"""Check the names and the docstrings of dwt_jax.

Run as `python tools/lint_names.py`. Each finding is one line, `path:line: name: message`. The rules:

1. No name contains a word of tools/banned_names.txt. Names are split at underscores and capitals.
2. No two modules define a public function or class of the same name, except those that a `Protocol`
   asks of every module of its package.
3. Public functions and classes have a docstring. Its first line ends with a full stop or a colon.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dwt_jax"
# Files and directories that are not checked yet. This list only shrinks.
UNCHECKED: tuple[str, ...] = (
    "dwt_jax/__main__.py",
    "dwt_jax/cli/",
    "dwt_jax/data/",
    "dwt_jax/finetune/",
    "dwt_jax/growth/",
    "dwt_jax/hf/",
    "dwt_jax/models/",
    "dwt_jax/objectives/",
    "dwt_jax/remap/",
    "dwt_jax/runs/",
    "dwt_jax/study/",
    "dwt_jax/train/",
)

Modules = dict[Path, ast.Module]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Finding = tuple[Path, int, str, str]


@dataclass(frozen=True)
class BannedNames:
    """Words that names must not contain, each with its replacement."""

    words: dict[str, str]
    whole_names: dict[str, str]
    allowed_terms: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "BannedNames":
        """Read `word: replacement`, `=name: replacement` (the whole name only) and `+allowed_term` lines."""
        words, whole_names, allowed_terms = {}, {}, []
        for line in path.read_text().splitlines():
            name, _, replacement = (part.strip() for part in line.partition(":"))
            if name.startswith("+"):
                allowed_terms.append(name[1:])
            elif name.startswith("="):
                whole_names[name[1:]] = replacement
            elif name and not name.startswith("#"):
                words[name] = replacement
        return cls(words, whole_names, tuple(allowed_terms))

    def message(self, name: str) -> str:
        """Return what is wrong with a name, or an empty string."""
        padded = f"_{'_'.join(split_name(name))}_"
        for term in self.allowed_terms:
            padded = padded.replace(f"_{term}_", "_")
        for word, replacement in self.words.items():
            if f"_{word}_" in padded:
                return f"{word!r} is banned in names, write: {replacement}"
        replacement = self.whole_names.get(padded.strip("_"), "")
        return replacement and f"banned as a name, write: {replacement}"


def split_name(name: str) -> list[str]:
    """Split a name into lower-case words: `_KeptSteps` into `kept` and `steps`."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^\W_A-Z]+", name)]


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that a module defines or assigns."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.lineno, node.name
            case ast.ExceptHandler(name=str()) | ast.MatchAs(name=str()) | ast.MatchStar(name=str()):
                yield node.lineno, node.name or ""
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield node.lineno, name


def public_definitions(modules: Modules) -> Iterator[tuple[Path, Definition]]:
    """Yield the public functions and classes of every module; no methods."""
    for path, tree in modules.items():
        for node in tree.body:
            if isinstance(node, Definition) and not node.name.startswith("_"):
                yield path, node


def check_banned_names(modules: Modules, banned: BannedNames) -> Iterator[Finding]:
    """Find names with a banned word, those of the modules included."""
    for path, tree in modules.items():
        for line, name in sorted({(1, path.stem), *bound_names(tree)}):
            if message := banned.message(name):
                yield path, line, name, message


def protocol_members(modules: Modules) -> set[tuple[Path, str]]:
    """Return the package and the name of every member of a `Protocol` class."""
    members = set()
    for path, node in public_definitions(modules):
        if any(re.match(r"(typing\.)?Protocol\b", ast.unparse(base)) for base in getattr(node, "bases", ())):
            for item in node.body:
                name = getattr(item, "name", "") or getattr(getattr(item, "target", None), "id", "")
                members.add((path.parent, name))
    return members


def check_duplicates(modules: Modules) -> Iterator[Finding]:
    """Find public functions and classes that more than one module defines."""
    members = protocol_members(modules)
    definitions: dict[str, dict[Path, int]] = defaultdict(dict)
    for path, node in public_definitions(modules):
        if not any((parent, node.name) in members for parent in path.parents):
            definitions[node.name][path] = node.lineno
    for name, lines in definitions.items():
        for path, line in lines.items():
            if others := ", ".join(str(other) for other in lines if other != path):
                yield path, line, name, f"also defined in {others}"


def check_docstrings(modules: Modules) -> Iterator[Finding]:
    """Find public functions and classes whose docstring is missing or begins badly."""
    for path, node in public_definitions(modules):
        docstring = ast.get_docstring(node)
        if not docstring:
            yield path, node.lineno, node.name, "no docstring"
        elif not re.match(r"[^\n→]*[.:](\n|$)", docstring):
            yield path, node.lineno, node.name, "docstring's first line, expected a sentence with a full stop"


def lint_modules(modules: Modules, banned: BannedNames) -> list[str]:
    """Return the findings in modules, given by their paths relative to the project, as sorted lines."""
    findings = [*check_banned_names(modules, banned), *check_duplicates(modules), *check_docstrings(modules)]
    return [f"{path}:{line}: {name}: {message}" for path, line, name, message in sorted(findings)]


def main() -> int:
    """Print the findings in dwt_jax and return the exit status."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    modules = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in paths}
    banned = BannedNames.read(Path(__file__).with_name("banned_names.txt"))
    lines = [line for line in lint_modules(modules, banned) if not line.startswith(UNCHECKED)]
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
