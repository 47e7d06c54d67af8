"""Growth methods by name: a depth map, a width map and how copies split their share.

Each docstring says whether the target computes the same function as the source. In all methods
positions, vocabulary and token types may grow (GrowthOptions sets how) or shrink.
Notation: target entry j is a copy of source entry g(j), which has C_g(j) copies in all.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from dwt_jax.errors import UserError, did_you_mean
from dwt_jax.limits import at_least
from dwt_jax.remap import depth_maps

Width = Literal["same", "tile", "random_copies", "undivided_tile", "zero", "zero_fan_in"]


@dataclass(frozen=True)
class Method:
    """How the axes of a model grow.

    Width maps, for axes that grow (an axis that shrinks keeps its first entries):

    * same: a different size is an error.
    * tile, random_copies: new entries are copies, in turn or at random.
    * undivided_tile: copies on both sides of the source's entries, without division by their number.
    * zero: new entries are 0.
    * zero_fan_in: new entries are random; kernel entries that read them are 0.
    """

    name: str
    depth: str = "same"  # a key of depth_maps.DEPTH_MAPS; same: a different number of layers is an error
    width: Width = "same"
    split: Literal["even", "uneven"] = "even"
    random_init: bool = False  # nothing is copied from the source
    from_next_layer: bool = False  # new units are copied from the layer above
    new_layers: Literal["copy", "zero"] = "copy"  # zero: where the family has residual branches
    integer_factor_only: bool = False  # widths that are not a multiple are an error
    function_preserving: bool = False  # pairs for which the function would change are an error


@dataclass(frozen=True)
class GrowthOptions:
    """Options that every method has."""

    split: Literal["", "even", "uneven"] = ""  # how copies split their share; empty: method's default
    noise: Annotated[float, at_least(0)] = 0.0  # duplicated entries are multiplied with 1 + noise·N(0, 1)
    new_tokens: Literal["mean", "random"] = "mean"  # mean of the old tokens, or as in a new model
    new_positions: Literal["random", "tiled"] = "random"  # as in a new model, or the old ones repeated
    # Added layers: copies, or copies whose residual branches add 0, so that the function stays (pre-norm
    # families). Empty: the method's default.
    new_layers: Literal["", "copy", "zero"] = ""


def random() -> Method:
    """Copy nothing: the baseline, and the best method of the DWT paper (Lee et al. 2023, section 3.3).

    Does not preserve the function.
    """
    return Method("random", random_init=True)


def fna() -> Method:
    """Place the source in a block of zeros, like FNA (Fang et al. 2020, arXiv 2001.02525).

    This is the DWT paper's "parameter remapping" (PR).

    Depth: repeat the last layer, W'_l = W_min(l, n−1). Width: the source is the
    top-left block, every other entry of a matrix is 0; norms' new entries start as in a new
    model. Preserves the function where only heads and MLP grow; where the hidden size grows,
    only with model.weighted_norm (weight 0 on new channels); where layers are added, only with
    model.gated_layers.
    """
    return Method("fna", depth="repeat_last", width="zero")


def net2net() -> Method:
    """Copy random units with even shares, like Net2Net (Chen et al. 2016, arXiv 1511.05641).

    Adapted to transformers like FPI of Chen et al. 2022, arXiv 2110.07143; depth by stacking.

    W'[j, k] = W[g_in(j), g_out(k)] / C_{g_in(j)}, g the identity and then random choices, per layer
    for (complete) heads and MLP units. The choices are balanced: no entry is copied again
    before all others were. Preserves the function where heads and MLP grow; where the hidden
    size grows, by an integer factor or with model.weighted_norm (by FPI's unbalanced choice
    never exactly under LayerNorm); where layers are added, only with model.gated_layers.
    """
    return Method("net2net", depth="stack_top", width="random_copies")


def aki() -> Method:
    """Copy new units from the layer above: the AKI of Chen et al. 2022, arXiv 2110.07143.

    As net2net, but new output units come from the layer above under the same map:
    W'_l = [W_l[g_in, k] / C for k < d; W_{l+1}[g_in, g_out(k)] / C for the rest]; the last
    layer uses itself. Does not preserve the function (except where there is no layer above).
    """
    return Method("aki", depth="stack_top", width="random_copies", from_next_layer=True)


def center_tile() -> Method:
    """Tile around the centre, like the large model of Warner et al. 2024 (arXiv 2412.13663).

    The source lies in the middle of each axis and wraps around at both ends; each layer is a copy of the
    nearest one. Copies are not divided by their number, so this baseline never preserves the function when
    the width grows. The original depth map gives some layers the weights of the other attention type; here
    every layer gets weights of its own type.
    """
    return Method("center_tile", depth="nearest", width="undivided_tile")


def hyperclone() -> Method:
    """Tile to an n-fold width, like symmetric HyperCloning (Samragh et al. 2024, arXiv 2409.12903).

    W' = tile(W, n × n) / n, so x' = [x, …, x]. Always preserves the function: factors that are not
    integers and a different number of layers are refused. Copies stay identical in training
    unless the split, noise or the optimizer's state breaks the symmetry.
    """
    return Method("hyperclone", width="tile", integer_factor_only=True, function_preserving=True)


def lemon() -> Method:
    """Tile with unequal shares, like LEMON (Wang et al. 2024, arXiv 2310.07999).

    W'[j, k] = α_j·W[g_in(j), g_out(k)] with Σ_{j: g(j)=i} α_j = 1.

    Always preserves the function: pairs for which it cannot are refused. LEMON's own treatment of
    LayerNorm (new channels hold the mean) is exact before a layer only, not after it. A hidden size that is
    not a multiple needs model.weighted_norm. Added layers of a pre-norm model add 0 to the residual stream;
    those of a post-norm model need model.gated_layers.
    """
    return Method(
        "lemon",
        depth="interleave",
        width="tile",
        split="uneven",
        new_layers="zero",
        function_preserving=True,
    )


def masked() -> Method:
    """Hide random new parts behind gates, like masked structural growth (Yao et al. 2024, arXiv 2305.02869).

    New parts are random and hidden by gates that open from 0 to 1 over n steps: added
    layers by y = μ·layer(x) + (1 − μ)·x (model.gated_layers), new channels by their weight in
    LayerNorm (model.weighted_norm). The kernels that read new units start at 0, and so do the outputs of
    added layers in a pre-norm model. Always preserves the function: pairs for which the model does not have
    the gates are refused.
    """
    return Method("masked", depth="stack", width="zero_fan_in", new_layers="zero", function_preserving=True)


def ligo() -> Method:
    """Learn linear maps, like LiGO (Wang et al. 2023, arXiv 2303.00980): W'_l = Σ_k w_lk · B·W_k·Aᵀ.

    This method is the initial value of the learned maps: interleaved layers and tiled
    copies, which preserve the function under net2net's conditions. Learned maps do not; they
    are applied by remap/ligo.py.
    """
    return Method("ligo", depth="interleave", width="tile")


def _depth_only(name: str) -> Callable[[], Method]:
    def method() -> Method:
        return Method(name, depth=name)

    method.__name__, method.__doc__ = name, depth_maps.DEPTH_MAPS[name].__doc__
    return method


METHODS: dict[str, Callable[[], Method]] = {
    **{
        function.__name__: function
        for function in (random, fna, net2net, aki, center_tile, hyperclone, lemon, masked, ligo)
    },
    **{name: _depth_only(name) for name in depth_maps.DEPTH_MAPS},
}
"""Methods by name. A depth map is a method too: it refuses different widths."""


def get_method(name: str) -> Method:
    """Return a method by name.

    Args:
        name: a name in METHODS, or 'depth+method': that depth map with the width map of the method.
            The combination is not guaranteed to preserve the function.

    Raises:
        UserError: the name does not exist.
    """
    first, plus, second = name.rpartition("+")
    if second not in METHODS or (plus and second in depth_maps.DEPTH_MAPS):
        names = [candidate for candidate in METHODS if not plus or candidate not in depth_maps.DEPTH_MAPS]
        raise UserError(f"method is {name!r}{did_you_mean(second, names)}")
    method = METHODS[second]()
    if not plus:
        return method
    if first not in depth_maps.DEPTH_MAPS:
        raise UserError(f"method is {name!r}{did_you_mean(first, depth_maps.DEPTH_MAPS)}")
    return dataclasses.replace(method, name=name, depth=first, function_preserving=False)
