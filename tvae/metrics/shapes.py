"""Whether decoded shapes can be told apart, and are turned as they should be."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ..data import SequenceBatch, SequenceSource
from ..data.shapes import ShapeSequences, draw_shapes
from ..models import ELBO, SequenceModel
from .base import EvaluationMetric, Row

_ELLIPSE, _HEART = (ShapeSequences.classes.index(name) for name in ("ellipse", "heart"))
_PERIODS = {_ELLIPSE: 180.0, _HEART: 360.0}  # degrees after which a shape is the same again
_ORIENTATIONS = torch.tensor(ShapeSequences.factors[2].values, dtype=torch.float64, device="cpu").rad2deg()

Drawings = Float[Tensor, "image height width"]


class DecodedShapes(EvaluationMetric):
    """Share of decoded frames whose shape is recognised, and the median error of their orientation, in degrees.

    Of reconstructions, and of what the model's own motion makes of `t_0` in the frames that it has not seen. A shape is
    that of the nearest of all drawings, by their grey values. The orientation is that of the longer axis of an ellipse
    (second moments) or of the skewness of a heart (third). Chance: the most frequent shape, and any orientation.
    """

    key = "shapes"

    def __init__(self):
        super().__init__()
        self.drawings = draw_shapes()
        upright = self.drawings[_HEART, -1, 0][None].double()
        self.upright = orientations(upright, torch.tensor([_HEART], device="cpu"), 0.0)
        for part in ("reconstruction", "moved"):
            for state in ("right", "error", "shape"):
                self.add_state(f"{part}_{state}", [], dist_reduce_fx="cat")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes shapes."""
        return isinstance(source, ShapeSequences)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add what the model decodes of a batch."""
        frames = batch.images.shape[1]
        every = torch.ones(frames, dtype=torch.bool, device="cpu")
        self.update("reconstruction", model.reconstruct(batch), batch.factors, every)
        unseen, path = ~model.frames_seen(frames), model.moved(batch)
        if path is not None and unseen.any():
            self.update("moved", model.likelihood.mean(model.decode(path)), batch.factors, unseen)

    def update(
        self,
        part: str,
        images: Float[Tensor, "batch time 1 height width"],
        factors: Int[Tensor, "batch time factor"],
        frames: Bool[Tensor, " time"],
    ) -> None:
        """Add some frames of decoded sequences, beside what they should show."""
        grey = images[:, frames, 0].flatten(0, 1).double().cpu()
        shape, _, orientation = factors[:, frames].flatten(0, 1).cpu().unbind(-1)
        right = recognised(grey, self.drawings) == shape
        turned = (shape == _ELLIPSE) | (shape == _HEART)
        found = orientations(grey[turned], shape[turned], self.upright)
        period = torch.where(shape[turned] == _ELLIPSE, _PERIODS[_ELLIPSE], _PERIODS[_HEART])
        error = (found - _ORIENTATIONS[orientation[turned]] + period / 2) % period - period / 2
        for state, x in (("right", right), ("error", error.abs()), ("shape", shape)):
            getattr(self, f"{part}_{state}").append(x)

    def compute(self) -> dict[str, tuple[float, float]]:
        """Return the values of every part, and their chance levels."""
        found = {}
        for part in ("reconstruction", "moved"):
            if getattr(self, f"{part}_right"):
                right, error, shape = (
                    dim_zero_cat(getattr(self, f"{part}_{state}")) for state in ("right", "error", "shape")
                )
                counts = shape.bincount(minlength=len(ShapeSequences.classes)).double()
                found[f"recognised, {part}"] = right.double().mean().item(), (counts.max() / counts.sum()).item()
                ellipses = counts[_ELLIPSE] / (counts[_ELLIPSE] + counts[_HEART])
                # of errors from 0 to 90 degrees for ellipses, and to 180 for hearts, all alike likely
                found[f"orientation, {part}"] = error.median().item(), (90 / (1 + ellipses)).item()
        return found

    def rows(self) -> list[Row]:
        """Return two rows for each part."""
        decoded = {"reconstruction": "reconstruction", "moved": "moved, unseen frames"}
        rows = []
        for part, (value, chance) in self.compute().items():
            what, images = part.split(", ")
            unit, digits = ("", 3) if what == "recognised" else ("degrees", 1)
            name = "shape recognised" if what == "recognised" else "orientation error"
            rows.append(Row(self.key, part, f"{name}, {decoded[images]}", value, chance, unit, digits))
        return rows


def recognised(
    grey: Drawings, drawings: Float[Tensor, "shape scale orientation height width"]
) -> Int[Tensor, " image"]:
    """Return the shape of the drawing that is nearest to each image."""
    distances = torch.cdist(grey.flatten(1), drawings.to(grey.dtype).flatten(0, 2).flatten(1))
    return distances.argmin(1) // drawings[0].flatten(0, 1).shape[0]


def orientations(grey: Drawings, shape: Int[Tensor, " image"], upright: float | Tensor) -> Float[Tensor, " image"]:
    """Return by how many degrees ellipses and hearts are turned counter-clockwise, by their moments."""
    size = grey.shape[-1]
    centres = torch.arange(size, dtype=grey.dtype, device="cpu") - (size - 1) / 2
    x, y = centres[None, :].expand(size, size), -centres[:, None].expand(size, size)  # rows grow downwards
    mass = grey.sum((-1, -2), keepdim=True).clamp(min=1e-12)
    x, y = (p - (grey * p).sum((-1, -2), keepdim=True) / mass for p in (x, y))
    moment = lambda i, j: (grey * x**i * y**j).sum((-1, -2))  # noqa: E731
    axis = torch.atan2(2 * moment(1, 1), moment(2, 0) - moment(0, 2)) / 2
    skewness = torch.atan2(moment(2, 1) + moment(0, 3), moment(3, 0) + moment(1, 2))
    return torch.where(shape == _ELLIPSE, axis.rad2deg(), skewness.rad2deg() - upright)
