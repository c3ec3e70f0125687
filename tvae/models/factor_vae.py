"""The VAE whose latent variables are independent of each other over the data: FactorVAE."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

from ..settings import Count, Number, settings
from .base import ELBO
from .vae import VAE

_LAYERS = 6
_SLOPE = 0.2  # of a leaky ReLU, below 0
_TRAINING = {"lr": 1e-4, "betas": (0.5, 0.9)}  # of the discriminator


@settings
class FactorVAESettings(VAE.Settings):
    """Settings of the FactorVAE."""

    gamma: Annotated[Number, Field(ge=0)] = 10.0
    """Weight of the total correlation of the latent variables; 0 is the VAE."""
    units: Count = 1000
    """Units of each of the six hidden layers of the discriminator."""


class FactorVAE(VAE):
    """The VAE trained on its bound less `gamma` times the total correlation of `z` (Kim & Mnih 2018, Eq. 2).

    The total correlation `KL(q(z) || Π_d q(z_d))` of the aggregate over frames is the mean of the logit of a
    discriminator, which learns beside the model, with Adam at 1e-4, to tell `z` from `z` whose variables were permuted
    each by itself over the frames of the batch (Algorithm 2; here of the same batch and in the same step). The model
    is penalised by a discriminator that stands still, the discriminator learns from samples that do: one backward pass
    gives each player its own gradient.

    Args:
        discriminator: from latent variables `(N, C·D)` to one logit `(N, 1)`; None is six layers of leaky ReLUs.
        arguments: as those of `VAE`, and the fields of `FactorVAESettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "factorvae"
    Settings = FactorVAESettings
    one_process: ClassVar[bool] = True
    unconstrained: ClassVar[tuple[str, ...]] = ("discriminator",)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        capsules: int,
        capsule_dim: int,
        *,
        discriminator: nn.Module | None = None,
        **arguments,
    ):
        super().__init__(image_shape, capsules, capsule_dim, **arguments)
        # After the other networks, which are then those of a VAE of the same seed.
        n, units = self.settings.capsules * self.settings.capsule_dim, self.settings.units
        self.discriminator = _discriminator(n, units) if discriminator is None else discriminator

    def parameter_groups(self) -> list[dict]:
        """Return the parameters of the VAE, and those of the discriminator with a learning rate of their own."""
        apart = list(self.discriminator.parameters())
        known = set(map(id, apart))
        return [{"params": [p for p in self.parameters() if id(p) not in known]}, {"params": apart, **_TRAINING}]

    def regularised(self, elbo: ELBO, q: Normal) -> ELBO:
        """Subtract `gamma` times the logit of every frame, and the discriminator's loss."""
        z = elbo.t.flatten(0, 1).flatten(1)
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        correlation = functional_call(self.discriminator, still, (z,))
        found = F.softplus(-self.discriminator(z.detach())) + F.softplus(self.discriminator(permuted(z.detach())))
        correlation, loss = (x.view(elbo.total.shape) for x in (correlation.to(z.dtype), found.to(z.dtype) / 2))
        penalty = self.settings.gamma * correlation + loss
        return elbo.penalised(penalty, total_correlation=correlation, discriminator_loss=loss)


def permuted(z: Float[Tensor, "frame latent"]) -> Float[Tensor, "frame latent"]:
    """Permute every latent variable by itself over the frames: samples of the product of their distributions."""
    return z.gather(0, torch.rand(z.shape, device=z.device).argsort(0))


def _discriminator(inputs: int, units: int) -> nn.Sequential:
    layers = []
    for size in (inputs, *[units] * (_LAYERS - 1)):
        layers += [nn.Linear(size, units), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers, nn.Linear(units, 1))
