"""Distillation from a sample of the teacher: right on average for draws, the divergence of a coarser
distribution for the k most probable tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dwt_jax.config import Distill
from dwt_jax.models.common.matmul import Policy
from dwt_jax.objectives.distillation import LossWeights, loss_sums
from dwt_jax.objectives.fused_lm_loss import LMHead, LossConfig, fused_lm_loss, fused_lm_loss_reference
from dwt_jax.objectives.teacher_sample import TeacherSample, draw_tokens, sample_divergence

B, P, D, V, N = 4, 3, 8, 40, 10


@pytest.fixture
def random():
    return np.random.default_rng(5)


@pytest.fixture
def logits(random):
    """(student, teacher), float32 [B, P, V]"""
    return tuple(jnp.asarray(random.normal(scale=2, size=(B, P, V)), jnp.float32) for _ in range(2))


def sample_of(teacher: jax.Array, labels: np.ndarray, uniform, count: int = N) -> TeacherSample:
    log_p = jax.nn.log_softmax(teacher)
    ids = draw_tokens(log_p, jnp.asarray(uniform, jnp.float32), count)
    label_log_prob = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return TeacherSample(ids, jnp.full(ids.shape, 1 / count, jnp.float32), label_log_prob, entropy)


def top_k_of(teacher: jax.Array, labels: np.ndarray, k: int) -> TeacherSample:
    whole = sample_of(teacher, labels, np.zeros((B, P)))
    p, ids = jax.lax.top_k(jax.nn.softmax(teacher), k)
    return dataclasses.replace(whole, ids=ids.astype(jnp.int32), weights=p, kind="top_k")


def test_numbers_of_draws_have_the_teachers_probabilities_as_their_mean(logits):
    """The mean over the one random number is an integral, here over a grid of its values."""
    log_p, grid = jax.nn.log_softmax(logits[1]), (np.arange(2000) + 0.5) / 2000
    draw = jax.jit(lambda u: draw_tokens(log_p, jnp.full((B, P), u), N))
    counts = np.mean(
        [np.asarray(jax.nn.one_hot(draw(u), V).sum(-2)) for u in grid.astype(np.float32)], axis=0
    )
    np.testing.assert_allclose(counts / N, np.exp(log_p), atol=2e-4)


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-24])
def test_a_token_is_drawn_about_as_often_as_expected_and_likely_ones_always(logits, u):
    log_p = jax.nn.log_softmax(logits[1])
    ids = np.asarray(draw_tokens(log_p, jnp.full((B, P), u, jnp.float32), N))
    counts = np.stack([[np.bincount(row, minlength=V) for row in rows] for rows in ids])
    assert (counts.sum(-1) == N).all()
    assert (np.diff(ids) >= 0).all()
    assert (np.abs(counts - N * np.exp(log_p)) < 1 + 1e-4).all()
    assert (counts[np.exp(log_p) > 1 / N + 1e-5] > 0).all()


def test_no_token_without_probability_is_drawn():
    log_p = jnp.log(jnp.asarray([[0.0, 0.5, 0.0, 0.5, 0.0]], jnp.float32))
    for u in (0.0, 0.5, 1 - 2**-24):
        assert set(np.asarray(draw_tokens(log_p, jnp.full((1,), u, jnp.float32), 50)).ravel()) <= {1, 3}


def test_the_mean_of_the_estimate_is_the_divergence(logits, random):
    student, teacher = logits
    labels = random.integers(0, V, (B, P))
    estimate = jax.jit(lambda u: sample_divergence(student, sample_of(teacher, labels, u)))
    values = np.stack([estimate(u) for u in random.uniform(size=(1500, B, P))])
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), axis=-1) for x in (teacher, student))
    expected = scipy.stats.entropy(p, q, axis=-1)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    assert (np.abs(values.mean(0) - expected) < 4.5 * error + 1e-5).all()


@pytest.mark.parametrize("chunk_rows", [0, 1, 3])
@pytest.mark.parametrize("selection", ["all", "teacher_better", "entropy"])
def test_the_mean_of_the_gradient_is_that_of_the_whole_distribution(random, chunk_rows, selection):
    """Through the fused head, with its bias. The gradient is linear in the draws, so that its mean is the
    integral over one random number that all positions share."""
    labels = random.integers(0, V, (B, P)).astype(np.int32)
    weights = np.ones((B, P), np.float32)
    weights[-1, 1:] = 0
    student, teacher = (
        LMHead(*(jnp.asarray(random.normal(size=s), jnp.float32) for s in ((B, P, D), (V, D), (V,))))
        for _ in range(2)
    )
    distill = Distill(token_selection=selection, drop_fraction=0.4, loss_chunk_rows=chunk_rows)
    static = LossConfig(distill, True, V, Policy())
    knobs = LossWeights(*(jnp.float32(x) for x in (0.7, 2.5, 1.0, weights.sum())))

    def gradient(teachers):
        return jax.value_and_grad(
            lambda head: fused_lm_loss(head, teachers, labels, weights, knobs, static), has_aux=True
        )(student)

    teacher_logits = jnp.einsum("bpd,vd->bpv", teacher.features, teacher.embedding) + teacher.bias
    from_draws = jax.jit(lambda u: gradient(sample_of(teacher_logits, labels, u)))
    grid = (np.arange(1000) + 0.5) / 1000
    draws = [from_draws(np.full((B, P), u, np.float32)) for u in grid]
    (loss, sums), expected = gradient((teacher,))
    values = np.array([value for (value, _), _ in draws])
    assert values.std() > 0.01
    assert values.mean() == pytest.approx(float(loss), rel=1e-4)
    for (_, found), _ in draws[:3]:
        for name in ("predictions", "hard", "teacher_hard", "num_selected"):
            np.testing.assert_allclose(getattr(found, name), getattr(sums, name), rtol=1e-5, err_msg=name)
    for part in ("features", "embedding", "bias"):
        mean = np.mean([getattr(g, part) for _, g in draws], axis=0)
        np.testing.assert_allclose(mean, getattr(expected, part), atol=5e-4, err_msg=part)
    reference = jax.value_and_grad(
        lambda head: fused_lm_loss_reference(
            head, sample_of(teacher_logits, labels, np.full((B, P), 0.4)), labels, weights, knobs, static
        ),
        has_aux=True,
    )(student)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        from_draws(np.full((B, P), 0.4)),
        reference,
    )


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_k_is_the_divergence_with_all_other_tokens_as_one(logits, random, k):
    student, teacher = logits
    labels = random.integers(0, V, (B, P))
    p, q = (scipy.special.softmax(np.asarray(x, np.float64), axis=-1) for x in (teacher, student))
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    coarse = [np.concatenate([x[..., :k], x[..., k:].sum(-1, keepdims=True)], -1) for x in (p, q)]
    found = sample_divergence(student, top_k_of(teacher, labels, k))
    np.testing.assert_allclose(found, scipy.stats.entropy(*coarse, axis=-1), rtol=2e-4, atol=2e-5)
    whole = scipy.stats.entropy(p, q, axis=-1)
    assert (np.asarray(found) <= whole + 1e-4).all()  # biased: what is below the k tokens is not learned


def test_sums_have_the_teachers_loss_and_the_divergence(logits, random):
    student, teacher = logits
    labels, weights = random.integers(0, V, (B, P)), np.ones((B, P), np.float32)
    sample = top_k_of(teacher, labels, V)
    found = loss_sums(student, sample, labels, weights, 1.0, Distill(), True)
    expected = loss_sums(student, teacher, labels, weights, 1.0, Distill(), True)
    for field in dataclasses.fields(found):
        np.testing.assert_allclose(
            getattr(found, field.name), getattr(expected, field.name), rtol=1e-4, err_msg=field.name
        )
