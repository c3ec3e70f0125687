"""A model of one's own: a VAE whose capsules shall change little from frame to frame."""

import sys

import torch.nn.functional as F

from tvae.cli import main
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.data import SequenceBatch
from tvae.models import ELBO, VAE, register, settings
from tvae.presets import PRESETS, Preset


@settings
class CalmSettings(VAE.Settings):
    """Settings of the calm VAE: those of the VAE, and one more."""

    beta: float = 0.5
    """Nats that a squared change of capsules by one costs."""


@register
class CalmVAE(VAE):
    """A VAE that pays for every change of its capsules."""

    name = "slow"
    Settings = CalmSettings

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return the bound of the VAE, and as the objective the bound less the penalty."""
        elbo = super().forward(batch)
        changes = elbo.t.diff(dim=1).square().sum((-2, -1))
        penalty = self.settings.beta * F.pad(changes, (1, 0))  # nothing changes into the first frame
        return elbo._replace(terms={**elbo.terms, "penalty": penalty}, objective=elbo.objective - penalty)


PRESETS["sprites-slow"] = Preset(
    Config(
        DataSettings("sprites"),
        CalmSettings(15, 15, beta=2.0),
        TrainingSettings(optimizer="adam", learning_rate=5e-4, steps=1400),
    ),
    "VAE that pays for changes",
)

if __name__ == "__main__":
    sys.exit(main())
