"""The `triton` backend: one kernel launch forward and one backward, for NVIDIA and AMD GPUs.

Importing this module needs Triton. With `TRITON_INTERPRET=1` set before the first import the same kernels run through
Triton's interpreter on tensors of any device, slowly, for tests.

Here the kernels are chosen and launched; `kernels_plain`, `kernels_latents`, `kernels_taps` and `kernels_fourier` hold
them. All only gather (an output element is written by one program, once), so there are no atomics and two runs give the
same bits. What a kernel is compiled for depends on the neighbourhood, the type, D, and for short sequences S, never on
the batch: nothing is tuned at run time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .kernels_fourier import Phases, fourier_backward_kernel, fourier_forward_kernel
from .kernels_latents import latents_backward_kernel, latents_forward_kernel
from .kernels_plain import (
    Plan,
    tile_backward_kernel,
    tile_forward_kernel,
    whole_backward_kernel,
    whole_forward_kernel,
)
from .kernels_taps import Taps, taps_backward_kernel, taps_forward_kernel
from .latents import MOST_POSITIONS
from .neighborhood import Neighborhood
from .reference import compute_dtype
from .taps import phases, shape_of_r, table, weight_sums

_ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}
_MOST_FRAMES = {torch.float32: 32, torch.float64: 18}  # that a lane can hold in registers
_MOST_ELEMENTS = {torch.float32: 8192, torch.float64: 4096}  # that a tile can hold in registers
_WARP = 64 if torch.version.hip else 32


class Choice(NamedTuple):
    """The kernels for plain windows that suit a problem."""

    kind: str  # "whole" or "tile"
    plan: Plan
    warps: int

    @property
    def frames(self) -> tuple[int, int]:
        """Frames that one program answers for, forward and backward; 0 means all."""
        frames, window, save_r, ring = (getattr(self.plan, name).value for name in ("FRAMES", "W", "SAVE_R", "RING"))
        if self.kind == "whole" or ring:
            return 0, 0
        return frames - window + 1, frames - (1 if save_r else 2) * (window - 1)


def interpreted() -> bool:
    """Whether the kernels run through Triton's interpreter, which takes tensors of any device."""
    return isinstance(whole_forward_kernel, InterpretedFunction)


def keeps_r(z: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float) -> bool:
    """Whether `forward` with `save_r` returns `r`: only where reading it costs less than computing it again."""
    plain = weights is None and mu.numel() == 1 and neighborhood.is_plain
    S, D = int(z.shape[1]), int(z.shape[3])
    return not plain or _reads_r(_choice(neighborhood, S, D, compute_dtype(z.dtype), eps, False))


def _reads_r(choice: Choice | None) -> bool:
    return choice is None or choice.plan.SAVE_R.value


def forward(
    z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float, save_r: bool
) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and `r = (v + eps)^(-1/2)` if it is asked for and the backward pass will read it, else None."""
    B, S, C, _ = z.shape
    t = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    choice = _choose(z, u, z, mu, weights, neighborhood, eps)
    save_r = save_r and _reads_r(choice)
    r = torch.empty(shape_of_r(z, neighborhood), dtype=compute_dtype(z.dtype), device=z.device) if save_r else None
    if choice is None:
        problem = _problem(z, u, weights, neighborhood, eps)
        grid = (B * C * problem.tiles,)
        arguments = (z, u, mu, weights, t, r, *problem.arguments, *z.stride(), *u.stride())
        arguments += (*_mu_strides(z, mu), _weight_stride(weights, neighborhood))
        _launch(z, problem.kernels[0], grid, *arguments, SAVE_R=save_r, **problem.options)
    else:
        grid = _grid(choice, choice.frames[0], B * C, S)
        strides = (B * C, C, S, *z.stride(), *u.stride())
        if choice.kind == "whole":
            _launch(z, whole_forward_kernel, grid, z, u, mu, t, *strides, P=choice.plan, num_warps=choice.warps)
        else:
            options = {"SAVE_R": save_r, "P": choice.plan, "num_warps": choice.warps}
            _launch(z, tile_forward_kernel, grid, z, u, mu, t, r, *strides, **options)
    return t, r


def backward(
    dt: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    r: Tensor | None,
    neighborhood: Neighborhood,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `dz`, `du`, `dmu` of the shape of `mu` and `dw` (None without weights), from what `forward` returned."""
    B, S, C, D = z.shape
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    accumulator = compute_dtype(z.dtype)
    choice = _choose(z, u, dt, mu, weights, neighborhood, eps)
    if choice is None:
        problem = _problem(z, u, weights, neighborhood, eps)
        dmu_parts = torch.empty((B, problem.tiles_s, C, D), dtype=accumulator, device=z.device)
        dw_parts = None if weights is None else weights.new_empty((B, C, problem.tiles, problem.parts))
        weight_stride = _weight_stride(weights, neighborhood)
        arguments = (dt, z, u, mu, weights, r, dz, du, dmu_parts, dw_parts, *problem.arguments)
        arguments += (*dt.stride(), *z.stride(), *u.stride(), *_mu_strides(z, mu), weight_stride)
        _launch(z, problem.kernels[1], (B * C * problem.tiles,), *arguments, **problem.options)
        dw = None
        if weights is not None:
            parts = dw_parts.sum((0, 2) if weight_stride else (0, 1, 2))
            dw = weight_sums(parts, problem.of_weights, weights.shape)
        return dz, du, dmu_parts.sum_to_size(mu.shape), dw

    grid = _grid(choice, choice.frames[1], B * C, S)
    dmu_parts = torch.empty(grid, dtype=accumulator, device=z.device)
    strides = (B * C, C, S, *dt.stride(), *z.stride(), *u.stride())
    options = {"P": choice.plan, "num_warps": choice.warps}
    if choice.kind == "whole":
        _launch(z, whole_backward_kernel, grid, dt, z, u, mu, dz, du, dmu_parts, *strides, **options)
    else:
        _launch(z, tile_backward_kernel, grid, dt, z, u, mu, r, dz, du, dmu_parts, *strides, **options)
    dmu = dmu_parts.sum()
    return dz, du, dmu if mu.ndim == 0 else dmu.reshape(mu.shape), None


def _launch(x: Tensor, kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch on the device of `x`, which need not be the current one; an empty grid has nothing to launch."""
    if 0 in grid:
        return
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def _grid(choice: Choice, frames: int, capsules: int, steps: int) -> tuple[int, int]:
    return _ceiling(capsules, choice.plan.CAPSULES.value), _ceiling(steps, frames) if frames else 1


def _ceiling(n: int, divisor: int) -> int:
    """`n / divisor` rounded up, in a tenth of the time of `triton.cdiv`."""
    return -(-n // divisor)


# --- plain windows ----------------------------------------------------------------------------------------------------


def _choose(
    z: Tensor, u: Tensor, dt: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float
) -> Choice | None:
    """The kernels for plain windows that suit the problem, or None if it is for `kernels_taps`."""
    _, S, C, D = z.shape
    if weights is not None or mu.numel() != 1 or not neighborhood.is_plain:
        return None
    extents = [(S - 1) * x.stride(1) + (D - 1) * x.stride(3) for x in (z, u, dt)]
    wide = max(*extents, S * C * D) >= 2**31
    return _choice(neighborhood, S, D, compute_dtype(z.dtype), eps, wide)


@lru_cache(maxsize=1024)
def _choice(
    neighborhood: Neighborhood, S: int, D: int, accumulator: torch.dtype, eps: float, wide: bool
) -> Choice | None:
    if neighborhood.capsule_boundary != "circular" or not 0 < D <= MOST_POSITIONS or S == 0:
        return None
    circular = neighborhood.time_boundary == "circular"
    shift, taps = neighborhood.shift % D, neighborhood.time_taps
    if not circular:  # taps that are outside for every frame
        taps = range(max(taps.start, 1 - S), min(taps.stop, S))
    fields = {
        "D": D,
        "SHIFT": shift,
        "FIRST_I": taps.start,
        "W": len(taps),
        "FIRST_K": neighborhood.capsule_taps.start,
        "K": neighborhood.capsule_window,
        "CIRCULAR": circular,
        "EPS": eps,
        "ACC": _ACCUMULATOR[accumulator],
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
        return Choice("whole", _plan(fields, lanes), lanes // _WARP)
    for lanes in (max(width, 64), width):  # first full rows of lanes, then as few as can be, for more frames
        fits = _frames_of_a_tile(S, len(taps), circular, _MOST_ELEMENTS[accumulator] // lanes)
        if fits is not None:
            frames, ring, save_r = fits
            fields |= {"S": S if ring else 0, "FRAMES": frames, "RING": ring, "SAVE_R": save_r}
            return Choice("tile", _plan(fields, lanes), max(1, min(16, frames * lanes // 512)))
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


def _plan(fields: dict, lanes: int) -> Plan:
    fields = fields | {"LANES": lanes, "CAPSULES": lanes // fields["D"]}
    return _constants(Plan, fields)


def _constants(kind: type, fields: dict):
    return kind(**{name: tl.constexpr(value) for name, value in fields.items()})


# --- from the encoders ------------------------------------------------------------------------------------------------


def latents_forward(
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    noise_z: Tensor | None,
    noise_u: Tensor | None,
    seed: Tensor | None,
    first: int,
    neighborhood: Neighborhood,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `t` and the KL terms of every frame, `(B, S)`, of what `latents.held_by_a_lane` accepts.

    Either the noise is given, contiguous, or a seed, on the device, to draw it with.
    """
    B, S, _, C, D = z.shape
    t = torch.empty((B, S, C, D), dtype=z.dtype, device=z.device)
    choice, blocks = _choice_of_latents(z, u, z, neighborhood, eps)
    kl = torch.empty((2, B, blocks, S), dtype=compute_dtype(z.dtype), device=z.device)
    arguments = (z, u, noise_z, noise_u, seed, first, mu, t, kl[0], kl[1], C, S, *z.stride(), *u.stride())
    options = {"GIVEN": seed is None, "P": choice.plan, "num_warps": choice.warps}
    _launch(z, latents_forward_kernel, (B * blocks,), *arguments, **options)
    return t, *kl.sum(2)


def latents_backward(
    dt: Tensor,
    dkl_z: Tensor,
    dkl_u: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    noise_z: Tensor | None,
    noise_u: Tensor | None,
    seed: Tensor | None,
    first: int,
    neighborhood: Neighborhood,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `z`, of `u` and of `mu`, from the arguments of `latents_forward`."""
    B, S, _, C, _ = z.shape
    dz, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, u))
    choice, blocks = _choice_of_latents(z, u, dt, neighborhood, eps)
    dmu_parts = torch.empty(B * blocks, dtype=compute_dtype(z.dtype), device=z.device)
    arguments = (dt, dkl_z.contiguous(), dkl_u.contiguous(), z, u, noise_z, noise_u, seed, first, mu)
    arguments += (dz, du, dmu_parts, C, S, *dt.stride(), *z.stride(), *u.stride())
    options = {"GIVEN": seed is None, "P": choice.plan, "num_warps": choice.warps}
    _launch(z, latents_backward_kernel, (B * blocks,), *arguments, **options)
    return dz, du, dmu_parts.sum().reshape(mu.shape)


def _choice_of_latents(z: Tensor, u: Tensor, dt: Tensor, neighborhood: Neighborhood, eps: float) -> tuple[Choice, int]:
    """The plan of the `whole` kernels, and how many programs a sequence takes."""
    _, S, _, C, D = z.shape
    extents = [(S - 1) * x.stride(1) + (D - 1) * x.stride(-1) for x in (z, u, dt)]
    wide = max(*extents, 2 * S * C * D) >= 2**31
    choice = _choice(neighborhood, S, D, compute_dtype(z.dtype), eps, wide)
    return choice, _ceiling(C, choice.plan.CAPSULES.value)


# --- all other windows ------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """What the kernels for all other windows are given beside tensors."""

    kernels: tuple  # forward and backward
    options: dict  # what they are compiled for
    arguments: tuple  # tables and sizes
    tiles_s: int
    tiles: int  # of a capsule, one program each
    of_weights: Tensor  # which of the gradients that the backward pass leaves add up to that of each weight
    parts: int  # number of these gradients


def _problem(z: Tensor, u: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float) -> _Problem:
    _, S, C, D = z.shape
    by_phase = neighborhood.roll == "fourier" and not neighborhood.is_plain
    function = _phases_problem if by_phase else _taps_problem
    return function(neighborhood, S, u.shape[1], C, D, u.shape[3], weights is not None, eps, z.dtype, z.device)


@lru_cache(maxsize=256)
def _taps_problem(
    n: Neighborhood, S: int, S_U: int, C: int, D: int, D_U: int, weighted: bool, eps: float, dtype, device
) -> _Problem:
    entries = table(n, C, D, compute_dtype(dtype), device)
    block_d = min(triton.next_power_of_2(max(D, D_U, 1)), 64)
    block_s = min(triton.next_power_of_2(max(S, S_U, 1)), 1024 // block_d)
    tiles_s, tiles_d = _ceiling(max(S, S_U), block_s), _ceiling(max(D, D_U), block_d)
    fields = {
        "ENTRIES": entries.roots[-1],
        "ROOTS": n.root_count,
        "END_0": entries.roots[1],
        "END_1": entries.roots[min(2, n.root_count)],
        "AXES": len(n.lengths(D)),
        "CAPSULE_CIRCULAR": n.capsule_boundary == "circular",
        **{f"Z{axis}": length for axis, length in enumerate(entries.lengths)},
        **{f"U{axis}": length for axis, length in enumerate(entries.padded)},
        **_common_fields(n, weighted, eps, dtype, block_s, block_d),
    }
    tables = (entries.times, entries.weights, entries.offsets, entries.coefficients, entries.groups)
    return _Problem(
        (taps_forward_kernel, taps_backward_kernel),
        {"P": _constants(Taps, fields), "num_warps": 4},
        (*tables, S, S_U, C, tiles_s, tiles_d),
        tiles_s,
        tiles_s * tiles_d,
        entries.of_weights,
        len(entries.times),
    )


@lru_cache(maxsize=256)
def _phases_problem(
    n: Neighborhood, S: int, S_U: int, C: int, D: int, D_U: int, weighted: bool, eps: float, dtype, device
) -> _Problem:
    block_d = triton.next_power_of_2(max(D, 1))
    block_s = min(triton.next_power_of_2(max(S, S_U, 1)), max(1, 512 // block_d))
    tiles_s = _ceiling(max(S, S_U), block_s)
    fields = {
        "D": D,
        "FIRST_I": 0 if n.time_boundary == "padded" else n.time_taps.start,
        "W": n.time_window,
        "FIRST_K": n.capsule_taps.start,
        "K": n.capsule_window,
        **_common_fields(n, weighted, eps, dtype, block_s, block_d),
    }
    h, groups = phases(n, D, compute_dtype(dtype), device), table(n, C, D, compute_dtype(dtype), device).groups
    weights = n.time_window * n.capsule_window
    with torch.inference_mode(False):  # it is kept for calls that train
        of_weights = torch.arange(weights, device=device)[:, None]
    return _Problem(
        (fourier_forward_kernel, fourier_backward_kernel),
        {"P": _constants(Phases, fields), "num_warps": 2},
        (h, groups, S, S_U, C, tiles_s),
        tiles_s,
        tiles_s,
        of_weights,
        weights,
    )


def _common_fields(n: Neighborhood, weighted: bool, eps: float, dtype, block_s: int, block_d: int) -> dict:
    return {
        "TIME_CIRCULAR": n.time_boundary == "circular",
        "WEIGHTED": weighted,
        "EPS": eps,
        "ACC": _ACCUMULATOR[compute_dtype(dtype)],
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
    }


def _weight_stride(weights: Tensor | None, neighborhood: Neighborhood) -> int:
    """Between the weights of one capsule and the next; 0 where all capsules share them."""
    own = weights is not None and weights.ndim > len(neighborhood.weights_shape)
    return weights.stride(0) if own else 0


def _mu_strides(z: Tensor, mu: Tensor) -> tuple[int, int]:
    """Of `mu` along the capsules and their positions."""
    return mu.expand(z.shape[2:]).stride()
