"""MNIST digits, and images of its format, that turn, grow, lean back in space and change colour."""

from __future__ import annotations

import colorsys
import math
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import SPLITS, DataError, Factor, SequenceSource, seeded_generator

# The paper's scales, in per cent of the original size.
_MNIST_SCALES = (60, 64, 68, 72, 76, 79, 83, 87, 91, 95, 99, 103, 107, 111, 114, 118, 122, 126)
_DEGREES = tuple(range(0, 360, 20))


class MNISTSequences(SequenceSource):
    """MNIST digits in the red channel of 3x28x28 images, rotated, scaled and recoloured; an example is a digit.

    Factors: rotation in degrees, counter-clockwise; scale, 1 being the original size; hue in degrees, 0 being red.
    "train" is 80 % of MNIST's training images (48,000) and "validation" the others, by a shuffle that no run's seed
    changes; "test" is MNIST's test images. They are kept as bytes on the device.

    Raises:
        ValueError: there is no such split.
        DataError: MNIST cannot be read from data_dir/MNIST/raw.

    """

    name = "mnist"
    files = "mnist"
    dataset: ClassVar[str] = "MNIST"  # the name of torchvision's class, and of the folder that it reads
    classes = tuple("0123456789")
    image_shape = (3, 28, 28)
    sequence_length = 18
    factors = (
        Factor("rotation", _DEGREES),
        Factor("scale", tuple(percent / 100 for percent in _MNIST_SCALES)),
        Factor("hue", _DEGREES),
    )

    def __init__(self, data_dir: str | Path, split: str, device: torch.device | str = "cpu", download: bool = False):
        self.device = torch.device(device)
        images, self.labels = _read_mnist(self.dataset, Path(data_dir), split, download)
        self.images = images.to(self.device)  # (example, 28, 28) uint8
        angle = torch.tensor(self.factors[0].values, dtype=torch.float64, device="cpu").deg2rad()
        self._cos, self._sin = angle.cos().float().to(self.device), angle.sin().float().to(self.device)
        self._scale = torch.tensor(self.factors[1].values, dtype=torch.float32, device=self.device)
        hue = next((factor.values for factor in self.factors if factor.name == "hue"), ())
        colours = [colorsys.hsv_to_rgb(h / 360, 1.0, 1.0) for h in hue]
        self._colour = torch.tensor(colours, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def open(cls, split: str, data_dir: Path, device: torch.device, download: bool) -> MNISTSequences:
        """Make the source of one split, as the class does."""
        return cls(data_dir, split, device, download)

    def label(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Return the digits that the examples show."""
        return self.labels[examples]

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 3, 28, 28): the digit warped about the centre (bilinear, zeros outside), then coloured.

        A pixel of the red image is (g, 0, 0): hue 0, full saturation, value g. Turning its hue by h gives the
        colour of hue h, full saturation and value g, which is g times the colour of value 1: a product.
        """
        x, y = self._origins(*factors[..., :-1, None, None].unbind(2))
        frames = sampled(self.images[examples].float() / 255, x, y)
        return frames[:, :, None] * self._colour[factors[..., -1]][..., None, None]

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Return the centres of the pixels of a frame, from -1 to 1: x (1, 28) to the right and y (28, 1) down."""
        centres = (torch.arange(28, dtype=torch.float32, device=self.device) + 0.5) * 2 / 28 - 1
        return centres[None, :], centres[:, None]

    def _origins(self, rotation: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Find where in the digit each pixel of a frame comes from, x and y (B, S, 28, 28), at poses (B, S, 1, 1)."""
        return self._turned_back(*self._pixels(), rotation, scale)

    def _turned_back(self, x: Tensor, y: Tensor, rotation: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Find where in the digit points x, y of a frame come from, at poses (B, S, 1, 1)."""
        # The inverse rotation (y points down), about the centre, over the scale. Written out, because the matrix
        # product in affine_grid would round by batch size, threads and TF32 settings.
        cos, sin = self._cos[rotation] / self._scale[scale], self._sin[rotation] / self._scale[scale]
        return cos * x - sin * y, sin * x + cos * y


class FashionMNISTSequences(MNISTSequences):
    """Clothes of Fashion-MNIST (Xiao et al. 2017), which move as the digits of `MNISTSequences` do.

    Read from data_dir/FashionMNIST/raw. Otherwise as `MNISTSequences`.
    """

    name = "fashion-mnist"
    files = "fashion-mnist"
    dataset = "FashionMNIST"
    classes = (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )


class KMNISTSequences(MNISTSequences):
    """Cursive characters of KMNIST (Clanuwat et al. 2018), which move as the digits of `MNISTSequences` do.

    Read from data_dir/KMNIST/raw. Otherwise as `MNISTSequences`.
    """

    name = "kmnist"
    files = "kmnist"
    dataset = "KMNIST"
    classes = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


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
        """Find where in the digit each pixel of a frame comes from, x and y (B, S, 28, 28), at poses (B, S, 1, 1).

        A point (a, b) of the digit, turned in its plane, is seen at `(cos · a, b) / (1 + near · a)` with
        `near = sin² / √2`, the diagonal being 2√2 for pixels from -1 to 1; solved for (a, b), and turned back.
        """
        x, y = self._pixels()
        cos, sin = self._cos[perspective], self._sin[perspective]
        depth = cos - sin.square() / math.sqrt(2) * x  # of another sign than cos only for points outside of the digit
        a, b = x / depth, y * cos / depth
        return cos * a + sin * b, cos * b - sin * a


class MNISTOpenSequences(MNISTSequences):
    """MNIST digits that turn, grow or change colour along open paths of nine frames, each from the digit as it is.

    Rotation runs from 0 to 80 degrees, scale from 1 to 1.8, hue from 0 to 160 degrees, and what does not move is at its
    first value. The first frames of all three kinds are therefore the same image: what moves cannot be seen in it.
    Otherwise as `MNISTSequences`.
    """

    name = "mnist-open"
    open_paths = True
    sequence_length = 9
    factors = (
        Factor("rotation", tuple(range(0, 90, 10))),
        Factor("scale", tuple(tenths / 10 for tenths in range(10, 19))),
        Factor("hue", tuple(range(0, 180, 20))),
    )
    digits: ClassVar[range] = range(10)  # which the examples show

    def __init__(self, data_dir: str | Path, split: str, device: torch.device | str = "cpu", download: bool = False):
        super().__init__(data_dir, split, device, download)
        shown = torch.isin(self.labels, torch.tensor(self.digits, device="cpu"))
        self.images, self.labels = self.images[shown.to(self.device)], self.labels[shown]

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Return zeros (B, F): every sequence starts at the digit as it is."""
        return torch.zeros(len(examples), len(self.factors), dtype=torch.int64, device=examples.device)


class MNISTOpenSeenSequences(MNISTOpenSequences):
    """The digits 0 to 7 of `MNISTOpenSequences` in every split: of these a model learns how digits move."""

    name = "mnist-open-seen"
    digits = range(8)


class MNISTOpenUnseenSequences(MNISTOpenSequences):
    """The digits 8 and 9 of `MNISTOpenSequences` in every split: on these it shows that it has learned to move any."""

    name = "mnist-open-unseen"
    digits = range(8, 10)


class MNISTDigits(MNISTSequences):
    """MNIST digits as they are, 1x28x28: sequences of one frame, for models without time (section 6.2)."""

    name = "mnist-still"
    image_shape = (1, 28, 28)
    sequence_length = 1
    factors = (Factor("rotation", (0,)), Factor("scale", (1.0,)), Factor("hue", (0,)))

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, 1, 1, 28, 28), whatever the factors, which have one value each."""
        return (self.images[examples].float() / 255)[:, None, None]


def sampled(digits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample the digits (B, 28, 28) at the points x, y (B, S, 28, 28), bilinear, zeros outside."""
    # The frames of a sequence are sampled as one tall image, so that its digit need not be copied for each.
    grid = torch.stack((x, y), dim=-1).flatten(1, 2)
    return F.grid_sample(digits[:, None], grid, align_corners=False).view(x.shape)


def _read_mnist(name: str, data_dir: Path, split: str, download: bool) -> tuple[Tensor, Tensor]:
    """Read images (N, 28, 28) uint8 and labels (N,) int64 of one split of torchvision's data set, on the CPU."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    # Here and not above: the other sources must work where torchvision is missing or does not fit torch.
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{name} is read by torchvision, which cannot be imported here ({error}); "
            "install the torchvision that belongs to this torch"
        ) from error
    try:
        mnist = getattr(datasets, name)(data_dir, train=split != "test", download=download)
    except Exception as error:  # a damaged file fails in any of half a dozen ways, bare assertions among them
        raise DataError(
            f"cannot read {name} from {data_dir / name / 'raw'} ({error!r}); "
            f"pass --data-dir with the folder that holds {name}/raw, or allow the download"
        ) from error
    if mnist.data.dtype != torch.uint8 or mnist.data.shape[1:] != (28, 28) or len(mnist.targets) != len(mnist.data):
        found = f"{mnist.data.dtype} {tuple(mnist.data.shape)} with {len(mnist.targets)} labels"
        raise DataError(
            f"{name} in {data_dir / name} should be images of uint8 (N, 28, 28) with N labels, found {found}; "
            "delete the folder, `processed` in it, too, and download it again"
        )
    if len(mnist.targets) and not 0 <= mnist.targets.min() <= mnist.targets.max() <= 9:
        found = f"{mnist.targets.min()} to {mnist.targets.max()}"
        raise DataError(f"{name} in {data_dir / name} should have labels from 0 to 9, found {found}")
    if split == "test":
        return mnist.data, mnist.targets
    order = torch.randperm(len(mnist.data), generator=seeded_generator(0), device="cpu")
    cut = len(order) * 4 // 5
    kept = order[:cut] if split == "train" else order[cut:]
    return mnist.data[kept], mnist.targets[kept]
