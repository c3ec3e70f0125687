"""The VAE that divides what an image shows into a class, a variation of it, and a pose on a Lie group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ..data import SequenceBatch, SequenceSource
from ..settings import Count, Number, Whole, settings
from .base import ELBO, Identified, ModelSettings
from .group import DIMENSIONS, exp, warped
from .layers import MLP, STANDARD_NORMAL, Axis, Capsules, Frames, Images, exact
from .vae import VAE
from .weak_flow_vae import balance

_TEMPERATURE = 10.0  # of the responsibilities of prototypes, whose likelihoods differ by some 50 nats
_SPREAD = 0.7  # of the means of the clusters at the start; further apart, one would take all
_SHIFT, _GROWTH = 0.25, 0.25  # standard deviations: of shifts in half images, and of the logarithm of a size
_OTHER_MOTIONS = ("shifted in x", "shifted in y", "grown")  # than turns, in the order of a group's numbers

ByStart = Float[Tensor, "*batch start number"]  # values for every start of the pose


@settings
class ClusterVAESettings(ModelSettings):
    """Settings of the ClusterVAE."""

    capsules: Count = 1
    """Number of capsules C that all numbers are laid out in, which has no meaning here."""
    capsule_dim: Count = 15
    """Numbers in a capsule: those of the class, of its variation, of the pose, and one of where the pose starts."""
    group: Literal["SO(2)", "SE(2)", "Sim(2)"] = "SO(2)"
    """Poses: turns; turns and shifts; turns, shifts and sizes."""
    clusters: Count = 10
    """Number K of clusters."""
    code: Count = 10
    """Numbers that the class is coded in."""
    starts: Count = 6
    """Angles on a half circle that the posterior of the pose starts from, all of which are tried."""
    units: Annotated[Whole, Field(ge=2)] = 512
    """Units of the larger hidden layer of the encoder and the decoder; the other has half as many."""
    gamma: Annotated[Number, Field(ge=0)] = 0.1
    """Weight of the difference of two poses of the same example; 0 is off."""
    balance: Annotated[Number, Field(ge=0)] = 2.0
    """Weight of what the cluster in one pose does not say of that in another, in nats; 0 is off."""
    prototypes: Annotated[Number, Field(ge=0)] = 0.2
    """Weight of how unlikely images out of their poses are by what the means of clusters show, in nats; 0 is off."""
    agreement: Annotated[Number, Field(ge=0)] = 5.0
    """Weight of the cross-entropy of a code's clusters with those whose means show an example best; 0 is off."""
    warm_steps: Count = 1000
    """Steps of training, a third of all as a rule, over which the weight of the divergences grows to 1."""

    def __post_init__(self):
        taken = self.code + DIMENSIONS[self.group] + 1
        if self.capsules * self.capsule_dim < taken:
            raise ValueError(
                f"capsules of {self.capsules} x {self.capsule_dim} numbers are too few for {self.code} of the class, "
                f"{DIMENSIONS[self.group]} of {self.group} and 1 of the start"
            )

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse images that are not square, and, where poses are compared, sequences of one frame.

        Raises:
            ValueError: what does not fit what.

        """
        if self.gamma and source.sequence_length < 2:
            raise ValueError(
                f"a ClusterVAE compares poses in sequences of at least 2 frames, those of {source.name} have 1; "
                "set gamma to 0 (--gamma)"
            )


class ClusterVAE(VAE):
    """A VAE of clusters and poses, after Bajaj et al. (2021, arXiv 2107.11717), with the mixture that they speak of.

        c ~ Cat(1/K)   z_c|c ~ N(a_c, I)   z_v ~ N(0, I)   r ~ Cat(1/R)   τ ~ N(0, Σ)
        y = decoder(z_c, z_v)   x(p) ~ p(y(exp(τ) exp(θ_r) p))

    A canonical image y, of a class and a variation of it, is moved by a pose on a Lie group. The means `a` of the
    clusters are learned, and the sum over them is exact. So is the one over R starts of the pose, angles `θ_r` on a
    half circle: an image is turned back by each of them, and one encoder sees all that this gives.

        log p(x) >= E_q logsumexp_r (log p(x|z, τ, r) - KL_c - KL_v - KL_τ) - log R
        KL_c = log q(z_c) - log Σ_c N(z_c; a_c, I) / K, of the sample

    Training warms the divergences up, and subtracts for adjacent frames, which show one example in two poses,

        balance · (log K - I(c; c')), of the clusters of both over the batch, by p(c|z_c) at the posterior means m_c
        prototypes · -Σ_c s_c L_c, with L_c = log p(x'|decoder(a_c, 0)), the image x' being x turned back, held still
        agreement · -Σ_c s_c log p(c|m_c)
        gamma · (|m_c - m_c'|² + |m_v - m_v'|² + (BCE(y, y') + BCE(y', y)) / 2), the second image being held still

    The information `I = H(c) - H(c|c')` is log K where clusters have equal shares, are certain and do not change with
    the pose; without it one cluster takes all. What a cluster's mean shows is a prototype, and `s` are the
    responsibilities of prototypes for an example, `softmax_c(mean of L_c over its frames / 10 + b_c)`, held still, with
    the biases b that give all equal shares of the batch: k-means of what is out of its pose, by pixels, which the codes
    learn. A capsule is `(z_c, z_v, τ, θ_r)` of the best start, and does not roll.

    Args:
        image_shape: `(channel, height, width)` of a frame, which is square.
        capsules: with `capsule_dim`, how many numbers there are: `code` of the class, those of the group, one for the
            start, and all others of the variation.
        capsule_dim: see `capsules`.
        z_encoder: from frames `(N, channel, height, width)` to means and log-variances `(N, 2·(C·D - 1))`; None is an
            MLP.
        decoder: from `(z_c, z_v)`, `(N, numbers)`, to the pixels of canonical frames; None is an MLP.
        values: other fields of `ClusterVAESettings`.

    Raises:
        ValueError: a setting has a wrong value, or images are not square.

    """

    name = "clustervae"
    Settings = ClusterVAESettings
    one_process: ClassVar[bool] = True  # the shares of clusters are those of the whole batch

    def __init__(self, image_shape: tuple[int, int, int], capsules: int = 1, capsule_dim: int = 15, **arguments):
        super().__init__(image_shape, capsules, capsule_dim, **arguments)
        if self.image_shape[1] != self.image_shape[2]:
            raise ValueError(f"images that are turned must be square, got {self.image_shape}")
        self.rolls = None
        values = self.settings
        self.means = nn.Parameter(_SPREAD * torch.randn(values.clusters, values.code))
        share = math.pi / values.starts  # of the half circle
        self.register_buffer("angles", (torch.arange(values.starts) + 0.5) * share - math.pi / 2)
        spread = torch.tensor([share / math.sqrt(12), _SHIFT, _SHIFT, _GROWTH])  # the first is that within a share
        self.register_buffer("spread", spread[: self.sizes[-1]])
        self.register_buffer("training_calls", torch.zeros(()))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return how many numbers z_c, z_v and τ have."""
        size, pose = math.prod(self.capsule_shape) - 1, DIMENSIONS[self.settings.group]
        return self.settings.code, size - self.settings.code - pose, pose

    def mlp_encoder(self, outputs: int) -> MLP:
        """Make the encoder, which says nothing of the start."""
        pixels, units = math.prod(self.image_shape), self.settings.units
        return MLP(pixels, units, units // 2, outputs - 2, weights=self.settings.weights)

    def mlp_decoder(self) -> MLP:
        """Make the decoder of the class and its variation."""
        pixels, units = math.prod(self.image_shape), self.settings.units
        return MLP(sum(self.sizes[:2]), units // 2, units, pixels, weights=self.settings.weights)

    # --- what the model is made of ------------------------------------------------------------------------------------

    def by_start(self, x: Images) -> Normal:
        """Return `q(z_c, z_v, τ|x, r)` for every start r, `(B, S, R, n)`; τ in standard deviations of its prior.

        Raises:
            ValueError: the images have another shape than the model's.

        """
        if x.ndim != 5 or x.shape[2:] != self.image_shape:
            raise ValueError(f"x must be (batch, time, {', '.join(map(str, self.image_shape))}), got {tuple(x.shape)}")
        starts = len(self.angles)
        with exact(x):
            frames = x.flatten(0, 1).repeat_interleave(starts, 0)
            turned_back = warped(frames, exp(-self.angles[:, None]).repeat(len(frames) // starts, 1, 1))
        parameters = self.z_encoder(turned_back).to(x.dtype).unflatten(0, (*x.shape[:2], starts))
        mean, log_variance = parameters.chunk(2, -1)
        return Normal(mean, (0.5 * log_variance).exp(), validate_args=False)

    def with_start(self, h: ByStart) -> ByStart:
        """Append to the latent variables of every start its angle, which makes them capsules."""
        return torch.cat((h, self.angles.to(h.dtype)[:, None].expand(*h.shape[:-1], 1)), -1)

    def canonical(self, z: Float[Tensor, "*batch number"]) -> Float[Tensor, "*batch channel height width"]:
        """Return the expected canonical images of numbers of which the first are `(z_c, z_v)`."""
        z = z[..., : sum(self.sizes[:2])]
        y = self.decoder(z.flatten(0, -2)).flatten(1).to(z.dtype).unflatten(-1, self.image_shape)
        return self.likelihood.mean(y).unflatten(0, z.shape[:-1])

    def posed(self, y: Tensor, t: Float[Tensor, "*batch number"]) -> Float[Tensor, "*batch channel height width"]:
        """Return canonical images in the poses of their capsules, as a decoder would give them."""
        *_, pose, start = t.split((*self.sizes, 1), -1)
        with exact(t):
            motion = exp(pose * self.spread) @ exp(start)  # in float64, of three terms
            moved = warped(y.flatten(0, -4), motion.flatten(0, -3)).view(y.shape)
            return self.likelihood.inverted(moved)

    def decode(self, t: Capsules) -> Images:
        """Return what is decoded for every frame: logits (Bernoulli) or means (Gaussian)."""
        t = t.flatten(2)
        return self.posed(self.canonical(t), t)

    def log_densities(self, code: Float[Tensor, "*batch number"]) -> Float[Tensor, "*batch cluster"]:
        """Return `log N(z_c; a_c, I)` of every cluster."""
        return STANDARD_NORMAL.log_prob(code[..., None, :] - self.means).sum(-1)

    def log_prior(self, h: ByStart) -> Float[Tensor, "*batch number"]:
        """Return the logarithms of the prior: of z_c, summed over all clusters, and of each number of z_v and τ."""
        code, others = h[..., : self.settings.code], h[..., self.settings.code :]
        of_code = self.log_densities(code).logsumexp(-1, keepdim=True) - math.log(len(self.means))
        return torch.cat((of_code, STANDARD_NORMAL.log_prob(others)), -1)

    def costs(self, q: Normal, h: ByStart) -> dict[str, Float[Tensor, "batch time start"]]:
        """Return what values of the latent variables cost, in nats: z_c by the values, the others on average."""
        code, variation, _ = self.sizes
        kl_c = q.log_prob(h)[..., :code].sum(-1) - self.log_prior(h)[..., 0]
        others = kl_divergence(q, STANDARD_NORMAL)
        return {
            "kl_c": kl_c,
            "kl_v": others[..., code : code + variation].sum(-1),
            "kl_pose": others[..., code + variation :].sum(-1),
        }

    def likelihoods(self, y: Tensor, h: ByStart, x: Images) -> Float[Tensor, "batch time start"]:
        """Return `log p(x|z, τ, r)` of the canonical images of every start."""
        decoded = self.posed(y, self.with_start(h))
        return self.likelihood.log_prob(decoded, x[:, :, None].expand_as(decoded))

    # --- what is asked of it ------------------------------------------------------------------------------------------

    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the bound of every frame, its terms, and in training the penalty's.

        Raises:
            ValueError: training got a part of a batch.

        """
        self.check_whole(batch)
        warmth = self.warmth() if self.training else 1.0
        q = self.by_start(batch.images)
        h = self.drawn(q, batch)
        y = self.canonical(h)
        likelihoods, costs = self.likelihoods(y, h, batch.images), self.costs(q, h)
        cost = sum(costs.values())
        log_r = (likelihoods - cost).log_softmax(-1)
        r, best = log_r.exp(), log_r.argmax(-1)
        terms = {name: (r * x).sum(-1) for name, x in costs.items()}
        terms["kl_start"] = (r * log_r).sum(-1) + math.log(len(self.angles))
        log_likelihood = (r * likelihoods).sum(-1)
        total = log_likelihood - sum(terms.values())
        t = chosen(self.with_start(h), best).unflatten(-1, self.capsule_shape)
        elbo = ELBO(total, {"log_likelihood": log_likelihood, **terms}, total, t)
        if not self.training:
            return elbo
        warmed = (likelihoods - warmth * cost).logsumexp(-1) - math.log(len(self.angles))
        m = chosen(q.mean, best)
        unlikely, disagreement = self.taught(batch.images, m, self.angles[best])
        terms = {
            "uninformed": self.uninformed(m).expand_as(total),
            "prototypes": unlikely,
            "disagreement": disagreement,
            "difference": self.difference(m, chosen(y, best)),
        }
        values = self.settings
        weights = values.balance, values.prototypes, values.agreement, values.gamma
        penalty = total - warmed + sum(w * term for w, term in zip(weights, terms.values(), strict=True))
        return elbo.penalised(penalty, **terms)

    # Compiled with its use, the backward pass would compute the weight anew, from what the count is after this call.
    @torch.compiler.disable
    @torch.no_grad()
    def warmth(self) -> Tensor:
        """Return the weight of the divergences in the next call in training."""
        weight = (self.training_calls / self.settings.warm_steps).clamp(max=1)
        self.training_calls.add_(1)
        return weight

    def uninformed(self, m: Float[Tensor, "batch time number"]) -> Float[Tensor, ""]:
        """Return `log K - I(c; c')` of adjacent frames over the batch, in nats; of a lone frame with itself."""
        r = self.log_densities(m[..., : self.settings.code]).softmax(-1)
        pairs = (r, r) if r.shape[1] == 1 else (r[:, :-1], r[:, 1:])
        first, second = (x.flatten(0, 1) for x in pairs)
        with exact(r):
            joint = first.mT @ second / len(first)
        joint = (joint + joint.mT) / 2  # which frame comes first means nothing
        share = joint.sum(0)
        return math.log(len(share)) - 2 * entropy(share) + entropy(joint)

    def taught(self, x: Images, m: Float[Tensor, "batch time number"], start: Frames) -> tuple[Frames, Frames]:
        """Return how unlikely images out of their poses are by prototypes, and what codes pay for other clusters."""
        code, _, pose = m.split(self.sizes, -1)
        with torch.no_grad(), exact(x):
            back = exp(-start[..., None]) @ exp(-pose * self.spread)
            unposed = warped(x.flatten(0, 1), back.flatten(0, 1)).view(x.shape)[:, :, None]
        prototypes = self.likelihood.inverted(self.canonical(F.pad(self.means, (0, self.sizes[1]))))
        shape = (*x.shape[:2], *prototypes.shape)
        likelihoods = self.likelihood.log_prob(prototypes.expand(shape), unposed.expand(shape))
        scores = likelihoods.detach().mean(1).mT / _TEMPERATURE  # of all frames, which show one example
        s = (scores + balance(scores)).softmax(0).mT[:, None]
        return -(s * likelihoods).sum(-1), -(s * self.log_densities(code).log_softmax(-1)).sum(-1)

    def difference(self, m: Float[Tensor, "batch time number"], y: Images) -> Frames:
        """Return how posterior means and canonical images of each frame differ from those of the frame before."""
        frames = y.shape[1]
        change = m[..., : sum(self.sizes[:2])].diff(dim=1).square().sum(-1)
        logits, still = self.likelihood.inverted(y), y.detach()
        for a, b in ((logits[:, :-1], still[:, 1:]), (logits[:, 1:], still[:, :-1])):
            change = change - self.likelihood.log_prob(a, b) / 2
        # There is a pair less than there are frames, and what training takes is a mean over frames.
        return F.pad(change * (frames / max(1, frames - 1)), (1, 0))

    def typical(self, x: Images) -> tuple[ByStart, Normal]:
        """Return the posterior means, and the posteriors, of the start that is best at the means, `(B, S, n + 1)`."""
        q = self.by_start(x)
        bounds = self.likelihoods(self.canonical(q.mean), q.mean, x) - sum(self.costs(q, q.mean).values())
        best = bounds.argmax(-1)
        return chosen(self.with_start(q.mean), best), chosen(q.stddev, best)

    def posterior(self, x: Images) -> tuple[Normal]:
        """Return the posterior of the best start, `(B, S, C, D)`, in which that is certain."""
        mean, stddev = self.typical(x)
        return (
            Normal(*(p.unflatten(-1, self.capsule_shape) for p in (mean, F.pad(stddev, (0, 1)))), validate_args=False),
        )

    def identified(self, batch: SequenceBatch) -> Identified:
        """Say what examples the frames show, apart from their poses."""
        t, _ = self.typical(batch.images)
        code, _, pose, start = t.split((*self.sizes, 1), -1)
        angle = (start[..., 0] + pose[..., 0] * self.spread[0]).rad2deg()
        cluster = self.log_densities(code).argmax(-1)
        return Identified(cluster, len(self.means), code, angle, self.canonical(t))

    def motions(self, batch: SequenceBatch, steps: int) -> dict[str, Capsules]:
        """Return the capsules of frame 0, turned once around, and moved there and back along all else of the group.

        A turn is of the start, each other motion of its number in τ, by up to two standard deviations of its prior.
        """
        t, _ = self.typical(batch.images[:, :1])
        turn = 2 * math.pi * torch.arange(steps, dtype=t.dtype, device=t.device) / steps
        first, moves = sum(self.sizes[:2]), {"turned": (turn, -1)}
        for i, name in enumerate(_OTHER_MOTIONS[: self.sizes[2] - 1], 1):
            moves[name] = 2 * turn.sin(), first + i
        paths = {}
        for name, (move, number) in moves.items():
            path = t.repeat(1, steps, 1)
            path[..., number] += move
            paths[name] = path.unflatten(-1, self.capsule_shape)
        return paths

    def traversals(self, batch: SequenceBatch) -> dict[str, Images]:
        """Return the canonical image of every frame, and that of the mean of its cluster."""
        found = self.identified(batch)
        means = F.pad(self.means, (0, self.sizes[1]))
        return {"canonical": found.canonical, "cluster": self.canonical(means)[found.cluster]}

    def log_weights(self, batch: SequenceBatch, samples: int) -> Iterator[Frames]:
        """Draw `log p(x|z, τ, r)` and what `z` and τ cost `samples` times, in nats, summed over all starts."""
        q = self.by_start(batch.images)
        for _ in range(samples):
            h = q.rsample()
            ratio = self.log_prior(h).sum(-1) - q.log_prob(h).sum(-1)
            weights = self.likelihoods(self.canonical(h), h, batch.images) + ratio
            yield weights.logsumexp(-1) - math.log(len(self.angles))

    def sample(self, sequences: int, time: int, axis: Axis | None = None) -> Images:
        """Draw images of `sequences` sequences of `time` frames from the prior, each by itself, on its device."""
        size, here = (sequences, time), self.means.device
        h = torch.randn(*size, sum(self.sizes), device=here)
        h[..., : self.settings.code] += self.means[torch.randint(len(self.means), size, device=here)]
        start = self.angles[torch.randint(len(self.angles), size, device=here)]
        t = torch.cat((h, start[..., None]), -1)
        return self.likelihood.mean(self.decode(t.unflatten(-1, self.capsule_shape)))


def chosen(x: Float[Tensor, "batch time start *other"], start: Int[Tensor, "batch time"]) -> Tensor:
    """Take what belongs to one start of each frame, `(batch, time, *other)`."""
    index = start.view(*start.shape, *[1] * (x.ndim - 2))
    return x.take_along_dim(index, 2).squeeze(2)


def entropy(p: Tensor) -> Float[Tensor, ""]:
    """Return `-Σ p log p`, with 0 for `p = 0`."""
    return -torch.xlogy(p, p).sum()
