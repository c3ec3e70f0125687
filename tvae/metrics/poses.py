"""How far what a model says of an example is free of its pose, and how right it is about the pose."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, Identified, SequenceModel
from ..models.group import exp, warped
from .base import EvaluationMetric, Row
from .clustering import averaged, come_round
from .likelihood import BestSingleImage

_TURNS = 36  # that a cluster's zero of poses is looked for among
_COMPARED = 1000  # sequences, of which each is compared with all others


def invariance_error(first: Float[Tensor, "example number"], second: Float[Tensor, "example number"]) -> float:
    """Return the mean distance of the same examples in two poses over that of different ones; NaN without any."""
    first, second = first.double(), second.double()
    same = (first - second).norm(dim=1).mean()
    some = torch.cdist(first[:_COMPARED], second[:_COMPARED])
    others = (some.sum() - some.trace()) / (some.numel() - len(some))
    return (same / others).item()


def difference(degrees: Tensor) -> Tensor:
    """Return how far angles are from 0, from 0 to 180 degrees."""
    return ((degrees + 180) % 360 - 180).abs()


class Poses(EvaluationMetric):
    """Invariance error of what a model encodes; for one that says what it identifies, also of that, and of poses.

    * Invariance error: `invariance_error` of the frame 0 and the one in the middle, of the most typical capsules `t`,
      of `t` averaged over all rolls, and of the code of what is identified. 0 is perfect. Chance: 1.
    * Pose error: the median of how far the turn from the one frame to the other is from the true one, in degrees.
      Chance: to say that nothing turns.
    * Canonical likelihood: of the examples in no pose by the canonical images of frame 0, in nats, after the best of 36
      turns for each cluster, for a cluster's zero is its own. Chance: the best single image.

    Args:
        model: whose likelihood and rolls they are.
        source: of the examples.

    """

    key = "poses"
    higher_is_better = False

    def __init__(self, model: SequenceModel, source: SequenceSource):
        super().__init__()
        self.source, self.likelihood = source, model.likelihood
        self.rolls = model.rolls if come_round(model.rolls) else None
        names = [factor.name for factor in source.factors]
        self.turn = names.index("rotation") if "rotation" in names else None
        self.best_image = BestSingleImage(model.likelihood, source.image_shape)
        for state in ("capsules", "codes", "turned", "truly_turned", "cluster", "likelihoods"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes sources whose examples shall be told apart in whatever pose, and several poses of each."""
        return source.clustered and source.sequence_length > 1

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> Poses:
        """Make the metric for a model and a source."""
        return cls(model, source)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add what a model makes of a batch."""
        self.update(batch, model.encode(batch, sample=False))
        if hasattr(model, "identified"):
            self.identify(batch, model.identified(batch))

    def update(self, batch: SequenceBatch, t: Tensor) -> None:
        """Add the capsules of a batch."""
        self.capsules.append(_two(t))

    def identify(self, batch: SequenceBatch, found: Identified) -> None:
        """Add what was identified in a batch."""
        self.codes.append(_two(found.code))
        if self.turn is not None:
            values = torch.tensor(self.source.factors[self.turn].values, dtype=torch.float64, device=found.angle.device)
            for state, angle in (
                (self.turned, found.angle.double()),
                (self.truly_turned, values[batch.factors[..., self.turn]]),
            ):
                state.append(_two(angle).diff(dim=1).squeeze(1))
        upright = self.source.canonical(batch.example)
        if upright is not None:
            self.best_image.update(upright[:, None])
            self.cluster.append(found.cluster[:, 0])
            self.likelihoods.append(self._by_turn(found.canonical[:, 0], upright))

    def _by_turn(self, canonical: Tensor, upright: Tensor) -> Float[Tensor, "example turn"]:
        """Return how likely examples are by their canonical images at every turn."""
        turns = torch.arange(_TURNS, device=canonical.device) * (2 * math.pi / _TURNS)
        motions = exp(turns[:, None])
        images = [warped(canonical, motion.expand(len(canonical), -1, -1)) for motion in motions]
        decoded = self.likelihood.inverted(torch.stack(images, 1))
        return self.likelihood.log_prob(decoded, upright[:, None].expand_as(decoded)).double()

    def compute(self) -> dict[str, float]:
        """Return the values by name; those that there are."""
        t = dim_zero_cat(self.capsules)
        found = {"invariance error of t": invariance_error(*t.flatten(2).unbind(1))}
        if self.rolls is not None:
            found["invariance error of t, rolls averaged"] = invariance_error(
                *averaged(t, self.rolls).flatten(2).unbind(1)
            )
        if self.codes:
            found["invariance error"] = invariance_error(*dim_zero_cat(self.codes).unbind(1))
        if self.turned:
            error = dim_zero_cat(self.turned) - dim_zero_cat(self.truly_turned)
            found["pose error"] = difference(error).median().item()
        if self.cluster:
            cluster, likelihoods = dim_zero_cat(self.cluster), dim_zero_cat(self.likelihoods)
            sums = likelihoods.new_zeros(int(cluster.max()) + 1, _TURNS).index_add(0, cluster, likelihoods)
            found["canonical likelihood"] = sums.amax(1).sum().item() / len(cluster)
        return found

    def rows(self) -> list[Row]:
        """Return a row for each value."""
        rows = []
        for name, value in self.compute().items():
            if name == "pose error":
                chance = difference(dim_zero_cat(self.truly_turned)).median().item()
                rows.append(Row(self.key, name, name, value, chance, "degrees"))
            elif name == "canonical likelihood":
                rows.append(Row(self.key, name, "log p(upright), canonical", value, self.best_image.compute(), "nats"))
            else:
                rows.append(Row(self.key, name, name, value, 1.0, digits=3))
        return rows


def _two(x: Float[Tensor, "batch time *other"]) -> Float[Tensor, "batch 2 *other"]:
    """Take the first frame and the one in the middle, half a turn later where a sequence turns once around."""
    return x[:, [0, x.shape[1] // 2]]
