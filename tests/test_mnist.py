"""MNIST sources against independent transformations of single images."""

import importlib
import itertools
import math
import os
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from torchvision.datasets import MNIST

import tvae.data
from tvae.data import SPLITS, DataError, Factor, SequenceStream, open_source
from tvae.data.mnist import (
    MNISTOpenSequences,
    MNISTPerspectiveHueSequences,
    MNISTRotationHueSequences,
    MNISTSequences,
)


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
        _, factors, transformation, *_ = SequenceStream(source, batch_size=8, seed=1)[0]
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


def test_still_digits_are_the_images_of_mnist(mnist_dir):
    source = open_source("mnist-still", "test", mnist_dir)
    examples = torch.tensor([3, 0])
    batch = source.sequences(examples, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert batch.images.shape == (2, 1, 1, 28, 28)
    assert torch.equal(batch.images[:, 0, 0] * 255, source.images[examples].float())


def test_mnist_splits(mnist_dir):
    parts = {split: MNISTSequences(mnist_dir, split).images[:, 0, 0].tolist() for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "validation": 10, "test": 20}
    assert sorted(parts["train"] + parts["validation"]) == list(range(50))
    assert parts["test"] == list(range(50, 70))
    assert parts["train"] != sorted(parts["train"])
    # For good, since results of different versions must be comparable.
    assert parts["validation"] == [18, 32, 11, 31, 37, 38, 44, 4, 49, 16]


def test_labels_are_the_digits_in_the_order_of_the_images(mnist_dir):
    """Pixel (0, 0) numbers the images from 0 to 69, of which the last 20 are the test set's."""
    for name in ("mnist", "mnist-rotation-hue", "mnist-perspective-hue", "mnist-still", "mnist-open"):
        for split, batch_size in (("train", 40), ("validation", 10), ("test", 20)):
            source = open_source(name, split, mnist_dir)
            assert source.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
            examples, *_ = SequenceStream(source, batch_size, seed=1).draw(0)
            batch = SequenceStream(source, batch_size, seed=1)[0]
            assert torch.equal(batch.label, source.images[examples, 0, 0].long() % 10)
            assert batch.label.dtype == torch.int64


def test_open_factors():
    rotation, scale, hue = MNISTOpenSequences.factors
    assert rotation == Factor("rotation", (0, 10, 20, 30, 40, 50, 60, 70, 80))
    assert scale == Factor("scale", (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8))
    assert hue == Factor("hue", (0, 20, 40, 60, 80, 100, 120, 140, 160))
    assert (MNISTOpenSequences.sequence_length, MNISTOpenSequences.open_paths) == (9, True)


def test_open_paths_of_all_kinds_begin_with_the_digit_as_it_is(mnist_dir):
    """And every frame is the digit transformed by hand; the tolerances are those of the cyclic frames.

    Neighbouring pixels are at most 14 * 1 = 14 pixels from the centre for scales from 1: less than half of what
    `test_mnist_frames_equal_single_transformed_images` allows for.
    """
    source = open_source("mnist-open", "test", mnist_dir)
    examples = torch.tensor([4, 4, 4])
    batch = source.sequences(examples, source.start_poses(examples, torch.Generator()), torch.arange(3))
    digit = source.images[4] / 255
    assert torch.equal(batch.images[0, 0], batch.images[1, 0])
    assert torch.equal(batch.images[0, 0], batch.images[2, 0])
    torch.testing.assert_close(batch.images[0, 0, 0], digit, rtol=0, atol=1.6e-5)
    assert torch.equal(batch.images[0, 0, 1:], torch.zeros(2, 28, 28))  # red
    for j in range(9):
        for k, pose in enumerate(((10 * j, 1.0, 0), (0, (10 + j) / 10, 0), (0, 1.0, 20 * j))):
            torch.testing.assert_close(batch.images[k, j], single_frame(digit, *pose), rtol=0, atol=1.6e-5)


def test_open_paths_stream_from_zero(mnist_dir):
    batch = SequenceStream(open_source("mnist-open", "train", mnist_dir), 40, seed=0)[0]
    moving = torch.nn.functional.one_hot(batch.transformation, 3)[:, None]
    assert torch.equal(batch.factors, torch.arange(9)[:, None] * moving)
    assert set(batch.transformation.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("split", SPLITS)
def test_seen_and_unseen_digits_are_all_digits_apart(split, mnist_dir):
    """Of every split, in its order, each with its label."""
    every, seen, unseen = (open_source(f"mnist-open{part}", split, mnist_dir) for part in ("", "-seen", "-unseen"))
    assert torch.equal(every.images, MNISTSequences(mnist_dir, split).images)
    for source, shown in ((seen, every.labels < 8), (unseen, every.labels >= 8)):
        assert torch.equal(source.images, every.images[shown])
        assert torch.equal(source.labels, every.labels[shown])
        assert (source.factors, source.classes) == (every.factors, every.classes)
    assert len(seen) + len(unseen) == len(every)
    examples = torch.arange(len(unseen))
    poses = unseen.start_poses(examples, torch.Generator())
    batch = unseen.sequences(examples, poses, torch.zeros(len(unseen), dtype=torch.int64))
    assert torch.equal(batch.label, unseen.images[:, 0, 0].long() % 10)
    assert set(batch.label.tolist()) <= {8, 9}


@pytest.mark.skipif("TVAE_DATA_DIR" not in os.environ, reason="TVAE_DATA_DIR does not name a folder with MNIST")
def test_real_mnist():
    folder = os.environ["TVAE_DATA_DIR"]
    parts = {split: MNISTSequences(folder, split).images for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 48000, "validation": 12000, "test": 10000}
    together = torch.cat((parts["train"], parts["validation"])).long().sum(0)
    assert torch.equal(together, MNIST(folder, train=True).data.long().sum(0))
    test = MNIST(folder, train=False)
    assert torch.equal(parts["test"], test.data)
    assert torch.equal(open_source("mnist-open", "test", folder).images, test.data)
    assert torch.equal(open_source("mnist-open-seen", "test", folder).images, test.data[test.targets < 8])
    assert torch.equal(open_source("mnist-open-unseen", "test", folder).images, test.data[test.targets >= 8])


@pytest.mark.skipif("TVAE_DATA_DIR" not in os.environ, reason="TVAE_DATA_DIR does not name a folder with MNIST")
def test_how_far_real_digits_move_along_open_paths():
    """L1 a frame of the first 300 test digits: of frame 0 kept, of black, of the frame before kept.

    To one decimal. Black is nearer to what turns than what has not turned yet.
    """
    source = open_source("mnist-open", "test", os.environ["TVAE_DATA_DIR"])
    examples = torch.arange(300)
    for k, levels in enumerate(((104.1, 94.1, 43.7), (156.3, 182.5, 43.8), (141.1, 141.1, 31.4))):
        poses = source.start_poses(examples, torch.Generator())
        images = source.sequences(examples, poses, torch.full((300,), k)).images
        guesses = (images[:, :1], torch.zeros(()), images[:, :-1])
        found = [(images[:, 1:] - guess).abs().sum((2, 3, 4)).mean().item() for guess in guesses]
        assert found == pytest.approx(levels, abs=0.06)


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_data_of_the_format_moves_as_digits_do(name, folder, mnist_dir, tmp_path):
    source, digits = open_source(name, "test", mnist_dir), MNISTSequences(mnist_dir, "test")
    raw = (mnist_dir / folder / "raw/t10k-images-idx3-ubyte").read_bytes()[16:]
    assert source.images.numpy().tobytes() == raw != digits.images.numpy().tobytes()
    examples, factors = torch.tensor([3, 0]), torch.tensor([[[2, 4, 7], [3, 4, 7]]] * 2)
    frames = source.render(examples, factors)
    digits.images = source.images
    assert torch.equal(frames, digits.render(examples, factors))
    assert len(set(source.classes)) == 10
    assert source.classes[9] in ("ankle boot", "wo")
    with pytest.raises(DataError, match=rf"cannot read {folder} from {tmp_path}/{folder}/raw .* holds {folder}/raw"):
        open_source(name, "train", tmp_path)


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


def test_only_mnist_needs_torchvision(mnist_dir, monkeypatch):
    monkeypatch.setattr(tvae, "data", tvae.data)  # to be put back
    for name in [name for name in sys.modules if name == "tvae" or name.startswith("tvae.")]:
        monkeypatch.delitem(sys.modules, name)  # as in a new process
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)
    data = importlib.import_module("tvae.data")
    data.open_source("sprites", "train")
    with pytest.raises(data.DataError, match="install the torchvision"):
        data.open_source("mnist", "train", mnist_dir)
