"""A source of one's own: a dot that moves to the right, of which nothing else is known: no factors and no labels."""

import sys

import torch
import torch.nn.functional as F

from tvae.cli import main
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.data import SequenceSource, register
from tvae.models import TVAE
from tvae.presets import PRESETS, Preset
from tvae_kernels import Neighborhood


@register
class Dots(SequenceSource):
    """A red, green or blue dot at every place of 6 rows and 8 columns: 144 examples."""

    name = "dots"
    image_shape = (3, 6, 8)
    sequence_length = 8

    def __len__(self) -> int:
        return 3 * 6 * 8

    def render(self, examples: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Draw frames (B, S, 3, 6, 8), in each of which the dot is one column further, in a circle."""
        time = torch.arange(self.sequence_length, device=examples.device)
        place = 8 * (examples // 8)[:, None] + (examples[:, None] + time) % 8
        return F.one_hot(place, len(self)).float().unflatten(-1, self.image_shape)


PRESETS["dots-tvae"] = Preset(
    Config(
        DataSettings("dots"),
        TVAE.Settings(4, 8, neighborhood=Neighborhood(4, 1)),
        TrainingSettings(optimizer="adam", learning_rate=1e-3, steps=1000),
    ),
    "TVAE of moving dots",
)

if __name__ == "__main__":
    sys.exit(main())
