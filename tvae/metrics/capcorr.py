"""How well the rolls of capsules follow the transformations of their input: CapCorr."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from tvae_kernels import Neighborhood, roll_capsules

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.layers import Axis, Capsules
from .base import EvaluationMetric, Row, private_generator
from .equivariance import PLAIN, axes_of, of_axis


def observed_roll(
    first: Float[Tensor, "batch capsule dim"], t: Capsules, rolls: Neighborhood = PLAIN, axis: Axis | None = None
) -> Int[Tensor, "batch time"]:
    """Return by how many time steps `first` has to roll back to match each frame of `t` best (Eq. 14, 16 and 20).

    The one with the largest product `Σ_d Roll_{-k}(first)[d] · t[d]`, the most frequent one (on a tie the smallest)
    over the capsules. Candidates are the steps of one round: D of them for one position a step, D / α for α of one.
    Where capsules may roll along one of several axes, the axis counts that is known of the sequence, or else the one
    whose winner has the larger product.

    Capsules that are not circular cannot roll back: a roll forward by m steps of a round of R counts as R - m. Theirs
    is the one with the least mean squared difference over the positions that come from within the capsule. (That of the
    largest product where nothing comes from outside; elsewhere the product of more positions would win.)
    """
    best = []
    for a in axes_of(rolls):
        steps = _steps_of_a_round(rolls, a, t)
        if rolls.capsule_boundary == "circular":
            rolled_back = [roll_capsules(first, -k, rolls, a) for k in range(steps)]
            match = torch.einsum("bckd,bscd->bsck", torch.stack(rolled_back, dim=-2), t)
        else:
            forward = [_closeness(first, t, m, rolls, a) for m in (0, *range(steps - 1, 0, -1))]
            match = torch.stack(forward, dim=-1)
        votes = F.one_hot(match.argmax(-1), steps).sum(-2).argmax(-1)
        best.append((match.sum(2).gather(-1, votes[..., None]).squeeze(-1), votes))
    scores, votes = (torch.stack(x) for x in zip(*best, strict=True))
    if axis is not None:
        return of_axis(votes, axis)
    return votes.gather(0, scores.argmax(0, keepdim=True)).squeeze(0)


def _closeness(
    first: Tensor, t: Capsules, steps: int, rolls: Neighborhood, axis: int | None
) -> Float[Tensor, "batch time capsule"]:
    """Return minus the mean squared difference of the rolled `first` and `t`, over positions that come from within."""
    # What is interpolated with a 0 from outside is not inside.
    inside = roll_capsules(torch.ones_like(first[0]), steps, rolls, axis) > 1 - 1e-6
    difference = (roll_capsules(first, steps, rolls, axis).unsqueeze(1) - t) * inside
    count = inside.sum(-1)
    return (-difference.square().sum(-1) / count).masked_fill(count == 0, -torch.inf)


def _steps_of_a_round(rolls: Neighborhood, axis: int | None, t: Capsules) -> int:
    """Return the time steps until capsules are where they were; the sequence's length if axes or capsules differ."""
    if rolls.speeds is not None or (rolls.is_multidimensional and axis is None):
        return t.shape[1]
    shift, dim = (rolls.shift, t.shape[-1]) if axis is None else (rolls.shift[axis], rolls.axes[axis])
    return dim // math.gcd(dim, shift) if isinstance(shift, int) else max(1, round(dim / abs(shift)))


def roll_since_canonical(
    t: Capsules,
    factors: Int[Tensor, "batch time factor"],
    transformation: Int[Tensor, " batch"],
    rolls: Neighborhood = PLAIN,
    axis: Axis | None = None,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Return the observed and the true roll between frame 0 and the frame where the transforming factor is at index 0.

    Where several frames are, because the factor runs through its values more than once, the one counts whose observed
    roll is nearest to the true one (appendix A.11), which raises chance for such a factor.

    Raises:
        ValueError: a sequence never passes its canonical pose.

    """
    moving = factors.gather(2, transformation[:, None, None].expand(-1, factors.shape[1], 1)).squeeze(2)
    canonical = moving == 0
    if not canonical.any(1).all():
        raise ValueError("CapCorr needs sequences in which the transforming factor passes index 0")
    true = moving[:, 0]
    observed = observed_roll(t[:, 0], t, rolls, axis)
    distance = (
        (observed - true[:, None]).abs().masked_fill(~canonical, observed.amax().item() + moving.amax().item() + 1)
    )
    nearest = distance.argmin(1, keepdim=True)
    return observed.gather(1, nearest).squeeze(1), true


class CapCorr(EvaluationMetric):
    """Pearson correlation of observed and true roll over all sequences, by transformation (Eq. 17); 1 is perfect.

    Chance: the same for iid Gaussian activations in place of the capsules, on the same sequences.

    Args:
        names: the names of the factors, in the order of the factor indices.
        rolls: the topography, as in `equivariance_error`.

    """

    key = "capcorr"
    higher_is_better = True

    def __init__(self, names: Sequence[str], rolls: Neighborhood = PLAIN):
        super().__init__()
        self.names, self.rolls = tuple(names), rolls
        for state in ("observed", "random", "true", "transformation"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, t: Capsules, factors: Tensor, transformation: Tensor, axis: Axis | None = None) -> None:
        """Add the sequences of a batch: capsules, the truth about their factors, and along which axis they roll."""
        observed, true = roll_since_canonical(t, factors, transformation, self.rolls, axis)
        noise = torch.randn(t.shape, generator=private_generator(len(self.true))).to(t.device)
        random, _ = roll_since_canonical(noise, factors, transformation, self.rolls, axis)
        for state, values in zip(
            (self.observed, self.random, self.true, self.transformation),
            (observed, random, true, transformation),
            strict=True,
        ):
            state.append(values)

    def compute(self) -> dict[str, float]:
        """Return the correlation for every transformation that occurred, by name; NaN where a roll never varied."""
        return self._correlations(self.observed)

    def chance(self) -> dict[str, float]:
        """Return the correlation that random activations reach."""
        return self._correlations(self.random)

    def _correlations(self, observed: list[Tensor] | Tensor) -> dict[str, float]:
        observed, true, kind = map(dim_zero_cat, (observed, self.true, self.transformation))
        return {
            self.names[k]: torch.corrcoef(torch.stack([observed[kind == k], true[kind == k]]).double())[0, 1].item()
            for k in kind.unique().tolist()
        }

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes capsules that can move, in sequences that advance a factor."""
        return model.rolls is not None and source.sequence_length > 1 and bool(source.transformations)

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> CapCorr:
        """Make the metric for the rolls of a model and the factors of a source."""
        names = [source.transformations.get(index, factor.name) for index, factor in enumerate(source.factors)]
        return cls(names, model.rolls)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the capsules of a batch, and the truth about its factors."""
        self.update(elbo.t, batch.factors, batch.transformation, elbo.axis)

    def rows(self) -> list[Row]:
        """Return a row for every transformation."""
        random = self.chance()
        return [
            Row(self.key, name, f"CapCorr {name}", value, random[name], digits=2)
            for name, value in self.compute().items()
        ]
