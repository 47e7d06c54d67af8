"""Hugging Face's names of BERT, RoBERTa and DistilBERT: tensors and config keys."""

from typing import Any

from dwt_jax.models.common.hf_names import HFNames, encoder_names

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "position_embedding_type": ("absolute",),
    "pruned_heads": ({}, []),
    "quantization_config": (),
}
_BUFFERS = (".position_ids", ".token_type_ids")

_BERT_ENCODER = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layers/attention/query": "attention.self.query",
    "layers/attention/key": "attention.self.key",
    "layers/attention/value": "attention.self.value",
    "layers/attention/output": "attention.output.dense",
    "layers/attention/norm": "attention.output.LayerNorm",
    "layers/mlp/input": "intermediate.dense",
    "layers/mlp/output": "output.dense",
    "layers/mlp/norm": "output.LayerNorm",
    "pooler": "pooler.dense",
}

_DISTILBERT_ENCODER = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layers/attention/query": "attention.q_lin",
    "layers/attention/key": "attention.k_lin",
    "layers/attention/value": "attention.v_lin",
    "layers/attention/output": "attention.out_lin",
    "layers/attention/norm": "sa_layer_norm",
    "layers/mlp/input": "ffn.lin1",
    "layers/mlp/output": "ffn.lin2",
    "layers/mlp/norm": "output_layer_norm",
}

_BERT_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "hidden_act",
        "layer_norm_eps",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "initializer_range",
        "pad_token_id",
        "tie_word_embeddings",
    )
}

_BASE_DEFAULTS = {"vocab_size": 30522, "num_hidden_layers": 12}  # where the defaults of Config are others

HF_NAMES = {
    "bert": HFNames(
        class_prefix="Bert",
        prefix="bert.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **encoder_names("bert.", "encoder.layer", _BERT_ENCODER),
            "mlm/transform": "cls.predictions.transform.dense",
            "mlm/norm": "cls.predictions.transform.LayerNorm",
            "mlm/decoder": "cls.predictions.decoder",
            "mlm": "cls.predictions",
            "next_sentence": "cls.seq_relationship",
            "classifier": "classifier",
        },
        classifier_modules={},
        aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        config_keys=_BERT_FIELDS,
        defaults=_BASE_DEFAULTS,
        required_values=_REQUIRED_VALUES,
        buffers=_BUFFERS,
    ),
    "roberta": HFNames(
        class_prefix="Roberta",
        prefix="roberta.",
        bare_prefixes=("embeddings.", "encoder.", "pooler."),
        modules={
            **encoder_names("roberta.", "encoder.layer", _BERT_ENCODER),
            "mlm/transform": "lm_head.dense",
            "mlm/norm": "lm_head.layer_norm",
            "mlm/decoder": "lm_head.decoder",
            "mlm": "lm_head",
            "classifier": "classifier",
        },
        classifier_modules={"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
        aliases={"lm_head.decoder.bias": "lm_head.bias", "lm_head.weight": "lm_head.decoder.weight"},
        config_keys=_BERT_FIELDS,
        defaults={**_BASE_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1},
        required_values=_REQUIRED_VALUES,
        buffers=_BUFFERS,
    ),
    "distilbert": HFNames(
        class_prefix="DistilBert",
        prefix="distilbert.",
        bare_prefixes=("embeddings.", "transformer."),
        modules={
            **encoder_names("distilbert.", "transformer.layer", _DISTILBERT_ENCODER),
            "mlm/transform": "vocab_transform",
            "mlm/norm": "vocab_layer_norm",
            "mlm/decoder": "vocab_projector",
            "mlm": "vocab_projector",
            "pooler": "pre_classifier",
            "classifier": "classifier",
        },
        classifier_modules={},
        aliases={},
        config_keys={
            **{
                name: name
                for name in (
                    "vocab_size",
                    "max_position_embeddings",
                    "initializer_range",
                    "pad_token_id",
                    "tie_word_embeddings",
                )
            },
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        defaults={"vocab_size": 30522, "type_vocab_size": 0, "layer_norm_eps": 1e-12},
        required_values=_REQUIRED_VALUES,
        buffers=_BUFFERS,
    ),
}
