"""What a cache keeps of the teacher's distribution: a few tokens of each prediction, and how likely they are.

With draws from the teacher's distribution the soft loss, and so its gradient, is right on average (random
sampling KD, arXiv 2503.16870). With the k most probable tokens it is biased: what is below them is one
token. Letters of shapes: B rows, P predicted positions a row, V padded vocabulary, K tokens a prediction.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

SampleKind = Literal["draws", "top_k"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "weights", "label_log_prob", "entropy"],
    meta_fields=["kind"],
)
@dataclass(frozen=True)
class TeacherSample:
    """Part of the teacher's distribution p at temperature 1, for each prediction.

    Attributes:
        ids: int32 [B, P, K], tokens.
        weights: fp32 [B, P, K]. draws: the share of the draws that are the token, whose mean is p(token);
            top_k: p(token). 0 where there are fewer than K tokens.
        label_log_prob: log p(label), fp32 [B, P].
        entropy: −Σ p · log p in nats, fp32 [B, P].
        kind: how the tokens were chosen.
    """

    ids: jax.Array
    weights: jax.Array
    label_log_prob: jax.Array
    entropy: jax.Array
    kind: SampleKind = "draws"


def draw_tokens(log_p: jax.Array, uniform: jax.Array, count: int) -> jax.Array:
    """Draw tokens, of which each token's expected number is count · p(token).

    The draws are those of systematic resampling (Kitagawa 1996): one random number places a comb of `count`
    equidistant points on the cumulative distribution. The numbers of draws vary less than those of
    independent draws, and a token with p ≥ 1/count is always among them.

    Args:
        log_p: log p, fp32 [..., V].
        uniform: uniform in [0, 1), fp32 [...].
        count: number of draws.

    Returns:
        int32 [..., count], increasing.
    """
    cumulative = jnp.cumsum(jnp.exp(log_p), axis=-1)
    total = cumulative[..., -1:]
    points = (jnp.arange(count) + uniform[..., None]) / count * total
    points = jnp.minimum(points, jnp.nextafter(total, 0))  # rounded up to it, tokens without p would follow
    shape = points.shape
    search = jax.vmap(functools.partial(jnp.searchsorted, side="right"))
    ids = search(cumulative.reshape(-1, cumulative.shape[-1]), points.reshape(-1, count)).reshape(shape)
    return ids.astype(jnp.int32)


def sample_divergence(student: jax.Array, sample: TeacherSample) -> jax.Array:
    """Return an estimate of KL(teacher ‖ student) in nats.

    draws: −Σ w · log q − H(p), whose mean over draws is the divergence. top_k: the divergence of the
    distributions over the k tokens and "any other token".

    Args:
        student: logits [B, P, V].
        sample: of the teacher.

    Returns:
        fp32 [B, P].
    """
    log_sum = jax.nn.logsumexp(student, axis=-1)
    log_q = jnp.take_along_axis(student, sample.ids, axis=-1) - log_sum[..., None]
    cross_entropy = -(sample.weights * log_q).sum(-1)
    if sample.kind == "draws":
        return cross_entropy - sample.entropy
    p, is_token = sample.weights, sample.weights > 0
    rest_p = jnp.maximum(1 - p.sum(-1), 0)
    rest_q = jnp.maximum(1 - jnp.where(is_token, jnp.exp(log_q), 0).sum(-1), 1e-7)
    p_log_p = jnp.where(is_token, p * jnp.log(jnp.where(is_token, p, 1)), 0).sum(-1)
    rest_log_p = jnp.where(rest_p > 0, rest_p * jnp.log(jnp.where(rest_p > 0, rest_p, 1)), 0)
    return cross_entropy + p_log_p + rest_log_p - rest_p * jnp.log(rest_q)
