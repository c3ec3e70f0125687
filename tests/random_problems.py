"""Random problems over all options of the operation, and what the right answer to each is, from its definition.

The definition is a list of pairs: element of `u`, element of `v`, how much of the one's square is in the other. Nothing
is multiplied by 0, so that what is not finite stays where it has a part; gradients are what autograd makes of the list.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from tvae_kernels import Neighborhood

f32, f64 = torch.float32, torch.float64
SPECIAL = ("", "", "zeros", "tiny", "huge", "inf", "nan", "nan in z")
LAYOUTS = ("contiguous", "transposed", "expanded", "strided")


@dataclass(frozen=True)
class Case:
    """A problem, of which the tensors follow from a seed."""

    neighborhood: Neighborhood
    shape: tuple[int, int, int, int]
    weighted: str  # "", "shared" or "capsule"
    mu: tuple[int, ...] | None  # shape; None for a number
    dtype: torch.dtype
    eps: float
    layout: str
    special: str
    axis: str  # "", "one", or "each" for sequences of their own
    seed: int

    def tensors(self, device="cpu") -> tuple:
        """`z, u, mu, weights, dt`, and the axis."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=f64)

        n, C = self.neighborhood, self.shape[2]
        z, u, dt = normal(*self.shape), normal(*n.shape_of_u(self.shape)), normal(*self.shape)
        if u.numel() and z.numel():
            at = self.seed % u.numel()
            if self.special == "zeros":
                u.zero_()
            elif self.special in ("tiny", "huge"):
                u *= 10.0 ** (torch.arange(u.numel()).reshape(u.shape) % 7 * (1 if self.special == "huge" else -1))
            elif self.special in ("inf", "nan"):
                u.view(-1)[at] = float(self.special)
            elif self.special == "nan in z":
                z.view(-1)[self.seed % z.numel()] = math.nan
        leading = (C,) if self.weighted == "capsule" else ()
        weights = normal(*leading, *n.weights_shape).abs() if self.weighted else None
        mu = 0.5 if self.mu is None else normal(*self.mu).to(device, self.dtype)
        z, u, dt = (self.laid_out(x.to(device, self.dtype)) for x in (z, u, dt))
        weights = None if weights is None else weights.to(device, self.dtype)
        roots = n.root_count
        axis = None
        if self.axis == "one":
            axis = self.seed % roots
        elif self.axis == "each":
            axis = torch.randint(roots, self.shape[:1], generator=generator).to(device)
        return z, u, mu, weights, dt, axis

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values, as they may lie in memory."""
        if self.layout == "transposed":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        if self.layout == "expanded" and x.shape[0]:
            return x[:1].expand(x.shape)
        if self.layout == "strided":
            return torch.stack((x, torch.full_like(x, math.nan)), -1).flatten(3)[..., ::2]
        return x


@st.composite
def cases(draw, most: int, dtypes=(f32, f64, torch.float16, torch.bfloat16)) -> Case:
    """Any problem whose windows have at most so many terms."""
    S, C, B = draw(st.integers(0, 5)), draw(st.sampled_from([1, 2, 1, 2, 0])), draw(st.integers(0, 2))
    axes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    boundary = st.sampled_from(["circular", "zero", "padded"])
    time_boundary, capsule_boundary = draw(boundary), draw(boundary)
    by_phase = len(axes) == 1 and capsule_boundary == "circular" and draw(st.booleans())
    whole, part = st.integers(-3, 3), st.sampled_from([-1.25, -0.5, 0.1, 1 / 3, 0.75, 1000.5])
    several = len(axes) > 1
    if capsule_boundary == "padded":
        part = part.filter(lambda x: x < 100)
    S = max(S, 1) if time_boundary == "circular" else S
    longest = S if time_boundary == "circular" else S + 2
    n = Neighborhood(
        time_window=draw(st.integers(1, max(1, longest))),
        capsule_window=tuple(draw(st.integers(1, a if capsule_boundary == "circular" else a + 2)) for a in axes),
        shift=tuple(draw(whole | part) for _ in axes),
        causal=draw(st.booleans()),
        time_boundary=time_boundary,
        capsule_boundary=capsule_boundary,
        axes=axes if several else draw(st.sampled_from([None, axes])),
        roots=draw(st.sampled_from(["one", "each axis"])) if several else "one",
        speeds=draw(st.none() | st.tuples(*[whole | part.filter(lambda x: x < 100)] * C)) if C else None,
        roll="fourier" if by_phase else "linear",
    )
    D = math.prod(axes)
    case = Case(
        n,
        (B, S, C, D),
        draw(st.sampled_from(["", "shared", "capsule"])),
        draw(st.sampled_from([None, (), (1,), (D,), (C, 1), (1, D), (C, D)])),
        draw(st.sampled_from(dtypes)),
        draw(st.sampled_from([0.0, 1e-6, 0.5])),
        draw(st.sampled_from(LAYOUTS)),
        # a transform makes what it likes of inf, and errors as large as the largest value
        draw(st.sampled_from(["", "zeros", "nan", "nan in z"] if by_phase else SPECIAL)),
        draw(st.sampled_from(["", "one", "each"])) if n.roots == "each axis" else "",
        draw(st.integers(0, 2**31)),
    )
    terms = math.prod(n.weights_shape) * 2 ** sum(x != int(x) for x in _shifts(n)) * max(1, D // 8)
    return case if terms <= most else _smaller(case)


def _smaller(case: Case) -> Case:
    """The same with one tap in its window: others would keep an interpreter too long."""
    return replace(case, neighborhood=replace(case.neighborhood, time_window=1, capsule_window=1))


def _shifts(n: Neighborhood) -> tuple[float, ...]:
    return n.shift if n.is_multidimensional else (n.shift,)


# --- the definition ---------------------------------------------------------------------------------------------------


def definition(case: Case, z, u, mu, weights, dt, axis) -> list[Tensor]:
    """`t` and the gradients of all tensors, in float64."""
    leaves = [x.detach().cpu().to(f64).requires_grad_() if isinstance(x, Tensor) else x for x in (z, u, mu, weights)]
    t = _t(case, *leaves, axis)
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    found = torch.autograd.grad(t, wanted, dt.cpu().to(f64), allow_unused=True)
    return [t.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))]


def _t(case: Case, z, u, mu, weights, axis) -> Tensor:
    n = case.neighborhood
    B, S, C, D = case.shape
    if C == 0 or B == 0:
        return z - mu
    if isinstance(axis, Tensor):  # each sequence by itself: in it, and in its gradient, other roots have no part
        alone = replace(case, shape=(1, S, C, D))
        each = zip(z.split(1), u.split(1), axis.tolist(), strict=True)
        return torch.cat([_t(alone, one_z, one_u, mu, weights, a) for one_z, one_u, a in each])
    v = [[] for _ in range(n.root_count)]
    for c in range(C):
        own = None if weights is None else weights[c] if case.weighted == "capsule" else weights
        for root, sums in enumerate(_sums(n, u[:, :, c], S, D, 1 if n.speeds is None else n.speeds[c], own)):
            v[root].append(sums)
    roots = [(torch.stack(x, 2) + case.eps).sqrt() for x in v]  # (B, S, C, D)
    return (z - mu) / (sum(roots) if axis is None else roots[axis])


def _sums(n: Neighborhood, u: Tensor, S: int, D: int, speed: float, weights) -> list[Tensor]:
    """`v` under each root of one capsule, `(B, S, D)`."""
    lengths = n.axes or (D,)
    windows = n.capsule_window if len(lengths) > 1 else (n.capsule_window,)
    shifts = _shifts(n)
    if len(shifts) == 1 and len(lengths) > 1:
        shifts *= len(lengths)
    last = 0 if n.causal else n.time_window // 2
    frames = range(last - n.time_window + 1, last + 1)
    centred = [range(-((k - 1) // 2), k // 2 + 1) for k in windows]
    before = -frames[0] if n.time_boundary == "padded" else 0
    padding = n.padding()[1] if n.capsule_boundary == "padded" else ((0, 0),) * len(lengths)
    lengths_u = [k + low + high for k, (low, high) in zip(lengths, padding, strict=True)]
    roots = [range(len(lengths))] if n.roots == "one" else [(a,) for a in range(len(lengths))]
    pairs = [([], [], [], []) for _ in roots]  # element of v, of the energies, number of the weight, coefficient
    energies = [u.square().flatten(1)]
    columns = math.prod(windows) if n.roots == "one" else sum(windows)
    for row, i in enumerate(frames):
        offset_of_energy = 0
        if n.roll == "fourier" and not (speed == 1 and n.speeds is None and shifts[0] == int(shifts[0])):
            offset_of_energy = sum(x.shape[1] for x in energies)
            read = {(l + i + before) % S if n.time_boundary == "circular" else l + i + before for l in range(S)}
            read = sorted(read & set(range(u.shape[1])))  # all others have no part, be they finite or not
            shifted = _phase_shifted(u[:, read], round(shifts[0] * speed * i, 12)).square()
            at = torch.tensor(read, dtype=torch.int64)
            energies.append(torch.zeros_like(u).index_copy(1, at, shifted).flatten(1))
        for l in range(S):
            frame = l + i + before
            frame = frame % S if n.time_boundary == "circular" else frame
            if not 0 <= frame < u.shape[1]:
                continue
            for root, axes in enumerate(roots):
                first = 0 if n.roots == "one" else sum(windows[:root])
                for number, k in enumerate(itertools.product(*(centred[a] for a in axes))):
                    for flat, d in enumerate(itertools.product(*map(range, lengths))):
                        where = list(d)
                        for a, ka in zip(axes, k, strict=True):
                            roll = 0 if offset_of_energy else round(shifts[a] * speed * i, 12)
                            where[a] += Fraction(roll) + ka
                        for coefficient, at in _corners(where, lengths, padding, lengths_u, n.capsule_boundary):
                            v, e, w, c = pairs[root]
                            v.append(l * D + flat)
                            e.append(offset_of_energy + frame * math.prod(lengths_u) + at)
                            w.append(row * columns + first + number)
                            c.append(coefficient)
    energy, sums = torch.cat(energies, 1), []
    for v, e, w, c in pairs:
        parts = energy[:, torch.tensor(e, dtype=torch.int64)] * torch.tensor(c, dtype=f64)
        if weights is not None:
            parts = parts * weights.flatten()[torch.tensor(w, dtype=torch.int64)]
        total = torch.zeros(u.shape[0], S * D, dtype=f64)
        sums.append(total.index_add(1, torch.tensor(v, dtype=torch.int64), parts).unflatten(1, (S, D)))
    return sums


def _corners(where, lengths, padding, lengths_u, boundary):
    """Elements of `u` around a point of fractions, each with its coefficient: along each axis 1 - distance."""
    axes = []
    for x, length, (before, _), length_u in zip(where, lengths, padding, lengths_u, strict=True):
        low = math.floor(x)
        part = x - low
        found = []
        for coefficient, at in ((1 - part, low), (part, low + 1)):
            at = at % length if boundary == "circular" else at + before
            if coefficient and 0 <= at < length_u:
                found.append((coefficient, at))
        axes.append(found)
    for corner in itertools.product(*axes):
        flat = 0
        for (_, at), length in zip(corner, lengths_u, strict=True):
            flat = flat * length + at
        yield float(math.prod(c for c, _ in corner)), flat


def _phase_shifted(u: Tensor, offset: float) -> Tensor:
    """`(B, frames, D)` at `d + offset`; whole offsets are rolls, which keep what is not finite where it is."""
    dim = u.shape[-1]
    offset = math.remainder(offset, dim)
    if offset == int(offset):
        return torch.roll(u, -int(offset), -1)
    d = torch.arange(dim, dtype=f64)
    angle = 2 * math.pi * (d[:, None] + offset - d) / dim
    matrix = torch.ones_like(angle)
    for frequency in range(1, (dim - 1) // 2 + 1):
        matrix += 2 * torch.cos(frequency * angle)
    if dim % 2 == 0:
        matrix += torch.cos(math.pi * (d[:, None] - d)) * math.cos(math.pi * offset)
    return (u[:, :, None] * (matrix / dim)).sum(-1)
