"""Windows that roll by phase shifts in PyTorch operations: one transform, and one back for each frame of a window.

    v[l, d] = Σ_{i,k} w[i,k] · x_i[l + i, d + k]²        x_i = irfft(rfft(u) · exp(2πi · f · offset_i / D))

A phase shift is undone, and transposed, by the opposite one (also where D is even: the highest frequency shrinks by
`cos(π · offset)` both ways). So the gradient of `u` is gathered as a spectrum, over all frames of the window, and takes
a single transform back. Whole offsets are exact rolls.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...arguments import Inputs, Window, compute_dtype, has_own_weights
from ...neighborhood import Neighborhood
from ...roll import moved, phase_of_each_frequency, widest_type


def forward(inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t` in the type of `z`, and `r = (v + eps)^(-1/2)` in the compute type, kept for the backward pass."""
    (z, u, mu, weights), (n, eps) = inputs, window
    dtype = compute_dtype(z.dtype)
    shifts = _Shifts.of_u(u.to(dtype), n)
    (before, _), _ = n.padding()
    columns = [0] * (1 if weights is None else n.capsule_window)  # Σ_i w[i,k] · x_i², by k where they differ
    for row, i in enumerate(n.time_taps):
        energy = shifts.shifted(row).square()
        weighted = [_weighted(energy, weights, n, row, k) for k in range(len(columns))]  # before an edge cuts it off
        columns = [
            x + moved(y, 1, i, n.time_boundary, before, z.shape[1]) for x, y in zip(columns, weighted, strict=True)
        ]
    v = _sum([torch.roll(columns[k % len(columns)], -offset, -1) for k, offset in enumerate(n.capsule_taps)])
    r = (v + eps).rsqrt()
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
    g = (mu - z.to(dtype)) * dz * r * r  # twice: -½ and 2 meet in du
    columns = [torch.roll(g, offset, -1) for offset in n.capsule_taps]
    if weights is None:
        columns = [_sum(columns)]
    spectrum, du, dw = 0, 0, []
    for row, i in enumerate(n.time_taps):
        x = shifts.shifted(row)
        gathered = _sum([_weighted(column, weights, n, row, k) for k, column in enumerate(columns)])
        part_of_spectrum, part = shifts.transposed(row, x * _from_z(gathered, i, n))
        spectrum, du = spectrum + part_of_spectrum, du + part
        if weights is not None:
            dw += [_weight_gradient(column, x, i, n, has_own_weights(weights, n)) for column in columns]
    du = shifts.gathered(spectrum, du)
    dw = None if weights is None else torch.stack(dw, -1).reshape(weights.shape) / 2
    return dz.to(z.dtype), du.to(u.dtype), -dz.sum_to_size(mu.shape), dw


def _sum(terms: list[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _weighted(x: Tensor, weights: Tensor | None, n: Neighborhood, row: int, k: int) -> Tensor:
    """Return `w[row, k] · x`, where each capsule may have weights of its own."""
    if weights is None:
        return x
    return (weights[:, row, k, None] if has_own_weights(weights, n) else weights[row, k]) * x


def _from_z(x: Tensor, i: int, n: Neighborhood) -> Tensor:
    """At every frame of `u`, `x` of the frame of `z` whose tap `i` it is, and 0 where there is none."""
    (before, after), _ = n.padding()
    if n.time_boundary == "padded":
        return F.pad(x, (0, 0) * 2 + (before + i, after - i))
    return moved(x, 1, -i, n.time_boundary)


def _weight_gradient(g: Tensor, x: Tensor, i: int, n: Neighborhood, own_weights: bool) -> Tensor:
    """Return `Σ g · x[tap]²` over the frames whose tap is there: 0 times a gradient that is not finite is no 0."""
    (before, _), _ = n.padding()
    steps = g.shape[1]
    if n.time_boundary == "circular":
        x = moved(x, 1, i, "circular")
    elif n.time_boundary == "padded":
        x = x.narrow(1, before + i, steps)
    else:
        first, last = max(0, -i), min(steps, steps - i)
        g, x = (y.narrow(1, first + offset, max(0, last - first)) for y, offset in ((g, 0), (x, i)))
    return (g * x * x).sum((0, 1, 3) if own_weights else (0, 1, 2, 3))


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
        needed = u.numel() and any(x != int(x) for row in offsets for x in row)
        return cls(u, torch.fft.rfft(u) if needed else None, offsets)

    def _phases(self, row: int, sign: int) -> Tensor:
        """Return `exp(±2πi · f · offset / D)`, `(C or 1, D // 2 + 1)`; not by `conj`, whose flag operators may lose."""
        offsets = _column(self.offsets[row], self.u, widest_type(self.u))
        cos, sin = phase_of_each_frequency(offsets, self.u.shape[-1], self.u)
        return torch.complex(cos, sign * sin)

    def shifted(self, row: int) -> Tensor:
        """Return `x_i`, of the shape of `u`."""
        rolled = self._rolled(self.u, row, 1)
        if self._all_whole(row):
            return rolled
        x = torch.fft.irfft(self.spectrum * self._phases(row, 1), n=self.u.shape[-1])
        return x if rolled is None else torch.where(self._whole(row), rolled, x)

    def transposed(self, row: int, y: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return what the transposed shift adds to the spectrum of `du`, and to `du` itself."""
        rolled = self._rolled(y, row, -1)
        if self._all_whole(row):
            return 0, rolled
        spectrum = torch.fft.rfft(y) * self._phases(row, -1)
        if rolled is None:
            return spectrum, 0
        return spectrum.masked_fill(self._whole(row), 0), rolled.masked_fill(~self._whole(row), 0)

    def gathered(self, spectrum: Tensor | float, du: Tensor | float) -> Tensor:
        """Return `du` from what `transposed` gave for all frames."""
        return du if isinstance(spectrum, int) else torch.fft.irfft(spectrum, n=self.u.shape[-1]) + du

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
