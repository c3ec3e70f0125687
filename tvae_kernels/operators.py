"""The kernels and the fallback's window sum as registered operators, for the compilers of PyTorch.

`torch.compile` and `torch.export` cannot look into the launch of a kernel. Below them it goes through these operators,
of whose results they know shape and type. Into the fallback they can look, but make its window sum slower. In eager
mode the kernels are launched directly: an operator made in Python costs several times the host time of a direct call
(`python -m benchmarks overhead`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .neighborhood import Boundary, Neighborhood
from .reference import compute_dtype


def forward(
    z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: Neighborhood, eps: float, save_r: bool
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.forward`, through `torch.ops.tvae_kernels.topographic_forward`."""
    t, r = _forward(z, u, mu, weights, *_fields(neighborhood, z.shape[3]), eps, save_r)
    return t, r if save_r else None


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
    """As `kernels.backward`, through `torch.ops.tvae_kernels.topographic_backward`."""
    dz, du, dmu, dw = _backward(dt, z, u, mu, weights, r, *_fields(neighborhood, z.shape[3]), eps)
    return dz, du, dmu, None if weights is None else dw


def window_sum(x: Tensor, neighborhood: Neighborhood, adjoint: bool) -> Tensor:
    """As `fallback.skewed_window_sum`, through `torch.ops.tvae_kernels.window_sum`."""
    return _window_sum(x, *_fields(neighborhood, x.shape[3]), adjoint)


def _fields(neighborhood: Neighborhood, dim: int) -> tuple[int, int, int, bool, Boundary, Boundary]:
    """The neighbourhood as arguments of an operator, with an equivalent shift that 64 bits can hold."""
    n = neighborhood
    limit = dim + n.capsule_window  # past a cut edge any farther shift drops the same taps
    shift = n.shift % dim if n.capsule_boundary == "circular" else max(-limit, min(limit, n.shift))
    return n.time_window, n.capsule_window, shift, n.causal, n.time_boundary, n.capsule_boundary


# An operator's results are tensors, never None: an empty one stands for what there is not.


@torch.library.custom_op("tvae_kernels::topographic_forward", mutates_args=())
def _forward(
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    time_window: int,
    capsule_window: int,
    shift: int,
    causal: bool,
    time_boundary: str,
    capsule_boundary: str,
    eps: float,
    save_r: bool,
) -> tuple[Tensor, Tensor]:
    from . import kernels

    neighborhood = Neighborhood(time_window, capsule_window, shift, causal, time_boundary, capsule_boundary)
    t, r = kernels.forward(z, u, mu, weights, neighborhood, eps, save_r)
    return t, _nothing(z) if r is None else r


@_forward.register_fake
def _(z, u, mu, weights, time_window, capsule_window, shift, causal, time_boundary, capsule_boundary, eps, save_r):
    from . import kernels

    neighborhood = Neighborhood(time_window, capsule_window, shift, causal, time_boundary, capsule_boundary)
    saves = save_r and kernels.keeps_r(z, mu, weights, neighborhood, eps)
    r = torch.empty(z.shape, dtype=compute_dtype(z.dtype), device=z.device) if saves else _nothing(z)
    return torch.empty(z.shape, dtype=z.dtype, device=z.device), r


@torch.library.custom_op("tvae_kernels::topographic_backward", mutates_args=())
def _backward(
    dt: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    r: Tensor,
    time_window: int,
    capsule_window: int,
    shift: int,
    causal: bool,
    time_boundary: str,
    capsule_boundary: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import kernels

    neighborhood = Neighborhood(time_window, capsule_window, shift, causal, time_boundary, capsule_boundary)
    dz, du, dmu, dw = kernels.backward(dt, z, u, mu, weights, r, neighborhood, eps)
    return dz, du, dmu, _nothing(z) if dw is None else dw


@_backward.register_fake
def _(dt, z, u, mu, weights, r, *settings):
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dw = _nothing(z) if weights is None else torch.empty_like(weights)
    return dz, torch.empty_like(dz), torch.empty_like(mu), dw


@torch.library.custom_op("tvae_kernels::window_sum", mutates_args=())
def _window_sum(
    x: Tensor,
    time_window: int,
    capsule_window: int,
    shift: int,
    causal: bool,
    time_boundary: str,
    capsule_boundary: str,
    adjoint: bool,
) -> Tensor:
    from . import fallback

    neighborhood = Neighborhood(time_window, capsule_window, shift, causal, time_boundary, capsule_boundary)
    return fallback.skewed_window_sum(x, neighborhood, adjoint)


@_window_sum.register_fake
def _(x, *settings):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _nothing(z: Tensor) -> Tensor:
    return torch.empty(0, dtype=compute_dtype(z.dtype), device=z.device)
