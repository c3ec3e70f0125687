"""Capsules in the lanes of a program: what the kernels for plain windows share, device functions all.

Along the diagonal `d = e + SHIFT·l` of a capsule a shifting window is a window in time alone, so a lane takes one
diagonal `e`. Sums only ever add: no term that has left a window can leave a trace.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for; every field is a `tl.constexpr`."""

    D: tl.constexpr  # positions in a capsule
    SHIFT: tl.constexpr  # along the capsule with every frame, 0 … D - 1
    FIRST_I: tl.constexpr  # the first of W taps in time
    W: tl.constexpr
    FIRST_K: tl.constexpr  # the first of K taps along the capsule
    K: tl.constexpr
    CIRCULAR: tl.constexpr  # whether time is a circle, else the taps outside are dropped
    EPS: tl.constexpr
    ACC: tl.constexpr  # the type of all arithmetic
    INDEX: tl.constexpr  # the type of offsets within a capsule: int64 only where int32 is too narrow
    CAPSULES: tl.constexpr  # in a program
    LANES: tl.constexpr  # at least CAPSULES · D
    S: tl.constexpr  # frames of a sequence, where it is held as a whole, else 0
    FRAMES: tl.constexpr  # tile: frames of a tile
    RING: tl.constexpr  # tile: whether it holds a whole circle, else it overlaps its neighbours
    SAVE_R: tl.constexpr  # tile: whether the backward pass reads `(v + EPS)^(-1/2)` instead of computing it again


# --- lanes and addresses ----------------------------------------------------------------------------------------------


@triton.jit
def _capsules(lane, BC, C, P: tl.constexpr):
    """Of every lane: its sequence, its capsule, and whether it has any."""
    capsule = tl.program_id(0) * P.CAPSULES
    if P.CAPSULES > 1:  # else one sequence and one capsule for all, which saves their registers
        capsule += lane // P.D
    inside = (lane < P.CAPSULES * P.D) & (capsule < BC)
    return (capsule // C).to(tl.int64), (capsule % C).to(tl.int64), inside


@triton.jit
def _wrapped(x, n):
    """`x` modulo `n` for `0 <= x < 2 * n`."""
    return tl.where(x >= n, x - n, x)


@triton.jit
def _offset(row, column, stride_s, stride_d, P: tl.constexpr):
    """Of an element from the start of its capsule, in elements."""
    return tl.full((), 1, P.INDEX) * row * stride_s + column.to(P.INDEX) * stride_d


# --- sums -------------------------------------------------------------------------------------------------------------


@triton.jit
def _moved(x, lane, e, m, P: tl.constexpr):
    """`x` of the diagonal `(e + m) mod D` of the same capsule, for `0 <= m < D`."""
    lane += tl.where(e + m >= P.D, m - P.D, m)
    return tl.gather(x, tl.minimum(lane, P.LANES - 1), 0)  # spare lanes past the last capsule may point past the end


@triton.jit
def _capsule_sum(x, lane, e, SIGN: tl.constexpr, P: tl.constexpr):
    """`Σ_{m < K} x[e + SIGN·m]`, from partial sums of 1, 2, 4, … terms."""
    total = None
    partial = x
    for digit in tl.static_range(16):
        if (P.K >> digit) % 2 == 1:
            if P.K % (1 << digit) == 0:
                total = partial
            else:
                total += _moved(partial, lane, e, (P.D + SIGN * (P.K % (1 << digit))) % P.D, P)
        if (2 << digit) <= P.K:
            partial += _moved(partial, lane, e, (P.D + SIGN * (1 << digit)) % P.D, P)
    return total


@triton.jit
def _sum_of_squares(x, lane, e, P: tl.constexpr):
    """Over the window along the capsule, for `x` that stands `FIRST_K` positions beside its diagonal."""
    x = x.to(P.ACC)
    return _capsule_sum(x * x, lane, e, 1, P)


@triton.jit
def _row(xs, l: tl.constexpr, CIRCULAR: tl.constexpr):
    """`xs[l]`, or where time is cut and there is no such row, -0, which the compiler knows to change no sum."""
    if CIRCULAR or (l >= 0 and l < len(xs)):
        return xs[l % len(xs)]
    else:
        return tl.full(xs[0].shape, -0.0, xs[0].dtype)


@triton.jit
def _suffix_sums(xs, FIRST: tl.constexpr, W: tl.constexpr, CIRCULAR: tl.constexpr):
    """`Σ_{q = p}^{W - 1} xs[FIRST + q]` for `p = 0 … W - 1`, as a tuple."""
    suffix = _row(xs, FIRST + W - 1, CIRCULAR)
    sums = (suffix,)
    for p in tl.static_range(1, W):
        suffix += _row(xs, FIRST + W - 1 - p, CIRCULAR)
        sums = (suffix,) + sums  # noqa: RUF005 - the compiler of kernels knows no unpacking
    return sums


@triton.jit
def _window_sums(xs, FIRST: tl.constexpr, W: tl.constexpr, CIRCULAR: tl.constexpr):
    """`Σ_{i = FIRST}^{FIRST + W - 1} xs[l + i]` for every row `l`, as a tuple."""
    S: tl.constexpr = len(xs)
    sums = ()
    if CIRCULAR and W == S:  # every window is the whole circle
        total = xs[0]
        for l in tl.static_range(1, S):
            total += xs[l]
        for _ in tl.static_range(S):
            sums += (total,)
    else:
        for start in tl.static_range(FIRST, FIRST + S, W):
            suffixes = _suffix_sums(xs, start, W, CIRCULAR)
            sums += (suffixes[0],)
            prefix = _row(xs, start + W, CIRCULAR)
            for p in tl.static_range(1, min(W, FIRST + S - start)):
                sums += (suffixes[p] + prefix,)
                prefix += _row(xs, start + W + p, CIRCULAR)
    return sums


@triton.jit
def _reciprocal_root(v, P: tl.constexpr):
    """`(v + EPS)^(-1/2)`, at most 2 ulp off, which is what the instruction promises."""
    v += P.EPS
    if v.dtype == tl.float32 and P.EPS < 2.0**-126:  # the instruction takes subnormal numbers for zero: lift them
        lifted = v < 2.0**-100
        return tl.rsqrt(tl.where(lifted, v * 2.0**100, v)) * tl.where(lifted, 2.0**50, 1.0)
    else:
        return tl.rsqrt(v)


@triton.jit
def _load_rows(
    x, e, inside, stride_s, stride_d, FROM: tl.constexpr, TO: tl.constexpr, MOVE: tl.constexpr, P: tl.constexpr
):
    """Frames `FROM … TO - 1` along every lane's diagonal, or `MOVE` positions beside it, as a tuple."""
    rows = ()
    for l in tl.static_range(FROM, TO):
        column = _wrapped(e + (P.SHIFT * l + MOVE) % P.D, P.D)
        rows += (tl.load(x + _offset(l, column, stride_s, stride_d, P), mask=inside, other=0.0),)
    return rows
