"""Kernels from what the encoders say of `z` and `u` to `t` and both KL terms, for short sequences and plain windows.

They are the `whole` kernels of `plain` with other ends: a lane samples the frames of its diagonal as it reads
their means and log-variances, and adds up on the way what the posterior costs. With `noise` of unit variance,

    x = mean + exp(½ · log_variance) · noise        KL = ½ · Σ (mean² + exp(log_variance) - 1 - log_variance)

Neither `z` nor `u` nor the noise is ever in memory: the backward pass draws it again, by Philox with a counter that
follows from the element's place in the batch, for four frames of a lane at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arguments import Inputs, Noise, Window, compute_dtype
from ...neighborhood import Neighborhood
from .lanes import _capsule_sum, _load_rows, _offset, _reciprocal_root, _window_sums, _wrapped
from .launch import ceiling, launch
from .plain import MOST_POSITIONS, Choice, choice

GROUP = tl.constexpr(4)  # frames that are asked for before the first of them is used, and whose noise is drawn at once
Z = tl.constexpr(0)  # streams of noise
U = tl.constexpr(1)
FRAMES = tl.constexpr(32)  # no fewer than a lane can hold
MOST_FRAMES = 18  # that a lane can hold in registers, with their samples


@triton.jit
def _lanes(C, P: tl.constexpr):
    """Lane, diagonal, sequence, capsule, and whether there is one; a program has capsules of one sequence alone."""
    lane = tl.arange(0, P.LANES)
    blocks = (C + P.CAPSULES - 1) // P.CAPSULES  # of a sequence
    c = tl.program_id(0) % blocks * P.CAPSULES + lane // P.D
    b = (tl.program_id(0) // blocks).to(tl.int64)
    return lane, lane % P.D, b, c.to(tl.int64), (lane < P.CAPSULES * P.D) & (c < C)


@triton.jit
def _first_count(b, c, e, C, first, P: tl.constexpr):
    """Of the Philox counters of a lane: no two elements of the whole batch, of `z` and of `u`, share a number."""
    GROUPS: tl.constexpr = (P.S + GROUP - 1) // GROUP
    return (((first + b) * C + c) * P.D + e) * (2 * GROUPS)


@triton.jit
def _group_rows(x, e, inside, stride_s, stride_d, FROM: tl.constexpr, MOVE: tl.constexpr, P: tl.constexpr):
    """Load a group of frames along every lane's diagonal, or `MOVE` positions beside it, as a tuple."""
    return _load_rows(x, e, inside, stride_s, stride_d, FROM, min(FROM + GROUP, P.S), MOVE, P)


@triton.jit
def _circle(x):
    """Sine and cosine of `2π · x / 2**32`, by their series for half the angle: the library's are for any angle.

    Half the angle is at most π/2, where the first term left out is below 2**-30.
    """
    a = x.to(tl.int32, bitcast=True).to(tl.float32) * 7.314590396e-10  # π / 2**32
    q = a * a
    sin = 1.6059044e-10 * q - 2.5052108e-8
    sin = ((((sin * q + 2.7557319e-6) * q - 1.9841270e-4) * q + 8.3333333e-3) * q - 1.6666667e-1) * q + 1.0
    cos = -1.1470746e-11 * q + 2.0876757e-9
    cos = (((((cos * q - 2.7557319e-7) * q + 2.4801587e-5) * q - 1.3888889e-3) * q + 4.1666667e-2) * q - 0.5) * q + 1.0
    sin *= a
    return 2.0 * sin * cos, 1.0 - 2.0 * sin * sin


@triton.jit
def _two_normals(x, y):
    """From two blocks of 32 random bits each (Box and Muller 1958): up to 6.7 standard deviations."""
    radius = tl.sqrt(tl.maximum(-2.0 * tl.log((x.to(tl.float32) + 1.0) * 2.0**-32), 0.0))
    sin, cos = _circle(y)
    return radius * cos, radius * sin


@triton.jit
def _noise_rows(
    noise, count, e, inside, stride_s,
    FROM: tl.constexpr, MOVE: tl.constexpr, STREAM: tl.constexpr, GIVEN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Noise of a group of frames along every lane's diagonal, as a tuple: `noise` holds it or, if not GIVEN, a seed."""
    if GIVEN:
        rows = _group_rows(noise, e, inside, stride_s, 1, FROM, MOVE, P)
    else:
        a, b, c, d = tl.randint4x(noise, count + (FROM // GROUP * 2 + STREAM))
        rows = _two_normals(a, b) + _two_normals(c, d)
    return rows


@triton.jit
def _posterior(mean, log_variance, P: tl.constexpr):
    """Mean, standard deviation and KL divergence from the prior, element by element."""
    mean, log_variance = mean.to(P.ACC), log_variance.to(P.ACC)
    std = tl.exp(0.5 * log_variance)
    return mean, std, 0.5 * (mean * mean + (std * std - 1.0 - log_variance))


@triton.jit
def latents_forward_kernel(
    z, u, noise_z, noise_u, seed, first, mu, t, kl_z, kl_u, C, S,
    z_stride_b, z_stride_s, z_stride_p, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_p, u_stride_c, u_stride_d,
    GIVEN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """`t = (z - mu) · (v + EPS)^(-1/2)` at samples, and a program's share of the KL terms of every frame.

    `z` and `u` hold means and, `stride_p` further on, log-variances. Given noise and `t` are contiguous.
    """
    lane, e, b, c, inside = _lanes(C, P)
    count = _first_count(b, c, e, C, first, P)
    here = (b * S * C + c) * P.D
    if GIVEN:
        noise_z += here
        noise_u += here
    else:
        noise_z = tl.load(seed)
        noise_u = noise_z
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    mu = tl.load(mu)
    frames = tl.arange(0, FRAMES)

    squares = ()
    kls = tl.zeros((FRAMES,), P.ACC)
    for group in tl.static_range(0, P.S, GROUP):
        # Before anything is asked for: what is on its way already takes registers.
        noise = _noise_rows(noise_u, count, e, inside, C * P.D, group, P.FIRST_K, U, GIVEN, P)
        means = _group_rows(u, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        logs = _group_rows(u + u_stride_p, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            mean, std, kl = _posterior(means[l - group], logs[l - group], P)
            x = mean + std * noise[l - group].to(P.ACC)
            squares += (_capsule_sum(x * x, lane, e, 1, P),)
            kls = tl.where(frames == l, tl.sum(tl.where(inside, kl, 0.0), axis=0), kls)
    tl.store(kl_u + tl.program_id(0).to(tl.int64) * S + frames, kls, mask=frames < S)
    v = _window_sums(squares, P.FIRST_I, P.W, P.CIRCULAR)

    e += tl.program_id(2)  # 0, which the compiler does not know: else it would keep all columns in registers
    for group in tl.static_range(0, P.S, GROUP):
        means = _group_rows(z, e, inside, z_stride_s, z_stride_d, group, 0, P)
        logs = _group_rows(z + z_stride_p, e, inside, z_stride_s, z_stride_d, group, 0, P)
        noise = _noise_rows(noise_z, count, e, inside, C * P.D, group, 0, Z, GIVEN, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            mean, std, kl = _posterior(means[l - group], logs[l - group], P)
            t_here = (mean + std * noise[l - group].to(P.ACC) - mu) * _reciprocal_root(v[l], P)
            at = t + here + _offset(l, _wrapped(e + P.SHIFT * l % P.D, P.D), C * P.D, 1, P)
            tl.store(at, t_here.to(t.dtype.element_ty), mask=inside)
            kls = tl.where(frames == l, tl.sum(tl.where(inside, kl, 0.0), axis=0), kls)
    tl.store(kl_z + tl.program_id(0).to(tl.int64) * S + frames, kls, mask=frames < S)


@triton.jit
def latents_backward_kernel(
    dt, dkl_z, dkl_u, z, u, noise_z, noise_u, seed, first, mu, dz, du, dmu_parts, C, S,
    dt_stride_b, dt_stride_s, dt_stride_c, dt_stride_d,
    z_stride_b, z_stride_s, z_stride_p, z_stride_c, z_stride_d,
    u_stride_b, u_stride_s, u_stride_p, u_stride_c, u_stride_d,
    GIVEN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """With the gradient `dx` of a sample as in `whole_backward_kernel`, those of what it was drawn from:

    `dmean = dx + dkl · mean` and `dlog_variance = ½ · (dx · (x - mean) + dkl · (exp(log_variance) - 1))`.
    `dkl_z` and `dkl_u`, `(B, S)`, `dz` and `du` are contiguous; the latter are laid out as `z` and `u` are.
    """
    lane, e, b, c, inside = _lanes(C, P)
    count = _first_count(b, c, e, C, first, P)
    here = (b * S * C + c) * P.D
    if GIVEN:
        noise_z += here
        noise_u += here
    else:
        noise_z = tl.load(seed)
        noise_u = noise_z
    dt += b * dt_stride_b + c * dt_stride_c
    z += b * z_stride_b + c * z_stride_c
    u += b * u_stride_b + c * u_stride_c
    dz += (b * S * 2 * C + c) * P.D
    du += (b * S * 2 * C + c) * P.D
    dkl_z += b * S
    dkl_u += b * S
    mu = tl.load(mu)

    us, squares = (), ()
    for group in tl.static_range(0, P.S, GROUP):
        means = _group_rows(u, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        logs = _group_rows(u + u_stride_p, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        noise = _noise_rows(noise_u, count, e, inside, C * P.D, group, P.FIRST_K, U, GIVEN, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            mean, std, _ = _posterior(means[l - group], logs[l - group], P)
            us += (mean + std * noise[l - group].to(P.ACC),)
            squares += (_capsule_sum(us[l] * us[l], lane, e, 1, P),)
    v = _window_sums(squares, P.FIRST_I, P.W, P.CIRCULAR)

    gs = ()
    dmu = tl.zeros((P.LANES,), P.ACC)
    for group in tl.static_range(0, P.S, GROUP):
        dts = _group_rows(dt, e, inside, dt_stride_s, dt_stride_d, group, 0, P)
        means = _group_rows(z, e, inside, z_stride_s, z_stride_d, group, 0, P)
        logs = _group_rows(z + z_stride_p, e, inside, z_stride_s, z_stride_d, group, 0, P)
        noise = _noise_rows(noise_z, count, e, inside, C * P.D, group, 0, Z, GIVEN, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            mean, std, _ = _posterior(means[l - group], logs[l - group], P)
            deviation = std * noise[l - group].to(P.ACC)
            r = _reciprocal_root(v[l], P)
            dx = dts[l - group].to(P.ACC) * r
            dkl = tl.load(dkl_z + l)
            at = dz + _offset(l, _wrapped(e + P.SHIFT * l % P.D, P.D), 2 * C * P.D, 1, P)
            tl.store(at, (dx + dkl * mean).to(dz.dtype.element_ty), mask=inside)
            dlog = 0.5 * (dx * deviation + dkl * (std * std - 1.0))
            tl.store(at + C * P.D, dlog.to(dz.dtype.element_ty), mask=inside)
            dmu += dx
            gs += (_capsule_sum(dx * ((mean + deviation - mu) * r) * r, lane, e, -1, P),)
    tl.store(dmu_parts + tl.program_id(0), -tl.sum(tl.where(inside, dmu, 0.0), axis=0))

    gathered = _window_sums(gs, 1 - P.FIRST_I - P.W, P.W, P.CIRCULAR)
    for group in tl.static_range(0, P.S, GROUP):
        means = _group_rows(u, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        logs = _group_rows(u + u_stride_p, e, inside, u_stride_s, u_stride_d, group, P.FIRST_K, P)
        for l in tl.static_range(group, min(group + GROUP, P.S)):
            mean, std, _ = _posterior(means[l - group], logs[l - group], P)
            dx = -us[l] * gathered[l]  # 2 · u · (-½ · gathered): the -½ of g stands outside its sum
            dkl = tl.load(dkl_u + l)
            at = du + _offset(l, _wrapped(e + (P.SHIFT * l + P.FIRST_K) % P.D, P.D), 2 * C * P.D, 1, P)
            tl.store(at, (dx + dkl * mean).to(du.dtype.element_ty), mask=inside)
            dlog = 0.5 * (dx * (us[l] - mean) + dkl * (std * std - 1.0))
            tl.store(at + C * P.D, dlog.to(du.dtype.element_ty), mask=inside)


# --- which problems, and their launches -------------------------------------------------------------------------------


def fits(inputs: Inputs, neighborhood: Neighborhood) -> bool:
    """Say whether a lane holds a diagonal of the problem, whose window is plain, with its samples in registers."""
    (z, u, mu, _), n = inputs, neighborhood
    _, steps, _, _, dim = z.shape
    if n.capsule_boundary != "circular" or mu.numel() != 1 or u.dtype != z.dtype:
        return False
    held = 0 < steps <= MOST_FRAMES and 0 < dim <= MOST_POSITIONS
    return held and (n.time_boundary != "circular" or n.shift * steps % dim == 0)


def forward(inputs: Inputs, window: Window, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """Return `t` and the KL terms of every frame, `(B, S)`."""
    z, u, mu, _ = inputs
    B, S, _, C, D = z.shape
    t = torch.empty((B, S, C, D), dtype=z.dtype, device=z.device)
    chosen, blocks = _choose(inputs, window, z)
    kl = torch.empty((2, B, blocks, S), dtype=compute_dtype(z.dtype), device=z.device)
    arguments = (z, u, *noise, mu, t, kl[0], kl[1], C, S, *z.stride(), *u.stride())
    options = {"GIVEN": noise.seed is None, "P": chosen.plan, "num_warps": chosen.warps}
    launch(z, latents_forward_kernel, (B * blocks,), *arguments, **options)
    return t, *kl.sum(2)


def backward(
    inputs: Inputs, window: Window, noise: Noise, dt: Tensor, dkl_z: Tensor, dkl_u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `z`, of `u` and of `mu`."""
    z, u, mu, _ = inputs
    B, S, _, C, _ = z.shape
    dz, du = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, u))
    chosen, blocks = _choose(inputs, window, dt)
    dmu_parts = torch.empty(B * blocks, dtype=compute_dtype(z.dtype), device=z.device)
    arguments = (dt, dkl_z.contiguous(), dkl_u.contiguous(), z, u, *noise, mu)
    arguments += (dz, du, dmu_parts, C, S, *dt.stride(), *z.stride(), *u.stride())
    options = {"GIVEN": noise.seed is None, "P": chosen.plan, "num_warps": chosen.warps}
    launch(z, latents_backward_kernel, (B * blocks,), *arguments, **options)
    return dz, du, dmu_parts.sum().reshape(mu.shape)


def _choose(inputs: Inputs, window: Window, dt: Tensor) -> tuple[Choice, int]:
    """Return the plan of the `whole` kernels, and how many programs a sequence takes."""
    z, u, _, _ = inputs
    _, S, _, C, D = z.shape
    extents = [(S - 1) * x.stride(1) + (D - 1) * x.stride(-1) for x in (z, u, dt)]
    wide = max(*extents, 2 * S * C * D) >= 2**31
    chosen = choice(window.neighborhood, S, D, compute_dtype(z.dtype), window.eps, wide)
    return chosen, ceiling(C, chosen.capsules)
