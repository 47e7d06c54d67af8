"""What a fine-tuning leaves behind: seeds/, model/, predictions/, submission/ and results.json."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dwt_jax.config import Model
from dwt_jax.errors import UserError
from dwt_jax.files import whole_file
from dwt_jax.finetune.datasets import Data, Split
from dwt_jax.finetune.tasks import SCORE
from dwt_jax.hf import checkpoint


class Seed(NamedTuple):
    """What one seed gave."""

    seed: int
    history: list[dict[str, Any]]  # an epoch each: epoch, train_loss, dev {split: {metric: value, score}}
    logits: dict[str, list[np.ndarray]]  # of the dev splits [N, labels], after every epoch

    def scores(self) -> list[float]:
        """By epoch: the mean of the dev splits' scores (MNLI has two)."""
        return [float(np.mean([split["score"] for split in one["dev"].values()])) for one in self.history]

    def best(self) -> int:
        """The index of the best epoch, the earliest of equals."""
        return int(np.argmax(self.scores()))


def classes_or_numbers(logits: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """[N, labels] → the predictions [N]."""
    return logits.argmax(-1) if labels else logits[:, 0]


# Seeds


def seed_file(workdir: Path, seed: int) -> Path:
    return workdir / "seeds" / f"{seed}.npz"


def write_seed(workdir: Path, one: Seed) -> None:
    """seeds/N.npz: history as JSON, logits [epochs, N, labels] of every dev split."""
    path = seed_file(workdir, one.seed)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial, open(partial, "wb") as file:
        logits: dict[str, Any] = {name: np.stack(values) for name, values in one.logits.items()}
        np.savez(file, history=np.array(json.dumps(one.history, allow_nan=False)), **logits)


def read_seed(workdir: Path, seed: int) -> Seed | None:
    """None if it is not done. Raises UserError for a file that is damaged."""
    path = seed_file(workdir, seed)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            history = json.loads(str(file["history"]))
            return Seed(seed, history, {name: list(file[name]) for name in file.files if name != "history"})
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: {error}, expected what dwt wrote (remove it, and the seed is done again)"
        ) from None


class Best:
    """The parameters of the best epoch of all seeds so far, for model/. Of equals the first of
    `seeds` wins, and of its epochs the earliest: whatever order they are seen in."""

    def __init__(self, workdir: Path, seeds: Sequence[int]):
        self._place = {seed: -i for i, seed in enumerate(seeds)}
        done = [one for seed in seeds if (one := read_seed(workdir, seed))]
        self._key = max((self._key_of(one, one.best()) for one in done), default=(-np.inf, 0, 0))
        self.params: Any = None  # on the host; None: nothing was better than what was done before

    def _key_of(self, one: Seed, epoch: int) -> tuple[float, int, int]:
        return one.scores()[epoch], self._place[one.seed], -epoch

    def look(self, found: Sequence[Seed], params: Any) -> None:
        """After an epoch of the seeds `found`. params: [S, …]."""
        keys = [self._key_of(one, len(one.history) - 1) for one in found]
        if (key := max(keys)) > self._key:
            i, self._key = keys.index(key), key
            self.params = jax.device_get(jax.tree.map(lambda x: x[i], params))


def winner(found: Sequence[Seed]) -> Seed:
    """The seed whose best epoch is in model/."""
    return max(found, key=lambda one: max(one.scores()))


def write_model(workdir: Path, params: Any, model: Model, kept: Mapping[str, Any], data: Data) -> None:
    """model/, without its card: not all seeds are done."""
    kind = "single_label_classification" if data.labels else "regression"
    checkpoint.save(
        params,
        dataclasses.replace(model, tie_word_embeddings=True),
        workdir / "tokenizer",
        workdir / "model",
        labels=data.names or data.labels or ("LABEL_0",),
        kept={**kept, "problem_type": kind},
    )


# Figures


def summarise(task: str, data: Data, found: Sequence[Seed]) -> dict[str, Any]:
    """results.json: the best and the last epoch of every seed, never one without the other."""
    best = [one.history[one.best()]["dev"] for one in found]
    last = [one.history[-1]["dev"] for one in found]
    return {
        "task": task,
        "metrics": list(data.metrics),
        "score": SCORE,
        "best": {**spread([max(one.scores()) for one in found]), "dev": _by_metric(best)},
        "last": {**spread([one.scores()[-1] for one in found]), "dev": _by_metric(last)},
        "seeds": {str(one.seed): {"best_epoch": one.best() + 1, "history": one.history} for one in found},
        "model_of_seed": winner(found).seed,
        "examples": {name: len(split) for name, split in data.splits.items()},
    }


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (null for a single one), and the scores themselves."""
    deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"mean": float(np.mean(scores)), "standard_deviation": deviation, "by_seed": list(scores)}


def _by_metric(found: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """{split: {metric: its mean over seeds}}"""
    return {
        split: {metric: float(np.mean([one[split][metric] for one in found])) for metric in values}
        for split, values in found[0].items()
    }


# Predictions


def write_dev(workdir: Path, data: Data, found: Sequence[Seed]) -> None:
    """predictions/SPLIT-seedN.tsv: index, prediction and label after the seed's best epoch."""
    for one in found:
        for name, logits in one.logits.items():
            split = data.splits[name]
            assert split.labels is not None
            chosen = classes_or_numbers(logits[one.best()], data.labels)
            columns = [split.ids, _shown(chosen, data.labels), _shown(split.labels, data.labels)]
            _write(
                workdir / "predictions" / f"{name}-seed{one.seed}.tsv",
                ("index", "prediction", "label"),
                columns,
            )


def write_test(workdir: Path, task: str, name: str, split: Split, data: Data, logits: np.ndarray) -> None:
    """submission/FILE.tsv, as GLUE's server wants it: in the order of the test file, whose examples TFDS
    has shuffled. Files of one's own keep their order."""
    chosen = classes_or_numbers(logits, data.labels)
    if data.bounds:
        chosen = np.clip(chosen, *data.bounds)
    rows = list(zip(split.ids, _shown(chosen, data.labels, ".3f"), strict=True))
    if name in data.submissions and all(index.isdecimal() for index, _ in rows):
        rows.sort(key=lambda row: int(row[0]))
    file = data.submissions.get(name, f"{task}.tsv")
    _write(workdir / "submission" / file, ("index", "prediction"), list(zip(*rows, strict=True)))


def _shown(values: np.ndarray, labels: Sequence[str], form: str = ".6g") -> list[str]:
    return [labels[int(value)] if labels else format(float(value), form) for value in values]


_DIVIDERS = str.maketrans("\t\n\r", "   ")


def _write(path: Path, header: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    """Tabs and ends of lines within a cell (JSON may hold them) become spaces."""
    path.parent.mkdir(exist_ok=True)
    rows = ([cell.translate(_DIVIDERS) for cell in row] for row in zip(*columns, strict=True))
    lines = ["\t".join(row) + "\n" for row in (header, *rows)]
    with whole_file(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
