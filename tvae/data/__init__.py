"""Sequences of transformed images: sources, by name, and the seeded stream of batches that models are trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from ..files import expanded
from .dsprites import DSpritesSequences
from .mnist import (
    FashionMNISTSequences,
    KMNISTSequences,
    MNISTDigits,
    MNISTOpenSeenSequences,
    MNISTOpenSequences,
    MNISTOpenUnseenSequences,
    MNISTPerspectiveHueSequences,
    MNISTRotationHueSequences,
    MNISTSequences,
)
from .own import OwnSequences, Sequences, read_path, read_values
from .posed import MNISTPosedSequences, MNISTScaledSequences, MNISTShiftedSequences, MNISTTurningSequences
from .rooms import RoomSequences
from .sequences import (
    EVALUATION_SEED,
    SPLITS,
    DataError,
    Factor,
    FixedSequences,
    SequenceBatch,
    SequenceSource,
    SequenceStream,
)
from .shapes import ShapeSequences
from .shapes3d import Shapes3DSequences
from .sprites import SpriteSequences, SpriteShifts

__all__ = [
    "CACHE",
    "EVALUATION_SEED",
    "SOURCES",
    "SPLITS",
    "DataError",
    "Factor",
    "FixedSequences",
    "OwnSequences",
    "SequenceBatch",
    "SequenceSource",
    "SequenceStream",
    "Sequences",
    "is_path",
    "located",
    "open_sequences",
    "open_source",
    "register",
]

CACHE = Path("~/.cache/tvae")  # of files that were downloaded
SOURCES: dict[str, type[SequenceSource] | Sequences] = {}  # by the names of the command line
Source = TypeVar("Source", bound=type[SequenceSource])


def register(source: Source) -> Source:
    """Give a class of sources its place in `SOURCES`, under its `name`; to be used as a decorator.

    Raises:
        ValueError: the name is another source's.

    """
    other = SOURCES.get(source.name, source)
    if other is not source:
        kind = getattr(other, "__qualname__", "sequences that were opened")
        raise ValueError(f"there is a source {source.name!r} already: {kind}")
    SOURCES[source.name] = source
    return source


def open_source(
    name: str,
    split: str,
    data_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
) -> SequenceSource:
    """Open the source of that name; those that read files find them in `data_dir`: see their classes.

    A path of sequences of one's own is a name, too: `data_dir` is then the folder that holds it, if it has moved.
    Beside the splits of all sources these have "all".

    Raises:
        ValueError: there is no such source or split.
        DataError: data is missing or damaged.

    """
    own = is_path(name) or isinstance(SOURCES.get(name), Sequences)
    splits = (*SPLITS, "all") if own else SPLITS
    for what, value, choices in (("source", name, (name,) if own else SOURCES), ("split", split, splits)):
        if value not in choices:
            raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
    if is_path(name):
        return read_path(located(name, data_dir)).open(split, device=device)
    source = SOURCES[name]
    if source.files is not None and data_dir is None:
        raise DataError(f"{name} is read from files: pass --data-dir with the folder that holds them")
    return source.open(split, None if data_dir is None else expanded(Path(data_dir)), torch.device(device), download)


def open_sequences(
    x: object,
    labels: object = None,
    factors: object = None,
    classes: Sequence[str] | None = None,
    name: str = "own",
) -> Sequences:
    """Open sequences of one's own and look at them; `result["train"]`, "validation" and "test" are sources.

    What is on the disk is read as it is needed. What is in memory is registered as data of that `name`, in place of
    what was opened under it before.

    Args:
        x: an array or tensor (N, S, channel, height, width), uint8 or floats in [0, 1], with 1 channel or 3; the path
            of a .npy file of one, of a .npz file of one beside `labels` and `factors`, of a folder of folders of
            frames, or of a folder of videos; or a `torch.utils.data.Dataset` of sequences (S, channel, height, width),
            or of pairs of one and its label.
        labels: of an array, the class (N,) of each sequence, integers or texts.
        factors: of an array, the index (N, S, F) from 0 of each factor of variation in each frame. Where in every
            sequence one of them goes on by one a frame, modulo its number of values, it is the transformation.
        classes: the names of the classes; by default what the labels are, or the attribute `classes` of a data set.
        name: of what is in memory.

    Raises:
        DataError: sequences are missing or not what they should be.
        ValueError: the name is another source's.

    """
    if isinstance(x, str | os.PathLike):
        if any(value is not None for value in (labels, factors, classes)):
            raise ValueError(
                "labels, factors and classes are for what is in memory; a .npz file may hold the first two"
            )
        return read_path(Path(os.path.abspath(expanded(Path(x))))).look()
    if isinstance(SOURCES.get(name), type):
        raise ValueError(f"there is a source {name!r} already: {SOURCES[name].__qualname__}")
    found = read_values(x, name, labels, factors, classes).look()
    SOURCES[name] = found
    return found


def located(name: str, data_dir: str | Path | None) -> Path:
    """Return where a path of sequences leads: into `data_dir`, if that holds what has its last name."""
    path = Path(os.path.abspath(expanded(Path(name))))
    moved = None if data_dir is None else Path(os.path.abspath(expanded(Path(data_dir)))) / path.name
    return moved if moved is not None and moved.exists() else path


def is_path(name: str) -> bool:
    """Say whether a name of data is no source's, but the path of sequences of one's own."""
    return name not in SOURCES and ("/" in name or "." in name or Path(name).exists())


for _source in (
    SpriteSequences,
    SpriteShifts,
    ShapeSequences,
    DSpritesSequences,
    MNISTSequences,
    FashionMNISTSequences,
    KMNISTSequences,
    MNISTRotationHueSequences,
    MNISTPerspectiveHueSequences,
    MNISTDigits,
    MNISTOpenSequences,
    MNISTOpenSeenSequences,
    MNISTOpenUnseenSequences,
    MNISTPosedSequences,
    MNISTShiftedSequences,
    MNISTScaledSequences,
    MNISTTurningSequences,
    RoomSequences,
    Shapes3DSequences,
):
    register(_source)
