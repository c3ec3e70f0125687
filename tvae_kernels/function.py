"""`topographic` and the `torch.autograd.Function` behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch

from . import backends, reference
from .arguments import Inputs, Window, check, has_own_weights, promoted, within_reach
from .backends import resolve_backend
from .neighborhood import Neighborhood


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

    What no shape can tell, and so nothing refuses: the order of the axes, of which time is the second; a neighborhood
    that is not given, with which every `u` stands alone and there is no topography; weights below 0, which may make a
    root NaN. Learned ones are kept above 0 by `TopographicLayer`.

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
        neighborhood: the taps `(i, k)`, the shift and the boundaries; by default a single tap, no topography.
        weights: `(W, K)`, for other topographies `neighborhood.weights_shape`, or with a leading axis of C for each
            capsule its own; at least 0; None means ones. A tap that an edge cuts off is left out, with its weight.
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
    inputs, window = Inputs(z, u, mu, weights), Window(neighborhood, eps)
    check(inputs, window)
    if not isinstance(eps, float):
        window = Window(neighborhood, float(eps))
    backend, inputs = resolve_backend(backend, z.device), promoted(inputs)
    return _topographic(inputs, window, backend) if axis is None else _on_axis(axis, inputs, window, backend)


def _topographic(inputs: Inputs, window: Window, backend: str) -> Tensor:
    """Return `topographic` of what has been checked and promoted."""
    if not torch.compiler.is_compiling():  # a compiler cannot make a neighbourhood
        inputs, window = within_reach(inputs, window)
    if backend == "reference":
        return reference.topographic(inputs, window)
    # Under torch.func a tensor that needs a gradient does not always say so, but grad mode does.
    apply = TopographicFunction.apply if _transformed() else _apply
    return apply(*inputs, window, backend, torch.is_grad_enabled())[0]


def _on_axis(axis: int | Tensor, inputs: Inputs, window: Window, backend: str) -> Tensor:
    """Return `topographic` under the root of one axis, or of one a sequence.

    The whole batch goes through the window of every axis, which takes as many taps as the sum over all does: for shapes
    that depend on values a GPU would have to be waited for, and no CUDA graph could hold them. Sequences that roll
    along another axis have a denominator of ones there, for what their own gives need not be finite, nor 0 times it.
    """
    z, u, mu, weights = inputs
    neighborhood, eps = window
    if isinstance(axis, Tensor):
        _check_axes(axis, z, neighborhood)
        t = None
        for a in range(neighborhood.root_count):
            here = (axis == a)[:, None, None, None]
            # `z` has a part in the gradient of weights alone, where 0 times what is not finite would be added
            chosen = Inputs(z if weights is None else z.where(here, 0), u.where(here, 1), mu, weights)
            if weights is None or eps >= _LEAST_EPS:
                found = _on_axis(a, chosen, window, backend)
            else:  # weights of 0 may be all that a sequence has there
                found = _with_weights_for_each(here, a, chosen, window, backend)
            t = found if t is None else found.where(here, t)
        return t
    alone = neighborhood.along(axis)
    if weights is not None:
        columns = weights.split(list(neighborhood.capsule_window), -1)[axis]
        weights = columns.reshape(*weights.shape[:-2], *alone.weights_shape).contiguous()
    inputs = Inputs(z, _known_around(u, axis, neighborhood), mu, weights)
    return _topographic(inputs, Window(alone, eps), backend)


_LEAST_EPS = 2.0**-126  # for which the root over nothing has an inverse in every type


def _with_weights_for_each(here: Tensor, axis: int, inputs: Inputs, window: Window, backend: str) -> Tensor:
    """Return `topographic` under the root of one axis, of which the weights are 1 in all sequences that are not here.

    Sequences become capsules, for these may have weights of their own.
    """
    z, u, mu, weights = inputs
    batch, _, capsules, _ = z.shape
    if not has_own_weights(weights, window.neighborhood):
        weights = weights.expand(capsules, *weights.shape)
    weights = weights.where(here.reshape(batch, *(1,) * weights.ndim), 1).flatten(0, 1)
    z, u = (x.transpose(0, 1).flatten(1, 2)[None] for x in (z, u))
    if mu.ndim == 2:
        mu = mu.expand(capsules, -1).repeat(batch, 1)
    t = _on_axis(axis, Inputs(z, u, mu, weights), window, backend)  # of which the speeds take turns
    return t[0].unflatten(1, (batch, capsules)).transpose(0, 1)


def _known_around(u: Tensor, axis: int, neighborhood: Neighborhood) -> Tensor:
    """Return the part of `u` that the window along one axis reaches: without the padding along the others."""
    if neighborhood.capsule_boundary != "padded":
        return u
    _, padding = neighborhood.padding()
    u = u.unflatten(3, [n + sum(x) for n, x in zip(neighborhood.axes, padding, strict=True)])
    for other, (length, (before, _)) in enumerate(zip(neighborhood.axes, padding, strict=True)):
        if other != axis:
            u = u.narrow(3 + other, before, length)
    return u.flatten(3)


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


def _transformed() -> bool:
    """Say whether a program transformation runs: one of torch.compile, torch.export or torch.func."""
    return torch.compiler.is_compiling() or under_torch_func()


def under_torch_func() -> bool:
    """Say whether tensors may be those of torch.func, which kernels cannot read."""
    return torch._C._are_functorch_transforms_active()


class TopographicFunction(torch.autograd.Function):
    """The operation with its hand-written gradient, on checked and promoted inputs; call `topographic`.

    Its arguments are the four tensors of `Inputs`, a `Window`, the backend, "triton" or "torch", and whether a gradient
    may be asked for. Returns `t` and what the backend keeps for it: `r`, that is `(v + eps)^(-1/2)`, of the shape that
    `backends.tables.shape_of_r` says, which has no gradient; or None where computing it again is cheaper.
    """

    @staticmethod
    def forward(z, u, mu, weights, window, backend, save_r):
        """Compute `t`, and `r` for the backward pass."""
        return backends.forward(backend, Inputs(z, u, mu, weights), window, save_r)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the inputs and `r`."""
        z, u, mu, weights, ctx.window, ctx.backend, save_r = inputs
        if save_r:
            r = output[1]
            if r is not None:
                ctx.mark_non_differentiable(r)
            ctx.save_for_backward(z, u, mu, weights, r)
        ctx.set_materialize_grads(False)  # else the gradient that r does not have arrives as zeros, written for nobody

    @staticmethod
    def backward(ctx, dt, _):
        """Return the gradients of `z`, `u`, `mu` and `weights`."""
        if dt is None:
            return (None,) * 7
        z, u, mu, weights, r = ctx.saved_tensors
        inputs = Inputs(z, u, mu, weights)
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for: only the formula has one
            gradients = reference.topographic_backward(inputs, ctx.window, dt)
        elif is_mapped(dt):

            def call(z, u, mu, weights, r, dt):
                return backends.backward(ctx.backend, Inputs(z, u, mu, weights), ctx.window, r, dt)

            gradients = one_by_one(call, *inputs, r, dt)
        else:
            gradients = backends.backward(ctx.backend, inputs, ctx.window, r, dt)
        return *gradients, None, None, None

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


# --- vmap of a backward pass ------------------------------------------------------------------------------------------

# `torch.autograd.functional.jacobian(vectorize=True)` and `is_grads_batched` map the engine over gradients by an
# old vmap of its own, and `torch.vmap` may. No rule of a function is asked then, and nothing but the tensors tells it.


def is_mapped(*tensors: Tensor | None) -> bool:
    """Say whether vmap runs over any of the tensors, which kernels and operations in place do not know."""
    if torch.compiler.is_compiling():
        return False
    return any(x is not None and (_functorch.is_batchedtensor(x) or _by_the_old_vmap(x)) for x in tensors)


def one_by_one(call: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Call with tensors over which vmap runs, once for each value."""
    if not is_mapped(*tensors):
        return call(*tensors)
    level = max(_level(x) for x in tensors if is_mapped(x))
    each = [_values(x) if is_mapped(x) and _level(x) == level else None for x in tensors]
    count = len(next(x for x in each if x is not None))
    calls = [
        one_by_one(call, *(x if xs is None else xs[number] for x, xs in zip(tensors, each, strict=True)))
        for number in range(count)
    ]
    old, number = level
    wrapped = torch._add_batch_dim if old else _functorch._add_batch_dim
    stacked = [None if xs[0] is None else torch.stack(xs) for xs in zip(*calls, strict=True)]
    return tuple(None if x is None else wrapped(x, 0, number) for x in stacked)


_BATCHED = torch._C._parse_dispatch_key("Batched")


def _by_the_old_vmap(x: Tensor) -> bool:
    return torch._C._dispatch_keys(x).has(_BATCHED)


def _level(x: Tensor) -> tuple[bool, int]:
    """Whether the old vmap runs over a tensor, and which of several: the innermost."""
    if not _by_the_old_vmap(x):
        return False, _functorch.maybe_get_level(x)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return True, level


def _values(x: Tensor) -> tuple[Tensor, ...]:
    """Return what vmap runs over."""
    old, level = _level(x)
    if old:
        return torch._remove_batch_dim(x, level, 0, 0).unbind()
    return _functorch.get_unwrapped(x).unbind(_functorch.maybe_get_bdim(x))


# `Function.apply` binds the arguments to the signature of `forward` at every call, for torch.func, which takes longer
# than all else on the host; this is the method below it, which does not.
_apply = super(torch.autograd.Function, TopographicFunction).apply
