"""Windows out of a table in PyTorch operations: sums over pairs of elements, in one operation.

Every element of `v` is a bag: the `u²` of its taps, each with its weight. PyTorch's `embedding_bag` adds up the bags of
all elements in one pass, reading what it needs and no zeros, so that inf and NaN stay in the windows that hold them.
The gradient of `u²` is the same operation on the pairs in the other order. A tap that an edge cuts off is a 0,
as in the other backends: its weight may be NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ..tables import Table, table


class _Bags(NamedTuple):
    """Pairs sorted by the element that they add to."""

    source: Tensor  # (P,) int32: number of the element that is added; of v to u one more, which is 0
    starts: Tensor  # (elements + 1,) int32: of each bag in `source`
    entry: Tensor  # (P,) int32: number of the coefficient


class _Pairs(NamedTuple):
    forward: _Bags  # from u to v
    adjoint: _Bags  # from v to u
    numbers: Tensor  # (entries,): which of the weights an entry has
    coefficients: Tensor  # (entries,)


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and `r = (v + eps)^(-1/2)`: of one root of the shape of `z`, else as `tables.shape_of_r` says."""
    (z, u, mu, weights), (neighborhood, eps) = inputs, window
    dtype = compute_dtype(z.dtype)
    pairs, matrices = _prepared(inputs, neighborhood)
    x = matrices.from_u(u.to(dtype).square())
    if "zero" in (neighborhood.time_boundary, neighborhood.capsule_boundary):
        x = F.pad(x, (0, 0, 0, 1))
    v = _sums(pairs.forward, x, _factors(pairs, weights))
    r = matrices.to_roots(v).add_(eps).rsqrt_()
    several = neighborhood.root_count > 1
    r = torch.cat((r, r.reciprocal().sum(1, keepdim=True).reciprocal_()), 1) if several else r[:, 0]
    t = (z.to(dtype) - mu) * _scale(r)
    return (t if t.dtype == z.dtype else t.to(z.dtype)), (r if save_r else None)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of all four tensors; with `s = 1 / Σ 1/r`, that of `v` is `-½ · dt · (z - mu) · s² · r`."""
    (z, u, mu, weights), neighborhood = inputs, window.neighborhood
    dtype = compute_dtype(z.dtype)
    pairs, matrices = _prepared(inputs, neighborhood)
    s = _scale(r)
    dz = dt.to(dtype) * s
    g = (mu - z.to(dtype)).mul_(dz).mul_(s)
    g = g[:, None] * (r[:, :-1] if neighborhood.root_count > 1 else r[:, None])  # twice: -½ and 2 meet in du
    du = matrices.to_u(_sums(pairs.adjoint, matrices.from_roots(g), _factors(pairs, weights))).mul(u)
    dw = None
    if weights is not None:
        dw = reference.weight_gradients(g.movedim(1, 0), u.to(dtype), neighborhood, weights.shape) / 2
    return dz.to(z.dtype), du.to(u.dtype), -dz.sum_to_size(mu.shape), dw


def _scale(r: Tensor) -> Tensor:
    """Return `s`, from what is kept."""
    return r if r.ndim == 4 else r[:, -1]


class _Matrices(NamedTuple):
    """Tensors as matrices of a row for each element that pairs tell apart, and what they treat alike in its columns."""

    z_shape: torch.Size
    u_shape: torch.Size
    roots: int
    per_capsule: bool

    def from_u(self, x: Tensor) -> Tensor:
        order = (1, 2, 3, 0) if self.per_capsule else (1, 3, 0, 2)
        return x.permute(order).flatten(0, 2 if self.per_capsule else 1).flatten(1).contiguous()

    def to_u(self, x: Tensor) -> Tensor:
        B, S, C, D = self.u_shape
        return x.view(S, C, D, B).permute(3, 0, 1, 2) if self.per_capsule else x.view(S, D, B, C).permute(2, 0, 3, 1)

    def from_roots(self, x: Tensor) -> Tensor:
        order = (1, 2, 3, 4, 0) if self.per_capsule else (1, 2, 4, 0, 3)
        return x.permute(order).flatten(0, 3 if self.per_capsule else 2).flatten(1).contiguous()

    def to_roots(self, x: Tensor) -> Tensor:
        """Return `(B, R, S, C, D)`."""
        B, S, C, D = self.z_shape
        if self.per_capsule:
            return x.view(self.roots, S, C, D, B).permute(4, 0, 1, 2, 3)
        return x.view(self.roots, S, D, B, C).permute(3, 0, 1, 4, 2)


def _prepared(inputs: Inputs, neighborhood: Neighborhood) -> tuple[_Pairs, _Matrices]:
    z, u, _, weights = inputs
    own_weights = has_own_weights(weights, neighborhood)
    per_capsule = own_weights or neighborhood.speeds is not None
    _, S, C, D = z.shape
    pairs = _pairs(neighborhood, (S, C if per_capsule else 1, D), own_weights, compute_dtype(z.dtype), z.device)
    return pairs, _Matrices(z.shape, u.shape, neighborhood.root_count, per_capsule)


def _sums(bags: _Bags, x: Tensor, factors: Tensor) -> Tensor:
    """Return `(elements, columns)` from rows of elements and a factor for each entry."""
    if len(bags.starts) == 1 or x.shape[1] == 0:
        return x.new_zeros(len(bags.starts) - 1, x.shape[1])
    factors = factors.index_select(0, bags.entry)
    return F.embedding_bag(
        bags.source, x, bags.starts, mode="sum", per_sample_weights=factors, include_last_offset=True
    )


def _factors(pairs: _Pairs, weights: Tensor | None) -> Tensor:
    return pairs.coefficients if weights is None else pairs.coefficients * weights.flatten()[pairs.numbers]


@lru_cache(maxsize=8)  # they can be as large as the tensors
def _pairs(
    neighborhood: Neighborhood,
    shape: tuple[int, int, int],
    own_weights: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> _Pairs:
    """All pairs of elements of `v` and `u`, of shape `(S, C, D)`; where all capsules are alike, one stands for all."""
    S, C, D = shape
    with torch.inference_mode(False), torch.device("cpu"):  # it is kept for calls that train, and on any device
        entries = table(neighborhood, C, D, dtype, torch.device("cpu"))
        (before, after), _ = neighborhood.padding()
        D_U = entries.padded[0] * entries.padded[1] * entries.padded[2]
        frames = _frames(entries, neighborhood, S, before + S + after)  # (E, S)
        positions = _positions(entries, neighborhood)[entries.groups.long()]  # (C, E, D)
        E = len(entries.times)
        c, e = torch.arange(C)[:, None, None, None], torch.arange(E)[:, None, None]
        l, d = torch.arange(S)[:, None], torch.arange(D)
        row, column = frames[None, :, :, None], positions[:, :, None, :]  # (C, E, S, D) together
        root = torch.bucketize(torch.arange(E), torch.tensor(entries.roots[1:]), right=True)[:, None, None]
        source = (row * C + c) * D_U + column
        target = ((root * S + l) * C + c) * D + d
        entry = (c * E + e).expand_as(source)
        inside = (row >= 0) & (column >= 0)
        elements = (before + S + after) * C * D_U
        source, target, entry = (x.expand_as(inside) for x in (source, target, entry))
        bag = torch.where(inside, source, elements).flatten(), target.flatten(), entry.flatten()
        forward = _bags(*bag, neighborhood.root_count * S * C * D, device)
        adjoint = _bags(target[inside], source[inside], entry[inside], elements, device)
        numbers = entries.numbers.long().repeat(C)
        if own_weights:
            numbers += torch.arange(C).repeat_interleave(E) * (int(entries.numbers.max()) + 1)
        coefficients = entries.coefficients[entries.groups.long()].flatten()
        return _Pairs(forward, adjoint, numbers.to(device), coefficients.to(device))


def _bags(source: Tensor, target: Tensor, entry: Tensor, count: int, device: torch.device) -> _Bags:
    order = torch.argsort(target, stable=True)
    starts = F.pad(torch.bincount(target, minlength=count).cumsum(0), (1, 0))
    return _Bags(*(x.to(device, torch.int32) for x in (source[order], starts, entry[order])))


def _frames(entries: Table, neighborhood: Neighborhood, S: int, S_U: int) -> Tensor:
    """Return `(E, S)`: the frame of `u` that a tap of each frame reads, or -1."""
    frames = torch.arange(S) + entries.times[:, None]
    if neighborhood.time_boundary == "circular":
        return frames % S_U
    return torch.where((frames >= 0) & (frames < S_U), frames, -1)


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
