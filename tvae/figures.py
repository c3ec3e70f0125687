"""Figures in the manner of the paper's: capsule traversals, CapCorr against L, covariance of squared activations.

All are drawn at fixed sizes in inches, without colours of their own: lines differ in dashes and markers.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from .data import FixedSequences, SequenceBatch, SequenceSource, SequenceStream
from .files import replacing
from .models import SequenceModel
from .models.layers import Mix

FIGURE_SEED = 7
_GREYED = 0.25  # visibility of frames that t_0 does not see
_OF_A_CLUSTER = 4  # sequences shown
_CELL = 0.3  # inches
_FRAME, _LABELS, _TITLE, _MARGIN = 0.36, 1.0, 0.22, 0.08  # inches


@dataclass(frozen=True)
class Panel:
    """Rows of frames with a label each: what one sequence shows."""

    title: str
    labels: tuple[str, ...]
    images: Float[Tensor, "row frame height width channel"]


def portrait(model: SequenceModel, source: SequenceSource, batch_size: int) -> tuple[str, Figure]:
    """Draw what shows best what a model does with a source, and say what it is.

    Of sequences, capsule traversals; of still images and capsules of two axes, the map of the torus.
    """
    if source.sequence_length == 1 and model.rolls is not None and model.rolls.is_multidimensional:
        return "torus", torus_map(model, FixedSequences.take(source, len(source), batch_size).batches)
    return "traversals", traversals(model, source)


def traversals(model: SequenceModel, source: SequenceSource, each: int = 1) -> Figure:
    """Draw capsule traversals, `each` of every transformation of the source, in two columns where they are many."""
    panels = traversal_panels(model, source, each)
    middle = len(panels) if each == 1 else -(-len(panels) // 2)
    return draw_panels([column for column in (panels[:middle], panels[middle:]) if column])


@torch.no_grad()
def traversal_panels(model: SequenceModel, source: SequenceSource, each: int = 1, title: str = "") -> list[Panel]:
    """Make panels of three rows (Fig. 4 and appendix D), `each` of every transformation of the source.

    Input sequence, with the frames outside the temporal window of t_0 greyed out; direct reconstruction of every frame
    from its own t_l; images decoded from Roll_l(t_0), which continue the transformation in an equivariant model. One
    such row for every motion that the model has.
    """
    batch = some_of_each(source, each)
    model.eval()
    moved = model.traversals(batch)
    rows = {"input": batch.images, "reconstruction": model.reconstruct(batch), **moved}
    images = torch.stack(tuple(rows.values()), dim=1).clamp(0, 1).movedim(3, -1).cpu()  # (B, row, S, h, w, c)
    unseen = ~model.frames_seen(source.sequence_length)
    images[:, 0, unseen] = 1 - _GREYED * (1 - images[:, 0, unseen])
    names = [title + name for name in titles_of(source, batch)]
    return [Panel(name, tuple(rows), x) for name, x in zip(names, images, strict=True)]


@torch.no_grad()
def comparison_panels(
    models: dict[str, SequenceModel], batch: SequenceBatch, titles: list[str], mix: Mix | None = None
) -> list[Panel]:
    """Make a panel for every sequence: the input, and below it what each model makes of frame 0 by its own motion.

    A model without a motion shows its reconstruction of every frame instead.

    Args:
        models: by the names of their rows.
        batch: sequences that fit all of them.
        titles: of the panels.
        mix: how much of each transformation every step takes, as in `SequenceModel.moved`.

    """
    rows = {"input": batch.images}
    for name, model in models.items():
        path = model.eval().moved(batch, mix)
        images = model.reconstruct(batch) if path is None else model.likelihood.mean(model.decode(path))
        rows[f"{name}, " + ("reconstruction" if path is None else "moved")] = images
    images = torch.stack(tuple(rows.values()), dim=1).clamp(0, 1).movedim(3, -1).cpu()
    return [Panel(title, tuple(rows), x) for title, x in zip(titles, images, strict=True)]


def comparison(models: dict[str, SequenceModel], source: SequenceSource, each: int = 1) -> Figure:
    """Draw what models, by name, make of the same sequences, `each` of every transformation of the source."""
    batch = some_of_each(source, each)
    return draw_panels([comparison_panels(models, batch, titles_of(source, batch))])


@torch.no_grad()
def cluster_panels(model: SequenceModel, batches: Iterable[SequenceBatch], titles: dict[int, str]) -> list[Panel]:
    """Make a panel for each of some clusters: its first sequences, frame by frame, and what the model makes of them.

    Rows: input, reconstruction, and the canonical image, which should look alike in all poses of an example.

    Args:
        model: one that says what it identifies.
        batches: where sequences are taken from, each of the cluster of its frame 0.
        titles: the numbers of the clusters, in order, and the titles of their panels.

    """
    model.eval()
    shown = {cluster: [] for cluster in titles}
    for batch in batches:
        found = model.identified(batch)
        rows = (
            torch.stack((batch.images, model.reconstruct(batch), found.canonical), 1).clamp(0, 1).movedim(3, -1).cpu()
        )
        for cluster, images in zip(found.cluster[:, 0].tolist(), rows, strict=True):
            if len(shown.get(cluster, range(_OF_A_CLUSTER))) < _OF_A_CLUSTER:
                shown[cluster].append(images)
    labels = ("input", "reconstruction", "canonical")
    return [Panel(titles[cluster], labels, torch.cat(x, 1)) for cluster, x in shown.items() if x]


def add_confusion(figure: Figure, tables: dict[str, tuple[np.ndarray, list[int]]], classes: tuple[str, ...]) -> None:
    """Add to the right of a figure, from top to bottom, how many examples of each class are in each cluster.

    Args:
        figure: what is there already.
        tables: by title, the counts (class, cluster) and the numbers of the clusters.
        classes: their names.

    """
    width, height = figure.get_size_inches()
    for i, (title, (counts, clusters)) in enumerate(tables.items()):
        rows, columns = (_CELL * n for n in counts.shape)
        top = height - _LABELS - i * (_CELL * len(classes) + 2 * _LABELS)
        axes = figure.add_axes((1 + _LABELS / width, (top - rows) / height, columns / width, rows / height))
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="gray_r", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(counts):
            color = "w" if shares[row, column] > 0.5 else "k"
            axes.text(column, row, int(count), ha="center", va="center", fontsize=6, color=color)
        axes.set_title(title, fontsize=8)
        axes.set_xticks(range(len(clusters)), [str(cluster) for cluster in clusters], fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
        axes.set_xlabel("cluster", fontsize=8)
        axes.set_ylabel("class", fontsize=8)


def titles_of(source: SequenceSource, batch: SequenceBatch) -> list[str]:
    """Return the names of the transformations of a batch's sequences, where the source has any."""
    if batch.transformation is None:
        return [""] * len(batch.images)
    return [source.transformations[kind] for kind in batch.transformation.tolist()]


def draw_panels(columns: list[list[Panel]]) -> Figure:
    """Draw columns of panels from top to bottom, every frame at the same size."""
    heights = [sum(_TITLE + _FRAME * len(panel.images) for panel in column) for column in columns]
    labels = [max(_LABELS, *(label_width(x) for panel in column for x in panel.labels)) for column in columns]
    frames = [_FRAME * max(panel.images.shape[1] for panel in column) for column in columns]
    widths = [sum(pair) for pair in zip(labels, frames, strict=True)]
    width, height = sum(widths) + _MARGIN, max(heights) + _MARGIN
    figure = Figure(figsize=(width, height))
    for i, column in enumerate(columns):
        left, top = sum(widths[:i]) + labels[i], height
        for panel in column:
            rows, count = panel.images.shape[:2]
            top -= _TITLE + _FRAME * rows
            box = (left / width, top / height, _FRAME * count / width, _FRAME * rows / height)
            axes = figure.add_axes(box)
            axes.set_title(panel.title, loc="left", fontsize=8, pad=2)
            image = mosaic(panel.images).numpy()
            axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks((np.arange(rows) + 0.5) * len(image) / rows, panel.labels, fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
    return figure


def label_width(label: str) -> float:
    """Return the inches that a label takes: 7-point letters, of which 16 take less than one, if they are wide."""
    return len(re.sub(r"[$_]", "", label)) / 16 + _MARGIN


def mosaic(images: Float[Tensor, "row frame height width channel"]) -> Float[Tensor, "y x channel"]:
    """Put rows of frames into one image, each with a white rim below and to its right, 1/16 of its height wide."""
    rim = max(1, images.shape[2] // 16)
    padded = F.pad(images, (0, 0, 0, rim, 0, rim), value=1.0)
    return padded.movedim(1, 2).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class Series:
    """Points of a line: mean and standard deviation (0 where not known) at every L, relative to the sequence."""

    label: str
    L: list[float]
    mean: list[float]
    std: list[float]


_LINES = (("k", "-", "o"), ("k", "--", "s"), ("k", ":", "D"), ("0.6", "-", "^"), ("0.6", "--", "v"), ("0.6", ":", "x"))


def capcorr_against_coherence(panels: dict[str, list[Series]], chance: float) -> Figure:
    """Draw average CapCorr over all transformations against L (Fig. 5), six series or fewer a panel, beside chance."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, line in enumerate(series):
            color, dashes, marker = _LINES[i]
            style = {"color": color, "ls": dashes, "marker": marker, "ms": 4, "lw": 1.2, "capsize": 2}
            axes.errorbar(line.L, line.mean, line.std, label=line.label, **style)
        axes.axhline(chance, color="k", lw=0.6, ls=(0, (1, 4)), label="chance")
        axes.set(xlabel="temporal coherence length L / S", ylim=(-0.05, 1.05))
        axes.set_title(title, fontsize=8)
        axes.legend(fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        _plain(axes)
    figure.axes[0].set_ylabel("average CapCorr")
    return figure


@torch.no_grad()
def squared_activation_correlation(model: SequenceModel, batches: Iterable[SequenceBatch]) -> Float[Tensor, "C D C D"]:
    """Return the covariance of t² between all pairs of activations of a frame, as correlation coefficients.

    It is taken over the frames; activations are drawn from the posterior: seed the noise before. NaN for an activation
    that never changes.
    """
    model.eval()
    t = torch.cat([model.encode(batch).cpu() for batch in batches])
    squares = t.square().flatten(0, 1).flatten(1)
    return torch.corrcoef(squares.double().T).view(*model.capsule_shape, *model.capsule_shape)


def within_and_between(correlation: Float[Tensor, "C D C D"]) -> tuple[Tensor, Tensor]:
    """Return the mean correlation of positions 0 … D // 2 apart on their circle: in one capsule, and in two."""
    capsules, dim = correlation.shape[:2]
    same, position = torch.eye(capsules, dtype=torch.bool), torch.arange(dim)
    profiles = []
    for distance in range(dim // 2 + 1):
        # By symmetry of the matrix this is position - distance as well: (position, capsule, capsule).
        pairs = correlation[:, position, :, (position + distance) % dim]
        profiles.append((pairs[:, same].mean(), pairs[:, ~same].mean()))
    within, between = (torch.stack(profile) for profile in zip(*profiles, strict=True))
    return within, between


def covariance(correlations: dict[str, Float[Tensor, "C D C D"]], capsules: int = 4) -> Figure:
    """Draw for every model, by title, the correlations of t² of its first capsules, and their mean against distance."""
    figure = Figure(figsize=(2.6 * len(correlations), 4.6), layout="constrained")
    matrices, curves = figure.subplots(2, len(correlations), height_ratios=(1.25, 1), squeeze=False)
    for axes, (title, correlation) in zip(matrices, correlations.items(), strict=True):
        dim = correlation.shape[1]
        shown = correlation[:capsules, :, :capsules].flatten(2).flatten(0, 1).numpy()
        image = axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.set_xticks((np.arange(capsules) + 0.5) * dim - 0.5, range(1, capsules + 1), fontsize=7)
        axes.set_yticks((np.arange(capsules) + 0.5) * dim - 0.5, range(1, capsules + 1), fontsize=7)
        axes.set_xlabel("capsule", fontsize=8)
    matrices[0].set_ylabel("capsule", fontsize=8)
    bar = figure.colorbar(image, ax=list(matrices), shrink=0.8)
    bar.set_label("correlation of t²", size=8)
    bar.ax.tick_params(labelsize=7)
    for axes, correlation in zip(curves, correlations.values(), strict=True):
        within, between = within_and_between(correlation)
        axes.plot(within, "k-o", ms=3, lw=1.2, label="within a capsule")
        axes.plot(between, "s--", color="0.45", ms=3, lw=1.2, label="between capsules")
        axes.set(ylim=(-0.1, 1.05), xlabel="distance along the capsule")
        _plain(axes)
    curves[0].set_ylabel("mean correlation of t²", fontsize=8)
    curves[-1].legend(fontsize=7, frameon=False)
    return figure


@torch.no_grad()
def torus_map(model: SequenceModel, batches: Iterable[SequenceBatch]) -> Figure:
    """Draw the image that activates each variable of a capsule of two axes most, on the flattened torus (Fig. 3).

    Raises:
        ValueError: the model has other capsules than one of two axes, or sequences of more than one frame.

    """
    rolls = model.rolls
    if rolls.axes is None or len(rolls.axes) != 2 or model.capsule_shape[0] != 1:
        raise ValueError(f"a torus is drawn of a single capsule of two axes, got {model.capsule_shape[0]} of {rolls}")
    best, images = None, None
    model.eval()
    for batch in batches:
        if batch.images.shape[1] != 1:
            raise ValueError(f"a torus is drawn of still images, got sequences of {batch.images.shape[1]} frames")
        t = model.encode(batch, sample=False)[:, 0, 0]  # (B, D)
        values, which = t.max(0)
        found = batch.images[which, 0].movedim(1, -1)  # (D, height, width, channel)
        better = torch.ones_like(values, dtype=torch.bool) if best is None else values > best
        best = values if best is None else torch.where(better, values, best)
        images = found if images is None else torch.where(better[:, None, None, None], found, images)
    rows, columns = rolls.axes
    figure = Figure(figsize=(_FRAME * columns, _FRAME * rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(mosaic(images.cpu().unflatten(0, (rows, columns))).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    return figure


def save(figure: Figure, path: Path, caption: str = "") -> None:
    """Write a figure, under its caption, as PNG at twice the screen's resolution, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(20 * width))  # 7-point letters, of which 20 take less than an inch
    figure.text(0, 1 + _MARGIN / height, text, fontsize=7, va="bottom")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=200, bbox_inches="tight", pad_inches=_MARGIN, format="png")


def some_of_each(source: SequenceSource, each: int) -> SequenceBatch:
    """Return the first sequences of every transformation in a fixed, seeded batch, with all shapes shown evenly.

    A shape is what no sequence changes: the first factor, where it does not transform. Of a source without
    transformations all sequences are of one kind.
    """
    # Where nothing is known all are of one kind, and the first ones are the same of a smaller batch.
    known = 64 if source.factors else each
    batch = SequenceStream(source, min(known, len(source)), FIGURE_SEED)[0]
    kinds = torch.zeros(len(batch.images)) if batch.transformation is None else batch.transformation
    still = bool(source.factors) and not source.factors[0].transforms
    shapes = batch.factors[:, 0, 0].tolist() if still else [0] * len(batch.images)
    chosen = []
    for kind in source.transformations or (0,):
        of_kind = (kinds == kind).nonzero().flatten().tolist()
        seen = Counter()
        rounds = {}
        for i in of_kind:
            rounds[i] = seen[shapes[i]]
            seen[shapes[i]] += 1
        chosen += sorted(of_kind, key=lambda i: (rounds[i], i))[:each]
    return batch.select(chosen)


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)
