"""The dSprites data set (Matthey et al. 2017): the subset that the paper trains on."""

from __future__ import annotations

import itertools
import math
import os
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .sequences import DataError
from .sprites import SpriteGrid

_DSPRITES_URL = (
    "https://github.com/google-deepmind/dsprites-dataset/raw/master/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
)


class DSpritesSequences(SpriteGrid):
    """The subset of dSprites (Matthey et al. 2017) that the paper uses.

    It keeps the 5 largest of the 6 scales, and every other one of the first 30 orientations, x and y positions. Read
    from `data_dir/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`: the 2.8 GiB of pixels in it pass through in pieces
    of 4 MiB, and the subset is kept on the device with eight pixels in a byte, 26 MB.

    Raises:
        DataError: the file is missing and not allowed to be downloaded, or is not what it should be.

    """

    name = "dsprites"
    files = "dsprites"

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

    @classmethod
    def open(cls, split: str, data_dir: Path, device: torch.device, download: bool) -> DSpritesSequences:
        """Make the source, which is the same for every split, as the class does."""
        return cls(data_dir, device, download)

    @staticmethod
    def file(data_dir: str | Path) -> Path:
        """Say where the data is read from."""
        return Path(data_dir) / _DSPRITES_URL.rpartition("/")[2]

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 1, 64, 64), zeros and ones; the factors alone decide."""
        packed = self._packed[factors.unbind(-1)][..., None]  # (B, S, 512, 1)
        bits = packed >> torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device) & 1
        return bits.reshape(*factors.shape[:2], *self.image_shape).float()


def _read_dsprites(path: Path, sizes: tuple[int, ...], kept: tuple[range, ...]) -> np.ndarray:
    """Read part of a dSprites file: (number kept of each factor, 512) uint8, the 64x64 pixels packed by np.packbits.

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
    except DataError:
        raise
    except Exception as error:  # a damaged archive fails in any of a dozen ways, by its compression and where it is cut
        raise DataError(
            f"{path} is not a whole dSprites archive ({error!r}); delete it and download it again"
        ) from error
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
