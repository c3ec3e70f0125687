"""The `torch` backend: the reference's numbers in few PyTorch operations, on any device.

The window sum is separable and built by doubling: with `p₁ = x` and `p₂ₙ[l] = pₙ[l] + pₙ[l + n]`, a window of W frames
takes at most `2·log2(W)` shifted additions instead of W. Only additions of non-negative terms occur, so the relative
error stays below that of the plain sum; a running sum that subtracts what leaves the window would not have that.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .neighborhood import Neighborhood
from .reference import compute_dtype, shifted


def window_sum(x: Tensor, neighborhood: Neighborhood, weights: Tensor | None = None, adjoint: bool = False) -> Tensor:
    """`reference.window_sum`, faster: `(B, S, C, D)` to `(B, S, C, D)`."""
    if weights is not None:  # a weighted window is neither separable nor a doubling: one tap at a time
        return reference.window_sum(x, neighborhood, weights, adjoint)
    sign = -1 if adjoint else 1
    dim = x.shape[-1]
    # The sum along the capsule reaches past a cut edge, from where the sum along time may come back inside.
    reach = neighborhood.capsule_window // 2 if neighborhood.capsule_boundary == "zero" else 0
    x = F.pad(x, (reach, reach)) if reach else x
    x = _line_sum(x, neighborhood.capsule_taps, (0, sign), neighborhood)
    x = _line_sum(x, neighborhood.time_taps, (sign, sign * neighborhood.shift), neighborhood)
    return x.narrow(-1, reach, dim)


def _line_sum(x: Tensor, taps: range, step: tuple[int, int], neighborhood: Neighborhood) -> Tensor:
    """`Σ_m x[l + m·step₀, d + m·step₁]` over the offsets m in `taps`, which contain 0."""
    if "zero" not in (neighborhood.time_boundary, neighborhood.capsule_boundary):
        return _doubling_sum(x, taps.start, len(taps), step, neighborhood)
    # With a cut edge, walk outwards from the centre on both sides: what has left the array never comes back into it.
    total = _doubling_sum(x, 0, taps.stop, step, neighborhood)
    if taps.start < 0:
        total = total + _doubling_sum(x, 1, -taps.start, (-step[0], -step[1]), neighborhood)
    return total


def _doubling_sum(x: Tensor, first: int, count: int, step: tuple[int, int], neighborhood: Neighborhood) -> Tensor:
    """`Σ_{m = first}^{first + count - 1} x[l + m·step₀, d + m·step₁]` from partial sums of 1, 2, 4, … terms."""

    def at(p: Tensor, m: int) -> Tensor:
        return shifted(p, m * step[0], m * step[1], neighborhood)

    total, partial, terms = None, x, 1
    while True:
        if count & terms:
            part = at(partial, first)
            total = part if total is None else total + part
            first += terms
        if 2 * terms > count:
            return total
        partial = partial + at(partial, terms)
        terms *= 2


def forward(
    z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `t` in the type of `z`, and `r = (v + eps)^(-1/2)` in the compute type, kept for the backward pass."""
    dtype = compute_dtype(z.dtype)
    r = (window_sum(u.to(dtype).square(), neighborhood, weights) + eps).rsqrt_()
    t = (z.to(dtype) - mu) * r
    # A conversion that converts nothing must not stand here: traced by torch.compile (2.11) as the output of an
    # autograd.Function beside an output without a gradient, it silently makes the gradients zero.
    return (t if t.dtype == z.dtype else t.to(z.dtype)), r


def backward(
    dt: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    r: Tensor,
    neighborhood: Neighborhood,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The formulas of `reference.topographic_backward`, from the saved `r`."""
    dtype = compute_dtype(z.dtype)
    u = u.to(dtype)
    dz = dt.to(dtype) * r
    dmu = -dz.sum((0, 1))
    g = (z.to(dtype) - mu).mul_(dz).mul_(r).mul_(r).mul_(-0.5)
    du = window_sum(g, neighborhood, weights, adjoint=True).mul_(u).mul_(2)
    dw = None if weights is None else reference.weight_gradient(g, u.square(), neighborhood)
    return dz.to(z.dtype), du.to(z.dtype), dmu, dw
