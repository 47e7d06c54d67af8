"""Pre-training objectives, one module each, and the registry that finds them by name.

Importing this package loads neither jax nor any objective.
"""

import importlib
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

if TYPE_CHECKING:
    import jax

    from dwt_jax.config import Config
    from dwt_jax.data.batch import Batch
    from dwt_jax.data.tokenizer import Vocabulary
    from dwt_jax.objectives.targets import PredictionCounts, Targets

OBJECTIVES = {"mlm": "dwt_jax.objectives.mlm", "next_token": "dwt_jax.objectives.next_token"}
"""The name of an objective (`objective` of a model's config) and its module."""

OBJECTIVE_LABELS = {"mlm": "masked-LM", "next_token": "next-token"}
"""What an objective is called in messages: "the masked-LM loss"."""


class Objective(Protocol):
    """The settings of an objective: hashable, since a compiled step depends on them."""

    name: ClassVar[str]  # a key of OBJECTIVES

    def __hash__(self) -> int: ...


class ObjectiveModule(Protocol):
    """The names that the module of an objective defines. Letters of shapes: see `Targets`."""

    def make_objective(self, config: "Config", vocabulary: "Vocabulary") -> Objective:
        """Return the objective of a config."""

    def make_evaluation_objective(self, vocabulary: "Vocabulary") -> Objective:
        """Return the objective of the held-out loss, the same for every config."""

    def abstract_objective(self, config: "Config", vocab_size: int) -> Objective:
        """Return an objective with the right shapes without a tokenizer, for compilation and FLOP counts."""

    def predictions_per_row(self, objective: Objective, length: int) -> int:
        """Return P, the highest number of labels of a row of `length` tokens."""

    def scheduled_predictions(self, config: "Config") -> "PredictionCounts | None":
        """Return the number of labels per row by step; None if it is the same at every step."""

    def make_targets(
        self,
        batch: "Batch",
        keys: "jax.Array",
        objective: Objective,
        num_predictions: "jax.Array | None" = None,
    ) -> "Targets":
        """Return inputs and labels of a batch, drawn with one key per row.

        Where `num_predictions` is given, int [L + 1], a row with n tokens has `num_predictions[n]` labels.
        """


def objective_module(objective: Objective | str) -> ObjectiveModule:
    """Return the module of an objective.

    Args:
        objective: an objective, or its name: `objective` of a model's config.

    Raises:
        KeyError: the name is not registered.
    """
    name = objective if isinstance(objective, str) else objective.name
    return cast(ObjectiveModule, importlib.import_module(OBJECTIVES[name]))
