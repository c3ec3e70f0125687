"""`topographic`: input checks, type promotion, the choice of a backend, and the `torch.autograd.Function` behind it."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from numbers import Real

import torch
from torch import Tensor

from . import fallback, fallback_taps, operators, reference
from .neighborhood import Neighborhood
from .reference import compute_dtype

BACKENDS = ("auto", "triton", "torch", "reference")
BACKEND_VARIABLE = "TVAE_KERNELS_BACKEND"


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here; the message says why and what to use instead."""


def topographic(
    z: Tensor,
    u: Tensor,
    mu: Tensor | float = 0.0,
    neighborhood: Neighborhood = Neighborhood(),  # noqa: B008 - frozen
    weights: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
    axis: int | Tensor | None = None,
) -> Tensor:
    """Topographic Student's-t variables from Gaussian ones (Keller & Welling 2021, Eq. 6 to 9 and 11).

        v[b,l,c,d] = Σ_{i,k} w[i,k] · u[b, l+i, c, d + shift·i + k]²
        t[b,l,c,d] = (z[b,l,c,d] - mu) / sqrt(v[b,l,c,d] + eps)

    Equivalent, for circular boundaries, to::

        v = sum(
            w[a, b] * u.square().roll((-i, -(neighborhood.shift * i + k)), dims=(1, 3))
            for a, i in enumerate(neighborhood.time_taps)
            for b, k in enumerate(neighborhood.capsule_taps)
        )
        t = (z - mu) / torch.sqrt(v + eps)

    with one pass over memory instead of one a tap. With a root for each axis of the capsules, the denominator is the
    sum of the roots over their window sums (Eq. 21). Sums are accumulated in float32, for float64 inputs in float64.
    Differentiable, any number of times, in `z`, `u`, `mu` and `weights`. Under autocast it runs in float32.

    Args:
        z: `(batch B, time S, capsule C, dim D)`, floating point.
        u: the same shape, and where a boundary is padded longer, as `neighborhood.shape_of_u(z.shape)` says; mixed
            types follow PyTorch's promotion.
        mu: a number, or a tensor that broadcasts to `(C, D)`.
        neighborhood: the taps `(i, k)`, the shift and the boundaries.
        weights: `(W, K)`, for other topographies `neighborhood.weights_shape`, or with a leading axis of C for each
            capsule its own; non-negative (negative ones are not detected and may give NaN); None means ones.
        eps: added inside the square root; 0 is legal and then `t` is not finite where `v` is 0.
        backend: "auto" is Triton for GPU tensors and "torch" elsewhere, unless the environment variable
            TVAE_KERNELS_BACKEND names another; "triton", "torch" or "reference" ask for one.
        axis: where every axis has a root, the one that these sequences are known to roll along, or `(B,)` integers for
            each its own: then the window along it is the denominator, alone. None: the sum over all axes, whichever
            they roll along (Eq. 21).

    Returns:
        `t`, of the shape of `z`.

    Raises:
        TypeError: an argument is not a floating-point tensor (`mu`: or a number), or not a `Neighborhood`.
        ValueError: shapes, devices, window sizes, `eps`, the axis or the backend's name do not fit.
        BackendUnavailableError: the backend asked for cannot run on these tensors.

    """
    check_arguments(z, u, mu, neighborhood, weights, eps)
    if axis is not None:
        return _along(axis, z, u, mu, neighborhood, weights, eps, backend)
    backend = resolve_backend(backend, z.device)

    dtype = torch.promote_types(z.dtype, u.dtype)
    for other in (mu, weights):
        if isinstance(other, Tensor) and other.ndim:  # a tensor without dimensions does not promote, as in PyTorch
            dtype = torch.promote_types(dtype, other.dtype)
    if torch.is_autocast_enabled(z.device.type) and dtype != torch.float64:
        dtype = torch.float32
    z, u = _in_type(z, dtype), _in_type(u, dtype)
    mu = as_tensor(mu, compute_dtype(dtype), z.device)
    weights = None if weights is None else _in_type(weights, compute_dtype(dtype)).contiguous()
    eps = float(eps)

    by_phase = neighborhood.roll == "fourier" and not neighborhood.is_plain
    if backend == "reference" or (backend == "torch" and by_phase):  # whose FFTs PyTorch has as fast as can be
        return reference.topographic(z, u, mu, weights, neighborhood, eps)
    # Under torch.func a tensor that needs a gradient does not always say so, but grad mode does.
    apply = TopographicFunction.apply if _transformed() else _apply
    return apply(z, u, mu, weights, neighborhood, eps, backend, torch.is_grad_enabled())[0]


def _along(axis: int | Tensor, z: Tensor, u: Tensor, mu, neighborhood, weights, eps, backend) -> Tensor:
    """`topographic` under the root of one axis, or of one a sequence.

    The whole batch goes through the window of every axis, which takes as many taps as the sum over all does: for shapes
    that depend on values a GPU would have to be waited for, and no CUDA graph could hold them. Sequences that roll
    along another axis count as ones there, for what their `u` gives need not be finite, nor 0 times it.
    """
    if isinstance(axis, Tensor):
        _check_axes(axis, z, neighborhood)
        t = None
        for a in range(neighborhood.root_count):
            mine = (axis == a)[:, None, None, None]
            along = _along(a, z, u.where(mine, 1), mu, neighborhood, weights, eps, backend)
            t = along if t is None else along.where(mine, t)
        return t
    alone = neighborhood.along(axis)
    if weights is not None:
        columns = weights.split(list(neighborhood.capsule_window), -1)[axis]
        weights = columns.reshape(*weights.shape[:-2], *alone.weights_shape)
    return topographic(z, u, mu, alone, weights, eps, backend)


def _check_axes(axis: Tensor, z: Tensor, neighborhood: Neighborhood) -> None:
    """Refuse what does not name an axis with a root for each sequence, as far as that is known without waiting."""
    if axis.is_floating_point() or axis.dtype == torch.bool or axis.shape != z.shape[:1] or axis.device != z.device:
        raise ValueError(
            f"axis must be {z.shape[0]} integers on {z.device}, one for each sequence; "
            f"got {axis.dtype} of shape {tuple(axis.shape)} on {axis.device}"
        )
    if axis.device.type == "cpu" and not _transformed():
        for a in axis.unique().tolist():
            neighborhood.along(a)  # which refuses what is none


def as_tensor(mu: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`mu` in the compute type."""
    if isinstance(mu, Tensor):
        return _in_type(mu, dtype)
    # written on the device: a copy to it would wait for it and could not be captured in a CUDA graph
    return torch.full((), float(mu), dtype=dtype, device=device)


def _in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without the time that a conversion which converts nothing takes."""
    return x if x.dtype == dtype else x.to(dtype)


def _transformed() -> bool:
    """Whether a program transformation runs: one of torch.compile, torch.export or torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class TopographicFunction(torch.autograd.Function):
    """The operation with its hand-written gradient, on checked and promoted inputs; call `topographic`.

    Inputs are `z` of shape `(B, S, C, D)` and `u` as `Neighborhood.shape_of_u` says, of one type, `mu` that broadcasts
    to `(C, D)` and `weights` or None in the compute type, then the neighbourhood, `eps`, the backend, "triton" or
    "torch", and whether a gradient may be asked for. Returns `t` and what the backend keeps for it: `r`, that is
    `(v + eps)^(-1/2)`, of the shape that `taps.shape_of_r` says, which has no gradient; or None where computing it
    again is cheaper.
    """

    @staticmethod
    def forward(z, u, mu, weights, neighborhood, eps, backend, save_r):
        """Compute `t`, and `r` for the backward pass."""
        return _implementation(backend, weights, neighborhood).forward(z, u, mu, weights, neighborhood, eps, save_r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs and `r`."""
        z, u, mu, weights, ctx.neighborhood, ctx.eps, ctx.backend, save_r = inputs
        if save_r:
            r = output[1]
            if r is not None:
                ctx.mark_non_differentiable(r)
            ctx.save_for_backward(z, u, mu, weights, r)
        ctx.set_materialize_grads(False)  # else the gradient that r does not have arrives as zeros, written for nobody

    @staticmethod
    def backward(ctx, dt, _):
        """The gradients of `z`, `u`, `mu` and `weights`."""
        if dt is None:
            return (None,) * 8
        z, u, mu, weights, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for: only the formula has one
            gradients = reference.topographic_backward(dt, z, u, mu, weights, ctx.neighborhood, ctx.eps)
        else:
            implementation = _implementation(ctx.backend, weights, ctx.neighborhood)
            gradients = implementation.backward(dt, z, u, mu, weights, r, ctx.neighborhood, ctx.eps)
        return *gradients, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, z, u, mu, weights, *settings):
        """Fold the mapped axis into the batch; where `mu` or `weights` are mapped, one call for each value."""
        z, u = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((z, u), in_dims[:2], strict=True)
        )
        if in_dims[2] is None and in_dims[3] is None:
            folded = TopographicFunction.apply(z.flatten(0, 1), u.flatten(0, 1), mu, weights, *settings)
            outputs = [None if x is None else x.unflatten(0, z.shape[:2]) for x in folded]
        else:
            mapped = [
                [x] * info.batch_size if dim is None else x.unbind(dim)
                for x, dim in zip((mu, weights), in_dims[2:4], strict=True)
            ]
            calls = [TopographicFunction.apply(*tensors, *settings) for tensors in zip(z, u, *mapped, strict=True)]
            outputs = [None if xs[0] is None else torch.stack(xs) for xs in zip(*calls, strict=True)]
        return tuple(outputs), tuple(None if x is None else 0 for x in outputs)


# `Function.apply` binds the arguments to the signature of `forward` at every call, for torch.func, which takes longer
# than all else on the host; this is the method below it, which does not.
_apply = super(torch.autograd.Function, TopographicFunction).apply


def _implementation(backend: str, weights: Tensor | None, neighborhood: Neighborhood):
    """The module whose `forward` and `backward` to call.

    A compiler looks into the fallback for plain windows; all else it sees as operators. Kernels are otherwise launched
    directly, in less time.
    """
    plain = backend == "torch" and weights is None and neighborhood.is_plain
    if torch.compiler.is_compiling() and not plain:
        return operators.OPERATORS[backend]
    if backend == "torch":
        return fallback if plain else fallback_taps
    from . import kernels

    return kernels


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run for tensors on `device`: "triton", "torch" or "reference".

    Raises:
        ValueError: `backend`, or the environment variable that overrides "auto", names no backend.
        BackendUnavailableError: it cannot run on this device.

    """
    source = "backend"
    if backend == "auto" and BACKEND_VARIABLE in os.environ:
        backend, source = os.environ[BACKEND_VARIABLE], f"the environment variable {BACKEND_VARIABLE}"
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _triton_installed() else "torch"
    if backend == "triton":
        _check_triton(device)
    return backend


def _triton_installed() -> bool:
    if "triton" in sys.modules:  # the search takes longer than a launch
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


def _check_triton(device: torch.device) -> None:
    advice = 'use backend="torch" or backend="auto"'
    if not _triton_installed():
        raise BackendUnavailableError(f"the triton backend needs the package triton, which is not installed: {advice}")
    if device.type != "cuda":
        from . import kernels

        if not kernels.interpreted():
            raise BackendUnavailableError(
                f"the triton backend runs on GPU tensors, and these are on {str(device)!r}: {advice}, or set "
                "TRITON_INTERPRET=1 before the first import to run the kernels through Triton's interpreter"
            )


def check_arguments(
    z: Tensor, u: Tensor, mu: Tensor | float, neighborhood: Neighborhood, weights: Tensor | None, eps: float
) -> None:
    """Refuse what `topographic` cannot take, with the errors that it promises."""
    _check_tensors(z, u, mu, weights)
    _check_values(z, u, neighborhood, weights, eps)


def _check_tensors(z: Tensor, u: Tensor, mu: Tensor | float, weights: Tensor | None) -> None:
    """Types, devices and shapes that do not depend on the neighbourhood."""
    for name, x in (("z", z), ("u", u), ("mu", mu), ("weights", weights)):
        if (name == "mu" and isinstance(x, Real)) or (name == "weights" and x is None):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.device != z.device:
            raise ValueError(f"{name} is on {x.device}, but z is on {z.device}")
    if z.ndim != 4 or u.ndim != 4:
        raise ValueError(f"z and u must be (batch, time, capsule, dim), got {tuple(z.shape)} and {tuple(u.shape)}")
    if isinstance(mu, Tensor) and not _broadcasts(mu.shape, z.shape[2:]):
        raise ValueError(f"mu must broadcast to (capsule, dim) = {tuple(z.shape[2:])}, got {tuple(mu.shape)}")


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to `target`."""
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))


def _check_values(z: Tensor, u: Tensor, neighborhood: Neighborhood, weights: Tensor | None, eps: float) -> None:
    if not isinstance(neighborhood, Neighborhood):
        raise TypeError(f"neighborhood must be a Neighborhood, got {type(neighborhood).__name__}")
    if not (isinstance(eps, Real) and math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
    neighborhood.check_fits(time=z.shape[1], dim=z.shape[3], capsules=z.shape[2])
    if u.shape != z.shape or not neighborhood.is_plain:
        expected = neighborhood.shape_of_u(tuple(z.shape))
        if tuple(u.shape) != expected:
            raise ValueError(f"for z of shape {tuple(z.shape)} u must have the shape {expected}, got {tuple(u.shape)}")
    expected = neighborhood.weights_shape
    if weights is not None and tuple(weights.shape) not in (expected, (z.shape[2], *expected)):
        raise ValueError(
            f"weights must have the shape {expected}, or for each capsule its own {(z.shape[2], *expected)}; "
            f"got {tuple(weights.shape)}"
        )
