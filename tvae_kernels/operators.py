"""What compilers cannot look into as registered operators: the launch of a kernel, and parts of the fallback.

`torch.compile` and `torch.export` see these operators, and of their results shape and type. Into the fallback they can
look, but make its window sums slower. In eager mode everything is called directly: an operator made in Python costs
several times the host time of a direct call (`python -m benchmarks overhead`).
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor

from .neighborhood import Neighborhood
from .reference import compute_dtype
from .taps import shape_of_r


class Operators(NamedTuple):
    """`forward` and `backward` of a backend, through `torch.ops.tvae_kernels.topographic_forward` and `_backward`."""

    backend: str

    def forward(
        self,
        z: Tensor,
        u: Tensor,
        mu: Tensor,
        weights: Tensor | None,
        neighborhood: Neighborhood,
        eps: float,
        save_r: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As `kernels.forward` and `fallback_taps.forward`."""
        t, r = _forward(self.backend, z, u, mu, weights, neighborhood.text, eps, save_r)
        return t, r if save_r else None

    def backward(
        self,
        dt: Tensor,
        z: Tensor,
        u: Tensor,
        mu: Tensor,
        weights: Tensor | None,
        r: Tensor | None,
        neighborhood: Neighborhood,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `kernels.backward` and `fallback_taps.backward`."""
        dz, du, dmu, dw = _backward(self.backend, dt, z, u, mu, weights, r, neighborhood.text, eps)
        return dz, du, dmu, None if weights is None else dw


OPERATORS = {backend: Operators(backend) for backend in ("triton", "torch")}


def window_sum(x: Tensor, neighborhood: Neighborhood, adjoint: bool) -> Tensor:
    """As `fallback.skewed_window_sum`, through `torch.ops.tvae_kernels.window_sum`."""
    return _window_sum(x, neighborhood.text, adjoint)


def latents_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.latents_forward`, through `torch.ops.tvae_kernels.latents_forward`."""
    *tensors, first, neighborhood, eps = arguments
    return _latents_forward(*tensors, first, neighborhood.text, eps)


def latents_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.latents_backward`, through `torch.ops.tvae_kernels.latents_backward`."""
    *tensors, first, neighborhood, eps = arguments
    return _latents_backward(*tensors, first, neighborhood.text, eps)


def _read(text: str) -> Neighborhood:
    """The neighbourhood from the text that stands for it as an argument of an operator."""
    return Neighborhood(**json.loads(text))


def _module(backend: str):
    if backend == "torch":
        from . import fallback_taps

        return fallback_taps
    from . import kernels

    return kernels


# An operator's results are tensors, never None: an empty one stands for what there is not.


@torch.library.custom_op("tvae_kernels::topographic_forward", mutates_args=())
def _forward(
    backend: str, z: Tensor, u: Tensor, mu: Tensor, weights: Tensor | None, neighborhood: str, eps: float, save_r: bool
) -> tuple[Tensor, Tensor]:
    t, r = _module(backend).forward(z, u, mu, weights, _read(neighborhood), eps, save_r)
    return t, _nothing(z) if r is None else r


@_forward.register_fake
def _(backend, z, u, mu, weights, neighborhood, eps, save_r):
    n = _read(neighborhood)
    saves = save_r and (backend == "torch" or _module(backend).keeps_r(z, mu, weights, n, eps))
    r = torch.empty(shape_of_r(z, n), dtype=compute_dtype(z.dtype), device=z.device) if saves else _nothing(z)
    return torch.empty(z.shape, dtype=z.dtype, device=z.device), r


@torch.library.custom_op("tvae_kernels::topographic_backward", mutates_args=())
def _backward(
    backend: str,
    dt: Tensor,
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    weights: Tensor | None,
    r: Tensor,
    neighborhood: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, du, dmu, dw = _module(backend).backward(dt, z, u, mu, weights, r, _read(neighborhood), eps)
    return dz, du, dmu, _nothing(z) if dw is None else dw


@_backward.register_fake
def _(backend, dt, z, u, mu, weights, r, neighborhood, eps):
    dz, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, u))
    dw = _nothing(z) if weights is None else torch.empty_like(weights)
    return dz, du, torch.empty_like(mu), dw


@torch.library.custom_op("tvae_kernels::latents_forward", mutates_args=())
def _latents_forward(
    z: Tensor,
    u: Tensor,
    mu: Tensor,
    noise_z: Tensor | None,
    noise_u: Tensor | None,
    seed: Tensor | None,
    first: int,
    neighborhood: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = z, u, mu, noise_z, noise_u, seed, first, _read(neighborhood), eps
    t, kl_z, kl_u = _module("triton").latents_forward(*arguments)
    return t, kl_z.clone(), kl_u.clone()  # results of an operator do not share memory


@_latents_forward.register_fake
def _(z, u, mu, noise_z, noise_u, seed, first, neighborhood, eps):
    B, S, _, C, D = z.shape
    kl_z, kl_u = (torch.empty((B, S), dtype=compute_dtype(z.dtype), device=z.device) for _ in range(2))
    return torch.empty((B, S, C, D), dtype=z.dtype, device=z.device), kl_z, kl_u


@torch.library.custom_op("tvae_kernels::latents_backward", mutates_args=())
def _latents_backward(
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
    neighborhood: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = dt, dkl_z, dkl_u, z, u, mu, noise_z, noise_u, seed, first, _read(neighborhood), eps
    return _module("triton").latents_backward(*arguments)


@_latents_backward.register_fake
def _(dt, dkl_z, dkl_u, z, u, mu, noise_z, noise_u, seed, first, neighborhood, eps):
    dz, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, u))
    return dz, du, torch.empty_like(mu)


@torch.library.custom_op("tvae_kernels::window_sum", mutates_args=())
def _window_sum(x: Tensor, neighborhood: str, adjoint: bool) -> Tensor:
    from . import fallback

    return fallback.skewed_window_sum(x, _read(neighborhood), adjoint)


@_window_sum.register_fake
def _(x, neighborhood, adjoint):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _nothing(z: Tensor) -> Tensor:
    return torch.empty(0, dtype=compute_dtype(z.dtype), device=z.device)
