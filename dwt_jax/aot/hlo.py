"""Parse the collectives, with their sizes and loop counts, from the text of an optimised HLO module."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVE_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_DTYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9a-z]*)?)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(COLLECTIVE_KINDS)})(-start)?\(")
_CALLEES = re.compile(
    r"(?:calls|body|condition|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[^\s,)}]+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([^\s,]+), body=%?([^\s,]+)")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of COLLECTIVE_KINDS.
        bytes: size of the full array on one device: before a scatter, after a gather.
        group_size: number of devices in a group; 0 means all.
        executions: how often it runs in a step.
        trip_counts_known: whether the trip count of every loop around it is known.
    """

    kind: str
    bytes: int
    group_size: int
    executions: int
    trip_counts_known: bool

    def bytes_sent(self, num_devices: int) -> float:
        """Return the bytes that a device sends in a step with ring algorithms, which send the least."""
        n = self.group_size or num_devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.executions * self.bytes * share


def find_collectives(text: str) -> list[Collective]:
    """Find the collectives of a program.

    Args:
        text: an HLO module after XLA's optimisation.

    Returns:
        The collectives in program order. Those in loops count as often as the loops run.
    """
    bodies = dict(_computations(text))
    entry = next(name for name, (is_entry, _) in bodies.items() if is_entry)
    operations: list[Collective] = []

    def walk(name: str, executions: int, trip_counts_known: bool, channels: set[str]) -> None:
        for line in bodies[name][1]:
            if (match := _COLLECTIVE.search(line)) and _is_first_occurrence(line, channels):
                operations.append(_parse_collective(match, line, name, executions, trip_counts_known))
            loop = _WHILE.search(line)
            inner_channels = channels if " fusion(" in line else set()
            for callee in _called_computations(line, bodies):
                count = _trip_count(line, bodies[loop[1]][1]) if loop and callee == loop[2] else 1
                walk(
                    callee, executions * (count or 1), trip_counts_known and count is not None, inner_channels
                )

    walk(entry, 1, True, set())
    return operations


def _is_first_occurrence(line: str, channels: set[str]) -> bool:
    """Whether a line is the first one of its collective; adds its channel to `channels`.

    On TPU a collective may overlap with several fusions: each of them contains it, with the same channel.
    """
    if "async_collective_fusion_config" not in line:
        return True
    channel = re.search(r"channel_id=(\d+)", line)
    if channel is None or channel[1] not in channels:
        channels.update(channel.groups() if channel else ())
        return True
    return False


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """Yield (name, (whether it is the entry computation, its lines))."""
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = []
            yield match[2], (bool(match[1]), lines)
        elif lines is not None:
            lines.append(line)


def _called_computations(line: str, bodies: dict[str, tuple[bool, list[str]]]) -> list[str]:
    if " async-done(" in line or " async-update(" in line:  # the async-start has called it
        return []
    names = (name.strip(" %") for part in _CALLEES.findall(line) for name in part.strip("{}").split(","))
    return [name for name in names if name in bodies]


def _trip_count(line: str, condition: list[str]) -> int | None:
    """How often a loop runs: its known trip count, or the only constant in its condition; else None."""
    if match := re.search(r"known_trip_count[^0-9]*(\d+)", line):
        return int(match[1])
    constants = {int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)}
    return constants.pop() if len(constants) == 1 else None


def _parse_collective(
    match: re.Match[str], line: str, name: str, executions: int, trip_counts_known: bool
) -> Collective:
    """Parse the collective on a line of the computation `name`."""
    shapes, kind, is_start = match.groups()
    if name.startswith("all-reduce-scatter"):  # on TPU: a fusion of an all-reduce and a slice
        return Collective(
            "reduce-scatter", _shapes_bytes(shapes), _group_size(line), executions, trip_counts_known
        )
    group = _group_size(line)
    if is_start and kind != "all-reduce":  # (operands, results, …), each of them an array or a tuple
        parts = re.findall(r"\([^()]*\)|[a-z][a-z0-9]*\[[0-9,]*\]", re.sub(r"\{[^{}]*\}", "", shapes)[1:-1])
        return Collective(kind, max(map(_shapes_bytes, parts)), group, executions, trip_counts_known)
    scatter_size = max(group, 1) if kind == "reduce-scatter" else 1
    return Collective(kind, _shapes_bytes(shapes) * scatter_size, group, executions, trip_counts_known)


def _shapes_bytes(shapes: str) -> int:
    return sum(_array_bytes(*shape) for shape in _SHAPE.findall(shapes))


def _array_bytes(dtype: str, dims: str) -> int:
    bits = re.search(r"(\d+)", dtype)
    itemsize = _DTYPE_BYTES.get(dtype) or (max(1, int(bits[1]) // 8) if bits else 1)
    return itemsize * math.prod(int(dim) for dim in dims.split(",") if dim)


def _group_size(line: str) -> int:
    """Devices in a group, 0 without replica groups: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}."""
    _, _, groups = line.partition("replica_groups=")
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return len(match[1].split(","))
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    if match := re.match(r"(?:mesh)?\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]) if axis in sizes)
    return 0
