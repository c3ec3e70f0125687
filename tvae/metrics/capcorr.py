"""How well the rolls of capsules follow the transformations of their input: CapCorr."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

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
from .base import EvaluationMetric, Row, noise, private_generator
from .equivariance import PLAIN, axes_of, in_full, of_axis, scale_of

T = TypeVar("T")
_AT_ONCE = 64  # sequences of noise, to spare memory


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
    best, (first, t, weight) = [], _scaled(in_full(first), in_full(t), rolls)
    for a in axes_of(rolls):
        steps = _steps_of_a_round(rolls, a, t)
        if rolls.capsule_boundary == "circular":
            rolled_back = [roll_capsules(first, -k, rolls, a) for k in range(steps)]
            match = torch.einsum("bckd,bscd->bsck", torch.stack(rolled_back, dim=-2), t)
        else:
            forward = [_closeness(first, t, m, rolls, a) for m in (0, *range(steps - 1, 0, -1))]
            match = torch.stack(forward, dim=-1)
        votes = F.one_hot(match.argmax(-1), steps).sum(-2).argmax(-1)
        best.append(((match * weight).sum(2).gather(-1, votes[..., None]).squeeze(-1), votes))
    scores, votes = (torch.stack(x) for x in zip(*best, strict=True))
    if axis is not None:
        return of_axis(votes, axis)
    return votes.gather(0, scores.argmax(0, keepdim=True)).squeeze(0)


def _scaled(first: Tensor, t: Capsules, rolls: Neighborhood) -> tuple[Tensor, Capsules, Tensor]:
    """Divide capsules by powers of two, so that no product is too large or small for a number.

    Returns also with which weights (B, S, C, 1) their products add up as before, up to a factor for each frame.
    """
    if rolls.capsule_boundary == "circular":  # whose products are compared for each capsule of a frame
        by_first, of_t = scale_of(first), scale_of(t)
        exponent = by_first.double().log2().unsqueeze(1) + of_t.double().log2()
    else:  # whose differences are
        by_first = torch.maximum(scale_of(first), scale_of(t).amax(1))
        of_t = by_first.unsqueeze(1)
        exponent = 2 * of_t.double().log2()
    relative = torch.exp2(exponent - exponent.amax(2, keepdim=True))
    return first / by_first, t / of_t, relative.to(t.dtype)


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
    course = _course(factors, transformation)
    if not (course == 0).any(1).all():
        raise ValueError("CapCorr needs sequences in which the transforming factor passes index 0")
    return _since_canonical(t, course, rolls, axis), course[:, 0]


def _course(factors: Tensor, transformation: Tensor) -> Int[Tensor, "batch time"]:
    """Return the indices that the transforming factor of each sequence runs through."""
    return factors.gather(2, transformation[:, None, None].expand(-1, factors.shape[1], 1)).squeeze(2)


def _since_canonical(t: Capsules, course: Tensor, rolls: Neighborhood, axis: Axis | None) -> Int[Tensor, " batch"]:
    """Return the observed roll; of no meaning for a sequence that never passes its canonical pose."""
    observed = observed_roll(t[:, 0], t, rolls, axis)
    distance = (observed - course[:, :1]).abs().masked_fill(course != 0, torch.iinfo(observed.dtype).max)
    return observed.gather(1, distance.argmin(1, keepdim=True)).squeeze(1)


class CapCorr(EvaluationMetric):
    """Pearson correlation of observed and true roll over all sequences, by transformation (Eq. 17); 1 is perfect.

    NaN where there is none; `reasons` says why. Chance: the same for iid Gaussian activations in place of the capsules,
    on the same sequences: which these are decides it, not how they were divided into batches or among processes.

    Args:
        names: the names of the factors, in the order of the factor indices.
        rolls: the topography, as in `equivariance_error`.

    """

    key = "capcorr"
    higher_is_better = True

    def __init__(self, names: Sequence[str], rolls: Neighborhood = PLAIN):
        super().__init__()
        self.names, self.rolls = tuple(names), rolls
        self.shape: tuple[int, ...] = ()
        for state in ("observed", "known"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, t: Capsules, factors: Tensor, transformation: Tensor, axis: Axis | None = None) -> None:
        """Add the sequences of a batch: capsules, the truth about their factors, and along which axis they roll."""
        self.shape, course = tuple(t.shape[1:]), _course(factors, transformation)
        observed = _since_canonical(t, course, self.rolls, axis).double()
        self.observed.append(observed.masked_fill(~t.isfinite().flatten(1).all(1), math.nan))
        axis = torch.full_like(transformation, -1) if axis is None else axis
        self.known.append(torch.cat((transformation[:, None], axis[:, None], course), 1))

    def compute(self) -> dict[str, float]:
        """Return the correlation for every transformation that occurred, by name; NaN where there is none."""
        return self._of_each(_correlation)

    def reasons(self) -> dict[str, str]:
        """Say why there is no correlation, by the name of the transformation, where there is none."""
        with self._all_processes():
            return {name: reason for name, reason in self._of_each(_what_is_missing).items() if reason}

    def chance(self) -> dict[str, float]:
        """Return the correlation that random activations reach."""
        with self._all_processes():
            # In an order that does not depend on the one in which they came: equal ones may take each other's place.
            rows, counts = dim_zero_cat(self.known).unique(dim=0, return_counts=True)
            known, generator = rows.repeat_interleave(counts, 0), private_generator(0)
            random = []
            for part in known.split(_AT_ONCE):
                axis = part[:, 1] if (part[:, 1] >= 0).all() else None
                t = noise(len(part), *self.shape, generator=generator).to(part.device)
                random.append(_since_canonical(t, part[:, 2:], self.rolls, axis).double())
            return self._of_each(_correlation, torch.cat(random), known)

    def _all_processes(self) -> AbstractContextManager:
        """See meanwhile the sequences of all processes, as `compute` does."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn)

    def _of_each(
        self, function: Callable[[Tensor, Tensor], T], observed: Tensor | None = None, known: Tensor | None = None
    ) -> dict[str, T]:
        """Return what a function says of the observed rolls and the course of each transformation that occurred."""
        observed = dim_zero_cat(self.observed) if observed is None else observed
        known = dim_zero_cat(self.known) if known is None else known
        kind, course = known[:, 0], known[:, 2:]
        return {self.names[k]: function(observed[kind == k], course[kind == k]) for k in kind.unique().tolist()}

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes capsules that can move, in sequences that advance a factor, from anywhere on its circle."""
        moving = source.sequence_length > 1 and bool(source.transformations) and not source.open_paths
        return model.rolls is not None and moving

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
        random, reasons = self.chance(), self.reasons()
        return [
            Row(self.key, name, f"CapCorr {name}", value, random[name], digits=2, note=reasons.get(name, ""))
            for name, value in self.compute().items()
        ]


def _correlation(observed: Tensor, course: Tensor) -> float:
    """Return the correlation of observed and true roll; NaN where there is none."""
    if len(observed) < 2 or not (course == 0).any(1).all():
        return math.nan
    return torch.corrcoef(torch.stack([observed, course[:, 0].double()]))[0, 1].item()


def _what_is_missing(observed: Tensor, course: Tensor) -> str:
    """Say why there is no correlation of these rolls; nothing where there is one."""
    if not (course == 0).any(1).all():
        return "a sequence never passes index 0 of the factor"
    if observed.isnan().any():
        return "capsules are not finite"
    if len(observed) < 2:
        return "of one sequence alone"
    if (course[:, 0] == course[0, 0]).all():
        return "all sequences start alike"
    return "the observed roll never varies" if (observed == observed[0]).all() else ""
