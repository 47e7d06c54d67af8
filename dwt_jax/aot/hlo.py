"""What a compiled program sends between its devices, read off its text."""

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
    kind: str
    bytes: int  # of the whole array, on one device: before a scatter, after a gather
    group_size: int  # devices that take part together; 0: all
    executions: int  # a step
    trip_counts_known: bool  # whether all loops around it say how often they run

    def bytes_sent(self, devices: int) -> float:
        """Bytes that a device sends a step, by the ring algorithms, which need the fewest."""
        n = self.group_size or devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.executions * self.bytes * share


def find_collectives(text: str) -> list[Collective]:
    """All that run in a program (XLA's, after optimisation), those in loops as often as the loops run."""
    bodies = dict(_computations(text))
    entry = next(name for name, (first, _) in bodies.items() if first)
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
    """Whether this is the first that `begun` hears of a collective. On TPU one may go on beside several
    fusions: it is written in each of them, with the same channel."""
    if "async_collective_fusion_config" not in line:
        return True
    channel = re.search(r"channel_id=(\d+)", line)
    if channel is None or channel[1] not in channels:
        channels.update(channel.groups() if channel else ())
        return True
    return False


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """(name, (whether it is the program's first, its lines))"""
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = []
            yield match[2], (bool(match[1]), lines)
        elif lines is not None:
            lines.append(line)


def _called_computations(line: str, bodies: dict[str, tuple[bool, list[str]]]) -> list[str]:
    if " async-done(" in line or " async-update(" in line:  # of what an async-start called
        return []
    names = (name.strip(" %") for part in _CALLEES.findall(line) for name in part.strip("{}").split(","))
    return [name for name in names if name in bodies]


def _trip_count(line: str, condition: list[str]) -> int | None:
    """How often a loop runs: as its line says, or the one number that its condition compares with."""
    if match := re.search(r"known_trip_count[^0-9]*(\d+)", line):
        return int(match[1])
    constants = {int(n) for each in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", each)}
    return constants.pop() if len(constants) == 1 else None


def _parse_collective(
    match: re.Match[str], line: str, name: str, executions: int, trip_counts_known: bool
) -> Collective:
    """name: of the computation that the line is in."""
    shapes, kind, is_start = match.groups()
    if name.startswith("all-reduce-scatter"):  # how TPUs write it: a fusion of an all-reduce and a slice
        return Collective(
            "reduce-scatter", _shapes_bytes(shapes), _group_size(line), executions, trip_counts_known
        )
    group = _group_size(line)
    if is_start and kind != "all-reduce":  # (operands, results, …), each of them one or a tuple
        parts = re.findall(r"\([^()]*\)|[a-z][a-z0-9]*\[[0-9,]*\]", re.sub(r"\{[^{}]*\}", "", shapes)[1:-1])
        return Collective(kind, max(map(_shapes_bytes, parts)), group, executions, trip_counts_known)
    scatter_size = max(group, 1) if kind == "reduce-scatter" else 1
    return Collective(kind, _shapes_bytes(shapes) * scatter_size, group, executions, trip_counts_known)


def _shapes_bytes(shapes: str) -> int:
    return sum(_array_bytes(*shape) for shape in _SHAPE.findall(shapes))


def _array_bytes(kind: str, dims: str) -> int:
    bits = re.search(r"(\d+)", kind)
    each = _DTYPE_BYTES.get(kind) or (max(1, int(bits[1]) // 8) if bits else 1)
    return each * math.prod(int(dim) for dim in dims.split(",") if dim)


def _group_size(line: str) -> int:
    """Devices in a group, 0 where none is named: {{0,1},{2,3}}, [2,2]<=[4], mesh['a'=2,'b'=2] {'b'}."""
    _, _, groups = line.partition("replica_groups=")
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return len(match[1].split(","))
    if match := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(match[1])
    if match := re.match(r"(?:mesh)?\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]) if axis in sizes)
    return 0
