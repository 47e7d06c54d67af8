"""Accuracy on minimal pairs by paradigm, by term and overall, and the file of the scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dwt_jax.errors import UserError
from dwt_jax.eval.minimal_pairs import Paradigm
from dwt_jax.files import atomic_write, json_text, read_json_object
from dwt_jax.text_format import format_float, format_table

REPLICATES = 10_000
BOOTSTRAP_SEED = 0


class PairScores(NamedTuple):
    """Scores of the P pairs of a paradigm, float64 [P] each."""

    good: np.ndarray
    bad: np.ndarray

    @property
    def accuracy(self) -> float:
        """Percentage of pairs whose acceptable sentence has the higher score. A tie counts ½."""
        return float(100 * np.mean((self.good > self.bad) + 0.5 * (self.good == self.bad)))


def summarize_pairs(paradigms: Sequence[Paradigm], scores: Mapping[str, PairScores]) -> dict[str, Any]:
    """Compute accuracies in percent. Those of terms and the overall one are means over paradigms.

    Args:
        paradigms: the scored paradigms.
        scores: by the name of the paradigm.

    Returns:
        JSON: `accuracy` with its `interval` (95 %, None for a single paradigm) and the number of `paradigms`
        and `pairs`; the same for each of `by_term`; term, accuracy and pairs for each of `by_paradigm`.
    """
    by_paradigm = {
        x.name: {"term": x.term, "accuracy": scores[x.name].accuracy, "pairs": len(x.pairs)}
        for x in sorted(paradigms, key=lambda x: (x.term, x.name))
    }

    def mean_over(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        accuracies = np.array([row["accuracy"] for row in rows])
        return {
            "accuracy": float(accuracies.mean()),
            "interval": bootstrap_interval(accuracies),
            "paradigms": len(rows),
            "pairs": sum(row["pairs"] for row in rows),
        }

    rows = [*by_paradigm.values()]
    terms = dict.fromkeys(row["term"] for row in rows)
    by_term = {term: mean_over([row for row in rows if row["term"] == term]) for term in terms}
    return {**mean_over(rows), "by_term": by_term, "by_paradigm": by_paradigm}


def bootstrap_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Compute the 95 % percentile bootstrap interval of the mean of values [n]; None for a single one."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(values), (REPLICATES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def format_pair_results(results: Mapping[str, Any]) -> str:
    """Format the result of `summarize_pairs` as a table: all, then each term with its paradigms."""

    def cells(name: str, row: Mapping[str, Any]) -> list[str]:
        interval = row.get("interval")
        ends = "" if interval is None else " to ".join(format_float(x, 1) for x in interval)
        return [name, format_float(row["accuracy"], 1), ends, f"{row['pairs']:,}"]

    table = [["", "accuracy, %", "95 % interval", "pairs"], cells("all (mean of paradigms)", results)]
    for term, term_row in results["by_term"].items():
        table.append(cells(term, term_row))
        table += [cells(f"  {x}", row) for x, row in results["by_paradigm"].items() if row["term"] == term]
    return "\n".join(format_table(table))


class ScoreFile:
    """The scores of complete paradigms, in a JSON file that is replaced as a whole after each of them.

    Attributes:
        scores: by the name of the paradigm.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], paradigms: Sequence[Paradigm]) -> None:
        """Read the scores of an interrupted evaluation, or write a file without scores.

        Args:
            path: None: there is no file.
            identity: everything that the scores depend on, as JSON.
            paradigms: the paradigms to score.

        Raises:
            UserError: the file has another identity or cannot be read. The file is not changed.
        """
        self._path, self._identity, self.scores = path, dict(identity), dict[str, PairScores]()
        if path is None:
            return
        if path.is_dir():
            raise UserError(f"--out: {path} is a directory, expected a file to write scores to")
        if path.exists():
            stored = read_json_object(path, "the scores of an earlier dwt evaluate --pairs, or a new file")
            self._check_identity(stored.get("identity"))
            self.scores = _parse_scores(path, stored.get("scores"), paradigms)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write()  # so that a path that cannot be written fails before the work

    def add(self, name: str, scores: PairScores) -> None:
        """Add the scores of a paradigm."""
        self.scores[name] = scores
        self._write()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Add the results of the complete evaluation."""
        self._write(results)

    def _check_identity(self, stored: Any) -> None:
        if not isinstance(stored, dict):
            raise UserError(f"--out: {self._path} has no identity, expected scores of dwt evaluate --pairs")
        for key, value in self._identity.items():
            if stored.get(key) != value:
                raise UserError(
                    f"--out: {self._path} has scores with {key} {stored.get(key)!r}, expected {value!r} "
                    "or a new file"
                )

    def _write(self, results: Mapping[str, Any] | None = None) -> None:
        if self._path is None:
            return
        scores = {name: {"good": [*x.good], "bad": [*x.bad]} for name, x in self.scores.items()}
        content = {"identity": self._identity, "results": results, "scores": scores}
        with atomic_write(self._path) as partial:
            partial.write_text(json_text(content) + "\n", encoding="utf-8")


def _parse_scores(path: Path, stored: Any, paradigms: Sequence[Paradigm]) -> dict[str, PairScores]:
    """Return the stored scores of paradigms, in the order of the file."""
    if not isinstance(stored, dict):
        raise UserError(f"--out: {path} has no scores, expected those of dwt evaluate --pairs")
    num_pairs = {paradigm.name: len(paradigm.pairs) for paradigm in paradigms}
    scores = {}
    for name, row in stored.items():
        try:
            scores[name] = PairScores(*(np.array(row[key], np.float64) for key in PairScores._fields))
            valid = all(x.shape == (num_pairs[name],) and np.isfinite(x).all() for x in scores[name])
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise UserError(
                f"--out: {path}: scores.{name} is damaged, expected two lists of numbers; remove it"
            )
    return scores
