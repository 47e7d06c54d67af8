"""Fine-tuning on one task with all its seeds. Rerunning the same command resumes it.

Seeds trained in parallel are saved together; an interrupted group restarts. Results depend only on
config, model and data, so an interrupted run ends with the same numbers as an uninterrupted one.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Config
from dwt_jax.data.hf_tokenizer import LoadedTokenizer, read_tokenizer
from dwt_jax.data.text_template import read_decoder_tokenizer
from dwt_jax.data.tokenizer import load_vocabulary
from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag, TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, read_intact_json, user_path, write_json
from dwt_jax.finetune import collate, directory, metrics, outputs
from dwt_jax.finetune.collate import EncodedExamples, ExampleCache
from dwt_jax.finetune.config import MIN_SEQUENCE_LENGTH, FinetuneConfig, Recipe
from dwt_jax.finetune.datasets import TaskData, describe_shared_examples
from dwt_jax.finetune.outputs import BestModel, SeedResult
from dwt_jax.finetune.predict import predict_logits
from dwt_jax.finetune.step import (
    FinetuneStepConfig,
    finetune_step_config,
    jit_finetune_step,
    jit_init_finetune_state,
)
from dwt_jax.hf import model_card
from dwt_jax.hf.checkpoint import load_checkpoint
from dwt_jax.hf.source_card import existing_card, source_name
from dwt_jax.hf.tensor_files import has_weights
from dwt_jax.logs import logger
from dwt_jax.models import family
from dwt_jax.models.common.logical_axes import path_name
from dwt_jax.models.protocol import ModelConfig, Params
from dwt_jax.objectives import schedules
from dwt_jax.progress import Progress
from dwt_jax.remap.gates import fold_gates
from dwt_jax.runs.load import LoadedModel, load_model
from dwt_jax.runs.pretrained import check_vocab_size, params_digest
from dwt_jax.train.setup import numeric_identity, resolve_precision


class SourceModel(NamedTuple):
    """The pretrained model."""

    path: str  # as given on the command line
    checkpoint: LoadedModel
    tokenizer: LoadedTokenizer  # with the template of the rows of examples
    pad_id: int  # token id of the padding
    digest: str  # of the parameters
    card: str = ""  # its model card


@dataclass(frozen=True)
class FinetuneContext:
    """A prepared fine-tuning: resolved config, model and tokenized data."""

    config: FinetuneConfig
    workdir: Path
    source: SourceModel
    data: TaskData
    encoded: dict[str, EncodedExamples]
    step_config: FinetuneStepConfig

    @property
    def eval_splits(self) -> list[str]:
        """Names of the splits that are evaluated after every epoch."""
        return [name for name in self.encoded if name.startswith("dev")]


def load_source_model(path: str, step: int | None = None) -> SourceModel:
    """Load the model to fine-tune, with its gates folded into the weights.

    Args:
        path: a run's directory or a model in Hugging Face's layout.
        step: of a run, the step of the checkpoint; None for the finished model.

    Raises:
        UserError: if `path` is not a model, or its embedding is smaller than the tokenizer's vocabulary.
    """
    checkpoint = load_model(path, heads="all", step=step)
    params, model = fold_gates(checkpoint.params, checkpoint.model)
    vocab = load_vocabulary(checkpoint.tokenizer)
    check_vocab_size("--model", path, model, len(vocab))
    digest, card, pad_id = params_digest(params), existing_card(checkpoint.tokenizer), vocab.pad_id
    if model.objective == "next_token":
        tokenizer, pad_id = read_decoder_tokenizer(checkpoint.tokenizer)
        params, model = _set_pad_token(params, model, pad_id)
    else:
        tokenizer = read_tokenizer(checkpoint.tokenizer)
    checkpoint = checkpoint._replace(params=params, model=model)
    return SourceModel(path, checkpoint, tokenizer, pad_id, digest, card)


def _set_pad_token(params: Params, model: ModelConfig, pad_id: int) -> tuple[Params, ModelConfig]:
    """Set the padding token; tables have a row for it, which is never read, if it was added."""
    model = dataclasses.replace(model, pad_token_id=pad_id, vocab_size=max(model.vocab_size, pad_id + 1))
    axes, num_rows = family(model).param_axes(model), family(model).axis_sizes(model)["vocab"]

    def add_rows(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        if axes[path_name(path)][0].name != "vocab":
            return leaf
        return np.pad(leaf, [(0, num_rows - len(leaf)), *[(0, 0)] * (leaf.ndim - 1)])

    return jax.tree_util.tree_map_with_path(add_rows, params), model


def prepare_finetuning(
    config: FinetuneConfig, source: SourceModel, workdir: Path, example_cache: ExampleCache | None = None
) -> FinetuneContext:
    """Check everything and initialize the directory. Nothing is written if a check fails.

    Args:
        config: of the task; max_length is reduced to the model's positions.
        source: the model.
        workdir: the directory of this task.
        example_cache: examples that were read for other models.

    Raises:
        UserError: for a model or data that cannot be used, or a directory of another run.
    """
    example_cache = example_cache or ExampleCache()
    positions = source.checkpoint.model.max_length
    if positions < MIN_SEQUENCE_LENGTH:
        raise UserError(
            f"--model: {source.path} has {positions} positions, expected at least {MIN_SEQUENCE_LENGTH}"
        )
    if config.recipe.max_length > positions:
        logger.info(
            f"{config.examples.task}: {source.path} has {positions} positions; longer examples are truncated"
        )
        recipe = dataclasses.replace(config.recipe, max_length=positions)
        config = dataclasses.replace(config, recipe=recipe)
    data = example_cache.read(config.examples)
    for line in describe_shared_examples(data):
        logger.info(f"{config.examples.task}: {line}")
    encoded = example_cache.encode(config.examples, source.tokenizer, config.recipe.max_length)
    record = read_intact_json(workdir / "finetune.json")
    policy = resolve_precision(Config(precision=config.precision))
    identity = {
        "model_digest": source.digest,
        "data_digest": directory.data_digest(workdir, data, encoded),
        **numeric_identity(policy, record),
    }
    config = directory.init_finetune_dir(workdir, config, source.tokenizer, identity)
    step_config = finetune_step_config(
        source.checkpoint.model,
        config.recipe.dropout,
        len(data.labels) or 1,
        not data.labels,
        config.recipe.optimizer,
        policy,
    )
    return FinetuneContext(config, workdir, source, data, encoded, step_config)


def finetune_task(context: FinetuneContext, shutdown_flag: ShutdownFlag) -> dict[str, Any]:
    """Train all seeds that are not done yet and write the results.

    A finished fine-tuning continues with seeds that its results lack, and predicts new test splits. If
    model/ is lost, its seed is trained again.

    Returns:
        The content of results.json.

    Raises:
        Preempted: after a signal.
        TrainingFailed: for a loss that is not finite.
    """
    previous = read_intact_json(context.workdir / "results.json") or {}
    recipe, group_size = context.config.recipe, parallel_seeds(context)
    finished = [
        seed for seed in recipe.seeds if str(seed) in previous.get("seeds", ()) and _is_done(context, seed)
    ]
    new_tests = [
        name
        for name, digest in directory.test_digests(context.data, context.encoded).items()
        if previous.get("test_digests", {}).get(name) != digest
    ]
    if previous and len(finished) == len(recipe.seeds) and not new_tests:
        logger.info(f"{context.workdir}: already finished")
        return previous
    lost_seed = _forget_seed_of_lost_model(context)
    # Groups of seeds are those of the seeds that the results lack: a finished seed is not trained again.
    seeds = [seed for seed in recipe.seeds if seed not in finished or seed == lost_seed]
    if previous:
        additions = [*(f"seed {seed}" for seed in seeds), *new_tests]
        logger.info(f"{context.workdir}: already finished; now {', '.join(additions)}")
    groups = [seeds[i : i + group_size] for i in range(0, len(seeds), group_size)]
    remaining_groups = [group for group in groups if not all(_is_done(context, seed) for seed in group)]
    with Progress(context.config.examples.task, len(remaining_groups) * _steps_per_seed(context)) as progress:
        for group in remaining_groups:
            _train_seeds(context, group, shutdown_flag, progress)
    return _write_results(context, shutdown_flag)


def _forget_seed_of_lost_model(context: FinetuneContext) -> int | None:
    """Set the results of the best seed so far aside if its model is lost: it has to be trained again.

    Returns:
        The seed; None if no seed is done, or the model is there.
    """
    seeds, model = context.config.recipe.seeds, context.workdir / "model"
    if has_weights(model) and (model / "config.json").exists():
        return None
    for seed in seeds:  # set aside by a process that was stopped before it had trained the seed again
        if outputs.lost_seed_path(context.workdir, seed).exists() and not _is_done(context, seed):
            return seed
    results = [result for seed in seeds if (result := outputs.read_seed_result(context.workdir, seed))]
    if not results:
        return None
    seed = outputs.best_seed(results).seed
    logger.info(f"{model}: no model of seed {seed}; this seed is trained again")
    outputs.seed_path(context.workdir, seed).rename(outputs.lost_seed_path(context.workdir, seed))
    return seed


def _is_done(context: FinetuneContext, seed: int) -> bool:
    return outputs.seed_path(context.workdir, seed).exists()


def _steps_per_seed(context: FinetuneContext) -> int:
    recipe = context.config.recipe
    return recipe.epochs * -(-len(context.encoded["train"]) // recipe.batch_size)


def parallel_seeds(context: FinetuneContext) -> int:
    """Return the number of seeds to train at once: one on CPU, where they would compete for the cores."""
    recipe = context.config.recipe
    if recipe.seeds_in_parallel:
        return recipe.seeds_in_parallel
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return seeds_that_fit(memory, context.step_config.model, recipe) if memory else len(recipe.seeds)


def seeds_that_fit(memory: int, model: ModelConfig, recipe: Recipe) -> int:
    """Estimate, conservatively, how many seeds can be trained at once.

    Counts parameters, gradients, two moments and an update in fp32, and the activations of the
    longest batch that the backward pass needs.

    Args:
        memory: of the device, in bytes.
        model: config of the model.
        recipe: gives batch size, maximum length and number of seeds.
    """
    heads = family(model).CLASSIFIER_HEADS
    num_params = sum(leaf.size for leaf in jax.tree.leaves(family(model).abstract_params(model, heads)))
    batch_size, length = recipe.batch_size, recipe.max_length
    tokens = batch_size * length * (16 * model.hidden_size + 4 * model.intermediate_size)
    scores = 4 * batch_size * model.num_attention_heads * length**2
    bytes_per_seed = 4 * (5 * num_params + model.num_hidden_layers * (tokens + scores))
    return max(1, min(len(recipe.seeds), int(0.8 * memory / bytes_per_seed)))


def _format_loss(losses: jax.Array) -> str:
    """Format the mean over seeds, which copies it to the host: only when it is shown."""
    return f"loss {np.mean(losses):.4f}"


def _train_seeds(
    context: FinetuneContext, seeds: Sequence[int], shutdown_flag: ShutdownFlag, progress: Progress
) -> None:
    """Train `seeds` in parallel for all epochs, then write the best model so far and their results."""
    recipe, train = context.config.recipe, context.encoded["train"]
    seed_array = np.array(seeds, np.uint32)
    state = jit_init_finetune_state(context.step_config)(context.source.checkpoint.params, seed_array)
    learning_rates = schedules.schedule_values(recipe.optimizer.learning_rate, _steps_per_seed(context))
    train_step, step = jit_finetune_step(context.step_config), 0
    lengths = train.lengths if recipe.group_by_length else None
    seed_results = [SeedResult(seed, [], {name: [] for name in context.eval_splits}) for seed in seeds]
    best_model = BestModel(context.workdir, recipe.seeds)
    for epoch_index in range(recipe.epochs):
        losses = []
        for rows in collate.epoch_batch_indices(len(train), recipe.batch_size, seeds, epoch_index, lengths):
            _check_shutdown(context, shutdown_flag)
            batch = collate.collate_examples(train, rows, recipe.lengths(), context.source.pad_id)
            state, loss = train_step(state, batch, seed_array, np.uint32(step), learning_rates[step])
            losses.append(loss)
            step += 1
            progress.advance(1, functools.partial(_format_loss, loss))
        logits = {
            name: predict_split(context, state["params"], name, shutdown_flag) for name in context.eval_splits
        }
        _evaluate_epoch(context, logits, epoch_index, np.mean(jax.device_get(losses), axis=0), seed_results)
        scores_text = ", ".join(f"{result.scores()[-1]:.4f} (seed {result.seed})" for result in seed_results)
        undefined = sorted(
            {name for result in seed_results for name in result.history[-1].get("undefined", ())}
        )
        warning = f"; counted as 0, since 0/0: {', '.join(undefined)}" if undefined else ""
        name, epoch = context.config.examples.task, f"epoch {epoch_index + 1}/{recipe.epochs}"
        logger.info(f"{name}: {epoch}: dev score {scores_text}{warning}")
        best_model.update(seed_results, state["params"])
    if best_model.params is not None:
        checkpoint = context.source.checkpoint
        outputs.write_model(
            context.workdir, best_model.params, checkpoint.model, checkpoint.passthrough, context.data
        )
    for result in seed_results:
        outputs.write_seed_result(context.workdir, result)


def _check_shutdown(context: FinetuneContext, shutdown_flag: ShutdownFlag) -> None:
    if shutdown_flag.is_set():
        raise Preempted(
            f"{context.workdir}: stopped; finished seeds are saved. Rerun the same command to resume."
        )


def _evaluate_epoch(
    context: FinetuneContext,
    logits: Mapping[str, np.ndarray],
    epoch_index: int,
    losses: np.ndarray,
    seed_results: Sequence[SeedResult],
) -> None:
    """Score the dev splits and append a record to each history. logits: {split: [S, N, labels]}."""
    for i, result in enumerate(seed_results):
        if not (np.isfinite(losses[i]) and all(np.isfinite(values[i]).all() for values in logits.values())):
            raise TrainingFailed(
                f"{context.workdir}: the loss or a prediction of seed {result.seed} is not finite in epoch "
                f"{epoch_index + 1}; the learning rate may be too large"
            )
        record: dict[str, Any] = {"epoch": epoch_index + 1, "train_loss": float(losses[i]), "dev": {}}
        for name, values in logits.items():
            result.logits[name].append(values[i])
            labels = context.data.splits[name].labels
            assert labels is not None
            predictions = outputs.predictions_from_logits(values[i], context.data.labels)
            record["dev"][name], undefined = metrics.compute_metrics(
                context.data.metrics, predictions, labels
            )
            if undefined:
                record["undefined"] = undefined
        result.history.append(record)


def predict_split(
    context: FinetuneContext, params: Any, name: str, shutdown_flag: ShutdownFlag
) -> np.ndarray:
    """Compute the logits of a split.

    Args:
        context: the fine-tuning.
        params: leaves [S, …].
        name: of the split.
        shutdown_flag: raises Preempted once it is set.

    Returns:
        fp32 [S, N, labels].
    """
    recipe = context.config.recipe
    return predict_logits(
        context.step_config,
        params,
        context.encoded[name],
        recipe.batch_size,
        recipe.lengths(),
        context.source.pad_id,
        lambda _: _check_shutdown(context, shutdown_flag),
    )


def _write_results(context: FinetuneContext, shutdown_flag: ShutdownFlag) -> dict[str, Any]:
    """Write predictions, model card and, last, results.json, which marks the task as done."""
    config, task = context.config, context.config.examples.task
    seed_results = [
        result for seed in config.recipe.seeds if (result := outputs.read_seed_result(context.workdir, seed))
    ]
    outputs.write_dev_predictions(context.workdir, context.data, seed_results)
    if test_digests := directory.test_digests(context.data, context.encoded):
        params = jax.tree.map(lambda x: x[None], load_checkpoint(context.workdir / "model").params)
        for name in test_digests:
            logits = predict_split(context, params, name, shutdown_flag)[0]
            outputs.write_test_predictions(
                context.workdir, task, name, context.data.splits[name], context.data, logits
            )
    elif (context.workdir / "submission").exists():
        logger.info(f"{context.workdir}: submission/ is unchanged: there is no test file")
    summary = outputs.summarize_seeds(task, context.data, seed_results) | {"test_digests": test_digests}
    with atomic_write(context.workdir / "model" / "README.md") as partial:
        source = context.source
        name = source_name(user_path(source.path))
        card = model_card.classifier_card(source.checkpoint.model, name, config, summary, source.card)
        partial.write_text(card, encoding="utf-8")
    write_json(context.workdir / "results.json", summary)
    logger.info(f"{context.workdir}: model of seed {summary['model_of_seed']} in {context.workdir / 'model'}")
    return summary
