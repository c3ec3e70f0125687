"""The implementations that are timed against each other, of one form: `(z, u, mu, neighborhood, weights, axis)` to `t`.

A peer's name is its function, alone for eager mode or with the way it is compiled: "reference", "reference compiled".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tvae_kernels import Neighborhood, topographic

EPS = 1e-6
MODES = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}
OURS = {"cpu": "torch", "cuda": "triton"}
NAMES = {
    "cpu": ("torch", "torch compiled", "reference", "reference compiled", "convolution"),
    "cuda": (
        "triton",
        "torch compiled",
        "reference",
        "reference compiled",
        "reference max-autotune",
        "convolution",
    ),
}


def build(name: str, neighborhood: Neighborhood, axis: Tensor | None = None) -> Callable[..., Tensor]:
    """Build the peer as a function of `z`, `u`, `mu` and perhaps weights; compiled ones compile at their first call.

    With an `axis` it is the peer that knows along which one each sequence rolls.

    Raises:
        ValueError: no peer has this name.

    """
    function_name, _, mode = name.partition(" ")
    if function_name not in FUNCTIONS or (mode and mode not in MODES):
        raise ValueError(f"a peer is one of {', '.join(FUNCTIONS)}, alone or with {', '.join(MODES)}; got {name!r}")
    function = FUNCTIONS[function_name]
    known = {} if axis is None else {"axis": axis}

    def call(z: Tensor, u: Tensor, mu: Tensor, *weights: Tensor) -> Tensor:
        return function(z, u, mu, neighborhood, *weights, **known)

    return torch.compile(call, dynamic=False, mode=MODES[mode]) if mode else call


def reference(
    z: Tensor, u: Tensor, mu: Tensor, n: Neighborhood, weights: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """Compute the equation as written, one tap at a time; its gradient by autograd."""
    return topographic(z, u, mu, n, weights, EPS, "reference", axis)


def fallback(
    z: Tensor, u: Tensor, mu: Tensor, n: Neighborhood, weights: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """Compute it by the package on any device."""
    return topographic(z, u, mu, n, weights, EPS, "torch", axis)


def kernels(
    z: Tensor, u: Tensor, mu: Tensor, n: Neighborhood, weights: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """Compute it by the package on a GPU."""
    return topographic(z, u, mu, n, weights, EPS, "triton", axis)


def convolution(z: Tensor, u: Tensor, mu: Tensor, neighborhood: Neighborhood) -> Tensor:
    """Compute it as the code published with the paper does, by a transposed 3-D convolution of one channel.

    Every capsule's `(time, dim)` plane of squares is padded circularly and convolved with a dense window that is 1 on
    K diagonals and 0 elsewhere. The published window of K = 3 is cut to `W x W`; this one, `W x (W + K - 1)`, has
    every tap, so that it computes what the others compute. Sums run in float32, for float64 in float64.

    Raises:
        ValueError: the window does not shift by one position a frame, or does not wrap around on both axes.

    """
    n = neighborhood
    if n.shift != 1 or (n.time_boundary, n.capsule_boundary) != ("circular", "circular"):
        raise ValueError(f"the convolution has shift 1 and circular boundaries, got {n}")
    batch, time, capsules, dim = u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    window = _diagonals(n, dtype, u.device)
    planes = u.to(dtype).square().transpose(1, 2).reshape(batch * capsules, 1, time, dim, 1)
    i, k = n.time_taps, n.capsule_taps
    padded = F.pad(planes, (0, 0, -(i[0] + k[0]), i[-1] + k[-1], -i[0], i[-1]), mode="circular")
    v = F.conv_transpose3d(padded, window, padding=(window.shape[2] - 1, window.shape[3] - 1, 0))
    v = v.reshape(batch, capsules, time, dim).transpose(1, 2)
    return ((z.to(dtype) - mu) * (1 / torch.sqrt(v + EPS))).to(z.dtype)


@lru_cache
def _diagonals(neighborhood: Neighborhood, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make `(1, 1, W, W + K - 1, 1)`: 1 at the taps, the last first, since a convolution turns its window round."""
    taps, k = neighborhood.time_taps, neighborhood.capsule_taps
    i = torch.arange(taps[-1], taps[0] - 1, -1, device=device)[:, None]
    offset = torch.arange(taps[-1] + k[-1], taps[0] + k[0] - 1, -1, device=device)
    window = (offset - i >= k[0]) & (offset - i <= k[-1])
    return window.to(dtype)[None, None, :, :, None]


FUNCTIONS = {"reference": reference, "torch": fallback, "triton": kernels, "convolution": convolution}
