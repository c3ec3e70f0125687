"""Kernels for windows out of a table, one tap at a time, from the caches: what they are, and launched.

Weighted windows, cut and padded edges, capsules of several axes and roots, fractional shifts, several speeds, a `mu` of
each position. Every program handles a tile of `BLOCK_S` frames by `BLOCK_D` positions of one capsule of one sequence.
With `v` the window sum under a root,

    r = (v + EPS)^(-1/2)        s = 1 / Σ_roots 1/r        t = (z - mu) · s

and the forward pass keeps `r` of every root and, where there are several, `s`: without them the backward pass would
gather all taps for each of its taps.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ..tables import shape_of_r, table, weight_sums
from .launch import ACCUMULATOR, ceiling, constants, launch


@dataclass(frozen=True)
class Taps:
    """What a kernel is compiled for; every field is a `tl.constexpr`."""

    ENTRIES: tl.constexpr  # of the table, those of the first root first
    ROOTS: tl.constexpr
    END_0: tl.constexpr  # where the entries of the first root end,
    END_1: tl.constexpr  # and of the second
    AXES: tl.constexpr  # of a capsule
    Z0: tl.constexpr  # positions of `z` along each axis, 1 for missing ones
    Z1: tl.constexpr
    Z2: tl.constexpr
    U0: tl.constexpr  # of `u`, which has more of them where it is padded
    U1: tl.constexpr
    U2: tl.constexpr
    TIME_CIRCULAR: tl.constexpr
    CAPSULE_CIRCULAR: tl.constexpr
    WEIGHTED: tl.constexpr
    EPS: tl.constexpr
    ACC: tl.constexpr  # the type of all arithmetic
    BLOCK_S: tl.constexpr
    BLOCK_D: tl.constexpr


@triton.constexpr_function
def _first(P, root):
    """Entry of a root; of the root after the last, the number of entries."""
    return (0, P.END_0, P.END_1)[root] if root < P.ROOTS else P.ENTRIES


@triton.jit
def _tile(C, TILES_S, TILES_D, P: tl.constexpr):
    """Which sequence `b`, capsule `c` and row of tiles this program handles, its frames and its positions."""
    pid = tl.program_id(0)
    tile_d = pid % TILES_D
    tile_s = pid // TILES_D % TILES_S
    bc = pid // TILES_D // TILES_S
    frames = tile_s * P.BLOCK_S + tl.arange(0, P.BLOCK_S)
    positions = tile_d * P.BLOCK_D + tl.arange(0, P.BLOCK_D)
    return (bc // C).to(tl.int64), (bc % C).to(tl.int64), tile_s, frames, positions


@triton.jit
def _moved(index, offset, size, CIRCULAR: tl.constexpr):
    """`index + offset` on an axis of `size` elements, and whether it is inside; around a circle at most once."""
    moved = index + offset
    if CIRCULAR:
        moved = tl.where(moved >= size, moved - size, tl.where(moved < 0, moved + size, moved))
    return moved, (moved >= 0) & (moved < size)


@triton.jit
def _position(d, offsets, entry, SIGN: tl.constexpr, P: tl.constexpr):
    """Where the tap of a position of `z` is in `u`, or for SIGN -1 the other way, and whether it is inside."""
    offsets += entry * 3
    if SIGN == 1:
        from_1, from_2, to_0, to_1, to_2 = P.Z1, P.Z2, P.U0, P.U1, P.U2
    else:
        from_1, from_2, to_0, to_1, to_2 = P.U1, P.U2, P.Z0, P.Z1, P.Z2
    column, inside = _moved(d % from_2, SIGN * tl.load(offsets + 2), to_2, P.CAPSULE_CIRCULAR)
    if P.AXES > 1:
        row, row_inside = _moved(d // from_2 % from_1, SIGN * tl.load(offsets + 1), to_1, P.CAPSULE_CIRCULAR)
        column, inside = row * to_2 + column, inside & row_inside
    if P.AXES > 2:
        plane, plane_inside = _moved(d // (from_1 * from_2), SIGN * tl.load(offsets), to_0, P.CAPSULE_CIRCULAR)
        column, inside = plane * (to_1 * to_2) + column, inside & plane_inside
    return column, inside


@triton.jit
def _factor(weights, coefficients, numbers, entry, P: tl.constexpr):
    """Weight and interpolation of a tap."""
    factor = tl.load(coefficients + entry)
    if P.WEIGHTED:
        factor *= tl.load(weights + tl.load(numbers + entry))
    return factor


@triton.jit
def _inside(x, inside, P: tl.constexpr):
    """`x`, and 0 where an edge cuts it off: a weight that is not finite, times 0, is not 0."""
    if P.WEIGHTED and not (P.TIME_CIRCULAR and P.CAPSULE_CIRCULAR):
        x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def _reciprocal_root(x):
    """`x^(-1/2)` by a correctly rounded root and a correctly rounded quotient: at most 1 ulp off."""
    if x.dtype == tl.float64:  # always correctly rounded; the _rn functions take float32 only
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, x.dtype), tl.sqrt_rn(x))


@triton.jit
def _quotient(x, y):
    """`x / y`, correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _window_sum(
    u, weights, l, d, times, numbers, offsets, coefficients, S_U, stride_s, stride_d,
    ROOT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`v = Σ factor · u[tap]²` under one root, for every element of a tile."""
    v = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    for entry in range(_first(P, ROOT), _first(P, ROOT + 1)):
        row, row_inside = _moved(l, tl.load(times + entry), S_U, P.TIME_CIRCULAR)
        column, column_inside = _position(d, offsets, entry, 1, P)
        factor = _factor(weights, coefficients, numbers, entry, P)
        inside = row_inside & column_inside
        x = tl.load(u + row.to(tl.int64) * stride_s + column.to(tl.int64) * stride_d, mask=inside, other=0.0).to(P.ACC)
        v += _inside(factor * (x * x), inside, P)
    return v


@triton.jit
def taps_forward_kernel(
    z, u, mu, weights, t, r, times, numbers, offsets, coefficients, groups,
    S, S_U, C, TILES_S, TILES_D,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d, weights_stride_c,
    SAVE_R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`t = (z - mu) / Σ_roots sqrt(v + EPS)`, one tile a program. Strides count elements; `t`, `r` are contiguous."""
    D: tl.constexpr = P.Z0 * P.Z1 * P.Z2
    PLANES: tl.constexpr = P.ROOTS + (P.ROOTS > 1)
    b, c, _, frames, positions = _tile(C, TILES_S, TILES_D, P)
    l, d = frames[:, None], positions[None, :]
    inside = (l < S) & (d < D)
    size = tl.full((), D, tl.int64) * S * C  # of a sequence
    at = (l.to(tl.int64) * C + c) * D + d
    t += b * size
    if SAVE_R:
        r += b * PLANES * size
    u += b * u_stride_b + c * u_stride_c
    group = tl.load(groups + c)
    offsets += group * P.ENTRIES * 3
    coefficients += group * P.ENTRIES
    if P.WEIGHTED:
        weights += c * weights_stride_c

    denominator = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    for root in tl.static_range(P.ROOTS):
        v = _window_sum(u, weights, l, d, times, numbers, offsets, coefficients, S_U, u_stride_s, u_stride_d, root, P)
        reciprocal = _reciprocal_root(v + P.EPS)
        if SAVE_R:
            tl.store(r + root * size + at, reciprocal, mask=inside)
        if P.ROOTS > 1:
            denominator += _quotient(tl.full(reciprocal.shape, 1.0, P.ACC), reciprocal)
    if P.ROOTS > 1:
        reciprocal = _quotient(tl.full(denominator.shape, 1.0, P.ACC), denominator)
        if SAVE_R:
            tl.store(r + P.ROOTS * size + at, reciprocal, mask=inside)

    z_at = b * z_stride_b + l.to(tl.int64) * z_stride_s + c * z_stride_c + d.to(tl.int64) * z_stride_d
    mu_here = tl.load(mu + c * mu_stride_c + d.to(tl.int64) * mu_stride_d, mask=d < D)
    numerator = tl.load(z + z_at, mask=inside).to(P.ACC) - mu_here
    tl.store(t + at, (numerator * reciprocal).to(t.dtype.element_ty), mask=inside)


@triton.jit
def _g(
    dt, z, mu, r, row, column, size, C, inside,
    dt_stride_s, dt_stride_d, z_stride_s, z_stride_d, mu_stride_d,
    ROOT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`dt · (z - mu) · s² · r` of one root, -2 times the gradient of its `v`, at elements of `z`."""
    row, column = row.to(tl.int64), column.to(tl.int64)
    at = row * C * (P.Z0 * P.Z1 * P.Z2) + column
    r_here = tl.load(r + ROOT * size + at, mask=inside, other=0.0)
    s_here = r_here
    if P.ROOTS > 1:
        s_here = tl.load(r + P.ROOTS * size + at, mask=inside, other=0.0)
    dt_here = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=inside, other=0.0).to(P.ACC)
    z_here = tl.load(z + row * z_stride_s + column * z_stride_d, mask=inside, other=0.0).to(P.ACC)
    mu_here = tl.load(mu + column * mu_stride_d, mask=inside, other=0.0)
    return dt_here * s_here * ((z_here - mu_here) * s_here) * r_here


@triton.jit
def taps_backward_kernel(
    dt, z, u, mu, weights, r, dz, du, dmu_parts, dw_parts, times, numbers, offsets, coefficients, groups,
    S, S_U, C, TILES_S, TILES_D,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d, weights_stride_c,
    P: tl.constexpr,
):  # fmt: skip
    """With `g = dt · (z - mu) · s² · r`: `dz = dt · s`, `du[n] = -u[n] · Σ_roots Σ_taps factor · g[n - tap]`.

    One tile a program, of `z` and of `u`, which also leaves its share of `dmu = -Σ dt · s` (summed over the tile's
    frames) and of `dw = -½ Σ g · u[tap]²` (summed over the tile, by entry) for a small, ordered reduction. `r`, `dz`
    and `du` are contiguous, `dmu_parts` is `(B, TILES_S, C, D)` and `dw_parts` is `(programs, ENTRIES)`.
    """
    D: tl.constexpr = P.Z0 * P.Z1 * P.Z2
    D_U: tl.constexpr = P.U0 * P.U1 * P.U2
    b, c, tile_s, frames, positions = _tile(C, TILES_S, TILES_D, P)
    l, d = frames[:, None], positions[None, :]
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu += c * mu_stride_c
    size = tl.full((), D, tl.int64) * S * C  # of a sequence
    r += b * (P.ROOTS + (P.ROOTS > 1)) * size + c * D
    group = tl.load(groups + c)
    offsets += group * P.ENTRIES * 3
    coefficients += group * P.ENTRIES
    if P.WEIGHTED:
        weights += c * weights_stride_c

    gathered = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    for root in tl.static_range(P.ROOTS):
        for entry in range(_first(P, root), _first(P, root + 1)):
            row, row_inside = _moved(l, -tl.load(times + entry), S, P.TIME_CIRCULAR)
            column, column_inside = _position(d, offsets, entry, -1, P)
            tap = row_inside & column_inside
            g = _g(
                dt, z, mu, r, row, column, size, C, tap,
                dt_stride_s, dt_stride_d, z_stride_s, z_stride_d, mu_stride_d, root, P,
            )  # fmt: skip
            gathered += _inside(_factor(weights, coefficients, numbers, entry, P) * g, tap, P)
    at = l.to(tl.int64) * u_stride_s + d.to(tl.int64) * u_stride_d
    u_here = tl.load(u + at, mask=(l < S_U) & (d < D_U), other=0.0).to(P.ACC)
    du_at = ((b * S_U + l.to(tl.int64)) * C + c) * D_U + d
    # 2 · u · (-½ · gathered): the factor -½ of the gradient of v is taken out of the sum
    tl.store(du + du_at, (-u_here * gathered).to(du.dtype.element_ty), mask=(l < S_U) & (d < D_U))

    inside = (l < S) & (d < D)
    row, column = l.to(tl.int64), d.to(tl.int64)
    LAST: tl.constexpr = P.ROOTS if P.ROOTS > 1 else 0
    s_here = tl.load(r + LAST * size + row * C * D + column, mask=inside, other=0.0)
    dz_here = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=inside, other=0.0).to(P.ACC) * s_here
    tl.store(dz + b * size + (row * C + c) * D + column, dz_here.to(dz.dtype.element_ty), mask=inside)
    parts_at = ((b * TILES_S + tile_s) * C + c) * D + positions
    tl.store(dmu_parts + parts_at, -tl.sum(dz_here, axis=0), mask=positions < D)

    if P.WEIGHTED:
        dw_parts += tl.program_id(0).to(tl.int64) * P.ENTRIES
        for root in tl.static_range(P.ROOTS):
            g = _g(
                dt, z, mu, r, l, d, size, C, inside,
                dt_stride_s, dt_stride_d, z_stride_s, z_stride_d, mu_stride_d, root, P,
            )  # fmt: skip
            g *= -0.5
            for entry in range(_first(P, root), _first(P, root + 1)):
                row_tap, row_inside = _moved(l, tl.load(times + entry), S_U, P.TIME_CIRCULAR)
                column_tap, column_inside = _position(d, offsets, entry, 1, P)
                tap = row_inside & column_inside & inside
                u_at = row_tap.to(tl.int64) * u_stride_s + column_tap.to(tl.int64) * u_stride_d
                x = tl.load(u + u_at, mask=tap, other=0.0).to(P.ACC)
                tl.store(dw_parts + entry, tl.load(coefficients + entry) * tl.sum(tl.where(tap, g * x * x, 0.0)))


# --- launches, also of the kernels in `fourier` -----------------------------------------------------------------------


class Prepared(NamedTuple):
    """What the kernels are given beside the tensors of a call."""

    kernels: tuple  # forward and backward
    options: dict  # what they are compiled for
    arguments: tuple  # tables and sizes
    tiles_s: int
    tiles: int  # of a capsule, one program each
    by_weight: Tensor  # which of the gradients that the backward pass leaves add up to that of each weight
    parts: int  # number of these gradients


class Sizes(NamedTuple):
    """Of the axes of `z`, and of those of `u` that may be longer."""

    S: int
    S_U: int
    C: int
    D: int
    D_U: int

    @classmethod
    def from_inputs(cls, inputs: Inputs) -> "Sizes":
        """All but the batch's."""
        _, S, C, D = inputs.z.shape
        _, S_U, _, D_U = inputs.u.shape
        return cls(S, S_U, C, D, D_U)


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and if it is asked for what `tables.shape_of_r` describes."""
    return launch_forward(_prepared_for(inputs, window), inputs, window, save_r)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `dz`, `du`, `dmu` of the shape of `mu` and `dw` (None without weights), from what `forward` returned."""
    return launch_backward(_prepared_for(inputs, window), inputs, window, r, dt)


def launch_forward(prepared: Prepared, inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `forward` by the kernels that are prepared."""
    (z, u, mu, weights), n = inputs, window.neighborhood
    B, _, C, _ = z.shape
    t = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    r = torch.empty(shape_of_r(z, n), dtype=compute_dtype(z.dtype), device=z.device) if save_r else None
    arguments = (z, u, mu, weights, t, r, *prepared.arguments, *z.stride(), *u.stride())
    arguments += (*_mu_strides(inputs), _weight_stride(weights, n))
    grid = (B * C * prepared.tiles,)
    launch(z, prepared.kernels[0], grid, *arguments, SAVE_R=save_r, **prepared.options)
    return t, r


def launch_backward(
    prepared: Prepared, inputs: Inputs, window: Window, r: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `backward` by the kernels that are prepared."""
    z, u, mu, weights = inputs
    B, _, C, D = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    dmu_parts = torch.empty((B, prepared.tiles_s, C, D), dtype=compute_dtype(z.dtype), device=z.device)
    dw_parts = None if weights is None else weights.new_empty((B, C, prepared.tiles, prepared.parts))
    weight_stride = _weight_stride(weights, window.neighborhood)
    arguments = (dt, z, u, mu, weights, r, dz, du, dmu_parts, dw_parts, *prepared.arguments)
    arguments += (*dt.stride(), *z.stride(), *u.stride(), *_mu_strides(inputs), weight_stride)
    launch(z, prepared.kernels[1], (B * C * prepared.tiles,), *arguments, **prepared.options)
    dw = None
    if weights is not None:
        parts = dw_parts.sum((0, 2) if weight_stride else (0, 1, 2))
        dw = weight_sums(parts, prepared.by_weight, weights.shape)
    return dz, du, dmu_parts.sum_to_size(mu.shape), dw


def _prepared_for(inputs: Inputs, window: Window) -> Prepared:
    z = inputs.z
    return _prepared(window, Sizes.from_inputs(inputs), inputs.weights is not None, z.dtype, z.device)


@lru_cache(maxsize=256)
def _prepared(window: Window, sizes: Sizes, weighted: bool, dtype: torch.dtype, device: torch.device) -> Prepared:
    n, (S, S_U, C, D, D_U) = window.neighborhood, sizes
    entries = table(n, C, D, compute_dtype(dtype), device)
    block_d = min(triton.next_power_of_2(max(D, D_U, 1)), 64)
    block_s = min(triton.next_power_of_2(max(S, S_U, 1)), 1024 // block_d)
    tiles_s, tiles_d = ceiling(max(S, S_U), block_s), ceiling(max(D, D_U), block_d)
    fields = {
        "ENTRIES": entries.roots[-1],
        "ROOTS": n.root_count,
        "END_0": entries.roots[1],
        "END_1": entries.roots[min(2, n.root_count)],
        "AXES": len(n.lengths(D)),
        "CAPSULE_CIRCULAR": n.capsule_boundary == "circular",
        **{f"Z{axis}": length for axis, length in enumerate(entries.lengths)},
        **{f"U{axis}": length for axis, length in enumerate(entries.padded)},
        **common_fields(window, weighted, dtype, block_s, block_d),
    }
    tables = (entries.times, entries.numbers, entries.offsets, entries.coefficients, entries.groups)
    return Prepared(
        (taps_forward_kernel, taps_backward_kernel),
        {"P": constants(Taps, fields), "num_warps": 4},
        (*tables, S, S_U, C, tiles_s, tiles_d),
        tiles_s,
        tiles_s * tiles_d,
        entries.by_weight,
        len(entries.times),
    )


def common_fields(window: Window, weighted: bool, dtype: torch.dtype, block_s: int, block_d: int) -> dict:
    """Return the fields that both pairs of kernels are compiled for."""
    return {
        "TIME_CIRCULAR": window.neighborhood.time_boundary == "circular",
        "WEIGHTED": weighted,
        "EPS": window.eps,
        "ACC": ACCUMULATOR[compute_dtype(dtype)],
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
    }


def _weight_stride(weights: Tensor | None, neighborhood: Neighborhood) -> int:
    """Between the weights of one capsule and the next; 0 where all capsules share them."""
    return weights.stride(0) if has_own_weights(weights, neighborhood) else 0


def _mu_strides(inputs: Inputs) -> tuple[int, int]:
    """Of `mu` along the capsules and their positions."""
    return inputs.mu.expand(inputs.z.shape[2:]).stride()
