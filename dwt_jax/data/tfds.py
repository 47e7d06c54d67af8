"""Open datasets of TFDS that were prepared as array_record, without TensorFlow."""

from typing import Any

from dwt_jax.config import Source
from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.files import user_path


def open_tfds(source: Source) -> tuple[Any, int]:
    """Open a split of a TFDS dataset, without TensorFlow.

    Returns:
        (the examples by index, their size in bytes or 0)

    Raises:
        UserError: if TFDS cannot open it.
    """
    import tensorflow_datasets as tfds

    try:
        if (user_path(source.path) / "dataset_info.json").exists():
            builder = tfds.builder_from_directory(str(user_path(source.path)))
        else:
            _import_tfds_module(source.path)
            builder = tfds.builder(source.path, data_dir=source.data_dir or None)
        if not builder.data_path.exists():  # the message of TFDS would be a list of guesses
            raise UserError(
                f"tfds '{source.path}', split '{source.split}': nothing in {builder.data_path}, expected a "
                "dataset there (or another data_dir), prepared with file_format='array_record'"
            )
        examples = builder.as_data_source(split=source.split)
        return examples, int(builder.info.splits[source.split].num_bytes or 0)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # TFDS raises its own types, and some of absl's
        reason = " ".join(str(error).split())
        raise UserError(
            f"tfds '{source.path}', split '{source.split}': {reason[:300]}; expected a dataset that was "
            "prepared with file_format='array_record'"
        ) from None


def _import_tfds_module(name: str) -> None:
    """Import the module that defines a text dataset: without TensorFlow, TFDS registers few by itself."""
    import importlib

    group = name.split("/")[0].split(":")[0]
    if group.isidentifier():
        for module in (f"tensorflow_datasets.text.{group}", f"tensorflow_datasets.datasets.{group}"):
            try:
                importlib.import_module(module)
            except Exception:  # tfds.builder reports what is wrong
                continue


def get_nested_feature(example: Any, source: Source) -> str | bytes:
    """Return the field of an example; `a/b` is the field b of the nested features a.

    Raises:
        UserError: there is no such field, or it holds no text.
    """
    location = f"tfds '{source.path}'"
    for key in source.field.split("/"):
        if not isinstance(example, dict) or key not in example:
            fields = example if isinstance(example, dict) else ()
            raise UserError(f"{location}: no field '{source.field}'{did_you_mean(key, fields)}")
        example = example[key]
    if not isinstance(example, str | bytes):
        raise UserError(f"{location}: field '{source.field}' is a {type(example).__name__}, expected text")
    return example
