"""Fine-tuning on one task, all its seeds: a work directory that the same command goes on in.

A seed that is done is written and never repeated; one that is not starts anew, and gives the
same, since nothing depends on what ran beside it.
"""

import dataclasses
import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dwt_jax.convert import card, huggingface
from dwt_jax.data.tokenizer import vocabulary
from dwt_jax.distill import schedules
from dwt_jax.errors import UserError
from dwt_jax.files import whole_file
from dwt_jax.finetune import batches, metrics
from dwt_jax.finetune.batches import Batch, Encoded
from dwt_jax.finetune.config import FineTune
from dwt_jax.finetune.examples import Data, read
from dwt_jax.finetune.progress import Progress
from dwt_jax.finetune.step import Spec, begin, predictor, trainer
from dwt_jax.model.products import Numerics
from dwt_jax.train import workdir as workdirs
from dwt_jax.train.signals import Stopped, Stopping


@dataclass(frozen=True)
class Run:
    config: FineTune
    workdir: Path
    loaded: workdirs.Loaded
    data: Data
    encoded: dict[str, Encoded]
    pad_id: int
    spec: Spec


class Seed(NamedTuple):
    """What one seed gave."""

    seed: int
    history: list[dict[str, Any]]  # an epoch each: epoch, train_loss, and {split: {metric: value, score}}
    logits: dict[str, list[np.ndarray]]  # of the dev and test splits, after every epoch

    def scores(self) -> list[float]:
        """By epoch: the mean of the dev splits' scores (MNLI has two)."""
        return [float(np.mean([s["score"] for s in e["dev"].values()])) for e in self.history]

    def best(self) -> int:
        """The index of the best epoch, the earliest of equals."""
        return int(np.argmax(self.scores()))


def finetune(config: FineTune, model: str, workdir: Path, stopping: Stopping) -> dict[str, Any]:
    """Fine-tune the model in `model` in `workdir`, or go on there. → results.json

    Raises UserError for a config, data and model that do not go together; Stopped after a signal.
    """
    with workdirs.locked(workdir):
        run = prepare(config, model, workdir)
        if (workdir / "results.json").exists():
            print(f"{workdir}: already finished", flush=True)
            return workdirs.read_json(workdir / "results.json")
        stopping.poll()
        seeds, together = config.recipe.seeds, side_by_side(config)
        for start in range(0, len(seeds), together):
            group = [s for s in seeds[start : start + together] if not _seed_file(workdir, s).exists()]
            if group:
                _train(run, group, stopping)
        return _finish(run)


def prepare(config: FineTune, model: str, workdir: Path) -> Run:
    """Everything that can be wrong is found here."""
    loaded = workdirs.load_model(model, heads=None)
    if config.recipe.max_length > loaded.model.max_length:
        raise UserError(
            f"config: recipe.max_length is {config.recipe.max_length}, expected at most the model's "
            f"{loaded.model.max_length} positions"
        )
    words = vocabulary(loaded.tokenizer)
    if len(words) > loaded.model.vocab_size:
        raise UserError(
            f"--model: {model} has vocab_size {loaded.model.vocab_size}, expected at least its tokenizer's "
            f"{len(words)}"
        )
    data = read(config.examples)
    encoded = {
        name: batches.encode(split, loaded.tokenizer, config.recipe.max_length)
        for name, split in data.splits.items()
    }
    identity = {"model_digest": _digest(loaded.params), "data_digest": _digest([*encoded.values()])}
    workdirs.claim(workdir, config, loaded.tokenizer, identity)
    rate = config.recipe.dropout
    sizes = dataclasses.replace(loaded.model, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
    compute = config.precision.compute
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    spec = Spec(
        model=sizes,
        labels=len(data.labels) or 1,
        regression=not data.labels,
        optimizer=config.recipe.optimizer,
        numerics=Numerics(compute=jnp.dtype(compute)),
    )
    return Run(config, workdir, loaded, data, encoded, words.pad_id, spec)


def side_by_side(config: FineTune) -> int:
    """How many seeds are trained at once: on CPU their products would share one core."""
    return config.recipe.at_once or (1 if jax.default_backend() == "cpu" else len(config.recipe.seeds))


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _train(run: Run, seeds: Sequence[int], stopping: Stopping) -> None:
    """All epochs of `seeds`, side by side; then their files, and the best model so far."""
    recipe, train = run.config.recipe, run.encoded["train"]
    place = _placement(len(seeds))
    numbers = jax.device_put(np.array(seeds, np.uint32), place)
    state = jax.jit(functools.partial(begin, run.spec))(run.loaded.params, numbers)
    steps = recipe.epochs * -(-len(train.labels) // recipe.batch_size)
    rates = schedules.table(recipe.optimizer.learning_rate, steps)
    take, step = trainer(run.spec), 0
    found = [Seed(seed, [], {name: [] for name in _judged(run)}) for seed in seeds]
    best = _Best(run)
    with Progress(f"{run.config.examples.task} seed {'+'.join(map(str, seeds))}", steps) as progress:
        for number in range(recipe.epochs):
            losses = []
            for rows in batches.epoch(len(train.labels), recipe.batch_size, seeds, number):
                if stopping.is_set():
                    raise Stopped(
                        f"{run.workdir}: stopped, finished seeds are saved; run the same command again"
                    )
                batch = batches.gather(train, rows, recipe.buckets, run.pad_id)
                state, loss = take(state, jax.device_put(batch, place), numbers, np.uint32(step), rates[step])
                losses.append(loss)
                step += 1
                progress.advance(loss, int(batch.segments.sum()))
            _judge(run, state["params"], number, np.mean(jax.device_get(losses), axis=0), found)
            progress.say(f"epoch {number + 1}: " + ", ".join(f"{one.scores()[-1]:.4f}" for one in found))
            best.look(found, state["params"])
    best.write()
    for one in found:
        _write_seed(run.workdir, one)


def _placement(seeds: int) -> Any:
    """Seeds over the devices where they divide, else all on the first."""
    devices = jax.local_devices()
    if len(devices) > 1 and seeds % len(devices) == 0:
        mesh = jax.sharding.Mesh(np.array(devices), ("seeds",))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("seeds"))
    return devices[0]


def _judged(run: Run) -> list[str]:
    return [name for name in run.encoded if name != "train"]


def _judge(run: Run, params: Any, number: int, losses: np.ndarray, found: Sequence[Seed]) -> None:
    """Predict all splits but the training one, and score those that have labels."""
    logits = {name: predict(run, params, run.encoded[name]) for name in _judged(run)}
    for i, one in enumerate(found):
        record: dict[str, Any] = {"epoch": number + 1, "train_loss": float(losses[i]), "dev": {}}
        for name, values in logits.items():
            one.logits[name].append(values[i])
            labels = run.data.splits[name].labels
            if labels is not None:
                chosen = predictions(values[i], run.spec.regression)
                record["dev"][name] = metrics.mean_score(run.data.metrics, chosen, labels)
        one.history.append(record)


def predict(run: Run, params: Any, encoded: Encoded) -> np.ndarray:
    """fp32 [S, N, labels]."""
    parts, recipe = [], run.config.recipe
    for rows in batches.in_order(encoded, 2 * recipe.batch_size):
        batch: Batch = batches.gather(encoded, rows, recipe.buckets, run.pad_id)
        parts.append((rows, predictor(run.spec)(params, batch)))
    logits = np.zeros((len(jax.tree.leaves(params)[0]), len(encoded.labels), run.spec.labels), np.float32)
    for rows, values in parts:
        real = rows >= 0
        logits[:, rows[real]] = np.asarray(values)[:, real]
    return logits


def predictions(logits: np.ndarray, regression: bool) -> np.ndarray:
    """[N, labels] → classes or numbers [N]."""
    return logits[:, 0] if regression else logits.argmax(-1)


class _Best:
    """The parameters of the best epoch of all seeds so far, for `model/`."""

    def __init__(self, run: Run):
        self._run = run
        done = [one for seed in run.config.recipe.seeds if (one := _read_seed(run.workdir, seed))]
        self._score = max((max(one.scores()) for one in done), default=-np.inf)
        self._params: Any = None

    def look(self, found: Sequence[Seed], params: Any) -> None:
        scores = [one.scores()[-1] for one in found]
        i = int(np.argmax(scores))
        if scores[i] > self._score:
            self._score = scores[i]
            self._params = jax.device_get(jax.tree.map(lambda x: x[i], params))

    def write(self) -> None:
        if self._params is None:
            return
        run, regression = self._run, self._run.spec.regression
        kind = "regression" if regression else "single_label_classification"
        huggingface.save(
            self._params,
            dataclasses.replace(run.loaded.model, tie_word_embeddings=True),
            run.workdir / "tokenizer",
            run.workdir / "model",
            labels=run.data.labels or ("LABEL_0",),
            kept={**run.loaded.kept, "problem_type": kind},
            card=card.of_classifier(run.loaded.model, run.config, self._score, run.data),
        )


# Files


def _seed_file(workdir: Path, seed: int) -> Path:
    return workdir / "seeds" / f"{seed}.npz"


def _write_seed(workdir: Path, one: Seed) -> None:
    """seeds/N.npz: history as JSON, logits [epochs, N, labels] of every split."""
    path = _seed_file(workdir, one.seed)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial, open(partial, "wb") as file:
        logits: dict[str, Any] = {name: np.stack(values) for name, values in one.logits.items()}
        np.savez(file, history=np.array(json.dumps(one.history)), **logits)


def _read_seed(workdir: Path, seed: int) -> Seed | None:
    path = _seed_file(workdir, seed)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            history = json.loads(str(file["history"]))
            return Seed(seed, history, {name: list(file[name]) for name in file.files if name != "history"})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: {error}, expected what dwt wrote (remove it, and the seed is done again)"
        ) from None


def _finish(run: Run) -> dict[str, Any]:
    """Write predictions and results.json: the sign that all seeds are done."""
    found = [one for seed in run.config.recipe.seeds if (one := _read_seed(run.workdir, seed))]
    winner = max(found, key=lambda one: max(one.scores()))
    for name in _judged(run):
        tested = run.data.splits[name].labels is None
        for one in [winner] if tested else found:
            place = "submission" if tested else "predictions"
            file = run.data.submissions.get(name, f"{name}.tsv") if tested else f"{name}-seed{one.seed}.tsv"
            _write_predictions(run, name, one.logits[name][one.best()], run.workdir / place / file)
    results = {
        "task": run.config.examples.task,
        "metrics": list(run.data.metrics),
        "best": _spread([max(one.scores()) for one in found]),
        "last": _spread([one.scores()[-1] for one in found]),
        "seeds": {str(one.seed): {"best_epoch": one.best() + 1, "history": one.history} for one in found},
        "examples": {name: len(split) for name, split in run.data.splits.items()},
        "model_of_seed": winner.seed,
        "written": time.strftime("%Y-%m-%d"),
    }
    workdirs.write_json(run.workdir / "results.json", results)
    return results


def _spread(scores: Sequence[float]) -> dict[str, Any]:
    deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "standard_deviation": deviation, "by_seed": list(scores)}


def _write_predictions(run: Run, name: str, logits: np.ndarray, path: Path) -> None:
    """GLUE's format: index, tab, prediction as the task writes its labels."""
    chosen, labels = predictions(logits, run.spec.regression), run.data.labels
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial:
        shown = [labels[int(value)] if labels else f"{np.clip(value, *_range(run)):.3f}" for value in chosen]
        lines = [f"{i}\t{value}\n" for i, value in zip(run.data.splits[name].ids, shown, strict=True)]
        partial.write_text("index\tprediction\n" + "".join(lines), encoding="utf-8")


def _range(run: Run) -> tuple[float, float]:
    """Of the training labels: GLUE refuses numbers outside of STS-B's 0 to 5."""
    labels = run.encoded["train"].labels
    return float(labels.min()), float(labels.max())
