"""Windows out of a table in PyTorch operations: sums over pairs of elements.

Every element of `v` is a bag: the `u²` of its taps, each with its weight. PyTorch's `embedding_bag` adds up the bags of
many elements in one pass, reading what it needs and no zeros, so that inf and NaN stay in the windows that hold them.
The gradient of `u²` is the same operation on the pairs in the other order. A tap that an edge cuts off is in no bag.

There are as many pairs as elements times taps. Where these are too many the frames are taken in parts, which share
their pairs: they look the same from any frame that is as far from both ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ..tables import Table, table

MOST_PAIRS = 2**20  # that are made at once, and kept: 8 bytes each, and while they are made ten times as much
PAIRS_OF_A_PART = 2**18  # where there are more
_KEPT = 16


class _Bags(NamedTuple):
    """Pairs sorted by the element that they add to."""

    source: Tensor  # (P,) int32: number of the element that is added
    starts: Tensor  # (elements + 1,) int32: of each bag in `source`
    entry: Tensor  # (P,) int32: number of the coefficient


class _Part(NamedTuple):
    """Frames whose bags are filled from some frames of the source."""

    frames: int  # that are filled
    first: int  # frame of the source, counted from the first that is filled
    known: int  # frames of the source from there on
    circle: int  # frames of a circle in time, which is then a single part; 0 where time has ends


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and `r = (v + eps)^(-1/2)`: of one root of the shape of `z`, else as `tables.shape_of_r` says."""
    (z, u, mu, _), (neighborhood, eps) = inputs, window
    dtype = compute_dtype(z.dtype)
    pairs = _Pairs.of_inputs(inputs, neighborhood)
    v = pairs.filled(pairs.from_u(u.to(dtype).square()), adjoint=False)
    r = pairs.to_roots(v).add_(eps).rsqrt_()
    several = neighborhood.root_count > 1
    r = torch.cat((r, r.reciprocal().sum(1, keepdim=True).reciprocal_()), 1) if several else r[:, 0]
    t = (z.to(dtype) - mu) * _scale(r)
    return (t if t.dtype == z.dtype else t.to(z.dtype)), (r if save_r else None)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of all four tensors; with `s = 1 / Σ 1/r`, that of `v` is `-½ · dt · (z - mu) · s² · r`."""
    (z, u, mu, weights), neighborhood = inputs, window.neighborhood
    dtype = compute_dtype(z.dtype)
    pairs = _Pairs.of_inputs(inputs, neighborhood)
    s = _scale(r)
    dz = dt.to(dtype) * s
    g = (mu - z.to(dtype)).mul_(dz).mul_(s)
    g = g[:, None] * (r[:, :-1] if neighborhood.root_count > 1 else r[:, None])  # twice: -½ and 2 meet in du
    du = pairs.to_u(pairs.filled(pairs.from_roots(g), adjoint=True)).mul(u)
    dw = None
    if weights is not None:
        dw = reference.weight_gradients(g.movedim(1, 0), u.to(dtype), neighborhood, weights.shape) / 2
    return dz.to(z.dtype), du.to(u.dtype), -dz.sum_to_size(mu.shape), dw


def _scale(r: Tensor) -> Tensor:
    """Return `s`, from what is kept."""
    return r if r.ndim == 4 else r[:, -1]


class _Pairs(NamedTuple):
    """Tensors as `(frames, elements, columns)`: elements that pairs tell apart, in columns what is alike to them."""

    z_shape: torch.Size
    u_shape: torch.Size
    neighborhood: Neighborhood
    entries: Table
    factors: Tensor  # of each entry, of every capsule if they differ
    per_capsule: bool  # else one capsule stands for all

    @classmethod
    def of_inputs(cls, inputs: Inputs, neighborhood: Neighborhood) -> _Pairs:
        """Return what there is to sum over."""
        z, u, _, weights = inputs
        own_weights = has_own_weights(weights, neighborhood)
        per_capsule = own_weights or neighborhood.speeds is not None
        C, D = z.shape[2:]
        entries = table(neighborhood, C if per_capsule else 1, D, compute_dtype(z.dtype), z.device)
        factors = entries.coefficients[entries.groups.long()]  # (C, E)
        if weights is not None:
            windows = weights.flatten(1) if own_weights else weights.flatten()[None]
            factors = factors * windows[:, entries.numbers.long()]
        return cls(z.shape, u.shape, neighborhood, entries, factors.flatten(), per_capsule)

    def from_u(self, x: Tensor) -> Tensor:
        order = (1, 2, 3, 0) if self.per_capsule else (1, 3, 0, 2)
        x = x.permute(order)
        return (x.flatten(1, 2) if self.per_capsule else x.flatten(2)).contiguous()

    def to_u(self, x: Tensor) -> Tensor:
        B, S, C, D = self.u_shape
        return x.view(S, C, D, B).permute(3, 0, 1, 2) if self.per_capsule else x.view(S, D, B, C).permute(2, 0, 3, 1)

    def from_roots(self, x: Tensor) -> Tensor:
        """From `(B, R, S, C, D)`; roots are told apart."""
        order = (2, 1, 3, 4, 0) if self.per_capsule else (2, 1, 4, 0, 3)
        x = x.permute(order)
        return (x.flatten(1, 3) if self.per_capsule else x.flatten(1, 2).flatten(2)).contiguous()

    def to_roots(self, x: Tensor) -> Tensor:
        """Return `(B, R, S, C, D)`."""
        (B, S, C, D), R = self.z_shape, self.neighborhood.root_count
        if self.per_capsule:
            return x.view(S, R, C, D, B).permute(4, 1, 0, 2, 3)
        return x.view(S, R, D, B, C).permute(3, 1, 0, 4, 2)

    def filled(self, x: Tensor, adjoint: bool) -> Tensor:
        """Return the sums of all bags, of `v` from `u²`, or the other way."""
        frames = (self.u_shape if adjoint else self.z_shape)[1]
        C, D, D_U = self.z_shape[2] if self.per_capsule else 1, self.z_shape[3], self.u_shape[3]
        elements = C * (D_U if adjoint else self.neighborhood.root_count * D)
        if frames == 0 or elements == 0 or x.numel() == 0:
            return x.new_zeros(frames, elements, x.shape[2])
        of_a_frame = C * D * len(self.entries.times)
        parts = []
        for part, first in _parts(self.neighborhood, frames, len(x), of_a_frame, adjoint):
            make = _kept_bags if of_a_frame * part.frames <= MOST_PAIRS else _bags
            bags = make(self.neighborhood, C, D, part, adjoint, x.device)
            rows = x if part.circle else _around(x, first + part.first, part.known)
            if len(bags.source) == 0:
                parts.append(x.new_zeros(part.frames, elements, x.shape[2]))
                continue
            parts.append(
                F.embedding_bag(
                    bags.source,
                    rows.flatten(0, 1),
                    bags.starts,
                    mode="sum",
                    per_sample_weights=self.factors.index_select(0, bags.entry),
                    include_last_offset=True,
                ).unflatten(0, (part.frames, elements))
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _around(x: Tensor, first: int, count: int) -> Tensor:
    """Return some frames of `x`, which is a circle if they reach beyond it."""
    if first >= 0 and first + count <= len(x):
        return x[first : first + count]
    return x.index_select(0, torch.arange(first, first + count, device=x.device) % len(x))


def _parts(
    neighborhood: Neighborhood, frames: int, known: int, pairs: int, adjoint: bool
) -> Iterator[tuple[_Part, int]]:
    """All frames in parts, each with the number of its first frame.

    Args:
        neighborhood: the taps.
        frames: to be filled.
        known: frames of the source.
        pairs: of a frame.
        adjoint: whether the source is `v`.

    """
    circular = neighborhood.time_boundary == "circular"
    if frames * pairs <= MOST_PAIRS:
        yield _Part(frames, 0, known, known if circular else 0), 0
        return
    low, high = neighborhood.time_taps[0], neighborhood.time_taps[-1]
    if neighborhood.time_boundary == "padded":
        low, high = 0, high - low
    if adjoint:
        low, high = -high, -low
    count = max(1, PAIRS_OF_A_PART // pairs)
    for first in range(0, frames, count):
        size = min(count, frames - first)
        begin, end = first + low, first + size + high
        if not circular:
            begin, end = min(max(begin, 0), known), max(0, min(end, known))
            end = max(begin, end)
        yield _Part(size, begin - first, end - begin, 0), first


def _bags(neighborhood: Neighborhood, C: int, D: int, part: _Part, adjoint: bool, device: torch.device) -> _Bags:
    """All pairs that fill the frames of a part, of C capsules of D positions."""
    with torch.inference_mode(False), torch.device("cpu"):  # they are kept for calls that train, and on any device
        entries = table(neighborhood, C, D, torch.float64, torch.device("cpu"))
        D_U, E, R = math.prod(entries.padded), len(entries.times), neighborhood.root_count
        frames_of_z, frames_of_u = (part.known, part.frames) if adjoint else (part.frames, part.known)
        l = torch.arange(frames_of_z)
        # (E, frames of z): the frame of u, both counted as the part does
        row = l + entries.times[:, None].long() + (part.first if adjoint else -part.first)
        if part.circle:
            row = row % part.circle
        row = torch.where((row >= 0) & (row < frames_of_u), row, -1)[None, :, :, None]
        column = _positions(entries, neighborhood)[entries.groups.long()][:, :, None, :]  # (C, E, 1, D)
        c, e = torch.arange(C)[:, None, None, None], torch.arange(E)[:, None, None]
        root = torch.bucketize(torch.arange(E), torch.tensor(entries.roots[1:]), right=True)[:, None, None]
        of_u = (row * C + c) * D_U + column
        of_v = ((l[:, None] * R + root) * C + c) * D + torch.arange(D)
        inside = (row >= 0) & (column >= 0)
        of_u, of_v, entry = (x.expand_as(inside)[inside] for x in (of_u, of_v, c * E + e))
        source, target = (of_v, of_u) if adjoint else (of_u, of_v)
        order = torch.argsort(target, stable=True)
        elements = part.frames * C * (D_U if adjoint else R * D)
        starts = F.pad(torch.bincount(target, minlength=elements).cumsum(0), (1, 0))
        return _Bags(*(x.to(device, torch.int32) for x in (source[order], starts, entry[order])))


_kept_bags = lru_cache(maxsize=_KEPT)(_bags)


def _positions(entries: Table, neighborhood: Neighborhood) -> Tensor:
    """Return `(G, E, D)`: the position in `u` that a tap of each position reads, or -1."""
    z = torch.stack(torch.meshgrid(*map(torch.arange, entries.lengths), indexing="ij"), -1).flatten(0, -2)  # (D, 3)
    u = z + entries.offsets[:, :, None, :]
    lengths = torch.tensor(entries.padded)
    if neighborhood.capsule_boundary == "circular":
        u = u % lengths
    inside = ((u >= 0) & (u < lengths)).all(-1)
    flat = (u[..., 0] * lengths[1] + u[..., 1]) * lengths[2] + u[..., 2]
    return torch.where(inside, flat, -1)
