"""The sprite renderer against formulas evaluated pixel by pixel, and the promises its docstrings make."""

import cmath
import hashlib
import itertools
import math
import random

import numpy as np
import pytest
import torch

from tvae.data import Factor, SequenceStream, open_source, sprites
from tvae.data.sprites import SpriteSequences, SpriteShifts

MASTERS = list(itertools.product(range(3), range(5), range(15)))


@pytest.fixture(scope="module")
def canvases():
    return sprites.draw_canvases()


def draw(shape, scale, orientation, x, y):
    """One frame as lists of 0 and 1, by another route: complex numbers, and the shapes as sets of points."""
    centre = complex(31.5 + 2 * (x - 7), -31.5 - 2 * (y - 7))
    turn = cmath.exp(1j * sprites.ORIENTATIONS[orientation]) * sprites.SCALES[scale]
    lobe = 8.5 / math.sqrt(2)
    inside = (
        lambda p: abs(p.real) < 12.1 and abs(p.imag) < 12.1,
        lambda p: math.hypot(p.real / 16.5, p.imag / 10) < 1,
        lambda p: (
            abs(p.real) + abs(p.imag) < 8.5 * math.sqrt(2)
            or abs(p - complex(lobe, lobe)) < 8.5
            or abs(p - complex(-lobe, lobe)) < 8.5
        ),
    )[shape]
    return [[int(inside((complex(column, -row) - centre) / turn)) for column in range(64)] for row in range(64)]


def test_frames_equal_sprites_drawn_one_by_one(canvases):
    random.seed(0)
    poses = [(*master, random.randrange(15), random.randrange(15)) for master in random.sample(MASTERS, 60)]
    frames = sprites.cut_frames(canvases, torch.tensor(poses))
    assert frames.shape == (60, 64, 64)
    for pose, frame in zip(poses, frames, strict=True):
        assert frame.tolist() == draw(*pose), pose


def test_cut_frames_keeps_leading_dimensions(canvases):
    poses = torch.tensor([[[2, 4, 3, 0, 14], [1, 0, 0, 7, 7]]])
    frames = sprites.cut_frames(canvases, poses)
    assert frames.shape == (1, 2, 64, 64)
    assert frames[0, 1].tolist() == draw(1, 0, 0, 7, 7)


def test_no_outline_comes_near_a_pixel_centre():
    """Rounding in cos and sin (1e-16 relative) cannot flip a pixel."""
    for shape, scale, orientation in MASTERS:
        field = sprites.implicit(shape, sprites.SCALES[scale], sprites.ORIENTATIONS[orientation], 92)
        assert field.abs().min() > 1e-9, (shape, scale, orientation)


def test_the_pixels_are_the_same_on_every_machine(canvases):
    digest = hashlib.sha256(canvases.numpy().tobytes()).hexdigest()
    assert digest == "46ebb4b9b089de504229fc2e305c7f01cad983d230890ef25681875a5b39e792"


def test_no_two_sprites_are_alike(canvases):
    assert len(torch.unique(canvases.flatten(0, 2).flatten(1), dim=0)) == 225


def test_every_sprite_lies_inside_the_image_at_every_position(canvases):
    """The sprites keep their area, at each of the 50,625 poses."""
    area = canvases.sum((-1, -2))
    assert area.min() > 150
    poses = torch.cartesian_prod(*map(torch.arange, (3, 5, 15, 15, 15))).view(3, 5, 15, 15, 15, 5)
    for column in poses.unbind(3):
        frames = sprites.cut_frames(canvases, column)
        # Eight pixels are added at a time: 64 rows of zeros and ones fit the bytes of an integer.
        areas = frames.view(torch.int64).sum(-2).view(torch.uint8).sum(-1)
        assert torch.equal(areas, area[..., None].expand_as(areas))


def test_the_heart_stands_upright(canvases):
    heart = sprites.cut_frames(canvases, torch.tensor([2, 4, 0, 7, 7])).int()
    assert torch.equal(heart, heart.flip(1))
    rows = heart[heart.sum(1) > 0]
    assert (rows[0].diff() == 1).sum() == 2  # the top row crosses two lobes
    assert rows[-1].sum() == 2
    widest = int(rows.sum(1).argmax())
    assert widest < len(rows) / 2
    assert (rows[widest:].sum(1).diff() <= 0).all()


def test_orientation_is_counter_clockwise(canvases):
    """Index 5 is 92 degrees: the tip of the heart, at the bottom before, points right."""
    assert math.degrees(sprites.ORIENTATIONS[5]) == pytest.approx(92.3, abs=0.1)
    heights = sprites.cut_frames(canvases, torch.tensor([2, 4, 5, 7, 7])).sum(0)
    heights = heights[heights > 0]
    assert heights[-1] <= 3 < heights[0]


def test_sprite_factors():
    """As in the files of dSprites: 6 scales, 40 orientations around the circle, 32 positions from 0 to 1."""
    shape, scale, orientation, x, y = SpriteSequences.factors
    assert shape == Factor("shape", (0, 1, 2), transforms=False)
    assert [factor.name for factor in (scale, orientation, x, y)] == ["scale", "orientation", "x", "y"]
    assert scale.values == pytest.approx(np.linspace(0.5, 1, 6)[1:6])
    assert orientation.values == pytest.approx(np.linspace(0, 2 * np.pi, 40)[:30:2])
    assert x.values == y.values == pytest.approx(np.linspace(0, 1, 32)[:30:2])


def test_shape_never_advances():
    source = SpriteSequences()
    assert source.transformations == {1: "scale", 2: "orientation", 3: "x", 4: "y"}


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


def test_the_label_of_a_sprite_is_its_shape():
    for source in (SpriteSequences(), SpriteShifts()):
        batch = SequenceStream(source, 32, seed=0)[0]
        assert source.classes == ("square", "ellipse", "heart")
        assert torch.equal(batch.label[:, None].expand(-1, 15), batch.factors[:, :, 0])
        assert set(batch.label.tolist()) == {0, 1, 2}
    assert [shape.__name__ for shape in sprites.SHAPES] == [*SpriteSequences.classes]
