"""The taps of any neighbourhood as tables of whole offsets, which kernels and PyTorch operations go through."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import wraps
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neighborhood import Neighborhood
from ..roll import phase_shifted

AXES = 3  # of every table; missing ones come first and have one position


def kept(most: int) -> Callable:
    """Decorate a function of values that returns a tuple: what it returned last is kept, in at most `most` bytes.

    These are those of the tensors, each with some for its objects. What takes more is made anew every time.
    """

    def decorate(function: Callable) -> Callable:
        found, lock = OrderedDict(), Lock()  # the last one used is last; backward passes run in threads of their own

        @wraps(function)
        def call(*arguments):
            with lock:
                if arguments in found:
                    found.move_to_end(arguments)
                    return found[arguments]
            result = function(*arguments)
            with lock:
                found[arguments] = result
                while call.kept_bytes() > most:
                    found.popitem(last=False)
            return result

        call.kept_bytes = lambda: sum(_OBJECT + x.nbytes for xs in found.values() for x in xs if isinstance(x, Tensor))
        call.forget = found.clear
        return call

    return decorate


_OBJECT = 2**10  # bytes, more or less


class Table(NamedTuple):
    """E entries by root, each a tap or a corner of one; G groups of capsules of one speed.

    Offsets lead from a position of `z` to one of `u`, whose axes are longer where they are padded. A tap has as many
    corners in all groups: where its offset is whole and that of another speed is not, equal parts of itself.
    """

    times: Tensor  # (E,) int32: frames from one of z to one of u
    numbers: Tensor  # (E,) int32: which of the weights an entry has
    by_weight: Tensor  # (weights, most) int64: the entries of each weight, filled up with E
    roots: tuple[int, ...]  # R + 1 numbers: where the entries of each root begin and end
    offsets: Tensor  # (G, E, 3) int32
    coefficients: Tensor  # (G, E) of the linear interpolation
    are_ones: bool  # all of them
    groups: Tensor  # (C,) int32: the group of every capsule
    lengths: tuple[int, int, int]  # of the axes of z
    padded: tuple[int, int, int]  # of the axes of u


@kept(2**24)
def table(neighborhood: Neighborhood, capsules: int, dim: int, dtype: torch.dtype, device: torch.device) -> Table:
    """Return the table for capsules of `dim` positions, with coefficients of type `dtype`."""
    speeds = neighborhood.speeds or (1,)
    distinct = sorted(set(speeds))
    (before, _), padding = neighborhood.padding()
    lengths = neighborhood.lengths(dim)
    times, numbers, roots, offsets, coefficients = [], [], [], [[] for _ in distinct], [[] for _ in distinct]
    for taps in zip(*(neighborhood.taps(speed) for speed in distinct), strict=True):
        found = [tap.corners for tap in taps]
        count = max(map(len, found))
        first = -before if neighborhood.time_boundary == "padded" else 0
        times += [taps[0].time - first] * count
        numbers += [taps[0].number] * count
        roots += [taps[0].root] * count
        for group, entries in enumerate(found):
            parts = count // len(entries)  # both are powers of 2, so that the parts of a number are exact
            coefficients[group] += [coefficient / parts for coefficient, _ in entries] * parts
            offsets[group] += [_stored(offset, neighborhood, lengths, padding) for _, offset in entries] * parts

    def tensor(x, dtype=torch.int32):
        return torch.tensor(x, dtype=dtype, device="cpu").to(device)

    by_weight = [[] for _ in range(max(numbers) + 1)]
    for entry, number in enumerate(numbers):
        by_weight[number].append(entry)
    most = max(map(len, by_weight))
    missing = (1,) * (AXES - len(lengths))
    with torch.inference_mode(False):  # it is kept for calls that train
        return Table(
            tensor(times),
            tensor(numbers),
            tensor([x + [len(numbers)] * (most - len(x)) for x in by_weight], torch.int64),
            (*(roots.index(root) for root in range(neighborhood.root_count)), len(roots)),
            tensor(offsets),
            tensor(coefficients, dtype),
            all(x == 1 for group in coefficients for x in group),
            tensor([distinct.index(speeds[c % len(speeds)]) for c in range(capsules)]),
            missing + tuple(lengths),
            missing + tuple(low + n + high for n, (low, high) in zip(lengths, padding, strict=True)),
        )


def _stored(offset: tuple[int, ...], neighborhood: Neighborhood, lengths, padding) -> tuple[int, int, int]:
    """Offsets as the table keeps them: 0 to length - 1 around a circle, from the first padding, else just outside."""
    stored = []
    for o, n, (before, _) in zip(offset, lengths, padding, strict=True):
        if neighborhood.capsule_boundary == "circular":
            stored.append(o % n)
        elif neighborhood.capsule_boundary == "padded":
            stored.append(o + before)
        else:
            stored.append(max(-n, min(n, o)))
    return (0,) * (AXES - len(stored)) + tuple(stored)


def shape_of_r(z: Tensor, neighborhood: Neighborhood) -> tuple[int, ...]:
    """Return the shape of what is kept for the backward pass: `r` of R roots and, where there are several, their scale.

    That of `z` for one root; `(B, R + 1, S, C, D)` for several, with `1 / Σ_roots 1/r` as the last.
    """
    roots = neighborhood.root_count
    return tuple(z.shape) if roots == 1 else (z.shape[0], roots + 1, *z.shape[1:])


@kept(2**24)
def phases(neighborhood: Neighborhood, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Return `h` alone, `(G, W, D)`: `Σ_m h[m] · u[d + m]` is `u` with its phase shifted by the roll of a frame."""
    with torch.inference_mode(False):
        each = torch.eye(dim, dtype=torch.float64, device="cpu")
        h = [
            [phase_shifted(each, round(neighborhood.shift * speed * i, 12))[:, 0] for i in neighborhood.time_taps]
            for speed in sorted(set(neighborhood.speeds or (1,)))
        ]
        return (torch.stack([torch.stack(rows) for rows in h]).to(device, dtype),)


def parts(shape: torch.Size, of_a_frame: int, most: int) -> Iterator[tuple[slice, range]]:
    """All sequences and frames of a tensor `(B, S, ...)` in parts, of which those work on at most so many elements.

    A compiler, which plans its memory by itself, is given all of them as one.
    """
    batch, steps = shape[:2]
    if torch.compiler.is_compiling() or batch * steps * of_a_frame <= most:
        yield slice(0, batch), range(steps)
        return
    frames = min(steps, max(1, most // of_a_frame))
    sequences = max(1, most // (frames * of_a_frame))
    for b in range(0, batch, sequences):
        for first in range(0, steps, frames):
            yield slice(b, b + sequences), range(first, min(first + frames, steps))


def weight_sums(parts: Tensor, by_weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the gradients of the entries, `(..., E)`, added up by weight in a fixed order, to a tensor of `shape`.

    Each weight takes the entries in its row of `Table.by_weight` and no others, not even times 0: they may be NaN.
    """
    return F.pad(parts, (0, 1))[..., by_weight].sum(-1).reshape(shape)
