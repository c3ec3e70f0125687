"""How equivariant capsules are and how likely images: E_eq, CapCorr, ELBO terms and log p(x), with chance levels.

Each metric is a plain function on one batch and a torchmetrics `Metric` over a data set. A chance level is what a model
gets that knows nothing of the individual frame: capsules of iid Gaussian activations for E_eq and CapCorr, the best
single image for likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from tvae_kernels import Neighborhood, roll_capsules

from .models import ELBO, Axis, Bernoulli, Capsules, Gaussian, Images

PLAIN = Neighborhood()  # rolls by one position a frame


def equivariance_error(t: Capsules, rolls: Neighborhood = PLAIN, axis: Axis | None = None) -> Float[Tensor, " batch"]:
    """`E_eq = Σ_{l < m} || Roll_{m-l}(t̂_l) - t̂_m ||₁` of every sequence (Eq. 13), summed over capsules.

    `t̂` is each capsule divided by its Euclidean norm, as in the published code. Zero for capsules that roll as their
    topography says. Where they may roll along one of several axes, the axis counts that is known of the sequence, or
    else the one that gives less error.

    Args:
        t: `(batch, time, capsule, dim)`.
        rolls: the topography, whose rolls `roll_capsules` makes; by default one position a frame.
        axis: along which axis each sequence rolls, where that is known.

    """
    t = F.normalize(t, dim=-1)
    errors = []
    for a in _axes(rolls):
        pairs = (roll_capsules(t[:, :-m], m, rolls, a) - t[:, m:] for m in range(1, t.shape[1]))
        errors.append(sum((difference.abs().sum((1, 2, 3)) for difference in pairs), start=t.new_zeros(len(t))))
    errors = torch.stack(errors)
    return _of_axis(errors, errors.argmin(0) if axis is None else axis)


def _of_axis(values: Tensor, axis: Axis) -> Tensor:
    """From values by axis, `(axes, batch, ...)`, those of one axis for each sequence."""
    return values[axis, torch.arange(len(axis), device=axis.device)]


def _axes(rolls: Neighborhood) -> Sequence[int | None]:
    """Along which axes capsules may roll one at a time; None stands for all together."""
    return range(rolls.root_count) if rolls.root_count > 1 else (None,)


class EquivarianceError(Metric):
    """Mean E_eq over sequences; 0 is perfect. Chance: the same for iid Gaussian activations of the same shape."""

    higher_is_better = False
    full_state_update = False

    def __init__(self, rolls: Neighborhood = PLAIN):
        super().__init__()
        self.rolls = rolls
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.shape = None
        self.axes_known = False

    def update(self, t: Capsules, axis: Axis | None = None) -> None:
        """Add the sequences of a batch of capsules, and along which axis they roll."""
        self.shape, self.axes_known = tuple(t.shape[1:]), axis is not None
        self.total += equivariance_error(t, self.rolls, axis).double().sum()
        self.sequences += len(t)

    def compute(self) -> Tensor:
        """The mean over all sequences."""
        return self.total / self.sequences

    def chance(self) -> float:
        """E_eq of iid Gaussian activations, measured on 64 seeded sequences; along their axes in turn if known."""
        t = torch.randn(64, *self.shape, generator=_generator(0))
        axis = torch.arange(len(t)) % self.rolls.root_count if self.axes_known else None
        return equivariance_error(t, self.rolls, axis).mean().item()


def observed_roll(
    first: Float[Tensor, "batch capsule dim"], t: Capsules, rolls: Neighborhood = PLAIN, axis: Axis | None = None
) -> Int[Tensor, "batch time"]:
    """By how many time steps `first` has to roll back to match each frame of `t` best (Eq. 14, 16 and 20).

    The one with the largest product `Σ_d Roll_{-k}(first)[d] · t[d]`, the most frequent one (on a tie the smallest)
    over the capsules. Candidates are the steps of one round: D of them for one position a step, D / α for α of one.
    Where capsules may roll along one of several axes, the axis counts that is known of the sequence, or else the one
    whose winner has the larger product.

    Capsules that are not circular cannot roll back: a roll forward by m steps of a round of R counts as R - m. Theirs
    is the one with the least mean squared difference over the positions that come from within the capsule. (That of the
    largest product where nothing comes from outside; elsewhere the product of more positions would win.)
    """
    best = []
    for a in _axes(rolls):
        steps = _steps_of_a_round(rolls, a, t)
        if rolls.capsule_boundary == "circular":
            rolled_back = [roll_capsules(first, -k, rolls, a) for k in range(steps)]
            match = torch.einsum("bckd,bscd->bsck", torch.stack(rolled_back, dim=-2), t)
        else:
            forward = [_closeness(first, t, m, rolls, a) for m in (0, *range(steps - 1, 0, -1))]
            match = torch.stack(forward, dim=-1)
        votes = F.one_hot(match.argmax(-1), steps).sum(-2).argmax(-1)
        best.append((match.sum(2).gather(-1, votes[..., None]).squeeze(-1), votes))
    scores, votes = (torch.stack(x) for x in zip(*best, strict=True))
    if axis is not None:
        return _of_axis(votes, axis)
    return votes.gather(0, scores.argmax(0, keepdim=True)).squeeze(0)


def _closeness(
    first: Tensor, t: Capsules, steps: int, rolls: Neighborhood, axis: int | None
) -> Float[Tensor, "batch time capsule"]:
    """Minus the mean squared difference of the rolled `first` and `t`, over positions that come from within."""
    # What is interpolated with a 0 from outside is not inside.
    inside = roll_capsules(torch.ones_like(first[0]), steps, rolls, axis) > 1 - 1e-6
    difference = (roll_capsules(first, steps, rolls, axis).unsqueeze(1) - t) * inside
    count = inside.sum(-1)
    return (-difference.square().sum(-1) / count).masked_fill(count == 0, -torch.inf)


def _steps_of_a_round(rolls: Neighborhood, axis: int | None, t: Capsules) -> int:
    """Time steps until capsules are where they were; the length of the sequence if axes or capsules differ in that."""
    if rolls.speeds is not None or (rolls.is_multidimensional and axis is None):
        return t.shape[1]
    shift, dim = (rolls.shift, t.shape[-1]) if axis is None else (rolls.shift[axis], rolls.axes[axis])
    return dim // math.gcd(dim, shift) if isinstance(shift, int) else max(1, round(dim / abs(shift)))


def roll_since_canonical(
    t: Capsules,
    factors: Int[Tensor, "batch time factor"],
    transformation: Int[Tensor, " batch"],
    rolls: Neighborhood = PLAIN,
    axis: Axis | None = None,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Observed and true roll between frame 0 and the frame where the transforming factor is at index 0.

    Where several frames are, because the factor runs through its values more than once, the one counts whose observed
    roll is nearest to the true one (appendix A.11), which raises chance for such a factor.

    Raises:
        ValueError: a sequence never passes its canonical pose.

    """
    moving = factors.gather(2, transformation[:, None, None].expand(-1, factors.shape[1], 1)).squeeze(2)
    canonical = moving == 0
    if not canonical.any(1).all():
        raise ValueError("CapCorr needs sequences in which the transforming factor passes index 0")
    true = moving[:, 0]
    observed = observed_roll(t[:, 0], t, rolls, axis)
    distance = (
        (observed - true[:, None]).abs().masked_fill(~canonical, observed.amax().item() + moving.amax().item() + 1)
    )
    nearest = distance.argmin(1, keepdim=True)
    return observed.gather(1, nearest).squeeze(1), true


class CapCorr(Metric):
    """Pearson correlation of observed and true roll over all sequences, by transformation (Eq. 17); 1 is perfect.

    Chance: the same for iid Gaussian activations in place of the capsules, on the same sequences.

    Args:
        names: the names of the factors, in the order of the factor indices.
        rolls: the topography, as in `equivariance_error`.

    """

    higher_is_better = True
    full_state_update = False

    def __init__(self, names: Sequence[str], rolls: Neighborhood = PLAIN):
        super().__init__()
        self.names, self.rolls = tuple(names), rolls
        for state in ("observed", "random", "true", "transformation"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, t: Capsules, factors: Tensor, transformation: Tensor, axis: Axis | None = None) -> None:
        """Add the sequences of a batch: capsules, the truth about their factors, and along which axis they roll."""
        observed, true = roll_since_canonical(t, factors, transformation, self.rolls, axis)
        noise = torch.randn(t.shape, generator=_generator(len(self.true))).to(t.device)
        random, _ = roll_since_canonical(noise, factors, transformation, self.rolls, axis)
        for state, values in zip(
            (self.observed, self.random, self.true, self.transformation),
            (observed, random, true, transformation),
            strict=True,
        ):
            state.append(values)

    def compute(self) -> dict[str, float]:
        """The correlation for every transformation that occurred, by name; NaN where a roll never varied."""
        return self._correlations(self.observed)

    def chance(self) -> dict[str, float]:
        """The correlation that random activations reach."""
        return self._correlations(self.random)

    def _correlations(self, observed: list[Tensor] | Tensor) -> dict[str, float]:
        observed, true, kind = map(dim_zero_cat, (observed, self.true, self.transformation))
        return {
            self.names[k]: torch.corrcoef(torch.stack([observed[kind == k], true[kind == k]]).double())[0, 1].item()
            for k in kind.unique().tolist()
        }


class ELBOTerms(Metric):
    """The mean terms of the evidence lower bound in nats a frame, by name.

    Chance: `BestSingleImage` for "elbo" and "log_likelihood"; 0 for the divergences, of a posterior that is the prior.
    """

    full_state_update = False
    terms = ("elbo", "log_likelihood", "kl_z", "kl_u")

    def __init__(self):
        super().__init__()
        self.add_state("totals", torch.zeros(len(self.terms), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, elbo: ELBO) -> None:
        """Add the frames of a batch."""
        terms = (elbo.total, elbo.log_likelihood, elbo.kl_z, elbo.kl_u)
        self.totals += torch.stack([term.double().sum() for term in terms])
        self.frames += elbo.kl_z.numel()

    def compute(self) -> dict[str, float]:
        """The mean of every term over all frames."""
        return dict(zip(self.terms, (self.totals / self.frames).tolist(), strict=True))


def log_likelihood(
    log_weights: Float[Tensor, "sample batch time"],
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, " batch"]]:
    """Two importance-sampling estimates of log p(x) in nats from `VAE.log_weights`, as published and as a bound.

    Returns:
        `log Σ w` of every frame, each weighted by its own latents alone and without `-log n`, as the published code has
        it: `log n` nats higher than an estimate. And `(log Σ w - log n) / S` of every sequence, the weights of its S
        frames multiplied: a lower bound of log p(x) per frame on average (Burda et al. 2016).

    """
    samples, _, steps = log_weights.shape
    published = log_weights.logsumexp(0)
    bound = (log_weights.sum(2).logsumexp(0) - math.log(samples)) / steps
    return published, bound


class LogLikelihood(Metric):
    """Mean log p(x) in nats a frame in both forms of `log_likelihood`: "published" and "bound".

    Chance: `BestSingleImage`.
    """

    higher_is_better = True
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_weights: Float[Tensor, "sample batch time"]) -> None:
        """Add the sequences of a batch."""
        published, bound = log_likelihood(log_weights)
        self.totals += torch.stack([published.mean(1).double().sum(), bound.double().sum()])
        self.sequences += log_weights.shape[1]

    def compute(self) -> dict[str, float]:
        """The two means over all sequences."""
        return dict(zip(("published", "bound"), (self.totals / self.sequences).tolist(), strict=True))


class BestSingleImage(Metric):
    """Chance level of likelihoods: mean log p(x) in nats a frame when the mean image is predicted for every frame.

    Args:
        likelihood: the model's likelihood.
        image_shape: `(channel, height, width)`.

    """

    full_state_update = False

    def __init__(self, likelihood: Bernoulli | Gaussian, image_shape: tuple[int, int, int]):
        super().__init__()
        self.likelihood = likelihood
        self.add_state("sums", torch.zeros(2, *image_shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("frames", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Images) -> None:
        """Add the frames of a batch."""
        images = images.flatten(0, 1).double()
        self.sums += torch.stack([images.sum(0), images.square().sum(0)])
        self.frames += len(images)

    def compute(self) -> float:
        """The mean log-likelihood of a frame."""
        return self.likelihood.chance(*(self.sums / self.frames))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
