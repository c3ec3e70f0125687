"""Potentials of latent variables and time, whose derivatives are closed forms.

A gradient flow moves `z` along `∇u(z, t)`. Its training differentiates that again, penalties take `∂u/∂t`, `∂²u/∂t²`
or the Laplacian: all of them are written out here, as plain products of matrices, instead of left to nested automatic
differentiation. So is the gradient of a walk along potentials, in which the weights of all steps have one product.
Arguments are `(potential P, point N, size n)` throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_FREQUENCIES = 8
_SMALL = 0.05  # standard deviation of the last weights at first: `z + ∇u` is then near the identity

Points = Float[Tensor, "potential point size"]
Values = Float[Tensor, "potential point"]


class Weights(NamedTuple):
    """The weights of P potentials with h hidden units of two layers, in the names of `Potentials`."""

    A: Float[Tensor, "potential hidden size"]
    a: Float[Tensor, "potential hidden"]
    B: Float[Tensor, "potential hidden hidden"]
    C: Float[Tensor, "potential hidden feature"]
    w: Float[Tensor, "potential hidden"]


class Derivatives(NamedTuple):
    """Potentials at points, and what is made of their activations: each method costs what it needs, and no more.

    With `g2 = w (1 - h2²)` and `g1 = (Bᵀ g2)(1 - h1²)`, the derivatives of `u` by the arguments of both layers.
    """

    weights: Weights
    h1: Float[Tensor, "potential point hidden"]
    h2: Float[Tensor, "potential point hidden"]
    g1: Float[Tensor, "potential point hidden"]
    g2: Float[Tensor, "potential point hidden"]
    velocity: Float[Tensor, "potential time hidden"]  # C ė(t)
    acceleration: Float[Tensor, "potential time hidden"]  # C ë(t)

    def value(self) -> Values:
        """Return `u = w · h2`."""
        return torch.matmul(self.h2, self.weights.w[..., None])[..., 0]

    def gradient(self) -> Points:
        """Return `∇u = Aᵀ g1`."""
        return self.g1 @ self.weights.A

    def rate(self) -> Values:
        """Return `∂u/∂t = g2 · C ė`."""
        return (self.g2 * self.velocity).sum(-1)

    def second_rate(self) -> Values:
        """Return `∂²u/∂t² = -2 h2 g2 · (C ė)² + g2 · C ë`."""
        return (self.g2 * (self.acceleration - 2 * self.h2 * self.velocity.square())).sum(-1)

    def laplacian(self) -> Values:
        """Return the trace of the Hessian, `Σ d2 |G_i|² + Σ d1 |A_i|²` over the rows of both layers.

        The rows of `G = B diag(1 - h1²) A` are never made: their norms are those of `B diag(1 - h1²)` under `A Aᵀ`.
        """
        A, B = self.weights.A, self.weights.B
        inner = A @ A.mT  # (P, h, h)
        slopes = B[:, None] * (1 - self.h1.square())[..., None, :]  # (P, N, h, h)
        rows = slopes.flatten(1, 2) @ inner  # (P, N·h, h)
        second = (rows.view_as(slopes) * slopes).sum(-1)
        d1, d2 = self._curvatures()
        return (d2 * second).sum(-1) + (d1 * A.square().sum(-1)[:, None]).sum(-1)

    def hessian(self) -> Float[Tensor, "potential point size size"]:
        """Return `H = Gᵀ diag(-2 h2 g2) G + Aᵀ diag(-2 h1 g1) A` with `G = B diag(1 - h1²) A`."""
        rows, curvatures = self._factors()
        return rows.mT @ (curvatures[..., None] * rows)

    def log_det(self, step: float = 1.0) -> Values:
        """Return `log |det(I + step · H)|`, by how much a step along the gradient changes volumes.

        By `det(I + Mᵀ D M) = det(I + D M Mᵀ)` for the rows `M` of both layers, of 2h rows and columns.
        """
        rows, curvatures = self._factors()
        small = step * curvatures[..., None] * (rows @ rows.mT)
        return torch.linalg.slogdet(torch.eye(small.shape[-1], dtype=small.dtype, device=small.device) + small)[1]

    def _curvatures(self) -> tuple[Tensor, Tensor]:
        """Return the second derivatives of `u` by the arguments of both layers, but for what the first adds to both."""
        return -2 * self.h1 * self.g1, -2 * self.h2 * self.g2

    def _factors(self) -> tuple[Float[Tensor, "potential point row size"], Float[Tensor, "potential point row"]]:
        """Return `M = [G; A]` and `d` of `H = Mᵀ diag(d) M`."""
        A, B = self.weights.A[:, None], self.weights.B[:, None]
        G = (B * (1 - self.h1.square())[..., None, :]) @ A
        d1, d2 = self._curvatures()
        return torch.cat((G, A.expand_as(G)), -2), torch.cat((d2, d1), -1)


class Walk(NamedTuple):
    """Points that potentials move, `z_{i+1} = z_i + length · ∇u(z_i, t_i)`, and what the potentials are on the way."""

    points: Float[Tensor, "potential point step+1 size"]  # z_0 ... z_T
    gradients: Float[Tensor, "potential point step size"]  # ∇u at z_0 ... z_{T-1}
    rates: Float[Tensor, "potential point step"]  # ∂u/∂t there


class Potentials(nn.Module):
    """K potentials of points and time, each a network of two layers, whose derivatives are closed forms.

        h1 = tanh(A z + a)        h2 = tanh(B h1 + C e(t))        u = w · h2

    `e(t)` are sine and cosine of `t`, `t / 2`, ... `t / 128`, the time in frames. Weights start as those of `nn.Linear`
    do, but `w`, which starts small: a step along the gradient first changes little.

    Args:
        count: number K of potentials.
        size: n of a point.
        hidden: units h of each layer.

    """

    def __init__(self, count: int, size: int, hidden: int):
        super().__init__()
        features = 2 * _FREQUENCIES
        self.A, self.a = _uniform(size, count, hidden, size), _uniform(size, count, hidden)
        self.B = _uniform(hidden, count, hidden, hidden)
        self.C = _uniform(features, count, hidden, features)
        self.w = nn.Parameter(_SMALL * torch.randn(count, hidden))

    def forward(self, z: Points, time: Float[Tensor, " time"], chosen: Int[Tensor, " potential"] | None = None):
        """Return the `Derivatives` of potentials at points.

        Args:
            z: the points of every potential, `(K, N, n)`; with `chosen` `(P, N, n)`.
            time: of every point `(N,)`, or of all of them `(1,)`.
            chosen: numbers of the potentials in the order of the points; all K by default.

        """
        weights = Weights(self.A, self.a, self.B, self.C, self.w)
        if chosen is not None:
            weights = Weights(*(x[chosen] for x in weights))
        A, a, B, C, w = weights
        e, velocity, acceleration = (x.to(z.dtype) @ C.mT for x in _features(time))
        h1 = torch.tanh(z @ A.mT + a[:, None])
        h2 = torch.tanh(h1 @ B.mT + e)
        g2 = w[:, None] * (1 - h2.square())
        g1 = (g2 @ B) * (1 - h1.square())
        return Derivatives(weights, h1, h2, g1, g2, velocity, acceleration)

    def walk(self, z: Points, times: Float[Tensor, " step"], length: float = 1.0) -> Walk:
        """Move points along all K potentials, one step at each of the times.

        Equivalent to `z = z + length * self(z, time).gradient()` for one time after the other, but that its gradient is
        written by hand and has none itself.

        Args:
            z: the points of every potential, `(K, N, n)`.
            times: of the steps, `(T,)`.
            length: of a step.

        Raises:
            RuntimeError: in the backward pass, if a gradient of the gradient is asked for.

        """
        if len(times) == 0:
            return Walk(z[:, :, None], z[:, :, None][:, :, :0], z.new_zeros(*z.shape[:2], 0))
        e, velocity, _ = (x.to(z.dtype) @ self.C.mT for x in _features(times))
        found = _Walked.apply(z, e, velocity, self.A, self.a, self.B, self.w, length)
        return Walk(*(x.transpose(1, 2) for x in found))


class _Walked(torch.autograd.Function):
    """`Potentials.walk` with the step before the point, `(P, T, N, ...)`.

    With `y1 = A z + a` and `y2 = B h1 + C e`, and `Δ` for the gradient of what the walk is used for, each step back is

        Δg1 = A Δ∇u        Δg2 = B (Δg1 (1 - h1²)) + Δ(∂u/∂t) C ė        Δy2 = -2 h2 g2 Δg2
        Δy1 = (Bᵀ Δy2 - 2 h1 (Bᵀ g2) Δg1) (1 - h1²)        Δz_i += Δz_{i+1} + Aᵀ Δy1,  Δ∇u_{i-1} += length · Δz_i

    and weights, which all steps share, have sums over all of them in one product each.
    """

    @staticmethod
    def forward(ctx, z, e, velocity, A, a, B, w, length):
        """Return points, gradients and rates."""
        points, gradients, kept = [z], [], []
        for now in e.unbind(1):
            h1 = torch.baddbmm(a[:, None], z, A.mT).tanh_()
            h2 = torch.baddbmm(now[:, None], h1, B.mT).tanh_()
            g2 = w[:, None] * (1 - h2.square())
            below = g2 @ B
            g1 = below * (1 - h1.square())
            gradients.append(g1 @ A)
            z = torch.add(z, gradients[-1], alpha=length)
            points.append(z)
            kept.append((h1, h2, below, g1, g2))
        points, gradients = torch.stack(points, 1), torch.stack(gradients, 1)
        h1, h2, below, g1, g2 = (torch.stack(x, 1) for x in zip(*kept, strict=True))
        ctx.save_for_backward(points, velocity, A, B, h1, h2, below, g1, g2)
        ctx.length = length
        return points, gradients, (g2 * velocity[:, :, None]).sum(-1)

    @staticmethod
    def backward(ctx, d_points, d_gradients, d_rates):
        """Go back step by step for the points; then sum over all steps for the weights."""
        if torch.is_grad_enabled():  # what is kept is no input, so that the gradient would lack a part
            raise RuntimeError("the gradient of a walk along potentials has none itself: take Potentials step by step")
        points, velocity, A, B, h1, h2, below, g1, g2 = ctx.saved_tensors
        slope, bent1, bent2 = 1 - h1.square(), -2 * h1 * below, -2 * h2 * g2
        d_moving = d_rates[..., None] * velocity[:, :, None]
        dz, steps = d_points[:, -1], []
        for i in reversed(range(h1.shape[1])):
            d_gradient = torch.add(d_gradients[:, i], dz, alpha=ctx.length)
            d_g1 = d_gradient @ A.mT
            d_below = d_g1 * slope[:, i]
            d_g2 = torch.baddbmm(d_moving[:, i], d_below, B.mT)
            d_y2 = bent2[:, i] * d_g2
            d_y1 = torch.baddbmm(bent1[:, i] * d_g1, d_y2, B) * slope[:, i]
            dz = torch.baddbmm(d_points[:, i] + dz, d_y1, A)
            steps.append((d_gradient, d_below, d_g2, d_y1, d_y2))
        d_gradient, d_below, d_g2, d_y1, d_y2 = (torch.stack(x[::-1], 1) for x in zip(*steps, strict=True))
        dA = _product(d_y1, points[:, :-1]) + _product(g1, d_gradient)
        dB = _product(d_y2, h1) + _product(g2, d_below)
        d_velocity = (d_rates[..., None] * g2).sum(2)
        dw = (d_g2 * (1 - h2.square())).sum((1, 2))
        return dz, d_y2.sum(2), d_velocity, dA, d_y1.sum((1, 2)), dB, dw, None


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return `Σ xᵀ y` over all steps and points, `(P, T, N, ...)`."""
    return x.flatten(1, 2).mT @ y.flatten(1, 2)


def _features(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sines and cosines `(time, 16)` of 8 frequencies, and their first and second derivatives by time."""
    frequencies = 0.5 ** torch.arange(_FREQUENCIES, dtype=time.dtype, device=time.device)
    phase = time[:, None] * frequencies
    sine, cosine = phase.sin(), phase.cos()
    first = torch.cat((frequencies * cosine, -frequencies * sine), -1)
    second = torch.cat((-frequencies.square() * sine, -frequencies.square() * cosine), -1)
    return torch.cat((sine, cosine), -1), first, second


def _uniform(inputs: int, *shape: int) -> nn.Parameter:
    """Make weights from U(±1/sqrt(inputs)), as `nn.Linear` does."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(inputs))
