"""Kernels for windows that roll by phase shifts: what they are, and launched.

    v[l, d] = Σ_{i,k} w[i,k] · (Σ_m h_i[m] · u[l + i, d + k + m])²

Every program handles whole capsules in a tile of `BLOCK_S` frames, since a phase shift takes all positions to each.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Inputs, Window, compute_dtype
from ..tables import phases, table
from .launch import ceiling, constants
from .taps import Prepared, Sizes, _moved, _reciprocal_root, common_fields, launch_backward, launch_forward


@dataclass(frozen=True)
class Phases:
    """What a kernel is compiled for; every field is a `tl.constexpr`."""

    D: tl.constexpr
    FIRST_I: tl.constexpr  # the offset in time, to a frame of `u`, of the first of W taps
    W: tl.constexpr
    FIRST_K: tl.constexpr  # the first of K taps along the capsule
    K: tl.constexpr
    TIME_CIRCULAR: tl.constexpr
    WEIGHTED: tl.constexpr
    EPS: tl.constexpr
    ACC: tl.constexpr  # the type of all arithmetic
    BLOCK_S: tl.constexpr
    BLOCK_D: tl.constexpr


@triton.jit
def _tile(C, TILES_S, P: tl.constexpr):
    """Which sequence `b`, capsule `c` and tile this program handles, its frames and the positions of the capsule."""
    pid = tl.program_id(0)
    bc = pid // TILES_S
    l = (pid % TILES_S * P.BLOCK_S + tl.arange(0, P.BLOCK_S))[:, None]
    d = tl.arange(0, P.BLOCK_D)[None, :] + tl.zeros((P.BLOCK_S, 1), tl.int32)
    return (bc // C).to(tl.int64), (bc % C).to(tl.int64), pid % TILES_S, l, d


@triton.jit
def _around(d, offset, P: tl.constexpr):
    """`(d + offset) mod D` for any offset within one round; spare positions stay where something is."""
    moved = tl.where(d + offset >= P.D, d + offset - P.D, d + offset)
    return tl.where(d < P.D, tl.where(moved < 0, moved + P.D, moved), 0)


@triton.jit
def _times(factor, x):
    """`factor · x`, and 0 for a factor of 0: a whole shift is a roll, which leaves what is not finite where it is."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _shifted(u, h, row, inside, d, stride_s, stride_d, P: tl.constexpr):
    """`Σ_m h[m] · u[row, d + m]`, 0 where there is no such frame."""
    total = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    inside = inside & (d < P.D)
    for m in range(P.D):
        at = row.to(tl.int64) * stride_s + _around(d, m, P).to(tl.int64) * stride_d
        total += _times(tl.load(h + m), tl.load(u + at, mask=inside, other=0.0).to(P.ACC))
    return total


@triton.jit
def _weighted(x, inside, weights, i, k, P: tl.constexpr):
    """`w[i,k] · x`, and 0 where an edge cuts it off: a weight that is not finite, times 0, is not 0."""
    if P.WEIGHTED:
        x *= tl.load(weights + i * P.K + k)
        if not P.TIME_CIRCULAR:
            x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def fourier_forward_kernel(
    z, u, mu, weights, t, r, h, groups,
    S, S_U, C, TILES_S,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d, weights_stride_c,
    SAVE_R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`r = (v + EPS)^(-1/2)` and `t = (z - mu) · r`; strides count elements, `t` and `r` are contiguous."""
    b, c, _, l, d = _tile(C, TILES_S, P)
    u += b * u_stride_b + c * u_stride_c
    h += tl.load(groups + c) * P.W * P.D
    if P.WEIGHTED:
        weights += c * weights_stride_c
    v = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    for i in range(P.W):
        row, row_inside = _moved(l, P.FIRST_I + i, S_U, P.TIME_CIRCULAR)
        x = _shifted(u, h + i * P.D, row, row_inside, d, u_stride_s, u_stride_d, P)
        for k in range(P.K):
            v += _weighted(tl.gather(x * x, _around(d, P.FIRST_K + k, P), 1), row_inside, weights, i, k, P)
    reciprocal = _reciprocal_root(v + P.EPS)

    inside = (l < S) & (d < P.D)
    l, d = l.to(tl.int64), d.to(tl.int64)
    z_at = b * z_stride_b + l * z_stride_s + c * z_stride_c + d * z_stride_d
    mu_here = tl.load(mu + c * mu_stride_c + d * mu_stride_d, mask=d < P.D)
    out_at = ((b * S + l) * C + c) * P.D + d
    t_here = (tl.load(z + z_at, mask=inside).to(P.ACC) - mu_here) * reciprocal
    tl.store(t + out_at, t_here.to(t.dtype.element_ty), mask=inside)
    if SAVE_R:
        tl.store(r + out_at, reciprocal, mask=inside)


@triton.jit
def fourier_backward_kernel(
    dt, z, u, mu, weights, r, dz, du, dmu_parts, dw_parts, h, groups,
    S, S_U, C, TILES_S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d, weights_stride_c,
    P: tl.constexpr,
):  # fmt: skip
    """With `g = -½ · dt · (z - mu) · r³` and `x_i` the shifted `u`:

        dz = dt · r      du[n, e] = Σ_i Σ_m h_i[m] · (2 · x_i[n] · Σ_k w[i,k] · g[n - i, · - k])[e - m]

    One tile of frames a program, of `z` and of `u`, which also leaves its share of `dmu = -Σ dt · r` and of
    `dw[i,k] = Σ g · x_i[tap]²`. `r`, `dz` and `du` are contiguous, `dmu_parts` is `(B, TILES_S, C, D)` and `dw_parts`
    is `(programs, W, K)`.
    """
    b, c, tile_s, l, d = _tile(C, TILES_S, P)
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu += c * mu_stride_c
    capsule = (b * S * C + c) * P.D  # of the contiguous tensors, whose frames lie C·D apart
    h += tl.load(groups + c) * P.W * P.D
    if P.WEIGHTED:
        weights += c * weights_stride_c

    row, column, inside = l.to(tl.int64), d.to(tl.int64), (l < S) & (d < P.D)
    r_here = tl.load(r + capsule + row * C * P.D + column, mask=inside, other=0.0)
    dz_here = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=inside, other=0.0).to(P.ACC) * r_here
    tl.store(dz + capsule + row * C * P.D + column, dz_here.to(dz.dtype.element_ty), mask=inside)
    parts_at = ((b * TILES_S + tile_s) * C + c) * P.D + tl.arange(0, P.BLOCK_D)
    tl.store(dmu_parts + parts_at, -tl.sum(dz_here, axis=0), mask=tl.arange(0, P.BLOCK_D) < P.D)

    du_here = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
    for i in range(P.W):
        row, row_inside = _moved(l, -(P.FIRST_I + i), S, P.TIME_CIRCULAR)
        row, tap = row.to(tl.int64), row_inside & (d < P.D)
        gathered = tl.zeros((P.BLOCK_S, P.BLOCK_D), P.ACC)
        for k in range(P.K):
            column = _around(d, -(P.FIRST_K + k), P).to(tl.int64)
            dt_tap = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=tap, other=0.0).to(P.ACC)
            z_tap = tl.load(z + row * z_stride_s + column * z_stride_d, mask=tap, other=0.0).to(P.ACC)
            r_tap = tl.load(r + capsule + row * C * P.D + column, mask=tap, other=0.0)
            numerator = z_tap - tl.load(mu + column * mu_stride_d, mask=tap, other=0.0)
            gathered += _weighted(dt_tap * r_tap * (numerator * r_tap) * r_tap, row_inside, weights, i, k, P)
        x = _shifted(u, h + i * P.D, l, row_inside & (l < S_U), d, u_stride_s, u_stride_d, P)
        product = -x * gathered  # 2 · x · (-½ · gathered)
        for m in range(P.D):
            du_here += _times(tl.load(h + i * P.D + m), tl.gather(product, _around(d, -m, P), 1))
    du_at = ((b * S_U + l.to(tl.int64)) * C + c) * P.D + d
    tl.store(du + du_at, du_here.to(du.dtype.element_ty), mask=(l < S_U) & (d < P.D))

    if P.WEIGHTED:
        row, column = l.to(tl.int64), d.to(tl.int64)
        z_here = tl.load(z + row * z_stride_s + column * z_stride_d, mask=inside, other=0.0).to(P.ACC)
        mu_here = tl.load(mu + column * mu_stride_d, mask=d < P.D, other=0.0)
        g = -0.5 * dz_here * ((z_here - mu_here) * r_here) * r_here
        dw_parts += tl.program_id(0).to(tl.int64) * P.W * P.K
        for i in range(P.W):
            row_tap, tap_inside = _moved(l, P.FIRST_I + i, S_U, P.TIME_CIRCULAR)
            x = _shifted(u, h + i * P.D, row_tap, tap_inside, d, u_stride_s, u_stride_d, P)
            for k in range(P.K):
                energy = tl.gather(x * x, _around(d, P.FIRST_K + k, P), 1)
                tl.store(dw_parts + i * P.K + k, tl.sum(tl.where(inside & tap_inside, g * energy, 0.0)))


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and if it is asked for `r = (v + eps)^(-1/2)`."""
    return launch_forward(_prepared_for(inputs, window), inputs, window, save_r)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `dz`, `du`, `dmu` of the shape of `mu` and `dw` (None without weights), from what `forward` returned."""
    return launch_backward(_prepared_for(inputs, window), inputs, window, r, dt)


def _prepared_for(inputs: Inputs, window: Window) -> Prepared:
    z = inputs.z
    return _prepared(window, Sizes.from_inputs(inputs), inputs.weights is not None, z.dtype, z.device)


@lru_cache(maxsize=256)
def _prepared(window: Window, sizes: Sizes, weighted: bool, dtype: torch.dtype, device: torch.device) -> Prepared:
    n, (S, S_U, C, D, _) = window.neighborhood, sizes
    block_d = triton.next_power_of_2(max(D, 1))
    block_s = min(triton.next_power_of_2(max(S, S_U, 1)), max(1, 512 // block_d))
    tiles_s = ceiling(max(S, S_U), block_s)
    fields = {
        "D": D,
        "FIRST_I": 0 if n.time_boundary == "padded" else n.time_taps.start,
        "W": n.time_window,
        "FIRST_K": n.capsule_taps.start,
        "K": n.capsule_window,
        **common_fields(window, weighted, dtype, block_s, block_d),
    }
    (h,), groups = phases(n, D, compute_dtype(dtype), device), table(n, C, D, compute_dtype(dtype), device).groups
    weights = n.time_window * n.capsule_window
    with torch.inference_mode(False):  # it is kept for calls that train
        by_weight = torch.arange(weights, device=device)[:, None]
    return Prepared(
        (fourier_forward_kernel, fourier_backward_kernel),
        {"P": constants(Phases, fields), "num_warps": 4 if weighted else 2},  # else its registers spill
        (h, groups, S, S_U, C, tiles_s),
        tiles_s,
        tiles_s,
        by_weight,
        weights,
    )
