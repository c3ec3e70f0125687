"""Kernels for plain windows without weights, over circular capsules with one `mu`: what they are, chosen and launched.

Two pairs. The `whole` kernels are for short sequences: a lane takes one diagonal of a capsule (`lanes`) and holds all
its frames in registers; a window is the sum of a suffix of one block of W frames and a prefix of the next (van Herk
1992), three additions an element for any W. The `tile` kernels are for long sequences: a program holds a tile of frames
and the frames around it that its windows reach into (`tiles`), and sums by doubling,
`p₂ₙ[l, d] = pₙ[l, d] + pₙ[l + n, d + SHIFT·n]`, 2·log2(W) additions an element at most. Along the capsule both double.

Both pairs read what they need once, pack whole capsules side by side into the lanes of a program, and compute the root
again for the backward pass: keeping it would cost one more tensor to write and to read.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Inputs, Window, compute_dtype
from ...neighborhood import Neighborhood
from . import taps
from .lanes import (
    Plan,
    _capsule_sum,
    _capsules,
    _load_rows,
    _offset,
    _reciprocal_root,
    _sum_of_squares,
    _window_sums,
    _wrapped,
)
from .launch import ACCUMULATOR, WARP, ceiling, constants, launch
from .tiles import _answered, _at, _first_frame, _tile, _tile_window_sum

GROUP = tl.constexpr(8)  # frames of a tensor that are asked for before the first of them is used
MOST_POSITIONS = 512  # of a capsule that lies in one program
_MOST_FRAMES = {torch.float32: 32, torch.float64: 18}  # that a lane can hold in registers
_MOST_ELEMENTS = {torch.float32: 8192, torch.float64: 4096}  # that a tile can hold in registers


# --- short sequences: a lane holds its whole diagonal -----------------------------------------------------------------


@triton.jit
def _whole_window_sums(us, lane, e, P: tl.constexpr):
    """`v` of every frame from the frames of `u`, as a tuple."""
    squares = ()
    for l in tl.static_range(P.S):
        squares += (_sum_of_squares(us[l], lane, e, P),)
    return _window_sums(squares, P.FIRST_I, P.W, P.CIRCULAR)


@triton.jit
def whole_forward_kernel(
    z, u, mu, t, BC, C, S,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """`t = (z - mu) · (v + EPS)^(-1/2)` of whole capsules, contiguous. Strides count elements, BC is B · C.

    On a circle in time every diagonal must meet itself again: D divides SHIFT · S.
    """
    lane = tl.arange(0, P.LANES)
    e = lane % P.D
    b, c, inside = _capsules(lane, BC, C, P)
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu = tl.load(mu)
    t += (b * S * C + c) * P.D

    v = _whole_window_sums(_load_rows(u, e, inside, u_stride_s, u_stride_d, 0, P.S, P.FIRST_K, P), lane, e, P)
    for group in tl.static_range(0, P.S, GROUP):
        zs = _load_rows(z, e, inside, z_stride_s, z_stride_d, group, min(group + GROUP, P.S), 0, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            column = _wrapped(e + P.SHIFT * l % P.D, P.D)
            t_here = (zs[l - group].to(P.ACC) - mu) * _reciprocal_root(v[l], P)
            tl.store(t + _offset(l, column, C * P.D, 1, P), t_here.to(t.dtype.element_ty), mask=inside)


@triton.jit
def whole_backward_kernel(
    dt, z, u, mu, dz, du, dmu_parts, BC, C, S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """With `r = (v + EPS)^(-1/2)`: `dz = dt · r` and `du[n] = -u[n] · Σ_taps (dt · (z - mu) · r³)[n - tap]`."""
    lane = tl.arange(0, P.LANES)
    e = lane % P.D
    b, c, inside = _capsules(lane, BC, C, P)
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu = tl.load(mu)
    dz += (b * S * C + c) * P.D
    du += (b * S * C + c) * P.D

    us = _load_rows(u, e, inside, u_stride_s, u_stride_d, 0, P.S, P.FIRST_K, P)
    v = _whole_window_sums(us, lane, e, P)
    gs = ()
    dmu = tl.zeros((P.LANES,), P.ACC)
    for group in tl.static_range(0, P.S, GROUP):
        dts = _load_rows(dt, e, inside, dt_stride_s, dt_stride_d, group, min(group + GROUP, P.S), 0, P)
        zs = _load_rows(z, e, inside, z_stride_s, z_stride_d, group, min(group + GROUP, P.S), 0, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            column = _wrapped(e + P.SHIFT * l % P.D, P.D)
            r = _reciprocal_root(v[l], P)
            dz_here = dts[l - group].to(P.ACC) * r
            tl.store(dz + _offset(l, column, C * P.D, 1, P), dz_here.to(dz.dtype.element_ty), mask=inside)
            dmu += dz_here
            g = dz_here * ((zs[l - group].to(P.ACC) - mu) * r) * r
            gs += (_capsule_sum(g, lane, e, -1, P),)
    tl.store(dmu_parts + tl.program_id(0), -tl.sum(tl.where(inside, dmu, 0.0), axis=0))

    gathered = _window_sums(gs, 1 - P.FIRST_I - P.W, P.W, P.CIRCULAR)
    for l in tl.static_range(P.S):
        column = _wrapped(e + (P.SHIFT * l + P.FIRST_K) % P.D, P.D)
        du_here = -us[l].to(P.ACC) * gathered[l]  # 2 · u · (-½ · gathered): the -½ of g stands outside its sum
        tl.store(du + _offset(l, column, C * P.D, 1, P), du_here.to(du.dtype.element_ty), mask=inside)


# --- long sequences: a tile of frames and its surroundings ------------------------------------------------------------


@triton.jit
def tile_forward_kernel(
    z, u, mu, t, r, BC, C, S,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    SAVE_R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """As `whole_forward_kernel`: row r of a tile holds frame `l + FIRST_I + r` of `u` and frame `l + r` of `t`."""
    l = _first_frame(P.FRAMES - P.W + 1, P)
    row, lane, b, c, frame, inside = _tile(l + P.FIRST_I, S, BC, C, P)
    move: tl.constexpr = (P.SHIFT * P.FIRST_I + P.FIRST_K) % P.D
    at = _at(u, frame, lane, b, c, move, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
    x = tl.load(at, mask=inside, other=0.0).to(P.ACC)
    reciprocal = _reciprocal_root(_tile_window_sum(x * x, row, lane, P), P)

    frame, inside = _answered(l, row, lane, BC, C, S, P.FRAMES - P.W + 1, P)
    at = _at(z, frame, lane, b, c, 0, z_stride_b, z_stride_s, z_stride_c, z_stride_d, P)
    t_here = (tl.load(at, mask=inside, other=0.0).to(P.ACC) - tl.load(mu)) * reciprocal
    at = _at(t, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, t_here.to(t.dtype.element_ty), mask=inside)
    if SAVE_R:
        tl.store(_at(r, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P), reciprocal, mask=inside)


@triton.jit
def tile_backward_kernel(
    dt, z, u, mu, r, dz, du, dmu_parts, BC, C, S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """As `whole_backward_kernel`: row r of a tile holds frame `l - LAST_I + r` of `dz` and frame `l + r` of `du`."""
    LAST_I: tl.constexpr = P.FIRST_I + P.W - 1
    LAST_K: tl.constexpr = P.FIRST_K + P.K - 1
    ANSWERED: tl.constexpr = P.FRAMES - P.W + 1 if P.SAVE_R else P.FRAMES - 2 * (P.W - 1)
    l = _first_frame(ANSWERED, P)
    row, lane, b, c, frame, inside = _tile(l - P.W + 1, S, BC, C, P)
    if not P.SAVE_R:
        move: tl.constexpr = (P.SHIFT * P.FIRST_I + P.FIRST_K) % P.D
        at = _at(u, frame, lane, b, c, move, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
        x = tl.load(at, mask=inside, other=0.0).to(P.ACC)
        reciprocal = _reciprocal_root(_tile_window_sum(x * x, row, lane, P), P)

    _, _, _, _, frame, inside = _tile(l - LAST_I, S, BC, C, P)
    if P.SAVE_R:
        at = _at(r, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
        reciprocal = tl.load(at, mask=inside, other=0.0)
    at = _at(dt, frame, lane, b, c, 0, dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d, P)
    dz_here = tl.load(at, mask=inside, other=0.0).to(P.ACC) * reciprocal
    at = _at(z, frame, lane, b, c, 0, z_stride_b, z_stride_s, z_stride_c, z_stride_d, P)
    g = dz_here * ((tl.load(at, mask=inside, other=0.0).to(P.ACC) - tl.load(mu)) * reciprocal) * reciprocal
    own = inside
    if not P.RING:
        g = tl.where(inside, g, 0.0)
        own = inside & (row >= LAST_I) & (row < LAST_I + ANSWERED) & (l - LAST_I + row < S)
    at = _at(dz, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, dz_here.to(dz.dtype.element_ty), mask=own)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dmu_parts + part, -tl.sum(tl.where(own, dz_here, 0.0), axis=0))

    # The third program index is 0, which the compiler does not know: else it would keep what it found out about rows
    # and lanes for the first window sum in registers for this one, more than there are.
    row += tl.program_id(2)
    lane += tl.program_id(2)
    gathered = _tile_window_sum(g, row, lane, P)
    frame, inside = _answered(l, row, lane, BC, C, S, ANSWERED, P)
    move_du: tl.constexpr = (P.SHIFT * LAST_I + LAST_K) % P.D
    at = _at(u, frame, lane, b, c, move_du, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
    du_here = -tl.load(at, mask=inside, other=0.0).to(P.ACC) * gathered
    at = _at(du, frame, lane, b, c, move_du, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, du_here.to(du.dtype.element_ty), mask=inside)


# --- which of them, and with how much in a program --------------------------------------------------------------------


class Choice(NamedTuple):
    """The kernels that suit a problem."""

    kind: str  # "whole" or "tile"
    plan: Plan
    warps: int
    capsules: int  # in a program
    frames: tuple[int, int]  # that one program answers for, forward and backward; 0 means all
    reads_r: bool  # backward


def keeps_r(inputs: Inputs, neighborhood: Neighborhood) -> bool:
    """Say whether `forward` with `save_r` returns `r`: only where reading it costs less than computing it again."""
    z, _, mu, _ = inputs
    S, D = int(z.shape[1]), int(z.shape[3])
    chosen = None if mu.numel() != 1 else choice(neighborhood, S, D, compute_dtype(z.dtype), 0.0, False)
    return chosen is None or chosen.reads_r


def choose(inputs: Inputs, window: Window, dt: Tensor) -> Choice | None:
    """Return the kernels that suit a problem, or None if it is for those of `taps`."""
    z, u, mu, _ = inputs
    if mu.numel() != 1:
        return None
    _, S, C, D = z.shape
    extent = S * C * D
    for x in (z, u, dt):
        stride = x.stride()
        extent = max(extent, (S - 1) * stride[1] + (D - 1) * stride[3])
    return choice(window.neighborhood, S, D, compute_dtype(z.dtype), window.eps, extent >= 2**31)


@lru_cache(maxsize=1024)
def choice(
    neighborhood: Neighborhood, S: int, D: int, accumulator: torch.dtype, eps: float, wide: bool
) -> Choice | None:
    """Return the kernels for a sequence of `S` frames of `D` positions; `wide` if offsets take more than 31 bits."""
    if neighborhood.capsule_boundary != "circular" or not 0 < D <= MOST_POSITIONS or S == 0:
        return None
    circular = neighborhood.time_boundary == "circular"
    shift, frames = neighborhood.shift % D, neighborhood.time_taps
    if not circular:  # taps that are outside for every frame
        frames = range(max(frames.start, 1 - S), min(frames.stop, S))
    fields = {
        "D": D,
        "SHIFT": shift,
        "FIRST_I": frames.start,
        "W": len(frames),
        "FIRST_K": neighborhood.capsule_taps.start,
        "K": neighborhood.capsule_window,
        "CIRCULAR": circular,
        "EPS": eps,
        "ACC": ACCUMULATOR[accumulator],
        "INDEX": tl.int64 if wide else tl.int32,
        "S": S,
        "FRAMES": 0,
        "RING": False,
        "SAVE_R": False,
    }
    width = triton.next_power_of_2(D)
    most = _MOST_FRAMES[accumulator]
    if most >= S and (not circular or shift * S % D == 0):
        lanes = max(width, 64)
        return _choice("whole", fields, lanes, lanes // WARP, (0, 0))
    for lanes in (max(width, 64), width):  # first full rows of lanes, then as few as can be, for more frames
        fits = _frames_of_a_tile(S, len(frames), circular, _MOST_ELEMENTS[accumulator] // lanes)
        if fits is not None:
            held, ring, save_r = fits
            fields |= {"S": S if ring else 0, "FRAMES": held, "RING": ring, "SAVE_R": save_r}
            halo = len(frames) - 1
            answered = (0, 0) if ring else (held - halo, held - (1 if save_r else 2) * halo)
            return _choice("tile", fields, lanes, max(1, min(16, held * lanes // 512)), answered)
    return None


def _frames_of_a_tile(steps: int, window: int, circular: bool, most: int) -> tuple[int, bool, bool] | None:
    """How many frames a tile holds, whether they are a whole circle, and whether `r` is saved; None if none will do.

    Frames that a window reaches into are held beside those that the tile answers for, by two windows if the backward
    pass computes `r` again and by one if it is saved. At least half of the tile, or else a quarter, must be answers.
    """
    if circular and steps <= most:
        return triton.next_power_of_2(steps), True, False
    for share in (0.75, 0.5):
        frames = min(64, most)
        while frames <= most:
            if frames - 2 * (window - 1) >= share * frames:
                return frames, False, False
            frames *= 2
    if most - (window - 1) >= most / 4:
        return most, False, True
    return None


def _choice(kind: str, fields: dict, lanes: int, warps: int, frames: tuple[int, int]) -> Choice:
    capsules = lanes // fields["D"]
    plan = constants(Plan, fields | {"LANES": lanes, "CAPSULES": capsules})
    return Choice(kind, plan, warps, capsules, frames, fields["SAVE_R"])


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and `r = (v + eps)^(-1/2)` if it is asked for and the backward pass will read it, else None."""
    chosen = choose(inputs, window, inputs.z)
    if chosen is None:
        return taps.forward(inputs, window, save_r)
    z, u, mu, _ = inputs
    B, S, C, _ = z.shape
    t = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    save_r = save_r and chosen.reads_r
    r = torch.empty(z.shape, dtype=compute_dtype(z.dtype), device=z.device) if save_r else None
    grid = _grid(chosen, chosen.frames[0], B * C, S)
    strides = (B * C, C, S, *z.stride(), *u.stride())
    if chosen.kind == "whole":
        launch(z, whole_forward_kernel, grid, z, u, mu, t, *strides, P=chosen.plan, num_warps=chosen.warps)
    else:
        options = {"SAVE_R": save_r, "P": chosen.plan, "num_warps": chosen.warps}
        launch(z, tile_forward_kernel, grid, z, u, mu, t, r, *strides, **options)
    return t, r


def backward(
    inputs: Inputs, window: Window, r: Tensor | None, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `dz`, `du` and `dmu` of the shape of `mu`, from what `forward` returned."""
    chosen = choose(inputs, window, dt)
    if chosen is None:
        return taps.backward(inputs, window, r, dt)
    z, u, mu, _ = inputs
    B, S, C, _ = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    grid = _grid(chosen, chosen.frames[1], B * C, S)
    dmu_parts = torch.empty(grid, dtype=compute_dtype(z.dtype), device=z.device)
    strides = (B * C, C, S, *dt.stride(), *z.stride(), *u.stride())
    options = {"P": chosen.plan, "num_warps": chosen.warps}
    if chosen.kind == "whole":
        launch(z, whole_backward_kernel, grid, dt, z, u, mu, dz, du, dmu_parts, *strides, **options)
    else:
        launch(z, tile_backward_kernel, grid, dt, z, u, mu, r, dz, du, dmu_parts, *strides, **options)
    dmu = dmu_parts.sum()
    return dz, du, dmu if mu.ndim == 0 else dmu.reshape(mu.shape), None


def _grid(chosen: Choice, frames: int, capsules: int, steps: int) -> tuple[int, int]:
    return ceiling(capsules, chosen.capsules), ceiling(steps, frames) if frames else 1
