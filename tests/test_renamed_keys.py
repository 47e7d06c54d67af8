"""Config keys of earlier versions: every one leads to a key of today."""

import dataclasses
import re
from typing import get_args, get_type_hints

import pytest

from dwt_jax.config import Config, Schedule
from dwt_jax.config_loader import build_dataclass, config_to_dict, flatten_dict
from dwt_jax.errors import UserError
from dwt_jax.finetune.config import FinetuneConfig
from dwt_jax.models import FAMILIES, model_config_type
from dwt_jax.renamed_keys import RENAMED_KEYS, RENAMED_VALUES, SCHEDULE_KEYS
from dwt_jax.study.sweep import Study
from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "launch").glob("*"))]


def dotted_keys(config):
    """Every key of a config, sections included."""
    keys = set()
    for leaf in flatten_dict(config_to_dict(config)):
        parts = leaf.split(".")
        keys |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return keys


CONFIG_TYPES = (Config, FinetuneConfig, Study)
EMPTY = {"train.batch_ramp", "teacher.paths", "teacher.weights"}  # lists without an item
MODEL_KEYS = {
    f"model.{field.name}" for name in FAMILIES for field in dataclasses.fields(model_config_type(name))
}
KEYS = set().union(*(dotted_keys(kind()) for kind in CONFIG_TYPES)) | EMPTY | MODEL_KEYS


def nested(key, value):
    """{"train": {"steps": value}} for train.steps."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_renamed_key_leads_to_an_existing_key_and_exists_no_more(old, new):
    assert new in KEYS
    assert old not in KEYS


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_old_key_in_file_and_on_command_line_is_rejected_with_the_new_key(old, new):
    kind = next(kind for kind in CONFIG_TYPES if new in dotted_keys(kind()))
    section = f"'{old.partition('.')[0]}' is now"  # where a whole section was renamed
    for arguments in ((nested(old, "1"),), ({}, {old: "1"})):
        with pytest.raises(UserError) as error:
            build_dataclass(kind, *arguments)
        assert f"'{old}' is now '{new}'" in str(error.value) or section in str(error.value)


@pytest.mark.parametrize(("old", "new"), SCHEDULE_KEYS.items())
def test_old_field_of_a_schedule_is_rejected_with_the_new_one(old, new):
    names = {field.name for field in dataclasses.fields(Schedule)}
    assert new in names
    assert old not in names
    key = f"optimizer.learning_rate.{old}"
    for arguments in ((nested(key, "1"),), ({}, {key: "1"})):
        with pytest.raises(UserError, match=f"'{key}' is now 'optimizer.learning_rate.{new}'"):
            build_dataclass(Config, *arguments)


@pytest.mark.parametrize(("old", "new"), RENAMED_VALUES.items())
def test_old_kind_of_a_schedule_is_rejected_with_the_new_one(old, new):
    kinds = get_args(get_type_hints(Schedule)["kind"])
    assert new in kinds
    assert old not in kinds
    with pytest.raises(UserError, match=f"'{old}', which is now '{new}'"):
        build_dataclass(Config, nested("distill.alpha_soft.kind", old))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_has_existing_keys_only(page):
    text = page.read_text()
    for key in re.findall(r"--config\.([a-z][\w.]*\w)", text):
        assert re.sub(r"\.\d+", ".0", key) in KEYS, key
    for old in RENAMED_KEYS:
        if "." in old:  # not the word mask
            assert not re.search(rf"[`\s]{re.escape(old)}[`=\s]", text), old


def test_changelog_lists_every_renamed_key():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for old, new in {**RENAMED_KEYS, **SCHEDULE_KEYS}.items():
        assert f"| `{old}` | `{new}` |" in changelog
    for old, new in RENAMED_VALUES.items():
        assert f"| `kind={old}` | `kind={new}` |" in changelog
