"""What the steps of flows do to space."""

from __future__ import annotations

import torch

from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.flow_vae import PotentialFlow
from .base import EvaluationMetric, Row

_EXAMPLES = 64  # whose steps are enough for a share, each of which takes the factors of a matrix


class Folds(EvaluationMetric):
    """The share of steps that fold, of the first 64 sequences: whose map from a frame to the next is not injective.

    Of those that do not fold each is an optimal transport. Chance: 0, for steps that change nothing.
    """

    key = "folds"
    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_state("folding", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("steps", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, folding: torch.Tensor) -> None:
        """Add which steps of sequences fold, `(batch, step)`."""
        self.folding += folding.sum()
        self.steps += folding.numel()
        self.sequences += len(folding)

    def compute(self) -> torch.Tensor:
        """Return the share of all steps."""
        return self.folding / self.steps

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes steps along potentials."""
        return isinstance(model, PotentialFlow)

    def measure(self, model: PotentialFlow, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the steps of the sequences of a batch, as long as there are few."""
        few = batch.select(slice(max(0, _EXAMPLES - int(self.sequences))))
        if len(few.images):
            self.update(model.folds(few))

    def rows(self) -> list[Row]:
        """Return one row."""
        return [Row(self.key, None, "steps that fold", self.compute().item(), 0.0, digits=3)]
