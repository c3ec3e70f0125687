"""Rooms with an object in them, drawn by casting rays, in the manner of 3D Shapes: coloured, shaded, 64x64.

This is not the 3D Shapes data set. Its factors and their numbers of values are followed (Burgess and Kim 2018), but
every room is drawn here. A floor, two walls that meet in a corner, and an object on the floor are seen by a camera that
looks down at the object and walks around it by the orientation; the light stays where it is. x points right, y up, and
z to the camera where it stands in the middle.

A drawing does not know colours: it holds how much light each of three materials (floor, walls, object) sends to each
pixel, and a frame adds them up in the colours of their hues. So 480 drawings (5.9 MB) serve all 480,000 rooms.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .sequences import Factor, FactorGrid

IMAGE_SIZE = 64
SCALES = tuple(0.75 + 0.5 * j / 7 for j in range(8))
ORIENTATIONS = tuple((j - 7) * 30 / 7 for j in range(15))  # degrees, to the right, exactly symmetric about 0
EYE = (2.3, 4.6)  # of the camera: height, and distance from the axis that it walks around
FOCAL_LENGTH = 1.3  # in halves of an image
PITCH = 0.32  # radians that the camera looks down
WALLS = 3.2  # distance from the axis
LIGHT = tuple(part / math.sqrt(0.4**2 + 0.8**2 + 0.45**2) for part in (0.4, 0.8, 0.45))  # where it comes from
AMBIENT = 0.45  # what a surface sends that is turned away from the light; facing it, a surface sends 1

Vector = tuple[Tensor, Tensor, Tensor] | tuple[float, float, float]  # x, y, z
Surface = tuple[Tensor, Tensor]  # distance along each ray, infinite where a ray misses it, and brightness there


def dot(a: Vector, b: Vector) -> Tensor:
    """Scalar product, written out: a sum over an axis may round by the machine."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def brightness(normal: Vector) -> Tensor:
    """Brightness of a surface of that unit normal: 0.45 + 0.55 max(0, normal · light)."""
    return AMBIENT + (1 - AMBIENT) * dot(normal, LIGHT).clamp(min=0)


def nearest(*surfaces: Surface) -> Surface:
    """Surface that a ray meets first of several."""
    distance, light = surfaces[0]
    for other, other_light in surfaces[1:]:
        closer = other < distance
        distance, light = torch.where(closer, other, distance), torch.where(closer, other_light, light)
    return distance, light


class View:
    """What the camera sees from each of the orientations, along the rays through 2x2 points of every pixel.

    Coordinates of `eye` are (orientation, 1, 1) and those of `ray` (orientation, 128, 128), float64.
    """

    def __init__(self):
        size = 2 * IMAGE_SIZE
        points = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * 2 / size - 1
        right, up = points[None, :].expand(size, size), -points[:, None].expand(size, size)  # rows grow downwards
        cos, sin = math.cos(PITCH), math.sin(PITCH)
        ray = (right, cos * up - sin * FOCAL_LENGTH, -sin * up - cos * FOCAL_LENGTH)
        self.ray, self.eye = _turned(ray), _turned((0.0, *EYE))

    def point(self, distance: Tensor) -> Vector:
        """Point (orientation, 128, 128) at that distance along each ray."""
        return tuple(start + distance * step for start, step in zip(self.eye, self.ray, strict=True))

    def plane(self, normal: Vector, offset: float) -> Surface:
        """Plane of the points p with normal · p = offset."""
        distance = (offset - dot(self.eye, normal)) / dot(self.ray, normal)
        everywhere = tuple(torch.full_like(distance, part) for part in normal)
        return torch.where(distance > 0, distance, math.inf), brightness(everywhere)

    def disc(self, height: float, radius: float) -> Surface:
        """Disc about the axis at that height, as a lid."""
        distance, light = self.plane((0.0, 1.0, 0.0), height)
        x, _, z = self.point(distance)
        return torch.where(x * x + z * z < radius**2, distance, math.inf), light

    def ball(self, height: float, radius: float) -> Surface:
        """Sphere about a point of the axis at that height."""
        start = (self.eye[0], self.eye[1] - height, self.eye[2])
        distance = _entry(dot(self.ray, self.ray), dot(self.ray, start), dot(start, start) - radius**2)
        x, y, z = self.point(distance)
        return distance, brightness((x / radius, (y - height) / radius, z / radius))

    def tube(self, low: float, high: float, radius: float) -> Surface:
        """Side of a cylinder about the axis between two heights."""
        (x, _, z), (right, _, back) = self.eye, self.ray
        distance = _entry(right * right + back * back, right * x + back * z, x * x + z * z - radius**2)
        x, y, z = self.point(distance)
        normal = (x / radius, torch.zeros_like(y), z / radius)
        return torch.where((low < y) & (y < high), distance, math.inf), brightness(normal)

    def box(self, half: float) -> Surface:
        """Cube of that half-side on the floor: a ray enters it where it is within all three pairs of faces."""
        centre = (0.0, half, 0.0)
        near, far, light = -math.inf, math.inf, 0.0
        for axis in range(3):
            start, step = self.eye[axis] - centre[axis], self.ray[axis]
            enter, leave = (-half - start) / step, (half - start) / step
            enter, leave = torch.minimum(enter, leave), torch.maximum(enter, leave)
            normal = [torch.zeros_like(step)] * 3
            normal[axis] = -step.sign()  # of the face that it enters by
            light = torch.where(enter > near, brightness(normal), light)
            near, far = enter.clamp(min=near), leave.clamp(max=far)
        return torch.where(near < far, near, math.inf), light


def _turned(vector: Vector) -> Vector:
    """Turn a vector about the vertical axis by each of the orientations: what stood in front goes to the right."""
    x, y, z = vector
    angles = [math.radians(degrees) for degrees in ORIENTATIONS]
    turns = [(math.cos(angle), math.sin(angle)) for angle in angles]  # not by torch, which may round by the machine
    cos, sin = torch.tensor(turns, dtype=torch.float64, device="cpu")[:, :, None, None].unbind(1)
    return cos * x + sin * z, y, cos * z - sin * x


def _entry(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Smaller root of a t² + 2 b t + c, where a > 0, infinite where there is none."""
    square = b * b - a * c
    return torch.where(square > 0, (-b - square.sqrt()) / a, math.inf)


def cube(view: View, scale: float) -> Surface:
    """Cube of half-side 0.8."""
    return view.box(0.8 * scale)


def cylinder(view: View, scale: float) -> Surface:
    """Cylinder of radius 0.8 and height 1.6."""
    return nearest(view.tube(0.0, 1.6 * scale, 0.8 * scale), view.disc(1.6 * scale, 0.8 * scale))


def sphere(view: View, scale: float) -> Surface:
    """Sphere of radius 0.95."""
    return view.ball(0.95 * scale, 0.95 * scale)


def capsule(view: View, scale: float) -> Surface:
    """Tube of radius 0.65 between two spheres, 2.1 high."""
    low, high, radius = 0.65 * scale, 1.45 * scale, 0.65 * scale
    return nearest(view.tube(low, high, radius), view.ball(low, radius), view.ball(high, radius))


SHAPES: tuple[Callable[[View, float], Surface], ...] = (cube, cylinder, sphere, capsule)


@cache
def draw_rooms() -> Tensor:
    """Light of the floor, the walls and the object in every pixel: (scale, shape, orientation, 3, 64, 64) uint8.

    They are drawn once in a process, within a second. Nobody must write into them.
    """
    view = View()
    floor = view.plane((0.0, 1.0, 0.0), 0.0)
    half = math.sqrt(0.5)
    walls = nearest(view.plane((half, 0.0, half), -WALLS), view.plane((-half, 0.0, half), -WALLS))
    rooms = [expose(floor, walls, solid(view, scale)) for scale in SCALES for solid in SHAPES]
    return torch.stack(rooms).unflatten(0, (len(SCALES), len(SHAPES)))


def expose(*materials: Surface) -> Tensor:
    """Light of each of the materials in every pixel: (orientation, material, 64, 64) uint8, the mean of 2x2 rays."""
    first = nearest(*materials)[0]
    rays = torch.stack([torch.where(distance == first, light, 0.0) for distance, light in materials], dim=1)
    sums = rays[..., ::2, ::2] + rays[..., ::2, 1::2] + rays[..., 1::2, ::2] + rays[..., 1::2, 1::2]
    return (sums * (255 / 4)).round().to(torch.uint8)


_HUES = tuple(range(0, 360, 36))


class RoomGrid(FactorGrid):
    """A source of rooms in the manner of 3D Shapes, whose examples are combinations of factors: the starting poses.

    Factors: hue of the floor, of the walls and of the object, in degrees, 0 being red; scale; shape (0 cube,
    1 cylinder, 2 sphere, 3 capsule); orientation of the camera in degrees. A sequence advances one of the hues or the
    scale, through the first eight of its values; shape and orientation rest. The index of an example has the six
    factors as its digits, the hue of the floor first. All splits are the same 480,000 examples.
    """

    classes = ("cube", "cylinder", "sphere", "capsule")
    image_shape = (3, IMAGE_SIZE, IMAGE_SIZE)
    sequence_length = 8
    open_paths = True
    factors = (
        Factor("floor hue", _HUES),
        Factor("wall hue", _HUES),
        Factor("object hue", _HUES),
        Factor("scale", SCALES),
        Factor("shape", (0, 1, 2, 3), transforms=False),
        Factor("orientation", ORIENTATIONS, transforms=False),
    )

    def label(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Return the shapes."""
        return factors[:, 0, 4]


class RoomSequences(RoomGrid):
    """Rooms drawn by casting rays in the manner of 3D Shapes, not 3D Shapes itself; no file is needed."""

    name = "rooms"

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._drawings = draw_rooms().to(self.device)
        colours = [colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0) for hue in _HUES]
        self._colours = torch.tensor(colours, dtype=torch.float32, device=self.device)

    def render(self, examples: Tensor, factors: Tensor) -> Tensor:
        """Draw frames (B, S, 3, 64, 64): the light of each material times its colour; the factors alone decide."""
        *hues, scale, shape, orientation = factors.unbind(-1)
        light = self._drawings[scale, shape, orientation].float() / 255  # (B, S, material, 64, 64)
        parts = zip(light.unbind(2), hues, strict=True)
        floor, walls, thing = (part[:, :, None] * self._colours[hue][..., None, None] for part, hue in parts)
        return floor + walls + thing
