"""Sprites drawn from formulas, in the manner of dSprites: one white shape on black, binary, 64x64.

This is not the dSprites data set. Shapes, factors and grid sizes follow it, but every sprite is drawn here, from the
sign of an implicit function at the pixel centres. Nothing is antialiased, and no pixel centre comes near an outline, so
the same bits come out everywhere. One unit of the plane is one pixel; x points right, y points up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .sequences import Factor, FactorGrid

IMAGE_SIZE = 64
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0)
ORIENTATIONS = tuple(2 * math.pi * (2 * j) / 39 for j in range(15))  # radians, counter-clockwise
POSITIONS = 15  # along each axis
STEP = 2  # pixels between neighbouring positions


def square(x: Tensor, y: Tensor) -> Tensor:
    """Square of half-side 12.1: max(|x|, |y|) / 12.1 - 1, negative inside."""
    return torch.maximum(x.abs(), y.abs()) / 12.1 - 1


def ellipse(x: Tensor, y: Tensor) -> Tensor:
    """Ellipse of half-axes 16.5 (along x) and 10: (x / 16.5)^2 + (y / 10)^2 - 1, negative inside."""
    return (x / 16.5).square() + (y / 10).square() - 1


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Heart, tip down: a square of half-side 8.5 standing on a corner, and a disc on each of its upper sides."""
    u, v = (x + y) / (8.5 * math.sqrt(2)), (y - x) / (8.5 * math.sqrt(2))
    corner = torch.maximum(u.abs(), v.abs()) - 1
    right = (u - 1).square() + v.square() - 1
    left = u.square() + (v - 1).square() - 1
    return torch.minimum(corner, torch.minimum(right, left))


# Sizes with a purpose: no shape reaches further than 17.2 pixels from its centre, so that each fits the image at every
# position, and no two orientations give the same pixels, although the square turns into itself by 90 degrees.
SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (square, ellipse, heart)


def implicit(shape: int, scale: float, orientation: float, size: int) -> Tensor:
    """Implicit function of a sprite in the middle of an image, at the pixel centres: (size, size) float64."""
    centres = torch.arange(size, dtype=torch.float64, device="cpu") - (size - 1) / 2
    x, y = centres[None, :], -centres[:, None]  # rows grow downwards
    cos, sin = math.cos(orientation), math.sin(orientation)
    return SHAPES[shape]((cos * x + sin * y) / scale, (cos * y - sin * x) / scale)


def draw_canvases() -> Tensor:
    """Each sprite in the middle of a canvas that overhangs the image: (shape, scale, orientation, 92, 92) uint8.

    A frame is a 64x64 window of its canvas, so 225 drawings (1.9 MB) serve all 50,625 poses.
    """
    size = IMAGE_SIZE + (POSITIONS - 1) * STEP
    sprites = [
        implicit(shape, scale, orientation, size) < 0
        for shape in range(len(SHAPES))
        for scale in SCALES
        for orientation in ORIENTATIONS
    ]
    grid = (len(SHAPES), len(SCALES), len(ORIENTATIONS))
    return torch.stack(sprites).to(torch.uint8).unflatten(0, grid)


def cut_frames(canvases: Tensor, poses: Tensor) -> Tensor:
    """Frames (..., 64, 64) of the poses (..., 5): shape, scale, orientation, x (from the left), y (from the top)."""
    windows = canvases.unfold(3, IMAGE_SIZE, STEP).unfold(4, IMAGE_SIZE, STEP)  # (..., top, left, 64, 64), a view
    shape, scale, orientation, x, y = poses.unbind(-1)
    # The further right the window, the further left the sprite in it.
    return windows[shape, scale, orientation, POSITIONS - 1 - y, POSITIONS - 1 - x]


class SpriteGrid(FactorGrid):
    """A source of sprites in the manner of dSprites, whose examples are combinations of factors: the starting poses.

    Factors: shape (0 square, 1 ellipse, 2 heart), which no sequence advances; scale, 1 being the largest; orientation
    in radians; x and y in dSprites' unit, 0..1 for its 32 positions, from the left and from the top. The index of an
    example has the five factors as its digits, shape first. All splits are the same 50,625 examples.
    """

    classes = ("square", "ellipse", "heart")
    image_shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    sequence_length = 15
    factors = (
        Factor("shape", (0, 1, 2), transforms=False),
        Factor("scale", SCALES),
        Factor("orientation", ORIENTATIONS),
        Factor("x", tuple(2 * j / 31 for j in range(POSITIONS))),
        Factor("y", tuple(2 * j / 31 for j in range(POSITIONS))),
    )

    def label(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Return the shapes."""
        return factors[:, 0, 0]


class SpriteSequences(SpriteGrid):
    """Sprites drawn by formulas in the manner of dSprites, not dSprites itself; no file is needed.

    One step in x or y moves the sprite by two pixels.
    """

    name = "sprites"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._canvases = draw_canvases().to(self.device)

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 1, 64, 64), zeros and ones; the factors alone decide."""
        return cut_frames(self._canvases, factors)[:, :, None].float()


class SpriteShifts(SpriteSequences):
    """Sprites that move along x or along y, in every scale and orientation: for capsules of two axes."""

    name = "sprites-shifts"
    factors = tuple(replace(factor, transforms=factor.name in ("x", "y")) for factor in SpriteGrid.factors)
