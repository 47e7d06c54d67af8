"""What a study computes once its jobs are done: a floor for the scores, and guesses of masked words."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dwt_jax.config_loader import config_to_dict
from dwt_jax.errors import UserError
from dwt_jax.files import read_json, write_json
from dwt_jax.study.sweep import Job, Study

if TYPE_CHECKING:
    from dwt_jax.finetune.collate import ExampleCache
    from dwt_jax.finetune.config import FinetuneConfig

BAG_OF_WORDS_NAME, MASKED_WORDS_NAME = "bag_of_words.json", "masked_words.json"


def write_bag_of_words(
    study: Study, tasks: Sequence["FinetuneConfig"], example_cache: "ExampleCache", workdir: Path
) -> None:
    """Write {task: score of logistic regression on bags of words}, from the examples of the fine-tunings.

    A task whose examples have not changed is not repeated.
    """
    if not study.finetuning.bag_of_words:
        return
    from dwt_jax.finetune.bag_of_words import bag_of_words_score

    path = workdir / BAG_OF_WORDS_NAME
    previous = read_json(path) if path.exists() else {}
    results: dict[str, Any] = {}
    for task in tasks:
        examples, result = config_to_dict(task.examples), previous.get(task.examples.task)
        if result is None or result["examples"] != examples:
            score = bag_of_words_score(example_cache.read(task.examples))
            result = {"score": score, "examples": examples}
        results[task.examples.task] = result
    write_json(path, results)


def write_masked_words(study: Study, jobs: Sequence[Job], workdir: Path) -> None:
    """Write masked words of held-out rows and the guesses of each arm of `study.masked_words`.

    It is done as soon as the first runs of these arms are finished, and not repeated until one is run again.

    Raises:
        UserError: for arms of different vocabularies.
    """
    if not study.masked_words.arms:
        return
    path = workdir / MASKED_WORDS_NAME
    first_runs = {
        name: next(job for job in jobs if job.kind == "train" and job.arm == name)
        for name in study.masked_words.arms
    }
    if not all(job.is_done() for job in first_runs.values()):
        return
    last_run = max((job.workdir / "summary.json").stat().st_mtime for job in first_runs.values())
    if path.exists() and path.stat().st_mtime > last_run:
        return
    from dwt_jax.data.data_cache import get_prepared
    from dwt_jax.data.tokenizer import load_vocabulary
    from dwt_jax.eval.masked_words import choose_masked_words, guess_masked_words
    from dwt_jax.runs.load import load_model

    data = get_prepared(first_runs[study.masked_words.arms[0]].config.data)
    masked_words, vocabulary = (
        choose_masked_words(data, study.masked_words.rows),
        load_vocabulary(data / "tokenizer"),
    )
    if not masked_words:
        return
    guesses = {}
    for name, job in first_runs.items():
        loaded_model = load_model(str(job.workdir))
        if load_vocabulary(loaded_model.tokenizer).tokens != vocabulary.tokens:
            raise UserError(
                f"masked_words.arms has {name!r} with another vocabulary than "
                f"{study.masked_words.arms[0]!r}, expected the same"
            )
        guesses[name] = guess_masked_words(loaded_model.params, loaded_model.model, masked_words, vocabulary)
    records = [
        {
            "text": masked_word.text,
            "word": masked_word.word,
            "guesses": {name: guesses[name][i] for name in guesses},
        }
        for i, masked_word in enumerate(masked_words)
    ]
    write_json(path, {"rows": records})
