"""The VAE whose divergence from the prior weighs more: beta-VAE."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch.distributions import Normal

from ..settings import Number, settings
from .base import ELBO
from .vae import VAE


@settings
class BetaVAESettings(VAE.Settings):
    """Settings of the beta-VAE."""

    beta: Annotated[Number, Field(ge=0)] = 4.0
    """Weight of the divergence from the prior in training; 1 is the VAE."""


class BetaVAE(VAE):
    """The VAE trained on `log p(x|z) - beta · KL(q(z|x) || N(0, I))` (Higgins et al. 2017, Eq. 4).

    The bound itself, and so what it is evaluated by, weighs the divergence by 1.

    Args:
        arguments: as those of `VAE`, and the fields of `BetaVAESettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "betavae"
    Settings = BetaVAESettings

    def regularised(self, elbo: ELBO, q: Normal) -> ELBO:
        """Subtract `(beta - 1) · KL` of every frame."""
        return elbo.penalised((self.settings.beta - 1) * elbo.terms["kl_z"])
