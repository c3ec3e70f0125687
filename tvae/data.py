"""Sequences of transformed images: where they come from (sources) and in which order (the stream).

A source turns examples and factors of variation into frames. The stream draws, from a seed, which examples stand in
batch i, which factor advances in each sequence and where it starts. The draws are made on the CPU and the frames are
rendered on the source's device, so that one seed means the same sequences on every machine.
"""

import colorsys
import itertools
import math
import os
import urllib.request
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tvae import sprites

SOURCES = (
    "sprites",
    "sprites-shifts",
    "dsprites",
    "mnist",
    "mnist-rotation-hue",
    "mnist-perspective-hue",
    "mnist-still",
)
SPLITS = ("train", "validation", "test")
_SPLIT, _EPOCH, _BATCH = range(3)  # what a generator is for


class DataError(RuntimeError):
    """Data that is missing or is not what it should be. The message says where, what was found, and what to do."""


class SequenceBatch(NamedTuple):
    """A batch of B sequences of S frames, on the source's device."""

    images: Tensor  # (B, S, channel, height, width) float32 in [0, 1]
    factors: Tensor  # (B, S, F) int64: index of each factor of variation in each frame
    transformation: Tensor  # (B,) int64: which factor advances in the sequence (the first, where several do)
    axis: Tensor  # (B,) int64: its number among the source's transformations, for capsules with an axis for each


@dataclass(frozen=True)
class Factor:
    """A factor of variation: its name, the value behind each of its indices, and whether a sequence may advance it."""

    name: str
    values: tuple[float, ...]
    transforms: bool = True


class SequenceSource(ABC):
    """Examples, and the frames that they give at each setting of the factors of variation."""

    name: ClassVar[str]
    image_shape: ClassVar[tuple[int, int, int]]  # channel, height, width
    sequence_length: ClassVar[int]
    factors: ClassVar[tuple[Factor, ...]]
    combined: ClassVar[bool] = False  # a sequence advances all factors that transform at once, not one of them
    device: torch.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each factor."""
        return tuple(len(factor.values) for factor in self.factors)

    @property
    def transformations(self) -> dict[int, str]:
        """Names of the transformations, by the index of the factor that a sequence advances (the first of several)."""
        names = {index: factor.name for index, factor in enumerate(self.factors) if factor.transforms}
        return {min(names): " + ".join(names.values())} if self.combined else names

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Factors (B, F) of the first frames of sequences of the examples (B,), all on the CPU."""

    @abstractmethod
    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Frames (B, S, channel, height, width) of the examples (B,) at the factors (B, S, F), on the device."""

    def sequences(self, examples: Tensor, starts: Tensor, transformation: Tensor) -> SequenceBatch:
        """Sequences from the starts (B, F): the factor `transformation` (B,) advances by one a frame, modulo its size.

        Where transformations are combined all factors that transform advance. The arguments are on the CPU, the batch
        is on the source's device.
        """
        factors = self.advance(starts, transformation).to(self.device)
        images = self.render(examples.to(self.device), factors)
        axis = self.axis(transformation).to(self.device)
        return SequenceBatch(images, factors, transformation.to(self.device), axis)

    def axis(self, transformation: Tensor) -> Tensor:
        """The numbers (B,) of transformations (B,) among those of the source, from 0; on the CPU."""
        return torch.searchsorted(torch.tensor(sorted(self.transformations)), transformation)

    def advance(self, starts: Tensor, transformation: Tensor) -> Tensor:
        """Factors (B, S, F) of every frame of the sequences that `sequences` makes, all on the CPU."""
        step = F.one_hot(transformation, len(self.factors))[:, None]
        if self.combined:
            step = torch.tensor([[[int(factor.transforms) for factor in self.factors]]])
        time = torch.arange(self.sequence_length)[:, None]
        return (starts[:, None] + time * step) % torch.tensor(self.sizes)


class SequenceStream(Dataset[SequenceBatch]):
    """An endless, seeded stream: `stream[i]` is batch number i, a pure function of (source, batch_size, seed, i).

    Any number of workers and a resumed run therefore see the same batches:

        DataLoader(stream, batch_size=None, num_workers=n, sampler=range(first, last))

    (With workers the source must be on the CPU: a forked process cannot use the GPU.) An epoch visits each example
    once, in a random order, and leaves out the last, incomplete batch.
    Start poses and transformations are drawn uniformly, anew for each batch.

    Where several processes share every batch, `rank` is the number of this one and `processes` how many there are: it
    then draws for the whole batch, but renders the part of it alone, `part`, that is its own.

    Raises ValueError for a batch_size that the examples cannot fill, or that the processes cannot share equally.
    """

    def __init__(self, source: SequenceSource, batch_size: int, seed: int, rank: int = 0, processes: int = 1):
        if not 1 <= batch_size <= len(source):
            raise ValueError(
                f"batch_size must be between 1 and the {len(source)} examples of {source.name}, got {batch_size}"
            )
        if batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {batch_size}")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        share = batch_size // processes
        self.part = slice(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in one pass over the examples."""
        return len(self.source) // self.batch_size

    def __getitem__(self, i: int) -> SequenceBatch:
        return self.source.sequences(*self.draw(i))

    def draw(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """What decides batch i, on the CPU: examples (B,), starts (B, F) and transformation (B,)."""
        if i < 0:
            raise IndexError(f"an endless stream has no batch {i}")
        epoch, step = divmod(i, self.steps_per_epoch)
        examples = self._examples_of(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        generator = _generator(self.seed, _BATCH, i)
        choices = torch.tensor(list(self.source.transformations))
        transformation = choices[torch.randint(len(choices), (self.batch_size,), generator=generator)]
        starts = self.source.start_poses(examples, generator)
        return examples[self.part], starts[self.part], transformation[self.part]

    def _examples_of(self, epoch: int) -> Tensor:
        """Examples in the epoch's order; the last epoch asked for is kept."""
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.source), generator=_generator(self.seed, _EPOCH, epoch))
            self._epoch = epoch
        return self._order


def _generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """CPU generator for draw number `index` of a purpose, unlike that of any neighbour: SeedSequence mixes well."""
    # 32 bits: torch's CPU generator ignores the others.
    (state,) = np.random.SeedSequence(seed, spawn_key=(purpose, index)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state))


# The paper's scales, in per cent of the original size.
_MNIST_SCALES = (60, 64, 68, 72, 76, 79, 83, 87, 91, 95, 99, 103, 107, 111, 114, 118, 122, 126)


_DEGREES = tuple(range(0, 360, 20))


class MNISTSequences(SequenceSource):
    """MNIST digits in the red channel of 3x28x28 images, rotated, scaled and recoloured; an example is a digit.

    Factors: rotation in degrees, counter-clockwise; scale, 1 being the original size; hue in degrees, 0 being red.
    "train" is 80 % of MNIST's training images (48,000) and "validation" the others, by a shuffle that no run's seed
    changes; "test" is MNIST's test images. They are kept as bytes on the device.

    Raises ValueError for an unknown split and DataError if MNIST cannot be read from data_dir/MNIST/raw.
    """

    name = "mnist"
    image_shape = (3, 28, 28)
    sequence_length = 18
    factors = (
        Factor("rotation", _DEGREES),
        Factor("scale", tuple(percent / 100 for percent in _MNIST_SCALES)),
        Factor("hue", _DEGREES),
    )

    def __init__(self, data_dir: str | Path, split: str, device: torch.device | str = "cpu", download: bool = False):
        self.device = torch.device(device)
        self.images = _mnist_images(Path(data_dir), split, download).to(self.device)  # (example, 28, 28) uint8
        angle = torch.tensor(self.factors[0].values, dtype=torch.float64).deg2rad()
        self._cos, self._sin = angle.cos().float().to(self.device), angle.sin().float().to(self.device)
        self._scale = torch.tensor(self.factors[1].values, device=self.device)
        hue = self.factors[-1].values
        self._colour = torch.tensor([colorsys.hsv_to_rgb(h / 360, 1.0, 1.0) for h in hue], device=self.device)

    def __len__(self) -> int:
        return len(self.images)

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform draws (B, F), independent of the examples."""
        return torch.stack([torch.randint(n, examples.shape, generator=generator) for n in self.sizes], dim=-1)

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Frames (B, S, 3, 28, 28): the digit warped about the image's centre (bilinear, zeros outside), then coloured.

        A pixel of the red image is (g, 0, 0): hue 0, full saturation, value g. Turning its hue by h gives the
        colour of hue h, full saturation and value g, which is g times the colour of value 1: a product.
        """
        x, y = self._origins(*factors[..., :-1, None, None].unbind(2))
        frames = _sample(self.images[examples] / 255, x, y)
        return frames[:, :, None] * self._colour[factors[..., -1]][..., None, None]

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Centres of the pixels of a frame, from -1 to 1: x (1, 28) to the right and y (28, 1) down."""
        centres = (torch.arange(28, device=self.device) + 0.5) * 2 / 28 - 1
        return centres[None, :], centres[:, None]

    def _origins(self, rotation: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the digit each pixel of a frame comes from, x and y (B, S, 28, 28), at poses (B, S, 1, 1)."""
        # The inverse rotation (y points down), about the centre, over the scale. Written out, because the matrix
        # product in affine_grid would round by batch size, threads and TF32 settings.
        x, y = self._pixels()
        cos, sin = self._cos[rotation] / self._scale[scale], self._sin[rotation] / self._scale[scale]
        return cos * x - sin * y, sin * x + cos * y


class MNISTRotationHueSequences(MNISTSequences):
    """MNIST digits that turn and change colour in the same sequence (Fig. 1, B.4 and Fig. 18), at their own size.

    Rotation and hue start anywhere, each by itself, and advance together. Otherwise as `MNISTSequences`.
    """

    name = "mnist-rotation-hue"
    factors = (Factor("rotation", _DEGREES), Factor("scale", (1.0,), transforms=False), Factor("hue", _DEGREES))
    combined = True


class MNISTPerspectiveHueSequences(MNISTSequences):
    """MNIST digits that turn in space and change colour in the same sequence (Fig. 19). Otherwise as `MNISTSequences`.

    Factors: perspective and hue, in degrees, which advance together, and the one scale. At the angle a the digit has
    turned by a clockwise in its plane, then by a about its vertical axis, seen by a camera at the distance
    `d / (2 sin a)` for an image of diagonal d, as in the published code. (There the plane lies one pixel in front of
    the axis, and the centre of rotation is half a pixel off.)
    """

    name = "mnist-perspective-hue"
    factors = (Factor("perspective", _DEGREES), Factor("scale", (1.0,), transforms=False), Factor("hue", _DEGREES))
    combined = True

    def _origins(self, perspective: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Where in the digit each pixel of a frame comes from, x and y (B, S, 28, 28), at poses (B, S, 1, 1).

        A point (a, b) of the digit, turned in its plane, is seen at `(cos · a, b) / (1 + near · a)` with
        `near = sin² / √2`, the diagonal being 2√2 for pixels from -1 to 1; solved for (a, b), and turned back.
        """
        x, y = self._pixels()
        cos, sin = self._cos[perspective], self._sin[perspective]
        depth = cos - sin.square() / math.sqrt(2) * x  # of another sign than cos only for points outside of the digit
        a, b = x / depth, y * cos / depth
        return cos * a + sin * b, cos * b - sin * a


class MNISTDigits(MNISTSequences):
    """MNIST digits as they are, 1x28x28: sequences of one frame, for models without time (section 6.2)."""

    name = "mnist-still"
    image_shape = (1, 28, 28)
    sequence_length = 1
    factors = (Factor("rotation", (0,)), Factor("scale", (1.0,)), Factor("hue", (0,)))

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Frames (B, 1, 1, 28, 28), whatever the factors, which have one value each."""
        return (self.images[examples] / 255)[:, None, None]


_MNIST = {
    source.name: source
    for source in (MNISTSequences, MNISTRotationHueSequences, MNISTPerspectiveHueSequences, MNISTDigits)
}


def _sample(digits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Frames (B, S, 28, 28): the digits (B, 28, 28) at the points x, y (B, S, 28, 28), bilinear, zeros outside."""
    # The frames of a sequence are sampled as one tall image, so that its digit need not be copied for each.
    grid = torch.stack((x, y), dim=-1).flatten(1, 2)
    return F.grid_sample(digits[:, None], grid, align_corners=False).view(x.shape)


def _mnist_images(data_dir: Path, split: str, download: bool) -> Tensor:
    """Images of one split, (N, 28, 28) uint8 on the CPU."""
    _check_choice("split", split, SPLITS)
    # Here and not above: the other sources must work where torchvision is missing or does not fit torch.
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"MNIST is read by torchvision, which cannot be imported here ({error}); "
            "install the torchvision that belongs to this torch"
        ) from error
    try:
        images = MNIST(data_dir, train=split != "test", download=download).data
    except Exception as error:  # a damaged file fails in any of half a dozen ways, bare assertions among them
        raise DataError(
            f"cannot read MNIST from {data_dir / 'MNIST' / 'raw'} ({error!r}); "
            "pass --data-dir with the folder that holds MNIST/raw, or allow the download"
        ) from error
    if split == "test":
        return images
    order = torch.randperm(len(images), generator=_generator(0, _SPLIT, 0))
    cut = len(images) * 4 // 5
    return images[order[:cut] if split == "train" else order[cut:]]


class _SpriteSource(SequenceSource):
    """What the two sources of sprites share: an example is a combination of factors, its starting pose.

    Factors: shape (0 square, 1 ellipse, 2 heart), which no sequence advances; scale, 1 being the largest; orientation
    in radians; x and y in dSprites' unit, 0..1 for its 32 positions, from the left and from the top. The index of an
    example has the five factors as its digits, shape first. All splits are the same 50,625 examples.
    """

    image_shape = (1, sprites.IMAGE_SIZE, sprites.IMAGE_SIZE)
    sequence_length = 15
    factors = (
        Factor("shape", (0, 1, 2), transforms=False),
        Factor("scale", sprites.SCALES),
        Factor("orientation", sprites.ORIENTATIONS),
        Factor("x", tuple(2 * j / 31 for j in range(sprites.POSITIONS))),
        Factor("y", tuple(2 * j / 31 for j in range(sprites.POSITIONS))),
    )

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Factors (B, F) that the examples stand for; nothing is drawn."""
        return torch.stack(torch.unravel_index(examples, self.sizes), dim=-1)


class SpriteSequences(_SpriteSource):
    """Sprites drawn by `tvae.sprites` in the manner of dSprites, not dSprites itself; no file is needed.

    One step in x or y moves the sprite by two pixels.
    """

    name = "sprites"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._canvases = sprites.draw_canvases().to(self.device)

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Frames (B, S, 1, 64, 64), zeros and ones; the factors alone decide."""
        return sprites.cut_frames(self._canvases, factors)[:, :, None].float()


class SpriteShifts(SpriteSequences):
    """Sprites that move along x or along y, in every scale and orientation: for capsules of two axes."""

    name = "sprites-shifts"
    factors = tuple(replace(factor, transforms=factor.name in ("x", "y")) for factor in _SpriteSource.factors)


_SPRITES = {source.name: source for source in (SpriteSequences, SpriteShifts)}
_DSPRITES_URL = (
    "https://github.com/google-deepmind/dsprites-dataset/raw/master/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
)


class DSpritesSequences(_SpriteSource):
    """The subset of dSprites (Matthey et al. 2017) that the paper uses.

    It keeps the 5 largest of the 6 scales, and every other one of the first 30 orientations, x and y positions. Read
    from `data_dir/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`: the 2.8 GiB of pixels in it pass through in pieces
    of 4 MiB, and the subset is kept on the device with eight pixels in a byte, 26 MB.

    Raises DataError if the file is missing and not allowed to be downloaded, or is not what it should be.
    """

    name = "dsprites"

    def __init__(self, data_dir: str | Path, device: torch.device | str = "cpu", download: bool = False):
        self.device = torch.device(device)
        path = self.file(data_dir)
        if not path.exists():
            if not download:
                raise DataError(
                    f"no {path.name} in {path.parent}; pass --data-dir with the folder that holds it, "
                    "or allow the download"
                )
            _download(_DSPRITES_URL, path)
        every_other = range(0, 30, 2)
        kept = (range(3), range(1, 6), every_other, every_other, every_other)
        self._packed = torch.from_numpy(_read_dsprites(path, (3, 6, 40, 32, 32), kept)).to(self.device)

    @staticmethod
    def file(data_dir: str | Path) -> Path:
        """Where the data is read from."""
        return Path(data_dir) / _DSPRITES_URL.rpartition("/")[2]

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Frames (B, S, 1, 64, 64), zeros and ones; the factors alone decide."""
        packed = self._packed[factors.unbind(-1)][..., None]  # (B, S, 512, 1)
        bits = packed >> torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device) & 1
        return bits.reshape(*factors.shape[:2], *self.image_shape).float()


def _read_dsprites(path: Path, sizes: tuple[int, ...], kept: tuple[range, ...]) -> np.ndarray:
    """Part of a dSprites file: (number kept of each factor, 512) uint8, the 64x64 pixels packed by np.packbits.

    `sizes` and `kept` are, for shape, scale, orientation, x and y, the number of values in the file, where the last
    varies fastest, and the indices to keep. The file is read to its end, which verifies the checksum of the images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if "imgs.npy" not in archive.namelist():
                raise DataError(f"{path} should contain imgs.npy, found {archive.namelist()}")
            with archive.open("imgs.npy") as member:
                _check_npy_header(path, member, (math.prod(sizes), 64, 64))
                packed = _pack_images(member, sizes, kept)
                if member.read(1):
                    raise DataError(f"{path}: imgs.npy goes on after its last image")
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError) as error:
        raise DataError(f"{path} is not a whole dSprites archive ({error}); delete it and download it again") from error
    return packed


def _check_npy_header(path: Path, member: IO[bytes], shape: tuple[int, ...]) -> None:
    """Read the header of imgs.npy, which must announce bytes of that shape in C order."""
    np.lib.format.read_magic(member)
    found_shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    if (found_shape, fortran_order, dtype) != (shape, False, np.uint8):
        order = "Fortran" if fortran_order else "C"
        raise DataError(
            f"{path}: imgs.npy should be uint8 {shape} in C order, found {dtype} {found_shape} in {order} order"
        )


def _pack_images(member: IO[bytes], sizes: tuple[int, ...], kept: tuple[range, ...]) -> np.ndarray:
    """Read all images of imgs.npy, the positions of one sprite at a time, and pack the kept ones."""
    *sprite_sizes, columns, rows = sizes
    pieces = []
    for sprite in itertools.product(*map(range, sprite_sizes)):
        piece = np.frombuffer(member.read(columns * rows * 64 * 64), np.uint8).reshape(columns, rows, 64 * 64)
        if all(index in keep for index, keep in zip(sprite, kept[:3], strict=True)):
            pieces.append(np.packbits(piece[np.ix_(*kept[3:])], axis=-1))
    return np.stack(pieces).reshape(*map(len, kept), 64 * 64 // 8)


def _download(url: str, path: Path) -> None:
    """Download a file, which appears under its name only once it is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(url, partial)  # raises if it gets less than the server announced
        partial.replace(path)
    except (OSError, HTTPException) as error:
        raise DataError(f"cannot download {url} to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def open_source(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> SequenceSource:
    """Source of that name: "sprites" needs no files, the others are read from data_dir; see their classes.

    Raises ValueError for an unknown name or split, DataError for data that is missing or damaged.
    """
    _check_choice("source", name, SOURCES)
    _check_choice("split", split, SPLITS)
    if name in _SPRITES:
        return _SPRITES[name](device)
    if data_dir is None:
        raise DataError(f"{name} is read from files: pass --data-dir with the folder that holds them")
    if name == "dsprites":
        return DSpritesSequences(data_dir, device, download)
    return _MNIST[name](data_dir, split, device, download)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
