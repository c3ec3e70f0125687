"""How well models move what two transformations move: one after the other, or both at once."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..config import EvaluationSettings
from ..data import EVALUATION_SEED, SequenceBatch, SequenceSource, SequenceStream
from ..models import ELBO, SequenceModel
from ..models.layers import Images, Mix
from .base import EvaluationMetric, Row
from .fits import FittedMotions
from .motion import CHANCE, KEPT, OWN, PixelErrors, fitted_to, names_of, predicted

Shares = Int[Tensor, "step transformation"]  # how much of each transformation every step takes


def render_mixed(source: SequenceSource, examples: Tensor, starts: Tensor, shares: Shares, first: int) -> SequenceBatch:
    """Render sequences in which each transformation advances its factor by its share of every step.

    Args:
        source: on whose device they will be.
        examples: of the sequences (B,), on the CPU.
        starts: factors (B, F) to start from, as `SequenceSource.sequences` takes them, on the CPU.
        shares: 0 or 1 for every step and transformation, on the CPU.
        first: number of the transformation that the batch says it is of.

    """
    index_of = sorted(source.transformations)  # among the factors
    transformation = torch.full_like(examples, index_of[first])
    factors = source.advance(starts, transformation).clone()
    advanced = F.pad(shares.cumsum(0), (0, 0, 1, 0))  # (S, K)
    for k in shares.any(0).nonzero().squeeze(1).tolist():
        course = source.advance(starts, torch.full_like(examples, index_of[k]))[..., index_of[k]]
        factors[..., index_of[k]] = course[:, advanced[:, k]]
    known = (transformation, source.axis(transformation), source.label(examples, factors))
    examples, factors, *known = (None if x is None else x.to(source.device) for x in (examples, factors, *known))
    return SequenceBatch(source.render(examples, factors), factors, *known)


class Mixed(EvaluationMetric):
    """E_pix of sequences that two transformations move, a mean over pairs of them, by how frames are predicted.

    The frames are true: some 200 seeded test sequences on open paths, whatever batches are measured. Motions are told
    of every step what moves it, if they are told. The batch that the model is given has the images and factors of the
    whole sequence, and the first of both transformations.

    Chance: the median image of each pair and frame index.

    Args:
        source: of the test sequences.

    """

    fits = True
    higher_is_better = False
    sequences = 200  # rounded up to as many of every pair

    def __init__(self, source: SequenceSource):
        super().__init__()
        self.source, self.names = source, names_of(source)
        self.pairs = list(self.pairs_of(range(len(self.names))))
        self.errors = PixelErrors(len(self.pairs), source.sequence_length)
        self.fitted: FittedMotions | None = None

    @staticmethod
    @abstractmethod
    def pairs_of(transformations: Iterable[int]) -> Iterable[tuple[int, int]]:
        """Return the pairs of transformations to take."""

    @abstractmethod
    def shares(self, first: int, second: int) -> Shares:
        """Return how much of each transformation every step takes."""

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes open paths of more than one transformation, in more than one step."""
        return source.open_paths and len(source.transformations) > 1 and source.sequence_length > 2

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> Mixed:
        """Make the metric for the transformations of a source."""
        return cls(source)

    def fit(self, model: SequenceModel, training: SequenceSource) -> None:
        """Fit the motions of single transformations."""
        self.fitted = fitted_to(model, training, self.names)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the sequences of all pairs, when the first batch is measured."""
        if self.update_called:
            return
        for number in range(len(self.pairs)):
            batch, mix = self.batch(number)
            guesses = predicted(model, batch, self.fitted, mix) | {KEPT: batch.images[:, :1]}
            self.update(batch.images, torch.full_like(batch.axis, number), guesses)

    def batch(self, number: int) -> tuple[SequenceBatch, Mix]:
        """Render the sequences of a pair, and say what moves their steps."""
        count = min(-(-self.sequences // len(self.pairs)), len(self.source))
        examples, starts, _ = SequenceStream(self.source, count, EVALUATION_SEED).draw(number)
        shares = self.shares(*self.pairs[number])
        batch = render_mixed(self.source, examples, starts, shares, self.pairs[number][0])
        return batch, shares.to(batch.images).expand(count, -1, -1)

    def update(self, images: Images, pair: Int[Tensor, " batch"], guesses: dict[str, Images]) -> None:
        """Add sequences, the numbers of their pairs, and the frames that are predicted, by how."""
        self.errors.update(images, pair, guesses)

    def compute(self) -> dict[str, tuple[float, float]]:
        """Return error and chance, as means over the pairs, by how frames are predicted."""
        found: dict[str, Float[Tensor, "pair time"]] = self.errors.compute()
        means = {way: error[:, 1:].mean().item() for way, error in found.items()}
        chance = means.pop(CHANCE)
        return {way: (mean, chance) for way, mean in means.items()}

    def rows(self) -> list[Row]:
        """Return a row for each way to predict frames."""
        return [
            Row(
                self.key,
                None if way == OWN else way,
                f"E_pix {self.key}" if way == OWN else f"E_pix {self.key}, {way}",
                *values,
                "L1/frame",
            )
            for way, values in self.compute().items()
        ]


class Switching(Mixed):
    """E_pix where one transformation moves the first half of the steps and another the others, over ordered pairs.

    Otherwise as `Mixed`. Of an odd number of steps the second half is the larger.
    """

    key = "switching"

    @staticmethod
    def pairs_of(transformations: Iterable[int]) -> Iterable[tuple[int, int]]:
        """Return all ordered pairs."""
        return itertools.permutations(transformations, 2)

    def shares(self, first: int, second: int) -> Shares:
        """Return all of the first transformation until half of the steps are taken, then all of the second."""
        steps = self.source.sequence_length - 1
        moving = torch.tensor([first] * (steps // 2) + [second] * (steps - steps // 2), device="cpu")
        return F.one_hot(moving, len(self.names))


class Superposing(Mixed):
    """E_pix where two transformations move every step at once, over unordered pairs. Otherwise as `Mixed`."""

    key = "superposing"

    @staticmethod
    def pairs_of(transformations: Iterable[int]) -> Iterable[tuple[int, int]]:
        """Return all unordered pairs."""
        return itertools.combinations(transformations, 2)

    def shares(self, first: int, second: int) -> Shares:
        """Return all of both transformations for every step."""
        both = F.one_hot(torch.tensor([first, second], device="cpu"), len(self.names)).sum(0)
        return both.expand(self.source.sequence_length - 1, -1)
