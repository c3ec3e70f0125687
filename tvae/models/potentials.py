"""Potentials of latent variables and time, whose derivatives are closed forms.

A gradient flow moves `z` along `∇u(z, t)`. Its training differentiates that again, penalties take `∂u/∂t`, `∂²u/∂t²`
or the Laplacian: all of them are written out here, as plain products of matrices, instead of left to nested automatic
differentiation. Arguments are `(potential P, point N, size n)` throughout.
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
