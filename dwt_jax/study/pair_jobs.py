"""Jobs that evaluate the checkpoints of a study on minimal pairs."""

from pathlib import Path

from dwt_jax.errors import UserError
from dwt_jax.files import read_intact_json, read_json, user_path, write_json
from dwt_jax.study.sweep import FINAL_STEP, Job, StudyPairs


class PairSets:
    """The sets of minimal pairs of a study: folders, zip archives or `grammar`. Each is read at first use."""

    def __init__(self, pairs: StudyPairs):
        self._pairs = pairs
        self._sources = dict(zip(pairs.names(), pairs.sets, strict=True))
        self._digests: dict[str, str] = {}

    def check(self, job: Job) -> None:
        """Raise UserError if a job on pairs has results of others than those of the study's sets.

        If the job is finished and a set no longer exists, only max_pairs is compared.
        """
        for name in job.tasks if job.kind == "pairs" else ():
            path = job.workdir / name / "config.json"
            if not path.exists():
                continue
            config = read_json(path)
            if job.is_done() and not self._is_present(name):
                expected = {**config, "max_pairs": self._pairs.max_pairs}
            else:
                expected = self._config(name)
            if config != expected:
                raise UserError(
                    f"{path.parent}: has results of other pairs than {self._sources[name]} of the study "
                    "(remove it to run the job again, or give the study another --workdir)"
                )

    def read_all(self) -> None:
        """Raise UserError if a set cannot be read."""
        for name in self._sources:
            self._digest(name)

    def run(self, job: Job, model: Path) -> None:
        """Evaluate a run's checkpoint on each set: write config.json, scores.json and, last, results.json.

        Sets that have a results.json are skipped.

        Args:
            job: has the step of the checkpoint and the directory to write to.
            model: directory of the run, which holds the checkpoint.
        """
        from dwt_jax.eval.evaluate_pairs import evaluate_pairs

        for name in job.tasks:
            directory = job.workdir / name
            if read_intact_json(directory / "results.json") is not None:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "config.json", self._config(name))
            results = evaluate_pairs(
                str(model),
                self._sources[name],
                out=directory / "scores.json",
                max_pairs=self._pairs.max_pairs,
                step=None if job.step == FINAL_STEP else job.step,
            )
            write_json(directory / "results.json", results)

    def _config(self, name: str) -> dict[str, str | int]:
        return {"pairs": self._digest(name), "max_pairs": self._pairs.max_pairs}

    def _is_present(self, name: str) -> bool:
        from dwt_jax.eval.evaluate_pairs import GRAMMAR

        return self._sources[name] == GRAMMAR or user_path(self._sources[name]).exists()

    def _digest(self, name: str) -> str:
        from dwt_jax.eval.evaluate_pairs import read_paradigms
        from dwt_jax.eval.minimal_pairs import pairs_digest

        if name not in self._digests:
            try:
                paradigms = read_paradigms(self._sources[name], self._pairs.max_pairs)
            except UserError as error:
                raise UserError(f"pairs.sets: {str(error).removeprefix('--pairs: ')}") from None
            self._digests[name] = pairs_digest(paradigms)
        return self._digests[name]
