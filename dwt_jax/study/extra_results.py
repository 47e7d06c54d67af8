"""Results of a study besides its jobs: a bag-of-words baseline, and predictions of masked words."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dwt_jax.config_loader import config_to_dict
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.logs import logger
from dwt_jax.study.sweep import Job, Study, failed_jobs

if TYPE_CHECKING:
    from dwt_jax.finetune.collate import ExampleCache
    from dwt_jax.finetune.config import FinetuneConfig
    from dwt_jax.finetune.datasets import TaskData

BAG_OF_WORDS_NAME, MASKED_WORDS_NAME = "bag_of_words.json", "masked_words.json"


def write_bag_of_words(
    study: Study, tasks: Sequence["FinetuneConfig"], example_cache: "ExampleCache", workdir: Path
) -> None:
    """Write {task: score of logistic regression on bags of words}, from the examples of the fine-tunings.

    Tasks whose labels are numbers have none. A task whose examples have not changed is not repeated.
    """
    if not study.finetuning.bag_of_words:
        return
    from dwt_jax.finetune.bag_of_words import bag_of_words_score

    path = workdir / BAG_OF_WORDS_NAME
    previous = read_json(path) if path.exists() else {}
    results: dict[str, Any] = {}
    for task in tasks:
        data, result = example_cache.read(task.examples), previous.get(task.examples.task)
        if not data.labels:
            continue
        digest = _examples_digest(data)
        if result is None or result["examples_digest"] != digest:
            result = {"score": bag_of_words_score(data), "examples_digest": digest}
        results[task.examples.task] = result
    write_json(path, results)


def _examples_digest(data: "TaskData") -> str:
    """Return the hex SHA-256 of the texts and labels of the training and dev examples."""
    digest = hashlib.sha256()
    for name in ("train", "dev"):
        split = data.splits[name]
        digest.update(json.dumps([split.texts, split.text_pairs, np.asarray(split.labels).tolist()]).encode())
    return digest.hexdigest()


def write_masked_words(study: Study, jobs: Sequence[Job], workdir: Path) -> None:
    """Write masked words of held-out rows, with the predictions of the first run of each selected arm.

    The rows are from the first arm's data. Nothing is done until all these runs are finished or failed, or if
    the file is newer than the runs and has the same arms and number of rows. If an arm's model does not load
    or its vocabulary differs from the first arm's, a warning is logged and the arm has no predictions.
    """
    if not study.masked_words.arms:
        return
    path = workdir / MASKED_WORDS_NAME
    first_runs = {
        name: next(job for job in jobs if job.kind == "train" and job.arm == name)
        for name in study.masked_words.arms
    }
    failed = failed_jobs(jobs)
    first_runs = {name: job for name, job in first_runs.items() if job.name not in failed}
    if not first_runs or not all(job.is_done() for job in first_runs.values()):
        return
    newest = max((job.workdir / "summary.json").stat().st_mtime for job in first_runs.values())
    settings = config_to_dict(study.masked_words)
    if path.exists() and path.stat().st_mtime > newest and read_json(path).get("settings") == settings:
        return
    from dwt_jax.data.data_cache import get_prepared
    from dwt_jax.data.tokenizer import load_vocabulary
    from dwt_jax.eval.masked_words import choose_masked_words, guess_masked_words
    from dwt_jax.runs.load import load_model

    data = get_prepared(next(iter(first_runs.values())).config.data)
    masked_words, vocabulary = (
        choose_masked_words(data, study.masked_words.rows),
        load_vocabulary(data / "tokenizer"),
    )
    guesses: dict[str, Any] = {}
    for name, job in first_runs.items():
        guesses[name] = [[] for _ in masked_words]
        try:
            loaded_model = load_model(str(job.workdir))
        except UserError as error:
            logger.warning(f"study: no predictions of {name}: {error}")
            continue
        if load_vocabulary(loaded_model.tokenizer).tokens != vocabulary.tokens:
            first = next(iter(first_runs))
            logger.warning(f"study: no predictions of {name}: its vocabulary differs from that of {first}")
            continue
        guesses[name] = guess_masked_words(
            loaded_model.params, loaded_model.model, masked_words, data / "tokenizer"
        )
    records = [
        {
            "text": masked_word.text,
            "word": masked_word.word,
            "guesses": {name: [guess[:2] for guess in guesses[name][i]] for name in guesses},
        }
        for i, masked_word in enumerate(masked_words)
    ]
    write_json(path, {"settings": settings, "rows": records})
