"""Shapes that fill the frame: the sprites close up, of which a model learns more than where they are in minutes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import FactorGrid
from .sprites import SHAPES, SpriteGrid, implicit

_SIZE = 32
_FINE = 4  # times as many points along each side of a pixel, whose mean it is
_CLOSE = 0.88  # size of the largest, with which no shape reaches an edge


class ShapeSequences(FactorGrid):
    """A square, an ellipse or a heart in the middle of a frame, which grows or turns; no file is needed.

    Frames are 1x32x32, white on black, grey at the edges. Factors: shape, which no sequence advances; scale, 1 being
    the largest, and orientation in radians, counter-clockwise, with the values of the sprites. A sequence of 15 frames
    passes the orientations once, and the scales three times. The index of an example has the three factors as its
    digits, shape first. All splits are the same 225 examples.
    """

    name = "shapes"
    classes = SpriteGrid.classes
    image_shape = (1, _SIZE, _SIZE)
    sequence_length = SpriteGrid.sequence_length
    factors = SpriteGrid.factors[:3]

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(device)
        self._drawings = draw_shapes().to(self.device)

    def label(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Return the shapes."""
        return factors[:, 0, 0]

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 1, 32, 32); the factors alone decide."""
        return self._drawings[factors.unbind(-1)][:, :, None]


def draw_shapes() -> Tensor:
    """Draw every shape at every scale and orientation: (3, 5, 15, 32, 32) float32, the part of a pixel that is inside.

    It is counted on a grid of 4 x 4 points, of which none comes near an outline: the same bits come out everywhere.
    """
    _, scales, orientations = (factor.values for factor in ShapeSequences.factors)
    inside = [
        implicit(shape, _FINE * _CLOSE * scale, orientation, _FINE * _SIZE) < 0
        for shape in range(len(SHAPES))
        for scale in scales
        for orientation in orientations
    ]
    drawings = F.avg_pool2d(torch.stack(inside).float(), _FINE)
    return drawings.unflatten(0, (len(SHAPES), len(scales), len(orientations)))
