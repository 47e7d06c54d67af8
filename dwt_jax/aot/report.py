"""`dwt compile` as a user sees it: a table or JSON, and the exit status."""

import json
import sys

from dwt_jax.aot.accelerators import GIB
from dwt_jax.aot.compile import CompiledStep, compile_step, find_largest_batch, make_compile_target
from dwt_jax.config import Config

DOES_NOT_FIT = 3


def compile_command(config: Config, topology: str, as_json: bool, max_batch: bool) -> int:
    """Print what compiling `config` for `topology` says; with max_batch of the largest batch that fits, in
    place of the config's. → 0, or 3 if it does not fit (not even one row a chip)."""
    compile_target = make_compile_target(config, topology)
    if max_batch:
        log = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        step, smallest_overflow = find_largest_batch(compile_target, config.train.batch_size, log)
        step = step or smallest_overflow
    else:
        step = compile_step(compile_target, config.train.batch_size)
    print(json.dumps(step._asdict(), indent=2) if as_json else format_compile_report(step))
    return 0 if step.fits else DOES_NOT_FIT


def format_compile_report(step: CompiledStep) -> str:
    """Text for a terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items())
    with_teacher = f", teacher {step.teacher}" if step.teacher else ", no teacher"
    chip = step.topology.partition(":")[0]
    lines = [
        f"compiled, not run: {step.rows} rows of {step.length} tokens on {step.chips} x {chip} ({mesh})",
        f"student {step.student}{with_teacher}; compiled in {step.compile_seconds:.0f} s",
        "",
        *_format_memory(step),
    ]
    if step.collectives:
        lines += ["", f"{'sent, a step':20}{'count':>8}{'GB':>9}{'a chip, GB':>12}"]
        for each in step.collectives:
            lines.append(
                f"  {each['kind']:18}{each['count']:8d}{each['bytes'] / 1e9:9.3f}{each['sent'] / 1e9:12.3f}"
            )
        if not step.loops_known:
            lines.append("  (a loop does not say how often it runs: counted once)")
    lines += ["", f"FLOPs a step: {step.flops:.3g}, a chip {step.flops / step.chips:.3g}"]
    if "memory" in step.seconds:
        lines += _format_times(step)
    return "\n".join(lines)


def _format_memory(step: CompiledStep) -> list[str]:
    memory = step.memory
    available = memory["available"] / GIB
    if "together" not in memory:
        required = f"{memory['wanted'] / GIB:.2f} GiB wanted" if "wanted" in memory else "more wanted"
        return [f"memory of a chip: does not fit, {required}, {available:.2f} GiB there", f"  {step.said}"]
    lines = ["memory of a chip, GiB"]
    for name in ("arguments", "results", "temporaries", "program"):
        lines.append(f"  {name:18}{memory[name] / GIB:8.2f}")
    share = memory["together"] / memory["available"]
    verdict = "fits" if step.fits else "does not fit"
    return [
        *lines,
        f"  {'together':18}{memory['together'] / GIB:8.2f}  of {available:.2f} ({share:.0%}): {verdict}",
    ]


def step_time_bounds(step: CompiledStep) -> tuple[float, float]:
    """Seconds of a step: if computing, memory and network wholly overlap, and if none does."""
    return max(step.seconds.values()), sum(step.seconds.values())


def _format_times(step: CompiledStep) -> list[str]:
    low, high = step_time_bounds(step)
    compute, tokens = step.seconds["compute"], step.rows * step.length
    each = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in step.seconds.items())
    return [
        f"at peak rates (bounds, not measured): {each}",
        f"a step: {1e3 * low:.2f} ms if they overlap, {1e3 * high:.2f} ms if not; "
        f"MFU at most {compute / low:.0%}, {compute / high:.0%}; "
        f"{tokens / low:,.0f}, {tokens / high:,.0f} tokens/s",
    ]
