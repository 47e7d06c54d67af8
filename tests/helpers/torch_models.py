"""Small models of transformers in torch with every parameter random, and a batch for them."""

import re

import numpy as np

L = 9
CLASSES = [
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertModel",
    "BertForSequenceClassification",
    "DistilBertForMaskedLM",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
    "RobertaForMaskedLM",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "CamembertForMaskedLM",
    "CamembertForSequenceClassification",
    "XLMRobertaForMaskedLM",
    "XLMRobertaModel",
    "XLMRobertaForSequenceClassification",
    "RoFormerForMaskedLM",
    "RoFormerModel",
    "RoFormerForSequenceClassification",
    "ModernBertForMaskedLM",
    "ModernBertModel",
    "ModernBertForSequenceClassification",
    "EuroBertForMaskedLM",
    "EuroBertForSequenceClassification",
]

SMALL = {
    "layers": 2,
    "heads": 2,
    "head_size": 4,
    "mlp": 12,
    "vocab": 41,
    "types": 2,
    "act": "gelu",
    "eps": 1e-12,
    "tied": True,
    "labels": 3,
    "pad": 1,
    "range": 0.02,
}


def torch_model(name, size, seed=0):
    """A transformers model with every parameter random."""
    import torch
    import transformers

    width = size["heads"] * size["head_size"]
    common = {
        "vocab_size": size["vocab"],
        "max_position_embeddings": L + 4,
        "tie_word_embeddings": size["tied"],
        "num_labels": size["labels"],
        "pad_token_id": size.get("pad", 1),
        "initializer_range": size.get("range", 0.02),
    }
    if name.startswith("DistilBert"):
        config = transformers.DistilBertConfig(
            dim=width,
            n_layers=size["layers"],
            n_heads=size["heads"],
            hidden_dim=size["mlp"],
            activation=size["act"],
            **common,
        )
    elif name.startswith("ModernBert"):
        config = transformers.ModernBertConfig(
            hidden_size=width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            intermediate_size=size["mlp"],
            hidden_activation=size["act"],
            norm_eps=size["eps"],
            global_attn_every_n_layers=2,
            local_attention=4,
            classifier_pooling="mean" if size["labels"] % 2 else "cls",
            **common,
        )
    elif name.endswith("ForCausalLM") or name.startswith("EuroBert"):
        config = getattr(transformers, re.sub(r"(For[A-Z]\w+|Model)$", "Config", name))(
            hidden_size=width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["heads"] // 2 or 1,
            head_dim=size["head_size"],
            intermediate_size=size["mlp"],
            hidden_act="silu",
            rms_norm_eps=1e-6,
            **({"sliding_window": 4} if name.startswith("Mistral") else {}),
            **common,
        )
    else:
        config = getattr(transformers, re.sub(r"(For[A-Z]\w+|Model)$", "Config", name))(
            hidden_size=width,
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            intermediate_size=size["mlp"],
            hidden_act=size["act"],
            layer_norm_eps=size["eps"],
            type_vocab_size=size["types"],
            **common,
        )
    model = getattr(transformers, name)(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # RoFormer's table of sines is not trained
                parameter.normal_(0, 0.3)
    return model


def batch(model, seed=0):
    random = np.random.default_rng(seed)
    segments = (np.arange(L) < np.array([[L], [L - 4]])).astype(np.int32)
    tokens = np.where(segments > 0, random.integers(2, model.vocab_size, (2, L)), 1).astype(np.int32)
    types = (random.integers(0, max(getattr(model, "type_vocab_size", 0), 1), (2, L)) * segments).astype(
        np.int32
    )
    return tokens, segments, types
