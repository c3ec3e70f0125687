"""Every topography of the paper: against its definition written out, in its limits, on every backend."""

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import exhaustive, interpreted

from tvae_kernels import Neighborhood, TopographicLayer, reference, roll_capsules, topographic

FOLDER = Path(__file__).parent.parent / "docs"
f32, f64 = torch.float32, torch.float64
S, C = 4, 2

# A neighbourhood for capsules of so many positions, by name.
TOPOGRAPHIES = {
    "torus": (Neighborhood(1, (2, 3), axes=(3, 4)), 12),
    "torus in time": (Neighborhood(3, (2, 3), (1, -2), axes=(3, 4)), 12),
    "torus, 3 axes": (Neighborhood(2, (2, 1, 2), (1, -2, 0.5), axes=(2, 2, 3)), 12),
    "a root for each axis": (Neighborhood(3, (2, 3), (1, -1), axes=(3, 4), roots="each axis"), 12),
    "a root for each of 3": (Neighborhood(2, 2, (1, 0.25, 0), axes=(2, 2, 3), roots="each axis"), 12),
    "half shift": (Neighborhood(3, 2, 0.5), 5),
    "any shift": (Neighborhood(4, 3, -1.3, time_boundary="zero"), 5),
    "phase shift": (Neighborhood(3, 2, 0.4, roll="fourier"), 5),
    "phase shift, even": (Neighborhood(3, 3, -0.3, time_boundary="zero", roll="fourier"), 6),
    "padded": (Neighborhood(3, 2, time_boundary="padded", capsule_boundary="padded"), 5),
    "padded, causal": (Neighborhood(3, 2, causal=True, time_boundary="padded", capsule_boundary="padded"), 5),
    "padded, any shift": (Neighborhood(3, 2, 0.7, time_boundary="padded", capsule_boundary="padded"), 5),
    "padded torus": (Neighborhood(2, 2, (1, -1), axes=(3, 4), capsule_boundary="padded"), 12),
    "cut torus": (Neighborhood(3, 2, (1, -1), axes=(3, 4), capsule_boundary="zero"), 12),
    "speeds": (Neighborhood(3, 2, speeds=(1, -2)), 5),
    "fractional speeds": (Neighborhood(3, 2, 0.5, speeds=(2, -2.5)), 5),
    "speeds by phase": (Neighborhood(3, 2, roll="fourier", speeds=(0.5, 2), time_boundary="padded"), 5),
}
topographies = pytest.mark.parametrize(("neighborhood", "dim"), TOPOGRAPHIES.values(), ids=TOPOGRAPHIES)


# --- the definition ---------------------------------------------------------------------------------------------------


def definition(u, neighborhood, dim, weights=None):
    """`v` of every root, `(R, B, S, C, D)`, of one element after the other, from the words of `Neighborhood`."""
    n, B = neighborhood, u.shape[0]
    (before, after), padding = n.padding()
    steps = u.shape[1] - before - after
    v = torch.zeros(n.root_count, B, steps, u.shape[2], dim, dtype=f64)
    lengths = n.axes or (dim,)
    windows = n.capsule_window if len(lengths) > 1 else (n.capsule_window,)
    shifts = n.shift if len(lengths) > 1 else (n.shift,)
    last = 0 if n.causal else n.time_window // 2
    frames = range(last - n.time_window + 1, last + 1)
    centred = [range(-((k - 1) // 2), k // 2 + 1) for k in windows]
    for c, l in itertools.product(range(u.shape[2]), range(steps)):
        speed = 1 if n.speeds is None else n.speeds[c]
        w = None if weights is None else weights if weights.ndim == len(n.weights_shape) else weights[c]
        for row, i in enumerate(frames):
            frame = l + i + before
            if n.time_boundary == "circular":
                frame %= steps
            if not 0 <= frame < u.shape[1]:
                continue
            x = u[:, frame, c]
            if n.roll == "fourier":
                for d, (column, k) in itertools.product(range(dim), enumerate(centred[0])):
                    shifted = x @ phase_matrix(dim, shifts[0] * speed * i)[(d + k) % dim]
                    v[0, :, l, c, d] += (1 if w is None else w[row, column]) * shifted**2
                continue
            for flat, d in enumerate(itertools.product(*map(range, lengths))):
                if n.roots == "one":
                    taps = [
                        (
                            0,
                            (row, *numbers),
                            [s * speed * i + axis[j] for s, axis, j in zip(shifts, centred, numbers, strict=True)],
                        )
                        for numbers in itertools.product(*(range(len(axis)) for axis in centred))
                    ]
                else:
                    taps = [
                        (
                            a,
                            (row, sum(windows[:a]) + j),
                            [shifts[a] * speed * i + k if b == a else 0 for b in range(len(lengths))],
                        )
                        for a in range(len(lengths))
                        for j, k in enumerate(centred[a])
                    ]
                for root, number, offsets in taps:
                    where = [x0 + o for x0, o in zip(d, offsets, strict=True)]
                    v[root, :, l, c, flat] += (1 if w is None else w[number]) * (
                        x.square() @ hats(where, lengths, padding, n.capsule_boundary)
                    )
    return v


def hats(where, lengths, padding, boundary):
    """Coefficients of linear interpolation at a point: along each axis 1 - distance, for distances below 1."""
    axes = []
    for x, length, (before, after) in zip(where, lengths, padding, strict=True):
        positions = torch.arange(length + before + after, dtype=f64) - before
        distance = (positions - x).abs()
        if boundary == "circular":
            distance = (positions - x) % length
            distance = torch.minimum(distance, length - distance)
        axes.append((1 - distance).clamp(min=0) if length > 1 or boundary != "circular" else torch.ones(1, dtype=f64))
    result = torch.ones(1, dtype=f64)
    for axis in axes:
        result = (result[:, None] * axis).flatten()
    return result


def phase_matrix(dim, offset):
    """Row d: the coefficients of the values in the trigonometric polynomial through them, at `d + offset`."""
    d = torch.arange(dim, dtype=f64)
    angle = 2 * math.pi * (d[:, None] + offset - d) / dim
    total = torch.ones_like(angle)
    for frequency in range(1, (dim - 1) // 2 + 1):
        total += 2 * torch.cos(frequency * angle)
    if dim % 2 == 0:  # the highest frequency is known at whole positions alone: its sine there is 0
        total += torch.cos(math.pi * (d[:, None] - d)) * math.cos(math.pi * offset)
    return total / dim


def normal(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def arguments(neighborhood, dim, weighted="", dtype=f64, device="cpu", seed=0, time=S, batch=2):
    """`z, u, mu, weights, dt`; weights shared, for each "capsule" or none."""
    shape = (batch, time, C, dim)
    generator = torch.Generator().manual_seed(seed + 9)
    leading = (C,) if weighted == "capsule" else ()
    weights = torch.rand((*leading, *neighborhood.weights_shape), generator=generator, dtype=f64) if weighted else None
    tensors = (
        normal(*shape, seed=seed + 1),
        normal(*neighborhood.shape_of_u(shape), seed=seed + 2),
        torch.tensor(0.3, dtype=f64),
        weights,
        normal(*shape, seed=seed + 3),
    )
    return tuple(None if x is None else x.to(device, dtype) for x in tensors)


@topographies
@pytest.mark.parametrize("weighted", ["", exhaustive("shared"), "capsule"])
def test_the_reference_sums_what_the_definition_says(neighborhood, dim, weighted):
    _, u, _, weights, _ = arguments(neighborhood, dim, weighted)
    expected = definition(u, neighborhood, dim, weights)
    actual = reference.window_sums(u, neighborhood, weights)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)  # some 50 terms near 1, 12 digits of shifts


# --- the backends -----------------------------------------------------------------------------------------------------


def solve(backend, neighborhood, z, u, mu, weights, dt, eps=1e-3):
    leaves = [x.detach().requires_grad_() for x in (z, u, mu, weights) if x is not None]
    given = [*leaves, None] if weights is None else leaves
    t = topographic(given[0], given[1], given[2], neighborhood, given[3], eps, backend)
    return [t.detach(), *torch.autograd.grad(t, leaves, dt)]


def assert_same(backend, neighborhood, z, u, mu, weights, dt):
    """Within the rounding errors of its type, of what the reference gives in float64.

    Counted along the longest path, to first order, and multiplied by what the result would be without cancellation: the
    result for `|z - mu|` and `-|dt|`. Phase shifts cancel within sums of D terms: there the largest result counts.
    """
    actual = solve(backend, neighborhood, z, u, mu, weights, dt)
    exact = [None if x is None else x.cpu().double() for x in (z, u, mu, weights, dt)]
    expected = solve("reference", neighborhood, *exact)
    z, u, mu, weights, dt = exact
    sizes = solve("reference", neighborhood, (z - mu).abs(), u, 0 * mu, weights, -dt.abs())
    taps = sum(1 for _ in neighborhood.taps()) * 2 ** len(neighborhood.axes or (0,))
    in_r = (taps + 5) / 2 + 4 + neighborhood.root_count
    in_du = 3 * in_r + taps + 9
    counts = [in_r + 2, in_r + 1, in_du, in_r + 1 + z.numel(), in_du + z.numel()]
    phases = 4 * z.shape[3] if neighborhood.roll == "fourier" else 0
    h = 1.01 * torch.finfo(actual[0].dtype).eps / 2 * (2 if actual[0].dtype == f64 else 1)
    for x, y, size, count in zip(actual, expected, sizes, counts[: len(actual)], strict=True):
        size = size.abs().max() if phases else size.abs()
        bound = (count + phases) * h * size + torch.finfo(x.dtype).smallest_normal
        error = (x.cpu().double() - y).abs() / bound
        assert x.shape == y.shape
        assert (error <= 1).all(), error.max()


@topographies
@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
@pytest.mark.parametrize("dtype", [f64, f32], ids=str)
def test_the_fallback_gives_the_values_and_gradients(device, neighborhood, dim, weighted, dtype):
    assert_same("torch", neighborhood, *arguments(neighborhood, dim, weighted, dtype, device))


# In turn without weights and with, two sequences where tables or planes of `r` differ from those of a plain window.
# The rest is exhaustive.
KERNELS = [
    *(
        (
            name,
            *(("", f64), ("capsule", f32))[number % 2],
            2 if n.roll == "fourier" or n.speeds or n.roots != "one" else 1,
        )
        for number, (name, (n, _)) in enumerate(TOPOGRAPHIES.items())
    ),
    *(
        exhaustive(name, *case, 2)
        for name in TOPOGRAPHIES
        for case in itertools.product(("", "shared", "capsule"), (f64, f32))
    ),
]


@pytest.mark.parametrize(("name", "weighted", "dtype", "batch"), KERNELS)
def test_the_kernels_give_the_values_and_gradients(triton, device, name, weighted, dtype, batch):
    neighborhood, dim = TOPOGRAPHIES[name]
    assert_same(triton, neighborhood, *arguments(neighborhood, dim, weighted, dtype, device, batch=batch))


@st.composite
def neighborhoods(draw):
    """Any topography, and the number of positions of its capsules."""
    axes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    boundary = st.sampled_from(["circular", "zero", "padded"])
    time_boundary, capsule_boundary = draw(boundary), draw(boundary)
    roll = draw(
        st.sampled_from(["linear", "fourier"] if len(axes) == 1 and capsule_boundary == "circular" else ["linear"])
    )
    whole, part = st.integers(-2, 2), st.sampled_from([-1.25, -0.5, 0.1, 1 / 3, 0.75])
    n = Neighborhood(
        time_window=draw(st.integers(1, S if time_boundary == "circular" else S + 1)),
        capsule_window=tuple(draw(st.integers(1, a if capsule_boundary == "circular" else a + 1)) for a in axes),
        shift=tuple(draw(whole | part) for _ in axes),
        causal=draw(st.booleans()),
        time_boundary=time_boundary,
        capsule_boundary=capsule_boundary,
        axes=axes,
        roots=draw(st.sampled_from(["one", "each axis"] if len(axes) > 1 else ["one"])),
        speeds=draw(st.none() | st.tuples(whole | part, whole | part)),
        roll=roll,
    )
    return n, math.prod(axes)


@pytest.mark.parametrize("examples", [25, exhaustive(200)])
def test_any_topography_in_the_reference_and_the_fallback(examples):
    @settings(max_examples=examples)
    @given(neighborhoods(), st.sampled_from(["", "shared", "capsule"]), st.integers(0, 99))
    def check(case, weighted, seed):
        given_arguments = arguments(*case, weighted, seed=seed)
        expected = definition(given_arguments[1], *case, given_arguments[3])
        actual = reference.window_sums(given_arguments[1], case[0], given_arguments[3])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-11)
        assert_same("torch", case[0], *given_arguments)

    check()


def terms(neighborhood) -> int:
    """Of a window sum, of two for a fraction along an axis: what the interpreter takes its time for."""
    n = neighborhood if neighborhood.speeds is None else neighborhood.of_capsule(0)
    return sum(2 ** sum(x % 1 != 0 for x in tap.offsets) for tap in n.taps())


@pytest.mark.parametrize(("examples", "most"), [(3, 16), exhaustive(30, 100)])
def test_any_topography_in_the_kernels(triton, device, examples, most):
    @settings(max_examples=examples)
    @given(
        neighborhoods().filter(lambda case: terms(case[0]) <= most),
        st.sampled_from(["", "shared", "capsule"]),
        st.integers(0, 99),
    )
    def check(case, weighted, seed):
        assert_same(triton, case[0], *arguments(*case, weighted, device=device, seed=seed))

    check()


@topographies
def test_gradcheck(device, neighborhood, dim):
    """Of the fallback, once and twice; the kernels' first gradients are compared above, and their second are these."""
    z, u, mu, weights, _ = arguments(neighborhood, dim, "shared", device=device, time=3)
    leaves = [x.requires_grad_() for x in (z[:1], u[:1], mu, weights)]

    def function(z, u, mu, weights):
        return topographic(z, u, mu, neighborhood, weights, 0.5, "torch")

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["a root for each axis", "padded, any shift", "fractional speeds"])
def test_infinite_and_undefined_values_stay_in_their_windows(kernel_backend, device, name):
    neighborhood, dim = TOPOGRAPHIES[name]
    z, u, mu, _, _ = arguments(neighborhood, dim, device=device)
    clean = topographic(z, u, mu, neighborhood, backend=kernel_backend)
    for value in (math.inf, math.nan):
        u[0, 1, 0, 2] = value
        t = topographic(z, u, mu, neighborhood, backend=kernel_backend)
        expected = topographic(z, u, mu, neighborhood, backend="reference")
        # the reference multiplies by no 0 either: where it is not touched, nothing is
        torch.testing.assert_close(t, expected, equal_nan=True)
        assert 0 < (t != clean).sum() < t.numel() / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("kernel_backend", "name"),
    [
        ("torch", "a root for each axis"),
        ("triton", "padded"),
        exhaustive("torch", "padded"),
        exhaustive("triton", "a root for each axis"),
        *(exhaustive(b, name) for b in ("torch", "triton") for name in ("fractional speeds", "phase shift")),
    ],
    indirect=["kernel_backend"],
)
def test_compiled_in_one_graph(kernel_backend, device, name):
    neighborhood, dim = TOPOGRAPHIES[name]
    torch._dynamo.reset()
    z, u, _, _, dt = arguments(neighborhood, dim, device=device)
    layer = TopographicLayer(neighborhood, 0.3, backend=kernel_backend, learn_weights=True).to(device, f64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    axis = torch.tensor([1, 0], device=device) if neighborhood.root_count > 1 else None
    results = []
    for module in (layer, compiled):
        leaves = [z.clone().requires_grad_(), u.clone().requires_grad_(), *layer.parameters()]
        t = module(*leaves[:2], axis)
        results.append((t, *torch.autograd.grad(t, leaves, dt)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- limits -----------------------------------------------------------------------------------------------------------

PLAIN = Neighborhood(3, 2, -1)


@pytest.mark.parametrize(
    "limit",
    [
        Neighborhood(3, 2, -1.0),
        Neighborhood(3, 2, -1.0, roll="fourier"),
        Neighborhood(3, (2,), (-1,), axes=(5,)),
        Neighborhood(3, (1, 2), (4, -1), axes=(1, 5)),
        Neighborhood(3, 2, -1, speeds=(1, 1)),
        Neighborhood(3, 2, 2, speeds=(-0.5, -0.5), roll="fourier"),
    ],
    ids=repr,
)
def test_each_reduces_to_the_plain_one(backend, device, limit):
    z, u, mu, _, dt = arguments(PLAIN, 5, device=device, batch=1)
    expected = solve(backend, PLAIN, z, u, mu, None, dt)
    for weights in (None, torch.ones(limit.weights_shape, dtype=f64, device=device)):
        actual = solve(backend, limit, z, u, mu, weights, dt)[:4]  # without the gradient of the weights
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_padding_of_zeros_is_a_cut_edge(backend, device):
    cut = Neighborhood(3, 3, -1, time_boundary="zero", capsule_boundary="zero")
    padded = replace(cut, time_boundary="padded", capsule_boundary="padded")
    z, u, mu, _, _ = arguments(cut, 5, device=device)
    (before, after), ((low, high),) = padded.padding()
    assert ((before, after), (low, high)) == ((1, 1), (2, 2))
    wide = torch.nn.functional.pad(u, (low, high, 0, 0, before, after))
    assert wide.shape == padded.shape_of_u(z.shape)
    expected = topographic(z, u, mu, cut, backend=backend)
    torch.testing.assert_close(topographic(z, wide, mu, padded, backend=backend), expected, rtol=1e-14, atol=0)


def test_eq_19_moves_parts_of_the_energy_to_the_next_position(backend, device):
    """`Roll_α(x) = [α·x_D + (1 - α)·x_1, α·x_1 + (1 - α)·x_2, …]`; the tap one frame back reads `Roll_α` of it."""
    alpha = 0.3
    n = Neighborhood(2, 1, alpha, causal=True, time_boundary="zero")
    u = normal(1, 2, 1, 5).to(device)
    x = u.square()
    rolled = alpha * x[:, 0].roll(1, -1) + (1 - alpha) * x[:, 0]
    expected = 1 / torch.sqrt(x[:, 1] + rolled)
    t = topographic(torch.ones_like(u), u, 0.0, n, eps=0.0, backend=backend)
    torch.testing.assert_close(t[:, 1], expected, rtol=1e-14, atol=0)


def test_eq_21_adds_roots(backend, device):
    """Without time: the root over a row plus the root over a column of the torus."""
    n = Neighborhood(1, (3, 4), axes=(3, 4), roots="each axis")
    u = normal(2, 1, 1, 12).to(device)
    energy = u.square().unflatten(3, (3, 4))
    denominator = energy.sum(3, keepdim=True).sqrt() + energy.sum(4, keepdim=True).sqrt()
    t = topographic(torch.ones_like(u), u, 0.0, n, eps=0.0, backend=backend)
    torch.testing.assert_close(t.unflatten(3, (3, 4)), 1 / denominator, rtol=1e-14, atol=0)


def test_phase_shifts_keep_student_t():
    """For an odd D the shifted `u` are independent normal variables again: their W squares have a mean of 1 each."""
    n = Neighborhood(3, 1, 0.37, roll="fourier")
    v = reference.window_sums(normal(400, 6, 1, 7), n)
    count = v.numel() / 3  # of values that share no more than the window's frames
    assert v.mean() == pytest.approx(3, abs=5 * math.sqrt(6 / count))
    assert v.var() == pytest.approx(6, rel=0.1)


# --- streams, weights, axes -------------------------------------------------------------------------------------------

CAUSAL = {
    "plain": (Neighborhood(4, 2, causal=True, time_boundary="zero"), 5),
    "no past": (Neighborhood(1, 2, causal=True, time_boundary="zero"), 5),
    "padded capsules": (Neighborhood(4, 2, causal=True, time_boundary="zero", capsule_boundary="padded"), 5),
    "any shift": (Neighborhood(3, 2, 0.4, causal=True, time_boundary="zero"), 5),
    "roots": (Neighborhood(3, 2, causal=True, time_boundary="zero", axes=(2, 3), roots="each axis"), 6),
}


@pytest.mark.parametrize(("neighborhood", "dim"), CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize(
    ("pieces", "batch"),
    [((1,) * 7, 1), ((3, 1, 3), 1), *(exhaustive(pieces, 2) for pieces in ((1,) * 7, (3, 1, 3), (7,)))],
)
def test_a_stream_gives_the_same_as_the_whole_sequence(backend, device, neighborhood, dim, pieces, batch):
    z, u, _, _, _ = arguments(neighborhood, dim, device=device, time=7, batch=batch)
    layer = TopographicLayer(neighborhood, 0.3, backend=backend).to(device, f64)
    state, parts = None, []
    for a, b in zip(z.split(pieces, 1), u.split(pieces, 1), strict=True):
        t, state = layer.step(a, b, state)
        parts.append(t)
        assert state.shape[1] == neighborhood.time_window - 1
    # the same terms in the same order but for zeros; kernels for other lengths may add in another
    torch.testing.assert_close(torch.cat(parts, 1), layer(z, u), rtol=1e-14, atol=1e-14)


def test_a_stream_may_roll_along_a_known_axis(backend, device):
    neighborhood, dim = CAUSAL["roots"]
    z, u, _, _, _ = arguments(neighborhood, dim, device=device, time=7)
    layer = TopographicLayer(neighborhood, 0.3, backend=backend).to(device, f64)
    for axis in (1, torch.tensor([1, 0], device=device)):
        first, state = layer.step(z[:, :4], u[:, :4], axis=axis)
        last, _ = layer.step(z[:, 4:], u[:, 4:], state, axis)
        torch.testing.assert_close(torch.cat((first, last), 1), layer(z, u, axis), rtol=1e-14, atol=1e-14)


def test_a_padded_stream_begins_with_its_padding(device):
    neighborhood = Neighborhood(3, 2, causal=True, time_boundary="padded")
    z, u, _, _, _ = arguments(neighborhood, 5, device=device)
    layer = TopographicLayer(neighborhood, 0.3).to(device, f64)
    t, _ = layer.step(z, u[:, 2:], u[:, :2])
    assert torch.equal(t, layer(z, u))
    with pytest.raises(ValueError, match="the first state is the padding: 2 frames of u, got None"):
        layer.step(z, u[:, 2:])


@pytest.mark.parametrize("neighborhood", [Neighborhood(3, time_boundary="zero"), Neighborhood(3, causal=True)])
def test_only_causal_windows_stream(neighborhood):
    with pytest.raises(ValueError, match="a stream needs a causal window and a time that is no circle"):
        TopographicLayer(neighborhood).step(*normal(2, 1, 1, 1, 5))


def test_a_state_of_another_shape_is_refused():
    layer = TopographicLayer(Neighborhood(3, causal=True, time_boundary="zero"))
    with pytest.raises(ValueError, match=r"the state must be \(2, 2, 1, 5\), got \(1, 2, 1, 5\)"):
        layer.step(*normal(2, 2, 1, 1, 5), normal(1, 2, 1, 5))


@pytest.mark.parametrize(
    ("name", "capsules"),
    [
        ("a root for each axis", None),
        ("half shift", C),
        exhaustive("a root for each axis", C),
        exhaustive("half shift", None),
    ],
)
def test_learned_weights_start_at_one_and_stay_positive(kernel_backend, device, name, capsules):
    neighborhood, dim = TOPOGRAPHIES[name]
    z, u, _, _, _ = arguments(neighborhood, dim, device=device, dtype=f32, batch=1)
    layer = TopographicLayer(
        neighborhood, 0.0, backend=kernel_backend, learn_weights=True, weights_for_capsules=capsules
    ).to(device)
    leading = () if capsules is None else (capsules,)
    assert layer.weights.shape == (*leading, *neighborhood.weights_shape)
    torch.testing.assert_close(layer.weights, torch.ones_like(layer.weights), rtol=2e-7, atol=0)
    plain = TopographicLayer(neighborhood, 0.0, backend=kernel_backend).to(device)
    torch.testing.assert_close(layer(z, u), plain(z, u), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1)
    losses = []
    for _ in range(2 if kernel_backend == "triton" and interpreted() else 5):
        loss = layer(z, u).square().mean()  # falls as the weights grow
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(b < a for a, b in itertools.pairwise(losses))
    assert (layer.weights > 1).any()
    assert (layer.weights > 0).all()
    assert "raw_weights" in layer.state_dict()
    assert "raw_weights" not in plain.state_dict()


def test_a_known_axis_is_the_denominator_alone(backend, device):
    neighborhood, dim = TOPOGRAPHIES["a root for each axis"]
    z, u, _, _, _ = arguments(neighborhood, dim, device=device)
    layer = TopographicLayer(neighborhood, 0.3, 1e-6, backend, learn_weights=True).to(device, f64)
    with torch.no_grad():
        layer.raw_weights.add_(normal(*layer.raw_weights.shape).to(device))
    v = definition(u.cpu(), neighborhood, dim, layer.weights.detach().cpu())
    for axis in (0, 1):
        expected = (z.cpu() - 0.3) / (v[axis] + 1e-6).sqrt()
        torch.testing.assert_close(layer(z, u, axis).cpu(), expected, rtol=1e-6, atol=1e-6)  # 0.3 is a float32
    with pytest.raises(ValueError, match="axis must be one of those that have a root each, got 2"):
        layer(z, u, 2)


@pytest.mark.parametrize("weighted", ["", exhaustive("shared"), exhaustive("capsule")])
def test_each_sequence_may_roll_along_an_axis_of_its_own(backend, device, weighted):
    """A batch is what its sequences are one by one, in values and gradients."""
    neighborhood, dim = TOPOGRAPHIES["a root for each axis"]
    z, u, mu, weights, dt = arguments(neighborhood, dim, weighted, device=device)
    leaves = [x.requires_grad_() for x in (z, u, mu, weights) if x is not None]
    axes = (1, 0)
    together = topographic(z, u, mu, neighborhood, weights, 1e-6, backend, axis=torch.tensor(axes, device=device))
    alone = [
        topographic(z[b : b + 1], u[b : b + 1], mu, neighborhood, weights, 1e-6, backend, axis=axis)
        for b, axis in enumerate(axes)
    ]
    results = ([t, *torch.autograd.grad(t, leaves, dt)] for t in (together, torch.cat(alone)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)  # the same terms, at most in another order


def test_what_is_not_finite_along_another_axis_does_not_matter(backend, device):
    """Not to the gradients, either: a sequence whose sums are 0 along the other axis, where 0 is its denominator."""
    neighborhood = Neighborhood(1, (2, 1), axes=(2, 3), roots="each axis")  # axis 0 sees both rows, axis 1 one
    z, dt = normal(2, S, C, 6, seed=1).to(device), normal(2, S, C, 6, seed=2).to(device)
    u = normal(2, S, C, 6, seed=3).to(device)
    u[0, ..., :3] = 0
    leaves = [z.requires_grad_(), u.requires_grad_()]
    t = topographic(z, u, 0.3, neighborhood, None, 0.0, backend, axis=torch.tensor([0, 1], device=device))
    assert all(x.isfinite().all() for x in (t, *torch.autograd.grad(t, leaves, dt)))
    either = topographic(z, u, 0.3, neighborhood, None, 0.0, backend, axis=1)
    assert not either[0].isfinite().all()


def test_axes_that_do_not_fit_are_refused(device):
    neighborhood, dim = TOPOGRAPHIES["a root for each axis"]
    z, u, mu, _, _ = arguments(neighborhood, dim, device=device)
    for axis in (torch.zeros(2), torch.tensor([True, False]), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"axis must be 2 integers on .*, one for each sequence; got torch"):
            topographic(z, u, mu, neighborhood, axis=axis.to(device))
    for axis in (2, -1, "x"):
        with pytest.raises(ValueError, match=f"axis must be one of those that have a root each, got {axis!r}"):
            topographic(z, u, mu, neighborhood, axis=axis)
    for axis in (0, torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="axis must be one of those that have a root each, got 0"):
            topographic(*normal(2, 2, S, C, 5), axis=axis)
    with pytest.raises(ValueError, match="axis must be one of those that have a root each, got 7"):
        topographic(z.cpu(), u.cpu(), 0.0, neighborhood, axis=torch.tensor([0, 7]))  # a GPU would have to be waited for


# --- rolls ------------------------------------------------------------------------------------------------------------


def test_plain_capsules_roll_as_tensors_do():
    t = normal(2, 3, C, 5)
    for shift, steps in ((1, 2), (-2, 3), (0, 4)):
        assert torch.equal(roll_capsules(t, steps, Neighborhood(shift=shift)), t.roll(shift * steps, -1))
    assert torch.equal(roll_capsules(t, -1, Neighborhood()), t.roll(-1, -1))


def test_fractions_of_a_roll():
    t = normal(3, C, 5)
    half = roll_capsules(t, 1, Neighborhood(shift=0.5))
    torch.testing.assert_close(half, (t + t.roll(1, -1)) / 2)
    assert torch.equal(roll_capsules(t, 2, Neighborhood(shift=0.5)), t.roll(1, -1))
    by_phase = Neighborhood(shift=0.5, roll="fourier")
    twice = roll_capsules(roll_capsules(t, 1, by_phase), 1, by_phase)
    torch.testing.assert_close(twice, t.roll(1, -1), rtol=1e-13, atol=1e-13)


def test_speeds_axes_and_edges_of_a_roll():
    t = normal(3, C, 6)
    speeds = roll_capsules(t, 2, Neighborhood(speeds=(1, -2)))
    assert torch.equal(speeds, torch.stack((t[:, 0].roll(2, -1), t[:, 1].roll(-4, -1)), 1))
    torus = Neighborhood(shift=(1, -1), axes=(2, 3), roots="each axis")
    grid = t.unflatten(-1, (2, 3))
    assert torch.equal(roll_capsules(t, 1, torus), grid.roll((1, -1), (-2, -1)).flatten(-2))
    assert torch.equal(roll_capsules(t, 1, torus, axis=1), grid.roll(-1, -1).flatten(-2))
    for boundary in ("zero", "padded"):
        cut = roll_capsules(t, 2, Neighborhood(capsule_boundary=boundary))
        assert torch.equal(cut[..., 2:], t[..., :-2])
        assert not cut[..., :2].any()


@pytest.mark.parametrize("name", ["torus in time", "speeds", "phase shift"])
def test_what_rolls_through_the_layer_rolls_out_of_it(name):
    """Sequences that roll by their topography, all around a circle, become capsules that do (section 4.2)."""
    neighborhood, dim = TOPOGRAPHIES[name]
    steps = {"torus in time": 6, "speeds": 5, "phase shift": 25}[name]  # after which all axes are where they were
    first = normal(2, 1, C, dim)
    z, u = (torch.stack([roll_capsules(x, l, neighborhood) for l in range(steps)], 1) for x in first)
    t = topographic(z, u, 0.3, neighborhood)
    for l in range(steps):
        # the phase shift of u is not one of t, whose root is not linear: only its whole rolls are
        if name != "phase shift" or (0.4 * l) % 1 == 0:
            torch.testing.assert_close(t[:, l], roll_capsules(t[:, 0], l, neighborhood), rtol=1e-12, atol=1e-12)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"axes": (2, 3, 4, 5)}, ValueError, "axes must be 1 to 3 numbers, got (2, 3, 4, 5)"),
        ({"axes": 6}, TypeError, "axes must be a tuple of numbers, got 6"),
        ({"axes": (2, 0)}, ValueError, "axes must be at least 1, got 0"),
        (
            {"axes": (2, 3), "capsule_window": (1, 2, 3)},
            ValueError,
            "capsule_window must be one number or 2, one for each axis; got (1, 2, 3)",
        ),
        ({"shift": (1, 2)}, ValueError, "shift must be one number or 1, one for each axis; got (1, 2)"),
        ({"shift": math.nan}, ValueError, "shift must be finite, got nan"),
        ({"speeds": ()}, ValueError, "speeds must have a number for each capsule, got none"),
        ({"speeds": ("fast",)}, TypeError, "speeds must be a number, got 'fast'"),
        ({"roots": "two"}, ValueError, 'roots must be "one" or "each axis", got \'two\''),
        ({"roots": "each axis"}, ValueError, 'a root for "each axis" needs axes, got None'),
        ({"roll": "cubic"}, ValueError, 'roll must be "linear" or "fourier", got \'cubic\''),
        (
            {"roll": "fourier", "capsule_boundary": "zero"},
            ValueError,
            'roll "fourier" needs capsules of one circular axis',
        ),
        ({"roll": "fourier", "axes": (2, 3)}, ValueError, 'roll "fourier" needs capsules of one circular axis'),
    ],
)
def test_combinations_that_make_no_sense_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        Neighborhood(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("neighborhood", "message"),
    [
        (Neighborhood(axes=(2, 3)), r"axes \(2, 3\) have 6 positions, but a capsule has 5"),
        (Neighborhood(speeds=(1, 2, 3)), "there are 3 speeds for 2 capsules"),
        (Neighborhood(3, time_boundary="padded"), r"u must have the shape \(2, 6, 2, 5\), got \(2, 4, 2, 5\)"),
        (Neighborhood(1, 3, capsule_boundary="padded"), r"u must have the shape \(2, 4, 2, 7\), got \(2, 4, 2, 5\)"),
        (Neighborhood(1, (1, 6), axes=(1, 5)), "a circular capsule_window of 6 does not fit 5 positions"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(neighborhood, message):
    with pytest.raises(ValueError, match=message):
        topographic(*normal(2, 2, S, C, 5), 0.0, neighborhood)


def test_weights_that_do_not_fit_are_refused():
    neighborhood, dim = TOPOGRAPHIES["a root for each axis"]
    z, u, mu, _, _ = arguments(neighborhood, dim)
    with pytest.raises(ValueError, match=r"shape \(3, 5\), or for each capsule its own \(2, 3, 5\); got \(3, 2, 3\)"):
        topographic(z, u, mu, neighborhood, torch.ones(3, 2, 3))


def test_the_page_of_topographies_is_what_its_script_writes():
    """And draws windows as they are: of shift 1 a diagonal band, K positions in each of W frames."""
    specification = importlib.util.spec_from_file_location("topographies", FOLDER / "topographies.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert (FOLDER / "topographies.md").read_text(encoding="utf-8") == script.page()
    for number, topography in enumerate(script.PAGE):
        assert (FOLDER / "topographies" / f"{number}.png").exists()
        neighborhood, v = script.terms(topography)
        taps = sum(1 for _ in neighborhood.taps())
        if topography.frame < 0 and neighborhood.roll == "linear":
            assert v[:, 0].sum() == pytest.approx(taps)  # none is cut off, and parts of one make a whole
    _, v = script.terms(script.PAGE[0])
    expected = [[float(abs(d - l) <= 1 and abs(l - 4) <= 2) for d in range(9)] for l in range(9)]
    assert v[0, 0].tolist() == expected
