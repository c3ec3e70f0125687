"""`TopographicLayer`: the operation as a module with a learned `mu`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .function import BACKENDS, topographic
from .neighborhood import Neighborhood


class TopographicLayer(nn.Module):
    """`t = (z - mu) / sqrt(window_sum(u²) + eps)` with one trainable scalar `mu` (Keller & Welling 2021, Eq. 11).

    Equivalent to `topographic(z, u, self.mu, neighborhood, eps=eps, backend=backend)`.

    Args:
        neighborhood: which `u²` share a denominator.
        mu_init: initial value of `mu`; the paper's 30 speeds up convergence (appendix A.2).
        eps: added inside the square root.
        backend: as in `topographic`.

    Raises:
        ValueError: the backend's name is unknown.

    """

    def __init__(self, neighborhood: Neighborhood, mu_init: float = 30.0, eps: float = 1e-6, backend: str = "auto"):
        super().__init__()
        if not isinstance(neighborhood, Neighborhood):
            raise TypeError(f"neighborhood must be a Neighborhood, got {type(neighborhood).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        self.neighborhood = neighborhood
        self.eps = eps
        self.backend = backend
        self.mu = nn.Parameter(torch.tensor(float(mu_init)))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """Map `z` and `u`, both `(batch, time, capsule, dim)`, to `t` of the same shape."""
        return topographic(z, u, self.mu, self.neighborhood, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{self.neighborhood}, eps={self.eps}, backend={self.backend!r}"
