"""The baseline without topography."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import Normal

from tvae_kernels import Neighborhood

from ..data import SequenceBatch
from ..settings import settings
from .base import ELBO, ModelSettings, SequenceModel
from .layers import Axis, Capsules, Images, gaussian, kl_from_prior


@settings
class VAESettings(ModelSettings):
    """Settings of the VAE."""


class VAE(SequenceModel):
    """The baseline without topography: `t = z`, divided into capsules for the metrics alone.

    Three-layer ReLU networks with hidden layers of 3n and 2n units for n = C·D latent variables, weights and biases
    initialised from U(±1/sqrt(fan-in)) (appendix A.2 and A.3).

    Args:
        image_shape: `(channel, height, width)` of a frame.
        capsules: number of capsules C.
        capsule_dim: number of dimensions D of a capsule.
        z_encoder: from frames `(N, channel, height, width)` to means and log-variances `(N, 2·C·D)`; None is the MLP.
        decoder: from capsules `(N, C, D)` to the pixels of frames, `(N, channel, height, width)`; None is the MLP.
        values: other fields of `VAESettings`.

    Raises:
        ValueError: a setting has a wrong value, or a size is not positive.

    """

    name = "vae"
    Settings = VAESettings

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        capsules: int,
        capsule_dim: int,
        *,
        z_encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        **values,
    ):
        super().__init__(image_shape, self.Settings(capsules=capsules, capsule_dim=capsule_dim, **values))
        self.rolls = Neighborhood()  # one position a frame, which is how the baselines are measured
        n = self.settings.capsules * self.settings.capsule_dim
        self.z_encoder = self.mlp_encoder(2 * n) if z_encoder is None else z_encoder
        self.decoder = self.mlp_decoder() if decoder is None else decoder

    def posterior(self, x: Images) -> tuple[Normal]:
        """Return `q(z|x)`, of shape `(B, S, C, D)`."""
        return (gaussian(self.encoded(self.z_encoder, x, self.capsule_shape)),)

    def topography(self, z: Capsules, axis: Axis | None = None) -> Capsules:
        """Return the capsules `t` of their Gaussian variables; without topography `t = z`."""
        return z

    def drawn(self, q: Normal, batch: SequenceBatch) -> Capsules:
        """Draw one sample of `q(z|x)`; processes that share a batch draw the noise of all of it, and take theirs."""
        count = len(q.mean)
        noise = torch.randn(batch.total or count, *q.mean.shape[1:], dtype=q.mean.dtype, device=q.mean.device)
        return q.mean + noise[batch.first : batch.first + count] * q.stddev

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the evidence lower bound of every frame, and its terms; in training less a penalty.

        Raises:
            ValueError: training needs the whole batch, and got a part of it.

        """
        self.check_whole(batch)
        (q,) = self.posterior(batch.images)
        elbo = self.bound(batch, self.drawn(q, batch), {"kl_z": kl_from_prior(q)})
        return self.regularised(elbo, q) if self.training else elbo

    def regularised(self, elbo: ELBO, q: Normal) -> ELBO:
        """Change what training maximises: here nothing. A rival subtracts a penalty, with noise drawn after `z`'s."""
        return elbo

    def encode(self, batch: SequenceBatch, sample: bool = True) -> Capsules:
        """Return `z` at a sample of the posterior, or at its mean."""
        (q,) = self.posterior(batch.images)
        return q.rsample() if sample else q.mean

    def sample(self, sequences: int, time: int, axis: Axis | None = None) -> Images:
        """Draw images of `sequences` sequences of `time` frames from the prior, on the model's device."""
        z = torch.randn(sequences, time, *self.capsule_shape, device=next(self.parameters()).device)
        return self.likelihood.mean(self.decode(z))
