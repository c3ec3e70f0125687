"""The taps of any neighbourhood as tables of whole offsets, which the kernels and the fallback go through."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighborhood import Neighborhood, corners
from .roll import phase_shifted

AXES = 3  # of every table; missing ones come first and have one position


class Table(NamedTuple):
    """E entries by root, each a tap or a corner of one; G groups of capsules of one speed.

    Offsets lead from a position of `z` to one of `u`, whose axes are longer where they are padded. A tap has as many
    corners in all groups: where its offset is whole and that of another speed is not, equal parts of itself.
    """

    times: Tensor  # (E,) int32: frames from one of z to one of u
    weights: Tensor  # (E,) int32: number of the weight
    of_weights: Tensor  # (weights, most) int64: the entries of each weight, filled up with E
    roots: tuple[int, ...]  # R + 1 numbers: where the entries of each root begin and end
    offsets: Tensor  # (G, E, 3) int32
    coefficients: Tensor  # (G, E) of the linear interpolation
    groups: Tensor  # (C,) int32: the group of every capsule
    lengths: tuple[int, int, int]  # of the axes of z
    padded: tuple[int, int, int]  # of the axes of u


@lru_cache(maxsize=128)
def table(neighborhood: Neighborhood, capsules: int, dim: int, dtype: torch.dtype, device: torch.device) -> Table:
    """The table for capsules of `dim` positions, with coefficients of type `dtype`."""
    speeds = neighborhood.speeds or (1,)
    distinct = sorted(set(speeds))
    (before, _), padding = neighborhood.padding()
    lengths = neighborhood.lengths(dim)
    times, weights, roots, offsets, coefficients = [], [], [], [[] for _ in distinct], [[] for _ in distinct]
    for taps in zip(*(neighborhood.taps(speed) for speed in distinct), strict=True):
        found = [corners(tap.offsets) for tap in taps]
        count = max(map(len, found))
        first = -before if neighborhood.time_boundary == "padded" else 0
        times += [taps[0].time - first] * count
        weights += [taps[0].weight] * count
        roots += [taps[0].root] * count
        for group, entries in enumerate(found):
            parts = count // len(entries)  # both are powers of 2, so that the parts of a number are exact
            coefficients[group] += [coefficient / parts for coefficient, _ in entries] * parts
            offsets[group] += [_stored(offset, neighborhood, lengths, padding) for _, offset in entries] * parts

    def tensor(x, dtype=torch.int32):
        return torch.tensor(x, dtype=dtype).to(device)

    mine = [[] for _ in range(max(weights) + 1)]
    for entry, number in enumerate(weights):
        mine[number].append(entry)
    most = max(map(len, mine))
    missing = (1,) * (AXES - len(lengths))
    with torch.inference_mode(False):
        return Table(
            tensor(times),
            tensor(weights),
            tensor([x + [len(weights)] * (most - len(x)) for x in mine], torch.int64),
            (*(roots.index(root) for root in range(neighborhood.root_count)), len(roots)),
            tensor(offsets),
            tensor(coefficients, dtype),
            tensor([distinct.index(speeds[c % len(speeds)]) for c in range(capsules)]),
            missing + tuple(lengths),
            missing + tuple(n + sum(more) for n, more in zip(lengths, padding, strict=True)),
        )


def _stored(offset: tuple[int, ...], neighborhood: Neighborhood, lengths, padding) -> tuple[int, int, int]:
    """Offsets as the table keeps them: 0 to length - 1 around a circle, from the first padding, else just outside."""
    stored = []
    for o, n, (before, _) in zip(offset, lengths, padding, strict=True):
        if neighborhood.capsule_boundary == "circular":
            stored.append(o % n)
        elif neighborhood.capsule_boundary == "padded":
            stored.append(o + before)
        else:
            stored.append(max(-n, min(n, o)))
    return (0,) * (AXES - len(stored)) + tuple(stored)


def shape_of_r(z: Tensor, neighborhood: Neighborhood) -> tuple[int, ...]:
    """Of what is kept: that of `z`, or `(B, R + 1, S, C, D)` for the `r` of R roots and the reciprocal of their sum."""
    B, *rest = z.shape
    roots = neighborhood.root_count
    return (B, *rest) if roots == 1 else (B, roots + 1, *rest)


@lru_cache(maxsize=128)
def phases(neighborhood: Neighborhood, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`h` of shape `(G, W, D)`: `Σ_m h[m] · u[d + m]` is `u` with its phase shifted by the roll of a frame."""
    with torch.inference_mode(False):
        each = torch.eye(dim, dtype=torch.float64)
        h = [
            [phase_shifted(each, round(neighborhood.shift * speed * i, 12))[:, 0] for i in neighborhood.time_taps]
            for speed in sorted(set(neighborhood.speeds or (1,)))
        ]
        return torch.stack([torch.stack(rows) for rows in h]).to(device, dtype)


def weight_sums(parts: Tensor, of_weights: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The gradients of the entries, `(..., E)`, added up by weight in a fixed order, to a tensor of `shape`.

    Each weight takes the entries in its row of `Table.of_weights` and no others, not even times 0: they may be NaN.
    """
    return F.pad(parts, (0, 1))[..., of_weights].sum(-1).reshape(shape)
