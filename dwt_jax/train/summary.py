"""The log lines at the start of a run, and its results at the end: `model/` and `summary.json`."""

from typing import Any

import jax

from dwt_jax import __version__
from dwt_jax.config import Config
from dwt_jax.data.batch_ramp import describe_rows_per_step
from dwt_jax.data.dataset import rows_per_epoch
from dwt_jax.distributed import coordination
from dwt_jax.distributed.mesh import to_host
from dwt_jax.files import read_json, write_json
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.models import family
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.objectives import OBJECTIVE_LABELS
from dwt_jax.runs.load import load_model
from dwt_jax.runs.metric_writer import MetricWriter
from dwt_jax.runs.metrics_file import total_flops
from dwt_jax.runs.optimizer import optimizer_flops
from dwt_jax.runs.pretrained import params_digest
from dwt_jax.runs.state import TrainState
from dwt_jax.runs.teacher import LoadedTeacher
from dwt_jax.runs.teacher_cache import CachedTeacher
from dwt_jax.text_format import format_count
from dwt_jax.train.accounting import flops_so_far, get_teacher_end_step
from dwt_jax.train.initialize import (
    GrowthSource,
    format_growth_line,
    growth_report,
    probe_rows,
    source_training_flops,
)
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.run_state import effective_params


def log_run_summary(run: RunContext, state: TrainState, start_step: int, metric_writer: MetricWriter) -> None:
    """Log devices, sizes, teacher and growth source before the first step."""
    model, train_config, device = run.config.model, run.config.train, jax.devices()[0]
    num_params = sum(x.size for x in jax.tree.leaves(family(model).abstract_params(model)))
    epoch_rows = rows_per_epoch(run.rows)
    metric_writer.log_message(
        f"{jax.device_count()} {device.platform} device(s) ({device.device_kind}), "
        f"{run.policy.compute_dtype}, {run.policy.attention} attention; "
        f"student {model.num_hidden_layers} x {model.hidden_size}, {format_count(num_params)} parameters; "
        f"{train_config.steps} steps of {describe_rows_per_step(train_config)} of "
        f"{run.config.data.sequence_length} positions ({run.rows.tokens_per_row:.1f} tokens): "
        f"{run.batch_sizes.sum() / epoch_rows:.3g} epochs of {epoch_rows:,} rows"
    )
    if update_flops := optimizer_flops(run.config.optimizer, model):
        metric_writer.log_message(
            f"{run.config.optimizer.kind}: {update_flops / run.student_flops.mean():.0%} of the student's "
            "FLOPs per step are Newton-Schulz iterations"
        )
    if run.growth is not None:
        log_growth_source(run, run.growth, state.params, start_step, metric_writer)
    if run.teacher is None:
        label = OBJECTIVE_LABELS[model.objective]
        metric_writer.log_message(f"no teacher: training on the {label} loss only")
    else:
        ratio = run.teacher_flops.sum() / run.student_flops.sum()
        metric_writer.log_message(
            f"teacher {_describe_teacher(run.teacher, run.config)}: +{ratio:.0%} FLOPs per step"
            f"{' (charged, computed before)' if isinstance(run.teacher, CachedTeacher) else ''}"
        )
        if run.teacher_end_step == 0:
            metric_writer.log_message("the teacher is not used: distill.alpha_soft is 0 at every step")
        elif start_step >= get_teacher_end_step(run, state.teacher_gap.matched_step, start_step):
            metric_writer.log_message("the teacher is no longer used: alpha_soft is 0 from here on")
    if start_step:
        metric_writer.log_message(f"resumed at step {start_step}")
    elif metric_writer.num_dropped:
        metric_writer.log_message("no checkpoint of the steps before: the run begins again, and its metrics")


def _describe_teacher(teacher: LoadedTeacher | CachedTeacher, config: Config) -> str:
    """Return the sizes, the weights and the paths of a teacher's models."""
    weights = teacher.config.weights
    paths = config.teacher.model_paths
    if isinstance(teacher, CachedTeacher):
        paths = (f"the cache {config.teacher.cache}",) * len(weights)
    return " + ".join(
        f"{f'{weight:.3g} of ' if len(weights) > 1 else ''}"
        f"{model.num_hidden_layers} x {model.hidden_size} from {path}"
        for weight, model, path in zip(weights, teacher.config.models, paths, strict=True)
    )


def log_growth_source(
    run: RunContext, growth: GrowthSource, params: Any, step: int, metric_writer: MetricWriter
) -> None:
    """Log the source of a grown student. Before the first step, also write the report to `init.json`."""
    if step:
        metric_writer.log_message(format_growth_line(growth, growth_report(growth, params, None)))
        return
    params = params if coordination.is_single_process() else to_host(params)

    def write_report() -> None:
        report = growth_report(growth, params, probe_rows(run.rows, run.config.seed))
        metric_writer.log_message(format_growth_line(growth, report))
        path = run.workdir / "init.json"
        ligo_record = {"ligo": read_json(path)["ligo"]} if growth.uses_ligo else {}
        write_json(path, {"from": growth.path, **ligo_record, **report.to_dict()})

    coordination.run_on_main(write_report)


def export_and_summarize(
    run: RunContext,
    state: TrainState,
    teacher_steps: int,
    eval_metrics: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """Write `model/`, then `summary.json`, whose presence marks the run as complete.

    Args:
        run: the run.
        state: the last state.
        teacher_steps: number of steps that used the teacher.
        eval_metrics: record of the last evaluation.
        seconds: wall-clock time of this process.

    Returns:
        The summary.
    """
    steps = run.config.train.steps
    total_work = flops_so_far(run, steps, teacher_steps)
    summary = {
        "steps": steps,
        "held_out": eval_metrics,
        "skipped_updates": int(jax.device_get(state.skipped.total)),
        "seconds_of_this_process": seconds,
        "flops": {
            "student": total_work["student_flops"],
            "teacher_forward": total_work["teacher_flops"],
            "total": total_flops(total_work),
            "teacher_training": run.teacher.training_flops if run.teacher else 0.0,
            **(
                {"source_training": source_training_flops(run.growth, run.workdir, run.teacher)}
                if run.growth
                else {}
            ),
        },
        "teacher_steps": max(0, teacher_steps - run.config.init.step),
        "teachers": [_model_sizes(model) for model in run.teacher.config.models] if run.teacher else [],
        **({"init": _init_summary(run.growth)} if run.growth else {}),
        "data": _data_sizes(run),
        "versions": {"dwt_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "compute": str(run.policy.compute_dtype),  # what precision.compute_dtype=auto came to
        "attention": run.policy.attention,
    }
    params = to_host(effective_params(run, state.params, steps))

    def save_model() -> None:
        checkpoint.save_checkpoint(
            params,
            run.config.model,
            run.workdir / "tokenizer",
            run.workdir / "model",
            card=model_card.run_card(run.config, family(run.config.model).LM_HEADS, summary, steps),
        )
        # Read back: rows of the vocabulary without a token are not written. The digest tells the model where
        # its weights have been removed.
        summary["params_digest"] = params_digest(load_model(str(run.workdir)).params)
        write_json(run.workdir / "summary.json", summary)

    coordination.run_on_main(save_model, "process 0 to write the model")
    return summary


def _model_sizes(model: ModelConfig) -> dict[str, int]:
    return {"num_hidden_layers": model.num_hidden_layers, "hidden_size": model.hidden_size}


def _init_summary(growth: GrowthSource) -> dict[str, Any]:
    step_entry = {"step": growth.step} if growth.step else {}
    return {
        "method": growth.plan.method.name,
        "function_preserving": growth.plan.function_preserving and not growth.uses_ligo,
        **step_entry,
        **_model_sizes(growth.source.model),
    }


def _data_sizes(run: RunContext) -> dict[str, float]:
    index = read_json(run.data / "index.json")
    sizes = {
        f"{split}_{unit}": index["splits"][split][unit]
        for split in ("train", "held_out")
        for unit in ("documents", "tokens")
    }
    return {**sizes, "tokens_per_row": run.rows.tokens_per_row}
