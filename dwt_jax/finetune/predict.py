"""Predict the classes or numbers of texts with a fine-tuned model (`dwt predict`)."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from scipy.special import softmax

from dwt_jax.config import Config, Precision
from dwt_jax.data.hf_tokenizer import LoadedTokenizer, read_tokenizer
from dwt_jax.data.tokenizer import MAX_UNKNOWN_SHARE, Vocabulary, load_vocabulary
from dwt_jax.errors import UserError
from dwt_jax.files import atomic_write, json_text, resolve_output_file, user_path
from dwt_jax.finetune import collate
from dwt_jax.finetune.collate import EncodedExamples
from dwt_jax.finetune.config import Recipe, read_finetune_config
from dwt_jax.finetune.datasets import ExampleSplit, make_split, select_examples
from dwt_jax.finetune.example_files import (
    STDIN,
    FileFormat,
    RowIterator,
    display_name,
    file_format,
    iter_lines,
    read_example_rows,
)
from dwt_jax.finetune.outputs import format_predictions, predictions_from_logits, tsv_lines
from dwt_jax.finetune.step import FinetuneStepConfig, finetune_step_config, jit_predict
from dwt_jax.finetune.tasks import GLUE_TASKS
from dwt_jax.logs import above_bars, logger
from dwt_jax.models import family
from dwt_jax.models.protocol import Params
from dwt_jax.progress import Progress
from dwt_jax.runs.load import load_model
from dwt_jax.runs.pretrained import check_vocab_size
from dwt_jax.train.setup import resolve_precision

DEFAULT_COLUMNS = ("sentence",)
_MIN_BUCKET = 16  # tokens of the shortest padded length; each of the others is twice as long
_WINDOW_TEXTS = 20_000  # encoded at a time

InputFormat = FileFormat | Literal["lines"]


class Classifier(NamedTuple):
    """A model with a classification head."""

    path: str  # as given on the command line
    params: Params
    step_config: FinetuneStepConfig
    tokenizer: LoadedTokenizer
    vocabulary: Vocabulary
    labels: tuple[str, ...]  # names of the classes; () for a regression
    text_columns: tuple[str, ...]  # of the task that it was fine-tuned on; () if unknown


class Texts(NamedTuple):
    """A file of texts, and how to read it."""

    path: Path = STDIN
    kind: InputFormat | None = None  # None: that of the file's name, and lines if that says none
    text_column: str = ""  # empty: that of the task
    text_pair_column: str = ""


# The model


def load_classifier(path: str) -> Classifier:
    """Load a fine-tuned model.

    Args:
        path: a task's directory that `dwt finetune` wrote, or a model directory with a classification head.

    Raises:
        UserError: there is no such model, or its outputs are neither classes nor one number.
    """
    directory = user_path(path).absolute()
    if tasks := sorted(record.parent.name for record in directory.glob("*/finetune.json")):
        raise UserError(
            f"--model: {path} has the fine-tunings {', '.join(tasks)}, expected one: {directory / tasks[0]}"
        )
    if (directory / "finetune.json").exists() and not (directory / "model").exists():
        raise UserError(f"--model: {path} is a fine-tuning without a finished seed, expected its model")
    if (directory / "finetune.json").exists() and not (directory / "results.json").exists():
        logger.warning(f"{path}: not finished; the best model so far is used")
    loaded = load_model(path, heads="all")
    if "classifier" not in loaded.params:
        heads = ", ".join(head for head in family(loaded.model).HEADS if head in loaded.params)
        raise UserError(
            f"--model: {path} has no classification head (it has {heads or 'no head'}), expected a "
            "directory that dwt finetune wrote"
        )
    problem_type = loaded.passthrough.get("problem_type")
    is_regression = problem_type == "regression" or (problem_type is None and len(loaded.labels) == 1)
    if problem_type == "multi_label_classification" or (is_regression and len(loaded.labels) > 1):
        raise UserError(
            f"--model: {path} is a {problem_type} with {len(loaded.labels)} outputs, expected one class or "
            "one number for a text"
        )
    vocabulary = load_vocabulary(loaded.tokenizer)
    check_vocab_size("--model", path, loaded.model, len(vocabulary))
    step_config = finetune_step_config(
        loaded.model,
        0.0,
        len(loaded.labels),
        is_regression,
        Recipe().optimizer,
        resolve_precision(Config(precision=Precision(compute_dtype="float32"))),
    )
    labels = () if is_regression else loaded.labels
    return Classifier(
        path,
        loaded.params,
        step_config,
        read_tokenizer(loaded.tokenizer),
        vocabulary,
        labels,
        _task_columns(directory),
    )


def _task_columns(directory: Path) -> tuple[str, ...]:
    """Return the text columns of the fine-tuning that wrote a model; () for other models."""
    workdir = directory.parent if directory.name == "model" else directory
    if not (workdir / "finetune.json").exists():
        return ()
    examples = read_finetune_config(workdir).examples
    if examples.kind == "files":
        return tuple(filter(None, (examples.text_column, examples.text_pair_column)))
    return GLUE_TASKS[examples.task].text_columns if examples.kind in ("glue", "tfds") else DEFAULT_COLUMNS


# The texts


def read_texts(texts: Texts, task_columns: Sequence[str]) -> ExampleSplit:
    """Read texts or pairs of texts. Every line, and every row of a table, is an example, even an empty one.

    Args:
        texts: the file.
        task_columns: see `Classifier`.

    Raises:
        UserError: for a missing column, and for a line with more or fewer texts than expected.
    """
    defaults = (*task_columns, "", "")[:2]
    columns = (texts.text_column or defaults[0], texts.text_pair_column or defaults[1])
    path = texts.path if texts.path == STDIN else user_path(texts.path)
    kind = texts.kind or file_format(path) or "lines"
    if kind == "lines":
        if texts.text_column:
            raise UserError(
                f"--text-column is {texts.text_column!r}, expected a table with it: {display_name(path)} is "
                "read as lines (set --format to read a table)"
            )
        count = len([*filter(None, columns)]) if task_columns or texts.text_pair_column else 0
        rows, names = _read_lines(path, count)
    else:
        names = tuple(filter(None, (columns[0] or DEFAULT_COLUMNS[0], columns[1])))
        rows = read_example_rows(path, is_test=True, kind=kind)
    split = make_split(rows, names, "", ())
    if not len(split):
        raise UserError(f"{display_name(path)}: no text, expected at least one")
    return split


def _read_lines(path: Path, count: int) -> tuple[RowIterator, tuple[str, ...]]:
    """Return the rows of a file of lines and the names of their columns.

    Args:
        path: the file.
        count: texts of a line, separated by a tab. 0: as many as the first line has.
    """
    lines = [line.split("\t") for line in iter_lines(path)]
    count = count or min(len(lines[0]) if lines else 1, 2)
    names = ("text", "text_pair")[:count]

    def rows() -> RowIterator:
        for number, cells in enumerate(lines, 1):
            if len(cells) != count and cells != [""]:
                raise UserError(
                    f"{display_name(path)}, line {number}: {len(cells)} texts separated by tabs, expected "
                    f"{count} (set --format if the file is a table)"
                )
            yield f"{display_name(path)}, line {number}", dict(zip(names, [*cells, ""], strict=False))

    return rows(), names


# Predictions


def predict_logits(
    step_config: FinetuneStepConfig,
    params: Any,
    encoded: EncodedExamples,
    batch_size: int,
    lengths: Sequence[int],
    pad_id: int,
    on_batch: Callable[[int], None],
) -> np.ndarray:
    """Compute the logits of encoded examples.

    One batch runs while the logits of the previous one are copied to the host. No more are dispatched
    ahead: on CPU they would run concurrently, each with its own memory.

    Args:
        step_config: static config of the step.
        params: leaves [S, …].
        encoded: N examples.
        batch_size: examples of a batch.
        lengths: the lengths in tokens that batches are padded to.
        pad_id: token id of the padding.
        on_batch: called with the number of examples before each batch; may raise.

    Returns:
        fp32 [S, N, labels].
    """
    logits = np.zeros((len(jax.tree.leaves(params)[0]), len(encoded), step_config.labels), np.float32)
    pending: list[tuple[np.ndarray, Any]] = []

    def collect_oldest() -> None:
        rows, values = pending.pop(0)
        valid = rows >= 0
        logits[:, rows[valid]] = np.asarray(values)[:, valid]

    for rows in collate.eval_batch_indices(encoded, batch_size):
        batch = collate.collate_examples(encoded, rows, lengths, pad_id)
        on_batch(int((rows >= 0).sum()))
        pending.append((rows, jit_predict(step_config)(params, batch)))
        if len(pending) > 1:
            collect_oldest()
    collect_oldest()
    return logits


def padded_lengths(max_length: int) -> tuple[int, ...]:
    """Return the lengths that batches of texts are padded to, increasing; the last one is `max_length`."""
    lengths = [_MIN_BUCKET]
    while lengths[-1] < max_length:
        lengths.append(2 * lengths[-1])
    return (*lengths[:-1], max_length)


def predict_texts(
    classifier: Classifier, split: ExampleSplit, batch_size: int = 64, max_length: int = 0
) -> Iterator[np.ndarray]:
    """Yield the logits of the texts in their order, fp32 [n, labels], a part of them at a time.

    Numbers of truncated and empty texts and unknown tokens are logged at the end.

    Args:
        classifier: the model.
        split: the texts.
        batch_size: texts of a batch; does not change the results.
        max_length: maximum tokens of a text, with special tokens; longer texts are cut. 0: the model's limit.

    Raises:
        UserError: `max_length` is invalid, most tokens are unknown, or a prediction is not finite.
    """
    positions = classifier.step_config.model.max_length
    if not 3 <= (max_length or positions) <= positions:
        raise UserError(f"--max-length is {max_length}, expected from 3 to the model's {positions} positions")
    max_length = max_length or positions
    params = jax.device_put(jax.tree.map(lambda x: x[None], classifier.params))
    cut, unknown = 0, np.zeros(2, int)
    with Progress("predict", len(split), "texts") as progress:
        for start in range(0, len(split), _WINDOW_TEXTS):
            part = select_examples(split, np.arange(start, min(start + _WINDOW_TEXTS, len(split))))
            encoded, part_cut = collate.encode_texts(part, classifier.tokenizer, max_length)
            if classifier.step_config.model.objective == "next_token":
                encoded = collate.cut_final_padding(encoded, classifier.step_config.model.pad_token_id)
            cut += part_cut
            unknown += _count_unknown(classifier.vocabulary, encoded.tokens)
            if unknown[0] > MAX_UNKNOWN_SHARE * unknown[1]:
                raise UserError(
                    f"--model: {unknown[0] / unknown[1]:.1%} of the texts' tokens are unknown to the "
                    f"tokenizer of {classifier.path}, expected at most {MAX_UNKNOWN_SHARE:.0%}"
                )
            logits = predict_logits(
                classifier.step_config,
                params,
                encoded,
                min(batch_size, len(part)),
                padded_lengths(max_length),
                classifier.vocabulary.pad_id,
                progress.advance,
            )[0]
            if not np.isfinite(logits).all():
                raise UserError(
                    f"--model: a prediction of {classifier.path} is not finite, expected finite numbers"
                )
            yield logits
    if cut:
        logger.warning(f"{cut:,} of {len(split):,} texts were cut to {max_length} tokens")
    columns = filter(None, (split.texts, split.text_pairs))
    if empty := sum(not all(map(str.strip, example)) for example in zip(*columns, strict=True)):
        logger.warning(f"{empty:,} of {len(split):,} texts are empty; they have predictions as well")


def _count_unknown(vocabulary: Vocabulary, tokens: np.ndarray) -> np.ndarray:
    """Return (number of unknown tokens, number of tokens without the special ones), int [2]."""
    is_unknown = tokens == vocabulary.unk_id
    return np.array([is_unknown.sum(), (is_unknown | ~np.isin(tokens, vocabulary.special_ids)).sum()])


# The command


def predict(
    model: str,
    texts: Texts = Texts(),
    out: Path | None = None,
    *,
    probabilities: bool = False,
    as_json: bool = False,
    batch_size: int = 64,
    max_length: int = 0,
) -> None:
    """Write a prediction for every text, as TSV with a header or as JSON lines.

    Args:
        model: see `load_classifier`.
        texts: see `read_texts`.
        out: file to write. None: standard output.
        probabilities: whether to write the probability of each class as well.
        as_json: whether to write JSON lines.
        batch_size: see `predict_texts`.
        max_length: see `predict_texts`.

    Raises:
        UserError: model, texts or `out` cannot be used.
    """
    target = None if out is None else _resolve_out(out, texts.path)
    classifier = load_classifier(model)
    if probabilities and not classifier.labels:
        raise UserError(f"--probabilities: {model} predicts a number, expected a model of classes")
    split = read_texts(texts, classifier.text_columns)
    format_part = _json_lines if as_json else _tsv_lines
    with ExitStack() as stack:
        stream = sys.stdout
        if target is not None:
            partial = stack.enter_context(atomic_write(target))
            stream = stack.enter_context(open(partial, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="strict")  # names of classes are data, as in a file
        start = 0
        for logits in predict_texts(classifier, split, batch_size, max_length):
            ids = split.ids[start : start + len(logits)]
            with above_bars(stream):
                stream.writelines(format_part(classifier.labels, ids, logits, probabilities, start == 0))
                stream.flush()
            start += len(logits)


def _resolve_out(out: Path, source: Path) -> Path:
    """Return the file to write. Checks in advance that the predictions can be written."""
    path = resolve_output_file(out)
    if source != STDIN and path.exists() and path.samefile(user_path(source)):
        raise UserError(f"--out: {out} is the input file, expected another file")
    return path


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return softmax(logits.astype(np.float64), axis=-1)


def _tsv_lines(
    labels: Sequence[str], ids: Sequence[str], logits: np.ndarray, probabilities: bool, with_header: bool
) -> list[str]:
    columns = [ids, format_predictions(predictions_from_logits(logits, labels), labels)]
    header = ["index", "prediction"]
    if probabilities:
        header += [f"p({label})" for label in labels]
        columns += [[f"{p:.6g}" for p in column] for column in _probabilities(logits).T]
    lines = tsv_lines(header, columns)
    return lines if with_header else lines[1:]


def _json_lines(
    labels: Sequence[str], ids: Sequence[str], logits: np.ndarray, probabilities: bool, _: bool
) -> list[str]:
    predictions = format_predictions(predictions_from_logits(logits, labels), labels)
    records: list[dict[str, Any]] = [
        {"index": index, "prediction": prediction if labels else float(prediction)}
        for index, prediction in zip(ids, predictions, strict=True)
    ]
    if probabilities:
        for record, row in zip(records, _probabilities(logits), strict=True):
            record["probabilities"] = {label: float(f"{p:.6g}") for label, p in zip(labels, row, strict=True)}
    return [json_text(record) + "\n" for record in records]
