"""Windows that roll by phase shifts in PyTorch operations: one transform, and one back for each frame of a window.

    v[l, d] = Σ_{i,k} w[i,k] · x_i[l + i, d + k]²        x_i = irfft(rfft(u) · exp(2πi · f · offset_i / D))

A phase shift is undone, and transposed, by the opposite one (also where D is even: the highest frequency shrinks by
`cos(π · offset)` both ways). So the gradient of `u` is gathered as a spectrum, over all frames of the window, and takes
a single transform back. Whole offsets are exact rolls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ...roll import phase_of_each_frequency, widest_type
from ..tables import parts

MOST = 2**20  # elements that the sums for every k have at once, where there are more frames or sequences


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t` in the type of `z`, and `r = (v + eps)^(-1/2)` in the compute type, kept for the backward pass."""
    (z, u, mu, weights), (n, eps) = inputs, window
    dtype = compute_dtype(z.dtype)
    shifts = _Shifts.of_u(u.to(dtype), n)
    v = _filled(z, weights, n, lambda *part: _window_sum(shifts, weights, n, *part))
    r = v.add_(eps).rsqrt_()
    t = (z.to(dtype) - mu) * r
    return (t if t.dtype == z.dtype else t.to(z.dtype)), (r if save_r else None)


def backward(inputs: Inputs, window: Window, r: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """With `g = -½ · dt · (z - mu) · r³`, at a frame `i` later and `k` positions further on for each tap:

    dz = dt · r      dw[i,k] = Σ g · x_i[tap]²      du = Σ_i shift_i^T(2 · x_i · Σ_k w[i,k] · g[n - tap])
    """
    (z, u, mu, weights), n = inputs, window.neighborhood
    dtype = compute_dtype(z.dtype)
    shifts = _Shifts.of_u(u.to(dtype), n)
    dz = dt.to(dtype) * r
    dmu = -dz.sum_to_size(mu.shape)
    g = (mu - z.to(dtype)).mul_(dz).mul_(r).mul_(r)  # twice: -½ and 2 meet in du
    dz = dz.to(z.dtype)
    dw = None if weights is None else torch.zeros_like(weights)
    du = _filled(u, weights, n, lambda *part: _gradient(shifts, g, weights, n, dw, *part))
    return dz, du.to(u.dtype), dmu, None if dw is None else dw.div_(2)


def _filled(like: Tensor, weights: Tensor | None, n: Neighborhood, call: Callable[[slice, range], Tensor]) -> Tensor:
    """Return what a function gives for some sequences and frames, of all of them, in the shape of a tensor."""
    whole, columns = None, 1 if weights is None else n.capsule_window
    for batch, frames in parts(like.shape, like[:1, :1].numel() * columns, MOST):
        part = call(batch, frames)
        if part.shape == like.shape:
            return part
        whole = part.new_empty(like.shape) if whole is None else whole
        whole[batch, frames.start : frames.stop] = part
    return whole


def _window_sum(shifts: _Shifts, weights: Tensor | None, n: Neighborhood, batch: slice, frames: range) -> Tensor:
    """Return `v` of some frames of `z`."""
    (before, _), _ = n.padding()
    B, S, C, D = shifts.u[batch].shape
    count = 1 if weights is None else n.capsule_window
    columns = [shifts.u.new_zeros((B, len(frames), C, D)) for _ in range(count)]  # Σ_i w[i,k] · x_i², by k
    for row, i in enumerate(n.time_taps):
        there, source = _reached(frames, i + before, S, n)
        if len(source):
            energy = shifts.shifted(row, batch, source).square()
            for k, column in enumerate(columns):
                column[:, there].add_(_weighted(energy, weights, n, row, k))
    return _sum(torch.roll(columns[k % count], -offset, -1) for k, offset in enumerate(n.capsule_taps))


def _gradient(
    shifts: _Shifts, g: Tensor, weights: Tensor | None, n: Neighborhood, dw: Tensor | None, batch: slice, frames: range
) -> Tensor:
    """Return `du` of some frames of `u`, and add to `dw` what is in them."""
    (before, _), _ = n.padding()
    reached = [_reached(frames, -(i + before), g.shape[1], n) for i in n.time_taps]
    columns, first = _columns(g[batch], weights, n, [source for _, source in reached])
    spectrum = du = None
    shape = g[batch].shape[0], len(frames), *g.shape[2:]
    for row, (there, source) in enumerate(reached):
        if not len(source):  # no window has this tap in these frames, and transforms refuse what is empty
            continue
        x = shifts.shifted(row, batch, range(frames.start + there.start, frames.start + there.stop))
        taken = [_taken(column, range(source.start - first, source.stop - first)) for column in columns]
        product = x * _sum(_weighted(column, weights, n, row, k) for k, column in enumerate(taken))
        for_spectrum, for_du = shifts.transposed(row, product)
        spectrum, du = _added(spectrum, for_spectrum, there, shape), _added(du, for_du, there, shape)
        for k in range(0 if weights is None else len(taken)):
            summed = (0, 1, 3) if has_own_weights(weights, n) else (0, 1, 2, 3)
            dw[..., row, k].add_((taken[k] * x * x).sum(summed))
    if spectrum is None:
        return g.new_zeros(shape) if du is None else du
    from_spectrum = torch.fft.irfft(spectrum, n=shape[-1])
    return from_spectrum if du is None else from_spectrum.add_(du)


def _added(total: Tensor | None, part: Tensor | None, there: slice, shape: tuple[int, ...]) -> Tensor | None:
    """Return a total, of zeros at first, with a part of its frames added to it; of nothing None."""
    if part is not None:
        total = part.new_zeros((*shape[:-1], part.shape[-1])) if total is None else total
        total[:, there].add_(part)
    return total


def _columns(g: Tensor, weights: Tensor | None, n: Neighborhood, sources: list[range]) -> tuple[list[Tensor], int]:
    """Return `g` of some frames as each `k` takes it, or their sum without weights, and the number of the first."""
    begin = min((x.start for x in sources if len(x)), default=0)
    end = max((x.stop for x in sources if len(x)), default=0)
    if end - begin < g.shape[1]:
        g = _taken(g, range(begin, end))
    else:
        begin = 0  # all, which are a circle where more are reached
    columns = (torch.roll(g, offset, -1) for offset in n.capsule_taps)
    return ([_sum(columns)] if weights is None else list(columns)), begin


def _reached(frames: range, offset: int, known: int, n: Neighborhood) -> tuple[slice, range]:
    """Return which of some frames have one `offset` later among those that are known, from the first on; and those."""
    if n.time_boundary == "circular":
        return slice(0, len(frames)), range(frames.start + offset, frames.stop + offset)
    begin = max(frames.start, -offset)
    end = max(begin, min(frames.stop, known - offset))
    return slice(begin - frames.start, end - frames.start), range(begin + offset, end + offset)


def _taken(x: Tensor, frames: range) -> Tensor:
    """Return some frames of `x`, which is a circle if they reach beyond it."""
    steps = x.shape[1]
    if frames.start >= 0 and frames.stop <= steps:
        return x[:, frames.start : frames.stop]
    begin = frames.start % steps
    return torch.cat((x[:, begin : begin + len(frames)], x[:, : max(0, begin + len(frames) - steps)]), 1)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """Add up tensors, of which the first, if it is not alone, is nobody else's."""
    total = None
    for x in terms:
        total = x if total is None else total.add_(x)
    return total


def _weighted(x: Tensor, weights: Tensor | None, n: Neighborhood, row: int, k: int) -> Tensor:
    """Return `w[row, k] · x`, where each capsule may have weights of its own."""
    if weights is None:
        return x
    return (weights[:, row, k, None] if has_own_weights(weights, n) else weights[row, k]) * x


class _Shifts(NamedTuple):
    """`u` and its spectrum, and by how far each frame of a window shifts the phase of every capsule."""

    u: Tensor
    spectrum: Tensor | None  # None if all offsets are whole
    offsets: list[list[float]]  # (W, C), or (W, 1) where all capsules are alike; the nearest ones around the circle

    @classmethod
    def of_u(cls, u: Tensor, n: Neighborhood) -> _Shifts:
        """All shifts of a neighbourhood."""
        dim, speeds = u.shape[-1], n.speeds or (1,)
        offsets = [[math.remainder(round(n.shift * speed * i, 12), dim or 1) for speed in speeds] for i in n.time_taps]
        if u.numel() == 0:  # which transforms refuse
            offsets = [[0.0] * len(row) for row in offsets]
        needed = any(x != int(x) for row in offsets for x in row)
        return cls(u, torch.fft.rfft(u) if needed else None, offsets)

    def _phases(self, row: int, sign: int) -> Tensor:
        """Return `exp(±2πi · f · offset / D)`, `(C or 1, D // 2 + 1)`; not by `conj`, whose flag operators may lose."""
        offsets = _column(self.offsets[row], self.u, widest_type(self.u))
        cos, sin = phase_of_each_frequency(offsets, self.u.shape[-1], self.u)
        return torch.complex(cos, sign * sin)

    def shifted(self, row: int, batch: slice, frames: range) -> Tensor:
        """Return `x_i` of some frames, which may go around a circle."""
        u = _taken(self.u[batch], frames)
        rolled = self._rolled(u, row, 1)
        if self._all_whole(row):
            return rolled
        x = torch.fft.irfft(_taken(self.spectrum[batch], frames) * self._phases(row, 1), n=u.shape[-1])
        return x if rolled is None else torch.where(self._whole(row), rolled, x)

    def transposed(self, row: int, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what the transposed shift adds to the spectrum of `du`, and to `du` itself."""
        rolled = self._rolled(y, row, -1)
        if self._all_whole(row):
            return None, rolled
        spectrum = torch.fft.rfft(y) * self._phases(row, -1)
        if rolled is None:
            return spectrum, None
        return spectrum.masked_fill(self._whole(row), 0), rolled.masked_fill(~self._whole(row), 0)

    def _all_whole(self, row: int) -> bool:
        return self.spectrum is None or all(x == int(x) for x in self.offsets[row])

    def _whole(self, row: int) -> Tensor:
        """Say whether the offset of each capsule is whole, `(C, 1)`."""
        return _column([float(x == int(x)) for x in self.offsets[row]], self.u) > 0

    def _rolled(self, x: Tensor, row: int, sign: int) -> Tensor | None:
        """Return `x` of the capsules whose offset is whole, and anything of the others; None if there are none."""
        offsets = [sign * int(x) for x in self.offsets[row]]
        if self._all_whole(row) and len(set(offsets)) == 1:
            return torch.roll(x, -offsets[0], -1)
        if not any(x == int(x) for x in self.offsets[row]):
            return None
        dim = x.shape[-1]
        d = torch.arange(dim, device=x.device)
        index = (d + _column(offsets, d)) % max(dim, 1)
        return x.gather(-1, index.expand(x.shape))


def _column(values: list[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `(C, 1)`, written on the device: a copy to it would wait for it, and no CUDA graph could capture it."""
    return torch.stack([torch.full((1,), x, dtype=dtype or like.dtype, device=like.device) for x in values])
