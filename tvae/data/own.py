"""Sequences of the user's own as a source: looked at, split, and read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .readers import Arrays, Items, Reader, array_file, check_range, folder, spread
from .sequences import SPLITS, DataError, Factor, SequenceBatch, SequenceSource, seeded_generator

_LOOKED_AT = 32  # sequences


class Sequences:
    """Sequences of the user's own, of which every split is a source; made by `tvae.open_sequences`.

    A tenth of the sequences, rounded down but at least one, is "test", another "validation", and all others "train", by
    a shuffle that depends on their number alone.
    """

    files = None  # needed from the cache
    capturable = False

    def __init__(self, reader: Reader, name: str):
        n, self.sequence_length, *image_shape = reader.shape
        if n < 3:
            raise DataError(f"{reader.where} should have a sequence for each of {', '.join(SPLITS)}, found {n}")
        self.reader, self.name, self.image_shape, self.classes = reader, name, tuple(image_shape), reader.classes
        self.advancing = None if reader.factors is None else _advancing(reader.factors)
        order, tenth = torch.randperm(n, generator=seeded_generator(0), device="cpu"), max(1, n // 10)
        parts = order.split([n - 2 * tenth, tenth, tenth])
        self.parts = {**dict(zip(SPLITS, parts, strict=True)), "all": torch.arange(n, device="cpu")}

    def __len__(self) -> int:
        return self.reader.shape[0]

    def __getitem__(self, split: str) -> OwnSequences:
        return self.open(split)

    @cached_property
    def contents(self) -> str:
        """Say what the sequences are, and their checksum, so that others in their place are noticed."""
        n, frames, *image_shape = self.reader.shape
        text = f"{n} sequences of {frames} frames of {'x'.join(map(str, image_shape))}"
        checksum = self.reader.checksum()
        return text if checksum is None else f"{text}, CRC-32 {checksum}"

    def __str__(self) -> str:
        """Say in a line what was found, and what was not."""
        parts = ", ".join(f"{len(self.parts[split])} {split}" for split in SPLITS)
        missing = {"classes": not self.classes, "factors that advance": not self.advancing_factors}
        missing = " or ".join(name for name, is_missing in missing.items() if is_missing)
        left_out = f"; without {missing}: metrics that need them are left out" if missing else ""
        return f"{self.name}: {self.contents}; {parts}{left_out}"

    @property
    def advancing_factors(self) -> list[int]:
        """Return the numbers of the factors that advance in any sequence."""
        return [] if self.advancing is None else self.advancing.unique().tolist()

    def look(self) -> Sequences:
        """Check the headers of all sequences, and the frames of 32 of them, evenly spread.

        Raises:
            DataError: they are not what they should be, or nothing moves in any of these.

        """
        self.reader.check()
        looked_at = spread(len(self), _LOOKED_AT)
        still = [bool((x == x[:1]).all()) for x in (self.frames(i)[0] for i in looked_at)]
        if self.sequence_length > 1 and all(still):
            raise DataError(
                f"nothing moves in {self.reader.where}: in each of {len(still)} sequences looked at all frames are "
                "equal; the shape is (N, S, C, H, W), with S frames of a sequence"
            )
        return self

    def frames(self, i: int) -> tuple[Tensor, int | None]:
        """Read sequence i, (S, channel, height, width) float32 in [0, 1], and its label.

        Raises:
            DataError: it is not what it should be.

        """
        x, label = self.reader.read(i)
        if tuple(x.shape) != self.reader.shape[1:]:
            raise DataError(
                f"{self.reader.place(i)} should have the shape (frames, channels, height, width) of the first, "
                f"{self.reader.shape[1:]}, found {tuple(x.shape)}"
            )
        if x.dtype == torch.uint8:
            return x.float() / 255, label
        if not x.is_floating_point():
            raise DataError(f"{self.reader.place(i)} should be uint8 or floating-point numbers, found {x.dtype}")
        check_range(x.min().item(), x.max().item(), self.reader.place(i))
        return x.float(), label

    def open(
        self, split: str, data_dir: Path | None = None, device: torch.device | str = "cpu", download: bool = False
    ) -> OwnSequences:
        """Make the source of one split, or of "all" sequences; there is nothing to find or to download."""
        return OwnSequences(self, split, device)


class OwnSequences(SequenceSource):
    """One split of a user's own sequences; an example is a sequence, which is always the same.

    Raises:
        DataError: when a sequence is read, it is not what it should be.

    """

    capturable = False
    recorded = True

    def __init__(self, whole: Sequences, split: str, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.whole, self.numbers = whole, whole.parts[split]
        self.name, self.image_shape, self.sequence_length = whole.name, whole.image_shape, whole.sequence_length
        self.contents, self.classes, self.clustered = whole.contents, whole.classes, len(whole.classes) > 1
        if whole.reader.factors is not None:
            most = whole.reader.factors.amax((0, 1)).tolist()
            self.factors = tuple(
                Factor(f"factor {f}", tuple(range(n + 1)), f in whole.advancing_factors) for f, n in enumerate(most)
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def sequences(self, examples: Tensor, starts: Tensor, transformation: Tensor) -> SequenceBatch:
        """Read the sequences (B,); they start and move as they do, whatever was drawn."""
        read = [self.whole.frames(i) for i in self.numbers[examples].tolist()]
        images, labels = torch.stack([frames for frames, _ in read]), [label for _, label in read]
        batch = (images, *self._course(examples), torch.tensor(labels) if self.classes else None, examples)
        return SequenceBatch(*(None if x is None else x.to(self.device) for x in batch))

    def _course(self, examples: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return factors, transformation and axis of the sequences (B,), where they are known."""
        if not self.factors:
            return None, None, None
        numbers = self.numbers[examples]
        factors = self.whole.reader.factors[numbers]
        if self.whole.advancing is None:
            return factors, None, None
        transformation = self.whole.advancing[numbers]
        return factors, transformation, self.axis(transformation)

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Return zeros (B, F): nothing is drawn."""
        return torch.zeros(len(examples), len(self.factors), dtype=torch.int64, device=examples.device)

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Return the frames (B, S, channel, height, width) of the examples (B,), whatever the factors."""
        frames = [self.whole.frames(i)[0] for i in self.numbers[examples.cpu()].tolist()]
        return torch.stack(frames).to(self.device)


def _advancing(factors: Tensor) -> Tensor | None:
    """Return which factor (N,) advances in each sequence, of factors (N, S, F); None where it is not one in each.

    A factor advances that goes on by one a frame, modulo its number of values, while all others stay.
    """
    steps = factors.diff(dim=1) % (factors.amax((0, 1)) + 1)
    advances, stays = (steps == 1).all(1), (steps == 0).all(1)  # both, where sequences have one frame
    one = (advances.sum(1) == 1) & ((advances ^ stays).all(1))
    return advances.int().argmax(1) if steps.numel() and one.all() else None


def read_path(path: Path) -> Sequences:
    """Find sequences in a file or a folder, by whose absolute path they are named; no more is read than is needed.

    Raises:
        DataError: there are none, or they are not what they should be.

    """
    if not path.exists():
        raise DataError(
            f"there is no file or folder {path}; if it has moved, pass --data-dir with the folder that holds it now"
        )
    if path.is_dir():
        reader = folder(path)
    elif path.suffix.lower() in (".npy", ".npz"):
        reader = array_file(path)
    else:
        raise DataError(
            f"{path} should be a .npy or .npz file, a folder of folders of frames, or a folder of videos, each of "
            "which is a sequence"
        )
    return Sequences(reader, str(path))


def read_values(x: object, name: str, labels: object, factors: object, classes: Sequence[str] | None) -> Sequences:
    """Take an array, a tensor or a data set for sequences.

    Raises:
        DataError: it is not what it should be.

    """
    if isinstance(x, Dataset):
        if labels is not None or factors is not None:
            raise DataError("labels and factors belong to arrays; the items of a data set are pairs with a label")
        return Sequences(Items(x, classes), name)
    if not isinstance(x, np.ndarray | Tensor):
        raise DataError(
            "sequences should be an array or tensor (N, S, C, H, W), a path, or a torch.utils.data.Dataset, "
            f"found {type(x).__name__}"
        )
    reader = Arrays(x, name, labels, factors)
    if classes is not None:
        if len(classes) != len(reader.classes):
            raise DataError(f"classes should be {len(reader.classes)} names, one for each label, found {len(classes)}")
        reader.classes = tuple(map(str, classes))
    return Sequences(reader, name)
