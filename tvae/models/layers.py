"""What models are built from: the networks of the paper, Gaussian variables, and the shapes that go between them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils.parametrizations import weight_norm

Images = Float[Tensor, "batch time channel height width"]
Capsules = Float[Tensor, "batch time capsule dim"]
Parameters = Float[Tensor, "batch time 2 capsule dim"]  # means and log-variances
Frames = Float[Tensor, "batch time"]
Axis = Int[Tensor, " batch"]  # along which axis of the capsules each sequence rolls, for models that are told
Mix = Float[Tensor, "batch step transformation"]  # how much of each transformation leads from a frame to the next

STANDARD_NORMAL = Normal(0.0, 1.0, validate_args=False)


@torch.no_grad()
def project(layer: nn.Linear) -> nn.Linear:
    """Scale every row of a layer's weights to norm 1, in place: the projection of projected gradient descent."""
    layer.weight.copy_(F.normalize(layer.weight, dim=1))
    return layer


# What becomes of a freshly initialised layer, by the constraint on the rows of its weights (appendix A.8).
WEIGHTS = {"free": lambda layer: layer, "normalised": weight_norm, "projected": project}


class MLP(nn.Sequential):
    """Linear layers with ReLUs between them, for inputs of any shape `(N, ...)`; returns `(N, last size)`.

    `nn.Linear` initialises weights and biases from U(±1/sqrt(fan-in)), as the paper does (appendix A.2).

    Args:
        sizes: numbers of units, from the inputs to the outputs.
        weights: the rows of every layer's weights are "free", "normalised" (weight normalisation: `g · v / ||v||` with
            trainable `g` and `v`, Eq. 15) or "projected" (norm 1, which `project_weights` restores after a step).

    """

    def __init__(self, *sizes: int, weights: str = "free"):
        layers = [WEIGHTS[weights](nn.Linear(inputs, outputs)) for inputs, outputs in itertools.pairwise(sizes)]
        super().__init__(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])

    def __getitem__(self, index: int | slice) -> nn.Module:
        return nn.Sequential(*self)[index]  # nn.Sequential itself would make a slice by a call of this class

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, ...)` to `(N, last size)`."""
        return super().forward(x.flatten(1))


def framewise(network: nn.Module, x: Tensor) -> Tensor:
    """Apply a network of `(N, ...)` to every frame of `(batch, time, ...)`; returns `(batch, time, outputs)`."""
    return network(x.flatten(0, 1)).flatten(1).unflatten(0, x.shape[:2])


def gaussian(parameters: Parameters) -> Normal:
    """Make the normal distribution of means and log-variances."""
    mean, log_variance = parameters.unbind(-3)
    return Normal(mean, (0.5 * log_variance).exp(), validate_args=False)


def kl_from_prior(q: Normal) -> Frames:
    """Sum `KL(q || N(0, 1))` over the latent variables of every frame, in nats."""
    return kl_divergence(q, STANDARD_NORMAL).sum((-2, -1))


def exact(x: Tensor) -> torch.autocast:
    """Compute meanwhile in the type of the numbers: errors of bfloat16 would add up along a path, or move pixels."""
    return torch.autocast(x.device.type, enabled=False)


def folded(x: Tensor, steps: int, before: int) -> Frames:
    """Add what frames beyond both ends of a sequence have, `(B, before + S + after)`, to its first and last frame."""
    if x.shape[1] == steps:
        return x
    first, inside, last = x.split([before, steps, x.shape[1] - before - steps], 1)
    return torch.cat((inside[:, :1] + first.sum(1, keepdim=True), inside[:, 1:]), 1) + F.pad(
        last.sum(1, keepdim=True), (steps - 1, 0)
    )
