"""What training, metrics and figures ask of a model, and how models are named, saved and loaded.

A sequence of images `x` is encoded into Gaussian posteriors of latent variables; these become capsules `t`, of which
each frame is decoded into an image:

    x (B, S, c, h, w)  ->  posteriors  ->  samples  ->  t (B, S, C, D)  ->  p(x|t)

Variables are arranged as `(batch B, time S, capsule C, dim D)` throughout.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributions import Normal

from tvae_kernels import Neighborhood, roll_capsules

from ..data import SequenceBatch, SequenceSource
from ..files import checksum, replacing
from ..settings import Count, settings
from .layers import MLP, STANDARD_NORMAL, Axis, Capsules, Frames, Images, Mix, Parameters, folded, framewise, project
from .likelihoods import LIKELIHOODS


class ELBO(NamedTuple):
    """The evidence lower bound of Eq. 12, frame by frame, in nats, and what training makes as large as it can.

    `terms` are the numbers that it is made of, by name: "log_likelihood", and what it costs, as "kl_z"; in training
    also what is added to the objective alone. `t` is the sample that it was taken at, `axis` along which the model knew
    each sequence to roll.
    """

    total: Frames
    terms: dict[str, Frames]
    objective: Frames
    t: Capsules
    axis: Axis | None = None

    def penalised(self, penalty: Frames, **terms: Frames) -> ELBO:
        """Subtract a penalty from the objective, in nats a frame, and log it and other `terms`; the bound stays."""
        terms = {**self.terms, **terms, "penalty": penalty}
        return ELBO(self.total, terms, self.objective - penalty, self.t, self.axis)


class Identified(NamedTuple):
    """What a model says of the examples that frames show, apart from their poses, for models that can."""

    cluster: Int[Tensor, "batch time"]  # the class, in numbers of the model's own from 0
    clusters: int  # how many there are
    code: Float[Tensor, "batch time number"]  # what does not change with the pose
    angle: Frames  # of the pose, in degrees, counter-clockwise from a zero of the cluster's own
    canonical: Images  # the example in that pose


@settings
class ModelSettings:
    """What decides a model, beside the shape of its images and networks that are given to it."""

    capsules: Count = 15
    """Number of capsules C."""
    capsule_dim: Count = 15
    """Dimensions D of a capsule; equal to the length of a sequence in the paper."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Distribution of a pixel."""
    weights: Literal["free", "normalised", "projected"] = "free"
    """Rows of every layer's weights: free, weight normalisation, or norm 1 by projected gradient descent."""

    def check_fits(self, source: SequenceSource) -> None:
        """Refuse sequences that the model cannot take.

        Raises:
            ValueError: what does not fit what.

        """


class SequenceModel(nn.Module):
    """A model of sequences of images, which divides its latent variables into capsules.

    A model of one's own has a `name`, a class of `Settings` and the methods `posterior`, `topography`, `encode` and
    `forward`, and is given its place in `MODELS` by `register`; or it changes what it wants of one of the models here.

    Args:
        image_shape: `(channel, height, width)` of a frame.
        values: an instance of the model's `Settings`.

    Raises:
        ValueError: a size is not positive.

    """

    name: ClassVar[str]
    Settings: ClassVar[type[ModelSettings]] = ModelSettings
    rolls: Neighborhood | None  # how capsules move; None if they do not
    shares_latents: ClassVar[bool] = False  # frames of a sequence are decoded from latent variables of other frames
    one_process: ClassVar[bool] = False  # training needs all sequences of a batch in one place
    unconstrained: ClassVar[tuple[str, ...]] = ()  # networks whose weights the setting `weights` leaves free
    told_transformations: ClassVar[bool] = False  # knows from the batch which transformation moves each sequence
    frames_before: int = 0  # frames of latent variables before the first of the sequence

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        if "name" not in cls.__dict__:  # not the name of the class that it is made from
            cls.name = cls.__name__.lower()

    def __init__(self, image_shape: tuple[int, int, int], values: ModelSettings):
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (channel, height, width), each at least 1, got {image_shape}")
        self.image_shape = tuple(int(n) for n in image_shape)
        self.settings = _kept(values)
        self.capsule_shape = (values.capsules, values.capsule_dim)
        self.likelihood = LIKELIHOODS[values.likelihood]()

    def mlp_encoder(self, outputs: int) -> MLP:
        """Make the paper's encoder: hidden layers of 3n and 2n units for n = C·D latent variables (appendix A.3)."""
        n = math.prod(self.capsule_shape)
        return MLP(math.prod(self.image_shape), 3 * n, 2 * n, outputs, weights=self.settings.weights)

    def mlp_decoder(self) -> MLP:
        """Make the paper's decoder: hidden layers of 2n and 3n units for n = C·D latent variables (appendix A.3)."""
        n = math.prod(self.capsule_shape)
        return MLP(n, 2 * n, 3 * n, math.prod(self.image_shape), weights=self.settings.weights)

    # --- what a model defines -----------------------------------------------------------------------------------------

    @abstractmethod
    def posterior(self, x: Images) -> tuple[Normal, ...]:
        """Return the distribution of each latent variable given images, `(B, S, C, D)`."""

    @abstractmethod
    def topography(self, *latents: Capsules, axis: Axis | None = None) -> Capsules:
        """Return the capsules `t` of values of the latent variables."""

    @abstractmethod
    def encode(self, batch: SequenceBatch, sample: bool = True) -> Capsules:
        """Return the capsules of sequences: `t` at a sample of the posterior, or at its most typical value."""

    @abstractmethod
    def forward(self, batch: SequenceBatch) -> ELBO:
        """Return one sample of the evidence lower bound of every frame (Eq. 12), its terms, and what training wants."""

    def moved(self, batch: SequenceBatch, mix: Mix | None = None) -> Capsules | None:
        """Return the path that the model's own motion takes from the capsules of frame 0; None without such a motion.

        Nothing is drawn: the path starts where `encode(batch, sample=False)` does.

        Args:
            batch: the sequences.
            mix: how much of each transformation every step takes, for models that are told the transformations: by
                default all of that of the sequence. Others find out for themselves, or do not.

        """
        return None

    def parameter_groups(self) -> list[dict]:
        """Return what the optimiser is given: all parameters in one group, with nothing of its own.

        A group may say how it is trained, where that is another way: with "lr", and for Adam with "betas".
        """
        return [{"params": list(self.parameters())}]

    def axis(self, batch: SequenceBatch) -> Axis | None:
        """Return along which axis of its capsules the model knows each sequence to roll; None if it is not told."""
        return None

    def frames_seen(self, steps: int) -> Tensor:
        """Return which of the frames take part in `t_0`, as booleans `(steps,)`."""
        seen = torch.zeros(steps, dtype=torch.bool)
        seen[0] = True
        return seen

    # --- what follows -------------------------------------------------------------------------------------------------

    def check_whole(self, batch: SequenceBatch) -> None:
        """Refuse, in the training of a model that is trained by one process, a part of a batch.

        Raises:
            ValueError: the batch is one, of which other processes have the rest.

        """
        if self.training and self.one_process and batch.total not in (None, len(batch.images)):
            raise ValueError(
                f"a {type(self).__name__} learns from all {batch.total} sequences of a batch at once, got "
                f"{len(batch.images)} of them: train it in one process"
            )

    def bound(self, batch: SequenceBatch, t: Capsules, costs: dict[str, Frames]) -> ELBO:
        """Return the evidence lower bound at a sample `t` of the posterior, with what that costs, by name."""
        log_likelihood = self.likelihood.log_prob(self.decode(t), batch.images)
        total = log_likelihood
        for cost in costs.values():
            total = total - cost
        return ELBO(total, {"log_likelihood": log_likelihood, **costs}, total, t, self.axis(batch))

    def decode(self, t: Capsules) -> Images:
        """Return the decoder's output for every frame: logits (Bernoulli) or means (Gaussian)."""
        return framewise(self.decoder, t).unflatten(-1, self.image_shape)

    def log_weights(self, batch: SequenceBatch, samples: int) -> Iterator[Frames]:
        """Draw `log p(x|t) + Σ (log p(latent) - log q(latent|x))` of every frame `samples` times, in nats.

        What is before the first frame and after the last, where latent variables are padded, counts with them.
        """
        x, axis = batch.images, self.axis(batch)
        posteriors = self.posterior(x)
        for _ in range(samples):
            latents = [q.rsample() for q in posteriors]
            ratio = sum(
                folded((STANDARD_NORMAL.log_prob(s) - q.log_prob(s)).sum((-2, -1)), x.shape[1], self.frames_before)
                for s, q in zip(latents, posteriors, strict=True)
            )
            t = self.topography(*latents, axis=axis)
            yield self.likelihood.log_prob(self.decode(t), x) + ratio

    def reconstruct(self, batch: SequenceBatch) -> Images:
        """Return the expected images of `encode(batch, sample=False)`."""
        return self.likelihood.mean(self.decode(self.encode(batch, sample=False)))

    def traverse(self, batch: SequenceBatch, frame: int = 0, axis: int | None = None) -> Images:
        """Traverse capsules (section 6.1): the images of `Roll_{l - frame}(t_frame)` for every frame `l`.

        Only the frames inside the temporal window of `frame` are seen by the model; an equivariant one continues the
        transformation through the others. Capsules with a root for each axis roll along one `axis`, whichever their
        sequences roll along, or along all at once.
        """
        t = self.encode(batch, sample=False)
        steps = batch.images.shape[1]
        return self.likelihood.mean(self.decode(self.rolled(t[:, frame], steps, frame, axis)))

    def rolled(self, t: Tensor, steps: int, frame: int = 0, axis: int | None = None) -> Capsules:
        """Roll the capsules `(B, C, D)` of one frame to all of the frames before and after it, `(B, steps, C, D)`."""
        return torch.stack([roll_capsules(t, l - frame, self.rolls, axis) for l in range(steps)], dim=1)

    def motions(self, batch: SequenceBatch, steps: int) -> dict[str, Capsules]:
        """Return every motion that the model can make of `t_0`, `(B, steps, C, D)`, by what it is called in figures."""
        t = self.encode(batch, sample=False)[:, 0]
        if self.rolls.root_count == 1:
            return {"Roll$_l(t_0)$": self.rolled(t, steps)}
        return {f"Roll$_l(t_0)$, axis {a}": self.rolled(t, steps, axis=a) for a in range(self.rolls.root_count)}

    def traversals(self, batch: SequenceBatch) -> dict[str, Images]:
        """Return the images that a figure shows below those of a batch: of every motion, by what it is called."""
        motions = self.motions(batch, batch.images.shape[1])
        return {name: self.likelihood.mean(self.decode(path)) for name, path in motions.items()}

    def project_weights(self) -> None:
        """Scale the rows of "projected" weights back to norm 1; to be called after every step of the optimiser."""
        if self.settings.weights == "projected":
            free = {layer for name in self.unconstrained for layer in getattr(self, name).modules()}
            for layer in self.modules():
                if isinstance(layer, nn.Linear) and layer not in free:
                    project(layer)

    def encoded(self, encoder: nn.Module, x: Images, shape: tuple[int, int]) -> Parameters:
        """Return means and log-variances of latent variables `(C, D)` of every frame, in the type of the images.

        Raises:
            ValueError: the images have another shape than the model's.

        """
        if x.ndim != 5 or x.shape[2:] != self.image_shape:
            raise ValueError(f"x must be (batch, time, {', '.join(map(str, self.image_shape))}), got {tuple(x.shape)}")
        # Under autocast the encoder gives bfloat16, in which noise would be other noise and the divergence cancel.
        return framewise(encoder, x).to(x.dtype).unflatten(-1, (2, *shape))

    def save(self, path: str | Path) -> None:
        """Write weights and settings into one safetensors file, which `load` reads without pickle; at once or not."""
        metadata = {"model": self.name, "image_shape": self.image_shape, **asdict(self.settings)}
        state = self.state_dict()
        metadata["checksum"] = checksum(state, json.dumps(metadata))
        with replacing(Path(path)) as partial:
            partial.write_bytes(save(state, {"model": json.dumps(metadata)}))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", **networks: nn.Module) -> SequenceModel:
        """Read a model that `save` wrote: of this class, or of any that is registered.

        Args:
            path: the file.
            device: where the model shall be.
            networks: those that the model was made with, if not its own; they are given the weights of the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a model file, or of a class that is not known.

        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                values = json.loads((file.metadata() or {})["model"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            written = values.pop("checksum", None)  # which files of older versions have not
            if written is not None and written != checksum(state, json.dumps(values)):
                raise ValueError("its checksum is another one")
            name, image_shape = values.pop("model"), values.pop("image_shape")
            if not all(x.is_floating_point() for x in state.values()):
                raise TypeError("there are weights of integers")
            model_class = cls if cls.__dict__.get("name") == name else find(name)
            given = vars(model_class.Settings(**values))
            if not networks:
                _check_shapes(model_class, image_shape, given, state)
            model = model_class(image_shape, **given, **networks)
            model.load_state_dict(state)
        except (SafetensorError, AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise ValueError(f"{path} is not a model file of this version: {reason}") from error
        return model.to(device)


def _check_shapes(model: type[SequenceModel], image_shape: tuple, given: dict, state: dict[str, Tensor]) -> None:
    """Refuse weights of other shapes before memory is taken for a model of a wrong size."""
    try:
        with torch.device("meta"):
            expected = model(image_shape, **given).state_dict()
    except NotImplementedError:  # of a model that computes with its weights as it is made
        return
    for name, x in expected.items():
        if name in state and state[name].shape != x.shape:
            raise ValueError(f"{name} is of shape {tuple(state[name].shape)}, should be {tuple(x.shape)}")


def _kept(values: ModelSettings) -> ModelSettings:
    """Return settings that a file can hold, as they are.

    Raises:
        ValueError: no file can: after training it would be too late to say so.

    """
    try:
        read = type(values)(**json.loads(json.dumps(asdict(values), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings that cannot be saved as JSON: {values}; {error}") from error
    if read != values:
        raise ValueError(f"settings that are others when they are read from JSON: {values}; read: {read}")
    return values


MODELS: dict[str, type[SequenceModel]] = {}  # by the names of settings, files and the command line
Model = TypeVar("Model", bound=type[SequenceModel])


def register(model: Model) -> Model:
    """Give a class of models its place in `MODELS`, under its `name`; to be used as a decorator.

    Raises:
        ValueError: the name, or the class of its settings, is another model's.

    """
    for other in MODELS.values():
        if other is not model and other.name == model.name:
            raise ValueError(f"there is a model {model.name!r} already: {other.__qualname__}")
        if other is not model and other.Settings is model.Settings:
            raise ValueError(f"{model.__qualname__} needs a class of Settings of its own, not {other.__qualname__}'s")
    MODELS[model.name] = model
    return model


def find(name: str) -> type[SequenceModel]:
    """Return the registered model of that name.

    Raises:
        ValueError: there is none.

    """
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"no model {name!r} is registered, only {', '.join(MODELS)}; import the file that defines it")
    return MODELS[name]


def model_of(values: ModelSettings) -> type[SequenceModel]:
    """Return the registered model that settings belong to.

    Raises:
        ValueError: there is none.

    """
    for model in MODELS.values():
        if model.Settings is type(values):
            return model
    raise ValueError(f"no registered model has settings of {type(values).__qualname__}; there are {', '.join(MODELS)}")
