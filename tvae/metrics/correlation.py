"""What latent variables have to do with each other, and how many of them say anything: of every model alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.layers import Capsules
from .base import EvaluationMetric, Row

ACTIVE = 0.01  # variance over frames of a posterior mean, above which its variable is active (Burda et al. 2016)


class TotalCorrelation(EvaluationMetric):
    """Total correlation of a Gaussian with the correlations R of sampled capsules over all frames, `-½ log det R`.

    0 for uncorrelated variables; what is not Gaussian about them is not seen. A variable that never changes has no
    part in it. NaN where there are no more frames than variables. Chance: its expectation for as many frames of iid
    Gaussian variables, which is above 0, for their correlations are estimates.

    Args:
        size: number of variables of a frame.

    """

    key = "total_correlation"
    higher_is_better = False

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        for name, shape in (("count", ()), ("sums", (size,)), ("products", (size, size))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, t: Capsules) -> None:
        """Add the frames of a batch of capsules."""
        x = t.flatten(0, 1).flatten(1).double()
        self.count += len(x)
        self.sums += x.sum(0)
        self.products += x.T @ x

    def compute(self) -> Tensor:
        """Return the total correlation in nats."""
        correlation = self._correlation()
        if not self._enough(len(correlation)):
            return torch.tensor(math.nan, dtype=torch.float64)
        return -torch.linalg.slogdet(correlation)[1] / 2

    def chance(self) -> float:
        """Return the expected value for independent variables: of the determinant of a Wishart matrix."""
        size = len(self._correlation())
        if not self._enough(size):
            return math.nan
        freedom = self.count.cpu() - 1
        each = (freedom - torch.arange(size, dtype=torch.float64, device="cpu")) / 2
        return (torch.digamma(freedom / 2) - torch.digamma(each)).sum().item() / 2

    def _correlation(self) -> Tensor:
        """Return the correlations of all variables that vary by more than the rounding errors of their moments."""
        mean = self.sums / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        rounding = 4 * torch.finfo(torch.float64).eps * self.products.diagonal() / self.count
        varies = covariance.diagonal() > rounding
        covariance = covariance[varies][:, varies]
        scale = covariance.diagonal().sqrt()
        return covariance / scale / scale[:, None]

    def _enough(self, variables: int) -> bool:
        return self.count.item() > variables + 1

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> TotalCorrelation:
        """Make the metric for the capsules of a model."""
        return cls(math.prod(model.capsule_shape))

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the capsules of a batch."""
        self.update(elbo.t)

    def rows(self) -> list[Row]:
        """Return one row."""
        value, chance = self.compute().item(), self.chance()
        note = "" if math.isfinite(value) else f"of {self.count.item():.0f} frames, with {self.size} variables"
        return [Row(self.key, None, "Gaussian total correlation", value, chance, "nats", note=note)]


class ActiveUnits(EvaluationMetric):
    """Number of latent variables `z` whose posterior mean varies over all frames by more than `ACTIVE`.

    Chance: 0, of a posterior that knows nothing of the frame.

    Args:
        size: number of latent variables of a frame.

    """

    key = "active_units"
    higher_is_better = True

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        for name, shape in (("count", ()), ("sums", (2, size))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, means: Capsules) -> None:
        """Add the posterior means of a batch."""
        x = means.flatten(0, 1).flatten(1).double()
        self.count += len(x)
        self.sums += torch.stack((x.sum(0), x.square().sum(0)))

    def compute(self) -> Tensor:
        """Return the number."""
        mean, square = self.sums / self.count
        return (square - mean.square() > ACTIVE).sum()

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> ActiveUnits:
        """Make the metric for the latent variables of a model."""
        return cls(math.prod(model.capsule_shape))

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the posterior means of a batch: of all frames that the model encodes."""
        self.update(model.posterior(batch.images)[0].mean)

    def rows(self) -> list[Row]:
        """Return one row."""
        return [Row(self.key, None, f"active units of {self.size}", self.compute().item(), 0.0, digits=0)]
