"""The `triton` backend: one kernel launch forward and one backward, for NVIDIA and AMD GPUs.

Importing this module needs Triton. With `TRITON_INTERPRET=1` set before the first import the same kernels run through
Triton's interpreter on tensors of any device, slowly, for tests.

Every program handles a tile of `BLOCK_S` frames by `BLOCK_D` positions of one capsule of one sequence. Both only
gather (an output element is written by one program, once), so there are no atomics and two runs give the same bits.
Reads repeated by the taps of a window are served by the caches. Offsets are 64-bit: tensors may pass 2³¹ elements.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .neighborhood import Neighborhood
from .reference import compute_dtype

_ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _tile(C, TILES_S, TILES_D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which sequence `b`, capsule `c` and row of tiles this program handles, its frames and its positions."""
    pid = tl.program_id(0)
    tile_d = pid % TILES_D
    tile_s = pid // TILES_D % TILES_S
    bc = pid // TILES_D // TILES_S
    frames = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    positions = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return (bc // C).to(tl.int64), (bc % C).to(tl.int64), tile_s, frames, positions


@triton.jit
def _moved(index, offset, size, CIRCULAR: tl.constexpr):
    """`index + offset` on an axis of `size` elements, and whether it is inside; circular axes wrap around."""
    if CIRCULAR:
        moved = index + (offset % size + size) % size
        return tl.where(moved >= size, moved - size, moved), index < size
    else:
        moved = index + offset
        return moved, (index < size) & (moved >= 0) & (moved < size)


@triton.jit
def _reciprocal_root(x):
    """`x^(-1/2)` by a correctly rounded root and a correctly rounded quotient: at most 1 ulp off."""
    if x.dtype == tl.float64:  # always correctly rounded; the _rn functions take float32 only
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, x.dtype), tl.sqrt_rn(x))


@triton.jit
def topographic_forward_kernel(
    z, u, mu, w, t, r,
    S, C, D, TILES_S, TILES_D,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d,
    EPS: tl.constexpr,
    FIRST_I: tl.constexpr, W: tl.constexpr, FIRST_K: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr,
    TIME_CIRCULAR: tl.constexpr, CAPSULE_CIRCULAR: tl.constexpr, WEIGHTED: tl.constexpr, SAVE_R: tl.constexpr,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`r = (Σ_{i,k} w[i,k] · u[l+i, d + SHIFT·i + k]² + EPS)^(-1/2)` and `t = (z - mu) · r`, one tile a program.

    Strides count elements; `t`, `r` and `w` are contiguous. `r` is written where the backward pass will need it.
    """
    b, c, _, frames, positions = _tile(C, TILES_S, TILES_D, BLOCK_S, BLOCK_D)
    l, d = frames[:, None], positions[None, :]
    u += b * u_stride_b + c * u_stride_c
    v = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for i in range(FIRST_I, FIRST_I + W):
        row, row_inside = _moved(l, i, S, TIME_CIRCULAR)
        for k in range(FIRST_K, FIRST_K + K):
            column, column_inside = _moved(d, SHIFT * i + k, D, CAPSULE_CIRCULAR)
            at = row.to(tl.int64) * u_stride_s + column.to(tl.int64) * u_stride_d
            x = tl.load(u + at, mask=row_inside & column_inside, other=0.0).to(ACC)
            if WEIGHTED:
                v += tl.load(w + (i - FIRST_I) * K + (k - FIRST_K)) * (x * x)
            else:
                v += x * x
    reciprocal = _reciprocal_root(v + EPS)

    inside = (l < S) & (d < D)
    l, d = l.to(tl.int64), d.to(tl.int64)
    z_at = b * z_stride_b + l * z_stride_s + c * z_stride_c + d * z_stride_d
    numerator = tl.load(z + z_at, mask=inside).to(ACC) - tl.load(mu + c * mu_stride_c + d * mu_stride_d, mask=d < D)
    out_at = ((b * S + l) * C + c) * D + d
    tl.store(t + out_at, (numerator * reciprocal).to(t.dtype.element_ty), mask=inside)
    if SAVE_R:
        tl.store(r + out_at, reciprocal, mask=inside)


@triton.jit
def topographic_backward_kernel(
    dt, z, u, mu, w, r, dz, du, dmu_parts, dw_parts,
    S, C, D, TILES_S, TILES_D,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d,
    FIRST_I: tl.constexpr, W: tl.constexpr, FIRST_K: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr,
    TIME_CIRCULAR: tl.constexpr, CAPSULE_CIRCULAR: tl.constexpr, WEIGHTED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With `g = -½ · dt · (z - mu) · r³`: `dz = dt · r`, `du[n] = 2 · u[n] · Σ_{i,k} w[i,k] · g[n - (i, SHIFT·i + k)]`.

    One tile a program, which also leaves its share of `dmu = -Σ dt · r` (summed over the tile's frames) and of
    `dw[i,k] = Σ g · u[tap]²` (summed over the tile) for a small, ordered reduction. `r`, `dz`, `du` and `w` are
    contiguous, `dmu_parts` is `(B, TILES_S, C, D)` and `dw_parts` is `(programs, W, K)`.
    """
    b, c, tile_s, frames, positions = _tile(C, TILES_S, TILES_D, BLOCK_S, BLOCK_D)
    l, d = frames[:, None], positions[None, :]
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu += c * mu_stride_c
    capsule = (b * S * C + c) * D  # of the contiguous tensors, whose frames lie C·D apart

    gathered = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for i in range(FIRST_I, FIRST_I + W):
        row, row_inside = _moved(l, -i, S, TIME_CIRCULAR)
        row = row.to(tl.int64)
        for k in range(FIRST_K, FIRST_K + K):
            column, column_inside = _moved(d, -(SHIFT * i + k), D, CAPSULE_CIRCULAR)
            column = column.to(tl.int64)
            tap = row_inside & column_inside
            dt_tap = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=tap, other=0.0).to(ACC)
            z_tap = tl.load(z + row * z_stride_s + column * z_stride_d, mask=tap, other=0.0).to(ACC)
            r_tap = tl.load(r + capsule + row * C * D + column, mask=tap, other=0.0)
            g_tap = dt_tap * r_tap * ((z_tap - tl.load(mu + column * mu_stride_d, mask=tap, other=0.0)) * r_tap) * r_tap
            if WEIGHTED:
                gathered += tl.load(w + (i - FIRST_I) * K + (k - FIRST_K)) * g_tap
            else:
                gathered += g_tap

    inside = (l < S) & (d < D)
    row, column = l.to(tl.int64), d.to(tl.int64)
    at = capsule + row * C * D + column
    u_here = tl.load(u + row * u_stride_s + column * u_stride_d, mask=inside, other=0.0).to(ACC)
    # 2 · u · (-½ · gathered): the factor -½ of g is taken out of the sum
    tl.store(du + at, (-u_here * gathered).to(du.dtype.element_ty), mask=inside)

    r_here = tl.load(r + at, mask=inside, other=0.0)
    dz_here = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=inside, other=0.0).to(ACC) * r_here
    tl.store(dz + at, dz_here.to(dz.dtype.element_ty), mask=inside)
    parts_at = ((b * TILES_S + tile_s) * C + c) * D + positions
    tl.store(dmu_parts + parts_at, -tl.sum(dz_here, axis=0), mask=positions < D)

    if WEIGHTED:
        z_here = tl.load(z + row * z_stride_s + column * z_stride_d, mask=inside, other=0.0).to(ACC)
        mu_here = tl.load(mu + column * mu_stride_d, mask=d < D, other=0.0)
        g = tl.where(inside, -0.5 * dz_here * ((z_here - mu_here) * r_here) * r_here, 0.0)
        dw_parts += tl.program_id(0).to(tl.int64) * W * K
        for i in range(FIRST_I, FIRST_I + W):
            row_tap, row_inside = _moved(l, i, S, TIME_CIRCULAR)
            for k in range(FIRST_K, FIRST_K + K):
                column_tap, column_inside = _moved(d, SHIFT * i + k, D, CAPSULE_CIRCULAR)
                u_at = row_tap.to(tl.int64) * u_stride_s + column_tap.to(tl.int64) * u_stride_d
                x = tl.load(u + u_at, mask=row_inside & column_inside, other=0.0).to(ACC)
                tl.store(dw_parts + (i - FIRST_I) * K + (k - FIRST_K), tl.sum(g * x * x))


def interpreted() -> bool:
    """Whether the kernels run through Triton's interpreter, which takes tensors of any device."""
    return isinstance(topographic_forward_kernel, InterpretedFunction)


def forward(
    z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float, save_r: bool
) -> tuple[Tensor, Tensor | None]:
    """As `fallback.forward`; without `save_r` the second result is None and nothing but `t` is written."""
    _, S, C, D = z.shape
    t = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    r = torch.empty(z.shape, dtype=compute_dtype(z.dtype), device=z.device) if save_r else None
    tiles_s, tiles_d, meta = _launch_parameters(z, neighborhood, weights)
    programs = z.shape[0] * C * tiles_s * tiles_d
    if programs:
        with _device_of(z):
            topographic_forward_kernel[(programs,)](
                z, u, mu, weights, t, r, S, C, D, tiles_s, tiles_d,
                *z.stride(), *u.stride(), *mu.stride(), EPS=eps, SAVE_R=save_r, **meta,
            )  # fmt: skip
    return t, r


def backward(
    dt: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    r: Tensor,
    neighborhood: Neighborhood,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `fallback.backward`."""
    B, S, C, D = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    du = torch.empty_like(dz)
    tiles_s, tiles_d, meta = _launch_parameters(z, neighborhood, weights)
    programs = B * C * tiles_s * tiles_d
    dmu_parts = torch.empty((B, tiles_s, C, D), dtype=r.dtype, device=z.device)
    dw_parts = None if weights is None else weights.new_empty((programs, *weights.shape))
    if programs:
        with _device_of(z):
            topographic_backward_kernel[(programs,)](
                dt, z, u, mu, weights, r, dz, du, dmu_parts, dw_parts, S, C, D, tiles_s, tiles_d,
                *dt.stride(), *z.stride(), *u.stride(), *mu.stride(), **meta,
            )  # fmt: skip
    return dz, du, dmu_parts.sum((0, 1)), None if dw_parts is None else dw_parts.sum(0)


def _launch_parameters(z: Tensor, neighborhood: Neighborhood, weights: Tensor | None) -> tuple[int, int, dict]:
    """Tiles along time and capsule, and the compile-time arguments the two kernels share."""
    _, S, _, D = z.shape
    block_d = min(triton.next_power_of_2(max(D, 1)), 64)
    block_s = min(triton.next_power_of_2(max(S, 1)), 1024 // block_d)
    shift = neighborhood.shift
    if neighborhood.capsule_boundary == "zero":  # a farther shift drops the same taps; this one cannot overflow
        limit = D + neighborhood.capsule_window
        shift = max(-limit, min(limit, shift))
    else:
        shift %= max(D, 1)
    meta = {
        "FIRST_I": neighborhood.time_taps.start,
        "W": neighborhood.time_window,
        "FIRST_K": neighborhood.capsule_taps.start,
        "K": neighborhood.capsule_window,
        "SHIFT": shift,
        "TIME_CIRCULAR": neighborhood.time_boundary == "circular",
        "CAPSULE_CIRCULAR": neighborhood.capsule_boundary == "circular",
        "WEIGHTED": weights is not None,
        "ACC": _ACCUMULATOR[compute_dtype(z.dtype)],
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
    }
    return triton.cdiv(S, block_s), triton.cdiv(D, block_d), meta


def _device_of(x: Tensor):
    """Launch on the tensor's own device, which need not be the current one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
