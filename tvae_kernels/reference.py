"""The operation and its gradient as the mathematics writes them: the oracle that every other backend is tested against.

    v[b,l,c,d] = Σ_{i,k} w[i,k] · u[b, l+i, c, d + shift·i + k]²
    t[b,l,c,d] = (z[b,l,c,d] - mu) / sqrt(v[b,l,c,d] + eps)

With several roots, each over its own window sum, their sum is the denominator.

Short and obvious before fast; every step is a differentiable PyTorch operation, so it can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import Inputs, Window, compute_dtype, has_own_weights
from .neighborhood import Neighborhood, Tap
from .roll import interpolated, moved, phase_shifted


def shifted(x: Tensor, time: int, capsule: int, neighborhood: Neighborhood) -> Tensor:
    """Return `x[b, l + time, c, d + capsule]` for every `(b, l, c, d)`, under the neighbourhood's boundaries.

    Equivalent to `torch.roll(x, (-time, -capsule), dims=(1, 3))` where both axes are circular.
    """
    if neighborhood.time_boundary == neighborhood.capsule_boundary == "circular":  # in one pass
        rolls = -time % x.shape[1], -capsule % x.shape[3]
        return torch.roll(x, rolls, (1, 3)) if any(rolls) else x
    return moved(moved(x, 1, time, neighborhood.time_boundary), 3, capsule, neighborhood.capsule_boundary)


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
    everywhere = x.new_ones((1, x.shape[1], 1, x.shape[3]))
    for row, i in enumerate(neighborhood.time_taps):
        for column, k in enumerate(neighborhood.capsule_taps):
            offsets = sign * i, sign * (neighborhood.shift * i + k), neighborhood
            tap = shifted(x, *offsets)
            if weights is not None:
                tap = weights[row, column] * tap
                if _is_cut(neighborhood):
                    tap = tap.where(shifted(everywhere, *offsets) > 0, 0)
            total = total + tap
    return total


def _is_cut(neighborhood: Neighborhood) -> bool:
    """Say whether an edge cuts taps off: they are left out, for 0 times what is not finite is not 0."""
    return "zero" in (neighborhood.time_boundary, neighborhood.capsule_boundary)


def window_sums(u: Tensor, neighborhood: Neighborhood, weights: Tensor | None = None, padding=None) -> Tensor:
    """Return `v` under every root of any neighbourhood, one tap at a time.

    Args:
        u: of the shape that the neighbourhood asks for, in the compute type.
        neighborhood: the taps.
        weights: of `neighborhood.weights_shape`, or with a leading axis of C for each capsule its own; None for ones.
        padding: of `u`, where it is not `neighborhood.padding()`.

    Returns:
        `(R, B, S, C, D)`.

    """
    own_weights = has_own_weights(weights, neighborhood)
    if neighborhood.is_plain and not own_weights:
        return window_sum(u.square(), neighborhood, weights)[None]
    if neighborhood.speeds is not None or own_weights:
        capsules = [
            window_sums(
                u[:, :, c : c + 1],
                neighborhood.of_capsule(c),
                _of_capsule(weights, c) if own_weights else weights,
                neighborhood.padding(),  # as far as the fastest capsule reaches
            )
            for c in _capsules(u)
        ]
        return torch.cat(capsules, 3)

    sums = [0] * neighborhood.root_count
    for tap, x, inside in _values(u, neighborhood, padding):
        if weights is not None:
            x = weights.flatten()[tap.number] * x
            x = x if inside is None else x.where(inside, 0)
        sums[tap.root] = sums[tap.root] + x
    return torch.stack(sums)


def _capsules(u: Tensor) -> range:
    """Return the numbers of all capsules; where there are none that of one, which a slice finds empty."""
    return range(max(1, u.shape[2]))


def _of_capsule(weights: Tensor, c: int) -> Tensor:
    """Return the weights of a capsule; of none the sum over none, whose gradient has no capsule either."""
    return weights[c] if len(weights) else weights.sum(0)


def _values(u: Tensor, neighborhood: Neighborhood, padding=None) -> Iterator[tuple[Tap, Tensor, Tensor | None]]:
    """Every tap of capsules of one speed, what it adds to each element of `v`, `(B, S, C, D)`, and where it is any.

    Where it is any is None for everywhere.
    """
    (first, last), capsule = padding or neighborhood.padding()
    if neighborhood.axes is not None:
        u = u.unflatten(3, [n + before + after for n, (before, after) in zip(neighborhood.axes, capsule, strict=True)])
    lengths = tuple(n - before - after for n, (before, after) in zip(u.shape[3:], capsule, strict=True))
    steps = u.shape[1] - first - last
    source = u if neighborhood.by_phase else u.square()
    everywhere = u.new_ones((1, u.shape[1], 1, *u.shape[3:]))
    for tap in neighborhood.taps():
        x, inside = (moved(y, 1, tap.time, neighborhood.time_boundary, first, steps) for y in (source, everywhere))
        if neighborhood.by_phase:
            x = interpolated(phase_shifted(x, tap.roll[0]).square(), [(1, tap.window)], "circular")
        else:
            x, inside = (
                interpolated(y, tap.corners, neighborhood.capsule_boundary, capsule, lengths) for y in (x, inside)
            )
        yield tap, x.flatten(3), inside.flatten(3) > 0 if _is_cut(neighborhood) else None


def weight_gradients(
    g: Tensor, u: Tensor, neighborhood: Neighborhood, shape: torch.Size, padding=None, frames: slice = slice(None)
) -> Tensor:
    """Return `dw = Σ g · u[tap]²` for any neighbourhood: of `shape`, which is that of its weights.

    Args:
        g: `(R, B, S, C, D)`, the gradient of `v` under each root.
        u: as in `window_sums`, and so is `padding`.
        neighborhood: the taps.
        shape: `neighborhood.weights_shape`, or with a leading axis of C.
        frames: those of `v` that `g` has.

    """
    own_weights = len(shape) > len(neighborhood.weights_shape)
    if neighborhood.speeds is not None:
        padding = neighborhood.padding()
        capsules = [
            weight_gradients(
                g[:, :, :, c : c + 1],
                u[:, :, c : c + 1],
                neighborhood.of_capsule(c),
                shape[own_weights:],
                padding,
                frames,
            )
            for c in _capsules(u)
        ]
        return torch.stack(capsules)[: u.shape[2]] if own_weights else sum(capsules)
    summed = (0, 1, 3) if own_weights else (0, 1, 2, 3)
    parts = {}
    for tap, x, inside in _values(u, neighborhood, padding):
        product = g[tap.root] * x[:, frames]
        parts[tap.number] = (product if inside is None else product.where(inside[:, frames], 0)).sum(summed)
    return torch.stack([parts[number] for number in range(len(parts))], -1).reshape(shape)


def topographic(inputs: Inputs, window: Window) -> Tensor:
    """Return `(z - mu) / Σ_roots sqrt(v + eps)`, computed in the compute type and returned in the type of `z`.

    Args:
        inputs: promoted.
        window: the taps, and `eps`, which is added to the window sum inside the root.

    Returns:
        `t`, `(B, S, C, D)`.

    """
    z, u, mu, weights = inputs
    dtype = compute_dtype(z.dtype)
    v = window_sums(u.to(dtype), window.neighborhood, weights)
    return ((z.to(dtype) - mu) / torch.sqrt(v + window.eps).sum(0)).to(z.dtype)


def topographic_backward(inputs: Inputs, window: Window, dt: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradient as a formula, itself differentiable. With `r = (v + eps)^(-1/2)` and `g = -½ · dt · t · r²`:

        dz = dt · r      dmu = -Σ dt · r      dw[i,k] = Σ g · u[tap]²      du[n] = 2 · u[n] · Σ_taps w · g[n - tap]

    For neighbourhoods that are not plain, and weights for each capsule, what autograd makes of `topographic`.

    Args:
        inputs: promoted.
        window: as in `topographic`.
        dt: `(B, S, C, D)`, the gradient that arrives at `t`.

    Returns:
        `dz` and `du` of the shapes of `z` and `u` in the type of `z`; `dmu` and `dw` of the shapes of `mu` and
        `weights` (None without weights) in the compute type.

    """
    (z, u, mu, weights), (neighborhood, eps) = inputs, window
    if not neighborhood.is_plain or has_own_weights(weights, neighborhood):
        return _differentiated(inputs, window, dt)
    out, dtype = z.dtype, compute_dtype(z.dtype)
    dt, z, u = dt.to(dtype), z.to(dtype), u.to(dtype)
    r = (window_sum(u.square(), neighborhood, weights) + eps).rsqrt()
    dz = dt * r
    g = -0.5 * dz * (z - mu) * r * r
    du = 2 * u * window_sum(g, neighborhood, weights, adjoint=True)
    dw = None if weights is None else weight_gradients(g[None], u, neighborhood, weights.shape)
    return dz.to(out), du.to(out), -dz.sum_to_size(mu.shape), dw


def _differentiated(inputs: Inputs, window: Window, dt: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients by autograd, which can be differentiated again; None for what needs none."""
    if torch._C._are_functorch_transforms_active():  # where tensors do not say whether they need a gradient
        without = (None,) if inputs.weights is None else ()
        tensors = inputs[: 4 - len(without)]
        _, differentiated = torch.func.vjp(lambda *x: topographic(Inputs(*x, *without), window), *tensors)
        return *differentiated(dt), *without
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with torch.enable_grad():
        gradients = iter(torch.autograd.grad(topographic(inputs, window), wanted, dt, create_graph=True))
    return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)
