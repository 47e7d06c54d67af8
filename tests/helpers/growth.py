"""Overrides of the config of helpers.runs for a student that is grown from another model."""

WIDER = {"model.hidden_size": "64", "model.num_attention_heads": "4", "model.intermediate_size": "128"}
DEEPER = {"model.num_hidden_layers": "3", "model.gated_layers": "true", "model.weighted_norm": "true"}
STILL = {"optimizer.learning_rate.value": "0", "optimizer.learning_rate.kind": "constant"}


def growth_overrides(project, method, *overrides, **more):
    """Overrides for a student grown from the run `small` of a project (config, folder)."""
    keys = {"init.method": method, "init.from": str(project[1] / "small")}
    for extra in overrides:
        keys |= extra
    return {**keys, **{key.replace("__", "."): value for key, value in more.items()}}
