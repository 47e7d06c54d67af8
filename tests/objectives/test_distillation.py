"""Against torch and scipy in float64: the code under test runs in fp32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

from dwt_jax.config import Distill
from dwt_jax.models.common.matmul import Policy
from dwt_jax.objectives.distillation import (
    LossWeights,
    cross_entropy,
    kd_divergence,
    loss_sums,
    token_weights,
    total_loss,
)
from dwt_jax.objectives.fused_lm_loss import LMHead, LossConfig, fused_lm_loss
from helpers.jaxprs import sub_jaxprs

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("strict_ranks")

B, P, V, D = 6, 5, 17, 8
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon"]


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.fixture
def logits(random):
    """(student, teacher), float32 [B, P, V]."""
    return tuple(3 * random.normal(size=(2, B, P, V)).astype(np.float32))


@pytest.fixture
def labels(random):
    return random.integers(0, V, (B, P)).astype(np.int32)


@pytest.fixture
def weights(random):
    """Rows with 5, 4, 3, 2, 1 and no predictions."""
    return (np.arange(P) < (P - np.arange(B))[:, None]).astype(np.float32)


def divergence64(student, teacher, t, kind):
    """scipy, float64, over the last axis."""
    p, q = (softmax(np.float64(x) / t, axis=-1) for x in (teacher, student))
    if kind == "forward_kl":
        return rel_entr(p, q).sum(-1)
    if kind == "reverse_kl":
        return rel_entr(q, p).sum(-1)
    return jensenshannon(p, q, axis=-1) ** 2


def test_cross_entropy_is_torchs_and_optaxs(logits, labels):
    found = cross_entropy(logits[0], labels)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits[0]).double().reshape(-1, V),
        torch.tensor(labels).long().reshape(-1),
        reduction="none",
    ).reshape(B, P)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    optaxs = optax.losses.softmax_cross_entropy_with_integer_labels(logits[0], labels)
    np.testing.assert_allclose(found, optaxs, atol=3e-6)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_are_scipys(logits, t, kind):
    np.testing.assert_allclose(
        kd_divergence(*logits, t, kind), divergence64(*logits, t, kind), rtol=1e-5, atol=3e-6
    )


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_forward_kl_is_torchs(logits, t):
    s, w = (torch.tensor(x).double() / t for x in logits)
    expected = torch.nn.functional.kl_div(
        s.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="none"
    )
    np.testing.assert_allclose(
        kd_divergence(*logits, t, "forward_kl"), expected.sum(-1), rtol=1e-5, atol=3e-6
    )


def test_the_papers_formula_by_hand():
    # Three classes with probabilities that are round numbers: logits are their logarithms.
    student, teacher, label = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25]), 1
    hard = -math.log(0.25)
    soft = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.25)
    shape = (1, 1, 3)
    sums = loss_sums(
        jnp.float32(student).reshape(shape),
        jnp.float32(teacher).reshape(shape),
        jnp.full((1, 1), label),
        jnp.ones((1, 1)),
        1.0,
        Distill(),
        temperature_is_one=True,
    )
    value = total_loss(sums, LossWeights(1.0, 4.0, 1.0, 1), Distill())
    assert float(sums.hard) == pytest.approx(hard, abs=1e-6)
    assert float(sums.teacher_hard) == pytest.approx(math.log(2), abs=1e-6)
    assert float(value) == pytest.approx(1.0 * hard + 4.0 * soft, abs=1e-6)
    # At t = 2 probabilities go with their square roots.
    p, q = np.sqrt([0.25, 0.5, 0.25]), np.sqrt([0.5, 0.25, 0.25])
    p, q = p / p.sum(), q / q.sum()
    assert float(kd_divergence(student, teacher, 2.0, "forward_kl")) == pytest.approx(
        float((p * np.log(p / q)).sum()), abs=1e-6
    )


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_value_and_gradient_are_torchs(logits, labels, weights, kind, squared):
    distill, t, hard, soft = Distill(divergence=kind, scale_by_temperature_squared=squared), 2.5, 0.7, 1.9
    count = weights.sum()

    def ours(student, teacher):
        sums = loss_sums(student, teacher, labels, weights, t, distill, temperature_is_one=False)
        return total_loss(sums, LossWeights(hard, soft, t, count), distill)

    value, gradient = jax.jit(jax.value_and_grad(ours))(*logits)

    s = torch.tensor(logits[0], dtype=torch.float64, requires_grad=True)
    ce = torch.nn.functional.cross_entropy(
        s.reshape(-1, V), torch.tensor(labels).long().reshape(-1), reduction="none"
    ).reshape(B, P)
    q, p = (s / t).log_softmax(-1), (torch.tensor(logits[1]).double() / t).log_softmax(-1)
    mean = torch.logsumexp(torch.stack([p, q]), 0) - math.log(2)
    pair = {
        "forward_kl": [(p, q)],
        "reverse_kl": [(q, p)],
        "jensen_shannon": [(p, mean), (q, mean)],
    }[kind]
    kl = sum((a.exp() * (a - b)).sum(-1) for a, b in pair) / len(pair)
    w = torch.tensor(weights).double()
    expected = ((hard * ce + soft * (t * t if squared else 1) * kl) * w).sum() / w.sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, s.grad, atol=2e-7)
    assert np.abs(gradient).max() > 1e-3
    assert not np.any(gradient[weights == 0])


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_a_student_like_its_teacher_has_nothing_to_learn_from_it(logits, kind, t):
    value, gradient = jax.value_and_grad(lambda s: kd_divergence(s, logits[1], t, kind).sum())(logits[1])
    np.testing.assert_allclose(value, 0, atol=3e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_squared_temperature_and_logged_losses(logits, labels, weights):
    sums = loss_sums(*logits, labels, weights, 3.0, Distill(), temperature_is_one=False)
    soft = (divergence64(*logits, 3.0, "forward_kl") * weights).sum()
    np.testing.assert_allclose(sums.soft, soft, rtol=1e-5)
    np.testing.assert_allclose(
        sums.soft_at_1, (divergence64(*logits, 1, "forward_kl") * weights).sum(), rtol=1e-5
    )
    assert float(sums.predictions) == float(sums.num_selected) == 15
    plain = total_loss(sums, LossWeights(0.0, 1.0, 3.0, 15), Distill())
    squared = total_loss(sums, LossWeights(0.0, 1.0, 3.0, 15), Distill(scale_by_temperature_squared=True))
    np.testing.assert_allclose(plain, soft / 15, rtol=1e-5)
    np.testing.assert_allclose(squared, 9 * soft / 15, rtol=1e-5)


def test_at_1_is_temperature_1_and_logged_losses_have_no_gradient(logits, labels, weights):
    short = loss_sums(*logits, labels, weights, 1.0, Distill(), temperature_is_one=True)
    long = loss_sums(*logits, labels, weights, 1.0, Distill(), temperature_is_one=False)
    np.testing.assert_allclose(*map(jax.tree.leaves, (short, long)), rtol=1e-6)

    def logged(student):
        for at_1 in (True, False):
            sums = loss_sums(student, logits[1], labels, weights, 2.0, Distill(), at_1)
            yield from (sums.soft_at_1, sums.teacher_hard, sums.num_selected, sums.predictions)

    assert not np.any(jax.grad(lambda s: sum(logged(s)))(logits[0]))


def test_without_a_teacher_only_the_hard_loss(logits, labels, weights):
    sums = loss_sums(logits[0], None, labels, weights, 1.0, Distill(), temperature_is_one=True)
    expected = (optax.losses.softmax_cross_entropy_with_integer_labels(logits[0], labels) * weights).sum()
    np.testing.assert_allclose(sums.hard, expected, rtol=1e-6)
    assert [float(x) for x in (sums.soft, sums.soft_at_1, sums.teacher_hard, sums.num_selected)] == [
        0,
        0,
        0,
        0,
    ]


def naive_selection(student, teacher, labels, weights, distill):
    """Position by position, in float64."""
    kept = np.zeros_like(weights)
    for b in range(len(weights)):
        sure = []
        for i in range(weights.shape[1]):
            if not weights[b, i]:
                continue
            p, q = softmax(np.float64(teacher[b, i])), softmax(np.float64(student[b, i]))
            if distill.token_selection == "teacher_better":
                kept[b, i] = p[labels[b, i]] > q[labels[b, i]]
            else:
                kept[b, i] = 1
                sure.append((-(p * np.log(p)).sum(), i))
        for _, i in sorted(sure)[: round(distill.drop_fraction * weights[b].sum())]:
            kept[b, i] = 0
    return kept


@pytest.mark.parametrize(
    "distill",
    [
        Distill(token_selection="teacher_better"),
        *(Distill(token_selection="entropy", drop_fraction=share) for share in (0.0, 0.15, 0.5, 1.0)),
    ],
    ids=lambda d: f"{d.token_selection}-{d.drop_fraction}",
)
def test_selection_is_the_naive_one(logits, labels, weights, distill):
    kept = token_weights(*logits, labels, weights, distill)
    expected = naive_selection(*logits, labels, weights, distill)
    np.testing.assert_array_equal(kept, expected)
    sums = loss_sums(*logits, labels, weights, 1.0, distill, temperature_is_one=True)
    soft = (divergence64(*logits, 1, "forward_kl") * expected).sum()
    np.testing.assert_allclose(sums.soft, soft, rtol=1e-5, atol=1e-6)
    assert float(sums.num_selected) == expected.sum()
    # The divisor is all predictions: dropping positions lowers the soft loss's share.
    value = total_loss(sums, LossWeights(0.0, 1.0, 1.0, 15), distill)
    np.testing.assert_allclose(value, soft / 15, rtol=1e-5, atol=1e-6)


def test_the_choice_does_not_leak_a_gradient(logits, labels, weights):
    for kind in ("teacher_better", "entropy"):
        gradient = jax.grad(
            lambda s, kind=kind: token_weights(
                s, logits[1], labels, weights, Distill(token_selection=kind)
            ).sum()
        )
        assert not np.any(gradient(logits[0]))


class Heads:
    """A student and a teacher of other widths, with columns of padding at the end as in the model."""

    def __init__(self, random, padding=83):
        def head(width):
            shapes = (B, P, width), (V + padding, width), (V + padding,)
            return LMHead(*(jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes))

        self.pair = head(D), head(D // 2)

    @staticmethod
    def knobs(weights, t=2.0):
        return LossWeights(*(jnp.float32(x) for x in (0.7, 1.9, t, weights.sum())))

    def ours(self, labels, weights, distill, at_1=False):
        """((value, sums), gradient by the student and the teacher)"""
        static = LossConfig(distill, at_1, V, Policy())
        knobs = self.knobs(weights, 1.0 if at_1 else 2.0)
        run = jax.jit(
            jax.value_and_grad(
                lambda pair: fused_lm_loss(pair[0], pair[1:], labels, weights, knobs, static), has_aux=True
            )
        )
        return run(self.pair)

    def plain(self, labels, weights, distill, at_1=False):
        """The same for the student by autodiff of the logits as a whole, without a word of head.py."""
        knobs = self.knobs(weights, 1.0 if at_1 else 2.0)

        def value(student, teacher):
            s, w = (
                (head.features @ head.embedding.T + head.bias[None, None])[..., :V]
                for head in (student, teacher)
            )
            sums = loss_sums(s, w, labels, weights, knobs.temperature, distill, at_1)
            return total_loss(sums, knobs, distill), sums

        return jax.jit(jax.value_and_grad(value, has_aux=True))(*self.pair)


@pytest.fixture
def heads(random, strict_ranks):
    """The decoder adds its bias by rank promotion."""
    with jax.numpy_rank_promotion("allow"):
        yield Heads(random)


@pytest.mark.parametrize(
    ("tile", "chosen", "kind"),
    [
        (0, "all", "forward_kl"),
        (1, "all", "reverse_kl"),
        (4, "all", "forward_kl"),
        (7, "all", "jensen_shannon"),
        (5, "teacher_better", "forward_kl"),
        (2, "entropy", "forward_kl"),
    ],
)
def test_the_head_is_autodiff_of_the_plain_objective(heads, labels, weights, tile, chosen, kind):
    distill = Distill(
        loss_chunk_rows=tile,
        token_selection=chosen,
        drop_fraction=0.4,
        divergence=kind,
        scale_by_temperature_squared=tile == 4,
    )
    (value, sums), (gradient, by_teacher) = heads.ours(labels, weights, distill, at_1=tile == 1)
    (expected, expected_sums), expected_gradient = heads.plain(labels, weights, distill, at_1=tile == 1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(*map(jax.tree.leaves, (sums, expected_sums)), rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert np.abs(b).max() > 1e-2
    assert not any(np.any(x) for x in jax.tree.leaves(by_teacher))
    assert not np.any(gradient.features[weights == 0])
    assert not np.any(gradient.embedding[V:])


def test_the_gradient_of_the_head_follows_what_comes_after_it(heads, labels, weights):
    """A factor on the loss, as the chain rule brings it, is a factor on the gradient."""
    static = LossConfig(Distill(loss_chunk_rows=4), False, V, Policy())
    knobs = heads.knobs(weights)

    def chain(student):
        return jnp.sin(fused_lm_loss(student, heads.pair[1:], labels, weights, knobs, static)[0])

    (value, _), (gradient, _) = heads.ours(labels, weights, Distill())
    chained = jax.jit(jax.grad(chain))(heads.pair[0])
    for a, b in zip(*map(jax.tree.leaves, (chained, gradient)), strict=True):
        np.testing.assert_allclose(a, math.cos(value) * b, atol=2e-6)


def test_without_a_teacher_the_head_is_torchs_cross_entropy(heads, labels, weights):
    student = heads.pair[0]
    static = LossConfig(Distill(loss_chunk_rows=4), True, V, Policy())
    knobs = LossWeights(jnp.float32(1), jnp.float32(1), jnp.float32(1), jnp.float32(weights.sum()))
    (value, _), gradient = jax.jit(
        jax.value_and_grad(lambda s: fused_lm_loss(s, (), labels, weights, knobs, static), has_aux=True)
    )(student)
    features, table, bias = (
        torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
        for x in (student.features, student.embedding, student.bias)
    )
    logits = (features @ table.T + bias)[..., :V]
    target = torch.tensor(np.where(weights > 0, labels, -100)).long()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, V), target.reshape(-1))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), (features, table, bias), strict=True):
        np.testing.assert_allclose(a, b.grad, atol=1e-6)


def test_bf16_gradients_of_the_head_stay_near_fp32(heads, labels, weights):
    policy = Policy(jnp.dtype("bfloat16"), jnp.dtype("float32"))
    static, knobs = LossConfig(Distill(), False, V, policy), heads.knobs(weights)
    run = jax.jit(jax.grad(lambda s: fused_lm_loss(s, heads.pair[1:], labels, weights, knobs, static)[0]))
    _, (gradient, _) = heads.ours(labels, weights, Distill())
    for a, b in zip(*map(jax.tree.leaves, (run(heads.pair[0]), gradient)), strict=True):
        assert 1e-5 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.03


def test_tiles_hold_fewer_logits(heads, labels, weights):
    """The largest array with a vocabulary axis, forward and backward, is one tile's logits."""

    def largest(tile):
        static = LossConfig(Distill(loss_chunk_rows=tile), False, V, Policy())
        knobs = heads.knobs(weights)
        program = jax.make_jaxpr(
            jax.grad(lambda s: fused_lm_loss(s, heads.pair[1:], labels, weights, knobs, static)[0])
        )(heads.pair[0])
        tables = {head.embedding.shape for head in heads.pair} | {
            head.embedding.shape[::-1] for head in heads.pair
        }
        return max(
            math.prod(v.aval.shape)
            for eqn in equations(program.jaxpr)
            for v in eqn.outvars
            if V + 83 in v.aval.shape and v.aval.shape not in tables
        )

    assert largest(0) == B * P * (V + 83)
    assert largest(2) == 2 * P * (V + 83)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in sub_jaxprs(eqn):
            yield from equations(sub)


@pytest.mark.parametrize(
    ("kind", "chosen"), zip(DIVERGENCES, ["entropy", "teacher_better", "all"], strict=True)
)
def test_padding_of_the_vocabulary_does_not_matter(logits, labels, weights, kind, chosen):
    distill = Distill(divergence=kind, token_selection=chosen, drop_fraction=0.4)

    def run(student, teacher):
        def value(student):
            sums = loss_sums(student, teacher, labels, weights, 2.0, distill, temperature_is_one=False)
            return total_loss(sums, LossWeights(1.0, 1.0, 2.0, 15), distill), sums

        return jax.jit(jax.value_and_grad(value, has_aux=True))(student)

    padded = [np.concatenate([x, np.full((B, P, 7), -1e9, np.float32)], -1) for x in logits]
    (value, sums), gradient = run(*logits)
    (padded_value, padded_sums), padded_gradient = run(*padded)
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(*map(jax.tree.leaves, (padded_sums, sums)), rtol=1e-6)
    np.testing.assert_allclose(padded_gradient[..., :V], gradient, atol=1e-7)
    assert not np.any(padded_gradient[..., V:])


rows_of_logits = hnp.arrays(np.float32, (2, 4, 9), elements=st.floats(-30, 30, width=32))


@given(rows_of_logits, st.floats(0.25, 8), st.sampled_from(DIVERGENCES))
@settings(max_examples=150)
def test_bounds_of_the_divergences(pair, t, kind):
    with jax.numpy_rank_promotion("raise"):
        found = np.asarray(kd_divergence(*pair, np.float32(t), kind))
    expected = divergence64(*pair, np.float64(np.float32(t)), kind)
    # fp32 keeps about seven digits of the logits that are subtracted from each other.
    slack = 2e-6 * max(1, np.abs(pair / t).max())
    assert (found >= -slack).all()
    if kind == "jensen_shannon":
        assert (found <= math.log(2) + slack).all()
    np.testing.assert_allclose(found, np.where(np.isfinite(expected), expected, found), rtol=1e-4, atol=slack)


@given(
    rows_of_logits, st.floats(-50, 50, width=32), st.floats(-50, 50, width=32), st.sampled_from(DIVERGENCES)
)
@settings(max_examples=100)
def test_a_constant_added_to_logits_changes_nothing(pair, a, b, kind):
    student, teacher = pair
    labels = np.array([0, 3, 5, 8])
    moved = kd_divergence(student + a, teacher + b, 2.0, kind)
    np.testing.assert_allclose(moved, kd_divergence(student, teacher, 2.0, kind), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        cross_entropy(student + a, labels), cross_entropy(student, labels), rtol=1e-4, atol=1e-4
    )


def test_jensen_shannon_is_symmetric_and_reaches_log_2():
    far = np.array([[60.0, -60.0], [-60.0, 60.0]], np.float32)
    assert float(kd_divergence(far[0], far[1], 1.0, "jensen_shannon")) == pytest.approx(math.log(2), abs=1e-6)
    random = np.random.default_rng(1).normal(size=(2, 30, 9)).astype(np.float32)
    np.testing.assert_allclose(
        kd_divergence(random[0], random[1], 1.0, "jensen_shannon"),
        kd_divergence(random[1], random[0], 1.0, "jensen_shannon"),
        atol=1e-7,
    )
