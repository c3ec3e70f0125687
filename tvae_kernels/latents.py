"""`topographic_latents`: from what the encoders say of `z` and `u` to `t` and both KL terms.

Where a kernel can hold the sequences it is one launch forward and one backward, and neither the samples nor their noise
are ever in memory; elsewhere the same is composed of PyTorch operations and `topographic`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from .arguments import Inputs, Noise, Window, check, check_tensor, compute_dtype, mu_in_type, under_autocast
from .backends import resolve_backend
from .function import is_mapped, one_by_one, topographic, under_torch_func
from .neighborhood import Neighborhood


class Latents(NamedTuple):
    """`t`, `(B, S, C, D)`, at a sample of the posterior, and the divergence of the posterior from N(0, 1) in nats."""

    t: Tensor
    kl_z: Tensor  # (B, S)
    kl_u: Tensor  # (B, S), or of the frames of `u`, which are more where time is padded


def topographic_latents(
    z: Tensor,
    u: Tensor,
    mu: Tensor | float = 0.0,
    neighborhood: Neighborhood = Neighborhood(),  # noqa: B008 - frozen
    weights: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    noise: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
    of: int | None = None,
    axis: int | Tensor | None = None,
) -> Latents:
    """Sample Gaussian `z` and `u` and make them topographic (Keller & Welling 2021, Eq. 10 to 12).

    Equivalent to::

        (z_mean, z_log_variance), (u_mean, u_log_variance) = z.unbind(2), u.unbind(2)
        t = topographic(
            z_mean + (z_log_variance / 2).exp() * noise[0], u_mean + (u_log_variance / 2).exp() * noise[1], mu, ...
        )
        kl_z = (z_mean.square() + z_log_variance.exp() - 1 - z_log_variance).sum((-2, -1)) / 2  # and so kl_u

    Noise that is not given is drawn from PyTorch's generators, so that `torch.manual_seed` repeats it; not the same on
    a CPU and by the kernels. Those draw it twice instead of keeping it: to differentiate the gradient, give the noise.

    Args:
        z: means and log-variances, `(batch B, time S, 2, capsule C, dim D)`, floating point.
        u: the same, with the frames and positions that `neighborhood.shape_of_u` says.
        mu: as in `topographic`.
        neighborhood: as in `topographic`, also that without one there is no topography.
        weights: as in `topographic`.
        eps: as in `topographic`.
        backend: as in `topographic`.
        noise: standard normal noise for `z`, `(B, S, C, D)`, and for `u`, alike.
        first: number of the first of these sequences in a batch that several processes share,
        of: and how many sequences that batch has. Processes whose generators are in one state then draw for all of it
            the noise that a single one would.
        axis: as in `topographic`.

    Raises:
        TypeError: as `topographic`; or the noise is not two tensors, or `first` or `of` no integer.
        ValueError: as `topographic`; or `z`, `u` or the noise has another shape, or the sequences are not in the batch.
        BackendUnavailableError: as `topographic`.

    """
    for name, x in (("z", z), ("u", u)):
        if isinstance(x, Tensor) and (x.ndim != 5 or x.shape[2] != 2):
            raise ValueError(f"{name} must be (batch, time, 2, capsule, dim), got {tuple(x.shape)}")
    one_z, one_u = (x.select(2, 0) if isinstance(x, Tensor) else x for x in (z, u))
    check(Inputs(one_z, one_u, mu, weights), Window(neighborhood, eps))
    window = Window(neighborhood, float(eps))
    for name, x in (("first", first), ("of", 0 if of is None else of)):
        if not isinstance(x, (Integral, torch.SymInt)) or isinstance(x, bool):
            raise TypeError(f"{name} must be an integer, got {x!r}")
    of = len(z) if of is None else of
    if not 0 <= first <= of - len(z):
        raise ValueError(f"{len(z)} sequences from number {first} on are not in a batch of {of}")
    if noise is not None:
        noise = noise[:2] if isinstance(noise, Noise) else noise
        if not isinstance(noise, (tuple, list)) or len(noise) != 2:
            raise TypeError(f"noise must be a tensor for z and one for u, got {type(noise).__name__}")
        for name, x in zip(("the noise for z", "the noise for u"), noise, strict=True):
            check_tensor(name, x)
            if x.device != z.device:
                raise ValueError(f"{name} is on {x.device}, but z is on {z.device}")
    if noise is not None and (noise[0].shape, noise[1].shape) != (one_z.shape, one_u.shape):
        shapes = f"{tuple(noise[0].shape)} and {tuple(noise[1].shape)}"
        raise ValueError(f"the noise must be {tuple(one_z.shape)} and {tuple(one_u.shape)}, got {shapes}")
    dtype = compute_dtype(torch.promote_types(z.dtype, u.dtype))
    if under_autocast(z):
        z, u = z.to(dtype), u.to(dtype)
    inputs = Inputs(z, u, mu_in_type(mu, dtype, z.device), weights)
    if noise is not None:
        noise = Noise(noise[0].to(dtype), noise[1].to(dtype))
    if axis is None and _fused(inputs, window, noise, resolve_backend(backend, z.device)):
        if noise is None:
            given = Noise(None, None, torch.randint(2**63 - 1, (1,), device=z.device), first)
        else:
            given = Noise(noise.for_z.contiguous(), noise.for_u.contiguous(), None, first)
        return Latents(*LatentsFunction.apply(*inputs[:3], *given, window))
    if noise is None:
        noise = drawn(one_z, one_u, first, of)
    settings = neighborhood, weights, eps, backend, axis
    return composed(z, u, noise, lambda z, u: topographic(z, u, inputs.mu, *settings))


def _fused(inputs: Inputs, window: Window, noise: Noise | None, backend: str) -> bool:
    """Say whether kernels do all of it: not under torch.func, nor where a gradient of the noise is wanted."""
    if under_torch_func() or not backends.fuses_latents(backend, inputs, window):
        return False
    return noise is None or not (noise.for_z.requires_grad or noise.for_u.requires_grad)


def drawn(z: Tensor, u: Tensor, first: int = 0, of: int | None = None) -> Noise:
    """Noise like `z` and `u`, `(B, S, C, D)`, in the compute type, from PyTorch; `first` and `of` as above."""
    dtype, of = compute_dtype(torch.promote_types(z.dtype, u.dtype)), len(z) if of is None else of
    z, u = (torch.randn(of, *x.shape[1:], dtype=dtype, device=x.device)[first : first + len(x)] for x in (z, u))
    return Noise(z, u)


def composed(
    z: Tensor, u: Tensor, noise: Noise | tuple[Tensor, Tensor], layer: Callable[[Tensor, Tensor], Tensor]
) -> Latents:
    """Return `topographic_latents` step by step, in the type of the noise, by any layer; `t` has the type of `z`."""
    (sample_z, kl_z), (sample_u, kl_u) = _sampled(z, noise[0]), _sampled(u, noise[1])
    return Latents(layer(sample_z, sample_u).to(torch.promote_types(z.dtype, u.dtype)), kl_z, kl_u)


def _sampled(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sample, and the KL divergence of every frame."""
    mean, log_variance = x.to(noise.dtype).unbind(2)
    std = (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + (std.square() - 1 - log_variance)).sum((-2, -1))
    return mean + std * noise, kl


class LatentsFunction(torch.autograd.Function):
    """One kernel forward and one backward; on checked arguments, call `topographic_latents`."""

    @staticmethod
    def forward(ctx, z, u, mu, noise_z, noise_u, seed, first, window):
        """Return `t` and the KL terms; keeps the inputs, and of the noise the seed."""
        ctx.save_for_backward(z, u, mu, noise_z, noise_u, seed)
        ctx.settings = first, window
        return backends.latents_forward(Inputs(z, u, mu, None), window, Noise(noise_z, noise_u, seed, first))

    @staticmethod
    def backward(ctx, dt, dkl_z, dkl_u):
        """Return the gradients of `z`, `u` and `mu`."""
        (z, u, mu, *noise), (first, window) = ctx.saved_tensors, ctx.settings
        inputs, noise = Inputs(z, u, mu, None), Noise(*noise, first)
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            gradients = _differentiable(inputs, window, noise, (dt, dkl_z, dkl_u))
        elif is_mapped(dt, dkl_z, dkl_u):

            def call(dt, dkl_z, dkl_u):
                return backends.latents_backward(inputs, window, noise, dt, dkl_z, dkl_u)

            gradients = one_by_one(call, dt, dkl_z, dkl_u)
        else:
            gradients = backends.latents_backward(inputs, window, noise, dt, dkl_z, dkl_u)
        return *gradients, None, None, None, None, None


def _differentiable(
    inputs: Inputs, window: Window, noise: Noise, gradients: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients themselves."""
    if noise.seed is not None:
        raise RuntimeError("noise drawn by the kernels is not kept: give it to differentiate the gradient")
    z, u, mu, _ = inputs
    outputs = composed(z, u, noise, lambda z, u: reference.topographic(Inputs(z, u, mu, None), window))
    wanted = [x for x in (z, u, mu) if x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in (z, u, mu))
