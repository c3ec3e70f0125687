"""MNIST digits whose class is asked for whatever their poses: pairs of poses, and whole turns."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .mnist import MNISTSequences, sampled
from .sequences import Factor

_HALF_CIRCLE = range(-90, 91, 10)  # degrees
_PIXELS = (-3, -2, -1, 0, 1, 2, 3)


def _poses(
    rotation: range, scale: tuple[float, ...] = (1.0,), shift: tuple[int, ...] = (0,), turns: bool = False
) -> tuple[Factor, ...]:
    """List the factors of a pose, in the order in which they act."""
    rotations = Factor("rotation", tuple(rotation), turns)
    return rotations, *(Factor(name, x, False) for name, x in (("scale", scale), ("x", shift), ("y", shift)))


class MNISTPosedSequences(MNISTSequences):
    """Pairs of frames, 1x28x28, of one MNIST digit in two poses, each drawn by itself: nothing advances.

    Factors: rotation in degrees, counter-clockwise, from -90 to 90; scale, and shifts to the right and downwards in
    pixels, which have one value here. Each frame is made of the digit itself. Otherwise as `MNISTSequences`.
    """

    name = "mnist-posed"
    image_shape = (1, 28, 28)
    sequence_length = 2
    clustered = True
    factors = _poses(_HALF_CIRCLE)

    def __init__(self, data_dir: str | Path, split: str, device: torch.device | str = "cpu", download: bool = False):
        super().__init__(data_dir, split, device, download)
        self._shift = torch.tensor(self.factors[-1].values, dtype=torch.float32, device=self.device) * 2 / 28

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the factors (B, S, F) of all frames, each by itself, uniformly, all on the CPU."""
        frames = examples.repeat_interleave(self.sequence_length)
        return super().start_poses(frames, generator).unflatten(0, (len(examples), self.sequence_length))

    def advance(self, starts: Tensor, transformation: Tensor) -> Tensor:
        """Return the factors (B, S, F) of all frames as they were drawn."""
        return starts

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 1, 28, 28): the digit turned and scaled about the centre, then shifted."""
        rotation, scale, x, y = factors[..., None, None].unbind(2)
        (column, row), (column_off, row_off) = self._pixels(), (self._shift[x], self._shift[y])
        points = self._turned_back(column - column_off, row - row_off, rotation, scale)
        return sampled(self.images[examples].float() / 255, *points)[:, :, None]

    def canonical(self, examples: Tensor) -> Tensor:
        """Return the digits as they are, (B, 1, 28, 28)."""
        return self.images[examples][:, None].float() / 255


class MNISTShiftedSequences(MNISTPosedSequences):
    """Pairs of poses that are also shifted, by up to 3 pixels. Otherwise as `MNISTPosedSequences`."""

    name = "mnist-posed-shift"
    factors = _poses(_HALF_CIRCLE, shift=_PIXELS)


class MNISTScaledSequences(MNISTPosedSequences):
    """Pairs of poses that are shifted, and between 0.7 and 1.2 of their size. Otherwise as `MNISTPosedSequences`."""

    name = "mnist-posed-scale"
    factors = _poses(_HALF_CIRCLE, (0.7, 0.8, 0.9, 1.0, 1.1, 1.2), _PIXELS)


class MNISTTurningSequences(MNISTPosedSequences):
    """MNIST digits, 1x28x28, that turn by 20 degrees a frame, once around in 18 frames, from any angle.

    They are in all poses that a model might learn to see through, and go through them in order, as a topographic
    model or a flow wants them. Otherwise as `MNISTPosedSequences`.
    """

    name = "mnist-turning"
    sequence_length = 18
    factors = _poses(range(0, 360, 20), turns=True)

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the factors (B, F) of the first frames, uniformly, all on the CPU."""
        return super(MNISTPosedSequences, self).start_poses(examples, generator)

    def advance(self, starts: Tensor, transformation: Tensor) -> Tensor:
        """Return the factors (B, S, F) of digits that turn on and on."""
        return super(MNISTPosedSequences, self).advance(starts, transformation)
