"""A model of 1 x 32 as the source of one of 2 x 48, by learned maps."""

import jax

from dwt_jax.data.dataset import open_dataset
from dwt_jax.runs.load import load_model
from dwt_jax.train.ligo_training import LigoConfig, train_ligo_maps
from dwt_jax.train.setup import setup_run

SOURCE_SIZES = {"num_hidden_layers": 1}  # 1 x 32, see helpers/runs.py
TARGET_SIZES = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}
LIGO_CONFIG = LigoConfig(steps=30, learning_rate=1e-3, noise=0.01, validation_batches=4)


def model_overrides(sizes, **more):
    """Overrides for a model of these sizes without dropout."""
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return {**{f"model.{key}": str(value) for key, value in {**still, **sizes}.items()}, **more}


def make_run(folder, config):
    """Set up a run in a new directory."""
    folder.mkdir()
    return setup_run(config, folder)


def learn_maps(project, run, seed=0, settings=LIGO_CONFIG, **more):
    """Learn maps from the model in `source` of the project to the model of `run`: (params, record)."""
    source = load_model(str(project[0] / "source"))
    options = {
        "batch_size": 8,
        "schedule_values": run.schedule_values,
        "mesh": run.mesh,
        "seed": seed,
        "settings": settings,
    }
    held_out = open_dataset(run.data, "held_out")
    key = jax.random.key(seed)
    return train_ligo_maps(
        source.params, source.model, run.step_config, key, run.rows, held_out, **options, **more
    )
