"""Load a model from a Hugging Face directory or from a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from dwt_jax.errors import UserError
from dwt_jax.files import user_path
from dwt_jax.hf.checkpoint import load_checkpoint
from dwt_jax.hf.tensor_files import has_weights
from dwt_jax.logs import logger
from dwt_jax.model_files import describe_missing_path, describe_weights
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap.gates import fold_gates, gate_schedule, has_gates, open_gates
from dwt_jax.runs.checkpoint import Checkpoints
from dwt_jax.runs.run_dir import checkpoint_dir, read_run_config, wrap_storage_errors
from dwt_jax.runs.state import abstract_state


class LoadedModel(NamedTuple):
    """A model with its tokenizer."""

    params: Any  # host fp32 arrays
    model: ModelConfig
    tokenizer: Path  # directory of the tokenizer
    labels: tuple[str, ...] = ()  # of a classifier, by its outputs
    dtype: str = "float32"  # of the stored weights
    step: int | None = None  # of the run's checkpoint; None for a model directory
    passthrough: Mapping[str, Any] = {}  # see hf.config.PASSTHROUGH_KEYS
    ignored: tuple[str, ...] = ()  # names of tensors that were omitted


def load_model(path: str, heads: Literal["lm", "all"] = "lm", step: int | None = None) -> LoadedModel:
    """Load the model of a Hugging Face directory or of a run.

    A run's model is its `model/` directory, or its latest checkpoint if `model/` has no weights yet.

    Args:
        path: model directory or run directory.
        heads: lm: those of pre-training, which the model must have; others are omitted. all: all that it
            has.
        step: checkpoint of a run to read. None: the latest.

    Raises:
        UserError: no such model, head or checkpoint, or a damaged or unsupported file.
    """
    directory = user_path(path)
    if not directory.is_dir():
        missing = f"{path}: a file" if directory.exists() else describe_missing_path(path)
        raise UserError(f"{missing}, expected a model or run directory")
    is_pretraining_run = (directory / "run.json").exists()
    is_run = is_pretraining_run or (directory / "model").is_dir()
    if step is not None and not is_pretraining_run:
        raise UserError(f"--step: {path} is not a run with checkpoints, expected one for --step={step}")
    if step is None and not has_weights(directory) and has_weights(directory / "model"):
        directory = _model_subdirectory(directory)
    if step is None and has_weights(directory):
        checkpoint = load_checkpoint(directory)
        if checkpoint.ignored:
            logger.warning(
                f"{directory}: omitted tensors of unsupported heads: {', '.join(checkpoint.ignored)}"
            )
        result = LoadedModel(
            checkpoint.params,
            checkpoint.model,
            directory,
            checkpoint.labels,
            checkpoint.dtype,
            passthrough=checkpoint.passthrough,
            ignored=checkpoint.ignored,
        )
    elif is_run and (directory / "config.json").exists():
        result = _load_from_checkpoint(directory, step)
    else:
        contents = describe_weights(directory) or "neither weights nor a run's checkpoints"
        raise UserError(
            f"{path}: {contents}, expected a run directory or a model's with model.safetensors or "
            "pytorch_model.bin"
        )
    return result if heads == "all" else _select_lm_heads(result, path)


def _model_subdirectory(directory: Path) -> Path:
    """`model/`, unless it is a link that leads out of the directory, which need not be the user's own."""
    target = (directory / "model").resolve()
    if not target.is_relative_to(directory.resolve()):
        raise UserError(
            f"{directory / 'model'}: a link to {target}, expected a directory (or pass the link's target)"
        )
    return directory / "model"


def _select_lm_heads(loaded_model: LoadedModel, path: str) -> LoadedModel:
    module, params = family(loaded_model.model), loaded_model.params
    if any(head not in params for head in module.LM_HEADS):
        available_heads = ", ".join(head for head in module.HEADS if head in params)
        raise UserError(
            f"{path}: a model without a language-model head (it has {available_heads or 'no head'}), "
            "expected one with it"
        )
    selected = {name: params[name] for name in (*module.ENCODER_PARTS, *module.LM_HEADS)}
    return loaded_model._replace(params=selected)


def _load_from_checkpoint(workdir: Path, step: int | None) -> LoadedModel:
    config = read_run_config(workdir)
    local_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    state = abstract_state(config.model, config.optimizer)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local_sharding), state)
    directory = checkpoint_dir(workdir, config)
    with wrap_storage_errors(directory):
        checkpoints = Checkpoints(directory, config.train.keep_checkpoints, read_only=True)
    try:
        saved_steps = checkpoints.steps()
        if step is not None and step not in saved_steps:
            steps_text = ", ".join(map(str, saved_steps)) or "none"
            raise UserError(f"--step is {step}, expected a checkpoint that {workdir} keeps: {steps_text}")
        state_and_step = checkpoints.restore(target, step)
    finally:
        checkpoints.close()
    if state_and_step is None:
        raise UserError(f"{workdir}: a run without a checkpoint, expected at least one")
    params, step = jax.device_get(state_and_step[0].params), state_and_step[1]
    model = config.model
    if has_gates(model):  # the gates as at this step
        gate_value = gate_schedule(step, config.train.steps, config.init.gate_warmup, config.init.step)
        params = jax.device_get(open_gates(params, gate_value))
        if gate_value == 1:
            params, model = fold_gates(params, model)
    return LoadedModel(params, model, workdir / "tokenizer", step=step)
