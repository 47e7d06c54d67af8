"""A run's settings in words."""

from collections.abc import Mapping
from typing import Any

from dwt_jax.config import Train
from dwt_jax.config_loader import build_dataclass
from dwt_jax.data.batch_ramp import describe_rows_per_step
from dwt_jax.models import DEFAULT_MODEL_TYPE, model_config_type
from dwt_jax.study.run_records import RunRecord, teacher_paths
from dwt_jax.text_format import format_share


def describe_schedule(schedule: Mapping[str, Any]) -> str:
    """Describe a schedule in words.

    For example '4 → 1 linear', '2 → 0 cosine from 10 % to 80 %' or '1, from 50 % on 0'.
    """
    kind, value, end = schedule["kind"], f"{schedule['value']:g}", f"{schedule['end']:g}"
    warmup, decay_start, decay_end = (
        schedule.get(key, default)
        for key, default in (("warmup_fraction", 0), ("decay_start", 0), ("decay_end", 1))
    )
    rise = f", warm-up {format_share(warmup)}" if warmup else ""
    if kind == "constant":
        return value + rise
    if kind == "until_matched":
        return f"{value} until the teacher is matched{rise}"
    if boundaries := schedule.get("boundaries"):
        stages = zip(boundaries, schedule["boundary_values"], strict=True)
        return value + "".join(f", from {format_share(at)} on {x:g}" for at, x in stages) + rise
    if kind == "piecewise":
        return f"{value}, from {format_share(decay_start)} on {end}{rise}"
    name = kind.replace("_", "-")
    if (decay_type := schedule.get("decay_type", "linear")) != "linear":
        name += f" ({decay_type})"
    span = f" from {format_share(decay_start)}" if decay_start > warmup else ""
    span += f" to {format_share(decay_end)}" if decay_end != 1 else ""
    return f"{value} → {end} {name}{span}{rise}"


def describe_masks(config: Mapping[str, Any]) -> str:
    """Describe the schedule of the share of masked tokens, which models of next tokens do not have."""
    model_type = config["model"].get("model_type", DEFAULT_MODEL_TYPE)
    if model_config_type(model_type)(model_type=model_type).objective != "mlm":
        return "none, each next token is predicted"
    probability = config["mlm"]["probability"]
    if probability["kind"] == "constant":
        return f"{format_share(probability['value'])} of the tokens"
    return f"{describe_schedule(probability)}, as a share of the tokens"


def describe_batch(run: RunRecord) -> str:
    """Describe the rows of the steps of a run, which an older version may have made."""
    train = run.config["train"]
    keys = ("batch_size", "batch_ramp", "batch_ramp_fraction")
    settings = {key: train[key] for key in keys if key in train}
    return describe_rows_per_step(build_dataclass(Train, {**settings, "steps": run.summary["steps"]}))


def describe_loss_weights(config: Mapping[str, Any]) -> str:
    """Describe the objective; parts with their default value are left out."""
    distill = config["distill"]
    if not teacher_paths(config):
        return "–"
    parts = [
        f"hard {describe_schedule(distill['alpha_hard'])}",
        f"soft {describe_schedule(distill['alpha_soft'])}",
    ]
    temperature = describe_schedule(distill["temperature"])
    parts += [f"t {temperature}"] if temperature != "1" else []
    parts += ["× t²"] if distill.get("scale_by_temperature_squared") and temperature != "1" else []
    for key, default in (("divergence", "forward_kl"), ("token_selection", "all")):
        parts += [distill[key].replace("_", " ")] if distill.get(key, default) != default else []
    return "; ".join(parts)
