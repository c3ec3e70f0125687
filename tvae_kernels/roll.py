"""Moving activations along time and along capsules, by whole positions or by fractions, under any boundary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_neighborhood, check_tensor
from .neighborhood import Neighborhood, checked_number, corners


def moved(x: Tensor, axis: int, offset: int, boundary: str, before: int = 0, length: int | None = None) -> Tensor:
    """Return `x` of the element `offset` further on along one axis: around the circle, 0 outside, or from the padding.

    Args:
        x: any tensor.
        axis: of it.
        offset: in elements, either way.
        boundary: "circular", "zero", or "padded" if the axis has `before` elements before the first of `length`.
        before: elements of padding before the axis proper.
        length: of the axis without its padding.

    """
    if boundary == "padded":
        return x.narrow(axis, before + offset, length)
    if boundary == "circular":
        return torch.roll(x, -offset % x.shape[axis], axis) if offset % x.shape[axis] else x
    size = x.shape[axis]
    offset = max(-size, min(size, offset))
    after_it = x.ndim - 1 - axis % x.ndim  # axes, which F.pad counts from the last
    return F.pad(x, (0, 0) * after_it + (-offset, offset))


def interpolated(
    x: Tensor, parts: list[tuple[float, tuple[int, ...]]], boundary: str, padding=None, lengths=None
) -> Tensor:
    """Return the sum of `x` at some whole offsets along its last axes, each with a coefficient: see `corners`.

    Args:
        x: `(..., D1, D2, ...)`.
        parts: coefficients and offsets, one for each of the last axes.
        boundary: of these axes, as in `moved`.
        padding: of each axis, before and after it.
        lengths: of each axis without its padding.

    """
    count = len(parts[0][1])
    first = x.ndim - count
    padding = padding or ((0, 0),) * count
    lengths = lengths or x.shape[first:]
    total = None
    for coefficient, whole in parts:
        part = x
        for axis, offset in enumerate(whole):
            part = moved(part, first + axis, offset, boundary, padding[axis][0], lengths[axis])
        if coefficient != 1:
            part = coefficient * part
        total = part if total is None else total + part
    return total


def phase_shifted(x: Tensor, offset: float) -> Tensor:
    """Return the periodic, band-limited signal through the values along the last axis, at `d + offset` for every `d`.

    For an odd number of values the map is orthogonal. For an even number the highest frequency has no phase to shift,
    and shrinks by `cos(π·offset)`; whole offsets are exact rolls either way.
    """
    dim = x.shape[-1]
    if x.numel() == 0:  # which transforms refuse
        return x.clone()
    offset = math.remainder(offset, dim)  # around the circle, exactly
    if offset == int(offset):
        return torch.roll(x, -int(offset) % dim, -1)
    wide = x if x.dtype == torch.float64 else x.float()  # transforms know no narrower types
    # irfft drops the imaginary part of the highest frequency, which leaves its cosine
    phases = torch.complex(*phase_of_each_frequency(offset, dim, wide))
    return torch.fft.irfft(torch.fft.rfft(wide) * phases, n=dim).to(x.dtype)


def phase_of_each_frequency(offset: float | Tensor, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `2π · f · offset / dim` for `f = 0 … dim // 2`, in the type of a tensor.

    Computed in the widest type, since the rounding error of an angle grows with its turns. Offsets may be a column.
    """
    frequencies = torch.arange(dim // 2 + 1, device=like.device, dtype=widest_type(like))
    angle = frequencies * offset % dim * (2 * math.pi / dim)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def widest_type(x: Tensor) -> torch.dtype:
    """Return float64, but where a device does not know it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def roll_capsules(t: Tensor, steps: float, neighborhood: Neighborhood, axis: int | None = None) -> Tensor:
    """Capsules as their topography moves them in `steps` time steps: `Roll_steps(t)` of a capsule traversal (6.1).

    Position `d` receives what was at `d - shift · steps`, with the shift, the speeds and the boundary of the
    neighbourhood; what comes from outside a capsule that is not circular is 0. Equivalent to
    `t.roll(steps * shift, -1)` for plain neighbourhoods.

    Args:
        t: `(..., capsule C, dim D)`.
        steps: time steps, either way; fractions of a step are interpolated as fractions of a shift are.
        neighborhood: the topography.
        axis: the axis of the capsules to roll along, where each has a root of its own; None for all.

    Returns:
        Of the shape of `t`.

    Raises:
        TypeError: `t` is no floating-point tensor, `steps` no number, or `neighborhood` none.
        ValueError: the capsules do not fit the neighbourhood, or there is no such axis.

    """
    check_tensor("t", t)
    check_neighborhood(neighborhood)
    if t.ndim < 2:
        raise ValueError(f"t must be (..., capsule, dim), got {tuple(t.shape)}")
    steps = checked_number("steps", steps)
    neighborhood.check_fits(time=neighborhood.time_window, dim=t.shape[-1], capsules=t.shape[-2])
    if axis is not None:
        neighborhood = neighborhood.along(axis)
    if neighborhood.speeds is not None:
        parts = [roll_capsules(t[..., c : c + 1, :], steps, neighborhood.of_capsule(c)) for c in range(t.shape[-2])]
        return torch.cat(parts, -2)
    shift = neighborhood.shift if neighborhood.is_multidimensional else (neighborhood.shift,)
    offsets = tuple(round(-s * steps, 12) for s in shift)
    if neighborhood.roll == "fourier":
        return phase_shifted(t, offsets[0])
    boundary = "circular" if neighborhood.capsule_boundary == "circular" else "zero"
    t = t.reshape((*t.shape[:-1], *neighborhood.lengths(t.shape[-1])))
    return interpolated(t, corners(offsets), boundary).flatten(-len(offsets))
