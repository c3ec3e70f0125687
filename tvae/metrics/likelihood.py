"""How likely a model finds images: the terms of its ELBO, and log p(x)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, Likelihood, SequenceModel
from ..models.layers import Images
from .base import EvaluationMetric, Row


class BestSingleImage(Metric):
    """The chance level of likelihoods: mean log p(x) in nats a frame when the mean image is predicted for all.

    Args:
        likelihood: the model's likelihood.
        image_shape: `(channel, height, width)`.

    """

    full_state_update = False

    def __init__(self, likelihood: Likelihood, image_shape: tuple[int, int, int]):
        super().__init__()
        self.likelihood = likelihood
        self.add_state("sums", torch.zeros(2, *image_shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Images) -> None:
        """Add the frames of a batch."""
        images = images.flatten(0, 1).double()
        self.sums += torch.stack([images.sum(0), images.square().sum(0)])
        self.frames += len(images)

    def compute(self) -> float:
        """Return the mean log-likelihood of a frame."""
        return self.likelihood.chance(*(self.sums / self.frames))


TERMS = {
    "log_likelihood": "log p(x|t)",
    "kl_z": "KL z",
    "kl_u": "KL u",
    "kl_k": "KL k",
    "kl_c": "KL z_c",
    "kl_v": "KL z_v",
    "kl_pose": "KL pose",
    "kl_start": "KL start",
}  # what they are called for people


class ELBOTerms(EvaluationMetric):
    """The mean evidence lower bound and its terms in nats a frame, by name.

    Chance: `BestSingleImage` for "elbo" and "log_likelihood"; 0 for all that it costs, for a posterior that is the
    prior costs nothing.

    Args:
        chance: the chance level, if it is wanted.

    """

    key = "elbo"

    def __init__(self, chance: BestSingleImage | None = None):
        super().__init__()
        self.chance = chance
        self.names: tuple[str, ...] = ()
        self.add_state("totals", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, elbo: ELBO) -> None:
        """Add the frames of a batch."""
        terms = {"elbo": elbo.total, **elbo.terms}
        self.names = tuple(terms)
        self.totals = self.totals + torch.stack([term.double().sum() for term in terms.values()])
        self.frames += elbo.total.numel()

    def compute(self) -> dict[str, float]:
        """Return the mean of every term over all frames."""
        return dict(zip(self.names, (self.totals / self.frames).tolist(), strict=True))

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> ELBOTerms:
        """Make the metric for the likelihood of a model."""
        return cls(BestSingleImage(model.likelihood, source.image_shape))

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the terms of a batch."""
        self.update(elbo)
        self.chance.update(batch.images)

    def rows(self) -> list[Row]:
        """Return a row for the bound and one for each of its terms."""
        values, best_image = self.compute(), self.chance.compute()
        rows = [Row(self.key, None, "ELBO", values.pop("elbo"), best_image, "nats/frame")]
        for name, value in values.items():
            chance = best_image if name == "log_likelihood" else 0.0
            rows.append(Row(self.key, name, TERMS.get(name, name), value, chance, "nats/frame"))
        return rows


def log_likelihood(
    log_weights: Float[Tensor, "sample batch time"],
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, " batch"]]:
    """Return two importance-sampling estimates of log p(x) in nats from a model's `log_weights`.

    Returns:
        `log Σ w` of every frame, each weighted by its own latents alone and without `-log n`, as the published code has
        it: `log n` nats higher than an estimate. And `(log Σ w - log n) / S` of every sequence, the weights of its S
        frames multiplied: a lower bound of log p(x) per frame on average (Burda et al. 2016).

    """
    samples, _, steps = log_weights.shape
    published = log_weights.logsumexp(0)
    bound = (log_weights.sum(2).logsumexp(0) - math.log(samples)) / steps
    return published, bound


_FORMS = {  # what they are called for people
    "published": "log p(x), as published",
    "bound": "log p(x), bound",
    "bound, not told": "log p(x), bound, not told",
}


class LogLikelihood(EvaluationMetric):
    """Mean log p(x) in nats a frame in both forms of `log_likelihood`: "published" and "bound".

    Chance: `BestSingleImage`.

    Args:
        samples: importance samples of every sequence that `measure` takes.
        chance: the chance level, if it is wanted.
        forms: which of the two have a row: of frames that share latent variables the published form, which weights
            each frame by its own, leaves out what they cost.
        telling: nats a frame that a model was told which transformation moves a sequence, one of K that are alike
            likely, log K / S; None for one that was told nothing. As `log Σ_k p(x|k) / K >= log p(x|k) - log K`, the
            bound less that is one of log p(x), and has a row of its own.

    """

    key = "log_likelihood"
    higher_is_better = True

    def __init__(
        self,
        samples: int = 10,
        chance: BestSingleImage | None = None,
        forms: tuple[str, ...] = ("published", "bound"),
        telling: float | None = None,
    ):
        super().__init__()
        self.samples, self.chance, self.forms, self.telling = samples, chance, forms, telling
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_weights: Float[Tensor, "sample batch time"]) -> None:
        """Add the sequences of a batch."""
        published, bound = log_likelihood(log_weights)
        self.totals += torch.stack([published.mean(1).double().sum(), bound.double().sum()])
        self.sequences += log_weights.shape[1]

    def compute(self) -> dict[str, float]:
        """Return the two means over all sequences."""
        return dict(zip(("published", "bound"), (self.totals / self.sequences).tolist(), strict=True))

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> LogLikelihood:
        """Make the metric with the samples of the settings."""
        forms = ("bound",) if model.shares_latents else ("published", "bound")
        chance, telling = BestSingleImage(model.likelihood, source.image_shape), None
        if model.told_transformations and model.shares_latents and source.transformations:
            telling = math.log(len(source.transformations)) / source.sequence_length
        return cls(settings.importance_samples, chance, forms, telling)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Draw importance samples of the sequences of a batch and add them."""
        self.update(torch.stack(list(model.log_weights(batch, self.samples))))
        self.chance.update(batch.images)

    def rows(self) -> list[Row]:
        """Return a row for each form, and one for the bound that a model would have that is not told."""
        values, chance = self.compute(), self.chance.compute()
        shown = {form: values[form] for form in self.forms}
        if self.telling is not None:
            shown["bound, not told"] = values["bound"] - self.telling
        return [
            Row(self.key, form, f"{_FORMS[form]}, {self.samples} samples", value, chance, "nats/frame")
            for form, value in shown.items()
        ]
