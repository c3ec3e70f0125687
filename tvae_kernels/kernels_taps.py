"""Triton kernels for every other window: weighted taps, a capsule with cut edges, a `mu` of each position.

Every program handles a tile of `BLOCK_S` frames by `BLOCK_D` positions of one capsule of one sequence and gathers the
taps of each element one by one, from the caches. The forward pass saves `r = (v + EPS)^(-1/2)`, without which the
backward pass would gather `W·K` taps for each of its `W·K` taps.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(C, TILES_S, TILES_D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which sequence `b`, capsule `c` and row of tiles this program handles, its frames and its positions."""
    pid = tl.program_id(0)
    tile_d = pid % TILES_D
    tile_s = pid // TILES_D % TILES_S
    bc = pid // TILES_D // TILES_S
    frames = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    positions = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    return (bc // C).to(tl.int64), (bc % C).to(tl.int64), tile_s, frames, positions


@triton.jit
def _moved(index, offset, size, CIRCULAR: tl.constexpr):
    """`index + offset` on an axis of `size` elements, and whether it is inside; circular axes wrap around."""
    if CIRCULAR:
        moved = index + (offset % size + size) % size
        return tl.where(moved >= size, moved - size, moved), index < size
    else:
        moved = index + offset
        return moved, (index < size) & (moved >= 0) & (moved < size)


@triton.jit
def _reciprocal_root(x):
    """`x^(-1/2)` by a correctly rounded root and a correctly rounded quotient: at most 1 ulp off."""
    if x.dtype == tl.float64:  # always correctly rounded; the _rn functions take float32 only
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, x.dtype), tl.sqrt_rn(x))


@triton.jit
def taps_forward_kernel(
    z, u, mu, w, t, r,
    S, C, D, TILES_S, TILES_D,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d,
    EPS: tl.constexpr,
    FIRST_I: tl.constexpr, W: tl.constexpr, FIRST_K: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr,
    TIME_CIRCULAR: tl.constexpr, CAPSULE_CIRCULAR: tl.constexpr, WEIGHTED: tl.constexpr, SAVE_R: tl.constexpr,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`r = (Σ_{i,k} w[i,k] · u[l+i, d + SHIFT·i + k]² + EPS)^(-1/2)` and `t = (z - mu) · r`, one tile a program.

    Strides count elements; `t`, `r` and `w` are contiguous. `r` is written where the backward pass will need it.
    """
    b, c, _, frames, positions = _tile(C, TILES_S, TILES_D, BLOCK_S, BLOCK_D)
    l, d = frames[:, None], positions[None, :]
    u += b * u_stride_b + c * u_stride_c
    v = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for i in range(FIRST_I, FIRST_I + W):
        row, row_inside = _moved(l, i, S, TIME_CIRCULAR)
        for k in range(FIRST_K, FIRST_K + K):
            column, column_inside = _moved(d, SHIFT * i + k, D, CAPSULE_CIRCULAR)
            at = row.to(tl.int64) * u_stride_s + column.to(tl.int64) * u_stride_d
            x = tl.load(u + at, mask=row_inside & column_inside, other=0.0).to(ACC)
            if WEIGHTED:
                v += tl.load(w + (i - FIRST_I) * K + (k - FIRST_K)) * (x * x)
            else:
                v += x * x
    reciprocal = _reciprocal_root(v + EPS)

    inside = (l < S) & (d < D)
    l, d = l.to(tl.int64), d.to(tl.int64)
    z_at = b * z_stride_b + l * z_stride_s + c * z_stride_c + d * z_stride_d
    numerator = tl.load(z + z_at, mask=inside).to(ACC) - tl.load(mu + c * mu_stride_c + d * mu_stride_d, mask=d < D)
    out_at = ((b * S + l) * C + c) * D + d
    tl.store(t + out_at, (numerator * reciprocal).to(t.dtype.element_ty), mask=inside)
    if SAVE_R:
        tl.store(r + out_at, reciprocal, mask=inside)


@triton.jit
def taps_backward_kernel(
    dt, z, u, mu, w, r, dz, du, dmu_parts, dw_parts,
    S, C, D, TILES_S, TILES_D,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_c, u_stride_d,
    mu_stride_c, mu_stride_d,
    FIRST_I: tl.constexpr, W: tl.constexpr, FIRST_K: tl.constexpr, K: tl.constexpr, SHIFT: tl.constexpr,
    TIME_CIRCULAR: tl.constexpr, CAPSULE_CIRCULAR: tl.constexpr, WEIGHTED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With `g = -½ · dt · (z - mu) · r³`: `dz = dt · r`, `du[n] = 2 · u[n] · Σ_{i,k} w[i,k] · g[n - (i, SHIFT·i + k)]`.

    One tile a program, which also leaves its share of `dmu = -Σ dt · r` (summed over the tile's frames) and of
    `dw[i,k] = Σ g · u[tap]²` (summed over the tile) for a small, ordered reduction. `r`, `dz`, `du` and `w` are
    contiguous, `dmu_parts` is `(B, TILES_S, C, D)` and `dw_parts` is `(programs, W, K)`.
    """
    b, c, tile_s, frames, positions = _tile(C, TILES_S, TILES_D, BLOCK_S, BLOCK_D)
    l, d = frames[:, None], positions[None, :]
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu += c * mu_stride_c
    capsule = (b * S * C + c) * D  # of the contiguous tensors, whose frames lie C·D apart

    gathered = tl.zeros((BLOCK_S, BLOCK_D), ACC)
    for i in range(FIRST_I, FIRST_I + W):
        row, row_inside = _moved(l, -i, S, TIME_CIRCULAR)
        row = row.to(tl.int64)
        for k in range(FIRST_K, FIRST_K + K):
            column, column_inside = _moved(d, -(SHIFT * i + k), D, CAPSULE_CIRCULAR)
            column = column.to(tl.int64)
            tap = row_inside & column_inside
            dt_tap = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=tap, other=0.0).to(ACC)
            z_tap = tl.load(z + row * z_stride_s + column * z_stride_d, mask=tap, other=0.0).to(ACC)
            r_tap = tl.load(r + capsule + row * C * D + column, mask=tap, other=0.0)
            g_tap = dt_tap * r_tap * ((z_tap - tl.load(mu + column * mu_stride_d, mask=tap, other=0.0)) * r_tap) * r_tap
            if WEIGHTED:
                gathered += tl.load(w + (i - FIRST_I) * K + (k - FIRST_K)) * g_tap
            else:
                gathered += g_tap

    inside = (l < S) & (d < D)
    row, column = l.to(tl.int64), d.to(tl.int64)
    at = capsule + row * C * D + column
    u_here = tl.load(u + row * u_stride_s + column * u_stride_d, mask=inside, other=0.0).to(ACC)
    # 2 · u · (-½ · gathered): the factor -½ of g is taken out of the sum
    tl.store(du + at, (-u_here * gathered).to(du.dtype.element_ty), mask=inside)

    r_here = tl.load(r + at, mask=inside, other=0.0)
    dz_here = tl.load(dt + row * dt_stride_s + column * dt_stride_d, mask=inside, other=0.0).to(ACC) * r_here
    tl.store(dz + at, dz_here.to(dz.dtype.element_ty), mask=inside)
    parts_at = ((b * TILES_S + tile_s) * C + c) * D + positions
    tl.store(dmu_parts + parts_at, -tl.sum(dz_here, axis=0), mask=positions < D)

    if WEIGHTED:
        z_here = tl.load(z + row * z_stride_s + column * z_stride_d, mask=inside, other=0.0).to(ACC)
        mu_here = tl.load(mu + column * mu_stride_d, mask=d < D, other=0.0)
        g = tl.where(inside, -0.5 * dz_here * ((z_here - mu_here) * r_here) * r_here, 0.0)
        dw_parts += tl.program_id(0).to(tl.int64) * W * K
        for i in range(FIRST_I, FIRST_I + W):
            row_tap, row_inside = _moved(l, i, S, TIME_CIRCULAR)
            for k in range(FIRST_K, FIRST_K + K):
                column_tap, column_inside = _moved(d, SHIFT * i + k, D, CAPSULE_CIRCULAR)
                u_at = row_tap.to(tl.int64) * u_stride_s + column_tap.to(tl.int64) * u_stride_d
                x = tl.load(u + u_at, mask=row_inside & column_inside, other=0.0).to(ACC)
                tl.store(dw_parts + (i - FIRST_I) * K + (k - FIRST_K), tl.sum(g * x * x))
