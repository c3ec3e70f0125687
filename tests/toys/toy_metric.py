"""A metric of one's own: how much capsules change from frame to frame, of models that do not mean them to."""

import sys

import torch

from tvae.cli import main
from tvae.data import SequenceBatch, SequenceSource
from tvae.metrics import EvaluationMetric, Row, register
from tvae.models import ELBO, TVAE, SequenceModel


@register
class Change(EvaluationMetric):
    """Mean square of the change of capsules, relative to their own; 0 is still. Chance: 2, of independent frames."""

    key = "change-a-frame"

    def __init__(self):
        super().__init__()
        self.add_state("changes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it is about sequences, and models whose capsules need not roll."""
        return source.sequence_length > 1 and not isinstance(model, TVAE)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the capsules of a batch."""
        self.update(elbo.t.double())

    def update(self, t: torch.Tensor) -> None:
        """Add capsules (B, S, C, D)."""
        self.changes += t.diff(dim=1).square().mean() * len(t)
        self.squares += t.square().mean() * len(t)

    def compute(self) -> torch.Tensor:
        """Return the ratio of the means over all sequences."""
        return self.changes / self.squares

    def rows(self) -> list[Row]:
        """Return one row."""
        return [Row(self.key, None, "change a frame", self.compute().item(), chance=2.0, digits=3)]


if __name__ == "__main__":
    sys.exit(main())
