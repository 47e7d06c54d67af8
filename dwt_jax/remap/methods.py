"""The named methods: a depth map, a width map and how copies share their work.

Each says below whether the target computes what the source does. In all of them the
positions, the vocabulary and the token types may grow (Options say from what) or shrink.
Notation: target entry j is a copy of source entry g(j), copied C_g(j) times in all.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.remap import depth_maps


@dataclass(frozen=True)
class Method:
    name: str
    depth: str = "same"  # a key of depth_maps.DEPTH_MAPS; same: refuses another number of layers
    # How an axis grows (where it shrinks, its first entries stay). same: refused. tiled, drawn: copies,
    # in turn or at random. zero: zeros. unread: new entries at random that nothing reads yet.
    width: Literal["same", "tiled", "drawn", "zero", "unread"] = "same"
    split: Literal["even", "uneven"] = "even"
    random_init: bool = False  # nothing is taken from the source
    from_next_layer: bool = False  # new units come from the layer above
    integer_factor_only: bool = False  # refuses what is no whole multiple
    function_preserving: bool = False  # refuses what it cannot do without moving the function


@dataclass(frozen=True)
class GrowthOptions:
    split: Literal["", "even", "uneven"] = ""  # how copies share their work; empty: the method's own way
    noise: float = 0.0  # of further copies: each times 1 + noise·N(0, 1)
    new_tokens: Literal["mean", "random"] = "mean"  # mean of the old tokens, or as in a new model
    new_positions: Literal["random", "tiled"] = "random"  # as in a new model, or the old ones again


def random() -> Method:
    """Nothing is copied: the baseline, and what won in the DWT paper (Lee et al. 2023, section 3.3).

    Does not preserve the function.
    """
    return Method("random", random_init=True)


def fna() -> Method:
    """The DWT paper's "parameter remapping" (PR), after FNA (Fang et al. 2020, arXiv 2001.02525).

    Depth: the last layer again and again, W'_l = W_min(l, n−1). Width: the source is the
    top-left block, every other entry of a matrix is 0; norms' new entries start as in a new
    model. Preserves the function where heads and MLP grow alone; where the hidden size grows,
    with model.weighted_norm (weight 0 on new channels) only; where layers are added, with
    model.gated_layers only.
    """
    return Method("fna", depth="repeat_last", width="zero")


def net2net() -> Method:
    """Net2Net (Chen et al. 2016, arXiv 1511.05641), as bert2BERT's FPI (Chen et al. 2022,
    arXiv 2110.07143) has it for transformers; depth by stacking.

    W'[j, k] = W[g_in(j), g_out(k)] / C_{g_in(j)}, g the identity and then random choices, for
    heads (whole ones) and MLP by layer. Here the choices are balanced: no entry is drawn again
    before all others were. Preserves the function where heads and MLP grow; where the hidden
    size grows, by a whole factor or with model.weighted_norm (by FPI's unbalanced choice
    never exactly under LayerNorm); where layers are added, with model.gated_layers only.
    """
    return Method("net2net", depth="stack_top", width="drawn")


def aki() -> Method:
    """Advanced knowledge initialisation, bert2BERT (Chen et al. 2022, arXiv 2110.07143).

    As net2net, but new output units come from the layer above under the same map:
    W'_l = [W_l[g_in, k] / C for k < d; W_{l+1}[g_in, g_out(k)] / C for the rest]; the last
    layer takes itself. Does not preserve the function (save where there is no layer above).
    """
    return Method("aki", depth="stack_top", width="drawn", from_next_layer=True)


def hyperclone() -> Method:
    """HyperCloning (Samragh et al. 2024, arXiv 2409.12903), symmetric: n-fold width, tiled.

    W' = tile(W, n × n) / n, so x' = [x, …, x]. Preserves the function always, and refuses
    factors that are not whole and another number of layers. Copies stay identical in training
    unless the split, noise or the optimiser's state parts them.
    """
    return Method("hyperclone", width="tiled", integer_factor_only=True, function_preserving=True)


def lemon() -> Method:
    """LEMON (Wang et al. 2024, arXiv 2310.07999): copies in turn with unequal shares,
    W'[j, k] = α_j·W[g_in(j), g_out(k)] with Σ_{j: g(j)=i} α_j = 1.

    Preserves the function always, and refuses what cannot be: LEMON's own treatment of
    LayerNorm (new channels hold the mean) is exact before a layer only, not after it; here a
    hidden size that is no multiple needs model.weighted_norm, more layers model.gated_layers.
    """
    return Method("lemon", depth="interleave", width="tiled", split="uneven", function_preserving=True)


def masked() -> Method:
    """Masked structural growth, MSG (Yao et al. 2024, arXiv 2305.02869).

    What is new is at random and hidden by gates that open from 0 to 1 over n steps: added
    layers by y = μ·layer(x) + (1 − μ)·x (model.gated_layers), new channels by their weight in
    LayerNorm (model.weighted_norm). New units are read with kernels of 0 at first. Preserves
    the function always, and refuses pairs for which the model lacks the gates.
    """
    return Method("masked", depth="stack", width="unread", function_preserving=True)


def ligo() -> Method:
    """LiGO (Wang et al. 2023, arXiv 2303.00980): W'_l = Σ_k w_lk · B·W_k·Aᵀ, all of it learned.

    By itself this method gives the beginning of the learning: interleaved layers, copies in
    turn, which preserve the function under net2net's conditions. Learned maps do not; they
    are applied by remap/ligo.py.
    """
    return Method("ligo", depth="interleave", width="tiled")


def _depth_only(name: str) -> Callable[[], Method]:
    def method() -> Method:
        return Method(name, depth=name)

    method.__name__, method.__doc__ = name, depth_maps.DEPTH_MAPS[name].__doc__
    return method


METHODS: dict[str, Callable[[], Method]] = {
    **{
        function.__name__: function
        for function in (random, fna, net2net, aki, hyperclone, lemon, masked, ligo)
    },
    **{name: _depth_only(name) for name in depth_maps.DEPTH_MAPS},
}


def get_method(name: str) -> Method:
    """The method called `name`, or 'depth+method': that depth map with the width map of the other
    (then nothing is promised about added layers).

    Raises UserError for a name that does not exist.
    """
    first, plus, second = name.rpartition("+")
    if second not in METHODS or (plus and second in depth_maps.DEPTH_MAPS):
        names = [names for names in METHODS if not plus or names not in depth_maps.DEPTH_MAPS]
        raise UserError(f"method is {name!r}{did_you_mean(second, names)}")
    method = METHODS[second]()
    if not plus:
        return method
    if first not in depth_maps.DEPTH_MAPS:
        raise UserError(f"method is {name!r}{did_you_mean(first, depth_maps.DEPTH_MAPS)}")
    return dataclasses.replace(method, name=name, depth=first, function_preserving=False)
