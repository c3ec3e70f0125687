"""What evaluation asks of a metric, and the names of metrics."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, TypeVar

import torch
from torchmetrics import Metric

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel


class Row(NamedTuple):
    """One number: a metric, or the part of it that is about one factor or term, beside its chance level.

    Chance is what a model gets that knows nothing of the individual frame.
    """

    key: str  # of the metric
    part: str | None  # of it: the name of a factor, for example
    label: str  # for people
    value: float
    chance: float
    unit: str = ""
    digits: int = 1  # after the point, where it is printed
    note: str = ""  # why it is NaN, for example


class EvaluationMetric(Metric):
    """A metric that evaluation takes of every model and source that it applies to.

    A metric of one's own has a `key` and these four methods, beside states, `update` and `compute` as any
    `torchmetrics.Metric`, and is given its place in `METRICS` by `register`. It draws no noise but from generators of
    its own, unless it comes last.
    """

    key: ClassVar[str]
    fits: ClassVar[bool] = False  # is fitted to sequences that the model was trained on, by `fit`
    full_state_update = False

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say whether the metric means anything for a model and a source."""
        return True

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> EvaluationMetric:
        """Make the metric for a model and a source."""
        return cls()

    def fit(self, model: SequenceModel, training: SequenceSource) -> None:
        """Fit what the metric needs to sequences of the training split, before any is measured."""

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add a batch, and what the model says of it."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """Return what was measured of all batches."""
        raise NotImplementedError


METRICS: dict[str, type[EvaluationMetric]] = {}  # in the order in which they are measured and printed
AnyMetric = TypeVar("AnyMetric", bound=type[EvaluationMetric])


def register(metric: AnyMetric) -> AnyMetric:
    """Give a class of metrics its place in `METRICS`, under its `key`; to be used as a decorator.

    Raises:
        ValueError: the key is another metric's.

    """
    if METRICS.get(metric.key, metric) is not metric:
        raise ValueError(f"there is a metric {metric.key!r} already: {METRICS[metric.key].__qualname__}")
    METRICS[metric.key] = metric
    return metric


def private_generator(seed: int) -> torch.Generator:
    """Make a generator for the noise of a chance level, which disturbs no other."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Draw iid Gaussian activations on the CPU, in float32 whatever PyTorch's defaults are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
