"""The 3D Shapes data set (Burgess and Kim 2018), read from its HDF5 file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .rooms import RoomGrid
from .sequences import DataError

_ADVICE = (
    "pass --data-dir with the folder that holds 3dshapes.h5; it is in the Google Cloud Storage bucket 3d-shapes, "
    "https://console.cloud.google.com/storage/browser/3d-shapes, and nothing here downloads it"
)


class Shapes3DSequences(RoomGrid):
    """The real 3D Shapes, read from `data_dir/3dshapes.h5` by h5py; the sequences are of the kinds of `RoomGrid`.

    The file holds `images`, (480000, 64, 64, 3) uint8, and `labels`, (480000, 6) float64, of all combinations of the
    factors, the last of which varies fastest; both are checked, the images by their shape alone. They would take 5.9 GB
    of memory: the frames of a batch are read when it is made, so that CUDA graphs cannot hold this source.

    Raises:
        DataError: h5py or the file is missing, or the file is not what it should be.

    """

    name = "shapes3d"
    files = "shapes3d"
    capturable = False

    def __init__(self, data_dir: str | Path, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.path = self.file(data_dir)
        if not self.path.exists():
            raise DataError(f"no {self.path.name} in {self.path.parent}; {_ADVICE}")
        with _opened_hdf5(self.path) as file:
            _check(self.path, file, self.sizes)

    @classmethod
    def open(cls, split: str, data_dir: Path, device: torch.device, download: bool) -> Shapes3DSequences:
        """Make the source, which is the same for every split; it is never downloaded."""
        return cls(data_dir, device)

    @staticmethod
    def file(data_dir: str | Path) -> Path:
        """Say where the data is read from."""
        return Path(data_dir) / "3dshapes.h5"

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Read frames (B, S, 3, 64, 64); the factors alone decide.

        Raises:
            DataError: the images cannot be read any more.

        """
        places = np.ravel_multi_index(tuple(np.moveaxis(factors.cpu().numpy(), -1, 0)), self.sizes)
        rows, order = np.unique(places, return_inverse=True)  # h5py takes rows in increasing order, each once
        with _opened_hdf5(self.path) as file:
            images = torch.from_numpy(file["images"][rows]).to(self.device)
        frames = images[torch.from_numpy(order.reshape(places.shape)).to(self.device)]
        return frames.movedim(-1, 2).float() / 255


@contextmanager
def _opened_hdf5(path: Path) -> Iterator:
    """Open the file meanwhile, and say so where it cannot be read: a forked process must not share an open one."""
    # Here and not above: h5py is an extra, and the other sources must work without it.
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"3D Shapes is read by h5py, which cannot be imported here ({error}); "
            "install the extra shapes3d, or h5py itself"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in any of half a dozen ways, by where the damage is
        raise DataError(
            f"{path} is not a whole file of 3D Shapes ({error!r}); delete it and download it again, "
            "from the Google Cloud Storage bucket 3d-shapes"
        ) from error


def _check(path: Path, file, sizes: tuple[int, ...]) -> None:
    """Check that a file holds as many images as there are combinations of factors, with labels in their order."""
    count = int(np.prod(sizes))
    expected = {"images": ((count, 64, 64, 3), np.uint8), "labels": ((count, len(sizes)), np.float64)}
    for name, (shape, dtype) in expected.items():
        if name not in file:
            raise DataError(f"{path} should contain images and labels, found {sorted(file)}")
        found_shape, found_dtype = (getattr(file[name], what, None) for what in ("shape", "dtype"))
        if (found_shape, found_dtype) != (shape, dtype):
            raise DataError(
                f"{path}: {name} should be {np.dtype(dtype)} {shape}, found {found_dtype} {found_shape}; "
                "delete it and download it again"
            )
    labels = file["labels"][:].reshape(*sizes, len(sizes))
    for axis, size in enumerate(sizes):
        values = np.moveaxis(labels[..., axis], axis, 0).reshape(size, -1)
        if (values != values[:, :1]).any() or len(np.unique(values[:, 0])) < size:
            raise DataError(
                f"{path}: factor {axis} of the labels should have {size} values, in the order in which 3D Shapes is "
                "published, the last factor varying fastest; found another order"
            )
