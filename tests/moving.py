"""Sequences on open paths and models that mirror them, for the tests of how models move."""

import torch
import torch.nn.functional as F

from tvae import VAE
from tvae.data import Factor, SequenceSource

STEPS = (0, 1, 2, 3)
X, HUE = Factor("x", STEPS), Factor("hue", STEPS)


class Blocks(SequenceSource):
    """A pixel in one of four rows, 24 of different brightness; it moves to the right or goes through four colours."""

    name = "blocks"
    image_shape = (3, 4, 4)
    sequence_length = 4
    factors = (X, Factor("dim", (0, 1), transforms=False), HUE)
    open_paths = True
    examples = 24

    def __len__(self):
        return self.examples

    def start_poses(self, examples, generator):
        return torch.zeros(len(examples), len(self.factors), dtype=torch.int64)

    def render(self, examples, factors):
        x, _, hue = factors.unbind(-1)
        colour = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[hue]  # (B, S, 3)
        place = F.one_hot(4 * (examples % 4)[:, None] + x, 16).unflatten(-1, (4, 4))
        return (0.2 + 0.03 * examples)[:, None, None, None, None] * colour[..., None, None] * place[:, :, None]


class Lines(SequenceSource):
    """Images that are any numbers, in float64: of 40 examples, on which two transformations act affinely.

    The one takes `m` to `m + [m, 1] W_0` each time, the other with `W_1`; the first first, where both have acted.
    """

    name = "lines"
    image_shape = (1, 2, 3)
    sequence_length = 5
    factors = (Factor("x", range(5)), Factor("y", range(5)))
    open_paths = True
    scale = 1e3

    def __init__(self, maps):
        super().__init__()
        self.maps = maps  # (2, 7, 6)

    def __len__(self):
        return 40

    def start_poses(self, examples, generator):
        return torch.zeros(len(examples), 2, dtype=torch.int64)

    def start(self, examples):
        every = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return self.scale * every[examples]

    def render(self, examples, factors):
        m = self.start(examples)[:, None].expand(-1, factors.shape[1], -1)
        for kind, steps in enumerate(factors.unbind(-1)):
            for step in range(self.sequence_length):
                moved = m + F.pad(m, (0, 1), value=1.0) @ self.maps[kind]
                m = torch.where((step < steps)[..., None], moved, m)
        return m.unflatten(-1, self.image_shape)


class Mirror(VAE):
    """A model whose capsules are the images and whose images are the capsules; it has no motion of its own.

    It is a VAE for all that is drawn.
    """

    name = "mirror"

    def __init__(self, image_shape):
        channels, height, width = image_shape
        super().__init__(image_shape, channels, height * width, likelihood="gaussian")

    def encode(self, batch, sample=True):
        return super().encode(batch) if sample else batch.images.flatten(3)

    def decode(self, t):
        return t.unflatten(-1, self.image_shape[1:])


class Seer(Mirror):
    """A mirror that is told what moves a sequence, and knows how: its path is that of the images, and `error` off."""

    told_transformations = True

    def __init__(self, image_shape, error=0.0):
        super().__init__(image_shape)
        self.error, self.mixes = error, []

    def moved(self, batch, mix=None):
        self.mixes.append(mix)
        return self.encode(batch, sample=False) + self.error
