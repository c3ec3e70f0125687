"""The stream of sequences against its promises, and what a batch holds of sources that know much or little."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from tvae.data import (
    EVALUATION_SEED,
    Factor,
    FixedSequences,
    SequenceBatch,
    SequenceSource,
    SequenceStream,
    open_source,
)
from tvae.data.mnist import MNISTSequences
from tvae.data.sequences import seeded_generator
from tvae.data.sprites import SpriteSequences


@pytest.fixture(params=["mnist", "sprites"])
def source(request):
    if request.param == "mnist":
        return MNISTSequences(request.getfixturevalue("mnist_dir"), "train")
    return SpriteSequences()


class Echo(SequenceSource):
    """103 examples; a frame is one pixel, the example's number."""

    name = "echo"
    image_shape = (1, 1, 1)
    sequence_length = 6
    factors = (Factor("a", (0, 1, 2)), Factor("b", (0,), transforms=False), Factor("c", (0, 1, 2, 3, 4)))

    def __len__(self):
        return 103

    def render(self, examples, factors):
        return examples[:, None, None, None, None].float().expand(*factors.shape[:2], 1, 1, 1)


def numbers(batch):
    """Examples of a batch of Echo."""
    return batch.images[:, 0, 0, 0, 0].long().tolist()


class Still(Echo):
    """A source with factors of which no sequence advances any."""

    factors = tuple(replace(factor, transforms=False) for factor in Echo.factors)


class Bare(Echo):
    """A source of which nothing is known but its frames."""

    factors = ()


class Open(Echo):
    """A source whose paths are open: three frames, for the three values of `a`."""

    sequence_length = 3
    open_paths = True


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x == y if x is None or isinstance(x, int) else torch.equal(x, y)


def test_one_factor_advances_and_the_others_stand_still(source):
    stream = SequenceStream(source, batch_size=8, seed=1)
    for i in range(5):
        images, factors, transformation, *_ = stream[i]
        assert images.shape == (8, source.sequence_length, *source.image_shape)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert factors.dtype == transformation.dtype == torch.int64
        for sequence, moving in zip(factors.tolist(), transformation.tolist(), strict=True):
            assert moving in source.transformations
            for before, after in itertools.pairwise(sequence):
                before[moving] = (before[moving] + 1) % len(source.factors[moving].values)
                assert after == before


def test_open_paths_begin_at_index_0_and_do_not_come_round():
    """Whatever the starts say of the factor that advances, and with what they say of the others."""
    starts = torch.tensor([[2, 0, 4], [1, 0, 3]])
    batch = Open().sequences(torch.tensor([7, 8]), starts, torch.tensor([0, 2]))
    assert batch.factors.tolist() == [[[0, 0, 4], [1, 0, 4], [2, 0, 4]], [[1, 0, 0], [1, 0, 1], [1, 0, 2]]]
    assert batch.axis.tolist() == [0, 1]

    class Together(Open):
        combined = True

    batch = Together().sequences(torch.tensor([7]), starts[:1], torch.tensor([0]))
    assert batch.factors.tolist() == [[[0, 0, 0], [1, 0, 1], [2, 0, 2]]]

    class Long(Open):
        sequence_length = 4

    with pytest.raises(ValueError, match="echo has open paths of 4 frames, for which a needs as many values, got 3"):
        SequenceStream(Long(), 10, seed=0)[0]


def test_of_open_paths_all_starts_but_the_moving_ones_are_drawn():
    """Chi-square of the other factor's five values over 1,000 sequences, below its mean plus five deviations."""
    batches = [SequenceStream(Open(), 100, seed=4)[i] for i in range(10)]
    factors = torch.cat([batch.factors[batch.transformation == 0] for batch in batches])
    assert torch.equal(factors[..., 0], torch.arange(3).expand(len(factors), -1))
    counts = factors[:, 0, 2].bincount(minlength=5)
    expected = len(factors) / 5
    assert ((counts - expected) ** 2 / expected).sum() < 4 + 5 * 8**0.5


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and later, about threads
def test_workers_and_resuming_change_nothing(source):
    stream = SequenceStream(source, batch_size=4, seed=7)
    first = stream.steps_per_epoch - 2  # across an epoch's end
    expected = [stream[i] for i in range(first, first + 5)]
    resumed = SequenceStream(source, batch_size=4, seed=7)
    for workers in (0, 2):
        loader = DataLoader(resumed, batch_size=None, num_workers=workers, sampler=range(first, first + 5))
        for batch, wanted in zip(loader, expected, strict=True):
            assert_same(batch, wanted)
    assert_same(resumed[first], expected[0])  # back in the epoch before


def test_seed_and_index_change_everything():
    batches = [SequenceStream(Echo(), 10, seed)[i] for seed in (0, 1) for i in (0, 1, 10)]
    for a, b in itertools.combinations(batches, 2):
        assert numbers(a) != numbers(b)
        assert not torch.equal(a.factors[:, 0], b.factors[:, 0])
        assert not torch.equal(a.transformation, b.transformation)


def test_neither_neighbouring_indices_nor_purposes_share_draws():
    states = [
        seeded_generator(seed, purpose, i).initial_seed()
        for seed in range(20)
        for purpose in range(3)
        for i in range(20)
    ]
    assert len(set(states)) == 1200


def test_an_epoch_visits_each_example_once():
    stream = SequenceStream(Echo(), batch_size=10, seed=3)
    assert stream.steps_per_epoch == 10  # 103 // 10: three examples a time are left out
    epochs = [[n for step in range(10) for n in numbers(stream[10 * epoch + step])] for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch)) == 100
        assert set(epoch) <= set(range(103))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]


def test_draws_are_uniform():
    """Chi-square of 10,000 draws, below its mean plus five standard deviations."""
    stream = SequenceStream(Echo(), batch_size=100, seed=11)
    batches = [stream[i] for i in range(100)]
    starts = torch.cat([batch.factors[:, 0] for batch in batches])
    transformation = torch.cat([batch.transformation for batch in batches])
    cells = {
        "start and transformation": (transformation // 2 * 3 + starts[:, 0]) * 5 + starts[:, 2],  # 2 x 3 x 5
        "consecutive sequences": starts[:-1, 2] * 5 + starts[1:, 2],  # 5 x 5
    }
    for what, cell in cells.items():
        counts = cell.bincount()
        expected = len(cell) / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        freedom = len(counts) - 1
        assert len(counts) in (25, 30)
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5, what


@pytest.mark.parametrize("batch_size", [0, 104])
def test_a_batch_size_out_of_range_is_an_error(batch_size):
    with pytest.raises(ValueError, match=f"between 1 and the 103 examples of echo, got {batch_size}"):
        SequenceStream(Echo(), batch_size, seed=0)


def test_there_is_no_batch_before_the_first():
    with pytest.raises(IndexError, match="no batch -1"):
        SequenceStream(Echo(), 10, seed=0)[-1]


def test_processes_that_share_a_batch_have_its_parts():
    whole = SequenceStream(Echo(), 6, seed=1)[3]
    assert (whole.first, whole.total) == (0, 6)
    for rank in range(3):
        part = SequenceStream(Echo(), 6, seed=1, rank=rank, processes=3)[3]
        assert (part.first, part.total) == (2 * rank, 6)
        assert_same(part.select([0, 1]), whole.select([2 * rank, 2 * rank + 1]))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 4 processes, got 6"):
        SequenceStream(Echo(), 6, seed=1, processes=4)


def test_joined_batches_have_the_sequences_of_all():
    stream = SequenceStream(SpriteSequences(), 4, seed=0)
    joined = SequenceBatch.joined([stream[0], stream[1]])
    assert_same(joined.select([0, 1, 2, 3]), stream[0].select([0, 1, 2, 3]))
    assert_same(joined.select([4, 5, 6, 7]), stream[1].select([0, 1, 2, 3]))
    bare = SequenceBatch.joined([SequenceBatch(stream[0].images), SequenceBatch(stream[1].images)])
    assert_same(bare, SequenceBatch(joined.images))


def test_selected_sequences_are_a_batch_of_their_own():
    """In the order in which they are asked for, of all that is known, without their place in another batch."""
    parts = [torch.randn(5, 3, 1, 2, 2), torch.arange(30).view(5, 3, 2), *torch.arange(15).view(3, 5)]
    batch = SequenceBatch(*parts, first=5, total=10)
    for indices in ([3, 0], torch.tensor([3, 0])):
        chosen = batch.select(indices)
        assert_same(chosen, SequenceBatch(*(part[[3, 0]] for part in parts)))
        assert (chosen.first, chosen.total) == (0, None)
    assert_same(SequenceBatch(parts[0]).select([2]), SequenceBatch(parts[0][[2]]))


def test_of_a_source_without_factors_a_batch_holds_images_and_examples_alone():
    stream = SequenceStream(Bare(), 10, seed=3)
    batch = stream[1]
    assert_same(batch, SequenceBatch(batch.images, example=stream.draw(1)[0], total=10))
    assert batch.images.shape == (10, 6, 1, 1, 1)
    assert numbers(batch) != numbers(SequenceStream(Bare(), 10, seed=3)[0])


@pytest.mark.parametrize("combined", [False, True])
def test_a_source_without_transformations_stands_still(combined, monkeypatch):
    monkeypatch.setattr(Still, "combined", combined)
    assert Still().transformations == {}
    _, factors, *unknown, example, first, total = SequenceStream(Still(), 10, seed=3)[1]
    assert unknown == [None, None, None]
    assert (len(example), first, total) == (10, 0, 10)
    assert torch.equal(factors, factors[:, :1].expand(-1, 6, -1))
    assert len(factors[:, 0].unique(dim=0)) > 3  # but starts anywhere


def test_the_axis_numbers_the_transformations():
    batch = SequenceStream(Echo(), 50, seed=3)[0]
    assert set(batch.transformation.tolist()) == {0, 2}
    assert torch.equal(batch.axis, batch.transformation // 2)
    assert batch.label is None


def test_labels_are_of_the_examples_and_their_factors():
    class Labelled(Echo):
        classes = ("even", "odd")

        def label(self, examples, factors):
            assert factors.shape == (50, 6, 3)
            return examples % 2

    batch = SequenceStream(Labelled(), 50, seed=3)[0]
    assert batch.label.tolist() == [number % 2 for number in numbers(batch)]


def test_fixed_sequences_are_the_first_of_the_seeded_stream_in_whole_batches():
    source = Echo()
    fixed = FixedSequences.take(source, 21, batch_size=10)
    assert fixed.source is source
    assert len(fixed.batches) == 3
    for i, batch in enumerate(fixed.batches):
        assert_same(batch, SequenceStream(source, 10, EVALUATION_SEED)[i])


@pytest.mark.parametrize("kind", ["mnist", "sprites", "shapes"])
def test_sources_make_the_same_whatever_the_defaults_are(kind, mnist_dir):
    """float32 on the source's own device, here with a default device that has no memory."""

    def first():
        return SequenceStream(open_source(kind, "train", mnist_dir), 4, seed=0)[1]

    expected, before = first(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            actual = first()
    finally:
        torch.set_default_dtype(before)
    assert actual.images.dtype == torch.float32
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y
