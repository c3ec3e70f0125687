"""Plain windows without weights in PyTorch operations: window sums along skewed capsules.

Along the taps of one window, the position moves by `shift` with each frame. Numbered by `e = d - shift·l` instead of d,
it stands still: the window over time becomes a plain sum over W consecutive frames, which PyTorch adds up in registers
in one pass, whatever W. So the window sum is

    skew     y[m, e] = x[m, e + shift·m], both axes continued around their circles as far as the windows reach
    time     s[l, e] = Σ_i y[l + i, e]
    capsule  s[l, e] = Σ_k s[l, e + k]
    unskew   v[l, d] = s[l, d - shift·l]

Only additions of non-negative terms occur, so the relative error stays below that of the plain sum; a running sum that
subtracts what leaves the window would not have that. No product occurs either, so that inf and NaN stay in the windows
that hold them. A cut edge is a circle with enough zeros between its ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ...arguments import Inputs, Window, compute_dtype
from ...neighborhood import Neighborhood
from ..operators import operator


def window_sum(x: Tensor, neighborhood: Neighborhood, adjoint: bool = False) -> Tensor:
    """Return `reference.window_sum` without weights, faster: `(B, S, C, D)` to the same, which may be `x` itself."""
    taps = neighborhood.time_window * neighborhood.capsule_window
    if taps == 1:
        return x
    if taps <= 4:  # whose rolls cost less than to skew and unskew
        return reference.window_sum(x, neighborhood, adjoint=adjoint)
    return skewed_window_sum(x, neighborhood, adjoint)


def _fake_window_sum(x: Tensor, neighborhood: Neighborhood, adjoint: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


MOST = 2**20  # elements of skewed capsules that are made at once


# A compiler would skew anew for every tap. Exported programs take the sum with them: they run without this package.
@operator("window_sum", _fake_window_sum, looked_into=lambda *_: not torch.compiler.is_dynamo_compiling())
def skewed_window_sum(x: Tensor, neighborhood: Neighborhood, adjoint: bool) -> Tensor:
    """Return the plain window sum as written above, into new memory; of many sequences or frames part by part."""
    batch, steps, capsules, dim = x.shape
    skew = _Skew.of_frames(steps, dim, neighborhood, adjoint)
    if torch.compiler.is_compiling() or batch * capsules * skew.elements <= MOST:
        return _skewed(x, skew)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    frames, window = steps, neighborhood.time_window
    while frames > 8 * window and capsules * skew.elements > MOST:
        frames //= 2
        skew = _Skew.of_frames(min(steps, frames + window - 1), dim, neighborhood, adjoint)
    sequences = max(1, MOST // (capsules * skew.elements))
    for first in range(0, steps, frames):
        count = min(frames, steps - first)
        for b in range(0, batch, sequences):
            known, before = _around(x[b : b + sequences], first, count, neighborhood, adjoint)
            # what these frames lose at their own ends is in no window that is kept
            sums = _skewed(known, _Skew.of_frames(known.shape[1], dim, neighborhood, adjoint))
            total[b : b + sequences, first : first + count] = sums[:, before : before + count]
    return total


def _around(x: Tensor, first: int, count: int, neighborhood: Neighborhood, adjoint: bool) -> tuple[Tensor, int]:
    """Return the frames that some windows reach, and how many of them are before the first of these."""
    steps, taps = x.shape[1], neighborhood.time_taps
    low, high = (-taps[-1], -taps[0]) if adjoint else (taps[0], taps[-1])
    begin, end = first + low, first + count + high
    if neighborhood.time_boundary == "circular" and (begin < 0 or end > steps):
        if end - begin >= steps:
            return x, first
        return x.index_select(1, torch.arange(begin, end, device=x.device) % steps), -low
    begin = max(0, begin)
    return x[:, begin : min(steps, end)], first - begin


class _Skew(NamedTuple):
    """How capsules are skewed: the taps, the circles with the zeros that make axes such, and the lines of `y`."""

    frames: range
    positions: range
    circle: tuple[int, int]
    shift: int
    all_time: bool  # whether all windows on a diagonal are one
    lines: int
    line: int

    @property
    def elements(self) -> int:
        """Count those of a capsule."""
        return self.lines * self.line

    @classmethod
    def of_frames(cls, steps: int, dim: int, neighborhood: Neighborhood, adjoint: bool) -> _Skew:
        """Return that of capsules of `dim` positions in `steps` frames."""
        frames, positions, (pad_steps, pad_dim) = _circle(steps, dim, neighborhood, adjoint)
        window, width, circle = len(frames), len(positions), (steps + pad_steps, dim + pad_dim)
        shift = neighborhood.shift % circle[1] if window > 1 else 0
        # if the windows cover all time and the diagonals meet themselves again
        all_time = window == steps == circle[0] and shift * window % circle[1] == 0
        lines, line = steps + (0 if all_time else window - 1), circle[1] + width - 1  # as far as the windows reach
        return cls(frames, positions, circle, shift, all_time, lines, line)


def _skewed(x: Tensor, skew: _Skew) -> Tensor:
    """Return the sums of all frames at once."""
    shape, (_, steps, capsules, dim) = x.shape, x.shape
    frames, positions, circle, shift, all_time, lines, line = skew
    window, width = len(frames), len(positions)
    if circle != (steps, dim):
        x = F.pad(x, (0, circle[1] - dim, 0, 0, 0, circle[0] - steps))
    index = _indices((frames.start, lines), capsules, (positions.start, line), shift, circle, circle[1], x.device)
    x = x.flatten(1).index_select(1, index)
    x = x.unflatten(1, (lines, capsules * line))  # of no frames -1 would not be known
    if all_time:
        x = x.sum(1)
    elif window > 1:
        x = x.unfold(1, window, 1).sum(-1)
    x = x.flatten(1)
    if width > 1:  # straight through memory: what is summed across the end of a line is never read
        inside = x.shape[1] - width + 1
        total = x[:, :inside] + x[:, 1 : inside + 1]
        for k in range(2, width):
            total += x[:, k : inside + k]
        x = total
    sums = (1 if all_time else circle[0]), circle[1]
    index = _indices((0, steps), capsules, (0, dim), -shift, sums, line, x.device)
    return x.index_select(1, index).view(shape)


def _circle(steps: int, dim: int, neighborhood: Neighborhood, adjoint: bool) -> tuple[range, range, tuple[int, int]]:
    """Return the taps in time and capsule, and how many zeros to put at the ends of both axes to treat them as circles.

    With as many zeros as the longest step, a tap that leaves a cut axis lands on a zero, on either side.
    """
    frames, positions, shift = neighborhood.time_taps, neighborhood.capsule_taps, abs(neighborhood.shift)
    if adjoint:
        frames, positions = (range(1 - taps.stop, 1 - taps.start) for taps in (frames, positions))
    pad_time = pad_capsule = 0
    if neighborhood.time_boundary == "zero":
        frames = _within(frames, max(0, steps - 1))
        pad_time = _reach(frames)
    if neighborhood.capsule_boundary == "zero":
        if shift:  # frames whose every position lies outside contribute nothing
            frames = _within(frames, (dim - 1 + _reach(positions)) // shift)
        pad_capsule = shift * _reach(frames) + _reach(positions)
    return frames, positions, (pad_time, pad_capsule)


def _reach(taps: range) -> int:
    return max(-taps.start, taps.stop - 1)


def _within(taps: range, reach: int) -> range:
    return range(max(taps.start, -reach), min(taps.stop, reach + 1))


def _indices(
    frames: tuple[int, int],
    capsules: int,
    positions: tuple[int, int],
    shift: int,
    circle: tuple[int, int],
    line: int,
    device: torch.device,
) -> Tensor:
    """Return where on the circles `[l, c, e + shift·l]` lies, in memory with lines of `line` elements.

    For every l and e of `frames` and `positions`, each a start and a length, and every capsule c; flattened.
    """
    # the largest number on the way is an index, or a step along the capsule before it is taken around the circle
    largest = max(circle[0] * capsules * line, circle[1] * (circle[0] + frames[1]) + line)
    dtype = torch.int32 if largest < 2**31 else torch.int64
    l = torch.arange(frames[0], sum(frames), dtype=dtype, device=device)[:, None]
    e = torch.arange(positions[0], sum(positions), dtype=dtype, device=device)
    c = torch.arange(capsules, dtype=dtype, device=device)
    starts = (l % circle[0] * capsules + c) * line
    return (starts[:, :, None] + ((e + shift * l) % circle[1])[:, None]).flatten()


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t` in the type of `z`, and `r = (v + eps)^(-1/2)` in the compute type, kept for the backward pass."""
    z, u, mu, _ = inputs
    dtype = compute_dtype(z.dtype)
    r = window_sum(u.to(dtype).square(), window.neighborhood).add_(window.eps).rsqrt_()
    t = (z.to(dtype) - mu) * r
    # Neither a conversion that converts nothing nor an operation in place may make `t`: traced by torch.compile (2.11)
    # as an output of an autograd.Function beside an output without a gradient, it silently makes the gradients zero.
    return (t if t.dtype == z.dtype else t.to(z.dtype)), (r if save_r else None)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """Return the formulas of `reference.topographic_backward`, from the saved `r`."""
    z, u, mu, _ = inputs
    dtype = compute_dtype(z.dtype)
    out, z, u = z.dtype, z.to(dtype), u.to(dtype)
    dz = dt.to(dtype) * r
    dmu = -dz.sum_to_size(mu.shape)

    def g() -> Tensor:  # twice the reference's: its factors -½ and 2 meet in du
        return (mu - z).mul_(dz).mul_(r).mul_(r)

    du = window_sum(g(), window.neighborhood, adjoint=True).mul_(u)  # g has no name: once skewed, its memory is free
    return dz.to(out), du.to(out), dmu, None
