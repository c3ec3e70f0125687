"""The operation and its gradient as the mathematics writes them: the oracle that every other backend is tested against.

    v[b,l,c,d] = Σ_{i,k} w[i,k] · u[b, l+i, c, d + shift·i + k]²
    t[b,l,c,d] = (z[b,l,c,d] - mu) / sqrt(v[b,l,c,d] + eps)

Short and obvious before fast; every step is a differentiable PyTorch operation, so it can be differentiated twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .neighborhood import Neighborhood


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are accumulated in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shifted(x: Tensor, time: int, capsule: int, neighborhood: Neighborhood) -> Tensor:
    """`x[b, l + time, c, d + capsule]` for every `(b, l, c, d)`, under the neighbourhood's boundaries.

    Equivalent to `torch.roll(x, (-time, -capsule), dims=(1, 3))` where both axes are circular.
    """
    _, steps, _, dim = x.shape
    rolls = {}
    crop_and_pad = [0] * 6  # of the last three axes, last first: (capsule start, end, -, -, time start, end)
    if neighborhood.time_boundary == "circular":
        rolls[1] = -time % steps
    else:
        crop_and_pad[4:6] = _crop_start_pad_end(time, steps)
    if neighborhood.capsule_boundary == "circular":
        rolls[3] = -capsule % dim
    else:
        crop_and_pad[0:2] = _crop_start_pad_end(capsule, dim)
    if any(rolls.values()):
        x = torch.roll(x, tuple(rolls.values()), tuple(rolls.keys()))
    return F.pad(x, crop_and_pad) if any(crop_and_pad) else x


def _crop_start_pad_end(offset: int, size: int) -> tuple[int, int]:
    offset = max(-size, min(size, offset))
    return -offset, offset


def window_sum(x: Tensor, neighborhood: Neighborhood, weights: Tensor | None = None, adjoint: bool = False) -> Tensor:
    """Sum `x` over the taps of the neighbourhood, one tap at a time.

    Args:
        x: `(B, S, C, D)`, the squared activations.
        neighborhood: the taps.
        weights: `(W, K)` or None for ones.
        adjoint: gather from the reversed offsets instead, which is the transposed sum that the gradient needs.

    Returns:
        `(B, S, C, D)`.

    """
    sign = -1 if adjoint else 1
    total = torch.zeros_like(x)
    for row, i in enumerate(neighborhood.time_taps):
        for column, k in enumerate(neighborhood.capsule_taps):
            tap = shifted(x, sign * i, sign * (neighborhood.shift * i + k), neighborhood)
            total = total + (tap if weights is None else weights[row, column] * tap)
    return total


def topographic(
    z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float
) -> Tensor:
    """`(z - mu) / sqrt(window_sum(u²) + eps)`, computed in the compute type and returned in the type of `z`.

    Args:
        z: `(B, S, C, D)`.
        u: `(B, S, C, D)`, of the type of `z`.
        mu: of a shape that broadcasts to `(C, D)`, in the compute type.
        weights: `(W, K)` in the compute type, or None for ones.
        neighborhood: the taps.
        eps: added to the window sum inside the root.

    Returns:
        `t`, `(B, S, C, D)`.

    """
    dtype = compute_dtype(z.dtype)
    v = window_sum(u.to(dtype).square(), neighborhood, weights)
    return ((z.to(dtype) - mu) / torch.sqrt(v + eps)).to(z.dtype)


def topographic_backward(
    dt: Tensor, z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient as a formula, itself differentiable. With `r = (v + eps)^(-1/2)` and `g = -½ · dt · t · r²`:

        dz = dt · r      dmu = -Σ dt · r      dw[i,k] = Σ g · u[tap]²      du[n] = 2 · u[n] · Σ_taps w · g[n - tap]

    Args:
        dt: `(B, S, C, D)`, the gradient that arrives at `t`.
        z: as in `topographic`, and so are `u`, `mu`, `weights`, `neighborhood` and `eps`.

    Returns:
        `dz` and `du` of shape `(B, S, C, D)` in the type of `z`; `dmu` of the shape of `mu` and `dw` of shape `(W, K)`
        (None without weights) in the compute type.

    """
    out, dtype = z.dtype, compute_dtype(z.dtype)
    dt, z, u = dt.to(dtype), z.to(dtype), u.to(dtype)
    squares = u.square()
    r = (window_sum(squares, neighborhood, weights) + eps).rsqrt()
    dz = dt * r
    g = -0.5 * dz * (z - mu) * r * r
    du = 2 * u * window_sum(g, neighborhood, weights, adjoint=True)
    dw = None if weights is None else weight_gradient(g, squares, neighborhood)
    return dz.to(out), du.to(out), -dz.sum_to_size(mu.shape), dw


def weight_gradient(g: Tensor, squares: Tensor, neighborhood: Neighborhood) -> Tensor:
    """`dw[i, k] = Σ_{b,l,c,d} g · u[tap]²`, of shape `(W, K)`."""
    rows = [
        torch.stack([(g * shifted(squares, i, neighborhood.shift * i + k, neighborhood)).sum() for k in taps])
        for i, taps in ((i, neighborhood.capsule_taps) for i in neighborhood.time_taps)
    ]
    return torch.stack(rows)
