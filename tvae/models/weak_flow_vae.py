"""The flow-factorised VAE that is not told the transformations of its sequences, but finds them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import SequenceBatch, SequenceSource
from ..settings import Count, settings
from .base import ELBO
from .flow_vae import FlowSettings, FlowVAE, at_first, chosen, hamilton_jacobi, log_ratio
from .layers import MLP, Axis, Capsules, Frames, Images, Mix, kl_from_prior
from .potentials import Walk

_RECOGNISER = 256  # hidden units of the network that recognises transformations
_HOTTEST = 10.0  # temperature that flows share sequences at when training starts
_ROUNDS = 20  # of corrections until flows have equal shares

ByFlow = Float[Tensor, "flow batch"]


@settings
class WeakFlowVAESettings(FlowSettings):
    """Settings of the weakly supervised flow VAE."""

    frames: Count = 9
    """Frames of a sequence, all of which the recogniser of transformations sees at once."""
    anneal_steps: Count = 500
    """Steps of training, half of all as a rule, over which the temperature falls to 1; half as many later, flows may
    have unequal shares of a batch."""

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse sequences of another length, too.

        Raises:
            ValueError: what does not fit what.

        """
        super().check_fits(source)
        if source.sequence_length != self.frames:
            raise ValueError(
                f"a recogniser of {self.frames} frames (--frames) does not fit {source.name}, whose sequences have "
                f"{source.sequence_length}"
            )


class WeakFlowVAE(FlowVAE):
    """The flow VAE that is not told the transformations, only that each sequence has one of K, all alike likely.

    The bound takes all K flows, with weights `r` that may be any: those of the evaluation, `softmax_k(L_k)`, make it
    as large as it can be, `logsumexp(L) - log K - KL_0`.

        log p(x_0 ... x_{S-1}) >= E_q Σ_k r_k (L_k - log r_k) - log K - KL_0        L_k = Σ_l log p(x_l|z_l), flow k

    Training takes `r = softmax_k((L_k + b_k) / τ)` as they are, without a gradient, with τ from 10 to 1 and the biases
    `b` that give all flows equal shares of the batch; else the flow that leads first would take all sequences. Batches
    should have at least 4 K of them. A network learns `r` from all frames: it says which flow moves a sequence.

    Args:
        arguments: as those of `VAE`, and the fields of `WeakFlowVAESettings`.

    Raises:
        ValueError: as `VAE`.

    """

    name = "weakflowvae"
    Settings = WeakFlowVAESettings
    told_transformations = False
    one_process: ClassVar[bool] = True  # the shares of the flows are those of the whole batch
    unconstrained: ClassVar[tuple[str, ...]] = ("recogniser",)

    def __init__(self, image_shape: tuple[int, int, int], capsules: int, capsule_dim: int, **arguments):
        super().__init__(image_shape, capsules, capsule_dim, **arguments)
        pixels, values = math.prod(self.image_shape), self.settings
        self.recogniser = MLP(values.frames * pixels, _RECOGNISER, values.transformations)
        self.register_buffer("training_calls", torch.zeros(()))

    def recognised(self, x: Images) -> Float[Tensor, "batch flow"]:
        """Return `log q(k|x)`.

        Raises:
            ValueError: the sequences are of another length than the recogniser was made for.

        """
        if x.shape[1] != self.settings.frames:
            raise ValueError(f"sequences must have {self.settings.frames} frames, got {x.shape[1]}")
        return self.recogniser(x).to(x.dtype).log_softmax(-1)

    def inferred(self, batch: SequenceBatch) -> Axis:
        """Return the most likely flow of each sequence, seen all of its frames."""
        return self.recognised(batch.images).argmax(-1)

    def flow_of(self, batch: SequenceBatch) -> Axis:
        """Return the number of the flow that moves each sequence: the inferred one, whatever its transformation."""
        return self.inferred(batch)

    def moved(self, batch: SequenceBatch, mix: Mix | None = None) -> Capsules:
        """Return the path of the inferred flow from the posterior mean of frame 0, whatever the mix."""
        return super().moved(batch)

    def motions(self, batch: SequenceBatch, steps: int) -> dict[str, Capsules]:
        """Return the path of every flow from the posterior mean of frame 0, and that of the inferred one."""
        inferred = self.walk_along(self.start(batch), steps, self.flow_of(batch))
        return {**super().motions(batch, steps), "flow inferred": self.path(inferred.points)}

    def frames_seen(self, steps: int) -> Tensor:
        """Return that all frames take part in the path of the inferred flow."""
        return torch.ones(steps, dtype=torch.bool)

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the bound with the path of the flow of most weight, its terms, and the penalties'.

        Raises:
            ValueError: training got a part of a batch.

        """
        self.check_whole(batch)
        x, frames = batch.images, batch.images.shape[1]
        (q,) = self.posterior(x)
        walk, likelihoods = self.by_flow(self.drawn(q, batch), x)
        totals = likelihoods.sum(-1)
        log_r = self.balanced(totals) if self.training else totals.log_softmax(0)
        r = log_r.exp()
        costs = {"kl_z": kl_from_prior(q), "kl_k": (r * log_r).sum(0)[:, None] + math.log(len(r))}
        costs = {name: at_first(cost, frames) for name, cost in costs.items()}
        log_likelihood = (r[..., None] * likelihoods).sum(0)
        total = log_likelihood - sum(costs.values())
        t = self.path(chosen(walk.points, r.argmax(0)))
        elbo = ELBO(total, {"log_likelihood": log_likelihood, **costs}, total, t, self.axis(batch))
        if not self.training:
            return elbo
        jacobi = (r * hamilton_jacobi(walk)).sum(0)[:, None].expand(-1, frames)
        cross_entropy = -(r.mT * self.recognised(x)).sum(-1, keepdim=True).expand(-1, frames)
        penalty = self.settings.gamma * jacobi + cross_entropy
        return elbo.penalised(penalty, hamilton_jacobi=jacobi, cross_entropy=cross_entropy)

    def by_flow(self, z: Capsules, x: Images) -> tuple[Walk, Float[Tensor, "flow batch time"]]:
        """Return the walk along every flow from `z_0`, and the log-likelihood of every frame on it."""
        z = z.flatten(1)
        walk = self.walk(z.expand(self.settings.transformations, *z.shape), x.shape[1])
        decoded = self.decode(self.path(walk.points).flatten(0, 1)).unflatten(0, walk.points.shape[:2])
        return walk, self.likelihood.log_prob(decoded, x.expand_as(decoded))

    @torch.no_grad()
    def balanced(self, totals: ByFlow) -> ByFlow:
        """Return `log r` of the next call in training, by the log-likelihoods `L` of whole sequences."""
        progress = self.training_calls / self.settings.anneal_steps
        temperature = _HOTTEST + (1 - _HOTTEST) * progress.clamp(max=1)
        scores = totals / temperature
        fading = (3 - 2 * progress).clamp(0, 1)  # of the biases, which an uneven batch would have split wrongly
        self.training_calls.add_(1)
        return (scores + fading * balance(scores)).log_softmax(0)

    def log_weights(self, batch: SequenceBatch, samples: int) -> Iterator[Frames]:
        """Draw `log p(x|z_0)` and what `z_0` costs `samples` times, in nats, summed over all flows.

        Frame by frame it is that of the likeliest flow; what the others add is at frame 0.
        """
        (q,), x = self.posterior(batch.images), batch.images
        for _ in range(samples):
            z = q.rsample()
            _, likelihoods = self.by_flow(z, x)
            totals = likelihoods.sum(-1)
            others = totals.logsumexp(0) - totals.amax(0) - math.log(len(totals))
            yield chosen(likelihoods, totals.argmax(0)) + at_first(others[:, None] + log_ratio(z, q), x.shape[1])


def balance(scores: ByFlow) -> Float[Tensor, "flow 1"]:
    """Find biases with which the mean of `softmax_k(scores + biases)` over a batch is 1/K, by rounds of corrections."""
    count, batch = scores.shape
    biases = torch.zeros_like(scores[:, :1])
    for _ in range(_ROUNDS):
        shares = (scores + biases).log_softmax(0).logsumexp(1, keepdim=True) - math.log(batch)
        biases = biases - shares - math.log(count)
    return biases
