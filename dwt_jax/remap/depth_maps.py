"""Depth maps: which layer of the source each layer of the target is taken from.

All are functions of two numbers and total: where the target is shallower they choose layers.
A new layer in a post-LN encoder is never the identity, so none of these preserves the
function where it adds layers, unless the added ones are gated (`masked`, or any depth map
with model.gated_layers).
"""

from collections.abc import Callable

NEW = -1


def repeat_last(old: int, new: int) -> list[int]:
    """0 1 2 3 3 3: FNA (Fang et al. 2020) and the DWT paper's. Shrinking: the first."""
    return [min(i, old - 1) for i in range(new)]


def stack(old: int, new: int) -> list[int]:
    """0 1 2 3 0 1: StackingBERT (Gong et al. 2019), G_stack (Du et al. 2024). Shrinking: the first."""
    return [i % old for i in range(new)]


def stack_top(old: int, new: int) -> list[int]:
    """0 1 2 3 2 3: whole stacks, the remainder from the top (bert2BERT,
    Chen et al. 2022). Shrinking: the last."""
    num_full = new - new % old
    return [i % old for i in range(num_full)] + list(range(old - new % old, old))


def interleave(old: int, new: int) -> list[int]:
    """0 0 1 2 2 3, layer ⌊i·old/new⌋: every layer's copies beside it (LiGO, Wang et al. 2023;
    staged training, Shen et al. 2022). Shrinking: evenly spaced; by half every second, as
    DistilBERT."""
    return [i * old // new for i in range(new)]


def middle(old: int, new: int) -> list[int]:
    """0 1 2 1 2 3: the middle block once more (MIDAS, Saunshi et al. 2024). Shrinking: without
    the middle."""
    if new < old:
        return [*range(-(-new // 2)), *range(old - new // 2, old)]
    if new > 2 * old:
        return [middle(old, 2 * old)[i] for i in middle(2 * old, new)]
    start = (old - (new - old)) // 2
    return [*range(start + new - old), *range(start, old)]


def prefix(old: int, new: int) -> list[int]:
    """0 1 2 3 new new: the rest at random. Shrinking: the first."""
    return [i if i < old else NEW for i in range(new)]


DEPTH_MAPS: dict[str, Callable[[int, int], list[int]]] = {
    function.__name__: function for function in (repeat_last, stack, stack_top, interleave, middle, prefix)
}
