"""Readers of sequences that users have: arrays, folders of frames, folders of videos, and data sets of their own.

A reader knows the shape of all sequences and reads one when it is asked for it, so that they need not fit into memory.
"""

from __future__ import annotations

import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .sequences import DataError

IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_CHANNELS = {"1": "L", "L": "L", **dict.fromkeys(("CMYK", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"), "RGB")}
_MEBIBYTE = 2**20
_SUMMED = 64  # files, and mebibytes of a file, that a checksum is taken of


class Reader(ABC):
    """N sequences of one shape, read one by one; `where` names them in errors.

    Raises:
        DataError: here and in every method, what is read is not what it should be.

    """

    shape: tuple[int, int, int, int, int]  # sequence, frame, channel, height, width
    where: str
    classes: tuple[str, ...] = ()
    factors: Tensor | None = None  # (N, S, F) int64

    @abstractmethod
    def read(self, i: int) -> tuple[Tensor, int | None]:
        """Return the frames (S, channel, height, width) of sequence i, uint8 or floats, and its label."""

    def place(self, i: int) -> str:
        """Say where sequence i is read from."""
        return f"sequence {i} of {self.where}"

    def check(self) -> None:  # noqa: B027 - there may be nothing to check
        """Check of all sequences what takes no more than their headers."""

    def checksum(self) -> str | None:
        """Return a checksum of what is read; None where it may be another every time."""
        return None


# --- arrays -----------------------------------------------------------------------------------------------------------


class Arrays(Reader):
    """Sequences in an array or tensor (N, S, channel, height, width), in memory or mapped from a file.

    Args:
        x: the array.
        where: its name for people.
        labels: integers or texts (N,).
        factors: integers from 0 (N, S, F), the index of each factor of variation in each frame.
        file: that holds all of it.

    """

    def __init__(self, x, where: str, labels=None, factors=None, file: Path | None = None):
        _check_array(x, where)
        self.x, self.where, self.file, self.shape = x, where, file, tuple(map(int, x.shape))
        self.labels = None
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != self.shape[:1] or labels.dtype.kind not in "iuU":
                raise DataError(
                    f"labels of {where} should be integers or texts of the shape {self.shape[:1]}, found {_of(labels)}"
                )
            names, self.labels = np.unique(labels, return_inverse=True)
            self.classes = tuple(map(str, names))
        if factors is not None:
            factors = np.asarray(factors)
            if factors.ndim != 3 or factors.shape[:2] != self.shape[:2] or factors.dtype.kind not in "iu":
                raise DataError(
                    f"factors of {where} should be integers of the shape (N, S, F) with N, S = {self.shape[:2]}, "
                    f"found {_of(factors)}"
                )
            if factors.size and factors.min() < 0:
                raise DataError(f"factors of {where} should be indices from 0, found {factors.min()}")
            self.factors = torch.from_numpy(np.ascontiguousarray(factors, dtype=np.int64))

    def read(self, i: int) -> tuple[Tensor, int | None]:
        """Return the frames of sequence i, and its label."""
        label = None if self.labels is None else int(self.labels[i])
        if isinstance(self.x, Tensor):
            return self.x[i].detach().cpu(), label
        x = self.x[i]
        return torch.from_numpy(np.array(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32)), label

    def check(self) -> None:
        """Check the range of all that is in memory."""
        if not isinstance(self.x, np.memmap) and _kind(self.x) != "uint8":
            check_range(float(self.x.min()), float(self.x.max()), self.where)

    def checksum(self) -> str:
        """Return the CRC-32 of the file, or of what is in memory."""
        if self.file is not None:
            return checksum_of_files(self.file.parent, [self.file])
        total = 0
        for i in range(len(self.x)):
            frames, label = self.read(i)
            total = zlib.crc32(str(label).encode(), zlib.crc32(frames.contiguous().view(torch.uint8).numpy(), total))
        if self.factors is not None:
            total = zlib.crc32(self.factors.numpy(), total)
        return f"{total:08x}"


def _kind(x) -> str:
    return str(x.dtype).removeprefix("torch.")


def _of(x) -> str:
    return f"{_kind(x)} of the shape {tuple(x.shape)}"


def _check_array(x, where: str) -> None:
    """Refuse an array of another shape or type."""
    expected = f"{where} should have the shape (N, S, C, H, W): sequences, frames, channels, height, width"
    if len(x.shape) != 5:
        advice = "; grey frames need an axis for their channel: x[:, :, None]" if len(x.shape) == 4 else ""
        raise DataError(f"{expected}; found {_of(x)}{advice}")
    if 0 in x.shape:
        raise DataError(f"{expected}; found none: {_of(x)}")
    check_channels(tuple(x.shape[1:]), where)
    if _kind(x) == "uint8" or (x.is_floating_point() if isinstance(x, Tensor) else x.dtype.kind == "f"):
        return
    found = f"{where} should be uint8 from 0 to 255, or floating-point numbers from 0 to 1; found {_kind(x)}"
    if _kind(x) == "bool":
        raise DataError(f"{found}: scale with x.astype('uint8') * 255")
    if isinstance(x, Tensor) or x.dtype.kind in "iu":
        low, high = int(x[0].min()), int(x[0].max())
        raise DataError(f"{found}, in its first sequence from {low} to {high}: {_scaling(low, high)}")
    raise DataError(found)


def check_channels(shape: tuple[int, int, int, int], where: str) -> None:
    """Refuse frames that are neither grey nor of three colours, for a shape (S, channel, height, width)."""
    if shape[1] not in (1, 3):
        last = shape[3] in (1, 3)
        advice = "; they seem to come last: move them with np.moveaxis(x, -1, -3)" if last else ""
        raise DataError(f"frames of {where} should have 1 channel or 3, found {shape[1]} of {shape[2:]}{advice}")


def check_range(low: float, high: float, where: str) -> None:
    """Refuse floating-point numbers from `low` to `high`, if they are not within [0, 1]."""
    if not (low >= 0 and high <= 1):  # or are no numbers
        raise DataError(
            f"{where} should be floating-point numbers from 0 to 1 (or uint8 from 0 to 255), "
            f"found {low:g} to {high:g}: {_scaling(low, high)}"
        )


def _scaling(low: float, high: float) -> str:
    """Say how to make what goes from `low` to `high` fit."""
    if not np.isfinite(high - low):
        return "take out what is not finite"
    if low >= 0 and high <= 255:
        return "scale with x / 255"
    return f"scale with (x - low) / (high - low), for your own low and high, as {low:g} and {high:g}"


def array_file(path: Path) -> Arrays:
    """Read a .npy file, which is mapped into memory, or a .npz archive, which is read.

    Raises:
        DataError: it is damaged, or holds something else.

    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            found, parts = {"x": found}, {}
        else:
            with found as archive:
                found = {name: archive[name] for name in archive.files}
            parts = {name: found.pop(name) for name in ("labels", "factors") if name in found}
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise DataError(f"cannot read {path} as an array of numpy ({error})") from error
    if len(found) != 1:
        raise DataError(
            f"{path} should hold one array of sequences, and nothing else but labels and factors; "
            f"found {', '.join([*found, *parts]) or 'nothing'}"
        )
    return Arrays(*found.values(), str(path), **parts, file=path)


# --- folders ----------------------------------------------------------------------------------------------------------


def natural(name: str) -> list[str | int]:
    """Return what sorts names as people do: frame 9 before frame 10."""
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split(r"(\d+)", name))]


def folder(path: Path) -> Reader:
    """Read a folder of folders of frames, or of videos.

    Raises:
        DataError: it holds neither or both, or its sequences have different lengths or sizes.

    """
    names = sorted((entry.name for entry in os.scandir(path) if not entry.name.startswith(".")), key=natural)
    folders = [name for name in names if (path / name).is_dir()]
    videos = [name for name in names if name.lower().endswith(VIDEOS)]
    if folders and videos:
        raise DataError(f"{path} should hold folders of frames or videos, found both: {folders[0]} and {videos[0]}")
    if videos:
        return Videos(path, videos)
    if folders:
        return Frames(path, folders)
    advice = "one folder of frames is one sequence: pass the folder that holds such folders"
    if not any(name.lower().endswith(IMAGES) for name in names):
        advice = f"videos end in {', '.join(VIDEOS)}"
    raise DataError(f"{path} should hold a folder of frames, or a video, for each sequence; found neither ({advice})")


class Frames(Reader):
    """A folder of folders of images: each a sequence, its frames in the natural order of their names."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.where, self.path, self.names = str(path), path, names
        self.frames = [
            sorted((x.name for x in os.scandir(path / name) if x.name.lower().endswith(IMAGES)), key=natural)
            for name in names
        ]
        self.frames = [[x for x in frames if not x.startswith(".")] for frames in self.frames]
        for name, frames in zip(names, self.frames, strict=True):
            if len(frames) != len(self.frames[0]) or not frames:
                raise DataError(
                    f"all folders in {path} should hold as many frames ({', '.join(IMAGES)}); "
                    f"found {len(self.frames[0])} in {names[0]} and {len(frames)} in {name}"
                )
        with _image(self._file(0, 0)) as first:
            self.shape = (len(names), len(self.frames[0]), *_shape_of(first))

    def _file(self, i: int, frame: int) -> Path:
        return self.path / self.names[i] / self.frames[i][frame]

    def place(self, i: int) -> str:
        """Return the folder of sequence i."""
        return str(self.path / self.names[i])

    def read(self, i: int) -> tuple[Tensor, None]:
        """Decode the frames of sequence i."""
        frames = []
        for frame in range(self.shape[1]):
            with self._checked(i, frame) as image:
                pixels = np.array(image.convert(_CHANNELS[image.mode]))
            frames.append(torch.from_numpy(pixels.reshape(*self.shape[3:], self.shape[2])))
        return torch.stack(frames).movedim(-1, 1), None

    @contextmanager
    def _checked(self, i: int, frame: int) -> Iterator:
        """Open a frame, which must have the shape of the first one."""
        with _image(self._file(i, frame)) as image:
            if _shape_of(image) != self.shape[2:]:
                first, found = ("x".join(map(str, shape)) for shape in (self.shape[2:], _shape_of(image)))
                raise DataError(
                    f"all frames in {self.path} should have the channels, height and width of the first, {first}; "
                    f"found {found} in {self._file(i, frame)}"
                )
            yield image

    def check(self) -> None:
        """Check the sizes of all frames."""
        for i in range(self.shape[0]):
            for frame in range(self.shape[1]):
                with self._checked(i, frame):
                    pass

    def checksum(self) -> str:
        """Return the CRC-32 of the frames."""
        files = [
            self.path / name / frame for name, frames in zip(self.names, self.frames, strict=True) for frame in frames
        ]
        return checksum_of_files(self.path, files)


@contextmanager
def _image(path: Path) -> Iterator:
    """Open an image, of which only the header is read at first."""
    from PIL import Image  # here and not above: sources without files do without it

    try:
        with Image.open(path) as image:
            if image.mode not in _CHANNELS:
                raise DataError(
                    f"{path} should have 8 bits a channel, found {image.mode!r}: scale its values to 0 to 255 and "
                    "save it again"
                )
            yield image
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise DataError(f"cannot read the frame {path} ({error})") from error


def _shape_of(image) -> tuple[int, int, int]:
    return (len(_CHANNELS[image.mode]), image.height, image.width)


class Videos(Reader):
    """A folder of videos, each a sequence, decoded by PyAV: of one channel where they are grey, else of three."""

    def __init__(self, path: Path, names: Sequence[str]):
        self.where, self.path, self.names = str(path), path, names
        self.shape = (len(names), *_shape_of_video(path / names[0]))

    def place(self, i: int) -> str:
        """Return the file of sequence i."""
        return str(self.path / self.names[i])

    def read(self, i: int) -> tuple[Tensor, None]:
        """Decode the frames of sequence i."""
        kind = "gray" if self.shape[2] == 1 else "rgb24"
        with _video(self.path / self.names[i]) as (container, stream):
            frames = [frame.to_ndarray(format=kind) for frame in container.decode(stream)]
        if not frames or len({frame.shape for frame in frames}) > 1:
            raise DataError(f"{self.place(i)} should have frames of one size, found {len(frames)} frames of several")
        frames = torch.from_numpy(np.stack(frames))
        return (frames[:, None] if frames.ndim == 3 else frames.movedim(-1, 1)), None

    def check(self) -> None:
        """Check the lengths and sizes of all videos."""
        for name in self.names:
            found = _shape_of_video(self.path / name)
            if found != self.shape[1:]:
                raise DataError(
                    f"all videos in {self.path} should have the frames, channels, height and width of the first, "
                    f"{self.shape[1:]}; found {found} in {name}"
                )

    def checksum(self) -> str:
        """Return the CRC-32 of the videos."""
        return checksum_of_files(self.path, [self.path / name for name in self.names])


@contextmanager
def _video(path: Path) -> Iterator:
    """Open a video and its stream of frames.

    Raises:
        DataError: it is damaged, or PyAV is missing.

    """
    try:
        import av
    except ImportError as error:
        raise DataError(
            f"videos are read by PyAV, which cannot be imported here ({error}); "
            'install the extra video: pip install "tvae-kernels[video]"'
        ) from error
    try:
        with av.open(str(path)) as container:
            yield container, container.streams.video[0]
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise DataError(f"cannot read the video {path} ({error})") from error


def _shape_of_video(path: Path) -> tuple[int, int, int, int]:
    """Return frames, channels, height and width of a video, of which no frame is decoded."""
    with _video(path) as (container, stream):
        context = stream.codec_context
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        channels = 1 if (context.pix_fmt or "").startswith("gray") else 3
        return frames, channels, context.height, context.width


def checksum_of_files(root: Path, files: Sequence[Path]) -> str:
    """Return the CRC-32 of the names and sizes of all files, and of what is in them.

    Of many files the contents of 64 are taken, of large ones 64 MiB between them, evenly spread.
    """
    sizes, total = [file.stat().st_size for file in files], 0
    for file, size in zip(files, sizes, strict=True):
        total = zlib.crc32(f"{file.relative_to(root)} {size}\n".encode(errors="surrogateescape"), total)
    chosen = spread(len(files), _SUMMED)
    for i in chosen:
        with files[i].open("rb") as file:
            for block in spread(-(-sizes[i] // _MEBIBYTE), _SUMMED // len(chosen)):
                file.seek(block * _MEBIBYTE)
                total = zlib.crc32(file.read(_MEBIBYTE), total)
    return f"{total:08x}"


def spread(n: int, most: int) -> list[int]:
    """Return up to `most` of the numbers from 0 to n - 1, evenly spread, the first and the last among them."""
    return list(range(n)) if n <= most else [round(x) for x in np.linspace(0, n - 1, most)]


# --- data sets --------------------------------------------------------------------------------------------------------


class Items(Reader):
    """A data set of PyTorch's kind, whose items are sequences (S, channel, height, width), or pairs with a label.

    Args:
        items: the data set, which has a length.
        classes: what its labels, from 0, stand for; by default the attribute of that name of the data set.

    """

    def __init__(self, items: Dataset, classes: Sequence[str] | None = None):
        self.items, self.where = items, type(items).__name__
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"{self.where} should have a length and items by number: a data set of PyTorch's map style")
        self.classes = tuple(map(str, getattr(items, "classes", ()) if classes is None else classes))
        if not len(items):
            raise DataError(f"{self.where} should have sequences, found none")
        frames, _ = self.read(0)
        _check_array(frames[None], f"items of {self.where}, stacked,")
        self.shape = (len(items), *frames.shape)

    def place(self, i: int) -> str:
        """Say which item it is."""
        return f"item {i} of {self.where}"

    def read(self, i: int) -> tuple[Tensor, int | None]:
        """Take an item apart."""
        item, label = self.items[i], None
        if isinstance(item, tuple | list):
            if len(item) != 2:
                raise DataError(f"{self.place(i)} should be a sequence, or one and its label; found {len(item)} parts")
            item, label = item
            label = self._label(i, label)
        elif self.classes:
            raise DataError(
                f"{self.place(i)} should be a sequence and its label, for there are classes; found no label"
            )
        if not isinstance(item, Tensor | np.ndarray):
            raise DataError(f"{self.place(i)} should be a tensor or an array, found {type(item).__name__}")
        return (torch.from_numpy(np.array(item)) if isinstance(item, np.ndarray) else item.detach().cpu()), label

    def _label(self, i: int, label: object) -> int:
        if not self.classes:
            raise DataError(
                f"items of {self.where} have labels, but of what is not known: give it an attribute `classes` with "
                "their names, or pass classes=(...)"
            )
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < len(self.classes):
            raise DataError(
                f"the label of {self.place(i)} should be from 0 to {len(self.classes) - 1}, found {label!r}"
            )
        return number
