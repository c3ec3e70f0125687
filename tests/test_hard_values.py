"""Values that are not finite, shifts that are far, batches that are empty: what they must leave alone."""

import math

import pytest
import torch
from numerics import exhaustive
from test_topographies import definition

from tvae_kernels import Neighborhood, TopographicLayer, roll_capsules, topographic, topographic_latents

f32, f64 = torch.float32, torch.float64


def normal(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def solve(backend, neighborhood, z, u, mu, weights, dt, eps=1e-6, axis=None):
    leaves = [x.detach().requires_grad_() for x in (z, u, mu, weights) if x is not None]
    given = [*leaves, None] if weights is None else leaves
    t = topographic(*given[:3], neighborhood, given[3], eps, backend, axis)
    return t.detach(), *torch.autograd.grad(t, leaves, dt)


# --- taps that an edge cuts off ---------------------------------------------------------------------------------------

CUT = {
    "time": (Neighborhood(3, 1, time_boundary="zero"), 3),
    "time, causal": (Neighborhood(3, 1, causal=True, time_boundary="zero"), 3),
    "capsule": (Neighborhood(1, 3, capsule_boundary="zero"), 3),
    "fraction": (Neighborhood(3, 1, 0.5, time_boundary="zero", capsule_boundary="zero"), 3),
    "phase": (Neighborhood(3, 1, 0.5, time_boundary="zero", roll="fourier"), 3),
    "axes": (Neighborhood(3, (1, 2), axes=(2, 2), time_boundary="zero", capsule_boundary="zero"), 4),
    "roots": (Neighborhood(3, 2, axes=(2, 2), roots="each axis", time_boundary="zero", capsule_boundary="zero"), 4),
    "speeds": (Neighborhood(3, 2, speeds=(1, 0.5), time_boundary="zero", capsule_boundary="zero"), 3),
}
cuts = pytest.mark.parametrize(("neighborhood", "dim"), CUT.values(), ids=CUT)


def test_a_weight_learns_nothing_from_taps_that_are_not_there(backend, device):
    """NaN in the first frame, which no later tap of that frame reaches and no earlier one has."""
    z, u, dt = (normal(1, 4, 1, 3, seed=s).to(device) for s in range(3))
    z[:, 0] = math.nan
    neighborhood = Neighborhood(3, 1, time_boundary="zero")
    weights = torch.ones(3, 1, dtype=f64, device=device)
    dw = solve(backend, neighborhood, z, u, z.new_tensor(0.3), weights, dt)[-1]
    # the tap of the frame before is cut off in the first frame; the other two reach u from the NaN
    assert dw.isnan().flatten().tolist() == [False, True, True]


def taps_of_first_element(neighborhood, dim):
    """Which weights have a tap of capsule 0, position 0, frame 0 that is there."""
    lengths, found = neighborhood.lengths(dim), torch.zeros(neighborhood.weights_shape, dtype=torch.bool)
    n = neighborhood.of_capsule(0)
    for tap in n.taps():
        inside = tap.time >= 0
        if n.capsule_boundary == "zero":
            inside &= all(-1 < o < size for o, size in zip(tap.offsets, lengths, strict=True))
        found.view(-1)[tap.number] |= inside
    return found


@cuts
@pytest.mark.parametrize("own", [False, True], ids=["shared", "capsule"])
def test_what_is_not_finite_reaches_the_weights_of_its_taps_alone(backend, device, neighborhood, dim, own):
    shape = (1, 4, 2, dim)
    z, u, dt = (normal(*shape, seed=s).to(device) for s in range(3))
    shape = (2, *neighborhood.weights_shape) if own else neighborhood.weights_shape
    weights = normal(*shape, seed=4).abs().to(device)
    mu = z.new_tensor(0.3)
    z[0, 0, 0, 0] = math.nan
    dw = solve(backend, neighborhood, z, u, mu, weights, dt)[-1]
    there = taps_of_first_element(neighborhood, dim)
    assert torch.equal(dw.isnan().cpu(), torch.stack((there, torch.zeros_like(there))) if own else there)


@cuts
def test_a_weight_that_is_not_finite_matters_where_its_taps_are(backend, device, neighborhood, dim):
    z, u, dt = (normal(1, 4, 2, dim, seed=s).to(device) for s in range(3))
    weights = normal(*neighborhood.weights_shape, seed=4).abs().to(device)
    there = taps_of_first_element(neighborhood, dim)
    cut = [i for i, inside in enumerate(there.flatten()) if not inside]
    if not cut:
        pytest.skip("no tap of the first element is cut off")
    weights.view(-1)[cut[0]] = math.nan
    t = solve(backend, neighborhood, z, u, z.new_tensor(0.3), weights, dt)[0]
    assert t[0, 0, 0, 0].isfinite()
    assert t.isnan().any()


# --- sequences along another axis -------------------------------------------------------------------------------------

AXES = Neighborhood(1, 1, axes=(2, 2), roots="each axis")


@pytest.mark.parametrize("own", [False, True], ids=["shared", "capsule"])
def test_weights_of_another_axis_do_not_matter(backend, device, own):
    z, u, dt = (normal(2, 3, 2, 4, seed=s).to(device) for s in range(3))
    weights = torch.tensor([[1.0, 0.0]], dtype=f64, device=device)
    weights = weights.expand(2, 1, 2) if own else weights
    mu = normal(2, 1, seed=7).to(device)
    expected = solve(backend, AXES, z, u, mu, weights, dt, 0.0, axis=0)
    actual = solve(backend, AXES, z, u, mu, weights, dt, 0.0, axis=torch.tensor([0, 0], device=device))
    for x, y in zip(actual, expected, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    assert not actual[-1][..., 1].any()


def test_z_along_another_axis_does_not_matter_to_weights(backend, device):
    neighborhood = Neighborhood(3, 2, axes=(2, 2), roots="each axis", speeds=(1, 2))
    z, u, dt = (normal(2, 3, 2, 4, seed=s).to(device) for s in range(3))
    z[1] = math.nan
    weights = normal(*neighborhood.weights_shape, seed=3).abs().to(device)
    mu = normal(4, seed=7).to(device)
    axis = torch.tensor([0, 1], device=device)
    dw = solve(backend, neighborhood, z, u, mu, weights, dt, axis=axis)[-1]
    assert dw[:, :2].isfinite().all()
    assert dw[:, 2:].isnan().all()
    alone = solve(backend, neighborhood, z[:1], u[:1], mu, weights, dt[:1], axis=0)[-1]
    torch.testing.assert_close(dw[:, :2], alone[:, :2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weighted", [False, True])
def test_padded_capsules_may_roll_along_a_known_axis(backend, device, weighted):
    """The padding along other axes is not looked at; zeros around are cut edges."""
    cut = Neighborhood(3, (2, 3), (1, -1), axes=(2, 3), roots="each axis", capsule_boundary="zero")
    padded = Neighborhood(3, (2, 3), (1, -1), axes=(2, 3), roots="each axis", capsule_boundary="padded")
    z, u, dt = (normal(2, 3, 2, 6, seed=s).to(device) for s in range(3))
    weights = normal(*cut.weights_shape, seed=3).abs().to(device) if weighted else None
    _, ((top, bottom), (left, right)) = padded.padding()
    wide = torch.nn.functional.pad(u.unflatten(3, (2, 3)), (left, right, top, bottom)).flatten(3)
    assert wide.shape == padded.shape_of_u(z.shape)
    for axis in (0, 1, torch.tensor([1, 0], device=device)):
        t, dz, du, dmu, *dw = solve(backend, cut, z, u, z.new_tensor(0.3), weights, dt, axis=axis)
        found = solve(backend, padded, z, wide, z.new_tensor(0.3), weights, dt, axis=axis)
        lengths = (2 + top + bottom, 3 + left + right)
        du_wide = found[2].unflatten(3, lengths)[..., top : top + 2, left : left + 3].flatten(3)
        for x, y in zip((*found[:2], du_wide, *found[3:]), (t, dz, du, dmu, *dw), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_narrow_types_along_axes_are_rounded_once(backend, device, dtype):
    """That of `mu` is a sum over all axes, here of parts that nearly cancel."""
    neighborhood = Neighborhood(3, 2, axes=(2, 2), roots="each axis")
    z, u, dt = (normal(4, 3, 2, 4, seed=s, dtype=dtype).to(device) for s in range(3))
    axis = torch.tensor([0, 1, 0, 1], device=device)
    dt = dt.abs() * (1 - 2 * axis.to(dtype))[:, None, None, None]
    mu = normal(2, 4, seed=7, dtype=dtype).to(device)
    exact = solve("reference", neighborhood, *(x.double() for x in (z, u, mu)), None, dt.double(), axis=axis)
    for x, y in zip(solve(backend, neighborhood, z, u, mu, None, dt, axis=axis), exact, strict=True):
        assert x.dtype == dtype
        # sums of at most 24 terms in float32, of the size of the largest, and one rounding (the interpreter cuts off)
        bound = torch.finfo(dtype).eps * y.abs() + 100 * torch.finfo(f32).eps * y.abs().max()
        assert ((x.double() - y).abs() <= bound).all()


# --- phases of far shifts, of no capsules, of narrow types ------------------------------------------------------------

FAR = [500.5, 33_333.67, 1e7 + 0.5]


@pytest.mark.parametrize("shift", FAR)
@pytest.mark.parametrize("dim", [5, 6, 501])
def test_phase_shifts_far_along_are_exact(shift, dim):
    """Rounded are u, angles of at most a turn and 2·log2(D) stages of transforms: as for shifts within the circle."""
    t = normal(1, dim, dtype=f32)
    far, near = (
        roll_capsules(t, 1, Neighborhood(shift=x, roll="fourier")) for x in (shift, math.remainder(shift, dim))
    )
    exact = roll_capsules(t.double(), 1, Neighborhood(shift=math.remainder(shift, dim), roll="fourier"))
    bound = (2 * math.pi + 4 * math.log2(dim) + 4) * torch.finfo(f32).eps * t.norm()
    assert torch.equal(far, near)
    assert (far - exact).abs().max() < bound


@pytest.mark.parametrize("shift", FAR)
def test_windows_of_phase_shifts_far_along_are_exact(backend, device, shift):
    neighborhood = Neighborhood(2, 1, shift, causal=True, roll="fourier")
    near = Neighborhood(2, 1, round(math.remainder(shift, 5), 12), causal=True, roll="fourier")
    z, u, dt = (normal(1, 3, 1, 5, seed=s, dtype=f32).to(device) for s in range(3))
    actual = solve(backend, neighborhood, z, u, z.new_tensor(0.3), None, dt)
    expected = solve("reference", near, z.double(), u.double(), z.new_tensor(0.3).double(), None, dt.double())
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5 * y.abs().max().item())


@pytest.mark.parametrize("boundary", ["zero", "padded"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_phase_shift_that_no_window_has_spoils_nothing(backend, device, boundary, weighted):
    """Of the frame that is read at once alone, and not a frame later, where all positions would have a part of it."""
    neighborhood = Neighborhood(2, 1, 0.3, time_boundary=boundary, roll="fourier")
    z, dt = (normal(1, 3, 1, 5, seed=s).to(device) for s in range(2))
    u = normal(*neighborhood.shape_of_u(z.shape), seed=2).to(device)
    weights = normal(2, 1, seed=3).abs().to(device) if weighted else None
    expected = solve(backend, neighborhood, z, u, z.new_tensor(0.3), weights, dt)
    u[0, 0, 0, 1] = math.nan
    t, dz, du, *_ = solve(backend, neighborhood, z, u, z.new_tensor(0.3), weights, dt)
    spoilt = torch.zeros(5, dtype=torch.bool, device=device)
    spoilt[1] = True
    for x, y in zip((t, dz, du), expected, strict=False):
        assert torch.equal(x[0, 0, 0].isnan(), spoilt)
        torch.testing.assert_close(x[0, 0, 0][~spoilt], y[0, 0, 0][~spoilt], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, f32, f64])
def test_capsules_of_any_type_roll_by_phase(dtype):
    t = normal(3, 2, 6, dtype=dtype)
    neighborhood = Neighborhood(shift=0.5, roll="fourier")
    found = roll_capsules(t, 1, neighborhood)
    assert found.dtype == dtype
    torch.testing.assert_close(found, roll_capsules(t.double(), 1, neighborhood).to(dtype))


EMPTY = [
    Neighborhood(3, 2, time_boundary="zero"),
    Neighborhood(9, 9, time_boundary="zero", capsule_boundary="zero"),
    Neighborhood(3, 2, 0.5, time_boundary="zero"),
    Neighborhood(3, 2, 0.5, time_boundary="zero", roll="fourier"),
    Neighborhood(3, (1, 2), axes=(1, 4), roots="each axis", time_boundary="zero"),
    Neighborhood(3, 2, time_boundary="padded", capsule_boundary="padded"),
]


def assert_nothing(backend, neighborhood, shape, weighted, device, eps=1e-6, axis=None):
    """The result is empty, and no gradient is anything but 0."""
    z, u = normal(*shape).to(device), normal(*neighborhood.shape_of_u(shape)).to(device)
    leading = shape[2:3] if weighted == "capsule" else ()
    weights = torch.ones(*leading, *neighborhood.weights_shape, dtype=f64, device=device) if weighted else None
    for mu in (z.new_tensor(0.3), normal(*shape[2:]).to(device)):
        t, dz, du, dmu, *dw = solve(backend, neighborhood, z, u, mu, weights, z, eps, axis)
        assert t.shape == dz.shape == shape
        assert (du.shape, dmu.shape) == (u.shape, mu.shape)
        assert [x.shape for x in dw] == ([weights.shape] if weighted else [])
        assert not any(x.any() for x in (du, dmu, *dw))


@pytest.mark.parametrize("neighborhood", EMPTY, ids=repr)
@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)], ids=str)
def test_nothing_gives_nothing(backend, device, neighborhood, weighted, shape):
    """An empty batch, sequences without a frame, no capsules: gradients of zero."""
    assert_nothing(backend, neighborhood, shape, weighted, device)
    if "padded" not in (neighborhood.time_boundary, neighborhood.capsule_boundary):
        assert roll_capsules(normal(*shape).to(device), 1, neighborhood).shape == shape


@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4)], ids=str)
def test_nothing_gives_nothing_by_phases_of_capsules(backend, device, weighted, shape):
    neighborhood = Neighborhood(3, 2, speeds=(0.1, -1.25), time_boundary="zero", roll="fourier")
    assert_nothing(backend, neighborhood, shape, weighted, device)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
@pytest.mark.parametrize(
    ("shape", "speeds"),
    [((0, 3, 2, 4), None), ((2, 3, 0, 4), None), ((0, 3, 0, 4), None), ((0, 3, 2, 4), (1, 0.5))],
    ids=str,
)
def test_nothing_gives_nothing_along_an_axis_for_each_sequence(backend, device, speeds, shape, weighted, eps):
    """Without eps sequences become capsules, of which there are none then; speeds are of capsules."""
    neighborhood = Neighborhood(3, (1, 2), axes=(2, 2), roots="each axis", time_boundary="zero", speeds=speeds)
    axis = torch.zeros(shape[0], dtype=torch.int64, device=device)
    assert_nothing(backend, neighborhood, shape, weighted, device, eps, axis)


@pytest.mark.parametrize("boundary", ["zero", "padded"])
def test_capsules_of_no_positions_give_nothing(backend, device, boundary):
    assert_nothing(backend, Neighborhood(3, 5, capsule_boundary=boundary), (2, 3, 2, 0), "", device)
    neighborhood = Neighborhood(3, 5, time_boundary="zero", capsule_boundary=boundary)
    assert_nothing(backend, neighborhood, (2, 0, 2, 0), "", device)


def test_latents_of_nothing(backend, device):
    x = torch.zeros(0, 3, 2, 2, 4, device=device)
    t, kl_z, kl_u = topographic_latents(x, x, 0.3, Neighborhood(3, 2), backend=backend)
    assert (t.shape, kl_z.shape, kl_u.shape) == ((0, 3, 2, 4), (0, 3), (0, 3))


# --- windows that are longer than what they look at -------------------------------------------------------------------

LONG = [
    Neighborhood(10**7, 1, time_boundary="zero"),
    Neighborhood(10**7, 1, 0.5, time_boundary="zero", capsule_boundary="zero"),
    Neighborhood(10**7, 1, 0.5, time_boundary="zero", roll="fourier"),
    Neighborhood(10**7, 2, causal=True, time_boundary="zero", axes=(2, 2), roots="each axis"),
    Neighborhood(2, 10**7, 1, capsule_boundary="zero"),
    Neighborhood(2, 10**7, -0.5, capsule_boundary="zero"),
    Neighborhood(1, (10**7, 1), axes=(2, 2), capsule_boundary="zero"),
]


@pytest.mark.parametrize("neighborhood", LONG, ids=repr)
def test_taps_that_are_always_outside_cost_nothing(backend, device, neighborhood):
    """A window of ten million sees all there is, and no tap of the many that it has beyond is looked at."""
    z, u, dt = (normal(1, 2, 1, 4, seed=s).to(device) for s in range(3))
    window = neighborhood.within(2, 4)
    assert math.prod(window.weights_shape) <= 50
    actual = solve(backend, neighborhood, z, u, z.new_tensor(0.3), None, dt)
    expected = solve("reference", window, z, u, z.new_tensor(0.3), None, dt)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_a_long_window_on_padded_capsules_keeps_the_length_of_u(backend, device):
    neighborhood = Neighborhood(4, 1, time_boundary="zero", capsule_boundary="padded")  # of 2 frames it sees 3 taps
    shape = (1, 2, 1, 3)
    z, u = normal(*shape).to(device), normal(*neighborhood.shape_of_u(shape), seed=1).to(device)
    v = definition(u.cpu(), neighborhood, 3)
    expected = (z.cpu() - 0.3) / (v[0] + 1e-6).sqrt()
    torch.testing.assert_close(topographic(z, u, 0.3, neighborhood, backend=backend).cpu(), expected)


OUTSIDE = [
    Neighborhood(9, 2, time_boundary="zero"),
    Neighborhood(8, 2, 0.5, causal=True, time_boundary="zero", roll="fourier"),
    Neighborhood(2, 40, 0.5, capsule_boundary="zero"),
    Neighborhood(2, (6, 4), axes=(2, 2), capsule_boundary="zero"),
    Neighborhood(9, (40, 12), axes=(2, 2), roots="each axis", capsule_boundary="zero", time_boundary="zero"),
]


# Shared by all capsules and their own in turn; the others are exhaustive.
@pytest.mark.parametrize(
    ("neighborhood", "own"),
    [
        ((lambda *values: values) if (number + own) % 2 else exhaustive)(neighborhood, own)
        for number, neighborhood in enumerate(OUTSIDE)
        for own in (False, True)
    ],
    ids=str,
)
def test_weights_of_taps_that_are_always_outside_learn_nothing(backend, device, neighborhood, own):
    z, u, dt = (normal(1, 2, 2, 4, seed=s).to(device) for s in range(3))
    shape = (2, *neighborhood.weights_shape) if own else neighborhood.weights_shape
    weights = normal(*shape, seed=3).abs().to(device)
    *_, dw = solve(backend, neighborhood, z, u, z.new_tensor(0.3), weights, dt)
    kept = math.prod(neighborhood.within(2, 4).weights_shape) * (2 if own else 1)
    assert dw.shape == weights.shape
    assert 0 < (dw != 0).sum() <= kept < dw.numel()
    exact = exact_weight_gradient(neighborhood, z, u, weights, dt)
    torch.testing.assert_close(dw.cpu(), exact, rtol=1e-12, atol=1e-12)


def exact_weight_gradient(neighborhood, z, u, weights, dt):
    """From the definition of the window, tap by tap."""
    weights = weights.cpu().requires_grad_()
    v = definition(u.cpu(), neighborhood, 4, weights)
    t = (z.cpu() - 0.3) / (v + 1e-6).sqrt().sum(0)
    return torch.autograd.grad(t, weights, dt.cpu())[0]


def test_a_stream_of_a_layer_whose_window_is_longer_than_the_sequence(device):
    """Its state is as long as the window, for what comes later may reach so far."""
    layer = TopographicLayer(Neighborhood(6, causal=True, time_boundary="zero"), 0.3).to(device, f64)
    z, u = (normal(1, 2, 1, 3, seed=s).to(device) for s in range(2))
    first, state = layer.step(z[:, :1], u[:, :1])
    last, _ = layer.step(z[:, 1:], u[:, 1:], state)
    torch.testing.assert_close(torch.cat((first, last), 1), layer(z, u), rtol=1e-14, atol=1e-14)
