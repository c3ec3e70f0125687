"""VAEs whose capsules move along the gradients of potentials, one potential for each transformation.

After the latent flows of Song et al. (2023, arXiv 2309.13167). A frame leads to the next by the step
`z_l = z_{l-1} + ∇u_k(z_{l-1}, l)`. Along such a path `u_k` grows, so that none comes back to where it was: flows are
for transformations that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.distributions import Normal

from ..data import SequenceBatch, SequenceSource
from ..settings import Count, Number, settings
from .base import ELBO
from .layers import STANDARD_NORMAL, Axis, Capsules, Frames, Images, Mix, exact, kl_from_prior
from .potentials import Points, Potentials, Walk
from .vae import VAE

_MOST_HIDDEN = 128  # units of a potential's layers


@settings
class FlowSettings(VAE.Settings):
    """Settings of all models that move along potentials."""

    transformations: Count = 3
    """Number K of transformations of the data, each with a potential of its own."""
    gamma: Annotated[Number, Field(ge=0)] = 1.0
    """Weight of the penalty for potentials that do not solve their differential equation; 0 is off."""
    steps_per_frame: Count = 1
    """Steps m along the gradient from a frame to the next, each of length 1/m."""

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse sequences that stand still, or have another number of transformations than there are flows.

        Raises:
            ValueError: what does not fit what.

        """
        if len(source.transformations) != self.transformations:
            names = ", ".join(source.transformations.values()) or "no transformation"
            raise ValueError(
                f"{self.transformations} flows (--transformations) do not fit {source.name}, which has "
                f"{len(source.transformations)}: {names}"
            )
        if source.sequence_length < 2:
            raise ValueError(f"flows need sequences of at least 2 frames, those of {source.name} have 1")


class PotentialFlow(VAE):
    """A VAE that moves its capsules along the gradients of potentials: what the models below have in common.

    Args:
        arguments: as those of `VAE`, and the fields of the model's `Settings`.

    Raises:
        ValueError: as `VAE`.

    """

    Settings = FlowSettings
    told_transformations: ClassVar[bool] = True

    def __init__(self, image_shape: tuple[int, int, int], capsules: int, capsule_dim: int, **arguments):
        super().__init__(image_shape, capsules, capsule_dim, **arguments)
        n = math.prod(self.capsule_shape)
        self.potentials = Potentials(self.settings.transformations, n, min(n, _MOST_HIDDEN))

    def flow_of(self, batch: SequenceBatch) -> Axis:
        """Return the number of the flow that moves each sequence: that of its transformation.

        Raises:
            ValueError: the batch does not know it.

        """
        if batch.axis is None:
            raise ValueError(
                f"a {type(self).__name__} got a batch without an axis: the transformation of each sequence"
            )
        return batch.axis

    def walk(self, z: Points, frames: int) -> Walk:
        """Move points `(K, B, n)` from the first frame to the last, each along the potential of its row.

        A frame leads to the next by `m` steps of length `1 / m`: number j of those to frame l is at time `l + j / m`.
        """
        with exact(z):
            return self.potentials.walk(z, self.times(frames, z), 1 / self.settings.steps_per_frame)

    def walk_along(self, z: Float[Tensor, "batch size"], frames: int, flow: Axis) -> Walk:
        """Move the points of sequences, each along the flow of its number: `(B, ...)` in place of `(K, B, ...)`."""
        walk = self.walk(z.expand(self.settings.transformations, *z.shape), frames)
        return Walk(*(chosen(x, flow) for x in walk))

    def follow(self, z: Float[Tensor, "batch size"], mix: Mix) -> Float[Tensor, "batch point size"]:
        """Move points along a mix of flows, which says how much of each every step takes, `(B, S - 1, K)`.

        A step takes the gradients of several potentials at the same point. Their time starts anew with another mix: a
        potential has learnt to move what it moves from time 1 on.

        Returns:
            All points on the way, `(B, (S - 1) m + 1, n)`.

        Raises:
            ValueError: the mix is of another shape.

        """
        count, m = self.settings.transformations, self.settings.steps_per_frame
        if mix.ndim != 3 or (len(mix), mix.shape[2]) != (len(z), count):
            raise ValueError(f"mix must be of shape ({len(z)}, frames - 1, {count}), got {tuple(mix.shape)}")
        points = [z]
        with exact(z):
            for i, time in enumerate(self.times_of(mix).unbind(1)):
                gradients = self.potentials(z.expand(count, *z.shape), time).gradient()
                z = z + (mix[:, i // m].mT[..., None] * gradients).sum(0) / m
                points.append(z)
        return torch.stack(points, -2)

    def times(self, frames: int, like: Tensor) -> Float[Tensor, " step"]:
        """Return the times of all steps, in frames from 1, in the type and on the device of a tensor."""
        m = self.settings.steps_per_frame
        return 1 + torch.arange((frames - 1) * m, dtype=like.dtype, device=like.device) / m

    def times_of(self, mix: Mix) -> Float[Tensor, "batch step"]:
        """Return the times of all steps, which start anew from 1 where another mix begins."""
        m, step = self.settings.steps_per_frame, torch.arange(mix.shape[1], device=mix.device)
        begins = F.pad((mix[:, 1:] != mix[:, :-1]).any(-1), (1, 0), value=True)
        since = step - torch.where(begins, step, 0).cummax(1).values
        return (1 + since[..., None] + torch.arange(m, dtype=mix.dtype, device=mix.device) / m).flatten(1)

    def path(self, points: Tensor) -> Capsules:
        """Take the capsules of every frame from all points on the way, `(..., S, C, D)`."""
        return points[..., :: self.settings.steps_per_frame, :].unflatten(-1, self.capsule_shape)

    def start(self, batch: SequenceBatch) -> Tensor:
        """Return the posterior mean of the first frame, `(B, n)`."""
        (q,) = self.posterior(batch.images[:, :1])
        return q.mean.flatten(1)

    def moved(self, batch: SequenceBatch, mix: Mix | None = None) -> Capsules:
        """Return the path of the flows from the posterior mean of frame 0; by default each of the sequence's own.

        Raises:
            ValueError: the mix is not of every step.

        """
        z, frames = self.start(batch), batch.images.shape[1]
        if mix is None:
            return self.path(self.walk_along(z, frames, self.flow_of(batch)).points)
        if mix.shape[1] != frames - 1:
            raise ValueError(f"mix must be of {frames - 1} steps, got {tuple(mix.shape)}")
        return self.path(self.follow(z, mix))

    def motions(self, batch: SequenceBatch, steps: int) -> dict[str, Capsules]:
        """Return the path of every flow from the posterior mean of frame 0, by the number of the flow."""
        z = self.start(batch)
        walk = self.walk(z.expand(self.settings.transformations, *z.shape), steps)
        return {f"flow {k}": path for k, path in enumerate(self.path(walk.points), 1)}

    @torch.no_grad()
    def folds(self, batch: SequenceBatch) -> Bool[Tensor, "batch step"]:
        """Say which steps of the paths from the posterior means fold: where `I + H / m` is not positive definite.

        A step `z + ∇u / m` is the gradient of `|z|² / 2 + u / m`. Where that is strictly convex, it is injective and an
        optimal transport of any density; that all steps are does not make the path of all of them optimal.
        (A matrix is positive definite if and only if it has a Cholesky factor.)
        """
        flow, frames, m = self.flow_of(batch), batch.images.shape[1], self.settings.steps_per_frame
        points = self.walk_along(self.start(batch), frames, flow).points
        folding = []
        for point, time in zip(points.unbind(1), self.times(frames, points)[:, None], strict=False):
            convex = self.potentials(point[:, None], time, flow).hessian()[:, 0].double() / m
            convex.diagonal(dim1=-2, dim2=-1).add_(1)
            folding.append(torch.linalg.cholesky_ex(convex)[1] != 0)
        return torch.stack(folding, 1)


@settings
class FlowVAESettings(FlowSettings):
    """Settings of the flow VAE."""


class FlowVAE(PotentialFlow):
    """The flow-factorised VAE of Song et al. (2023): one latent variable a sequence, moved by the flow of its kind.

        z_0 ~ N(0, I)        z_l = z_{l-1} + ∇u_k(z_{l-1}, l)        x_l ~ p(x|z_l)

    It is told the transformation k of each sequence, and encodes the first frame alone. Prior and posterior share the
    flow, so that the bound has one divergence, at frame 0:

        log p(x_0 ... x_{S-1} | k) >= E_q Σ_l log p(x_l|z_l) - KL(q(z_0|x_0) || N(0, I))

    In training it pays for what a Hamilton-Jacobi equation forbids, `max(r, 0)²` with `r = ∂u/∂t + |∇u|² / 2`, on
    average over the steps. Paths with `r = 0` are those of optimal transport.

    Args:
        arguments: as those of `VAE`, and the fields of `FlowVAESettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "flowvae"
    Settings = FlowVAESettings
    shares_latents = True

    def posterior(self, x: Images) -> tuple[Normal]:
        """Return `q(z_0|x_0)` of the first frame, `(B, 1, C, D)`."""
        return super().posterior(x[:, :1])

    def encode(self, batch: SequenceBatch, sample: bool = True) -> Capsules:
        """Return the path of the sequence's flow from `z_0`, at a sample of the posterior or at its mean."""
        if not sample:
            return self.moved(batch)
        (q,) = self.posterior(batch.images)
        return self.path(self.walk_along(q.rsample().flatten(1), batch.images.shape[1], self.flow_of(batch)).points)

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the evidence lower bound of every frame, its terms, and in training the penalty's."""
        (q,), frames = self.posterior(batch.images), batch.images.shape[1]
        walk = self.walk_along(self.drawn(q, batch).flatten(1), frames, self.flow_of(batch))
        elbo = self.bound(batch, self.path(walk.points), {"kl_z": at_first(kl_from_prior(q), frames)})
        if not self.training:
            return elbo
        penalty = hamilton_jacobi(walk)[:, None].expand(-1, frames)
        return elbo.penalised(self.settings.gamma * penalty, hamilton_jacobi=penalty)

    def log_weights(self, batch: SequenceBatch, samples: int) -> Iterator[Frames]:
        """Draw `log p(x|path)` of every frame `samples` times, in nats; what `z_0` costs is at frame 0."""
        (q,), frames = self.posterior(batch.images), batch.images.shape[1]
        flow = self.flow_of(batch)
        for _ in range(samples):
            z = q.rsample()
            t = self.path(self.walk_along(z.flatten(1), frames, flow).points)
            yield self.likelihood.log_prob(self.decode(t), batch.images) + at_first(log_ratio(z, q), frames)

    def sample(self, sequences: int, time: int, axis: Axis | None = None) -> Images:
        """Draw images of `sequences` sequences of `time` frames from the prior, on the model's device.

        Args:
            sequences: their number.
            time: frames of each.
            axis: the numbers of their transformations, which are drawn uniformly by default.

        """
        device = self.potentials.w.device
        z = torch.randn(sequences, math.prod(self.capsule_shape), device=device)
        if axis is None:
            axis = torch.randint(self.settings.transformations, (sequences,), device=device)
        return self.likelihood.mean(self.decode(self.path(self.walk_along(z, time, axis).points)))


def hamilton_jacobi(walk: Walk) -> Tensor:
    """Return the mean over steps of `max(r, 0)²` with `r = ∂u/∂t + |∇u|² / 2`, summed over latent variables.

    The published equation is `r = f` for a force `f = -F² <= 0` that a network learns; the least of `(r + F²)²` over
    all such forces is `max(r, 0)²`.
    """
    residual = walk.rates + walk.gradients.square().sum(-1) / 2
    return residual.clamp(min=0).square().mean(-1)


def chosen(x: Float[Tensor, "flow batch *other"], flow: Axis) -> Tensor:
    """Take of every sequence what one of the flows makes of it, `(batch, *other)`."""
    return x[flow, torch.arange(len(flow), device=flow.device)]


def at_first(x: Float[Tensor, "batch 1"], frames: int) -> Frames:
    """Give what a sequence has to its frame 0, and 0 to the others."""
    return F.pad(x, (0, frames - 1))


def log_ratio(z: Capsules, q: Normal) -> Frames:
    """Sum `log p(z) - log q(z|x)` over the latent variables of every frame, in nats."""
    return (STANDARD_NORMAL.log_prob(z) - q.log_prob(z)).sum((-2, -1))
