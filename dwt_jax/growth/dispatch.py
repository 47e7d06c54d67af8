"""What the flags of `dwt remap` ask for: one of three commands, each imported where it is run."""

import argparse
import json
import shlex
import sys

from dwt_jax import config_loader, runtime_env
from dwt_jax.errors import UserError


def run_remap(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """A model directory as a larger one; a run as a larger one (--run); or which way to begin (--pilot)."""
    _check_options(options, overrides)
    if options.grown is not None:
        _grow_run(options, overrides)
    elif options.pilot is not None:
        _run_pilot(options, overrides)
    else:
        _remap_model(options, overrides)


def _check_options(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    """What cannot be asked for together."""
    if options.pilot is None and not (options.method and options.out):
        raise UserError("remap: --method and --out are needed, or --pilot=N")
    if options.pilot is not None and (options.pilot < 1 or options.out or options.method or options.grown):
        raise UserError(
            f"--pilot is {options.pilot}, expected at least 1, with --model, no --method, no --out"
        )
    if not 0 <= options.noise < float("inf"):
        raise UserError(f"--noise is {options.noise}, expected at least 0")
    if options.seed is not None and (options.grown or options.pilot):
        flag = "--run" if options.grown else "--pilot"
        raise UserError(f"--seed is {options.seed}, expected none with {flag}: the config has one (seed)")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise UserError(f"--seed is {options.seed}, expected at least 0 and less than 2**32")
    if options.moments and options.grown is None:
        raise UserError(f"--moments is {options.moments}, expected --run: a model directory has no moments")
    if "init.step" in overrides:
        raise UserError(
            f"--config.init.step is {overrides['init.step']!r}, expected --step: dwt remap --run sets it"
        )


def _remap_model(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    target = config_loader.load_model_config(options.config, overrides)
    runtime_env.set_xla_env()
    from dwt_jax.growth.remap_model import remap_model
    from dwt_jax.remap.methods import GrowthOptions

    growth_options = GrowthOptions(
        options.split, options.noise, options.new_tokens or "mean", options.new_positions or "random"
    )
    report = remap_model(
        options.model, target, options.method, options.out, growth_options, options.seed or 0, options.step
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())


def _run_pilot(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    # Every method is tried, from --model: what the config names does not matter.
    remaining = {key: value for key, value in overrides.items() if key not in ("init.method", "init.from")}
    config = config_loader.load_config(
        options.config, _merge_flags(options, remaining, "random", options.model)
    )
    runtime_env.set_xla_env()
    from dwt_jax.growth import pilot

    pilot.print_pilot_ranking(options.model, config, options.pilot, as_json=options.json, step=options.step)


def _grow_run(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    overrides = _merge_flags(options, overrides, options.method, options.grown)
    config = config_loader.load_config(options.config, overrides)
    runtime_env.set_xla_env()
    from dwt_jax.growth.remap_run import grow_run

    report = grow_run(options.grown, config, options.out, options.step, options.moments or "reset")
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
    arguments = [
        f"--config={options.config}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]
    command = shlex.join(["dwt", "train", *arguments, f"--workdir={options.out}"])
    print(f"goes on with: {command}", file=sys.stderr)


def _merge_flags(
    options: argparse.Namespace, overrides: dict[str, str], method: str, source: str
) -> dict[str, str]:
    """`overrides` with the flags as the config's `init`."""
    flags = {
        "method": method,
        "from": source,
        "split": options.split,
        "noise": str(options.noise or ""),
        "new_tokens": options.new_tokens,
        "new_positions": options.new_positions,
    }
    requested = {f"init.{key}": value for key, value in flags.items() if value}
    for key, value in requested.items():
        if overrides.get(key, value) != value:
            raise UserError(f"--config.{key} is {overrides[key]!r}, expected {value!r} as another flag says")
    return {**overrides, **requested}
