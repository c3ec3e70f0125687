"""Fused GPU kernels for the topographic layer of Topographic VAEs, with the same in PyTorch and a reference.

t[b,l,c,d] = (z[b,l,c,d] - mu) / sqrt(Σ_{i,k} w[i,k] · u[b, l+i, c, d + shift·i + k]² + eps)
"""

from .backends import BackendUnavailableError
from .function import TopographicFunction, topographic
from .latents import Latents, topographic_latents
from .layer import TopographicLayer
from .neighborhood import Neighborhood
from .parallel import exchange_halo, topographic_split
from .roll import roll_capsules

__all__ = [
    "BackendUnavailableError",
    "Latents",
    "Neighborhood",
    "TopographicFunction",
    "TopographicLayer",
    "exchange_halo",
    "roll_capsules",
    "topographic",
    "topographic_latents",
    "topographic_split",
]
