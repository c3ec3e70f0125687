"""Windows out of a table in PyTorch operations: sums over pairs of elements.

Every element of `v` is a bag: the `u²` of its taps, each with its weight. PyTorch's `embedding_bag` adds up the bags of
many elements in one pass, reading what it needs and no zeros, so that inf and NaN stay in the windows that hold them.
The gradient of `u²` is the same operation on the pairs in the other order. A tap that an edge cuts off is in no bag.

There are as many pairs as elements times taps. Where these are too many the frames are taken in parts, which share
their pairs: they look the same from any frame that is as far from both ends. A frame of too many is itself in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ..tables import Table, kept, parts, table

MOST_PAIRS = 2**20  # that are made at once: 8 bytes each, and while they are made about 20
PAIRS_OF_A_PART = 2**18  # where there are more
KEPT_BYTES = 2**26  # of pairs of all windows
MOST = 2**20  # elements that are moved at once for the gradient of a weight, where there are more


class _Bags(NamedTuple):
    """Pairs sorted by the element that they add to."""

    source: Tensor  # (P,) int32: number of the element that is added
    starts: Tensor  # (elements + 1,) int32: of each bag in `source`
    entry: Tensor  # (P,) int32: number of the coefficient


class _Part(NamedTuple):
    """Elements of some frames whose bags are filled from some frames of the source."""

    frames: int  # that are filled
    elements: tuple[int, int]  # of each of them: the first, and the one after the last
    first: int  # frame of the source, counted from the first that is filled
    known: int  # frames of the source from there on
    circle: int  # frames of a circle in time, all of which are then known; 0 where time has ends


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
    dmu = -dz.sum_to_size(mu.shape)
    g = (mu - z.to(dtype)).mul_(dz).mul_(s)
    dz = dz.to(z.dtype)
    several = neighborhood.root_count > 1
    each = r[:, :-1] if several else r[:, None]
    dw = None if weights is None else _weight_gradients(g, each, u, weights, neighborhood)
    # twice: -½ and 2 meet in du; what it is made from is free before there is more
    g = pairs.from_roots(g[:, None], each) if several else pairs.from_roots(g.mul_(r)[:, None])
    du = pairs.to_u(pairs.filled(g, adjoint=True)).mul_(u)
    return dz, du.to(u.dtype), dmu, dw


def _weight_gradients(g: Tensor, r: Tensor, u: Tensor, weights: Tensor, n: Neighborhood) -> Tensor:
    """Return `½ Σ g · r · u[tap]²`, in parts, since a tap moves what it reads of `u`.

    What a part reads is either all that its windows have, or ends where the sequence does.
    """
    dw, (low, high), steps = torch.zeros_like(weights), (n.time_taps[0], n.time_taps[-1]), u.shape[1]
    cut = n.time_boundary == "zero"
    if n.time_boundary == "padded":
        low, high = 0, high - low
    for batch, frames in parts(g.shape, g[:1, :1].numel(), MOST):
        begin, end = frames.start + low, frames.stop + high
        if cut:
            begin, end = max(begin, 0), min(end, steps)
        known = _around(u[batch].transpose(0, 1), begin, end - begin).transpose(0, 1).to(g.dtype)
        of_v = slice(frames.start, frames.stop)
        of_known = slice(frames.start - begin, frames.stop - begin) if cut else slice(None)
        part = (g[batch, None, of_v] * r[batch, :, of_v]).movedim(1, 0)
        window = n if cut else replace(n, time_boundary="padded")
        dw += reference.weight_gradients(part, known, window, weights.shape, frames=of_known)
    return dw.div_(2)


def _scale(r: Tensor) -> Tensor:
    """Return `s`, from what is kept."""
    return r if r.ndim == 4 else r[:, -1]


class _Pairs(NamedTuple):
    """Tensors as `(frames, elements, columns)`: elements that pairs tell apart, in columns what is alike to them."""

    z_shape: torch.Size
    u_shape: torch.Size
    neighborhood: Neighborhood
    entries: Table
    factors: Tensor | None  # of each entry, of every capsule if they differ; None where all are 1
    per_capsule: bool  # else one capsule stands for all

    @classmethod
    def of_inputs(cls, inputs: Inputs, neighborhood: Neighborhood) -> _Pairs:
        """Return what there is to sum over."""
        z, u, _, weights = inputs
        own_weights = has_own_weights(weights, neighborhood)
        per_capsule = own_weights or neighborhood.speeds is not None
        C, D = z.shape[2:]
        entries = table(neighborhood, C if per_capsule else 1, D, compute_dtype(z.dtype), z.device)
        factors = None
        if weights is not None or not entries.are_ones:
            factors = entries.coefficients[entries.groups.long()]  # (C, E)
        if weights is not None:
            windows = weights.flatten(1) if own_weights else weights.flatten()[None]
            factors = factors * windows[:, entries.numbers.long()]
        factors = None if factors is None else factors.flatten()
        return cls(z.shape, u.shape, neighborhood, entries, factors, per_capsule)

    def from_u(self, x: Tensor) -> Tensor:
        order = (1, 2, 3, 0) if self.per_capsule else (1, 3, 0, 2)
        x = x.permute(order)
        return _packed(x.flatten(1, 2) if self.per_capsule else x.flatten(2))

    def to_u(self, x: Tensor) -> Tensor:
        B, S, C, D = self.u_shape
        return x.view(S, C, D, B).permute(3, 0, 1, 2) if self.per_capsule else x.view(S, D, B, C).permute(2, 0, 3, 1)

    def from_roots(self, g: Tensor, r: Tensor | None = None) -> Tensor:
        """From `(B, R, S, C, D)`, `r · g` or `g` alone; roots are told apart."""
        order = (2, 1, 3, 4, 0) if self.per_capsule else (2, 1, 4, 0, 3)
        g = g.permute(order)
        x = g if r is None else r.permute(order).clone(memory_format=torch.contiguous_format).mul_(g)
        return _packed(x.flatten(1, 3) if self.per_capsule else x.flatten(1, 2).flatten(2))

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
        of_a_frame = C * (D_U if adjoint else D) * len(self.entries.times)
        sums = None
        for part, first in _parts(self.neighborhood, (frames, elements), len(x), of_a_frame, adjoint):
            bags = _bags(self.neighborhood, C, D, part, adjoint, x.device)
            found = self._of_part(x if part.circle else _around(x, first + part.first, part.known), bags)
            found = found.unflatten(0, (part.frames, -1))
            if part.frames == frames and part.elements == (0, elements):
                return found
            sums = x.new_empty(frames, elements, x.shape[2]) if sums is None else sums
            sums[first : first + part.frames, slice(*part.elements)] = found
        return sums

    def _of_part(self, rows: Tensor, bags: _Bags) -> Tensor:
        """Return the sum of each bag, `(elements, columns)`."""
        if len(bags.source) == 0:
            return rows.new_zeros(len(bags.starts) - 1, rows.shape[2])
        factors = None if self.factors is None else self.factors.index_select(0, bags.entry)
        settings = {"mode": "sum", "per_sample_weights": factors, "include_last_offset": True}
        return F.embedding_bag(bags.source, rows.flatten(0, 1), bags.starts, **settings)


def _packed(x: Tensor) -> Tensor:
    """Return `x` in one piece, with the strides of it: a column alone may have any, with which sums are slow."""
    return x.contiguous().view(-1).view(x.shape)


def _around(x: Tensor, first: int, count: int) -> Tensor:
    """Return some frames of `x`, which is a circle if they reach beyond it."""
    if first >= 0 and first + count <= len(x):
        return x[first : first + count]
    return x.index_select(0, torch.arange(first, first + count, device=x.device) % len(x))


def _parts(
    neighborhood: Neighborhood, filled: tuple[int, int], known: int, pairs: int, adjoint: bool
) -> Iterator[tuple[_Part, int]]:
    """All elements of all frames in parts, each with the number of its first frame.

    Args:
        neighborhood: the taps.
        filled: frames, and elements of a frame.
        known: frames of the source.
        pairs: of a frame.
        adjoint: whether the source is `v`.

    """
    frames, elements = filled
    circular = neighborhood.time_boundary == "circular"
    if frames * pairs <= MOST_PAIRS:
        yield _Part(frames, (0, elements), 0, known, known if circular else 0), 0
        return
    low, high = neighborhood.time_taps[0], neighborhood.time_taps[-1]
    if neighborhood.time_boundary == "padded":
        low, high = 0, high - low
    if adjoint:
        low, high = -high, -low
    count = max(1, PAIRS_OF_A_PART // pairs)
    width = elements if pairs <= MOST_PAIRS else max(1, PAIRS_OF_A_PART * elements // pairs)
    for start in range(0, elements, width):  # pairs of the same elements, one after the other, are the same
        part = start, min(start + width, elements)
        for first in range(0, frames, count):
            size = min(count, frames - first)
            begin, end = first + low, first + size + high
            if not circular:
                begin, end = min(max(begin, 0), known), max(0, min(end, known))
                end = max(begin, end)
            yield _Part(size, part, begin - first, end - begin, 0), first


@kept(KEPT_BYTES)
def _bags(neighborhood: Neighborhood, C: int, D: int, part: _Part, adjoint: bool, device: torch.device) -> _Bags:
    """All pairs that fill the elements of a part, of C capsules of D positions: by element, and then by entry."""
    with torch.inference_mode(False), torch.device("cpu"):  # they are kept for calls that train, and on any device
        entries = table(neighborhood, C, D, torch.float64, torch.device("cpu"))
        of_a_root = C * D
        of_source = (len(entries.roots) - 1) * of_a_root if adjoint else C * math.prod(entries.padded)  # in a frame
        kind = torch.int32 if part.known * of_source < 2**31 else torch.int64
        times = -entries.times if adjoint else entries.times
        row = torch.arange(part.frames, dtype=kind)[:, None] + (times - part.first)  # by frame and entry, of the source
        row = row % part.circle if part.circle else row.where((row >= 0) & (row < part.known), -1)
        sources, numbers, inside = [], [], []  # by frame, element and entry
        for elements, first, last in _blocks(entries, of_a_root, part.elements, adjoint):
            capsule, column = _columns(entries, neighborhood, (first, last), elements, adjoint)
            number, there = torch.arange(first, last, dtype=kind), row[:, None, first:last]
            if adjoint:
                ends = torch.tensor(entries.roots[1:])
                column = column.where(column < 0, column + torch.bucketize(number, ends, right=True) * of_a_root)
            inside.append((there >= 0) & (column >= 0))
            sources.append((there * of_source + column).to(kind).flatten(1))
            numbers.append((capsule[:, None] * len(entries.times) + number).flatten())
        counts = torch.cat([x.sum(-1, dtype=kind) for x in inside], 1).flatten()
        inside = torch.cat([x.flatten(1) for x in inside], 1)
        source, entry = torch.cat(sources, 1), torch.cat(numbers).to(kind).expand(part.frames, -1)
        if not inside.all():
            source, entry = source.masked_select(inside), entry.masked_select(inside)
        starts = F.pad(counts.cumsum(0, dtype=kind), (1, 0))
        return _Bags(*(x.flatten().to(device) for x in (source, starts, entry)))


def _blocks(entries: Table, of_a_root: int, elements: tuple[int, int], adjoint: bool) -> Iterator:
    """Elements that have the same entries, and which: those of `u` have all, those of `v` under a root have its own."""
    if adjoint:
        yield torch.arange(*elements), 0, entries.roots[-1]
        return
    for root, (first, last) in enumerate(zip(entries.roots, entries.roots[1:], strict=False)):
        begin, end = (min(max(x - root * of_a_root, 0), of_a_root) for x in elements)
        if begin < end:
            yield torch.arange(begin, end), first, last


def _columns(
    entries: Table, neighborhood: Neighborhood, used: tuple[int, int], elements: Tensor, adjoint: bool
) -> tuple[Tensor, Tensor]:
    """Return the capsules of some elements, and for each of some entries the element in a frame of the source, or -1.

    Where the source is `v`, of its first root.
    """
    target, source = (entries.padded, entries.lengths) if adjoint else (entries.lengths, entries.padded)
    capsule, position = elements // math.prod(target), elements % math.prod(target)
    groups, offsets = entries.groups[capsule].long(), entries.offsets[:, slice(*used)]
    column, inside = capsule[:, None], True
    for axis in range(len(target)):
        at = (position // math.prod(target[axis + 1 :]) % target[axis])[:, None]
        at = at - offsets[groups, :, axis] if adjoint else at + offsets[groups, :, axis]
        if neighborhood.capsule_boundary == "circular":
            at = at % source[axis]
        else:
            inside = inside & (at >= 0) & (at < source[axis])
        column = column * source[axis] + at
    return capsule, column if inside is True else column.where(inside, -1)
