"""How well models that are not told transformations tell them apart."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from .base import EvaluationMetric, Row, private_generator
from .clustering import accuracy, counts

_DRAWS = 100  # of random labels


class TransformationAccuracy(EvaluationMetric):
    """Share of sequences whose transformation a model infers, under the best one-to-one assignment of its numbers.

    Chance: the same for random numbers, as many as there are transformations; a mean over seeded draws.

    Args:
        transformations: how many there are.

    """

    key = "transformation_accuracy"
    higher_is_better = True

    def __init__(self, transformations: int):
        super().__init__()
        self.transformations = transformations
        for state in ("inferred", "axis"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes several transformations, and models that infer which it is, by a method `inferred`."""
        return hasattr(model, "inferred") and len(source.transformations) > 1

    @classmethod
    def build(
        cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings
    ) -> TransformationAccuracy:
        """Make the metric for the transformations of a source."""
        return cls(len(source.transformations))

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add what the model infers of a batch."""
        self.update(model.inferred(batch), batch.axis)

    def update(self, inferred: Int[Tensor, " batch"], axis: Int[Tensor, " batch"]) -> None:
        """Add the numbers that were inferred, in any numbering from 0, and the true ones."""
        self.inferred.append(inferred)
        self.axis.append(axis)

    def compute(self) -> dict[str, float]:
        """Return "accuracy" and "chance"."""
        inferred, axis = (dim_zero_cat(x).cpu() for x in (self.inferred, self.axis))
        axis, order = axis.sort()  # so that the draws for chance depend on how many there are of each alone
        generator = private_generator(0)
        random = [
            self._accuracy(torch.randint(self.transformations, axis.shape, generator=generator, device="cpu"), axis)
            for _ in range(_DRAWS)
        ]
        return {"accuracy": self._accuracy(inferred[order], axis), "chance": sum(random) / _DRAWS}

    def _accuracy(self, inferred: Tensor, axis: Tensor) -> float:
        labels = max(self.transformations, int(inferred.max()) + 1)
        return accuracy(counts(inferred, axis, labels, self.transformations))

    def rows(self) -> list[Row]:
        """Return one row."""
        return [Row(self.key, None, "accuracy of k", *self.compute().values(), digits=3)]
