"""Depth maps: which layer of the source each layer of the target is copied from.

Each is a function of the two numbers of layers, defined for every pair: for a shallower target it
selects layers. Deeper models preserve the function where the added layers are the identity: in a pre-norm
encoder if their residual branches add 0 (GrowthOptions.new_layers), in a post-norm encoder only if they are
gated (model.gated_layers).
"""

from collections.abc import Callable

NEW = -1


def repeat_last(old: int, new: int) -> list[int]:
    """Repeat the last layer: 0 1 2 3 3 3. Shrinking: the first.

    Sources: FNA, Fang et al. 2020; the DWT paper, Lee et al. 2023.
    """
    return [min(i, old - 1) for i in range(new)]


def stack(old: int, new: int) -> list[int]:
    """Stack the layers again: 0 1 2 3 0 1. Gong et al. 2019; Du et al. 2024. Shrinking: the first."""
    return [i % old for i in range(new)]


def stack_top(old: int, new: int) -> list[int]:
    """Stack complete copies, the remainder from the top: 0 1 2 3 2 3. Shrinking: the last.

    Source: Chen et al. 2022, arXiv 2110.07143.
    """
    num_full = new - new % old
    return [i % old for i in range(num_full)] + list(range(old - new % old, old))


def interleave(old: int, new: int) -> list[int]:
    """Repeat each layer next to itself: 0 0 1 2 2 3, layer ⌊i·old/new⌋.

    Shrinking: evenly spaced layers; by half every second one, as in Sanh et al. 2019.

    Sources: LiGO, Wang et al. 2023; staged training, Shen et al. 2022.
    """
    return [i * old // new for i in range(new)]


def nearest(old: int, new: int) -> list[int]:
    """Copy the nearest layer, round(i·old/new): 0 1 1 2 3 3. Shrinking: evenly spaced layers.

    Source: Warner et al. 2024, arXiv 2412.13663, for their large model.
    """
    return [min(round(i * old / new), old - 1) for i in range(new)]


def middle(old: int, new: int) -> list[int]:
    """Repeat the middle block: 0 1 2 1 2 3. MIDAS, Saunshi et al. 2024. Shrinking: without the middle."""
    if new < old:
        return [*range(-(-new // 2)), *range(old - new // 2, old)]
    if new > 2 * old:
        return [middle(old, 2 * old)[i] for i in middle(2 * old, new)]
    start = (old - (new - old)) // 2
    return [*range(start + new - old), *range(start, old)]


def prefix(old: int, new: int) -> list[int]:
    """Keep the layers and add random ones: 0 1 2 3 new new. Shrinking: the first."""
    return [i if i < old else NEW for i in range(new)]


DEPTH_MAPS: dict[str, Callable[[int, int], list[int]]] = {
    function.__name__: function
    for function in (repeat_last, stack, stack_top, interleave, nearest, middle, prefix)
}
"""Depth maps by name."""


def source_layers(depth: str, old: int, new: int, period: int) -> list[int]:
    """Return the source of each layer, or NEW, so that every layer has a source of its own type.

    Args:
        depth: a key of DEPTH_MAPS. It maps periods of layers.
        old: layers of the source.
        new: layers of the target.
        period: layers i and i + `period` are of one kind (local and global attention). The last period may
            be cut short.
    """
    if depth == "prefix":  # every layer keeps its index
        return prefix(old, new)
    periods = DEPTH_MAPS[depth](-(-old // period), -(-new // period))
    sources = []
    for i in range(new):
        source = NEW if periods[i // period] == NEW else periods[i // period] * period + i % period
        if source >= old:  # in a period that is cut short: the layer of this kind before it
            source = source - period if source >= period else old - 1
        sources.append(source)
    return sources
