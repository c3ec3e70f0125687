"""MNIST digits in poses: pairs that are drawn each by themselves, and whole turns."""

import math

import pytest
import torch
import torchvision.transforms.functional as tvf

from tvae.data import SOURCES, SequenceStream, open_source

NAMES = ("mnist-posed", "mnist-posed-shift", "mnist-posed-scale")


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_turned_then_scaled_then_shifted(name, mnist_dir):
    """Against torchvision, whose affine turns clockwise about the centre; tolerances as in test_mnist.py."""
    source = open_source(name, "test", mnist_dir)
    generator = torch.Generator().manual_seed(0)
    examples = torch.arange(6)
    factors = source.start_poses(examples, generator)
    images = source.render(examples, factors)
    assert images.shape == (6, 2, 1, 28, 28)
    for b in range(6):
        for l in range(2):
            pose = (factor.values[i] for factor, i in zip(source.factors, factors[b, l].tolist(), strict=True))
            rotation, scale, x, y = pose
            digit = source.images[b][None] / 255
            expected = tvf.affine(digit, -rotation, [x, y], scale, [0.0, 0.0], tvf.InterpolationMode.BILINEAR)
            torch.testing.assert_close(images[b, l], expected, rtol=0, atol=3.2e-5)
    assert torch.equal(source.canonical(examples), source.images[:6, None] / 255)


def test_groups_have_the_poses_that_they_can_undo(mnist_dir):
    ranges = {
        name: {factor.name: (min(factor.values), max(factor.values)) for factor in SOURCES[name].factors}
        for name in NAMES
    }
    assert ranges == {
        "mnist-posed": {"rotation": (-90, 90), "scale": (1, 1), "x": (0, 0), "y": (0, 0)},
        "mnist-posed-shift": {"rotation": (-90, 90), "scale": (1, 1), "x": (-3, 3), "y": (-3, 3)},
        "mnist-posed-scale": {"rotation": (-90, 90), "scale": (0.7, 1.2), "x": (-3, 3), "y": (-3, 3)},
    }
    assert all(open_source(name, "test", mnist_dir).transformations == {} for name in NAMES)
    assert all(SOURCES[name].clustered for name in (*NAMES, "mnist-turning"))
    assert not SOURCES["mnist"].clustered


def test_every_frame_has_a_pose_of_its_own(mnist_dir):
    source = open_source("mnist-posed-shift", "train", mnist_dir)
    stream = SequenceStream(source, 40, seed=0)
    drawn = torch.cat([stream[i].factors for i in range(20)]).double()  # (800, 2, 4)
    turns, shifts = drawn[..., 0], drawn[..., 2:]
    # Uniform: a mean of 1,600, within five of its standard deviations; and no correlation within as many of 800.
    assert turns.mean().item() == pytest.approx(9, abs=5 * math.sqrt((19**2 - 1) / 12 / 1600))
    assert turns.unique().tolist() == list(range(19))
    for x in (turns, shifts[..., 0], shifts[..., 1]):
        assert abs(torch.corrcoef(x.T)[0, 1].item()) < 5 / math.sqrt(800)
    batch, again = stream[3], SequenceStream(source, 40, seed=0)[3]
    assert torch.equal(batch.factors, again.factors)
    assert torch.equal(batch.images, again.images)
    assert torch.equal(batch.label, source.labels[batch.example])
    assert torch.equal(source.canonical(batch.example)[:, 0, 0, 0], source.images[batch.example, 0, 0] / 255)
    part = SequenceStream(source, 40, 0, rank=1, processes=2)[3]
    assert torch.equal(part.images, batch.images[20:])


def test_digits_turn_once_around_from_any_angle(mnist_dir):
    source = open_source("mnist-turning", "test", mnist_dir)
    batch = SequenceStream(source, 20, seed=0)[0]
    assert batch.images.shape == (20, 18, 1, 28, 28)
    assert source.transformations == {0: "rotation"}
    starts = batch.factors[:, :1, 0]
    assert len(starts.unique()) > 5
    assert torch.equal(batch.factors[..., 0], (starts + torch.arange(18)) % 18)
    quarter = torch.rot90(batch.images[:, 0], 2, (-2, -1))
    # Half a turn later: of noise between pixels that differ by 1, at positions of 14 pixels rounded four times.
    torch.testing.assert_close(batch.images[:, 9], quarter, rtol=0, atol=1e-4)
    upright = source.canonical(batch.example)
    for b in range(20):
        where = (batch.factors[b, :, 0] == 0).nonzero().item()
        torch.testing.assert_close(batch.images[b, where], upright[b], rtol=0, atol=3.2e-5)
