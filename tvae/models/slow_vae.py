"""The VAE whose latent variables rest from frame to frame, most of them: SlowVAE."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.distributions import Normal

from ..data import SequenceSource
from ..settings import Number, settings
from .base import ELBO
from .layers import Frames
from .vae import VAE

_FAR = 100.0  # standard deviations: from some 14 on the tail of a Gaussian is 0 in float32, from 39 on in float64


@settings
class SlowVAESettings(VAE.Settings):
    """Settings of the SlowVAE."""

    beta: Annotated[Number, Field(ge=0)] = 1.0
    """Weight of the mean divergence of two adjacent frames from the prior, in pairs of frames; 2 is the VAE's."""
    gamma: Annotated[Number, Field(ge=0)] = 10.0
    """Weight of the divergence of a frame from a Laplace distribution about the other frame of the pair; 0 is off."""
    rate: Annotated[Number, Field(gt=0)] = 6.0
    """Rate of the Laplace distribution: the larger, the less a latent variable should move."""

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse sequences of one frame, which have no pairs.

        Raises:
            ValueError: naming the source.

        """
        if source.sequence_length < 2:
            raise ValueError(f"a SlowVAE needs sequences of at least 2 frames, those of {source.name} have 1")


class SlowVAE(VAE):
    """The VAE whose posteriors of adjacent frames are close under a Laplace prior (Klindt et al. 2021, Eq. 8).

    Of a pair of frames (0, 1) it is trained on half of

        LL_0 + LL_1 - beta · (KL_0 + KL_1) / 2 - gamma · (KL(q_1 || Laplace(m_0)) + KL(q_0 || Laplace(m_1))) / 2

    with `LL = log p(x|z)` and `m` the mean of a posterior `q`; of a sequence on the mean over its pairs of adjacent
    frames, LL and KL being averaged over all frames alike. The last frame and the first are no pair. (In the published
    code cross-entropies weigh twice as much as entropies; this is the consistent form.)

    Args:
        arguments: as those of `VAE`, and the fields of `SlowVAESettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "slowvae"
    Settings = SlowVAESettings

    def regularised(self, elbo: ELBO, q: Normal) -> ELBO:
        """Subtract `(beta/2 - 1) · KL` of every frame and `gamma/2` times the divergence of the pair that it ends."""
        divergence, frames = laplace_divergence(q, self.settings.rate), q.mean.shape[1]
        # There is a pair less than there are frames, and what training takes is a mean over frames.
        of_frame = F.pad(divergence * (frames / max(1, frames - 1)), (1, 0))
        penalty = (self.settings.beta / 2 - 1) * elbo.terms["kl_z"] + self.settings.gamma / 2 * of_frame
        return elbo.penalised(penalty, kl_laplace=of_frame)


def laplace_divergence(q: Normal, rate: float) -> Frames:
    """Return, of each pair of adjacent frames, the mean divergence from a Laplace distribution about the other's mean.

    Args:
        q: posteriors of latent variables, `(B, S, C, D)`.
        rate: of the Laplace distribution.

    Returns:
        `(KL(q_l || Laplace(m_{l-1})) + KL(q_{l-1} || Laplace(m_l))) / 2` in nats, summed over latent variables,
        `(B, S - 1)`.

    """
    distance, std, entropy = q.mean.diff(dim=1), q.stddev, q.entropy()
    second = laplace_cross_entropy(distance, std[:, 1:], rate) - entropy[:, 1:]
    first = laplace_cross_entropy(distance, std[:, :-1], rate) - entropy[:, :-1]
    return (second + first).sum((-2, -1)) / 2


def laplace_cross_entropy(distance: Tensor, std: Tensor, rate: float) -> Tensor:
    """Return `-E log Laplace(z - c; rate)` in nats, for `z` of a standard deviation, whose mean is so far from `c`.

    For a center that is Gaussian, too, take the root of the sum of both variances.
    """
    # Further out neither function changes, but their gradients would be infinity times 0.
    deviations = distance / torch.maximum(std, distance.abs() / _FAR)
    density = math.sqrt(2 / math.pi) * (-deviations.square() / 2).exp()
    absolute = std * density + distance * (deviations / math.sqrt(2)).erf()
    return rate * absolute - math.log(rate / 2)
