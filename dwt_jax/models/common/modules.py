"""NNX modules as pure functions of a dict of arrays, and the scan over layers, for every family."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from dwt_jax.models.common.matmul import Policy
from dwt_jax.models.protocol import ModelConfig, Params

BuildFn = Callable[[str, Any, int, nnx.Rngs], nnx.Module]
"""(name of the module, config, outputs of the classifier, rngs) → a module of a family."""


@functools.cache
def _graphdef(build: BuildFn, name: str, config: ModelConfig) -> Any:
    """The structure of a module without its arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: build(name, config, 1, nnx.Rngs(0))))


@dataclass(frozen=True)
class ModuleParts:
    """The parts of a family's parameters, and their modules.

    Attributes:
        build: makes the module of a part: `layer` for the part `layers`, else the part's name.
        encoder_parts: the family's ENCODER_PARTS.
        heads: its HEADS.
        lm_heads: its LM_HEADS.
        folds_head_keys: whether the keys of heads are folded in from one key instead of split off the first.
    """

    build: BuildFn
    encoder_parts: Sequence[str]
    heads: Sequence[str]
    lm_heads: Sequence[str]
    folds_head_keys: bool = False

    def merge(self, name: str, config: ModelConfig, params: Params) -> Any:
        """Return the module `name` with the arrays `params`."""
        return nnx.merge(_graphdef(self.build, name, config), params)

    def init_params(
        self, config: Any, key: jax.Array, heads: Sequence[str] | None = None, num_labels: int = 1
    ) -> Params:
        """Initialise fp32 parameters: matrices N(0, initializer_range²), biases 0, norms 1.

        Args:
            config: sizes of the model; vocab_size must be set.
            key: PRNG key.
            heads: which of the family's heads; None: those of pre-training.
            num_labels: outputs of the classifier.
        """
        if config.vocab_size < 1:
            raise ValueError("model.vocab_size is not resolved yet: the tokenizer sets it")

        def init(name: str, key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(self.build(name, config, num_labels, nnx.Rngs(params=key))))

        def init_layers(key: jax.Array) -> Params:
            keys = jax.random.split(key, config.num_hidden_layers)
            return jax.vmap(functools.partial(init, "layer"))(keys)

        keys = self._part_keys(key)
        names = (*self.encoder_parts, *(self.lm_heads if heads is None else heads))
        return {
            name: init_layers(keys[name]) if name == "layers" else init(name, keys[name]) for name in names
        }

    def abstract_params(self, config: Any, heads: Sequence[str] | None = None, num_labels: int = 1) -> Params:
        """Return shapes and dtypes of the parameters, without memory."""
        return jax.eval_shape(lambda: self.init_params(config, jax.random.key(0), heads, num_labels))

    def _part_keys(self, key: jax.Array) -> dict[str, jax.Array]:
        """The key of each part. A norm draws nothing, so that it needs no key of its own."""
        if self.folds_head_keys:
            embeddings, layers, first = jax.random.split(key, 3)
            head_keys = [jax.random.fold_in(first, i) if i else first for i in range(len(self.heads))]
        else:
            embeddings, layers, *head_keys = jax.random.split(key, 2 + len(self.heads))
        keys = {"embeddings": embeddings, "layers": layers, **dict(zip(self.heads, head_keys, strict=True))}
        return {name: keys.get(name, embeddings) for name in (*self.encoder_parts, *self.heads)}


def scan_layers(
    layer: Callable[..., tuple[jax.Array, None]],
    x: jax.Array,
    inputs: Any,
    num_layers: int,
    positions: jax.Array | None,
    policy: Policy,
) -> jax.Array:
    """Run all layers, the last one at the output positions only.

    Args:
        layer: (hidden states, inputs of one layer, output positions or None) → (hidden states, None).
        x: hidden states [B, L, D].
        inputs: a tree with a leading layer axis.
        num_layers: its size.
        positions: int [B, Q]; None: all.
        policy: on one CPU device the scan is unrolled.

    Returns:
        [B, L, D], or [B, Q, D] at `positions`.
    """
    # XLA's loop on CPU copies what it keeps of every layer: unrolled it is a tenth faster.
    unroll = min(num_layers, 12) if policy.single_cpu_layout else 1
    if positions is None:
        return jax.lax.scan(layer, x, inputs, unroll=unroll)[0]
    x = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], inputs), unroll=unroll)[0]
    return layer(x, jax.tree.map(lambda leaf: leaf[-1], inputs), positions)[0]
