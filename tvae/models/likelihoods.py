"""What the decoder's output says of the pixels: Bernoulli or Gaussian variables."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from .layers import Frames, Images

_DARKEST = 1e-5  # probability of a pixel, whose logit is finite


class Bernoulli(NamedTuple):
    """Pixels as Bernoulli variables whose logits the decoder gives; grey values count as probabilities."""

    def check(self, x: Images) -> None:
        """Refuse images that are not grey values in [0, 1].

        Raises:
            ValueError: naming the range that was found.

        """
        low, high = x.min().item(), x.max().item()
        if not 0 <= low <= high <= 1:
            raise ValueError(f'likelihood "bernoulli" needs images in [0, 1], got {low:g} to {high:g}')

    def log_prob(self, decoded: Images, x: Images) -> Frames:
        """Sum `log p(x|t)` over the pixels of every frame, in nats."""
        return -F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum((-3, -2, -1))

    def mean(self, decoded: Images) -> Images:
        """Return the expected image, in [0, 1]."""
        return torch.sigmoid(decoded)

    def inverted(self, mean: Tensor) -> Tensor:
        """Return what is decoded where the expected image is `mean`; of black and white, what is nearly so."""
        return mean.clamp(_DARKEST, 1 - _DARKEST).logit()

    def chance(self, mean: Tensor, mean_square: Tensor) -> float:
        """Return the mean log-likelihood of frames, in nats, under the best single image, which has their means."""
        return (torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum().item()


class Gaussian(NamedTuple):
    """Pixels as Gaussian variables whose means the decoder gives, with one fixed standard deviation."""

    std: float = 1.0

    def check(self, x: Images) -> None:
        """Refuse images that are not finite.

        Raises:
            ValueError: there is such a pixel.

        """
        if not torch.isfinite(x).all():
            raise ValueError("images must be finite, got NaN or infinity")

    def log_prob(self, decoded: Images, x: Images) -> Frames:
        """Sum `log p(x|t)` over the pixels of every frame, in nats."""
        return Normal(decoded, self.std).log_prob(x).sum((-3, -2, -1))

    def mean(self, decoded: Images) -> Images:
        """Return the expected image."""
        return decoded

    def inverted(self, mean: Tensor) -> Tensor:
        """Return what is decoded where the expected image is `mean`."""
        return mean

    def chance(self, mean: Tensor, mean_square: Tensor) -> float:
        """Return the mean log-likelihood of frames, in nats, under the best single image, which has their means."""
        variance = mean_square - mean.square()
        return (-variance / (2 * self.std**2) - math.log(self.std * math.sqrt(2 * math.pi))).sum().item()


Likelihood = Bernoulli | Gaussian
LIKELIHOODS: dict[str, type[Likelihood]] = {"bernoulli": Bernoulli, "gaussian": Gaussian}
