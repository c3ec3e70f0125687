"""The Topographic VAE of Keller & Welling (2021) and the models it is compared with: BubbleVAE and VAE.

A sequence of images `x` is encoded frame by frame into Gaussian posteriors of `z` (and of `u`); the topographic layer
turns samples of both into capsules `t`; each frame of `t` is decoded into an image:

    x (B, S, c, h, w)  ->  q(z|x), q(u|x)  ->  z, u (B, S, C, D)  ->  t (B, S, C, D)  ->  p(x|t)

Latent variables are arranged as `(batch B, time S, capsule C, dim D)` throughout.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils.parametrizations import weight_norm

from tvae_kernels import Latents, Neighborhood, TopographicLayer, roll_capsules

from .files import replacing

Images = Float[Tensor, "batch time channel height width"]
Capsules = Float[Tensor, "batch time capsule dim"]
Parameters = Float[Tensor, "batch time 2 capsule dim"]  # means and log-variances
Frames = Float[Tensor, "batch time"]
Axis = Int[Tensor, " batch"]  # along which axis of the capsules each sequence rolls, for models that are told


class ELBO(NamedTuple):
    """The evidence lower bound of Eq. 12, frame by frame, in nats, by its terms.

    `t` is the sample that it was taken at, `axis` what the model was told of it.
    """

    log_likelihood: Frames
    kl_z: Frames
    kl_u: Frames
    t: Capsules
    axis: Axis | None = None

    @property
    def total(self) -> Frames:
        """`log p(x|t) - KL(q(z|x) || p(z)) - KL(q(u|x) || p(u))` of every frame."""
        return self.log_likelihood - self.kl_z - self.kl_u


class Bernoulli(NamedTuple):
    """Pixels as Bernoulli variables whose logits the decoder gives; grey values count as probabilities."""

    def log_prob(self, decoded: Images, x: Images) -> Frames:
        """`log p(x|t)` summed over the pixels of every frame, in nats."""
        return -F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum((-3, -2, -1))

    def mean(self, decoded: Images) -> Images:
        """The expected image, in [0, 1]."""
        return torch.sigmoid(decoded)

    def chance(self, mean: Tensor, mean_square: Tensor) -> float:
        """Mean log-likelihood of frames, in nats, under the best single image: one that knows pixel means alone."""
        return (torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum().item()


class Gaussian(NamedTuple):
    """Pixels as Gaussian variables whose means the decoder gives, with one fixed standard deviation."""

    std: float = 1.0

    def log_prob(self, decoded: Images, x: Images) -> Frames:
        """`log p(x|t)` summed over the pixels of every frame, in nats."""
        return Normal(decoded, self.std).log_prob(x).sum((-3, -2, -1))

    def mean(self, decoded: Images) -> Images:
        """The expected image."""
        return decoded

    def chance(self, mean: Tensor, mean_square: Tensor) -> float:
        """Mean log-likelihood of frames, in nats, under the best single image: one that knows pixel means alone."""
        variance = mean_square - mean.square()
        return (-variance / (2 * self.std**2) - math.log(self.std * math.sqrt(2 * math.pi))).sum().item()


LIKELIHOODS = {"bernoulli": Bernoulli, "gaussian": Gaussian}


@torch.no_grad()
def project(layer: nn.Linear) -> nn.Linear:
    """Scale every row of a layer's weights to norm 1, in place: the projection of projected gradient descent."""
    layer.weight.copy_(F.normalize(layer.weight, dim=1))
    return layer


# What becomes of a freshly initialised layer, by the constraint on the rows of its weights (appendix A.8).
WEIGHTS = {"free": lambda layer: layer, "normalised": weight_norm, "projected": project}


class VAE(nn.Module):
    """The baseline without topography: `t = z`, divided into capsules for the metrics alone.

    Three-layer ReLU networks with hidden layers of 3n and 2n units for n = C·D latent variables, weights and biases
    initialised from U(±1/sqrt(fan-in)) (appendix A.2 and A.3).

    Args:
        image_shape: `(channel, height, width)` of a frame.
        capsules: number of capsules C.
        capsule_dim: number of dimensions D of a capsule.
        likelihood: "bernoulli" (images in [0, 1]) or "gaussian" (unit variance).
        weights: the rows of every layer's weights are "free", "normalised" (weight normalisation: `g · v / ||v||` with
            trainable `g` and `v`, Eq. 15) or "projected" (norm 1, which `project_weights` restores after a step).

    Raises:
        ValueError: the likelihood or the kind of weights is unknown, or a size is not positive.

    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        capsules: int,
        capsule_dim: int,
        likelihood: str = "bernoulli",
        weights: str = "free",
    ):
        super().__init__()
        for name, value, choices in (("likelihood", likelihood, LIKELIHOODS), ("weights", weights, WEIGHTS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if min(*image_shape, capsules, capsule_dim) < 1:
            raise ValueError(f"sizes must be positive, got image {image_shape}, {capsules} capsules of {capsule_dim}")
        self.settings = {
            "image_shape": tuple(image_shape),
            "capsules": capsules,
            "capsule_dim": capsule_dim,
            "likelihood": likelihood,
            "weights": weights,
        }
        self.image_shape = tuple(image_shape)
        self.capsule_shape = (capsules, capsule_dim)
        self.likelihood = LIKELIHOODS[likelihood]()
        pixels, n = math.prod(image_shape), capsules * capsule_dim
        self.rolls = Neighborhood()  # how capsules move: one position a frame, whatever a model without topography does
        self.told_axis = False  # whether the model is told along which axis each sequence rolls
        self.frames_before = 0  # frames of `u` before the first of `z`
        self.z_encoder = mlp(pixels, 3 * n, 2 * n, 2 * n, weights=weights)
        self.decoder = mlp(n, 2 * n, 3 * n, pixels, weights=weights)

    def topography(self, z: Capsules, u: Capsules | None, axis: Axis | None = None) -> Capsules:
        """The capsules `t` from their Gaussian variables; without topography `t = z`."""
        return z

    def told(self, axis: Axis) -> Axis | None:
        """What the methods of this model take as `axis`: nothing, unless it is to be told."""
        return axis if self.told_axis else None

    def posterior(self, x: Images) -> tuple[Normal, Normal | None]:
        """`q(z|x)` and `q(u|x)`, each of shape `(B, S, C, D)`; None for a model without `u`."""
        return gaussian(self._encoded(self.z_encoder, x, self.capsule_shape)), None

    def _encoded(self, encoder: nn.Module, x: Images, shape: tuple[int, int]) -> Parameters:
        if x.ndim != 5 or x.shape[2:] != self.image_shape:
            raise ValueError(f"x must be (batch, time, {', '.join(map(str, self.image_shape))}), got {tuple(x.shape)}")
        # Under autocast the encoder gives bfloat16, in which noise would be other noise and the divergence cancel.
        return encoder(x.flatten(2)).to(x.dtype).unflatten(-1, (2, *shape))

    def latents(self, x: Images, first: int = 0, of: int | None = None, axis: Axis | None = None) -> Latents:
        """`t` at a sample of the posterior, and the KL terms; the other arguments as in `forward`."""
        q, _ = self.posterior(x)
        noise = torch.randn(len(x) if of is None else of, *q.mean.shape[1:], dtype=q.mean.dtype, device=x.device)
        kl = kl_from_prior(q)
        return Latents(q.mean + noise[first : first + len(x)] * q.stddev, kl, torch.zeros_like(kl))

    def encode(self, x: Images, sample: bool = True, axis: Axis | None = None) -> Capsules:
        """The capsules of a sequence: `t` at a sample of the posterior, or where `z` and `u²` have their means.

        (Not where `u` has its mean: a `u` as broad as its prior would then count as 0, and divide by next to nothing.)
        """
        qz, qu = self.posterior(x)
        if sample:
            return self.topography(qz.rsample(), None if qu is None else qu.rsample(), axis)
        return self.topography(qz.mean, None if qu is None else (qu.mean.square() + qu.variance).sqrt(), axis)

    def decode(self, t: Capsules) -> Images:
        """The decoder's output for every frame: logits (Bernoulli) or means (Gaussian)."""
        return self.decoder(t.flatten(2)).unflatten(-1, self.image_shape)

    def forward(self, x: Images, first: int = 0, of: int | None = None, axis: Axis | None = None) -> ELBO:
        """One sample of the evidence lower bound of every frame (Eq. 12), by its terms.

        Args:
            x: sequences.
            first: number of the first of them in a batch that several processes share,
            of: and how many sequences that batch has. Processes whose generators are in one state then draw for all of
                it the noise that a single process would.
            axis: along which axis of the capsules each sequence rolls, for a model that is told, and for no other.

        """
        t, kl_z, kl_u = self.latents(x, first, of, axis)
        log_likelihood = self.likelihood.log_prob(self.decode(t), x)
        return ELBO(log_likelihood, kl_z, folded(kl_u, x.shape[1], self.frames_before), t, axis)

    def log_weights(self, x: Images, samples: int, axis: Axis | None = None) -> Iterator[Frames]:
        """`samples` draws of `log p(x|t) + log p(z) + log p(u) - log q(z|x) - log q(u|x)` of every frame, in nats.

        What is before the first frame and after the last, where `u` is padded, counts with them.
        """
        posteriors = [q for q in self.posterior(x) if q is not None]
        for _ in range(samples):
            latents = [q.rsample() for q in posteriors]
            ratio = sum(
                folded((STANDARD_NORMAL.log_prob(s) - q.log_prob(s)).sum((-2, -1)), x.shape[1], self.frames_before)
                for s, q in zip(latents, posteriors, strict=True)
            )
            t = self.topography(*latents, *[None] * (2 - len(latents)), axis)
            yield self.likelihood.log_prob(self.decode(t), x) + ratio

    def reconstruct(self, x: Images, axis: Axis | None = None) -> Images:
        """The expected images of `encode(x, sample=False)`."""
        return self.likelihood.mean(self.decode(self.encode(x, sample=False, axis=axis)))

    def sample(self, sequences: int, time: int, axis: Axis | None = None) -> Images:
        """Images of `sequences` sequences of `time` frames from the prior, on the model's device."""
        shape = (sequences, time, *self.capsule_shape)
        z, u = (torch.randn(s, device=next(self.parameters()).device) for s in (shape, self.rolls.shape_of_u(shape)))
        return self.likelihood.mean(self.decode(self.topography(z, u, axis)))

    def traverse(self, x: Images, frame: int = 0, along: int | None = None, axis: Axis | None = None) -> Images:
        """Capsule traversal (section 6.1): the images of `Roll_{l - frame}(t_frame)` for every frame `l` of `x`.

        Only the frames inside the temporal window of `frame` are seen by the model; an equivariant one continues the
        transformation through the others. Capsules with a root for each axis roll `along` one, whichever `axis` their
        sequences roll along, or along all at once.
        """
        t = self.encode(x, sample=False, axis=axis)
        rolled = [roll_capsules(t[:, frame], l - frame, self.rolls, along) for l in range(x.shape[1])]
        return self.likelihood.mean(self.decode(torch.stack(rolled, dim=1)))

    def project_weights(self) -> None:
        """Scale the rows of "projected" weights back to norm 1; to be called after every step of the optimiser."""
        if self.settings["weights"] == "projected":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    project(layer)

    def save(self, path: str | Path) -> None:
        """Write weights and settings into one safetensors file, which `load` reads without pickle; at once or not."""
        metadata = {"model": json.dumps({"model": type(self).__name__.lower(), **self.settings}, default=asdict)}
        with replacing(Path(path)) as partial:
            partial.write_bytes(save(self.state_dict(), metadata))

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> VAE:
        """Read a model of any class of this module that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a model file.

        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                settings = json.loads((file.metadata() or {})["model"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if "neighborhood" in settings:
                settings["neighborhood"] = Neighborhood(**settings["neighborhood"])
            model = MODELS[settings.pop("model")](**settings)
            model.load_state_dict(state)
        except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} is not a model file of this version: {error}") from error
        return model.to(device)


class TVAE(VAE):
    """The Topographic VAE: `t = (z - mu) / sqrt(W u²)` with a second encoder for `u` (Eq. 10 and 11).

    Where the neighbourhood pads time, sequences are extended at both ends by repetition for `u`, and where it pads the
    capsules, the encoder of `u` has more outputs (appendix C.2).

    Args:
        image_shape: `(channel, height, width)` of a frame.
        capsules: number of capsules C.
        capsule_dim: number of dimensions D of a capsule.
        neighborhood: which `u²` share a denominator; a circular window must fit the sequences and capsules.
        likelihood: as in `VAE`.
        weights: as in `VAE`.
        mu_init: initial value of the trainable scalar `mu`.
        window: the weights of the window are "ones", or learned: "shared" by all capsules or one window a "capsule".
        told_axis: whether the model is told along which axis of its capsules each sequence rolls.
        backend: as in `tvae_kernels.topographic`.

    Raises:
        ValueError: as `VAE`, or the neighbourhood does not fit the capsules, or the kind of window is unknown, or there
            are no axes with a root each to be told about.

    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        capsules: int,
        capsule_dim: int,
        neighborhood: Neighborhood,
        likelihood: str = "bernoulli",
        weights: str = "free",
        mu_init: float = 30.0,
        window: str = "ones",
        told_axis: bool = False,
        backend: str = "auto",
    ):
        super().__init__(image_shape, capsules, capsule_dim, likelihood, weights)
        if window not in WINDOWS:
            raise ValueError(f"window must be one of {', '.join(WINDOWS)}; got {window!r}")
        if told_axis and neighborhood.roots != "each axis":
            raise ValueError(f"told_axis needs a root for each axis, got {neighborhood}")
        self.settings |= {"neighborhood": neighborhood, "mu_init": mu_init, "window": window, "told_axis": told_axis}
        self.told_axis = told_axis
        neighborhood.check_fits(time=neighborhood.time_window, dim=capsule_dim, capsules=capsules)
        self.rolls = neighborhood
        (self.frames_before, self.frames_after), _ = neighborhood.padding()
        self.u_shape = neighborhood.shape_of_u((1, 1, capsules, capsule_dim))[2:]
        n = capsules * capsule_dim
        self.u_encoder = mlp(math.prod(image_shape), 3 * n, 2 * n, 2 * math.prod(self.u_shape), weights=weights)
        of_capsules = capsules if window == "capsule" else None
        self.topographic = TopographicLayer(
            neighborhood, mu_init, backend=backend, learn_weights=window != "ones", weights_for_capsules=of_capsules
        )

    def topography(self, z: Capsules, u: Capsules, axis: Axis | None = None) -> Capsules:
        """The topographic layer (Eq. 11).

        Raises:
            ValueError: an axis is not given to a model that is told, or given to one that is not.

        """
        self._check_told(axis)
        return self.topographic(z, u, axis)

    def posterior(self, x: Images) -> tuple[Normal, Normal]:
        """`q(z|x)` of shape `(B, S, C, D)`, and `q(u|x)` of the same but where it is padded (Eq. 10 and 11)."""
        z, u = self._posterior_parameters(x)
        return gaussian(z), gaussian(u)

    def latents(self, x: Images, first: int = 0, of: int | None = None, axis: Axis | None = None) -> Latents:
        """`t` at a sample of the posterior, and the KL terms; on a GPU in one kernel."""
        self._check_told(axis)
        return self.topographic.sample(*self._posterior_parameters(x), first=first, of=of, axis=axis)

    def _check_told(self, axis: Axis | None) -> None:
        if (axis is not None) != self.told_axis:
            raise ValueError(f"a model with told_axis={self.told_axis} got the axis {axis}")

    def _posterior_parameters(self, x: Images) -> tuple[Parameters, Parameters]:
        extended = x
        if self.frames_before or self.frames_after:
            first = x[:, :1].expand(-1, self.frames_before, *x.shape[2:])
            last = x[:, -1:].expand(-1, self.frames_after, *x.shape[2:])
            extended = torch.cat((first, x, last), 1)
        return (
            self._encoded(self.z_encoder, x, self.capsule_shape),
            self._encoded(self.u_encoder, extended, self.u_shape),
        )


class BubbleVAE(TVAE):
    """The Topographic VAE with stationary temporal coherence (Eq. 8): its neighbourhood does not shift with time.

    Raises:
        ValueError: as `TVAE`, or the neighbourhood's shift is not 0.

    """

    def __init__(self, image_shape, capsules, capsule_dim, neighborhood: Neighborhood, **settings):
        if neighborhood.shift != 0:
            raise ValueError(f"a BubbleVAE is stationary: its neighborhood needs shift 0, got {neighborhood.shift}")
        super().__init__(image_shape, capsules, capsule_dim, neighborhood, **settings)
        self.rolls = Neighborhood()  # as the baselines are measured: its own topography never moves


WINDOWS = ("ones", "shared", "capsule")
MODELS = {"tvae": TVAE, "bubblevae": BubbleVAE, "vae": VAE}
STANDARD_NORMAL = Normal(0.0, 1.0, validate_args=False)


def folded(x: Tensor, steps: int, before: int) -> Frames:
    """Values of frames that reach beyond the sequence at both ends, `(B, before + S + after)`, added to its ends."""
    if x.shape[1] == steps:
        return x
    first, inside, last = x.split([before, steps, x.shape[1] - before - steps], 1)
    return torch.cat((inside[:, :1] + first.sum(1, keepdim=True), inside[:, 1:]), 1) + F.pad(
        last.sum(1, keepdim=True), (steps - 1, 0)
    )


def gaussian(parameters: Parameters) -> Normal:
    """The normal distribution of means and log-variances."""
    mean, log_variance = parameters.unbind(-3)
    return Normal(mean, (0.5 * log_variance).exp(), validate_args=False)


def kl_from_prior(q: Normal) -> Frames:
    """`KL(q || N(0, 1))` summed over the latent variables of every frame, in nats."""
    return kl_divergence(q, STANDARD_NORMAL).sum((-2, -1))


def mlp(*sizes: int, weights: str = "free") -> nn.Sequential:
    """Linear layers with ReLUs between them; `nn.Linear` initialises from U(±1/sqrt(fan-in)), as the paper does."""
    layers = [WEIGHTS[weights](nn.Linear(inputs, outputs)) for inputs, outputs in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])
