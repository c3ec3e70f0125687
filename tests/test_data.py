"""Sources against independent transformations of single images, and the stream against its promises."""

import io
import itertools
import math
import os
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST

import tvae.data
from tvae import sprites
from tvae.data import (
    DataError,
    DSpritesSequences,
    Factor,
    MNISTPerspectiveHueSequences,
    MNISTRotationHueSequences,
    MNISTSequences,
    SequenceSource,
    SequenceStream,
    SpriteSequences,
    open_source,
)


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
    device = torch.device("cpu")

    def __len__(self):
        return 103

    def start_poses(self, examples, generator):
        return torch.stack([torch.randint(n, examples.shape, generator=generator) for n in self.sizes], -1)

    def render(self, examples, factors):
        return examples[:, None, None, None, None].float().expand(*factors.shape[:2], 1, 1, 1)


def numbers(batch):
    """Examples of a batch of Echo."""
    return batch.images[:, 0, 0, 0, 0].long().tolist()


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The stream


def test_one_factor_advances_and_the_others_stand_still(source):
    stream = SequenceStream(source, batch_size=8, seed=1)
    for i in range(5):
        images, factors, transformation, _ = stream[i]
        assert images.shape == (8, source.sequence_length, *source.image_shape)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert factors.dtype == transformation.dtype == torch.int64
        for sequence, moving in zip(factors.tolist(), transformation.tolist(), strict=True):
            assert moving in source.transformations
            for before, after in itertools.pairwise(sequence):
                before[moving] = (before[moving] + 1) % len(source.factors[moving].values)
                assert after == before


def test_shape_never_advances():
    source = SpriteSequences()
    assert source.transformations == {1: "scale", 2: "orientation", 3: "x", 4: "y"}


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
        tvae.data._generator(seed, purpose, i).initial_seed()
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


# MNIST


def test_mnist_factors():
    rotation, scale, hue = MNISTSequences.factors
    steps = (0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260, 280, 300, 320, 340)
    assert (rotation, hue) == (Factor("rotation", steps), Factor("hue", steps))
    assert scale.name == "scale"
    printed = "0.60 0.64 0.68 0.72 0.76 0.79 0.83 0.87 0.91 0.95 0.99 1.03 1.07 1.11 1.14 1.18 1.22 1.26"  # the paper's
    assert scale.values == tuple(map(float, printed.split()))


def single_frame(image, rotation, scale, hue):
    """One frame (3, 28, 28) by torchvision, whose affine turns clockwise and whose hue runs from -0.5 to 0.5."""
    red = torch.stack((image, torch.zeros_like(image), torch.zeros_like(image)))
    warped = tvf.affine(red, -rotation, [0, 0], scale, [0.0, 0.0], tvf.InterpolationMode.BILINEAR)
    return tvf.adjust_hue(warped, (hue + 180) % 360 / 360 - 0.5)


def test_mnist_frames_equal_single_transformed_images(mnist_dir):
    """Every rotation, scale and hue, in three different combinations.

    A sampling coordinate is at most 14 * 1.5 / 0.6 = 33 pixels, rounded four times (eps 6e-8), and two neighbouring
    pixels of noise differ by up to 1 along each axis: 2 * 4 * 33 * 6e-8 = 1.6e-5, twice for the two roundings.
    """
    source = MNISTSequences(mnist_dir, "test")
    k = torch.arange(18)
    factors = torch.stack([torch.stack((k, 5 * k + 6 * row, 7 * k + row), dim=-1) % 18 for row in range(3)])
    images = source.render(torch.tensor([4, 0, 19]), factors)
    assert images.dtype == torch.float32
    for (row, example), step in itertools.product(enumerate((4, 0, 19)), range(18)):
        pose = (factor.values[i] for factor, i in zip(source.factors, factors[row, step].tolist(), strict=True))
        expected = single_frame(source.images[example] / 255, *pose)
        torch.testing.assert_close(images[row, step], expected, rtol=0, atol=3.2e-5)


def test_mnist_rotates_counter_clockwise_about_the_centre(mnist_dir):
    class QuarterTurns(MNISTSequences):
        factors = (Factor("rotation", (0, 90, 180, 270)), Factor("scale", (1,)), Factor("hue", (0,)))

    source = QuarterTurns(mnist_dir, "test")
    letter = torch.zeros(28, 28, dtype=torch.uint8)  # an L
    letter[3:20, 5:8] = 255
    letter[17:20, 5:15] = 255
    source.images = letter[None]
    frames = source.render(torch.tensor([0]), torch.tensor([[[turns, 0, 0] for turns in range(4)]]))[0]
    for turns in range(4):
        # torch.rot90 turns counter-clockwise for dims (0, 1), as seen with rows growing downwards.
        expected = torch.rot90(letter / 255, turns, (0, 1))
        torch.testing.assert_close(frames[turns, 0], expected, rtol=0, atol=1e-5)


def test_mnist_scale_magnifies(mnist_dir):
    """The lengths of a 12-pixel bar, as sums over a row: 60 % and 126 %."""
    source = MNISTSequences(mnist_dir, "test")
    source.images = torch.zeros(1, 28, 28, dtype=torch.uint8)
    source.images[0, 8:20, 8:20] = 255
    frames = source.render(torch.tensor([0]), torch.tensor([[[0, 0, 0], [0, 17, 0]]]))[0]
    torch.testing.assert_close(frames[:, 0, 14].sum(1), torch.tensor([0.6 * 12, 1.26 * 12]), rtol=0, atol=0.35)


def test_mnist_hues(mnist_dir):
    """Red, yellow, green, cyan, blue, magenta are three indices apart."""
    source = MNISTSequences(mnist_dir, "test")
    source.images = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    frames = source.render(torch.tensor([0]), torch.tensor([[[0, 17, hue] for hue in range(0, 18, 3)]]))[0]
    colours = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]]
    torch.testing.assert_close(frames[:, :, 14, 14], torch.tensor(colours).float(), rtol=0, atol=1e-6)


def test_combined_transformations_advance_together_and_come_round(mnist_dir):
    for name in ("mnist-rotation-hue", "mnist-perspective-hue"):
        source = open_source(name, "train", mnist_dir)
        assert list(source.transformations.values()) == [" + ".join(name.split("-")[1:])]
        _, factors, transformation, _ = SequenceStream(source, batch_size=8, seed=1)[0]
        assert torch.equal(transformation, torch.zeros(8, dtype=torch.int64))
        assert (factors[:, 0, 0] != factors[:, 0, 2]).any()  # they start independently
        advanced = (factors - factors[:, :1]) % 18
        assert torch.equal(advanced, (torch.arange(18)[:, None] * torch.tensor([1, 0, 1])).expand(8, -1, -1))


def test_combined_rotation_and_hue_is_one_after_the_other(mnist_dir):
    combined, single = MNISTRotationHueSequences(mnist_dir, "train"), MNISTSequences(mnist_dir, "train")
    examples = torch.arange(3)
    batch = combined.sequences(examples, torch.tensor([[0, 0, 0], [5, 0, 17], [11, 0, 3]]), torch.zeros(3).long())
    nearest = batch.factors.clone()
    nearest[..., 1] = 10  # the scale of 99 %, undone by hand below
    single._scale[10] = 1.0
    torch.testing.assert_close(batch.images, single.render(examples, nearest), rtol=0, atol=0)


def test_perspective_is_a_turn_in_space_seen_by_a_camera(mnist_dir):
    """Against torchvision, which is told where the corners of the image go, for each angle."""
    source = MNISTPerspectiveHueSequences(mnist_dir, "train")
    poses = torch.stack([torch.arange(18), torch.zeros(18).long(), torch.zeros(18).long()], dim=-1)
    frames = source.render(torch.tensor([4]), poses[None])[0]
    assert torch.equal(frames[:, 1:], torch.zeros(18, 2, 28, 28))  # hue 0 is red
    digit = source.images[4:5] / 255
    corners = np.array([[-14, -14], [14, -14], [14, 14], [-14, 14]])  # x right, y down, from the centre
    for frame, degrees in zip(frames[:, 0], range(0, 360, 20), strict=True):
        a = math.radians(degrees)
        in_plane = corners @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])  # clockwise
        right, depth = math.cos(a) * in_plane[:, 0], math.sin(a) * in_plane[:, 0]
        distance = math.hypot(28, 28) / (2 * math.sin(a)) if degrees % 180 else math.inf
        seen = np.stack([right, in_plane[:, 1]], 1) / (1 + depth / distance)[:, None]
        # torchvision solves for the transformation and rounds positions to some 1e-5 of a pixel.
        expected = tvf.perspective(digit, (corners + 14).tolist(), (seen + 14).tolist())[0]
        torch.testing.assert_close(frame, expected, rtol=0, atol=1e-3, msg=lambda m, d=degrees: f"{d} degrees: {m}")


def test_perspective_of_half_a_turn_is_upside_down(mnist_dir):
    source = MNISTPerspectiveHueSequences(mnist_dir, "train")
    frames = source.render(torch.tensor([4]), torch.tensor([[[0, 0, 0], [9, 0, 0]]]))[0, :, 0]
    torch.testing.assert_close(frames[0], source.images[4] / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[1], (source.images[4] / 255).flip(0), rtol=0, atol=1e-5)


def test_mnist_white_stays_within_one(mnist_dir):
    source = MNISTSequences(mnist_dir, "test")
    source.images = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    images = source.render(
        torch.tensor([0]), torch.cartesian_prod(torch.arange(18), torch.arange(18), torch.tensor([9]))[None]
    )
    assert images.min() >= 0
    assert images.max() <= 1


def test_mnist_splits(mnist_dir):
    parts = {split: MNISTSequences(mnist_dir, split).images[:, 0, 0].tolist() for split in tvae.data.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "validation": 10, "test": 20}
    assert sorted(parts["train"] + parts["validation"]) == list(range(50))
    assert parts["test"] == list(range(50, 70))
    assert parts["train"] != sorted(parts["train"])
    # For good, since results of different versions must be comparable.
    assert parts["validation"] == [18, 32, 11, 31, 37, 38, 44, 4, 49, 16]


@pytest.mark.skipif("TVAE_DATA_DIR" not in os.environ, reason="TVAE_DATA_DIR does not name a folder with MNIST")
def test_real_mnist():
    folder = os.environ["TVAE_DATA_DIR"]
    parts = {split: MNISTSequences(folder, split).images for split in tvae.data.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 48000, "validation": 12000, "test": 10000}
    together = torch.cat((parts["train"], parts["validation"])).long().sum(0)
    assert torch.equal(together, MNIST(folder, train=True).data.long().sum(0))
    assert torch.equal(parts["test"], MNIST(folder, train=False).data)


def test_missing_mnist_names_the_folder(tmp_path):
    with pytest.raises(DataError, match=r"MNIST/raw.*pass --data-dir") as raised:
        open_source("mnist", "train", tmp_path)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("spoil", [lambda content: content[:-1], lambda content: b"<html>" + content])
def test_damaged_mnist_is_a_data_error(mnist_dir, tmp_path, spoil):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_dir / "MNIST" / "raw").iterdir():
        (raw / path.name).write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="cannot read MNIST"):
        open_source("mnist", "train", tmp_path)


def test_only_mnist_needs_torchvision(mnist_dir):
    program = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from tvae.data import DataError, open_source\n"
        "open_source('sprites', 'train')\n"
        f"try: open_source('mnist', 'train', {str(mnist_dir)!r})\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "install the torchvision" in done.stdout


# Sprites and dSprites


def test_sprite_factors():
    """As in the files of dSprites: 6 scales, 40 orientations around the circle, 32 positions from 0 to 1."""
    shape, scale, orientation, x, y = SpriteSequences.factors
    assert shape == Factor("shape", (0, 1, 2), transforms=False)
    assert [factor.name for factor in (scale, orientation, x, y)] == ["scale", "orientation", "x", "y"]
    assert scale.values == pytest.approx(np.linspace(0.5, 1, 6)[1:6])
    assert orientation.values == pytest.approx(np.linspace(0, 2 * np.pi, 40)[:30:2])
    assert x.values == y.values == pytest.approx(np.linspace(0, 1, 32)[:30:2])


def test_sprite_examples_are_their_start_poses():
    source = SpriteSequences()
    assert len(source) == 50_625
    poses = source.start_poses(torch.arange(50_625), torch.Generator())
    assert torch.equal(poses, torch.cartesian_prod(*map(torch.arange, (3, 5, 15, 15, 15))))


def test_sprite_sequences_equal_frames_cut_one_by_one():
    source = SpriteSequences()
    images, factors, *_ = SequenceStream(source, batch_size=16, seed=5)[2]
    canvases = sprites.draw_canvases()
    for sequence, poses in zip(images, factors.tolist(), strict=True):
        for image, (shape, scale, orientation, x, y) in zip(sequence, poses, strict=True):
            top, left = 28 - 2 * y, 28 - 2 * x
            window = canvases[shape, scale, orientation, top : top + 64, left : left + 64]
            assert torch.equal(image[0], window.float())


SIZES = (3, 2, 4, 5, 3)
KEPT = (range(3), range(1, 2), range(0, 4, 2), range(0, 5, 2), range(1, 3))


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_imgs():
    return np.random.default_rng(1).integers(2, size=(360, 64, 64), dtype=np.uint8)


def test_dsprites_reader_keeps_the_subset(small_imgs, tmp_path):
    path = tmp_path / "small.npz"
    path.write_bytes(npz(imgs=small_imgs, latents_classes=np.zeros((360, 6))))
    packed = tvae.data._read_dsprites(path, SIZES, KEPT)
    assert packed.shape == (3, 1, 2, 3, 2, 512)
    for place, index in zip(np.ndindex(3, 1, 2, 3, 2), itertools.product(*KEPT), strict=True):
        image = small_imgs[np.ravel_multi_index(index, SIZES)]
        assert np.array_equal(np.unpackbits(packed[place]).reshape(64, 64), image)


def damage(content, first, patch):
    return content[:first] + patch + content[first + len(patch) :]


def archive(imgs, compression=zipfile.ZIP_STORED, cut=None, more=b""):
    """An archive with a right checksum, of an imgs.npy without its end or with more after it. Its data begin at 38."""
    buffer, member = io.BytesIO(), io.BytesIO()
    np.save(member, imgs)
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("imgs.npy", member.getvalue()[:cut] + more)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda imgs: npz(images=imgs), r"should contain imgs.npy, found \['images.npy'\]"),
        (lambda imgs: npz(imgs=imgs[1:]), r"uint8 \(360, 64, 64\) in C order, found uint8 \(359, 64, 64\)"),
        (lambda imgs: npz(imgs=imgs.astype(np.int8)), "should be uint8 .* found int8"),
        (lambda imgs: npz(imgs=np.asfortranarray(imgs)), "found uint8 .* in Fortran order"),
        (lambda imgs: npz(imgs=np.array([None])), "found object"),
        (lambda imgs: npz(imgs=imgs)[:-1000], "not a whole dSprites archive"),
        (lambda imgs: damage(archive(imgs, zipfile.ZIP_DEFLATED), 38, b"\x07"), "not a whole .*invalid block type"),
        (lambda imgs: damage(archive(imgs), 360 * 4096, b"2"), "not a whole dSprites archive .*CRC"),
        (lambda imgs: archive(imgs, cut=-4096), "not a whole dSprites archive"),
        (lambda imgs: archive(imgs, more=b"x"), "goes on after its last image"),
        (lambda imgs: b"<html>not found</html>", "not a whole dSprites archive"),
        (lambda imgs: b"", "not a whole dSprites archive"),
    ],
    ids=[
        "key",
        "shape",
        "dtype",
        "order",
        "pickle",
        "truncated",
        "deflate",
        "checksum",
        "short",
        "long",
        "not a zip",
        "empty",
    ],
)
def test_wrong_dsprites_file(small_imgs, tmp_path, content, message):
    path = tmp_path / "wrong.npz"
    path.write_bytes(content(small_imgs))
    with pytest.raises(DataError, match=message) as raised:
        tvae.data._read_dsprites(path, SIZES, KEPT)
    assert str(path) in str(raised.value)


def test_dsprites_gives_the_frames_of_its_file(tmp_path, monkeypatch):
    """Filled with our own sprites, it cannot be told from them."""
    own = SpriteSequences()
    (tmp_path / Path(tvae.data._DSPRITES_URL).name).touch()

    def read(path, sizes, kept):
        assert [len(part) for part in kept] == list(own.sizes)
        poses = torch.cartesian_prod(*map(torch.arange, own.sizes)).view(*own.sizes, 5)
        frames = [sprites.cut_frames(own._canvases, part).flatten(-2).numpy() for part in poses]
        return np.stack([np.packbits(part, axis=-1) for part in frames])

    monkeypatch.setattr(tvae.data, "_read_dsprites", read)
    source = open_source("dsprites", "train", tmp_path)
    assert source.factors == own.factors
    for i in range(3):
        assert_same(SequenceStream(source, 8, seed=2)[i], SequenceStream(own, 8, seed=2)[i])


def test_dsprites_is_downloaded_whole_or_not_at_all(small_imgs, tmp_path, monkeypatch):
    origin, folder = tmp_path / "origin.npz", tmp_path / "new"
    monkeypatch.setattr(tvae.data, "_DSPRITES_URL", origin.as_uri())
    with pytest.raises(DataError, match=r"no origin.npz in .*new; pass --data-dir"):
        DSpritesSequences(folder)
    with pytest.raises(DataError, match=r"cannot download file:.*origin.npz"):
        DSpritesSequences(folder, download=True)

    def break_off(url, path):
        path.write_bytes(b"PK")
        raise urllib.error.ContentTooShortError("got 2 bytes of 3", None)

    with monkeypatch.context() as broken:
        broken.setattr("urllib.request.urlretrieve", break_off)
        with pytest.raises(DataError, match="got 2 bytes of 3"):
            DSpritesSequences(folder, download=True)
    assert list(folder.iterdir()) == []
    origin.write_bytes(npz(imgs=small_imgs))
    with pytest.raises(DataError, match=r"found uint8 \(360, 64, 64\)"):
        DSpritesSequences(folder, download=True)
    assert [path.name for path in folder.iterdir()] == ["origin.npz"]


def test_open_source(mnist_dir):
    assert isinstance(open_source("sprites", "test"), SpriteSequences)
    assert len(open_source("mnist", "validation", mnist_dir)) == 10
    with pytest.raises(
        ValueError, match="unknown source 'cifar'; choose from sprites, sprites-shifts, dsprites, mnist,"
    ):
        open_source("cifar", "train")
    with pytest.raises(ValueError, match="unknown split 'valid'; choose from train, validation, test"):
        open_source("sprites", "valid")
    with pytest.raises(DataError, match="mnist is read from files: pass --data-dir"):
        open_source("mnist", "train")


def test_still_digits_are_the_images_of_mnist(mnist_dir):
    source = open_source("mnist-still", "test", mnist_dir)
    examples = torch.tensor([3, 0])
    batch = source.sequences(examples, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert batch.images.shape == (2, 1, 1, 28, 28)
    assert torch.equal(batch.images[:, 0, 0] * 255, source.images[examples].float())


def test_sprites_that_shift_do_nothing_else():
    source = open_source("sprites-shifts", "train")
    assert list(source.transformations.values()) == ["x", "y"]
    batch = SequenceStream(source, 32, seed=0)[0]
    assert set(batch.transformation.tolist()) == set(source.transformations)
    still = batch.factors[:, 1:] == batch.factors[:, :1]
    assert still[:, :, :3].all()  # shape, scale and orientation
    assert not still[:, :, 3:].all(2).any()
    assert torch.equal(batch.axis == 1, batch.transformation == 4)  # of y; 0 is that of x
    assert torch.equal(source.axis(torch.tensor([4, 3])), torch.tensor([1, 0]))
