"""Output files of a fine-tuning: seeds/, model/, predictions/, submission/ and results.json."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write
from dwt_jax.finetune.datasets import ExampleSplit, TaskData
from dwt_jax.finetune.tasks import SCORE_DEFINITION
from dwt_jax.hf import checkpoint
from dwt_jax.models.protocol import ModelConfig


class SeedResult(NamedTuple):
    """Metrics and dev logits of one seed."""

    seed: int
    history: list[dict[str, Any]]  # one per epoch: epoch, train_loss, dev {split: {metric: value, score}}
    logits: dict[str, list[np.ndarray]]  # {dev split: one array [N, labels] per epoch}

    def scores(self) -> list[float]:
        """Return the score of each epoch: the mean over the dev splits (MNLI has two)."""
        return [
            float(np.mean([split["score"] for split in record["dev"].values()])) for record in self.history
        ]

    def best_epoch(self) -> int:
        """Return the index of the epoch with the highest score, the earliest in a tie."""
        return int(np.argmax(self.scores()))


def predictions_from_logits(logits: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Convert logits to predictions.

    Args:
        logits: [N, labels].
        labels: the classes; empty for a regression.

    Returns:
        Class indices, or the numbers of a regression, [N].
    """
    return logits.argmax(-1) if labels else logits[:, 0]


# Seeds


def seed_path(workdir: Path, seed: int) -> Path:
    """Return the path of a seed's results; the file exists if the seed is done."""
    return workdir / "seeds" / f"{seed}.npz"


def lost_seed_path(workdir: Path, seed: int) -> Path:
    """Return the path for the results of a seed whose model is lost; the seed is trained again."""
    return workdir / "seeds" / f"{seed}.lost"


def write_seed_result(workdir: Path, result: SeedResult) -> None:
    """Write seeds/SEED.npz: history as JSON, logits [epochs, N, labels] of every dev split."""
    path = seed_path(workdir, result.seed)
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial, open(partial, "wb") as file:
        logits: dict[str, Any] = {name: np.stack(values) for name, values in result.logits.items()}
        np.savez(file, history=np.array(json.dumps(result.history, allow_nan=False)), **logits)
    lost_seed_path(workdir, result.seed).unlink(missing_ok=True)


def read_seed_result(workdir: Path, seed: int) -> SeedResult | None:
    """Read the results of a seed, None if it is not done. Raises UserError for a damaged file."""
    path = seed_path(workdir, seed)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            history = json.loads(str(file["history"]))
            return SeedResult(
                seed, history, {name: list(file[name]) for name in file.files if name != "history"}
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: {error}, expected a file that dwt wrote (remove it to run the seed again)"
        ) from None


class BestModel:
    """Keeps the parameters of the best epoch of all seeds so far.

    In a tie the first of `seeds` wins, and then its earliest epoch, independent of the order of updates.
    The scores of seeds that are already done are included.
    """

    def __init__(self, workdir: Path, seeds: Sequence[int]):
        self._seed_rank = {seed: -i for i, seed in enumerate(seeds)}
        previous = [result for seed in seeds if (result := read_seed_result(workdir, seed))]
        self._best_key = max(
            (self._sort_key(result, result.best_epoch()) for result in previous), default=(-np.inf, 0, 0)
        )
        self.params: Any = None  # on the host; None if no epoch was better than the seeds done before

    def _sort_key(self, result: SeedResult, epoch: int) -> tuple[float, int, int]:
        return result.scores()[epoch], self._seed_rank[result.seed], -epoch

    def update(self, seed_results: Sequence[SeedResult], params: Any) -> None:
        """Take the parameters of a seed if its last epoch is the best so far.

        Args:
            seed_results: the S seeds that were trained, each with its last epoch in the history.
            params: their parameters, leaves [S, …].
        """
        keys = [self._sort_key(result, len(result.history) - 1) for result in seed_results]
        if (key := max(keys)) > self._best_key:
            i, self._best_key = keys.index(key), key
            self.params = jax.device_get(jax.tree.map(lambda x: x[i], params))


def best_seed(seed_results: Sequence[SeedResult]) -> SeedResult:
    """Return the seed whose best epoch is in model/."""
    return max(seed_results, key=lambda result: max(result.scores()))


def write_model(
    workdir: Path, params: Any, model: ModelConfig, passthrough: Mapping[str, Any], data: TaskData
) -> None:
    """Write model/ without its card, which needs the results of all seeds.

    Args:
        workdir: the directory of the fine-tuning.
        params: parameters of one seed.
        model: config of the model that was fine-tuned.
        passthrough: keys of its config.json that dwt does not interpret.
        data: the task's data, for the names of the classes.
    """
    problem_type = "single_label_classification" if data.labels else "regression"
    checkpoint.save_checkpoint(
        params,
        dataclasses.replace(model, tie_word_embeddings=True),
        workdir / "tokenizer",
        workdir / "model",
        labels=data.class_names or data.labels or ("LABEL_0",),
        passthrough={**passthrough, "problem_type": problem_type},
    )


# Summary


def summarize_seeds(task: str, data: TaskData, seed_results: Sequence[SeedResult]) -> dict[str, Any]:
    """Return the content of results.json, with both the best and the last epoch of every seed."""
    best = [result.history[result.best_epoch()]["dev"] for result in seed_results]
    last = [result.history[-1]["dev"] for result in seed_results]
    return {
        "task": task,
        "metrics": list(data.metrics),
        "score": SCORE_DEFINITION,
        "best": {**mean_std([max(result.scores()) for result in seed_results]), "dev": _mean_by_metric(best)},
        "last": {**mean_std([result.scores()[-1] for result in seed_results]), "dev": _mean_by_metric(last)},
        "seeds": {
            str(result.seed): {"best_epoch": result.best_epoch() + 1, "history": result.history}
            for result in seed_results
        },
        "model_of_seed": best_seed(seed_results).seed,
        "examples": {name: len(split) for name, split in data.splits.items()},
    }


def mean_std(scores: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for a single seed) and the scores by seed."""
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "standard_deviation": std, "by_seed": list(scores)}


def _mean_by_metric(dev_records: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return {split: {metric: mean over seeds}}."""
    return {
        split: {
            metric: float(np.mean([record[split][metric] for record in dev_records])) for metric in values
        }
        for split, values in dev_records[0].items()
    }


# Predictions


def write_dev_predictions(workdir: Path, data: TaskData, seed_results: Sequence[SeedResult]) -> None:
    """Write predictions/SPLIT-seedN.tsv: index, prediction and label after each seed's best epoch."""
    for result in seed_results:
        for name, logits in result.logits.items():
            split = data.splits[name]
            assert split.labels is not None
            predictions = predictions_from_logits(logits[result.best_epoch()], data.labels)
            columns = [
                split.ids,
                format_predictions(predictions, data.labels),
                format_predictions(split.labels, data.labels),
            ]
            _write_tsv(
                workdir / "predictions" / f"{name}-seed{result.seed}.tsv",
                ("index", "prediction", "label"),
                columns,
            )


def write_test_predictions(
    workdir: Path, task: str, name: str, split: ExampleSplit, data: TaskData, logits: np.ndarray
) -> None:
    """Write submission/FILE.tsv in the format of GLUE's server.

    GLUE's examples are sorted by index, since TFDS has shuffled the test files. Those of other files
    keep their order.

    Args:
        workdir: the directory of the fine-tuning.
        task: the task's name, which is the file's name outside GLUE.
        name: the name of the split.
        split: its examples.
        data: the task's data.
        logits: [N, labels].
    """
    predictions = predictions_from_logits(logits, data.labels)
    if data.bounds:
        predictions = np.clip(predictions, *data.bounds)
    float_format = ".3f" if name in data.submissions else ".9g"  # GLUE's, or what tells float32 values apart
    rows = list(zip(split.ids, format_predictions(predictions, data.labels, float_format), strict=True))
    if name in data.submissions and all(index.isdecimal() for index, _ in rows):
        rows.sort(key=lambda row: int(row[0]))
    file = data.submissions.get(name, f"{task}.tsv")
    _write_tsv(workdir / "submission" / file, ("index", "prediction"), list(zip(*rows, strict=True)))


def format_predictions(values: np.ndarray, labels: Sequence[str], float_format: str = ".9g") -> list[str]:
    """Return the names of classes, or numbers as text.

    Args:
        values: [N], of `predictions_from_logits`.
        labels: the classes; empty for a regression.
        float_format: of numbers. '.9g' tells all float32 values apart.
    """
    return [labels[int(value)] if labels else format(float(value), float_format) for value in values]


_SEPARATORS_TO_SPACES = str.maketrans("\t\n\r", "   ")


def tsv_lines(header: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a TSV file. Tabs and line breaks in a cell (possible in JSON) become spaces."""
    rows = zip(*columns, strict=True)
    return [
        "\t".join(cell.translate(_SEPARATORS_TO_SPACES) for cell in row) + "\n" for row in (header, *rows)
    ]


def _write_tsv(path: Path, header: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text("".join(tsv_lines(header, columns)), encoding="utf-8")
