"""Sequences that move along open paths, and potentials that are known, for the tests of flows."""

import torch
from torch import nn

from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings
from tvae.data import Factor, SequenceBatch, SequenceSource
from tvae.models.potentials import Walk

SHAPE = (1, 4, 4)
FRAMES = 4


class Moving(SequenceSource):
    """Patterns of 4x4 pixels that shift sideways, or downwards, or fade."""

    name = "moving"
    image_shape = SHAPE
    sequence_length = FRAMES
    open_paths = True
    factors = tuple(Factor(name, tuple(range(FRAMES))) for name in ("across", "down", "fading"))

    @classmethod
    def open(cls, split, data_dir, device, download):
        return cls(device)

    def __len__(self):
        return 64

    def start_poses(self, examples, generator):
        return torch.zeros(len(examples), 3, dtype=torch.int64)

    def render(self, examples, factors):
        across, down, fading = factors[..., None, None].unbind(2)
        x, y = torch.arange(4, device=self.device), torch.arange(4, device=self.device)[:, None]
        pixels = ((x - across) ** 2 + 3 * (y - down) + examples[:, None, None, None] * (1 + x * y)) % 5 / 4
        return (pixels * 0.6**fading)[:, :, None]


def configuration(model, **training):
    """A run of a model of `Moving`, which a test has registered."""
    values = {"batch_size": 4, "steps": 8, "learning_rate": 1e-3, "optimizer": "adam", "seed": 3} | training
    return Config(DataSettings("moving"), model, TrainingSettings(**values), EvaluationSettings(8, 2))


def batch_of(count, dtype=torch.float32, frames=FRAMES):
    """Sequences of noise of the transformations 0, 1, 2, 0, ..."""
    return SequenceBatch(torch.rand(count, frames, *SHAPE, dtype=dtype), axis=torch.arange(count) % 3)


def followed(model, z, flow, frames=FRAMES):
    """All points on the way of sequences, each moved by one flow, taken as a mix of which all else is 0."""
    mix = torch.eye(model.settings.transformations, dtype=z.dtype)[flow]
    return model.follow(z, mix[:, None].expand(-1, frames - 1, -1))


class Known(nn.Module):
    """Potentials whose derivatives are functions of points `(P, N, n)`, times `(N, 1)` and numbers `(P, 1)`."""

    def __init__(self, **derivatives):
        super().__init__()
        self.derivatives = derivatives
        self.w = torch.zeros(0, dtype=torch.float64)

    def forward(self, z, time, chosen=None):
        numbers = torch.arange(len(z)) if chosen is None else chosen
        at = (z, time[:, None], numbers[:, None])
        return Values(**{name: function(*at) for name, function in self.derivatives.items()})

    def walk(self, z, times, length):
        points, gradients, rates = [z], [], []
        for time in times[:, None]:
            at = points[-1], time[:, None], torch.arange(len(z))[:, None]
            gradients.append(self.derivatives["gradient"](*at))
            rates.append(self.derivatives.get("rate", lambda z, t, k: torch.zeros(z.shape[:-1]))(*at))
            points.append(points[-1] + length * gradients[-1])
        return Walk(*(torch.stack(x, 2) for x in (points, gradients, rates)))


class Values:
    """What `Derivatives` would return."""

    def __init__(self, **values):
        for name, x in values.items():
            setattr(self, name, lambda x=x: x)
