"""Write `topographies.md` and its drawings: `python docs/topographies.py`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tvae.evaluation import load
from tvae_kernels import Neighborhood, reference

FOLDER = Path(__file__).parent
MAPS = ("Blues", "Oranges", "Greens")  # one for each root


class Topography(NamedTuple):
    """A section of the page: `code` makes the neighbourhood, which is drawn for sequences of `time` frames."""

    title: str
    text: str
    equation: str
    code: str
    time: int
    dim: int
    frame: int = -1  # of the t that is drawn; in the middle
    capsules: int = 1


PAGE = (
    Topography(
        "Shifting temporal coherence",
        "The window moves one position along the capsule with every frame, so that what a sequence "
        "does becomes a roll of "
        "its capsules. Time and capsule are circles.",
        "Eq. 9: `t_l = (z_l - mu) / sqrt(Σ_i W_i Roll_i(u²_{l+i}))`",
        "Neighborhood(time_window=5, capsule_window=3)",
        9,
        9,
    ),
    Topography(
        "Stationary temporal coherence (BubbleVAE)",
        "The window stays where it is: what a sequence does leaves the capsule as it is.",
        "Eq. 8: `t_l = (z_l - mu) / sqrt(Σ_i W_i u²_{l+i})`",
        "Neighborhood(time_window=5, capsule_window=3, shift=0)",
        9,
        9,
    ),
    Topography(
        "Cut edges",
        "Taps outside the sequence or the capsule are dropped.",
        "as Eq. 9, with `u = 0` outside",
        'Neighborhood(time_window=5, capsule_window=3, time_boundary="zero", capsule_boundary="zero")',
        9,
        9,
        1,
    ),
    Topography(
        "Non-cyclic capsules",
        "`u` is longer than `z` by the reach of the window, on both sides and at both ends "
        "(hatched), so that every `t` has "
        "as many terms. A model repeats the first and the last frame of its sequences to fill the ends; rolls fill "
        "with 0.",
        "Appendix C.2",
        'Neighborhood(time_window=5, capsule_window=3, time_boundary="padded", capsule_boundary="padded")',
        9,
        9,
        1,
    ),
    Topography(
        "Causal windows",
        "Past and present frames alone. With `layer.step(z, u, state)` the layer takes a stream, a "
        "frame or more at a time, "
        "and gives the same as on the whole sequence.",
        "Eq. 22: `t_l = (z_l - mu) / sqrt(Σ_{i ≤ 0} W_i Roll_i(u²_{l+i}))`",
        'Neighborhood(time_window=5, capsule_window=3, causal=True, time_boundary="zero")',
        9,
        9,
    ),
    Topography(
        "Partial rolls",
        "A capsule smaller than the sequence rolls by less than a position a frame: `u²` is interpolated between "
        "neighbours. Any real shift will do.",
        "Eq. 19: `Roll_α(u²) = [α·u²_D + (1 - α)·u²_1, ...]`; the observed roll is Eq. 20",
        "Neighborhood(time_window=5, shift=0.5)",
        9,
        5,
    ),
    Topography(
        "Partial rolls by phase",
        "The phase of `u` is shifted, before it is squared: the square of a band-limited signal is "
        "never negative. For odd "
        "D the shift is orthogonal, and `t` stays Student's t. Drawn is what a single `u` adds to the sum.",
        "Appendix C.1",
        'Neighborhood(time_window=5, shift=0.5, roll="fourier")',
        9,
        5,
    ),
    Topography(
        "Several speeds",
        "Every capsule has a speed, a factor of the shift; drawn are two capsules.",
        "Eq. 9 with `Roll_{s·i}` in the capsule of speed `s`",
        "Neighborhood(time_window=5, speeds=(1, 2))",
        9,
        9,
        capsules=2,
    ),
    Topography(
        "A torus",
        "The positions of one capsule lie on a torus, and the window covers both its axes: the 2-D "
        "model of section 6.2, without time. A torus may have three axes.",
        "Eq. 7 with 5 x 5 windows",
        "Neighborhood(capsule_window=(5, 5), axes=(9, 9))",
        1,
        81,
    ),
    Topography(
        "A torus in time",
        "The same window moves along both axes with every frame.",
        "Eq. 9 on two axes",
        "Neighborhood(time_window=3, capsule_window=(3, 3), shift=(1, 2), axes=(7, 7))",
        5,
        49,
    ),
    Topography(
        "A root for each axis",
        "One window an axis, which rolls along that axis alone; the denominator is the sum of their "
        "roots (blue and orange). "
        "A sequence rolls along one axis: the layer infers which from all, or is told, of all sequences at once, "
        "`layer(z, u, axis=0)`, or of each, `axis=torch.tensor([0, 1, ...])`: then the root of that axis is the "
        "denominator.",
        "Eq. 21: `t_l = (z_l - mu) / Σ_axes sqrt(Σ_i W_i Roll_i(u²_{l+i}))`",
        'Neighborhood(time_window=3, capsule_window=3, axes=(7, 7), roots="each axis")',
        5,
        49,
    ),
)


MODELS = """## Models

Each has a preset: `mnist-still-tvae-torus`, `sprites-shifts-tvae-axes` and `-told`, `sprites-tvae-third`, `-phase`,
`-padded`, `-causal`, `-speeds` and `-learned`. `tvae train PRESET` trains, evaluates and draws it; E_eq and CapCorr
follow the rolls of its topography: where there is a root for each axis, along the one that the model is told, or else
along the one that fits better.

The torus after 3,000 steps of Adam (the published code trains for 93,750 steps of SGD):
for each of its 18 x 18 variables the one of 10,000 test images that activates it most. Digits of a class lie side by
side, slants and widths change gradually, and what leaves at one edge comes in at the other, as in Fig. 3 of the paper
([metrics](../results/mnist-still-tvae-torus-adam-3000-steps/evaluation.json)).

    tvae train mnist-still-tvae-torus --steps 3000 --optimizer adam --learning-rate 1e-3 --evaluation-sequences 1280

![The images that activate a torus of variables most](../results/mnist-still-tvae-torus-adam-3000-steps/torus.png)

Capsules with a root for each of two axes, after 4,000 steps on sprites that move along x or along y, told which axis
is whose: axis 0 for x, axis 1 for y. Rolled along the axis of its own sequence, `t_0` continues the motion through the
frames that it has not seen (grey); rolled along the other axis it moves in the other direction, with a ghost in some
frames: no sequence has shown the model a `t` of one motion rolled along the axis of the other. ELBO -203.0 nats a
frame; E_eq 492 (chance 3,555) and CapCorr 1.00 for x and for y (chance 0.22 and 0.08), which such windows give
[after 50 steps](performance.md#the-same-metrics), too
([metrics](../results/sprites-shifts-tvae-told-4000-steps/evaluation.json)).

    tvae train sprites-shifts-tvae-told --steps 4000 --evaluation-sequences 100

![Traversals along each axis, which the model is told](../results/sprites-shifts-tvae-told-4000-steps/traversals.png)

The same, not told: the denominator is the sum over both axes. Rolled along axis 0, `t_0` moves along both at once and
back to where it was; along axis 1 it moves along y, in a jump: the model has not given each motion an axis of its own.
ELBO -224.8 nats a frame; along the axis that fits better, E_eq is 603 (chance 3,550) and CapCorr 0.93 for x and 0.92
for y (chance 0.28 and 0.08)
([metrics](../results/sprites-shifts-tvae-axes-4000-steps/evaluation.json)).

    tvae train sprites-shifts-tvae-axes --steps 4000 --evaluation-sequences 100

![Traversals along each axis](../results/sprites-shifts-tvae-axes-4000-steps/traversals.png)

The others after 1,000 steps on sprites of which one factor advances; all shapes are still discs. E_eq counts what rolls
out of capsules that are not cyclic as lost, CapCorr compares what is left. Made by

    tvae train PRESET --steps 1000 --evaluation-sequences 100

"""


# Presets with committed runs of 1,000 steps, and what their pictures show.
RUNS = {
    "sprites-tvae-third": "5 positions for 15 frames: rolled by thirds, `t_0` continues the motions along x and y "
    "through the frames that it has not seen (grey).",
    "sprites-tvae-phase": "the same capsules, rolled by phase, with much the same pictures.",
    "sprites-tvae-speeds": "CapCorr is 1 for every factor, though the capsules have two speeds.",
    "sprites-tvae-learned": "every capsule has learned a window of its own, `model.topographic.weights`.",
    "sprites-tvae-padded": "what rolls out of a capsule is gone, so that traversals fade away, and a sprite that "
    "leaves at an edge does not come in at the other.",
    "sprites-tvae-causal": "the past alone says less of the motion, and likelihoods are lower; before the first frame "
    "nothing has moved, and whatever comes, `t_0` rolls the same way.",
}


def runs_table() -> str:
    """Return the metrics of `RUNS`, and of chance in brackets."""
    rows, shown = [], ("elbo", "equivariance_error", "capcorr")
    for preset in RUNS:
        metrics = load(FOLDER.parent / f"results/{preset}-1000-steps/evaluation.json")
        metrics = [row for key in shown for row in metrics if row.key == key and (row.part is None or key == "capcorr")]
        names = [row.label for row in metrics]
        values = (f"{row.value:,.{row.digits}f} ({row.chance:,.{row.digits}f})" for row in metrics)
        rows.append([f"`{preset}`", *values])
    heads = ["preset", *names]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def runs() -> str:
    """Return the metrics and a picture of each."""
    text = f"{runs_table()}\n\nIn brackets is what chance gives.\n"
    for preset, shown in RUNS.items():
        text += f"\n`{preset}`: {shown}\n\n![Traversals of {preset}](../results/{preset}-1000-steps/traversals.png)\n"
    return text


def terms(topography: Topography) -> tuple[Neighborhood, torch.Tensor]:
    """Return what every single `u = 1` adds to the window sums of one `t`; and its neighbourhood.

    `(R, capsules, S_U, *lengths)`, asked of the layer itself: one sequence for every element of `u`, which is 1 there
    and 0 elsewhere.
    """
    n = eval(topography.code, {"Neighborhood": Neighborhood})  # the page's own line of code
    _, steps, capsules, dim = shape = n.shape_of_u((1, topography.time, topography.capsules, topography.dim))
    u = torch.eye(steps * dim).view(-1, steps, 1, dim).expand(-1, -1, capsules, -1)
    v = reference.window_sums(u, n)
    lengths, _ = zip(*((length, 0) for length in n.lengths(topography.dim)), strict=True)
    middle = 0
    for length in lengths:
        middle = middle * length + length // 2
    frame = topography.time // 2 if topography.frame < 0 else topography.frame
    padding = n.padding()[1]
    lengths = [length + sum(more) for length, more in zip(lengths, padding, strict=True)]
    return n, v[:, :, frame, :, middle].movedim(2, 1).reshape(n.root_count, capsules, shape[1], *lengths)


def draw(topography: Topography) -> Figure:
    """Frames down and positions across; of capsules with two axes, one panel a frame."""
    n, v = terms(topography)
    (before, _), padding = n.padding()
    frame = topography.time // 2 if topography.frame < 0 else topography.frame
    two_axes = v.ndim == 5
    panels = (
        [(f"frame {l - frame:+d}" if l != frame else "frame of t", v[:, 0, l]) for l in range(v.shape[2])]
        if two_axes
        else [(f"capsule {c}, speed {n.speeds[c]}" if n.speeds else "", v[:, c]) for c in range(v.shape[1])]
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.7), squeeze=False, layout="constrained")
    for index, (axis, (title, sums)) in enumerate(zip(axes[0], panels, strict=True)):
        for root, image in enumerate(sums):
            shown = torch.where(image > 1e-9, image, torch.nan)
            axis.imshow(shown, cmap=MAPS[root], vmin=0, vmax=1.3, alpha=1 if root == 0 else 0.6)
        rows, columns = sums.shape[1:]
        for x in range(columns + 1):
            axis.axvline(x - 0.5, color="0.85", lw=0.5)
        for y in range(rows + 1):
            axis.axhline(y - 0.5, color="0.85", lw=0.5)
        top, left = (padding[0][0], padding[1][0]) if two_axes else (before, padding[0][0])
        inside = (n.axes[0], n.axes[1]) if two_axes else (topography.time, topography.dim)
        if (rows, columns) != inside:
            for y in range(rows):
                for x in range(columns):
                    if not (top <= y < top + inside[0] and left <= x < left + inside[1]):
                        cell = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.7", lw=0)
                        axis.add_patch(cell)
        if not two_axes or index == frame:
            y, x = (n.axes[0] // 2, n.axes[1] // 2) if two_axes else (frame + top, topography.dim // 2 + left)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", lw=2))
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("axis 1" if two_axes else "position", fontsize=9)
        if index == 0:
            axis.set_ylabel("axis 0" if two_axes else "frame", fontsize=9)
    return figure


def page() -> str:
    """Return the text of `topographies.md`."""
    parts = [
        "# Topographies\n\n"
        "Which `u²` share a denominator is one value, a `Neighborhood`, that the layer, its three "
        "backends, the models, the\n"
        "metrics and the rolls of capsule traversals (`roll_capsules`) take alike. Every drawing "
        "shows one `t`, outlined, and\n"
        "the `u²` that feed it: the darker, the larger their coefficient. This page and its drawings are made by\n"
        "`python docs/topographies.py`, which asks the layer.\n\n"
        "Any of these can have weights: `topographic(..., weights=w)` with `w` of "
        "`neighborhood.weights_shape`, or with a\n"
        "leading axis for a window of each capsule; `TopographicLayer(neighborhood, "
        "learn_weights=True)` trains them, from 1\n"
        "on and never negative.\n"
    ]
    for number, topography in enumerate(PAGE):
        parts.append(
            f"## {topography.title}\n\n{topography.text}\n\n{topography.equation}\n\n"
            f"```python\n{topography.code}\n```\n\n![{topography.title}](topographies/{number}.png)\n"
        )
    parts.append(MODELS + runs())
    return "\n".join(parts)


def main() -> None:
    """Write everything."""
    (FOLDER / "topographies").mkdir(exist_ok=True)
    for number, topography in enumerate(PAGE):
        figure = draw(topography)
        figure.savefig(FOLDER / "topographies" / f"{number}.png", dpi=110)
        plt.close(figure)
    (FOLDER / "topographies.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
