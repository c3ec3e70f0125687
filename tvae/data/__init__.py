"""Sequences of transformed images: sources, by name, and the seeded stream of batches that models are trained on."""

from __future__ import annotations

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
    "SequenceBatch",
    "SequenceSource",
    "SequenceStream",
    "open_source",
    "register",
]

CACHE = Path("~/.cache/tvae")  # of files that were downloaded
SOURCES: dict[str, type[SequenceSource]] = {}  # by the names of the command line
Source = TypeVar("Source", bound=type[SequenceSource])


def register(source: Source) -> Source:
    """Give a class of sources its place in `SOURCES`, under its `name`; to be used as a decorator.

    Raises:
        ValueError: the name is another source's.

    """
    if SOURCES.get(source.name, source) is not source:
        raise ValueError(f"there is a source {source.name!r} already: {SOURCES[source.name].__qualname__}")
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

    Raises:
        ValueError: there is no such source or split.
        DataError: data is missing or damaged.

    """
    for what, value, choices in (("source", name, SOURCES), ("split", split, SPLITS)):
        if value not in choices:
            raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
    source = SOURCES[name]
    if source.files is not None and data_dir is None:
        raise DataError(f"{name} is read from files: pass --data-dir with the folder that holds them")
    return source.open(split, None if data_dir is None else expanded(Path(data_dir)), torch.device(device), download)


for _source in (
    SpriteSequences,
    SpriteShifts,
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
