"""PoFlow: a VAE whose potentials learn to lead from frame to frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..data import SequenceBatch
from ..settings import settings
from .base import ELBO
from .flow_vae import FlowSettings, PotentialFlow, log_ratio
from .layers import Axis, exact, kl_from_prior


@settings
class PoFlowSettings(FlowSettings):
    """Settings of PoFlow."""


class PoFlow(PotentialFlow):
    """The PDE traversals of Song et al. (2023, arXiv 2304.12944): potentials that lead from frame to frame, as waves.

    Every frame has a posterior of its own, and the bound of an evaluation is the VAE's. Training knows the
    transformation k of a sequence and decodes the flow of `z_0`, `ẑ_l`, in place of `z_l`; a frame pays

        gamma (∂²u/∂t² - c_k² Δu)² + log p(ẑ_l) - log q(ẑ_l|x_l)

    for what is no wave, at the points that lead to it, and for a flow that its own posterior does not expect. The last
    teaches the posterior alone. (By `|ẑ_l - z_l|² / 2` of samples in its place flows would draw all variances towards
    0, and the prior all means half the way to 0; with `z_l` held still nothing would teach the posterior.)

    Args:
        arguments: as those of `VAE`, and the fields of `PoFlowSettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "poflow"
    Settings = PoFlowSettings

    def __init__(self, image_shape: tuple[int, int, int], capsules: int, capsule_dim: int, **arguments):
        super().__init__(image_shape, capsules, capsule_dim, **arguments)
        self.c = nn.Parameter(torch.ones(self.settings.transformations))  # speeds of the waves

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the VAE's bound; in training of that on the path of the flow, and the penalties."""
        if not self.training:
            return super().forward(batch)
        (q,), frames, flow = self.posterior(batch.images), batch.images.shape[1], self.flow_of(batch)
        z = self.drawn(q, batch)
        points = self.walk_along(z[:, 0].flatten(1), frames, flow).points
        path = self.path(points)
        elbo = self.bound(batch, path, {"kl_z": kl_from_prior(q)})
        waves = self.wave_residual(points, flow).square().unflatten(1, (frames - 1, -1)).mean(-1)
        waves = F.pad(waves, (1, 0))  # no step leads to frame 0
        matching = F.pad(log_ratio(path.detach(), q)[:, 1:], (1, 0))  # the flow starts at what frame 0 has drawn
        return elbo.penalised(self.settings.gamma * waves + matching, wave=waves, matching=matching)

    def wave_residual(self, points: Tensor, flow: Axis) -> Float[Tensor, "batch step"]:
        """Return `∂²u/∂t² - c² Δu` at the points of a walk that steps start from: all but the last."""
        with exact(points):
            times = self.times(1 + (points.shape[1] - 1) // self.settings.steps_per_frame, points)
            u = self.potentials(points[:, :-1], times, flow)
            return u.second_rate() - self.c[flow, None].square() * u.laplacian()
