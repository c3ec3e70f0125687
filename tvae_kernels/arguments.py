"""What the operation is given: the few values that travel together, what is refused, and in which types."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .neighborhood import Neighborhood


class Inputs(NamedTuple):
    """The tensors of the operation; until they are `promoted`, `mu` may be a number and the types may differ."""

    z: Tensor  # (B, S, C, D), or with a third axis of 2 for the means and log-variances that `z` is drawn from
    u: Tensor  # the same, but longer where a boundary is padded
    mu: Tensor  # broadcasts to (C, D)
    weights: Tensor | None  # of `Neighborhood.weights_shape`, or with a leading axis of C; None means ones


class Window(NamedTuple):
    """What is summed over, and what is added to a sum before its root is taken."""

    neighborhood: Neighborhood
    eps: float


class Noise(NamedTuple):
    """Standard normal noise for `z` and `u`, or, where kernels are to draw it, a seed on their device."""

    for_z: Tensor | None
    for_u: Tensor | None
    seed: Tensor | None = None
    first: int = 0  # number of the first of these sequences in the batch that is drawn for


# --- what is refused --------------------------------------------------------------------------------------------------


def check(inputs: Inputs, window: Window) -> None:
    """Refuse what `topographic` cannot take.

    Raises:
        TypeError: an argument is not a floating-point tensor (`mu`: or a number), or not a `Neighborhood`.
        ValueError: shapes, devices, window sizes or `eps` do not fit.

    """
    z, u, mu, weights = inputs
    for name, x in (("z", z), ("u", u), ("mu", mu), ("weights", weights)):
        if (name == "mu" and isinstance(x, Real)) or (name == "weights" and x is None):
            continue
        check_tensor(name, x)
        if x.device != z.device:
            raise ValueError(f"{name} is on {x.device}, but z is on {z.device}")
    if z.ndim != 4 or u.ndim != 4:
        raise ValueError(f"z and u must be (batch, time, capsule, dim), got {tuple(z.shape)} and {tuple(u.shape)}")
    if isinstance(mu, Tensor) and not _broadcasts(mu.shape, z.shape[2:]):
        raise ValueError(f"mu must broadcast to (capsule, dim) = {tuple(z.shape[2:])}, got {tuple(mu.shape)}")
    _check_window(z.shape, u.shape, weights, window)


def check_tensor(name: str, x: object) -> None:
    """Refuse what is no floating-point tensor.

    Raises:
        TypeError: naming what it is.

    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_neighborhood(neighborhood: object) -> None:
    """Refuse what is no neighbourhood.

    Raises:
        TypeError: naming what it is.

    """
    if not isinstance(neighborhood, Neighborhood):
        raise TypeError(f"neighborhood must be a Neighborhood, got {type(neighborhood).__name__}")


def check_eps(eps: object) -> None:
    """Refuse what cannot be added to a sum of squares.

    Raises:
        ValueError: it is not a finite number of at least 0.

    """
    # compared, since a compiler may not know its value
    if not (isinstance(eps, Real) and not isinstance(eps, bool) and 0 <= eps < math.inf):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Say whether a tensor of `shape` can be expanded to `target`."""
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))


def _check_window(z_shape: torch.Size, u_shape: torch.Size, weights: Tensor | None, window: Window) -> None:
    neighborhood, eps = window
    check_neighborhood(neighborhood)
    check_eps(eps)
    neighborhood.check_fits(time=z_shape[1], dim=z_shape[3], capsules=z_shape[2])
    if u_shape != z_shape or not neighborhood.is_plain:
        expected = neighborhood.shape_of_u(tuple(z_shape))
        if tuple(u_shape) != expected:
            raise ValueError(f"for z of shape {tuple(z_shape)} u must have the shape {expected}, got {tuple(u_shape)}")
    if weights is None:
        return
    expected = neighborhood.weights_shape
    if tuple(weights.shape) not in (expected, (z_shape[2], *expected)):
        raise ValueError(
            f"weights must have the shape {expected}, or for each capsule its own {(z_shape[2], *expected)}; "
            f"got {tuple(weights.shape)}"
        )


def has_own_weights(weights: Tensor | None, neighborhood: Neighborhood) -> bool:
    """Say whether each capsule has weights of its own, along a leading axis."""
    return weights is not None and weights.ndim > len(neighborhood.weights_shape)


def within_reach(inputs: Inputs, window: Window) -> tuple[Inputs, Window]:
    """Return the problem without the taps, and their weights, that are outside for all of its elements."""
    n, weights = window.neighborhood, inputs.weights
    shorter = n.within(inputs.z.shape[1], inputs.z.shape[3])
    if shorter is n:
        return inputs, window
    if weights is not None:
        time = weights.ndim - len(n.weights_shape)
        weights = weights.narrow(time, shorter.time_taps[0] - n.time_taps[0], shorter.time_window)
        windows = [x if n.is_multidimensional else (x,) for x in (n.capsule_window, shorter.capsule_window)]
        kept = [((k - 1) // 2 - (m - 1) // 2, m) for k, m in zip(*windows, strict=True)]
        if n.roots == "each axis":
            columns = zip(weights.split(list(windows[0]), -1), kept, strict=True)
            weights = torch.cat([x.narrow(-1, *middle) for x, middle in columns], -1)
        else:
            for axis, middle in enumerate(kept):
                weights = weights.narrow(time + 1 + axis, *middle)
        weights = weights.contiguous()  # as `promoted` promises
    return inputs._replace(weights=weights), window._replace(neighborhood=shorter)


# --- types ------------------------------------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type sums are accumulated in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def promoted(inputs: Inputs) -> Inputs:
    """Return the inputs in the types that `Inputs` promises: PyTorch's promotion, and float32 under autocast."""
    z, u, mu, weights = inputs
    dtype = torch.promote_types(z.dtype, u.dtype)
    for other in (mu, weights):
        if isinstance(other, Tensor) and other.ndim:  # a tensor without dimensions does not promote, as in PyTorch
            dtype = torch.promote_types(dtype, other.dtype)
    if dtype != torch.float64 and under_autocast(z):
        dtype = torch.float32
    accumulator = compute_dtype(dtype)
    if weights is not None:
        weights = in_type(weights, accumulator).contiguous()
    return Inputs(in_type(z, dtype), in_type(u, dtype), mu_in_type(mu, accumulator, z.device), weights)


def under_autocast(x: Tensor) -> bool:
    """Say whether autocast is on for the device of a tensor; where tensors have no memory there is none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def mu_in_type(mu: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `mu` as a tensor of the compute type."""
    if isinstance(mu, Tensor):
        return in_type(mu, dtype)
    # written on the device: a copy to it would wait for it and could not be captured in a CUDA graph
    return torch.full((), float(mu), dtype=dtype, device=device)


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.to(dtype)`, without the time that a conversion which converts nothing takes."""
    return x if x.dtype == dtype else x.to(dtype)
