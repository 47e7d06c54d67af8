import dataclasses

import jax
import numpy as np
import pytest

from dwt_jax.models import bert, flops
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.lm_head import lm_head_logits
from dwt_jax.runs import peak_flops
from helpers.jaxprs import count_flops

ROWS, LENGTH, PREDICTIONS = 2, 12, 3


def read(params, model, tokens, segments, positions):
    return lm_head_logits(params, model, bert.encode(params, model, tokens, segments, positions=positions))


def inputs():
    ones = np.ones((ROWS, LENGTH), np.int32)
    return ones, ones, np.zeros((ROWS, PREDICTIONS), np.int32)


@pytest.mark.parametrize(
    "model",
    [
        BertConfig(
            vocab_size=300, hidden_size=24, num_hidden_layers=1, num_attention_heads=1, intermediate_size=40
        ),
        BertConfig(
            vocab_size=256, hidden_size=24, num_hidden_layers=5, num_attention_heads=4, intermediate_size=17
        ),
    ],
    ids=["one", "five"],
)
def test_the_formula_is_what_the_program_does(model):
    program = jax.make_jaxpr(lambda params: read(params, model, *inputs()))(bert.abstract_params(model))
    assert flops.forward_flops(model, ROWS, LENGTH, PREDICTIONS) == count_flops(program.jaxpr)


def test_the_backward_pass_is_twice_the_forward_pass():
    """All but the product that would give the gradient of an input: the encoder has none above the
    embeddings' sum, so here too every product has two."""
    model = BertConfig(
        vocab_size=300, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40
    )
    program = jax.make_jaxpr(jax.grad(lambda params: read(params, model, *inputs()).sum()))(
        bert.abstract_params(model)
    )
    assert flops.training_step_flops(model, ROWS, LENGTH, PREDICTIONS) == count_flops(program.jaxpr)


@pytest.mark.parametrize(("layers", "percent"), [(1, 4.5), (2, 10.3), (4, 21.8)])
def test_the_cost_of_the_papers_teachers(layers, percent):
    """8, 13 and 23 % would they and the student compute the last layer at every position."""
    student = BertConfig(vocab_size=30522)
    teacher = dataclasses.replace(student, num_hidden_layers=layers)
    extra = flops.forward_flops(teacher, 128, 128, 19) / flops.training_step_flops(student, 128, 128, 19)
    assert 100 * extra == pytest.approx(percent, abs=0.1)


def test_the_peak_of_a_cpu_is_what_the_environment_says(monkeypatch):
    monkeypatch.setenv("DWT_PEAK_FLOPS", "3e11")
    assert peak_flops.peak_flops_per_device("float32") == 3e11


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.delenv("DWT_PEAK_FLOPS", raising=False)
    assert 1e8 < peak_flops._measure_peak_flops("float32", 256) < 1e14


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("TPU v6e", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("something else", None),
    ],
)
def test_peaks_of_the_data_sheets(monkeypatch, kind, peak):
    class Device:
        platform = "tpu"
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert peak_flops.peak_flops_per_device("bfloat16") == peak
