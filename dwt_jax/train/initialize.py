"""Initialise a student from a smaller model (`init.*`)."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Config
from dwt_jax.config_loader import build_dataclass
from dwt_jax.data.batch import Batch
from dwt_jax.data.dataset import PackedDataset, get_batch
from dwt_jax.data.tokenizer import Vocabulary
from dwt_jax.distributed.mesh import replicated_sharding, to_global
from dwt_jax.errors import UserError
from dwt_jax.files import read_json
from dwt_jax.models import family
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap import apply
from dwt_jax.remap.optimizer_state import copied_entry_mask
from dwt_jax.remap.plan import Plan, plan_growth
from dwt_jax.remap.report import RemapReport, logit_drift, remap_report
from dwt_jax.runs.metrics_file import sum_or_none
from dwt_jax.runs.pretrained import PretrainedModel, load_pretrained
from dwt_jax.runs.teacher import LoadedTeacher
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.train.step import CopiedMask

PROBE_ROWS = 8


class GrowthSource(NamedTuple):
    """The source of a grown student, and the growth plan."""

    path: str
    source: PretrainedModel
    plan: Plan
    # Of a run grown from another at a later step (growth/remap_run.py): that step and the FLOPs so far.
    step: int = 0
    student_flops: float = 0.0
    teacher_flops: float = 0.0

    @property
    def uses_ligo(self) -> bool:
        """Whether the growth operator is learned (train/ligo_training.py)."""
        return self.plan.method.name == "ligo"


def load_growth_source(config: Config, vocab: Vocabulary, workdir: Path) -> GrowthSource | None:
    """Load the source that `init` of a resolved config names, and plan the growth.

    Returns:
        None for a random initialisation.

    Raises:
        UserError: the source's vocabulary is not a prefix of the data's, or the method does not support it.
    """
    init = config.init
    if not init.method:
        return None
    if init.step:
        return _read_growth_record(config, workdir)
    key, path = ("init.from", init.from_) if init.from_ else ("teacher.path", config.teacher.path)
    source = load_pretrained(key, path, vocab, allow_fewer_tokens=True)
    return GrowthSource(path, source, plan_student_growth(config, source.model))


def plan_student_growth(config: Config, source: ModelConfig) -> Plan:
    """Plan the growth from `source` to the student of a resolved config."""
    try:
        return plan_growth(config.init.method, source, config.model, jax.random.key(config.seed), config.init)
    except UserError as error:
        raise UserError(f"config: init.method: {error}") from None


def _read_growth_record(config: Config, workdir: Path) -> GrowthSource:
    """The growth of a run that `dwt remap-run` wrote; the checkpoint of its source may be gone."""
    path = workdir / "init.json"
    if not path.exists() and (workdir / "config.json").exists():
        raise UserError(f"{path}: missing, expected the record that dwt remap-run wrote")
    if not path.exists():
        raise UserError(f"config: init.step is {config.init.step}, expected 0: only dwt remap-run sets it")
    record = read_json(path)
    read_field = functools.partial(_record_field, path, record)
    model = build_dataclass(ModelConfig, read_field("source", "object"))
    source = PretrainedModel(
        family(model).abstract_params(model),
        model,
        read_field("digest", "text"),
        read_field("training_flops", "known"),
    )
    growth_plan, source_flops = (
        plan_student_growth(config, model),
        (read_field("student_flops", "number"), read_field("teacher_flops", "number")),
    )
    return GrowthSource(read_field("from", "text"), source, growth_plan, config.init.step, *source_flops)


_FIELD_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "object": ((dict,), "an object"),
    "text": ((str,), "a string"),
    "number": ((int, float), "a number"),
    "known": ((int, float, type(None)), "a number or null"),
}


def _record_field(path: Path, record: dict[str, Any], key: str, kind: str) -> Any:
    """An entry of `init.json`, checked for its type."""
    value, (types, expected) = record.get(key, ...), _FIELD_TYPES[kind]
    if isinstance(value, bool) or not isinstance(value, types):
        actual = "missing" if value is ... else repr(value)
        raise UserError(f"{path}: {key} is {actual}, expected {expected} as dwt remap-run wrote it")
    return value


def ligo_training_flops(workdir: Path) -> float | None:
    """FLOPs of learning the maps, as in `init.json`; None if it has no entry."""
    path = workdir / "init.json"
    ligo_record = read_json(path).get("ligo") if path.exists() else None
    flops = ligo_record.get("flops") if isinstance(ligo_record, dict) else None
    return flops if isinstance(flops, (int, float)) and not isinstance(flops, bool) else None


def copied_mask_for_warmup(
    config: Config, growth_plan: Plan | None, mesh: jax.sharding.Mesh
) -> CopiedMask | None:
    """Return on the mesh which entries are copies; None where `init.new_param_warmup` is 0."""
    if config.init.new_param_warmup == 0 or growth_plan is None:
        return None
    return to_global(copied_entry_mask(growth_plan), replicated_sharding(mesh))


def init_from_source(growth: GrowthSource, mesh: jax.sharding.Mesh) -> Params:
    """Return the student's initial parameters, sharded on the mesh by their logical axes.

    They are never gathered on one device or on the host.
    """
    source_params = to_global(
        growth.source.params, infer_shardings(growth.source.params, growth.source.model, mesh)
    )
    build = lambda params: apply.grow_params(growth.plan, params)  # noqa: E731
    return jax.jit(
        build, out_shardings=infer_shardings(jax.eval_shape(build, source_params), growth.plan.target, mesh)
    )(source_params)


def growth_report(growth: GrowthSource, params: Params, probe: Batch | None) -> RemapReport:
    """Report which parameters the student takes from its source, and the change of the logits.

    Args:
        growth: the source and the plan.
        params: the student's parameters, or their shapes if there is no probe.
        probe: a batch [B, L] to compare the logits on; None: they are not compared.
    """
    result = remap_report(growth.plan, growth.source.params, params)
    if growth.uses_ligo:  # the shares are those of the initial maps
        result = dataclasses.replace(
            result, function_preserving=False, reasons_not_preserving=("ligo: the maps are learned",)
        )
    if probe is None:
        return result
    source, target = growth.plan.source, growth.plan.target
    length = min(source.max_length, target.max_length)
    tokens, segment_ids = np.asarray(probe.tokens), np.asarray(probe.segment_ids)
    rows = {
        "tokens": np.minimum(tokens, source.vocab_size - 1)[:, :length].astype(np.int32),
        "segments": segment_ids[:, :length].astype(np.int32),
    }
    return result.with_logit_drift(logit_drift(growth.source.params, source, params, target, rows))


def probe_rows(rows: PackedDataset, seed: int) -> Batch:
    """Return the first rows that a run trains on."""
    return get_batch(rows, seed, 0, PROBE_ROWS)


def format_growth_line(growth: GrowthSource, result: RemapReport) -> str:
    """Return the report as one line."""
    source_config = growth.source.model
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in result.shares().items())
    function_text = (
        "computes what that did"
        if result.function_preserving
        else f"another function ({result.reasons_not_preserving[0]})"
    )
    drift_text = (
        "; logits moved by {rms:.2g} of {spread:.2g} (rms)".format(**result.logit_drift)
        if result.logit_drift
        else ""
    )
    return (
        f"student grown from {growth.path} ({source_config.num_hidden_layers} x {source_config.hidden_size}"
        f"{f', step {growth.step}' * bool(growth.step)}) by {result.method}: "
        f"{shares}; {function_text}{drift_text}"
    )


def source_training_flops(
    growth: GrowthSource, workdir: Path, *teachers: LoadedTeacher | CachedTeacher | None
) -> float | None:
    """Return the FLOPs of the source's pre-training and of learning a growth operator.

    It is 0 if the source is one of the teachers, whose cost is already counted, or if nothing is taken from
    it. It is None if it is not known.
    """
    if growth.plan.method.random_init:
        return 0.0
    is_teacher = any(growth.source.digest in teacher.digests for teacher in teachers if teacher)
    ligo_flops = ligo_training_flops(workdir) if growth.uses_ligo else 0.0
    return sum_or_none(0.0 if is_teacher else growth.source.training_flops, ligo_flops)
