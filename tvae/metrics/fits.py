"""Two motions for the latent variables of any model, fitted to how they change: along a direction, and affinely.

They are what a motion that a model has learned must beat. Both are told which transformation moves a sequence.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..data import EVALUATION_SEED, SequenceBatch, SequenceSource, SequenceStream
from ..files import checksum
from ..models import SequenceModel
from ..models.layers import Capsules, Mix

DIRECTION, AFFINE = "direction", "affine"  # what they are called in rows
_SEQUENCES = 600  # that they are fitted to
_AT_ONCE = 50
_RIDGE = 0.01  # on the mean square


class FittedMotions(NamedTuple):
    """How n latent variables change from a frame to the next under each of K transformations, in float64.

    By `direction` (K, n) they change by the same in every frame, by `affine` (K, n + 1, n) as `[m, 1] W` says.
    """

    names: tuple[str, ...]  # of the transformations
    direction: Float[Tensor, "transformation n"]
    affine: Float[Tensor, "transformation inputs n"]

    def moved(self, motion: str, first: Float[Tensor, "batch capsule dim"], mix: Mix) -> Capsules:
        """Return the path that a motion takes from the capsules of frame 0, in their type.

        Every step adds the changes of all transformations at its start, each as much as the mix says.
        """
        m = first.double().flatten(1)
        path = [m]
        for share in mix.double().unbind(1):
            if motion == DIRECTION:
                m = m + share @ self.direction
            else:
                changes = F.pad(m, (0, 1), value=1.0) @ self.affine  # (K, B, n)
                m = m + torch.einsum("bk,kbn->bn", share, changes)
            path.append(m)
        return torch.stack(path, 1).to(first.dtype).unflatten(-1, first.shape[1:])


def one_by_one(batch: SequenceBatch, transformations: int) -> Mix:
    """Return the mix of sequences each of which its own transformation alone moves."""
    shares = F.one_hot(batch.axis, transformations).to(batch.images.dtype)
    return shares[:, None].expand(-1, batch.images.shape[1] - 1, -1)


# For metrics that are fitted one after the other: by model, with its weights and the sequences that it was fitted to.
_KEPT: WeakKeyDictionary[SequenceModel, tuple[str, ref[SequenceSource], FittedMotions]] = WeakKeyDictionary()


@torch.no_grad()
def fit_motions(model: SequenceModel, training: SequenceSource) -> FittedMotions:
    """Fit both motions to the most typical latent variables of 600 seeded sequences of the training split.

    For frames `l` and `l + 1` of sequences of one transformation, `m_{l+1} - m_l` is `direction` on average, and
    `[m_l, 1] W` by least squares in float64, with a ridge of 0.01 times the number of pairs on all of W but the
    constant. They are fitted anew only when the weights or the sequences are others than the last time.
    """
    weights = checksum(model.state_dict(), "")
    kept, source, fitted = _KEPT.get(model, ("", None, None))
    if kept != weights or source() is not training:
        fitted = _fit(model, training)
        _KEPT[model] = weights, ref(training), fitted
    return fitted


def _fit(model: SequenceModel, training: SequenceSource) -> FittedMotions:
    stream = SequenceStream(training, min(_AT_ONCE, len(training)), EVALUATION_SEED)
    names = tuple(training.transformations.values())
    squares = products = 0.0
    for i in range(-(-_SEQUENCES // stream.batch_size)):
        batch = stream[i]
        m = model.encode(batch, sample=False).double().flatten(2)
        before, change = F.pad(m[:, :-1], (0, 1), value=1.0), m.diff(dim=1)
        apart = F.one_hot(batch.axis, len(names)).to(m.dtype)
        by_kind = torch.einsum("bk,bli->kbli", apart, before).flatten(1, 2)  # 0 in sequences of other kinds
        squares = squares + by_kind.mT @ before.flatten(0, 1)
        products = products + by_kind.mT @ change.flatten(0, 1)
    pairs = squares[:, -1:, -1]  # the sum of squares of the constant
    ridge = torch.eye(squares.shape[-1], dtype=m.dtype, device=m.device)
    ridge[-1, -1] = 0
    affine = torch.linalg.solve(squares + _RIDGE * pairs[..., None] * ridge, products)
    return FittedMotions(names, products[:, -1] / pairs, affine)
