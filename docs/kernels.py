"""The picture of docs/performance.md: how the kernels take window sums. `python docs/kernels.py` draws it."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

FILE = Path(__file__).with_suffix(".png")
PALE, WINDOW, SUFFIX, PREFIX = "0.94", "tab:orange", "tab:green", "tab:purple"


def cell(axis: Axes, x: float, y: float, color: str = PALE, text: str = "", edge: str = "white", width: float = 1):
    """Return a unit square with its corner at `(x, y)`."""
    axis.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor=edge, linewidth=width))
    axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black"):
    """From `start` to `end`."""
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    )


def lanes(axis: Axes, size: int = 8, window: range = range(1, 5), lane: int = 6):
    """Return a capsule of one sequence, its diagonals, and the window of one element."""
    for l in range(size):
        for d in range(size):
            mine = (d - l) % size == lane
            cell(axis, d, l, "lightblue" if mine else PALE, f"$x_{l}$" if mine else "")
            if mine and l in window:
                axis.add_patch(Rectangle((d + 0.06, l + 0.06), 0.88, 0.88, fill=False, edgecolor=WINDOW, linewidth=2.5))
    axis.set(xlim=(-0.2, size + 0.2), ylim=(size + 0.2, -0.2), xlabel="position d in the capsule", ylabel="frame l")
    axis.set_title("A shifting window is a window in time\nalong a diagonal, which one lane holds")


def blocks(axis: Axes, size: int = 12, window: int = 4, first: int = 2):
    """One diagonal, with its suffix and prefix sums."""
    for l in range(size):
        cell(axis, l, 0, "lightblue", f"$x_{{{l}}}$")
    for start in range(0, size, window):
        axis.plot([start, start], [-0.4, 4.9], color="gray", lw=0.8, ls="--")
        axis.text(start + window / 2, -0.5, f"block of W = {window}", ha="center", fontsize=8, color="gray")
    axis.add_patch(Rectangle((first, -0.08), window, 1.16, fill=False, edgecolor=WINDOW, linewidth=2.5))
    edge = (first // window + 1) * window
    for p in range(window):
        cell(axis, edge - 1 - p, 1.6, "honeydew" if edge - 1 - p != first else "lightgreen", f"$s_{edge - 1 - p}$")
        cell(axis, edge + p, 2.9, "lavender" if edge + p != first + window - 1 else "plum", f"$p_{edge + p}$")
    arrow(axis, (edge - 0.1, 1.4), (edge - window + 0.1, 1.4), SUFFIX)
    arrow(axis, (edge + 0.1, 2.7), (edge + window - 0.1, 2.7), PREFIX)
    axis.text(edge + 0.15, 2.1, "suffix sums", color=SUFFIX, fontsize=9, va="center")
    axis.text(edge - 0.15, 3.4, "prefix sums", color=PREFIX, fontsize=9, va="center", ha="right")
    axis.text(size / 2, 4.6, f"$v_{first} = s_{first} + p_{first + window - 1}$", ha="center", va="center", fontsize=13)
    axis.set(xlim=(-0.2, size + 0.2), ylim=(5.2, -1.2))
    axis.axis("off")
    axis.set_title("Three additions an element give the sums of\nevery window, whatever W; none subtracts")


def tiles(axis: Axes, frames: int = 16, window: int = 4):
    """Return what a program of the backward pass holds of a long sequence."""
    halo = window - 1
    columns = (
        ("u", "read", range(frames), "lightblue"),
        ("v, g", "computed", range(halo, frames), "lightgreen"),
        ("du", "written", range(halo, frames - halo), "plum"),
    )
    for x, (name, what, valid, color) in enumerate(columns):
        for l in range(frames):
            cell(axis, 2.2 * x, l, color if l in valid else PALE)
        axis.text(2.2 * x + 0.5, -0.5, name, ha="center", fontsize=10)
        axis.text(2.2 * x + 0.5, frames + 0.9, what, ha="center", fontsize=8)
    for x, row in ((0, 5), (1, 9)):
        sign = -1 if x == 0 else 1
        for step in range(window):
            source = (2.2 * x + 1, row + sign * step + 0.5)
            arrow(axis, source, (2.2 * (x + 1), row + 0.5), WINDOW)
    for low, high, text in ((0, halo, "halo"), (halo, frames - halo, "answered"), (frames - halo, frames, "halo")):
        axis.plot([6, 6.15, 6.15, 6], [low + 0.1, low + 0.1, high - 0.1, high - 0.1], color="gray", lw=1)
        axis.text(6.35, (low + high) / 2, text, va="center", fontsize=9, color="gray")
    axis.set(xlim=(-0.3, 8.6), ylim=(frames + 1.4, -1.3))
    axis.axis("off")
    axis.set_title("A tile of a long sequence computes its halo\nagain rather than wait for its neighbours")


def draw(file: Path = FILE) -> Path:
    """Draw the three panels side by side."""
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 4.6), layout="constrained", gridspec_kw={"width_ratios": (1, 1.35, 0.9)}
    )
    for panel, axis in zip((lanes, blocks, tiles), axes, strict=True):
        panel(axis)
        axis.title.set_fontsize(10.5)
    axes[0].set_aspect("equal")
    axes[0].set(xticks=[], yticks=[])
    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


if __name__ == "__main__":
    print(draw())
