"""The output of `dwt compile`: a text report or JSON, and the exit status."""

import json

from dwt_jax.aot.accelerators import GIB
from dwt_jax.aot.compile import CompiledStep, compile_step, find_largest_batch, make_compile_target
from dwt_jax.config import Config

EXIT_DOES_NOT_FIT = 3


def compile_command(config: Config, topology: str, as_json: bool, max_batch: bool) -> int:
    """Compile the step of `config` for `topology` and print the result.

    Args:
        config: the config of the run.
        topology: e.g. "v5e:4x4".
        as_json: print JSON instead of a text report.
        max_batch: search for the largest batch that fits, instead of using the config's.

    Returns:
        The exit status: 0, or 3 if the step does not fit (with max_batch: not even one row per chip).
    """
    target = make_compile_target(config, topology)
    if max_batch:
        largest_fit, smallest_overflow = find_largest_batch(target, config.train.batch_size)
        step = largest_fit or smallest_overflow
    else:
        step = compile_step(target, config.train.batch_size)
    print(json.dumps(step._asdict(), indent=2) if as_json else format_compile_report(step))
    return 0 if step.fits else EXIT_DOES_NOT_FIT


def format_compile_report(step: CompiledStep) -> str:
    """Format the result for a terminal."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items())
    teacher = f"teacher {step.teacher}" if step.teacher else "no teacher"
    chip = step.topology.partition(":")[0]
    lines = [
        f"compiled, not run: {step.batch_size} rows of {step.sequence_length} positions on "
        f"{step.num_chips} x {chip} ({mesh})",
        f"student {step.student}, {teacher}, {step.attention} attention; "
        f"compiled in {step.compile_seconds:.0f} s",
        "",
        *_format_memory(step),
    ]
    if step.collectives:
        lines += ["", f"{'collectives per step':20}{'count':>8}{'GB':>9}{'GB sent per chip':>18}"]
        for collective in step.collectives:
            gb, gb_sent = collective["bytes"] / 1e9, collective["bytes_sent"] / 1e9
            lines.append(f"  {collective['kind']:18}{collective['count']:8d}{gb:9.3f}{gb_sent:18.3f}")
        if not step.trip_counts_known:
            lines.append("  (the trip count of a loop is unknown; its collectives count once)")
    lines += ["", f"FLOPs per step: {step.flops:.3g}; per chip: {step.flops / step.num_chips:.3g}"]
    if "memory" in step.roofline_seconds:
        lines += _format_times(step)
    return "\n".join(lines)


def _format_memory(step: CompiledStep) -> list[str]:
    memory = step.memory
    available = memory["available"] / GIB
    if "total" not in memory:
        required = f"requires {memory['required'] / GIB:.2f} GiB, " if "required" in memory else ""
        return [
            f"memory per chip: does not fit; {required}{available:.2f} GiB available",
            f"  {step.compiler_message}",
        ]
    lines = ["memory per chip, GiB"]
    for name in ("arguments", "outputs", "temporaries", "generated_code"):
        lines.append(f"  {name.replace('_', ' '):18}{memory[name] / GIB:8.2f}")
    share = memory["total"] / memory["available"]
    verdict = "fits" if step.fits else "does not fit"
    return [
        *lines,
        f"  {'total':18}{memory['total'] / GIB:8.2f}  of {available:.2f} ({share:.0%}): {verdict}",
    ]


def step_time_bounds(step: CompiledStep) -> tuple[float, float]:
    """Return the seconds of a step if compute, memory and network overlap fully, and if they do not."""
    return max(step.roofline_seconds.values()), sum(step.roofline_seconds.values())


def _format_times(step: CompiledStep) -> list[str]:
    low, high = step_time_bounds(step)
    compute, positions = step.roofline_seconds["compute"], step.batch_size * step.sequence_length
    bounds = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in step.roofline_seconds.items())
    return [
        f"at peak rates (bounds, not measurements): {bounds}",
        f"step: {1e3 * low:.2f} ms with full overlap, {1e3 * high:.2f} ms without; "
        f"MFU at most {compute / low:.0%}, {compute / high:.0%}; "
        f"{positions / low:,.0f}, {positions / high:,.0f} positions/s",
    ]
