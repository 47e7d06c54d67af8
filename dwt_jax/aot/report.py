"""`dwt compile` as a user sees it: a table or JSON, and the exit status."""

import json
import sys

from dwt_jax.aot.accelerators import GIB
from dwt_jax.aot.compile import Ahead, ahead, largest, target
from dwt_jax.config import Config

DOES_NOT_FIT = 3


def command(config: Config, topology: str, as_json: bool, max_batch: bool) -> int:
    """Print what compiling `config` for `topology` says; with max_batch of the largest batch that fits, in
    place of the config's. → 0, or 3 if it does not fit (not even one row a chip)."""
    goal = target(config, topology)
    if max_batch:
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        found, above = largest(goal, config.train.batch_size, say)
        found = found or above
    else:
        found = ahead(goal, config.train.batch_size)
    print(json.dumps(found._asdict(), indent=2) if as_json else table(found))
    return 0 if found.fits else DOES_NOT_FIT


def table(found: Ahead) -> str:
    """Text for a terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    with_teacher = f", teacher {found.teacher}" if found.teacher else ", no teacher"
    chip = found.topology.partition(":")[0]
    lines = [
        f"compiled, not run: {found.rows} rows of {found.length} tokens on {found.chips} x {chip} ({mesh})",
        f"student {found.student}{with_teacher}; compiled in {found.compile_seconds:.0f} s",
        "",
        *_memory(found),
    ]
    if found.collectives:
        lines += ["", f"{'sent, a step':20}{'count':>8}{'GB':>9}{'a chip, GB':>12}"]
        for each in found.collectives:
            lines.append(
                f"  {each['kind']:18}{each['count']:8d}{each['bytes'] / 1e9:9.3f}{each['sent'] / 1e9:12.3f}"
            )
        if not found.loops_known:
            lines.append("  (a loop does not say how often it runs: counted once)")
    lines += ["", f"FLOPs a step: {found.flops:.3g}, a chip {found.flops / found.chips:.3g}"]
    if "memory" in found.seconds:
        lines += _times(found)
    return "\n".join(lines)


def _memory(found: Ahead) -> list[str]:
    memory = found.memory
    room = memory["available"] / GIB
    if "together" not in memory:
        wanted = f"{memory['wanted'] / GIB:.2f} GiB wanted" if "wanted" in memory else "more wanted"
        return [f"memory of a chip: does not fit, {wanted}, {room:.2f} GiB there", f"  {found.said}"]
    lines = ["memory of a chip, GiB"]
    for name in ("arguments", "results", "temporaries", "program"):
        lines.append(f"  {name:18}{memory[name] / GIB:8.2f}")
    share = memory["together"] / memory["available"]
    verdict = "fits" if found.fits else "does not fit"
    return [
        *lines,
        f"  {'together':18}{memory['together'] / GIB:8.2f}  of {room:.2f} ({share:.0%}): {verdict}",
    ]


def bounds(found: Ahead) -> tuple[float, float]:
    """Seconds of a step: if computing, memory and network wholly overlap, and if none does."""
    return max(found.seconds.values()), sum(found.seconds.values())


def _times(found: Ahead) -> list[str]:
    low, high = bounds(found)
    compute, tokens = found.seconds["compute"], found.rows * found.length
    each = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in found.seconds.items())
    return [
        f"at peak rates (bounds, not measured): {each}",
        f"a step: {1e3 * low:.2f} ms if they overlap, {1e3 * high:.2f} ms if not; "
        f"MFU at most {compute / low:.0%}, {compute / high:.0%}; "
        f"{tokens / low:,.0f}, {tokens / high:,.0f} tokens/s",
    ]
