"""Tiles of frames by lanes: the device functions of the kernels for plain windows over long sequences."""

import triton
import triton.language as tl

from .lanes import _capsules, _offset, _wrapped


@triton.jit
def _ahead(x, row, lane, m: tl.constexpr, n: tl.constexpr, P: tl.constexpr):
    """`x` of the element `m` frames and `n` positions further on, for `0 <= n < D`."""
    row += m
    if P.RING:
        row = _wrapped(row, P.S)
    lane += tl.where(lane % P.D + n >= P.D, n - P.D, n)
    return tl.gather(x, tl.minimum(row * P.LANES + lane, P.FRAMES * P.LANES - 1), 0)  # nobody looks past the end


@triton.jit
def _line_sum(x, row, lane, COUNT: tl.constexpr, TIME: tl.constexpr, POSITION: tl.constexpr, P: tl.constexpr):
    """`Σ_{m < COUNT}` of the element `TIME·m` frames and `POSITION·m` positions further on."""
    total = None
    partial = x
    for digit in tl.static_range(16):
        if (COUNT >> digit) % 2 == 1:
            if COUNT % (1 << digit) == 0:
                total = partial
            else:
                total += _ahead(
                    partial, row, lane, COUNT % (1 << digit) * TIME, COUNT % (1 << digit) * POSITION % P.D, P
                )
        if (2 << digit) <= COUNT:
            partial += _ahead(partial, row, lane, (1 << digit) * TIME, (P.D + (1 << digit) * POSITION) % P.D, P)
    return total


@triton.jit
def _tile_window_sum(x, row, lane, P: tl.constexpr):
    """`Σ_{m < W, n < K}` of the element `m` frames and `SHIFT·m + n` positions further on."""
    return _line_sum(_line_sum(x, row, lane, P.K, 0, 1, P), row, lane, P.W, 1, P.SHIFT, P)


@triton.jit
def _first_frame(COUNT: tl.constexpr, P: tl.constexpr):
    """Of the `COUNT` frames that a program answers for."""
    return 0 if P.RING else tl.program_id(1) * COUNT


@triton.jit
def _tile(first, S, BC, C, P: tl.constexpr):
    """Of every element of a tile whose first row is frame `first`.

    Its row and its lane; its sequence and its capsule; the index of its frame; and whether it exists.
    """
    element = tl.arange(0, P.FRAMES * P.LANES)
    row, lane = element // P.LANES, element % P.LANES
    b, c, inside = _capsules(lane, BC, C, P)
    if P.RING:
        frame, inside = _wrapped((first % P.S + P.S) % P.S + row, P.S), inside & (row < P.S)
    elif P.CIRCULAR:
        frame = _wrapped((first % S + S) % S + row, S)
    else:
        frame, inside = first + row, inside & (first + row >= 0) & (first + row < S)
    return row, lane, b, c, frame, inside


@triton.jit
def _answered(l, row, lane, BC, C, S, COUNT: tl.constexpr, P: tl.constexpr):
    """Of every element: the frame whose result it holds, and whether this is one of the `COUNT` frames from `l` on."""
    _, _, inside = _capsules(lane, BC, C, P)
    if P.RING:
        return row, inside & (row < P.S)
    else:
        return l + row, inside & (row < COUNT) & (l + row < S)


@triton.jit
def _at(x, frame, lane, b, c, move: tl.constexpr, stride_b, stride_s, stride_c, stride_d, P: tl.constexpr):
    """Where every element of `x` is, `move` positions further on, for `0 <= move < D`."""
    return x + (b * stride_b + c * stride_c) + _offset(frame, _wrapped(lane % P.D + move, P.D), stride_s, stride_d, P)
