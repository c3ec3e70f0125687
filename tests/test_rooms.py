"""The rooms against points marched along rays, and the promises their docstrings make."""

import colorsys
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from tvae.data import Factor, SequenceStream, open_source, rooms
from tvae.data.rooms import RoomSequences

FLOOR, WALLS, OBJECT = range(3)


@pytest.fixture(scope="module")
def drawings():
    """Light in every pixel: (scale, shape, orientation, material, 64, 64)."""
    return rooms.draw_rooms()


# How far points (N, 3) are inside of a solid of scale 1: positive inside, and concave along any line.
SOLIDS = (
    lambda p: 0.8 - np.abs(p - [0, 0.8, 0]).max(-1),
    lambda p: np.minimum(0.8 - np.hypot(p[:, 0], p[:, 2]), 0.8 - np.abs(p[:, 1] - 0.8)),
    lambda p: 0.95 - np.linalg.norm(p - [0, 0.95, 0], axis=-1),
    lambda p: 0.65 - np.linalg.norm(p - p[:, 1:2].clip(0.65, 1.45) * [0, 1, 0], axis=-1),
)


def materials(scale, shape):
    """The floor, the walls and the object as functions that are positive inside of them."""
    size, half = 0.75 + scale / 14, math.sqrt(0.5)
    return (
        lambda p: -p[:, 1],
        lambda p: -3.2 - half * np.minimum(p[:, 2] + p[:, 0], p[:, 2] - p[:, 0]),
        lambda p: size * SOLIDS[shape](p / size),
    )


def entered(inside, eye, rays):
    """The times (N,) at which rays come inside, by halving, and which of them (N,) do.

    The deepest point lies in thirds of what is left, for the function is concave; but a ray that is inside far away,
    behind the floor or a wall, stays there.
    """
    low, high = np.zeros(len(rays)), np.full(len(rays), 100.0)
    depth = lambda time: inside(eye + time[:, None] * rays)  # noqa: E731
    stays = depth(high) > 0
    for _ in range(80):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        deeper = (depth(left) < depth(right)) | stays
        low, high = np.where(deeper, left, low), np.where(deeper, high, right)
    low, high = np.zeros(len(rays)), high
    hit = depth(high) > 0
    for _ in range(60):
        middle = (low + high) / 2
        past = depth(middle) > 0
        low, high = np.where(past, low, middle), np.where(past, middle, high)
    return high, hit


def cast(scale, shape, orientation, rows, columns):
    """The light (N, 3) of each material in the pixels (N,), in units of 1/255."""
    inside = materials(scale, shape)
    angle, (cos, sin) = math.radians(30 * (orientation - 7) / 7), (math.cos(0.32), math.sin(0.32))
    turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    tilt = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])  # looking down
    lamp = np.array([0.4, 0.8, 0.45]) / math.sqrt(0.4**2 + 0.8**2 + 0.45**2)
    eye, found = turn @ [0, 2.3, 4.6], np.zeros((len(rows), 3))
    for down, right in itertools.product((0.25, 0.75), repeat=2):
        rays = np.stack([(columns + right) / 32 - 1, 1 - (rows + down) / 32, np.full(len(rows), -1.3)], axis=-1)
        rays = rays @ (turn @ tilt).T
        times, hits = zip(*(entered(f, eye, rays) for f in inside), strict=True)
        first = np.where(hits, times, np.inf).argmin(0)
        for material, f in enumerate(inside):
            points = eye + times[material][:, None] * rays
            normal = np.stack([f(points - step) - f(points + step) for step in 1e-6 * np.eye(3)], axis=-1)
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
            light = 0.45 + 0.55 * (normal @ lamp).clip(min=0)
            found[:, material] += np.where(first == material, light, 0) * 255 / 4
    return found


def test_pixels_equal_points_found_by_halving(drawings):
    """But for rounding to bytes, a half, and numerical normals: 55 % of 255, times 4e-15 / 1e-6 of rounding."""
    rows, columns = (x.ravel() for x in np.mgrid[1:64:3, 0:64:3])
    edges = np.zeros(3)
    for shape, (scale, orientation) in itertools.product(range(4), ((6, 10), (1, 2))):
        expected = cast(scale, shape, orientation, rows, columns)
        actual = drawings[scale, shape, orientation, :, rows, columns].numpy().T
        assert np.abs(actual - expected).max() < 0.5 + 1e-5, (scale, shape, orientation)
        assert (expected > 0).sum(0).min() > 5
        edges += ((expected > 0) & (expected < 100)).sum(0)
    assert edges.min() > 0  # pixels of which a part is something else


def test_the_drawings_are_the_same_on_every_machine(drawings):
    """And whatever the defaults are of type and device."""
    digest = hashlib.sha256(drawings.numpy().tobytes()).hexdigest()
    assert digest == "91bf3d59eb97e19b97b9e2de3f2a046b8cd13260c311e70ea0f8f11ca7829b2d"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            again = rooms.draw_rooms.__wrapped__()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(again, drawings)


def test_rounding_does_not_reach_a_pixel(drawings, monkeypatch):
    """Orientations that differ by 1e-9, a million times what sines and cosines may be wrong by, give the same."""
    monkeypatch.setattr(rooms, "ORIENTATIONS", tuple(x * (1 + 1e-9) for x in rooms.ORIENTATIONS))
    assert torch.equal(rooms.draw_rooms.__wrapped__(), drawings)


def test_a_process_draws_once():
    assert RoomSequences()._drawings.data_ptr() == open_source("rooms", "test")._drawings.data_ptr()


def test_no_two_drawings_are_alike(drawings):
    assert drawings.shape == (8, 4, 15, 3, 64, 64)
    assert len(torch.unique(drawings.flatten(0, 2).flatten(1), dim=0)) == 480


def test_every_ray_ends_in_one_material_and_nothing_is_too_bright(drawings):
    """What sends least is 0.45 of 255 and what sends most all of it; each of three bytes rounds by a half."""
    light = drawings.sum(3, dtype=torch.int64)
    assert light.min() >= 0.45 * 255 - 1.5
    assert light.max() <= 255
    share = drawings.double().mean((0, 1, 2, 4, 5)) / 255
    assert share.tolist() == pytest.approx([0.41, 0.30, 0.04], abs=0.006)


def test_a_round_object_looks_as_wide_from_everywhere(drawings):
    covered = drawings[:, :, :, OBJECT] > 0
    assert torch.equal(covered[:, 1:], covered[:, 1:, :1].expand(-1, -1, 15, -1, -1))
    assert (covered[:, 0, 1:] != covered[:, 0, :-1]).flatten(2).any(2).all()  # but a cube does not


def test_from_the_other_side_everything_is_seen_mirrored(drawings):
    """But for the light, which comes from the right."""
    covered = drawings > 0
    assert torch.equal(covered.flip(2), covered.flip(-1))
    assert not torch.equal(drawings.flip(2), drawings.flip(-1))
    sphere = drawings[7, 2, 7, OBJECT].int()
    assert sphere[:, 32:].sum() > 1.1 * sphere[:, :32].sum()


def test_objects_grow_by_scale(drawings):
    area = (drawings[:, :, :, OBJECT] > 0).sum((-2, -1))
    assert (area.diff(dim=0) > 0).all()
    assert area.min() > 60
    edges = drawings[:, :, :, OBJECT].clone()
    edges[..., 1:-1, 1:-1] = 0
    assert edges.max() == 0  # inside of the image


def test_the_further_right_the_camera_the_more_it_sees_of_the_left_wall(drawings):
    """Which is the bright one. From the middle both fill a half of the top row, where no object is."""
    left = (drawings[0, 0, :, WALLS, 0] > 160).sum(-1)
    assert left[7] == 32
    assert (left.diff() > 0).all()


def test_frames_are_light_times_the_colour_of_the_hue(drawings):
    """Exactly, in float32: each of the ten hues of each of the three materials."""
    source, generator = RoomSequences(), torch.Generator().manual_seed(0)
    h = torch.arange(10)
    poses = torch.randint(4, (10, 3), generator=generator)
    factors = torch.stack([h, (h + 3) % 10, (7 * h + 1) % 10, *poses.T], dim=-1)
    frames = source.render(torch.zeros(1, dtype=torch.int64), factors[None])[0]
    for frame, (*hues, scale, shape, orientation) in zip(frames.numpy(), factors.tolist(), strict=True):
        light = drawings[scale, shape, orientation].numpy().astype(np.float32) / np.float32(255)
        colours = np.array([colorsys.hsv_to_rgb(hue / 10, 1, 1) for hue in hues], dtype=np.float32)
        floor, walls, thing = light[:, None] * colours[:, :, None, None]
        assert np.array_equal(frame, floor + walls + thing)


def test_room_hues():
    """Red, yellow-green, and so on: ten colours around the circle, of the whole floor."""
    factors = torch.zeros(1, 10, 6, dtype=torch.int64)
    factors[0, :, FLOOR] = torch.arange(10)
    floor = RoomSequences().render(torch.zeros(1, dtype=torch.int64), factors)[0, :, :, 63, 32]
    colours = [
        [5, 0, 0],
        [5, 3, 0],
        [4, 5, 0],
        [1, 5, 0],
        [0, 5, 2],
        [0, 5, 5],
        [0, 2, 5],
        [1, 0, 5],
        [4, 0, 5],
        [5, 0, 3],
    ]
    brightness = 0.45 + 0.55 * 0.8 / math.sqrt(0.4**2 + 0.8**2 + 0.45**2)
    expected = torch.tensor(colours) / 5 * round(255 * brightness) / 255
    torch.testing.assert_close(floor, expected, rtol=0, atol=1e-6)


def test_every_factor_changes_pixels():
    """And each value of it: of a random room, but for the one factor."""
    source, generator = RoomSequences(), torch.Generator().manual_seed(1)
    examples = torch.randint(len(source), (4,), generator=generator)
    for axis, size in enumerate(source.sizes):
        factors = source.start_poses(examples, generator)[:, None].repeat(1, size, 1)
        factors[:, :, axis] = torch.arange(size)
        for room in source.render(examples, factors):
            assert len(torch.unique(room.flatten(1), dim=0)) == size, axis


def test_frames_are_the_same_in_any_batch():
    source = RoomSequences()
    batch = SequenceStream(source, 16, seed=2)[0]
    for part in (1, 3, 16):
        pieces = [source.render(torch.zeros(part), factors) for factors in batch.factors.split(part)]
        assert torch.equal(torch.cat(pieces), batch.images)
    assert 0 <= batch.images.min() < batch.images.max() <= 1


def test_room_factors():
    """As many as of 3D Shapes: 10 hues, 8 scales, 4 shapes, and 15 orientations from -30 to 30 degrees."""
    floor, wall, thing, scale, shape, orientation = RoomSequences.factors
    for factor, name in ((floor, "floor hue"), (wall, "wall hue"), (thing, "object hue")):
        assert factor == Factor(name, tuple(range(0, 360, 36)))
    assert (scale.name, orientation.name) == ("scale", "orientation")
    assert scale.values == pytest.approx(np.linspace(0.75, 1.25, 8))
    assert shape == Factor("shape", (0, 1, 2, 3), transforms=False)
    assert orientation.values == pytest.approx(np.linspace(-30, 30, 15))
    assert RoomSequences().transformations == {0: "floor hue", 1: "wall hue", 2: "object hue", 3: "scale"}


def test_rooms_are_their_start_poses_but_for_what_moves():
    source = RoomSequences()
    assert len(source) == 480_000
    examples = torch.tensor([0, 1, 15, 60, 480, 4800, 48_000, 479_999])
    digits = torch.tensor([[0] * 6, *torch.eye(6, dtype=torch.int64).flip(0).tolist(), [9, 9, 9, 7, 3, 14]])
    assert torch.equal(source.start_poses(examples, torch.Generator()), digits)
    stream = SequenceStream(source, 64, seed=0)
    batch, starts = stream[0], stream.draw(0)[1]
    assert batch.images.shape == (64, 8, 3, 64, 64)
    for k in range(4):
        chosen = batch.transformation == k
        others = [axis for axis in range(6) if axis != k]
        assert torch.equal(batch.factors[chosen][..., k], torch.arange(8).expand(int(chosen.sum()), -1))
        assert torch.equal(batch.factors[chosen][..., others], starts[chosen][:, None, others].expand(-1, 8, -1))
    assert [len(starts[:, axis].unique()) for axis in range(6)] == [10, 10, 10, 8, 4, 15]  # drawn


def test_the_label_of_a_room_is_its_shape():
    batch = SequenceStream(RoomSequences(), 32, seed=0)[0]
    assert torch.equal(batch.label[:, None].expand(-1, 8), batch.factors[:, :, 4])
    assert set(batch.label.tolist()) == {0, 1, 2, 3}
    assert tuple(shape.__name__ for shape in rooms.SHAPES) == RoomSequences.classes
