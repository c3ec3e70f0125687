"""What latent variables have to do with each other, and how many of them say anything: of every model alike."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.layers import Capsules
from .base import EvaluationMetric, Row
from .equivariance import scale_of

ACTIVE = 0.01  # variance over frames of a posterior mean, above which its variable is active (Burda et al. 2016)


class TotalCorrelation(EvaluationMetric):
    """Total correlation of a Gaussian with the correlations R of sampled capsules over all frames, `-½ log det R`.

    0 for uncorrelated variables; what is not Gaussian about them is not seen. A variable that never changes has no
    part in it. NaN where there is none; `reason` says why. Chance: its expectation for as many independent draws of
    iid Gaussian variables, which is above 0, for their correlations are estimates.

    All samples are kept, a tenth of the memory that their images take: a variable that lies far from 0, or at another
    scale than others, is measured as well as any.

    Args:
        shared: the frames of a sequence share their latent variables, of which there are then as many independent
            draws as there are sequences, and not as there are frames.

    """

    key = "total_correlation"
    higher_is_better = False

    def __init__(self, shared: bool = False):
        super().__init__()
        self.shared = shared
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, t: Capsules) -> None:
        """Add the frames of a batch of capsules."""
        self.samples.append(t.flatten(0, 1).flatten(1))
        self.sequences += len(t)

    def compute(self) -> Tensor:
        """Return the total correlation in nats; NaN where there is none."""
        return self._found()[0]

    def reason(self) -> str:
        """Say why there is no total correlation; nothing where there is one."""
        with self._all_processes():
            return self._found()[1]

    def chance(self) -> float:
        """Return the expected value for independent variables: of the determinant of a Wishart matrix."""
        with self._all_processes():
            x, freedom = dim_zero_cat(self.samples), self._draws() - 1
            size = int(_varies(x).sum())
        if freedom < size:
            return math.nan
        each = (freedom - torch.arange(size, dtype=torch.float64, device="cpu")) / 2
        return (torch.digamma(torch.full_like(each, freedom / 2)) - torch.digamma(each)).sum().item() / 2

    def _found(self) -> tuple[Tensor, str]:
        """Return the total correlation, or NaN and why there is none."""
        x = dim_zero_cat(self.samples).double()
        nothing, draws = x.new_tensor(math.nan), self._draws()
        if not x.isfinite().all():
            return nothing, "capsules are not finite"
        varies = _varies(x)
        if draws <= varies.sum():
            return nothing, f"of {draws:,} {'sequences' if self.shared else 'frames'}, with {x.shape[1]:,} variables"
        x = x[:, varies].T
        x = x / scale_of(x)
        x = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=0)
        eigenvalues = torch.linalg.eigvalsh(x @ x.T)
        # Of sums of unit vectors' products, whose errors grow with the root of their number, in a matrix of that size.
        if len(x) and eigenvalues[0] <= len(x) * math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps:
            return nothing, "variables are linear functions of others"
        return eigenvalues.log().neg().sum() / 2, ""

    def _draws(self) -> int:
        """Count the independent ones."""
        return int(self.sequences) if self.shared else len(dim_zero_cat(self.samples))

    def _all_processes(self) -> AbstractContextManager:
        """See meanwhile the samples of all processes, as `compute` does."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn)

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> TotalCorrelation:
        """Make the metric for the capsules of a model."""
        return cls(model.shares_latents)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the capsules of a batch."""
        self.update(elbo.t)

    def rows(self) -> list[Row]:
        """Return one row."""
        value = self.compute().item()
        note = self.reason() if math.isnan(value) else ""
        return [Row(self.key, None, "Gaussian total correlation", value, self.chance(), "nats", note=note)]


def _varies(x: Float[Tensor, "frame variable"]) -> Bool[Tensor, " variable"]:
    """Say which variables ever change."""
    return (x != x[:1]).any(0)


class ActiveUnits(EvaluationMetric):
    """Number of latent variables whose posterior mean has a variance over all frames of more than `ACTIVE`.

    Those of `u` count as those of `z` do. NaN where a mean is not finite. Chance: 0, of a posterior that knows nothing
    of the frame.
    """

    key = "active_units"
    higher_is_better = True

    def __init__(self):
        super().__init__()
        self.add_state("moments", [], dist_reduce_fx="cat")

    def update(self, *means: Capsules) -> None:
        """Add the posterior means of a batch: a tensor for each kind of latent variables."""
        moments = []
        for x in means:
            x = x.flatten(0, 1).flatten(1).double()
            moments.append(torch.stack((torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0))))
        self.moments.append(torch.cat(moments, 1)[None])

    def compute(self) -> Tensor:
        """Return the number; NaN where means are not finite."""
        count, total, squares = dim_zero_cat(self.moments).sum(0)
        active = (squares / count - (total / count).square() > ACTIVE).sum().double()
        return torch.where(squares.isfinite().all(), active, math.nan)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the posterior means of a batch: of all frames that the model encodes."""
        self.update(*(q.mean for q in model.posterior(batch.images)))

    def rows(self) -> list[Row]:
        """Return one row."""
        value, size = self.compute().item(), self.moments[0].shape[-1]
        note = "posterior means are not finite" if math.isnan(value) else ""
        return [Row(self.key, None, f"active units of {size}", value, 0.0, digits=0, note=note)]
