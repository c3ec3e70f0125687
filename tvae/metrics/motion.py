"""How well models move: errors and likelihood of the frames that are decoded from a motion that starts at the first.

A motion is the model's own, `SequenceModel.moved`, or one that is fitted to its latent variables, `FittedMotions`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..config import EvaluationSettings
from ..data import SequenceBatch, SequenceSource
from ..models import ELBO, Likelihood, SequenceModel
from ..models.layers import Frames, Images, Mix
from .base import EvaluationMetric, Row
from .fits import AFFINE, DIRECTION, FittedMotions, fit_motions, one_by_one

OWN, KEPT, RECONSTRUCTED, CHANCE = "own motion", "x_0 kept", "own reconstruction", "chance"
PREDICTIONS = (OWN, DIRECTION, AFFINE, KEPT, RECONSTRUCTED)  # the second to fourth are told the transformation
UNSEEN = "unseen frames"
_PIXELS = 1024  # whose medians are taken at once, to spare memory


def has_motion(model: SequenceModel) -> bool:
    """Say whether a model has a motion of its own."""
    return type(model).moved is not SequenceModel.moved


def names_of(source: SequenceSource) -> tuple[str, ...]:
    """Return the names of a source's transformations in the order of `SequenceBatch.axis`."""
    return tuple(name for _, name in sorted(source.transformations.items()))


def predicted(
    model: SequenceModel, batch: SequenceBatch, fitted: FittedMotions | None, mix: Mix | None = None
) -> dict[str, Images]:
    """Return the expected images of every motion that there is, by name; of frame 0, too, where they start.

    Args:
        model: the model.
        batch: the sequences.
        fitted: what is fitted to the model, if anything.
        mix: how much of each transformation every step takes; by default that of the sequence alone.

    """
    paths = {}
    own = model.moved(batch, mix if model.told_transformations else None)
    if own is not None:
        paths[OWN] = own
    if fitted is not None:
        first = model.encode(batch, sample=False)[:, 0]
        mix = one_by_one(batch, len(fitted.names)) if mix is None else mix
        paths |= {motion: fitted.moved(motion, first, mix) for motion in (DIRECTION, AFFINE)}
    return {motion: model.likelihood.mean(model.decode(path)) for motion, path in paths.items()}


class PixelErrors(Metric):
    """Mean L1 distance of predicted images from the frames of each kind of sequence, summed over pixels and channels.

    Chance: the pixel-wise median of the frames of a kind at an index, which has the least error of all images that know
    nothing else. The images of all sequences are kept until then; not as copies.

    Args:
        kinds: number of kinds.
        steps: frames of a sequence.

    """

    full_state_update = False

    def __init__(self, kinds: int, steps: int):
        super().__init__()
        size = (len(PREDICTIONS), kinds)
        self.add_state("totals", torch.zeros(*size, steps, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("images", "kind"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, images: Images, kind: Int[Tensor, " batch"], guesses: dict[str, Images]) -> None:
        """Add the sequences of a batch, their kinds, and what is predicted for all of their frames, by `PREDICTIONS`.

        What is not predicted has no error. An image may stand for those of all frames, or of all sequences.
        """
        self.images.append(images)
        self.kind.append(kind)
        for name, guess in guesses.items():
            row = PREDICTIONS.index(name)
            distance = (guess - images).abs().sum((-3, -2, -1), dtype=torch.float64)
            self.totals[row] += _sums(distance, kind, self.totals.shape[1])
            self.sequences[row] += kind.bincount(minlength=self.totals.shape[1])

    def compute(self) -> dict[str, Float[Tensor, "kind time"]]:
        """Return the mean error of everything that was predicted, and chance; NaN for kinds that did not occur."""
        means = self.totals / self.sequences[..., None]
        found = {name: means[row] for row, name in enumerate(PREDICTIONS) if self.sequences[row].any()}
        return {name: error.cpu() for name, error in (*found.items(), (CHANCE, self._chance()))}

    def _chance(self) -> Float[Tensor, "kind time"]:
        # After the states of several processes were gathered, all images are one tensor.
        images, kinds = ([x] if isinstance(x, Tensor) else x for x in (self.images, self.kind))
        frames = [x.flatten(2) for x in images]
        _, count, steps = self.totals.shape
        chance = self.totals.new_full((count, steps), torch.nan)
        for kind in dim_zero_cat(kinds).unique().tolist():
            chosen = [(k == kind).nonzero().squeeze(1) for k in kinds]
            for step in range(steps):
                chance[kind, step] = 0
                for part in (slice(start, start + _PIXELS) for start in range(0, frames[0].shape[2], _PIXELS)):
                    pixels = torch.cat([x[i, step, part] for x, i in zip(frames, chosen, strict=True)])
                    error = (pixels - pixels.median(0).values).abs()
                    chance[kind, step] += error.sum(dtype=torch.float64) / len(pixels)
        return chance


def _sums(values: Tensor, kind: Int[Tensor, " batch"], kinds: int) -> Tensor:
    """Add up values by kind, in float64; the same every time, which `index_add_` is not on a GPU."""
    chosen = F.one_hot(kind, kinds).double()
    return (chosen.T @ values.double().flatten(1)).unflatten(1, values.shape[1:])


class PixelError(EvaluationMetric):
    """E_pix: how far the frames that a motion predicts are from those that come, by transformation.

    `E_pix = 1/(S-1) Σ_{l=1}^{S-1} || D(ẑ_l) - x_l ||₁`, summed over pixels and channels, a mean over sequences; `ẑ` is
    the path of a motion from the most typical `z_0`, and `D` the expected image. Without the name of a transformation:
    the mean over all of them. A motion is only shown where the error is well below that of `x_0` kept for all frames;
    faint images have a small error, too (see chance).

    Where `t_0` has seen some of the other frames, there is a row of the error over those alone that it has not, and one
    of how many it has. On open paths there are rows of the motions that are fitted to the latent variables, which are
    told the transformation, of `x_0` kept, and of every frame encoded by itself.

    Chance: the median image of each transformation and frame index.

    Args:
        names: the names of the transformations.
        steps: frames of a sequence.
        seen: which of the frames the first capsules have seen; without it none but the first.
        open_paths: whether sequences are such as the levels are measured for.

    """

    key = "pixel_error"
    fits = True
    higher_is_better = False

    def __init__(self, names: Sequence[str], steps: int, seen: Tensor | None = None, open_paths: bool = True):
        super().__init__()
        self.names, self.open_paths = tuple(names), open_paths
        self.seen = torch.arange(steps, device="cpu") == 0 if seen is None else seen.cpu()
        self.errors = PixelErrors(len(self.names), steps)
        self.fitted: FittedMotions | None = None

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes what transforms, by a motion of the model's own, or on an open path."""
        moving = source.sequence_length > 1 and bool(source.transformations)
        return moving and (source.open_paths or has_motion(model))

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> PixelError:
        """Make the metric for the transformations of a source."""
        steps = source.sequence_length
        return cls(names_of(source), steps, model.frames_seen(steps), source.open_paths)

    def fit(self, model: SequenceModel, training: SequenceSource) -> None:
        """Fit the motions, on open paths."""
        if self.open_paths:
            self.fitted = fitted_to(model, training, self.names)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the sequences of a batch, as the motions and the levels predict them."""
        guesses = predicted(model, batch, self.fitted)
        if self.open_paths:
            guesses[KEPT] = batch.images[:, :1]
            if not model.shares_latents:
                guesses[RECONSTRUCTED] = model.reconstruct(batch)
        self.update(batch.images, batch.axis, guesses)

    def update(self, images: Images, axis: Int[Tensor, " batch"], guesses: dict[str, Images]) -> None:
        """Add sequences, the numbers of their transformations, and the frames that are predicted, by how."""
        self.errors.update(images, axis, guesses)

    def compute(self) -> dict[str, dict[str | None, tuple[float, float]]]:
        """Return error and chance by how frames are predicted and by transformation; None is the mean over all."""
        found = self.errors.compute()
        later = torch.arange(len(self.seen), device="cpu") > 0
        frames = dict.fromkeys(found, later)
        if OWN in found and self.seen[1:].any() and not self.seen.all():
            found[UNSEEN], frames[UNSEEN] = found[OWN], ~self.seen & later
        chance = found.pop(CHANCE)
        return {name: self._by_transformation(found[name], chance, frames[name]) for name in found}

    def _by_transformation(
        self, error: Tensor, chance: Tensor, frames: Tensor
    ) -> dict[str | None, tuple[float, float]]:
        both = torch.stack((error, chance), -1)[:, frames].mean(1)
        occurred = ~chance.isnan().any(1)
        mean = tuple(both[occurred].mean(0).tolist())
        by_name = {name: tuple(both[k].tolist()) for k, name in enumerate(self.names) if occurred[k]}
        return {None: mean, **by_name}

    def rows(self) -> list[Row]:
        """Return for each way to predict a row of the mean and one for every transformation, and one of frames seen."""
        rows, found = [], self.compute()
        for way in (OWN, UNSEEN, DIRECTION, AFFINE, KEPT, RECONSTRUCTED):
            for name, (error, chance) in found.get(way, {}).items():
                part = ", ".join(filter(None, (name, None if way == OWN else way))) or None
                label = "E_pix" if name is None else f"E_pix {name}"
                label = label if way == OWN else f"{label}, {way}"
                rows.append(Row(self.key, part, label, error, chance, "L1/frame"))
        if OWN in found:
            seen = self.seen.sum().item()
            rows.append(Row(self.key, "frames seen", "frames seen", seen, torch.nan, f"of {len(self.seen)}", 0))
        return rows


def fitted_to(model: SequenceModel, training: SequenceSource, names: tuple[str, ...]) -> FittedMotions | None:
    """Fit motions to a model of every frame by itself; None if it is of the first, or was trained on other motions."""
    if model.shares_latents or names_of(training) != names or training.sequence_length < 2:
        return None
    return fit_motions(model, training)


class MovedLikelihood(EvaluationMetric):
    """Mean `log p(x_l | ẑ_l)` of the frames after the first, in nats, along the path of the model's own motion.

    By transformation, and the mean over all. A proper score beside `PixelError`, where faint images have a small error.
    Chance: the mean image of each transformation and frame index.

    Args:
        names: the names of the transformations.
        likelihood: the model's likelihood.
        steps: frames of a sequence.
        image_shape: `(channel, height, width)`.

    """

    key = "moved_likelihood"
    higher_is_better = True

    def __init__(self, names: Sequence[str], likelihood: Likelihood, steps: int, image_shape: tuple[int, int, int]):
        super().__init__()
        self.names, self.likelihood = tuple(names), likelihood
        kinds = len(self.names)
        self.add_state("sums", torch.zeros(2, kinds, steps, *image_shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(kinds, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sequences", torch.zeros(kinds, dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes what transforms, by a motion of the model's own."""
        return has_motion(model) and source.sequence_length > 1 and bool(source.transformations)

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> MovedLikelihood:
        """Make the metric for the transformations of a source."""
        return cls(names_of(source), model.likelihood, source.sequence_length, source.image_shape)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add the sequences of a batch, if the model knows how they move."""
        path = model.moved(batch)
        if path is not None:
            self.update(model.likelihood.log_prob(model.decode(path), batch.images), batch.images, batch.axis)

    def update(self, log_prob: Frames, images: Images, axis: Int[Tensor, " batch"]) -> None:
        """Add how likely frames are along their paths, the frames, and the numbers of their transformations."""
        kinds, images = len(self.names), images.double()
        self.sums += torch.stack([_sums(x, axis, kinds) for x in (images, images.square())])
        self.totals += _sums(log_prob[:, 1:].double().mean(1, keepdim=True), axis, kinds).squeeze(1)
        self.sequences += axis.bincount(minlength=kinds)

    def compute(self) -> dict[str | None, tuple[float, float]]:
        """Return likelihood and chance by transformation; None is the mean over all."""
        found = {}
        for k in self.sequences.nonzero().squeeze(1).tolist():
            means = (self.sums[:, k, 1:] / self.sequences[k]).unbind(1)
            chance = sum(self.likelihood.chance(*mean) for mean in means) / len(means)
            found[self.names[k]] = (self.totals[k] / self.sequences[k]).item(), chance
        mean = tuple(sum(values) / len(found) for values in zip(*found.values(), strict=True))
        return {None: mean, **found}

    def rows(self) -> list[Row]:
        """Return a row of the mean, and one for every transformation; none without any motion."""
        if not self.update_called:
            return []
        return [
            Row(self.key, name, " ".join(filter(None, ("log p(x), moved", name))), *values, "nats/frame")
            for name, values in self.compute().items()
        ]
