"""Compare initialisations: train each for the first steps of the run and rank by held-out loss.

The loss of a remapped model before training is a poor predictor of its loss after training; the loss after
1 to 2 % of the steps is a good one (Du et al. 2024, arXiv 2405.15319, for stacking).
Every method trains exactly the first steps of the run: the same batches, masks, dropout and
schedules, learning rate included. The result is the loss of the run after those steps. A pilot
that ends within the warm-up of the learning rate says little.
A batch ramp is left out: every step of a pilot has the full batch of `train.batch_size` rows.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dwt_jax.config import Config
from dwt_jax.data.dataset import batch_iterator
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.mesh import batch_sharding, replicated_sharding
from dwt_jax.errors import UserError
from dwt_jax.eval import likelihood
from dwt_jax.eval.paired import paired_error
from dwt_jax.models.common.sharding import infer_shardings
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.remap.apply import remap_params
from dwt_jax.remap.methods import METHODS, get_method
from dwt_jax.remap.plan import plan_growth
from dwt_jax.runs.pretrained import load_pretrained, params_digest
from dwt_jax.runs.state import abstract_state, init_train_state
from dwt_jax.runs.teacher import shard_params
from dwt_jax.train.accounting import step_flops
from dwt_jax.train.initialize import copied_mask_for_warmup
from dwt_jax.train.ligo_training import LigoConfig, LigoResult, train_ligo_maps
from dwt_jax.train.run_context import RunContext
from dwt_jax.train.run_state import effective_params
from dwt_jax.train.setup import setup_run
from dwt_jax.train.step import jit_train_step

BASELINE, LIGO = "random", "ligo"


@dataclass(frozen=True)
class InitResult:
    """The result of one method; fields are None where they do not apply.

    Losses are on the held-out documents, in nats; errors are their standard errors over documents.
    """

    method: str
    refused: str = ""  # the reason, if the method does not support the pair of models
    same_as: str = ""  # an earlier method with bitwise the same parameters
    function_preserving: bool | None = None  # as in RemapReport
    initial_loss: float | None = None
    initial_error: float | None = None
    loss: float | None = None
    error: float | None = None
    loss_vs_baseline: float | None = None  # loss − loss of the baseline, on the same documents
    loss_vs_baseline_error: float | None = None  # of that difference, paired by document
    seconds: float | None = None  # remapping, LiGO and training; the first method's include compilation
    flops: float | None = None  # of training, the teacher included, and of LiGO
    ligo: LigoResult | None = None  # of method ligo


def run_pilot(
    run: RunContext,
    params: Params,
    source: ModelConfig,
    steps: int,
    methods: Sequence[str] = (),
    *,
    ligo_config: LigoConfig = LigoConfig(),
    log: Callable[[str], None] = lambda text: None,
) -> list[InitResult]:
    """Train each method for the first `steps` steps of a run and rank them.

    Args:
        run: the run of the larger model; its config's `init` has the options (split, noise, …).
        params: parameters to grow, host arrays.
        source: config of the model of `params`.
        steps: training steps of each method, at most those of the run.
        methods: names as in methods.get_method. Default: all. Random initialisation, the baseline, is
            always included.
        ligo_config: how `ligo` learns its growth operator.
        log: called with messages about the progress.

    Returns:
        One result per method, the lowest held-out loss first, refused methods last.

    Raises:
        UserError: an unknown method, or a number of steps out of range.
    """
    if not 1 <= steps <= run.config.train.steps:
        raise UserError(f"--steps is {steps}, expected from 1 to train.steps ({run.config.train.steps})")
    for name in methods:
        get_method(name)
    names = [BASELINE, *(name for name in methods or METHODS if name != BASELINE)]
    teacher_params = shard_params(run.teacher, run.mesh) if run.teacher else None
    pilot = _Pilot(run, params, source, steps, ligo_config, teacher_params)
    results: list[InitResult] = []
    for index, name in enumerate(names, start=1):
        log(f"pilot {index}/{len(names)}: {name}")
        result = pilot.run_method(name)
        results.append(result)
        if result.refused:
            log(f"  refused: {result.refused}")
        elif result.same_as:
            log(f"  same parameters as {result.same_as}")
        else:
            log(f"  held-out loss {result.initial_loss:.4f} → {result.loss:.4f}, {result.seconds:.0f} s")
    return rank_results(results)


class _Pilot:
    """What the methods of a pilot share. The baseline runs first: the others are compared with it."""

    def __init__(
        self,
        run: RunContext,
        params: Params,
        source: ModelConfig,
        steps: int,
        ligo_config: LigoConfig,
        teacher_params: Params | None,
    ) -> None:
        self.run = run
        self.params = params
        self.source = source
        self.steps = steps
        self.ligo_config = ligo_config
        self.teacher_params = teacher_params
        self.method_of_digest: dict[str, str] = {}
        self.baseline_losses: likelihood.DocumentLosses | None = None

    def run_method(self, name: str) -> InitResult:
        """Initialise with a method, train, and measure the held-out loss before and after."""
        start_time = time.perf_counter()
        try:
            params, result = _init_with(
                self.run, self.params, self.source, name, self.ligo_config, self.teacher_params
            )
        except UserError as error:
            return InitResult(name, refused=str(error))
        same_as = self.method_of_digest.setdefault(params_digest(params), name)
        if same_as != name:
            return dataclasses.replace(result, same_as=same_as, ligo=None)
        seconds = time.perf_counter() - start_time
        initial_losses = _document_losses(self.run, params, 0)
        start_time = time.perf_counter()
        params = _train_briefly(self.run, params, self.source, name, self.steps, self.teacher_params)
        seconds += time.perf_counter() - start_time
        losses = _document_losses(self.run, params, self.steps)
        if name == BASELINE:
            self.baseline_losses = losses
        flops = _pilot_flops(self.run, self.steps) + (result.ligo.flops if result.ligo else 0.0)
        result = dataclasses.replace(result, seconds=seconds, flops=flops)
        return _with_losses(result, initial_losses, losses, self.baseline_losses)


def rank_results(results: Sequence[InitResult]) -> list[InitResult]:
    """Sort results by loss.

    NaN is the largest loss. A method with the same parameters as another follows it; refused ones are last.
    """
    result_of_method = {result.method: result for result in results}

    def key(result: InitResult) -> tuple[bool, float, bool]:
        loss = result_of_method[result.same_as or result.method].loss
        return bool(result.refused), np.inf if loss is None or np.isnan(loss) else loss, bool(result.same_as)

    return sorted(results, key=key)


def _init_with(
    run: RunContext, params: Any, source: ModelConfig, name: str, ligo_config: LigoConfig, teacher_params: Any
) -> tuple[Any, InitResult]:
    """(parameters on the mesh, the result without losses)."""
    key = jax.random.key(run.config.seed)
    if name != LIGO:
        grown_params, report = remap_params(
            params, source, run.config.model, name, key, options=run.config.init
        )
        return jax.device_put(
            grown_params, infer_shardings(grown_params, run.config.model, run.mesh)
        ), InitResult(name, function_preserving=report.function_preserving)
    grown_params, record = train_ligo_maps(
        run, params, source, teacher_params=teacher_params, settings=ligo_config
    )
    return grown_params, InitResult(name, function_preserving=False, ligo=record)


def _train_briefly(
    run: RunContext, params: Any, source: ModelConfig, method: str, steps: int, teacher_params: Any
) -> Any:
    """The parameters after the run's first `steps` steps from `params`, all with the full batch."""
    config = run.config
    growth_plan = plan_growth(method, source, config.model, jax.random.key(config.seed), config.init)
    copied_mask = copied_mask_for_warmup(config, growth_plan, run.mesh)
    layout = infer_shardings(abstract_state(config.model, config.optimizer), config.model, run.mesh)
    # jit copies the parameters: the step donates its state.
    state = jax.jit(
        lambda params: init_train_state(params, config.model, config.optimizer), out_shardings=layout
    )(params)
    seed = jax.device_put(np.uint32(config.seed), replicated_sharding(run.mesh))
    no_teacher_step, distill_step = (
        jit_train_step(run.no_teacher_config, run.mesh),
        jit_train_step(run.step_config, run.mesh),
    )
    batches = batch_iterator(
        run.rows, config.seed, config.train.batch_size, 0, steps, prefetch=config.data.prefetch
    )
    for step, batch in enumerate(batches):
        with_teacher = teacher_params is not None and step < run.teacher_end_step
        device_batch = jax.device_put(batch, batch_sharding(run.mesh))
        schedules = jax.device_put(run.schedules[step], replicated_sharding(run.mesh))
        train_step = distill_step if with_teacher else no_teacher_step
        teacher = teacher_params if with_teacher else None
        state, _ = train_step(state, teacher, device_batch, schedules, seed, copied_mask)
    return jax.block_until_ready(state.params)


def _document_losses(run: RunContext, params: Any, step: int) -> likelihood.DocumentLosses:
    """The held-out losses of the model after `step` steps of the run."""
    params = effective_params(run, params, step)
    document_losses = likelihood.losses_per_document(
        params, run.config.model, run.data, mesh=run.mesh, policy=run.policy
    )
    assert document_losses is not None  # evaluation is not interrupted
    return document_losses


def _with_losses(
    result: InitResult,
    initial_losses: likelihood.DocumentLosses,
    document_losses: likelihood.DocumentLosses,
    baseline_losses: likelihood.DocumentLosses | None,
) -> InitResult:
    initial_metrics = likelihood.summarize_losses(initial_losses)
    metrics = likelihood.summarize_losses(document_losses)
    assert baseline_losses is not None  # the baseline comes first and is never refused
    loss_and_count = [(losses.loss, losses.predictions) for losses in (document_losses, baseline_losses)]
    return dataclasses.replace(
        result,
        initial_loss=initial_metrics["held_out_loss"],
        initial_error=initial_metrics["standard_error"],
        loss=metrics["held_out_loss"],
        error=metrics["standard_error"],
        loss_vs_baseline=metrics["held_out_loss"]
        - likelihood.summarize_losses(baseline_losses)["held_out_loss"],
        loss_vs_baseline_error=paired_error(*loss_and_count),
    )


def _pilot_flops(run: RunContext, steps: int) -> float:
    """The FLOPs of the first `steps` steps with the full batch."""
    config = run.config
    student_flops, teacher_flops = step_flops(
        run.step_config, config.data.sequence_length, config.train.batch_size
    )
    return steps * student_flops + min(steps, run.teacher_end_step) * teacher_flops


def format_pilot_table(results: Sequence[InitResult], steps: int) -> str:
    """Return a table of the ranked results as text for a terminal."""
    rows: list[tuple[str, ...]] = [
        ("", "method", f"loss at {steps}", "± s.e.", "vs. random", "initial loss", "FLOPs", "seconds")
    ]
    rank = 0
    for result in results:
        if result.refused:
            rows.append(("–", result.method, f"refused: {result.refused.partition(': ')[2]}", *[""] * 5))
        elif result.same_as:
            rows.append(("", result.method, f"same as {result.same_as}", *[""] * 5))
        else:
            rank += 1
            rows.append((str(rank), result.method, *_table_cells(result)))
    plain_rows = [row for row in rows if not row[2].startswith("refused")]
    widths = [max(len(row[i]) for row in plain_rows) for i in range(len(rows[0]))]
    widths[1] = max(len(row[1]) for row in rows)
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        if record := result.ligo:
            lines.append(
                f"{result.method}: growth operator learned in {record.steps} steps and "
                f"{record.flops:.3g} FLOPs (included above), "
                f"objective {record.loss_before:.4f} → {record.loss_after:.4f}"
            )
    return "\n".join(lines)


def _table_cells(result: InitResult) -> tuple[str, ...]:
    difference = "baseline"
    if result.method != BASELINE:
        paired = result.loss_vs_baseline_error
        error = "" if paired is None else f" ± {paired:.4f}"
        difference = f"{result.loss_vs_baseline:+.4f}{error}"
    return (
        f"{result.loss:.4f}",
        f"{result.error:.4f}",
        difference,
        f"{result.initial_loss:.4f}",
        f"{result.flops:.3g}",
        f"{result.seconds:.0f}",
    )


def print_pilot_ranking(
    model: str,
    config: Config,
    steps: int,
    methods: Sequence[str] = (),
    as_json: bool = False,
    step: int | None = None,
) -> None:
    """Train every method for a few steps and print the ranking (`dwt pilot`). Progress goes to stderr.

    Nothing is written but prepared data in the cache.

    Args:
        model: run directory or model directory to grow.
        config: config of the larger run.
        steps: training steps of each method.
        methods: names as in methods.get_method. Default: all.
        as_json: whether to print JSON instead of a table.
        step: checkpoint of a run to read. Default: the latest.

    Raises:
        UserError: the config cannot be trained, or the model's vocabulary differs.
    """
    ligo_config = LigoConfig(steps=config.init.learning_steps)
    with tempfile.TemporaryDirectory(prefix="dwt-pilot-") as folder:
        run = setup_run(config, Path(folder), lambda *_: None)
        source = load_pretrained(
            "--model", model, load_vocabulary(run.data / "tokenizer"), allow_fewer_tokens=True, step=step
        )
        log = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        results = run_pilot(
            run, source.params, source.model, steps, methods, ligo_config=ligo_config, log=log
        )
    if as_json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
        return
    print(format_pilot_table(results, steps))
    if config.train.batch_ramp:
        print(f"Every step had {config.train.batch_size} rows: a pilot has no train.batch_ramp.")
    warmup_end = int(np.argmax(run.schedules.learning_rate))
    if steps <= warmup_end:
        print(f"The learning rate is still warming up, until step {warmup_end}: use more steps.")
