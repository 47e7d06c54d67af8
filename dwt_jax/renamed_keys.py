"""Config keys of earlier versions. A config with one is rejected with a message that has the new key."""

from collections.abc import Container

RENAMED_KEYS = {
    "mask": "mlm",
    "mask.rate": "mlm.probability",
    "mask.replace": "mlm.mask_token_share",
    "mask.random": "mlm.random_token_share",
    "train.accumulate": "train.gradient_accumulation_steps",
    "train.checkpoint_every": "train.save_every",
    "train.evaluate_every": "train.eval_every",
    "train.max_skipped": "train.max_consecutive_nonfinite",
    "train.wandb": "train.wandb_project",
    "data.held_out": "data.validation_fraction",
    "data.keep_every": "data.sentence_stride",
    "data.mode": "data.row_mode",
    "init.anneal": "init.gate_warmup",
    "init.rewarm": "init.new_param_warmup",
    "distill.squared_temperature": "distill.scale_by_temperature_squared",
    "distill.selection": "distill.token_selection",
    "distill.entropy_share": "distill.drop_fraction",
    "distill.tile": "distill.loss_chunk_rows",
    "distill.beaten_margin": "distill.match_margin",
    "distill.beaten_smoothing": "distill.gap_ema_decay",
    "precision.compute": "precision.compute_dtype",
    "recipe.at_once": "recipe.seeds_in_parallel",
    "examples.first": "examples.text_column",
    "examples.second": "examples.text_pair_column",
    "elsewhere": "out_of_domain",
    "examples.limit": "examples.max_train_examples",
}
"""New key by the old key. `recipe.` and `examples.` are sections of a fine-tuning config."""

SCHEDULE_KEYS = {"warmup": "warmup_fraction", "begin": "decay_start", "until": "decay_end"}
"""New field of a `Schedule` by the old field."""

RENAMED_VALUES = {"steps": "piecewise", "until_beaten": "until_matched"}
"""New value of a `Schedule`'s `kind` by the old value."""


def renamed_key(path: str, valid_keys: Container[str]) -> str | None:
    """Return the new key for a key of an earlier version, or None.

    Args:
        path: the dotted key, such as `train.accumulate`.
        valid_keys: the keys of the section that `path` is in; empty if unknown.
    """
    parent, _, name = path.rpartition(".")
    new_name = SCHEDULE_KEYS.get(name, "")
    if path in RENAMED_KEYS:
        return RENAMED_KEYS[path]
    return f"{parent}.{new_name}" if new_name in valid_keys else None
