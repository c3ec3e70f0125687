"""Triton kernels for plain windows: all weights 1, a circular capsule and one `mu`.

Two pairs of kernels. The `whole` kernels are for short sequences. Along the diagonal `d = e + SHIFT·l` of a capsule a
shifting window is a window in time alone, so a lane takes one diagonal `e` and holds all its frames in registers; a
window is the sum of a suffix of one block of W frames and a prefix of the next (van Herk 1992), three additions an
element for any W. The `tile` kernels are for long sequences: a program holds a tile of frames and the frames around it
that its windows reach into, and sums by doubling, `p₂ₙ[l, d] = pₙ[l, d] + pₙ[l + n, d + SHIFT·n]`, 2·log2(W) additions
an element at most. Along the capsule both double. Sums only ever add: no term that has left a window can leave a trace.

Both pairs read what they need once, pack whole capsules side by side into the lanes of a program, and compute the root
again for the backward pass: keeping it would cost one more tensor to write and to read.
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


GROUP = tl.constexpr(8)  # frames of a tensor that are asked for before the first of them is used


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


# --- short sequences: a lane holds its whole diagonal -----------------------------------------------------------------


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


@triton.jit
def _whole_window_sums(us, lane, e, P: tl.constexpr):
    """`v` of every frame from the frames of `u`, as a tuple."""
    squares = ()
    for l in tl.static_range(P.S):
        squares += (_sum_of_squares(us[l], lane, e, P),)
    return _window_sums(squares, P.FIRST_I, P.W, P.CIRCULAR)


@triton.jit
def whole_forward_kernel(
    z, u, mu, t, BC, C, S,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """`t = (z - mu) · (v + EPS)^(-1/2)` of whole capsules, contiguous. Strides count elements, BC is B · C.

    On a circle in time every diagonal must meet itself again: D divides SHIFT · S.
    """
    lane = tl.arange(0, P.LANES)
    e = lane % P.D
    b, c, inside = _capsules(lane, BC, C, P)
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu = tl.load(mu)
    t += (b * S * C + c) * P.D

    v = _whole_window_sums(_load_rows(u, e, inside, u_stride_s, u_stride_d, 0, P.S, P.FIRST_K, P), lane, e, P)
    for group in tl.static_range(0, P.S, GROUP):
        zs = _load_rows(z, e, inside, z_stride_s, z_stride_d, group, min(group + GROUP, P.S), 0, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            column = _wrapped(e + P.SHIFT * l % P.D, P.D)
            t_here = (zs[l - group].to(P.ACC) - mu) * _reciprocal_root(v[l], P)
            tl.store(t + _offset(l, column, C * P.D, 1, P), t_here.to(t.dtype.element_ty), mask=inside)


@triton.jit
def whole_backward_kernel(
    dt, z, u, mu, dz, du, dmu_parts, BC, C, S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """With `r = (v + EPS)^(-1/2)`: `dz = dt · r` and `du[n] = -u[n] · Σ_taps (dt · (z - mu) · r³)[n - tap]`."""
    lane = tl.arange(0, P.LANES)
    e = lane % P.D
    b, c, inside = _capsules(lane, BC, C, P)
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu = tl.load(mu)
    dz += (b * S * C + c) * P.D
    du += (b * S * C + c) * P.D

    us = _load_rows(u, e, inside, u_stride_s, u_stride_d, 0, P.S, P.FIRST_K, P)
    v = _whole_window_sums(us, lane, e, P)
    gs = ()
    dmu = tl.zeros((P.LANES,), P.ACC)
    for group in tl.static_range(0, P.S, GROUP):
        dts = _load_rows(dt, e, inside, dt_stride_s, dt_stride_d, group, min(group + GROUP, P.S), 0, P)
        zs = _load_rows(z, e, inside, z_stride_s, z_stride_d, group, min(group + GROUP, P.S), 0, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            column = _wrapped(e + P.SHIFT * l % P.D, P.D)
            r = _reciprocal_root(v[l], P)
            dz_here = dts[l - group].to(P.ACC) * r
            tl.store(dz + _offset(l, column, C * P.D, 1, P), dz_here.to(dz.dtype.element_ty), mask=inside)
            dmu += dz_here
            g = dz_here * ((zs[l - group].to(P.ACC) - mu) * r) * r
            gs += (_capsule_sum(g, lane, e, -1, P),)
    tl.store(dmu_parts + tl.program_id(0), -tl.sum(tl.where(inside, dmu, 0.0), axis=0))

    gathered = _window_sums(gs, 1 - P.FIRST_I - P.W, P.W, P.CIRCULAR)
    for l in tl.static_range(P.S):
        column = _wrapped(e + (P.SHIFT * l + P.FIRST_K) % P.D, P.D)
        du_here = -us[l].to(P.ACC) * gathered[l]  # 2 · u · (-½ · gathered): the -½ of g stands outside its sum
        tl.store(du + _offset(l, column, C * P.D, 1, P), du_here.to(du.dtype.element_ty), mask=inside)


# --- long sequences: a tile of frames and its surroundings ------------------------------------------------------------


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


@triton.jit
def tile_forward_kernel(
    z, u, mu, t, r, BC, C, S,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    SAVE_R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """As `whole_forward_kernel`: row r of a tile holds frame `l + FIRST_I + r` of `u` and frame `l + r` of `t`."""
    l = _first_frame(P.FRAMES - P.W + 1, P)
    row, lane, b, c, frame, inside = _tile(l + P.FIRST_I, S, BC, C, P)
    move: tl.constexpr = (P.SHIFT * P.FIRST_I + P.FIRST_K) % P.D
    at = _at(u, frame, lane, b, c, move, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
    x = tl.load(at, mask=inside, other=0.0).to(P.ACC)
    reciprocal = _reciprocal_root(_tile_window_sum(x * x, row, lane, P), P)

    frame, inside = _answered(l, row, lane, BC, C, S, P.FRAMES - P.W + 1, P)
    at = _at(z, frame, lane, b, c, 0, z_stride_b, z_stride_s, z_stride_c, z_stride_d, P)
    t_here = (tl.load(at, mask=inside, other=0.0).to(P.ACC) - tl.load(mu)) * reciprocal
    at = _at(t, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, t_here.to(t.dtype.element_ty), mask=inside)
    if SAVE_R:
        tl.store(_at(r, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P), reciprocal, mask=inside)


@triton.jit
def tile_backward_kernel(
    dt, z, u, mu, r, dz, du, dmu_parts, BC, C, S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    P: tl.constexpr,
):  # fmt: skip
    """As `whole_backward_kernel`: row r of a tile holds frame `l - LAST_I + r` of `dz` and frame `l + r` of `du`."""
    LAST_I: tl.constexpr = P.FIRST_I + P.W - 1
    LAST_K: tl.constexpr = P.FIRST_K + P.K - 1
    ANSWERED: tl.constexpr = P.FRAMES - P.W + 1 if P.SAVE_R else P.FRAMES - 2 * (P.W - 1)
    l = _first_frame(ANSWERED, P)
    row, lane, b, c, frame, inside = _tile(l - P.W + 1, S, BC, C, P)
    if not P.SAVE_R:
        move: tl.constexpr = (P.SHIFT * P.FIRST_I + P.FIRST_K) % P.D
        at = _at(u, frame, lane, b, c, move, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
        x = tl.load(at, mask=inside, other=0.0).to(P.ACC)
        reciprocal = _reciprocal_root(_tile_window_sum(x * x, row, lane, P), P)

    _, _, _, _, frame, inside = _tile(l - LAST_I, S, BC, C, P)
    if P.SAVE_R:
        at = _at(r, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
        reciprocal = tl.load(at, mask=inside, other=0.0)
    at = _at(dt, frame, lane, b, c, 0, dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d, P)
    dz_here = tl.load(at, mask=inside, other=0.0).to(P.ACC) * reciprocal
    at = _at(z, frame, lane, b, c, 0, z_stride_b, z_stride_s, z_stride_c, z_stride_d, P)
    g = dz_here * ((tl.load(at, mask=inside, other=0.0).to(P.ACC) - tl.load(mu)) * reciprocal) * reciprocal
    own = inside
    if not P.RING:
        g = tl.where(inside, g, 0.0)
        own = inside & (row >= LAST_I) & (row < LAST_I + ANSWERED) & (l - LAST_I + row < S)
    at = _at(dz, frame, lane, b, c, 0, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, dz_here.to(dz.dtype.element_ty), mask=own)
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dmu_parts + part, -tl.sum(tl.where(own, dz_here, 0.0), axis=0))

    # The third program index is 0, which the compiler does not know: else it would keep what it found out about rows
    # and lanes for the first window sum in registers for this one, more than there are.
    row += tl.program_id(2)
    lane += tl.program_id(2)
    gathered = _tile_window_sum(g, row, lane, P)
    frame, inside = _answered(l, row, lane, BC, C, S, ANSWERED, P)
    move_du: tl.constexpr = (P.SHIFT * LAST_I + LAST_K) % P.D
    at = _at(u, frame, lane, b, c, move_du, u_stride_b, u_stride_s, u_stride_c, u_stride_d, P)
    du_here = -tl.load(at, mask=inside, other=0.0).to(P.ACC) * gathered
    at = _at(du, frame, lane, b, c, move_du, S * C * P.D, C * P.D, P.D, 1, P)
    tl.store(at, du_here.to(du.dtype.element_ty), mask=inside)
