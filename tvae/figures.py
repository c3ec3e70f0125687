"""Figures: capsule traversals as in Fig. 4 and appendix D of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .data import SequenceBatch, SequenceSource, SequenceStream
from .models import TVAE, VAE

FIGURE_SEED = 7
_GREYED = 0.25  # visibility of frames that t_0 does not see


@torch.no_grad()
def traversals(model: VAE, source: SequenceSource) -> Figure:
    """One block of three rows for every transformation of the source.

    Input sequence, with the frames outside the temporal window of t_0 greyed out; direct reconstruction of every frame
    from its own t_l; images decoded from Roll_l(t_0), which continue the transformation in an equivariant model.
    """
    batch = _one_sequence_each(source)
    model.eval()
    rows = (batch.images, model.reconstruct(batch.images), model.traverse(batch.images))
    blocks = torch.stack(rows, dim=1).clamp(0, 1).movedim(3, -1).cpu()  # block, row, frame, height, width, channel
    seen = frames_seen(model, source.sequence_length)

    steps = source.sequence_length
    figure = Figure(figsize=(0.55 * steps + 1.2, 0.6 * 3 * len(blocks) + 0.25 * len(blocks)), layout="none")
    grid = figure.add_gridspec(len(blocks), 1, left=0.11, right=0.995, top=0.97, bottom=0.01, hspace=0.16)
    for block, images, kind in zip(grid, blocks, batch.transformation.tolist(), strict=True):
        cells = block.subgridspec(3, steps, wspace=0.05, hspace=0.05)
        for row, label in enumerate(("input", "reconstruction", "Roll$_l(t_0)$")):
            for frame in range(steps):
                axes = figure.add_subplot(cells[row, frame])
                visible = row > 0 or seen[frame]
                _show(axes, images[row, frame].numpy(), visible)
                if row == 0 and frame == 0:
                    axes.set_title(source.factors[kind].name, loc="left", fontsize=9, pad=2)
                if frame == 0:
                    axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at twice the screen's resolution, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def frames_seen(model: VAE, steps: int) -> Tensor:
    """Which of the frames take part in t_0, as booleans: its temporal window, or frame 0 alone without topography."""
    seen = torch.zeros(steps, dtype=torch.bool)
    if not isinstance(model, TVAE):
        seen[0] = True
        return seen
    neighborhood = model.topographic.neighborhood
    for i in neighborhood.time_taps:
        if neighborhood.time_boundary == "circular" or 0 <= i < steps:
            seen[i % steps] = True
    return seen


def _one_sequence_each(source: SequenceSource) -> SequenceBatch:
    """The first sequence of every transformation in a fixed, seeded batch."""
    batch = SequenceStream(source, 64, FIGURE_SEED)[0]
    first = torch.stack([(batch.transformation == kind).int().argmax() for kind in source.transformations])
    return SequenceBatch(*(x[first] for x in batch))


def _show(axes, image: np.ndarray, visible: bool) -> None:
    if not visible:
        image = 1 - _GREYED * (1 - image)
    axes.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
