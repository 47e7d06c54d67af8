"""Students of BERT's two sizes with packed rows of 128 tokens, and a smaller teacher for each.

    dwt train --config=configs/bert.py:base-teacher --workdir=runs/teacher
    dwt train --config=configs/bert.py:base --workdir=runs/base \\
        --config.teacher.path=runs/teacher --config.distill.preset=paper_decay

Data, masks and optimizer are those of configs/paper.py, but with every sentence.
"""

from ml_collections import ConfigDict

from dwt_jax.config_loader import sibling_config

SIZES = {
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "base-teacher": (6, 768, 12),
    "large-teacher": (12, 768, 12),
}


def get_config(run: str = "base") -> ConfigDict:
    if run not in SIZES:
        raise ValueError(f"no run {run!r}, expected one of {', '.join(SIZES)}")
    config = sibling_config(__file__, "paper").get_config()
    layers, width, heads = SIZES[run]
    config.model = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    config.data.update(row_mode="packed", sentence_stride=1)
    config.train.update(epochs=3, batch_size=512)
    return config
