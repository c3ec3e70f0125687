"""How equivariant capsules are: E_eq."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tvae_kernels import Neighborhood, roll_capsules

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.layers import Axis, Capsules
from .base import EvaluationMetric, Row, noise, private_generator

PLAIN = Neighborhood()  # rolls by one position a frame


def equivariance_error(t: Capsules, rolls: Neighborhood = PLAIN, axis: Axis | None = None) -> Float[Tensor, " batch"]:
    """Return `E_eq = Σ_{l < m} || Roll_{m-l}(t̂_l) - t̂_m ||₁` of every sequence (Eq. 13), summed over capsules.

    `t̂` is each capsule divided by its Euclidean norm, as in the published code. Zero for capsules that roll as their
    topography says. Where they may roll along one of several axes, the axis counts that is known of the sequence, or
    else the one that gives less error.

    Args:
        t: `(batch, time, capsule, dim)`.
        rolls: the topography, whose rolls `roll_capsules` makes; by default one position a frame.
        axis: along which axis each sequence rolls, where that is known.

    """
    t = normalised(in_full(t))
    errors = []
    for a in axes_of(rolls):
        pairs = (roll_capsules(t[:, :-m], m, rolls, a) - t[:, m:] for m in range(1, t.shape[1]))
        errors.append(sum((difference.abs().sum((1, 2, 3)) for difference in pairs), start=t.new_zeros(len(t))))
    errors = torch.stack(errors)
    return of_axis(errors, errors.argmin(0) if axis is None else axis)


def normalised(t: Capsules) -> Capsules:
    """Divide each capsule by its Euclidean norm, whatever its scale; a capsule of zeros stays one."""
    return F.normalize(t / scale_of(t), dim=-1)


def scale_of(t: Float[Tensor, "*capsules dim"]) -> Float[Tensor, "*capsules 1"]:
    """Return for each capsule the power of two by which its largest element is between 1 and 2; 1 for one of zeros.

    To divide by it is exact, and leaves numbers that are far from where squares and products overflow or vanish.
    """
    largest = t.detach().abs().amax(-1, keepdim=True)
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest == 0, 1, largest / (2 * mantissa))


def in_full(t: Tensor) -> Tensor:
    """Return numbers of half precision in float32, and others as they are: sums of capsules have thousands of terms."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def of_axis(values: Tensor, axis: Axis) -> Tensor:
    """Choose from values by axis, `(axes, batch, ...)`, those of one axis for each sequence."""
    return values[axis, torch.arange(len(axis), device=axis.device)]


def axes_of(rolls: Neighborhood) -> Sequence[int | None]:
    """Return along which axes capsules may roll one at a time; None stands for all together."""
    return range(rolls.root_count) if rolls.root_count > 1 else (None,)


class EquivarianceError(EvaluationMetric):
    """Mean E_eq over sequences; 0 is perfect. Chance: the same for iid Gaussian activations of the same shape.

    Args:
        rolls: the topography, as in `equivariance_error`.

    """

    key = "equivariance_error"
    higher_is_better = False

    def __init__(self, rolls: Neighborhood = PLAIN):
        super().__init__()
        self.rolls = rolls
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.shape = None
        self.axes_known = False

    def update(self, t: Capsules, axis: Axis | None = None) -> None:
        """Add the sequences of a batch of capsules, and along which axis they roll."""
        self.shape, self.axes_known = tuple(t.shape[1:]), axis is not None
        self.total += equivariance_error(t, self.rolls, axis).double().sum()
        self.sequences += len(t)

    def compute(self) -> Tensor:
        """Return the mean over all sequences."""
        return self.total / self.sequences

    def chance(self) -> float:
        """Return E_eq of iid Gaussian activations, of 64 seeded sequences; along their axes in turn if known."""
        t = noise(64, *self.shape, generator=private_generator(0))
        axis = torch.arange(len(t), device="cpu") % self.rolls.root_count if self.axes_known else None
        return equivariance_error(t, self.rolls, axis).mean().item()

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes capsules that can move, in sequences of more than one frame."""
        return model.rolls is not None and source.sequence_length > 1

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> EquivarianceError:
        """Make the metric for the rolls of a model."""
        return cls(model.rolls)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the capsules of a batch."""
        self.update(elbo.t, elbo.axis)

    def rows(self) -> list[Row]:
        """Return one row."""
        return [Row(self.key, None, "E_eq", self.compute().item(), self.chance(), digits=0)]
