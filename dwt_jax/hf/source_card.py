"""Read the name and the model card of a source model. Both are untrusted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dwt_jax.model_files import is_model_file

LICENSE_KEYS = ("license", "license_name", "license_link", "language")
INHERITED_KEYS = (*LICENSE_KEYS, "datasets", "base_model")
"""Keys of a card's header that are as true of a model that is made from it."""

MAX_FRONT_MATTER = 2**18
"""Characters of a header that are read: more than the results of large benchmarks take."""


def source_name(path: Path) -> str:
    """Return the name of a model or run directory; in the Hub's cache, that of the repository."""
    path = path.absolute()
    if path.parent.name == "snapshots":
        return path.parents[1].name.removeprefix("models--").replace("--", "/")
    return path.parent.name if path.name == "model" and (path.parent / "run.json").exists() else path.name


def existing_card(directory: Path) -> str:
    """Return the card of a model directory, or "" if it has none. Raises UserError as `is_model_file`."""
    path = directory / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if is_model_file(path) else ""


def inherited_metadata(card: str, keys: Sequence[str]) -> dict[str, Any]:
    """Return the values of `keys` in a card's header that are text or lists of text."""
    header = split_front_matter(card)[0]
    values = {key: header[key] for key in keys if header.get(key)}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))
    }


def split_front_matter(card: str) -> tuple[Mapping[str, Any], str]:
    """Return the metadata in a card's header, with every plain value as text, and the text of the card.

    BaseLoader gives text, so the language `no` is not False, and it does not expand merge keys, which take
    exponential time. The loader in C is not used: its stack overflows on a deeply nested header.
    """
    import yaml

    card = card.removeprefix("\ufeff")
    if not card.startswith("---\n"):
        return {}, card.strip()
    header, _, text = card[4:].partition("\n---")
    try:
        metadata = yaml.load(header, yaml.BaseLoader) if len(header) <= MAX_FRONT_MATTER else None
    except (yaml.YAMLError, RecursionError):
        metadata = None
    return (metadata if isinstance(metadata, dict) else {}), text.strip()
