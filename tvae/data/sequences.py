"""Sequences of images: what a source of them is, and the stream that draws batches from it.

A source turns examples and factors of variation into frames. The stream draws, from a seed, which examples stand in
batch i, which factor advances in each sequence and where it starts. The draws are made on the CPU and the frames are
rendered on the source's device, so that one seed means the same sequences on every machine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "validation", "test")
EVALUATION_SEED = 2021  # of the fixed test set and of the noise of evaluations, whatever the seed of the run
_SPLIT, _EPOCH, _BATCH = range(3)  # what a generator is for


class DataError(RuntimeError):
    """Data is missing or is not what it should be; the message says where, what was found, and what to do."""


class SequenceBatch(NamedTuple):
    """A batch of B sequences of S frames, and what is known of them, on the source's device.

    A model takes from it what it needs. Where several processes share a batch, each has a part of it, which knows where
    it stands in the whole.
    """

    images: Tensor  # (B, S, channel, height, width) float32 in [0, 1]
    factors: Tensor | None = None  # (B, S, F) int64: index of each factor of variation in each frame
    transformation: Tensor | None = None  # (B,) int64: which factor advances (the first, where several do)
    axis: Tensor | None = None  # (B,) int64: its number among the source's transformations
    label: Tensor | None = None  # (B,) int64: class of the example, which no sequence changes
    example: Tensor | None = None  # (B,) int64: number of the example in its source
    first: int = 0  # number of the first of these sequences in the whole batch
    total: int | None = None  # sequences of the whole batch; None where this is all of it

    @classmethod
    def joined(cls, batches: list[SequenceBatch]) -> SequenceBatch:
        """Make one batch of the sequences of several of one source."""
        fields = zip(*(batch[:6] for batch in batches), strict=True)
        return cls(*(None if x[0] is None else torch.cat(x) for x in fields))

    def select(self, indices: list[int] | Tensor) -> SequenceBatch:
        """Take some of the sequences, as a batch of their own."""
        return SequenceBatch(*(None if x is None else x[indices] for x in self[:6]))


@dataclass(frozen=True)
class Factor:
    """A factor of variation: its name, the value behind each of its indices, and whether a sequence may advance it."""

    name: str
    values: tuple[float, ...]
    transforms: bool = True


class SequenceSource(ABC):
    """Examples, and the frames that they give at each setting of the factors of variation.

    A source of one's own names its frames' shape and number, counts its examples and renders them. All else has a
    default: no factors, no classes, no files.
    """

    name: ClassVar[str]
    image_shape: tuple[int, int, int]  # channel, height, width
    sequence_length: int
    factors: tuple[Factor, ...] = ()
    classes: tuple[str, ...] = ()  # what the labels stand for
    open_paths: ClassVar[bool] = False  # what advances starts at index 0, whatever `starts` say, and never comes round
    clustered: ClassVar[bool] = False  # models are asked what class an example is of, whatever its poses
    combined: ClassVar[bool] = False  # a sequence advances all factors that transform at once, not one of them
    capturable: ClassVar[bool] = True  # `render` computes on the device alone, so that a CUDA graph can hold it
    recorded: ClassVar[bool] = False  # an example is a sequence that is there already: nothing of it is drawn
    contents: str | None = None  # what is read from where others may come to stand, with a checksum
    files: ClassVar[str | None] = None  # folder of the cache that holds what the source reads; None if it reads nothing
    device: torch.device = torch.device("cpu")

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @classmethod
    def open(cls, split: str, data_dir: Path | None, device: torch.device, download: bool) -> SequenceSource:
        """Make the source of one split, from the files in a folder, which may be downloaded to it.

        Raises:
            DataError: data is missing or damaged.

        """
        return cls(device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of values of each factor."""
        return tuple(len(factor.values) for factor in self.factors)

    @property
    def transformations(self) -> dict[int, str]:
        """Return the names of the transformations, by the index of the factor that advances (the first of several)."""
        names = {index: factor.name for index, factor in enumerate(self.factors) if factor.transforms}
        return {min(names): " + ".join(names.values())} if self.combined and names else names

    @abstractmethod
    def __len__(self) -> int:
        """Count the examples."""

    @abstractmethod
    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, channel, height, width) of the examples (B,) at the factors (B, S, F), on the device."""

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the factors (B, F) of the first frames of sequences of the examples (B,), uniformly, all on the CPU."""
        if not self.factors:
            return torch.zeros(len(examples), 0, dtype=torch.int64, device=examples.device)
        return torch.stack(
            [torch.randint(n, examples.shape, generator=generator, device=generator.device) for n in self.sizes], dim=-1
        )

    def label(self, examples: Tensor, factors: Tensor) -> Tensor | None:
        """Return the classes (B,) of the examples (B,) at the factors (B, S, F), all on the CPU; None without any."""
        return None

    def canonical(self, examples: Tensor) -> Tensor | None:
        """Return the images (B, channel, height, width) of examples (B,) in no pose, on the device; None without."""
        return None

    def sequences(self, examples: Tensor, starts: Tensor, transformation: Tensor) -> SequenceBatch:
        """Render sequences from the starts (B, F), in which the factor `transformation` (B,) advances by one a frame.

        It goes on modulo its size, or from index 0 where paths are open; where transformations are combined all factors
        that transform advance. The arguments are on the CPU, the batch is on the source's device.
        """
        factors, *known = (
            None if x is None else x.to(self.device) for x in self.describe(examples, starts, transformation)
        )
        return SequenceBatch(self.render(examples.to(self.device), factors), factors if self.factors else None, *known)

    def describe(self, examples: Tensor, starts: Tensor, transformation: Tensor) -> tuple[Tensor, Tensor | None, ...]:
        """Return all of a batch but its images, on the CPU: factors, transformation, axis, label and example."""
        factors = self.advance(starts, transformation)
        kind = (transformation, self.axis(transformation)) if self.transformations else (None, None)
        return factors, *kind, self.label(examples, factors), examples

    def axis(self, transformation: Tensor) -> Tensor:
        """Return the numbers (B,) of transformations (B,) among those of the source, from 0; on the CPU."""
        known = torch.tensor(sorted(self.transformations), device=transformation.device)
        return torch.searchsorted(known, transformation)

    def advance(self, starts: Tensor, transformation: Tensor) -> Tensor:
        """Return the factors (B, S, F) of every frame of the sequences that `sequences` makes, all on the CPU.

        Raises:
            ValueError: paths are to be open, but a factor that advances has fewer values than a sequence has frames.

        """
        if not self.transformations:
            return starts[:, None].expand(-1, self.sequence_length, -1)
        step = F.one_hot(transformation, len(self.factors))[:, None]
        if self.combined:
            step = torch.tensor([[[int(factor.transforms) for factor in self.factors]]], device=starts.device)
        time = torch.arange(self.sequence_length, device=starts.device)[:, None]
        starts = starts[:, None]
        if self.open_paths:
            self._check_open()
            starts = starts * (1 - step)
        return (starts + time * step) % torch.tensor(self.sizes, device=starts.device)

    def _check_open(self) -> None:
        """Refuse factors that would come round within a sequence."""
        for factor in self.factors:
            if factor.transforms and len(factor.values) < self.sequence_length:
                raise ValueError(
                    f"{self.name} has open paths of {self.sequence_length} frames, "
                    f"for which {factor.name} needs as many values, got {len(factor.values)}"
                )


class FactorGrid(SequenceSource):
    """A source whose examples are the combinations of its factors: an example is where its sequence starts.

    The index of an example has the factors as its digits, the first one first.
    """

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def start_poses(self, examples: Tensor, generator: torch.Generator) -> Tensor:
        """Return the factors (B, F) that the examples stand for; nothing is drawn."""
        return torch.stack(torch.unravel_index(examples, self.sizes), dim=-1)


class SequenceStream(Dataset[SequenceBatch]):
    """An endless, seeded stream: `stream[i]` is batch number i, a pure function of (source, batch_size, seed, i).

    Any number of workers and a resumed run therefore see the same batches:

        DataLoader(stream, batch_size=None, num_workers=n, sampler=range(first, last))

    (With workers the source must be on the CPU: a forked process cannot use the GPU.) An epoch visits each example
    once, in a random order, and leaves out the last, incomplete batch.
    Start poses and transformations are drawn uniformly, anew for each batch.

    Where several processes share every batch, `rank` is the number of this one and `processes` how many there are: it
    then draws for the whole batch, but renders the part of it alone, `part`, that is its own.

    Raises:
        ValueError: the examples cannot fill a batch, or the processes cannot share it equally.

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
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole batches in one pass over the examples."""
        return len(self.source) // self.batch_size

    def __getitem__(self, i: int) -> SequenceBatch:
        return self.source.sequences(*self.draw(i))._replace(first=self.part.start, total=self.batch_size)

    def draw(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Decide what batch i is, on the CPU: examples (B,), starts (B, F) and transformation (B,)."""
        if i < 0:
            raise IndexError(f"an endless stream has no batch {i}")
        epoch, step = divmod(i, self.steps_per_epoch)
        examples = self._examples_of(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        generator = seeded_generator(self.seed, _BATCH, i)
        choices = torch.tensor(list(self.source.transformations) or [0], device="cpu")
        transformation = choices[torch.randint(len(choices), (self.batch_size,), generator=generator, device="cpu")]
        starts = self.source.start_poses(examples, generator)
        return examples[self.part], starts[self.part], transformation[self.part]

    def _examples_of(self, epoch: int) -> Tensor:
        """Return the examples in the epoch's order; the last epoch asked for is kept."""
        if epoch != self._epoch:
            self._order = torch.randperm(
                len(self.source), generator=seeded_generator(self.seed, _EPOCH, epoch), device="cpu"
            )
            self._epoch = epoch
        return self._order


@dataclass(frozen=True)
class FixedSequences:
    """The sequences that every model is evaluated on, made once and kept: 0.17 MB each of MNIST, 0.25 MB of sprites.

    Recorded ones are not kept, but read again for each who asks.
    """

    source: SequenceSource
    batches: Sequence[SequenceBatch]

    @classmethod
    def take(cls, source: SequenceSource, sequences: int, batch_size: int) -> FixedSequences:
        """Take the first `sequences` of the seeded stream of the test split, rounded up to whole batches.

        Of a recorded source each is taken once, in its order, as many as there are.
        """
        if source.recorded:
            examples = torch.arange(min(sequences, len(source)), device="cpu")
            return cls(source, RecordedBatches(source, examples.split(batch_size)))
        stream = SequenceStream(source, batch_size, EVALUATION_SEED)
        return cls(source, [stream[i] for i in range(-(-sequences // batch_size))])


@dataclass(frozen=True)
class RecordedBatches(Sequence[SequenceBatch]):
    """Batches of a recorded source, of the examples in each, read when they are asked for."""

    source: SequenceSource
    examples: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> SequenceBatch:
        examples = self.examples[i]
        nothing = torch.zeros(len(examples), dtype=torch.int64, device="cpu")
        return self.source.sequences(examples, nothing[:, None].expand(-1, len(self.source.factors)), nothing)


def seeded_generator(seed: int, purpose: int = _SPLIT, index: int = 0) -> torch.Generator:
    """Make a CPU generator for draw number `index` of a purpose, unlike that of any neighbour: SeedSequence mixes."""
    # 32 bits: torch's CPU generator ignores the others.
    (state,) = np.random.SeedSequence(seed, spawn_key=(purpose, index)).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state))
