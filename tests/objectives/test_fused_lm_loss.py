"""The gradient of the fused loss against autodiff of its reference and of plain jax.numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dwt_jax.config import Distill
from dwt_jax.models.common import lm_head
from dwt_jax.models.common.matmul import Policy
from dwt_jax.objectives import fused_lm_loss as fused_module
from dwt_jax.objectives.distillation import LossWeights, loss_sums, total_loss
from dwt_jax.objectives.fused_lm_loss import LMHead, LossConfig, fused_lm_loss, fused_lm_loss_reference

B, P, D, V, PADDED = 6, 5, 8, 17, 20


def head(random, width: int) -> LMHead:
    shapes = (B, P, width), (PADDED, width), (PADDED,)
    return LMHead(*(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes))


def plain_logits(one: LMHead) -> jax.Array:
    logits = jnp.einsum("bpd,vd->bpv", one.features, one.embedding)
    if one.bias is not None:
        logits = logits + one.bias[None, None]
    return jnp.where((jnp.arange(PADDED) < V)[None, None], logits, -1e9)


def plain(student, teacher, labels, weights, knobs, distill):
    sums = loss_sums(
        plain_logits(student),
        None if teacher is None else jax.lax.stop_gradient(plain_logits(teacher)),
        labels,
        weights,
        knobs.temperature,
        distill,
        False,
    )
    return total_loss(sums, knobs, distill), sums


@pytest.fixture
def inputs():
    random = np.random.default_rng(3)
    labels = random.integers(0, V, (B, P)).astype(np.int32)
    weights = (np.arange(P) < (P - np.arange(B))[:, None]).astype(np.float32)  # the last row has none
    knobs = LossWeights(*(jnp.float32(x) for x in (0.7, 2.5, 1.7, weights.sum())))
    return head(random, D), head(random, D // 2), labels, weights, knobs


@pytest.mark.parametrize("tile", [0, 1, 4, 6, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_by_temperature_squared": True, "divergence": "reverse_kl"},
        {"divergence": "jensen_shannon", "token_selection": "teacher_better"},
        {"token_selection": "entropy", "drop_fraction": 0.4},
    ],
)
def test_value_sums_and_gradient_are_those_of_autodiff(inputs, tile, options):
    student, teacher, labels, weights, knobs = inputs
    distill = Distill(loss_chunk_rows=tile, **options)
    static = LossConfig(distill, False, V, Policy())

    def ours(student):
        return fused_lm_loss(student, (teacher,), labels, weights, knobs, static)

    def theirs(student):
        return plain(student, teacher, labels, weights, knobs, distill)

    def reference(student):
        return fused_lm_loss_reference(student, (teacher,), labels, weights, knobs, static)

    found = jax.value_and_grad(ours, has_aux=True)(student)
    for other in (theirs, reference):
        expected = jax.value_and_grad(other, has_aux=True)(student)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("tile", [0, 4])
@pytest.mark.parametrize(
    "options", [{"divergence": "reverse_kl"}, {"token_selection": "entropy", "drop_fraction": 0.4}]
)
def test_several_teachers_are_one_with_the_mean_of_their_probabilities(inputs, tile, options):
    student, teacher, labels, weights, knobs = inputs
    teachers = teacher, head(np.random.default_rng(5), 2 * D)
    distill, shares = Distill(loss_chunk_rows=tile, **options), (0.25, 0.75)
    static = LossConfig(distill, False, V, Policy(), shares)
    found = jax.value_and_grad(
        lambda s: fused_lm_loss(s, teachers, labels, weights, knobs, static), has_aux=True
    )(student)

    first, second = (scipy.special.softmax(plain_logits(x)[..., :V], axis=-1) for x in teachers)
    mixed = np.full((B, P, PADDED), -1e9, np.float32)
    mixed[..., :V] = np.log(0.25 * first + 0.75 * second)

    def theirs(student):
        sums = loss_sums(plain_logits(student), mixed, labels, weights, knobs.temperature, distill, False)
        return total_loss(sums, knobs, distill), sums

    expected = jax.value_and_grad(theirs, has_aux=True)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_without_a_teacher_it_is_the_cross_entropy(inputs):
    student, _, labels, weights, knobs = inputs
    static = LossConfig(Distill(), True, V, Policy())
    found = jax.grad(lambda s: fused_lm_loss(s, (), labels, weights, knobs, static)[0])(student)
    expected = jax.grad(lambda s: plain(s, None, labels, weights, knobs, Distill())[0])(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("tile", [0, 4])
def test_heads_without_bias_have_logits_and_gradients_without_it(inputs, tile):
    student, teacher, labels, weights, knobs = inputs
    student, teacher = (dataclasses.replace(one, bias=None) for one in (student, teacher))
    distill = Distill(loss_chunk_rows=tile)
    static = LossConfig(distill, False, V, Policy())
    found = jax.value_and_grad(
        lambda s: fused_lm_loss(s, (teacher,), labels, weights, knobs, static), has_aux=True
    )(student)
    expected = jax.value_and_grad(lambda s: plain(s, teacher, labels, weights, knobs, distill), has_aux=True)(
        student
    )
    assert found[1].bias is None
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_a_factor_outside_reaches_the_gradient_and_the_teacher_gets_none(inputs):
    student, teacher, labels, weights, knobs = inputs
    static = LossConfig(Distill(), False, V, Policy())

    def loss(student, teacher, factor):
        return factor * fused_lm_loss(student, (teacher,), labels, weights, knobs, static)[0]

    one, three = (jax.grad(loss)(student, teacher, factor) for factor in (1.0, 3.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-5, atol=1e-6), one, three)
    to_teacher = jax.grad(loss, argnums=1)(student, teacher, 1.0)
    assert not any(np.any(x) for x in jax.tree.leaves(to_teacher))


def test_columns_of_padding_and_rows_without_predictions_get_no_gradient(inputs):
    student, teacher, labels, weights, knobs = inputs
    static = LossConfig(Distill(loss_chunk_rows=2), False, V, Policy())
    gradient = jax.grad(lambda s: fused_lm_loss(s, (teacher,), labels, weights, knobs, static)[0])(student)
    assert not np.any(gradient.embedding[V:])
    assert not np.any(gradient.bias[V:])
    assert not np.any(gradient.features[weights == 0])


def test_bf16_operands_stay_near_fp32(inputs):
    student, teacher, labels, weights, knobs = inputs
    gradients = [
        jax.grad(
            lambda s, n=n: fused_lm_loss(
                s, (teacher,), labels, weights, knobs, LossConfig(Distill(), False, V, n)
            )[0]
        )(student)
        for n in (Policy(), Policy(jnp.dtype("bfloat16"), jnp.dtype("float32"), True))
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)


@pytest.mark.parametrize("selection", ["all", "teacher_better", "entropy"])
def test_logits_of_a_few_positions_at_a_time_give_the_same_loss_and_gradient(inputs, monkeypatch, selection):
    """By default, where a batch has more than MAX_LOGITS; whole rows where a row's positions are compared."""
    student, teacher, labels, weights, knobs = inputs
    static = LossConfig(Distill(token_selection=selection), False, V, Policy())
    shapes = []

    def loss(student):
        return fused_lm_loss(student, (teacher,), labels, weights, knobs, static)

    def record(*args):
        shapes.append(args[0].shape)
        return lm_logits(*args)

    lm_logits = fused_module.lm_logits
    monkeypatch.setattr(fused_module, "lm_logits", record)
    expected = jax.value_and_grad(loss, has_aux=True)(student)
    monkeypatch.setattr(lm_head, "MAX_LOGITS", B * 256)  # the logits of one position of each row
    found = jax.value_and_grad(loss, has_aux=True)(student)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)
    rows = [shape[0] for shape in shapes]
    assert set(rows) == {B * P, B if selection != "entropy" else P}


def test_the_number_of_chunks_is_the_least_divisor_that_fits():
    limit = lm_head.MAX_LOGITS
    for rows, positions, vocab_size in (
        (16, 8192, 32000),
        (16, 8192, 151936),
        (1, 8192, 151936),
        (3, 77, 10**7),
    ):
        count = lm_head.num_position_chunks(rows, positions, vocab_size, Policy())
        size = rows * lm_head.padded_vocab_size(vocab_size)
        assert positions % count == 0
        assert positions // count * size <= limit or count == positions
        fits = [n for n in range(1, count) if positions % n == 0 and positions // n * size <= limit]
        assert not fits
