"""What each part of the recipe of configs/modernbert.py is worth, on the built-in corpus.

    dwt study --config=configs/study/recipe.py --workdir=studies/recipe

Every arm has the rows, the steps and about the parameters of configs/modernbert.py:2x128. The held-out loss
is at 15 % masks, whatever an arm is trained with.
"""

from ml_collections import ConfigDict

SEEDS = [0, 1]
ROWS = ["data.row_mode=wrapped"]
ADAMW = ["optimizer.kind=adamw", "optimizer.learning_rate.value=4e-3", "optimizer.b2=0.98"]
FEWER_MASKS = ["mlm.probability=0.15"]
MORE_MASKS = ["mlm.probability=0.4"]
GELU_HEAD = ["model.classifier_activation=gelu", "model.initializer_range=0.05"]
BERT, MODERNBERT = "configs/small_bert.py:2x128", "configs/modernbert.py:2x128"
ARMS = {  # label, config, overrides
    "bert": ("BERT: learned positions, AdamW, 15 % masks", BERT, ROWS),
    "bert-masks": ("… 40 % masks", BERT, [*ROWS, *MORE_MASKS]),
    "roformer": ("BERT with rotary positions", BERT, [*ROWS, "model.model_type=roformer"]),
    "modernbert-adamw": ("ModernBERT, AdamW, 15 % masks", MODERNBERT, [*GELU_HEAD, *ADAMW, *FEWER_MASKS]),
    "modernbert-adamw-masks": ("… 40 % masks", MODERNBERT, [*GELU_HEAD, *ADAMW]),
    "modernbert-muon": ("ModernBERT, Muon, 15 % masks", MODERNBERT, [*GELU_HEAD, *FEWER_MASKS]),
    "modernbert-muon-masks": ("… 40 % masks", MODERNBERT, GELU_HEAD),
    "recipe": ("… head without an activation, initialisation 0.035", MODERNBERT, []),
}


def get_config() -> ConfigDict:
    arms = [
        {"name": name, "config": config, "role": "student", "seeds": SEEDS, "label": label, "set": overrides}
        for name, (label, config, overrides) in ARMS.items()
    ]
    return ConfigDict({"title": "Parts of the recipe", "baseline": "bert", "arms": arms})
