"""Fine-tuning on one task, all its seeds, in a work directory that the same command goes on in.

Seeds that are trained side by side are one piece of work: done and written, or done anew. What
they give depends on the config, the model and the data alone, so a run that was killed ends as one
that was not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Config, Model
from dwt_jax.data.tokenizer import vocabulary
from dwt_jax.distributed.shutdown import Stopped, Stopping
from dwt_jax.errors import UserError
from dwt_jax.files import whole_file
from dwt_jax.finetune import collate, metrics, outputs
from dwt_jax.finetune.collate import Encoded, Texts
from dwt_jax.finetune.config import SHORTEST, FineTune, Recipe, of_directory
from dwt_jax.finetune.datasets import Data
from dwt_jax.finetune.outputs import Best, Seed
from dwt_jax.finetune.progress import Progress
from dwt_jax.finetune.step import Spec, beginner, predictor, spec_of, trainer
from dwt_jax.hf import checkpoint, model_card
from dwt_jax.models import bert
from dwt_jax.objectives import schedules
from dwt_jax.remap.gates import settled
from dwt_jax.runs import run_dir as workdirs
from dwt_jax.runs.pretrained import digest
from dwt_jax.train.loop import Failed
from dwt_jax.train.setup import numerics_of

MAY_CHANGE = ("examples.path", "examples.train", "examples.dev", "examples.test")
"""Keys that a resumed run may change: the data is compared by its digest, wherever it lies."""


class Source(NamedTuple):
    """The model that is fine-tuned."""

    path: str
    loaded: workdirs.Loaded
    pad_id: int
    digest: str


@dataclass(frozen=True)
class Run:
    config: FineTune
    workdir: Path
    source: Source
    data: Data
    encoded: dict[str, Encoded]
    spec: Spec

    @property
    def judged(self) -> list[str]:
        """Splits that are scored after every epoch."""
        return [name for name in self.encoded if name.startswith("dev")]


def load_source(path: str, step: int | None = None) -> Source:
    """Raises UserError for what is no model, or one that lacks tokens of its tokenizer."""
    loaded = workdirs.load_model(path, heads=None, step=step)
    params, model = settled(loaded.params, loaded.model)
    words = vocabulary(loaded.tokenizer)
    if len(words) > model.vocab_size:
        raise UserError(
            f"--model: {path} has vocab_size {model.vocab_size}, expected at least its tokenizer's "
            f"{len(words)}"
        )
    return Source(path, loaded._replace(params=params, model=model), words.pad_id, digest(params))


def prepare(config: FineTune, source: Source, workdir: Path, texts: Texts | None = None) -> Run:
    """Everything that can be wrong is found here; the first thing written is the claim.

    texts: what was read before, for other models.
    """
    texts = texts or Texts()
    positions = source.loaded.model.max_length
    if positions < SHORTEST:
        raise UserError(f"--model: {source.path} has {positions} positions, expected at least {SHORTEST}")
    if config.recipe.max_length > positions:
        print(f"{config.examples.task}: {source.path} has {positions} positions, longer examples are cut")
        recipe = dataclasses.replace(config.recipe, max_length=positions)
        config = dataclasses.replace(config, recipe=recipe)
    data = texts.read(config.examples)
    encoded = texts.encode(config.examples, source.loaded.tokenizer, config.recipe.max_length)
    names = [np.array(data.labels), *(np.array(split.ids) for split in data.splits.values())]
    identity = {"model_digest": source.digest, "data_digest": digest([*encoded.values(), *names])}
    kind = workdirs.Kind("finetune.json", of_directory, MAY_CHANGE)
    workdirs.claim(workdir, config, source.loaded.tokenizer, identity, kind)
    spec = spec_of(
        source.loaded.model,
        config.recipe.dropout,
        len(data.labels) or 1,
        not data.labels,
        config.recipe.optimizer,
        numerics_of(Config(precision=config.precision)),
    )
    return Run(config, workdir, source, data, encoded, spec)


def fine_tune(run: Run, stopping: Stopping) -> dict[str, Any]:
    """All seeds that are not done yet. → results.json

    Raises Stopped after a signal, Failed for a loss that is not finite.
    """
    if (run.workdir / "results.json").exists():
        print(f"{run.workdir}: already finished", flush=True)
        return workdirs.read_json(run.workdir / "results.json")
    recipe, together = run.config.recipe, side_by_side(run)
    groups = [recipe.seeds[i : i + together] for i in range(0, len(recipe.seeds), together)]
    left = [group for group in groups if not all(_is_done(run, seed) for seed in group)]
    with Progress(run.config.examples.task, len(left) * _steps(run)) as progress:
        for group in left:
            _train(run, group, stopping, progress)
    return _finish(run, stopping)


def _is_done(run: Run, seed: int) -> bool:
    return outputs.seed_file(run.workdir, seed).exists()


def _steps(run: Run) -> int:
    """Of one seed."""
    recipe = run.config.recipe
    return recipe.epochs * -(-len(run.encoded["train"]) // recipe.batch_size)


def side_by_side(run: Run) -> int:
    """How many seeds are trained at once. On CPU their products would share the cores: one."""
    recipe = run.config.recipe
    if recipe.at_once:
        return recipe.at_once
    if jax.default_backend() == "cpu":
        return 1
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return fitting(memory, run.spec.model, recipe) if memory else len(recipe.seeds)


def fitting(memory: int, model: Model, recipe: Recipe) -> int:
    """How many seeds fit into `memory` bytes, by a rough count on the safe side: parameters, gradient,
    two moments and an update in fp32, and what the backward pass of the longest batch keeps."""
    heads = ("pooler", "classifier")
    size = sum(leaf.size for leaf in jax.tree.leaves(bert.abstract(model, heads)))
    rows, length = recipe.batch_size, recipe.max_length
    tokens = rows * length * (16 * model.hidden_size + 4 * model.intermediate_size)
    scores = 4 * rows * model.num_attention_heads * length**2
    one = 4 * (5 * size + model.num_hidden_layers * (tokens + scores))
    return max(1, min(len(recipe.seeds), int(0.8 * memory / one)))


def _train(run: Run, seeds: Sequence[int], stopping: Stopping, progress: Progress) -> None:
    """All epochs of `seeds`, side by side; then the best model so far, and last their files."""
    recipe, train = run.config.recipe, run.encoded["train"]
    numbers = np.array(seeds, np.uint32)
    state = beginner(run.spec)(run.source.loaded.params, numbers)
    rates = schedules.table(recipe.optimizer.learning_rate, _steps(run))
    take, step = trainer(run.spec), 0
    lengths = train.lengths if recipe.group_by_length else None
    found = [Seed(seed, [], {name: [] for name in run.judged}) for seed in seeds]
    best = Best(run.workdir, recipe.seeds)
    for number in range(recipe.epochs):
        losses = []
        for rows in collate.epoch(len(train), recipe.batch_size, seeds, number, lengths):
            _stop_if_asked(run, stopping)
            batch = collate.gather(train, rows, recipe.lengths(), run.source.pad_id)
            state, loss = take(state, batch, numbers, np.uint32(step), rates[step])
            losses.append(loss)
            step += 1
            progress.advance(loss, int((rows >= 0).sum()))
        logits = {name: predict(run, state["params"], name, stopping) for name in run.judged}
        _judge(run, logits, number, np.mean(jax.device_get(losses), axis=0), found)
        shown = ", ".join(f"{one.scores()[-1]:.4f} (seed {one.seed})" for one in found)
        undefined = sorted({name for one in found for name in one.history[-1].get("undefined", ())})
        warning = f"; counted as 0, since 0/0: {', '.join(undefined)}" if undefined else ""
        progress.say(f"epoch {number + 1}/{recipe.epochs}: dev score {shown}{warning}")
        best.look(found, state["params"])
    if best.params is not None:
        loaded = run.source.loaded
        outputs.write_model(run.workdir, best.params, loaded.model, loaded.kept, run.data)
    for one in found:
        outputs.write_seed(run.workdir, one)


def _stop_if_asked(run: Run, stopping: Stopping) -> None:
    if stopping.is_set():
        raise Stopped(f"{run.workdir}: stopped, seeds that are done are saved; run the same command again")


def _judge(
    run: Run, logits: Mapping[str, np.ndarray], number: int, losses: np.ndarray, found: Sequence[Seed]
) -> None:
    """Score the dev splits: a record in every history. logits: [S, N, labels] by split."""
    for i, one in enumerate(found):
        if not (np.isfinite(losses[i]) and all(np.isfinite(values[i]).all() for values in logits.values())):
            raise Failed(
                f"{run.workdir}: the loss or a prediction of seed {one.seed} is not finite in epoch "
                f"{number + 1}; the learning rate may be too large"
            )
        record: dict[str, Any] = {"epoch": number + 1, "train_loss": float(losses[i]), "dev": {}}
        for name, values in logits.items():
            one.logits[name].append(values[i])
            labels = run.data.splits[name].labels
            assert labels is not None
            chosen = outputs.classes_or_numbers(values[i], run.data.labels)
            record["dev"][name], undefined = metrics.scores(run.data.metrics, chosen, labels)
            if undefined:
                record["undefined"] = undefined
        one.history.append(record)


def predict(run: Run, params: Any, name: str, stopping: Stopping) -> np.ndarray:
    """fp32 [S, N, labels] of the split `name`. params: [S, …]. A batch is read while the next one
    runs, and no more are under way: on CPU they would run at once, each with its memory."""
    encoded, recipe = run.encoded[name], run.config.recipe
    logits = np.zeros((len(jax.tree.leaves(params)[0]), len(encoded), run.spec.labels), np.float32)
    pending: list[tuple[np.ndarray, Any]] = []

    def settle() -> None:
        rows, values = pending.pop(0)
        real = rows >= 0
        logits[:, rows[real]] = np.asarray(values)[:, real]

    for rows in collate.in_order(encoded, recipe.batch_size):
        batch = collate.gather(encoded, rows, recipe.lengths(), run.source.pad_id)
        _stop_if_asked(run, stopping)
        pending.append((rows, predictor(run.spec)(params, batch)))
        if len(pending) > 1:
            settle()
    settle()
    return logits


def _finish(run: Run, stopping: Stopping) -> dict[str, Any]:
    """Predictions, the card, and last results.json: the sign that all is done."""
    config, task = run.config, run.config.examples.task
    found = [one for seed in config.recipe.seeds if (one := outputs.read_seed(run.workdir, seed))]
    outputs.write_dev(run.workdir, run.data, found)
    tests = [name for name in run.encoded if name.startswith("test")]
    if tests:
        params = jax.tree.map(lambda x: x[None], checkpoint.load(run.workdir / "model").params)
        for name in tests:
            logits = predict(run, params, name, stopping)[0]
            outputs.write_test(run.workdir, task, name, run.data.splits[name], run.data, logits)
    summary = outputs.summarise(task, run.data, found)
    with whole_file(run.workdir / "model" / "README.md") as partial:
        name = Path(run.source.path).absolute().name
        partial.write_text(model_card.of_classifier(run.source.loaded.model, name, config, summary))
    workdirs.write_json(run.workdir / "results.json", summary)
    print(f"{run.workdir}: model of seed {summary['model_of_seed']} in {run.workdir / 'model'}", flush=True)
    return summary
