"""Values, gradients, precision and types of `topographic`, on every backend."""

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numerics import MU_SHAPES, Problem, assert_within, exhaustive, problems, window_matrix

from tvae_kernels import Neighborhood, topographic

BOUNDARIES = list(product(["circular", "zero"], repeat=2))

# Odd sizes along every axis, windows as long as the axis and, where the edge is cut, longer, several tiles.
CASES = {
    "one element": ((1, 1, 1, 1), Neighborhood()),
    "no coherence": ((2, 3, 1, 7), Neighborhood(1, 3)),
    "the paper's": ((1, 18, 2, 18), Neighborhood(18, 1)),
    "shifting, both windows": ((1, 7, 3, 7), Neighborhood(7, 2, shift=1)),
    "stationary": ((1, 18, 1, 63), Neighborhood(4, 4, shift=0)),
    "backwards, many frames": ((1, 129, 1, 18), Neighborhood(4, 2, shift=-2)),
    "causal, far shift, many positions": ((1, 5, 1, 129), Neighborhood(3, 2, shift=700, causal=True)),
    "time cut": ((1, 63, 1, 18), Neighborhood(5, 2, shift=1, time_boundary="zero")),
    "capsule cut": ((1, 7, 2, 129), Neighborhood(3, 3, shift=-40, capsule_boundary="zero")),
    "both cut, longer than the axes": (
        (1, 3, 2, 7),
        Neighborhood(5, 8, shift=2, time_boundary="zero", capsule_boundary="zero"),
    ),
    "both cut, causal": (
        (2, 7, 1, 18),
        Neighborhood(5, 2, shift=-1, causal=True, time_boundary="zero", capsule_boundary="zero"),
    ),
}
cases = pytest.mark.parametrize(("shape", "neighborhood"), CASES.values(), ids=CASES)


def small_neighborhood(time_boundary="circular", capsule_boundary="circular") -> Neighborhood:
    """Even and odd window, for axes of at least 4 and 3."""
    return Neighborhood(4, 3, time_boundary=time_boundary, capsule_boundary=capsule_boundary)


# --- values and gradients ---------------------------------------------------------------------------------------------


@cases
def test_value_and_gradients(backend, device, shape, neighborhood):
    Problem.random(shape, neighborhood, device=device).check(backend)


# Both types and forms of mu in turn; the rest is exhaustive.
WEIGHTED = [
    (pytest.param if number % 2 == which else exhaustive)(name, mu, dtype)
    for number, name in enumerate(CASES)
    for which, (mu, dtype) in enumerate([("each", torch.float32), ("position", torch.float64)])
]


@pytest.mark.parametrize(("name", "mu", "dtype"), WEIGHTED)
def test_value_and_gradients_with_weights(backend, device, name, mu, dtype):
    Problem.random(*CASES[name], mu, weighted=True, dtype=dtype, device=device).check(backend)


@pytest.mark.parametrize(
    ("mu", "eps"),
    [*((mu, 1e-6) for mu in MU_SHAPES), *product(["scalar", "each"], [0, 0.5])]  # which are for different kernels
    + [exhaustive(mu, eps) for mu, eps in product(["none", "capsule", "position"], [0, 0.5])],
)
def test_every_form_of_mu_and_eps(backend, device, mu, eps):
    Problem.random((2, 4, 2, 3), Neighborhood(3, 2), mu, eps=eps, device=device).check(backend)


@settings(max_examples=200)
@given(problems(longest=10, widest=12))
def test_any_problem_torch(problem):
    problem.check("torch")


@pytest.mark.parametrize("examples", [10, exhaustive(60)])
def test_any_problem_triton(triton, examples):
    @settings(max_examples=examples)
    @given(problems(longest=7, widest=4))
    def check(problem):
        problem.check(triton)

    check()


def test_only_the_gradients_asked_for(backend, device):
    """With any subset of the arguments requiring a gradient, those get theirs and the rest none."""
    problem = Problem.random((1, 4, 2, 3), Neighborhood(2, 3), "each", weighted=True, device=device)
    full = problem.solve(backend)
    for wanted in (["z"], ["u"], ["mu"], ["weights"], ["u", "weights"]):
        leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in problem.leaves.items()}
        topographic(**leaves, neighborhood=problem.neighborhood, eps=problem.eps, backend=backend).backward(problem.dt)
        for name, x in leaves.items():
            assert (x.grad is not None) == (name in wanted)
            if name in wanted:
                assert_within(name, x.grad, full[f"d{name}"].double().cpu(), 2 * problem.bounds()[f"d{name}"])


def test_value_without_a_gradient_is_the_same(backend, device):
    problem = Problem.random((2, 4, 2, 3), small_neighborhood(), device=device)
    arguments = (problem.z, problem.u, problem.mu, problem.neighborhood)
    expected = problem.solve(backend)["t"]
    assert torch.equal(topographic(*arguments, backend=backend), expected)
    with torch.inference_mode():
        assert torch.equal(topographic(*arguments, backend=backend), expected)
    with torch.no_grad():
        t = topographic(problem.z.clone().requires_grad_(), *arguments[1:], backend=backend)
    assert torch.equal(t, expected)
    assert not t.requires_grad


def test_defaults(backend, device):
    """Without further arguments: `z / sqrt(u² + 1e-6)`."""
    problem = Problem.random((2, 3, 2, 5), Neighborhood(), device=device)
    expected = problem.z.double() / (problem.u.double().square() + 1e-6).sqrt()
    # square, eps and its rounding (halved by the root), root, quotient or GPU rsqrt (4), product: at most 7 half eps
    torch.testing.assert_close(
        topographic(problem.z, problem.u, backend=backend).double(), expected, rtol=3.5 * 2**-23, atol=0
    )


def test_five_runs_give_the_same_bits(backend, device):
    problem = Problem.random((2, 18, 1, 7), Neighborhood(3, 2), "each", weighted=True, device=device)
    first = problem.solve(backend)
    for _ in range(4):
        again = problem.solve(backend)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_any_real_number_is_an_eps(backend, device):
    z, u = torch.rand(2, 1, 3, 1, 4, generator=torch.Generator().manual_seed(0)).to(device)
    expected = topographic(z, u, eps=0.5, backend=backend)
    for eps in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert torch.equal(topographic(z, u, eps=eps, backend=backend), expected)
    assert torch.equal(topographic(z, u, eps=1, backend=backend), topographic(z, u, eps=1.0, backend=backend))


@pytest.mark.parametrize("capsule_boundary", ["circular", "zero"])
@pytest.mark.parametrize("shift", [2**31 + 1, -(2**63), 10**30])
def test_any_integer_is_a_shift(backend, device, shift, capsule_boundary):
    """On a circle it acts modulo its length; past a cut edge only the frame itself is left."""
    z, u = torch.rand(2, 1, 4, 1, 7, generator=torch.Generator().manual_seed(0)).to(device)
    near = Neighborhood(3, 2, shift % 7 if capsule_boundary == "circular" else 99, capsule_boundary=capsule_boundary)
    far = replace(near, shift=shift)
    expected = topographic(z, u, neighborhood=near, backend=backend)
    # the fallback may add in another order: twice the 6 additions, square, eps, root and quotient, each half an eps
    torch.testing.assert_close(topographic(z, u, neighborhood=far, backend=backend), expected, rtol=10 * 2**-23, atol=0)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_empty(backend, device, shape, weighted):
    """No batch, or no capsule: empty results, and a sum over nothing is zero."""
    problem = Problem.random(shape, small_neighborhood(), "scalar", weighted, device=device)
    result = problem.solve(backend)
    assert result["t"].shape == result["dz"].shape == result["du"].shape == shape
    assert result["dmu"] == 0
    if weighted:
        assert torch.equal(result["dweights"], torch.zeros_like(problem.weights))


# --- precision --------------------------------------------------------------------------------------------------------


def twenty_orders(shape, seed=0) -> torch.Tensor:
    """`u` between 1e-10 and 1e10, of either sign, in float32."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.rand(shape, generator=generator) * 20 - 10
    return 10**exponent * torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)


def v_of_u(u, neighborhood, backend):
    """`v` in float64, recovered from `t = v^(-1/2)`, which is what the operation gives for z = 1, mu = 0, eps = 0."""
    t = topographic(torch.ones_like(u), u, 0.0, neighborhood, eps=0.0, backend=backend)
    return t.cpu().double() ** -2


def bound_of_v(taps: int) -> float:
    """Relative error of `v_of_u`: that of v, (taps + 2)·eps, and that of the way through t and back.

    t = 1/sqrt(v) rounds at most twice (a root and a quotient, or one rsqrt of at most 2 ulp), 2·eps in all, which the
    square in v = 1/t² doubles; (1 - 0)·r is exact and 1/t² is taken in float64.
    """
    return (taps + 2 + 4) * torch.finfo(torch.float32).eps


def relative_error(v, exact):
    error = (v - exact).abs() / exact
    return error.nan_to_num(float("inf"), float("inf")).max()


@cases
def test_v_keeps_its_relative_error_over_twenty_orders_of_magnitude(backend, device, shape, neighborhood):
    u = twenty_orders(shape)
    exact = v_of_u(u.double(), neighborhood, "reference")
    taps = neighborhood.time_window * neighborhood.capsule_window
    assert relative_error(v_of_u(u.to(device), neighborhood, backend), exact) <= bound_of_v(taps)


@pytest.mark.parametrize("causal", [False, True])
def test_a_large_value_that_leaves_the_window_leaves_no_trace(backend, device, causal):
    """The inputs on which a sum kept by adding what enters and subtracting what leaves is wrong."""
    S, W = 63, 5
    neighborhood = Neighborhood(W, shift=0, causal=causal, time_boundary="zero")
    u = twenty_orders((1, S, 2, 3)).sign() * 1e-9
    u[:, 7::20] = 1e9
    exact = v_of_u(u.double(), neighborhood, "reference")
    assert relative_error(v_of_u(u.to(device), neighborhood, backend), exact) <= bound_of_v(W)

    cumulated = torch.nn.functional.pad(u.square(), (0, 0, 0, 0, W, W)).cumsum(1)
    last = neighborhood.time_taps.stop - 1
    by_difference = (cumulated.roll(-last, 1) - cumulated.roll(W - last, 1))[:, W:-W]
    assert relative_error(by_difference.double(), exact) > bound_of_v(W)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
def test_gradients_over_twenty_orders_of_magnitude(backend, device, weighted, time_boundary, capsule_boundary):
    neighborhood = small_neighborhood(time_boundary, capsule_boundary)
    problem = Problem.random((1, 7, 2, 18), neighborhood, "none", weighted, eps=0.0, device=device)
    problem.u = twenty_orders(problem.u.shape).to(device)
    if weighted:
        problem.weights += 0.1
    problem.check(backend)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_types_round_once(backend, device, dtype, weighted):
    """The bounds of float32 and one rounding to the type: sums are accumulated in float32."""
    problem = Problem.random((2, 18, 1, 7), Neighborhood(5, 3), "each", weighted, eps=0.5, dtype=dtype, device=device)
    problem.check(backend)


def test_squares_beyond_float16(backend, device):
    """300² is no float16; t = 1000 / (300 · sqrt(6)) is."""
    u = torch.full((1, 6, 1, 3), 300.0, dtype=torch.float16, device=device)
    t = topographic(torch.full_like(u, 1000.0), u, 0.0, Neighborhood(3, 2), backend=backend)
    expected = torch.tensor(1000 / (300 * 6**0.5), dtype=torch.float64).to(torch.float16)
    assert (t == expected.to(device)).all()


def test_float64_keeps_all_its_digits_of_eps(backend, device):
    """With u = 0 and z = 1, t² is 1/eps; 1e-6 rounded to float32 is off by 5e-9 of itself."""
    zeros = torch.zeros(1, 2, 1, 2, dtype=torch.float64, device=device)
    t = topographic(zeros + 1, zeros, eps=1e-6, backend=backend)
    torch.testing.assert_close(t, (zeros + 1e-6) ** -0.5, rtol=4 * torch.finfo(torch.float64).eps, atol=0)


f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("z", "u", "mu", "weights", "result"),
    [
        (f32, f32, (f32, ()), None, f32),
        (f16, f32, (f32, ()), None, f32),
        (bf16, f16, (f16, ()), None, f32),
        (f16, f16, (f16, (3,)), f16, f16),
        (bf16, bf16, (f64, ()), None, bf16),  # a tensor without axes does not promote
        (f32, f32, (f64, ()), None, f32),
        (f32, f32, (f64, (3,)), None, f64),
        (f16, f16, (f32, (2, 1)), None, f32),
        (f32, f32, (f32, ()), f64, f64),
        (f64, f32, (f16, ()), bf16, f64),
    ],
)
def test_mixed_types_promote_as_in_pytorch(backend, device, z, u, mu, weights, result):
    problem = Problem.random((1, 4, 2, 3), small_neighborhood(), weighted=weights is not None, dtype=f64, device=device)
    problem.mu = torch.full(mu[1], 0.3, dtype=mu[0], device=device)
    problem.z, problem.u, problem.dt = problem.z.to(z), problem.u.to(u), problem.dt.to(result)
    problem.eps = 0.5
    plain = (problem.z - problem.mu) / problem.u
    if weights is not None:
        problem.weights = problem.weights.to(weights)
        plain = plain * problem.weights[0, 0].reshape(1, 1, 1, 1)
    assert plain.dtype == result

    leaves = {name: x.detach().requires_grad_() for name, x in problem.leaves.items()}
    t = topographic(**leaves, neighborhood=problem.neighborhood, eps=problem.eps, backend=backend)
    assert t.dtype == result
    t.backward(problem.dt)
    for name, x in leaves.items():
        assert x.grad.dtype == x.dtype, name

    in_result = Problem(**{**vars(problem), "z": problem.z.to(result)})  # bounds are those of the type computed in
    assert_within("t", t, problem.judge()["t"], in_result.bounds(backend)["t"])


@pytest.mark.parametrize(("dtype", "result"), [(f16, f32), (bf16, f32), (f32, f32), (f64, f64)])
def test_autocast_computes_in_float32(backend, device, dtype, result):
    problem = Problem.random((1, 4, 2, 3), small_neighborhood(), eps=0.5, dtype=dtype, device=device)
    z = problem.z.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        t = topographic(z, problem.u, problem.mu, problem.neighborhood, eps=0.5, backend=backend)
    assert t.dtype == result
    outside = Problem(**{**vars(problem), "z": problem.z.to(result)})
    assert_within("t", t, problem.judge()["t"], outside.bounds()["t"])
    t.sum().backward()
    assert z.grad.dtype == dtype


# --- NaN and inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
def test_a_bad_u_reaches_the_windows_that_hold_it_and_no_other(backend, device, time_boundary, capsule_boundary):
    """NaN and inf, of which the square is all that is taken, of either sign, at three places: a sequence for each."""
    S = D = 7
    neighborhood = Neighborhood(4, 2, shift=2, time_boundary=time_boundary, capsule_boundary=capsule_boundary)
    nan, inf = float("nan"), float("inf")
    places = ((0, 0), (3, 6), (6, 2))
    bad = [
        (*at, value)
        for at, values in zip(places, ((nan, inf), (nan, -inf), (nan, inf)), strict=True)
        for value in values
    ]
    problem = Problem.random((len(bad), S, 1, D), neighborhood, "none", device=device)
    clean = topographic(problem.z, problem.u, problem.mu, neighborhood, backend=backend)
    for b, (l, d, value) in enumerate(bad):
        problem.u[b, l, 0, d] = value
    t = topographic(problem.z, problem.u, problem.mu, neighborhood, backend=backend)

    matrix = window_matrix(neighborhood, S, D).to(device)
    for b, (l, d, value) in enumerate(bad):
        reached = matrix[:, l * D + d].reshape(S, 1, D) != 0
        # NaN stays NaN; an infinite v makes t exactly 0, which z - 0.5 does not
        assert torch.equal(t[b].isnan() if value != value else t[b] == 0, reached), (l, d, value)
        assert torch.equal(t[b][~reached], clean[b][~reached]), (l, d, value)


def pattern(x):
    """Where a tensor is NaN, inf and -inf."""
    return torch.stack([x.isnan(), x == float("inf"), x == float("-inf")]).cpu()


@pytest.mark.parametrize(
    ("where", "boundaries"),
    [(where, (edge, edge)) for where in ("z", "u", "dt", "mu", "weights") for edge in ("circular", "zero")]
    + [("u", boundaries) for boundaries in BOUNDARIES[1:-1]]
    + [exhaustive(where, boundaries) for where in ("z", "dt", "mu", "weights") for boundaries in BOUNDARIES[1:-1]],
)
def test_nan_reaches_the_gradients_that_depend_on_it(kernel_backend, device, where, boundaries):
    problem = Problem.random((1, 5, 2, 5), small_neighborhood(*boundaries), "each", weighted=True, device=device)
    getattr(problem, where).view(-1)[3] = float("nan")
    expected = problem.judge()
    for name, x in problem.solve(kernel_backend).items():
        assert torch.equal(pattern(x), pattern(expected[name])), name


@pytest.mark.parametrize("where", ["z", "u"])
@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
def test_inf_in_the_gradients(kernel_backend, device, where, time_boundary, capsule_boundary):
    """In the last element, which a tile's lanes beyond a cut edge would read: their 0 · inf must not reach a sum."""
    neighborhood = small_neighborhood(time_boundary, capsule_boundary)
    problem = Problem.random((1, 5, 2, 5), neighborhood, "each", weighted=True, device=device)
    getattr(problem, where).view(-1)[-1] = float("inf")
    expected = problem.judge()
    for name, x in problem.solve(kernel_backend).items():
        assert torch.equal(pattern(x), pattern(expected[name])), name


def test_eps_of_zero_where_v_is_zero(kernel_backend, device):
    """t is ±inf, and NaN where z = mu: what the reference gives, and so its gradients."""
    problem = Problem.random((1, 5, 1, 5), Neighborhood(3), "scalar", eps=0.0, device=device)
    problem.u[:, :, :, :4] = 0
    problem.u[:, 3] = 0
    problem.z[0, 0, 0, 1] = problem.mu
    expected, actual = problem.judge(), problem.solve(kernel_backend)
    assert expected["t"].isnan().any()
    assert expected["t"].isinf().any()
    assert expected["t"].isfinite().any()
    for name in ("t", "dz", "du", "dmu"):
        assert torch.equal(pattern(actual[name]), pattern(expected[name])), name


# --- gradients of gradients -------------------------------------------------------------------------------------------


def double_problem(weighted, time_boundary, capsule_boundary, device):
    """A small one in float64, and the operation as a function of its tensors."""
    neighborhood = Neighborhood(2, 2, time_boundary=time_boundary, capsule_boundary=capsule_boundary)
    problem = Problem.random((1, 3, 1, 3), neighborhood, "position", weighted, eps=0.1, dtype=f64, device=device)
    return problem, [x.requires_grad_() for x in problem.leaves.values()]


def operation(problem, backend):
    def of(z, u, mu, weights=None):
        return topographic(z, u, mu, problem.neighborhood, weights, problem.eps, backend)

    return of


# Along random directions of all arguments and results, or element by element
fast_mode = pytest.mark.parametrize("fast_mode", [True, exhaustive(False)])


@fast_mode
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), [("circular", "circular"), ("zero", "zero")])
def test_gradcheck(backend, device, weighted, time_boundary, capsule_boundary, fast_mode):
    problem, leaves = double_problem(weighted, time_boundary, capsule_boundary, device)
    assert torch.autograd.gradcheck(operation(problem, backend), leaves, fast_mode=fast_mode)


@fast_mode
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), [("circular", "circular"), ("zero", "zero")])
def test_gradgradcheck(backend, device, weighted, time_boundary, capsule_boundary, fast_mode):
    problem, leaves = double_problem(weighted, time_boundary, capsule_boundary, device)
    assert torch.autograd.gradgradcheck(operation(problem, backend), leaves, fast_mode=fast_mode)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_gradient_that_will_be_differentiated_has_the_same_value(kernel_backend, device, weighted):
    """`create_graph=True` takes the formula, a plain backward pass the kernel: both are within the bounds."""
    problem = Problem.random((2, 7, 2, 5), Neighborhood(4, 3), "each", weighted, device=device)
    leaves = [x.requires_grad_() for x in problem.leaves.values()]
    t = operation(problem, kernel_backend)(*leaves)
    gradients = torch.autograd.grad(t, leaves, problem.dt, create_graph=True)
    assert all(g.requires_grad for g in gradients)
    expected, bounds = problem.judge(), problem.bounds()
    for name, g in zip(problem.leaves, gradients, strict=True):
        assert_within(name, g, expected[f"d{name}"], bounds[f"d{name}"])


def test_a_gradient_penalty_trains_what_it_should(kernel_backend, device):
    """A second derivative through `backward()` into `.grad`, the way a training loop takes it."""
    gradients = {}
    for name in ("reference", kernel_backend):
        problem = Problem.random((1, 4, 2, 3), small_neighborhood(), "scalar", eps=0.5, dtype=f64, device=device)
        leaves = [x.requires_grad_() for x in problem.leaves.values()]
        t = operation(problem, name)(*leaves)
        (du,) = torch.autograd.grad(t.square().sum(), problem.u, create_graph=True)
        (t.sum() + du.square().sum()).backward()
        gradients[name] = [x.grad for x in leaves]
    for actual, expected in zip(gradients[kernel_backend], gradients["reference"], strict=True):
        # third powers of r and sums of 12 taps, twice: some 200 roundings; sums over 24 elements may cancel
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


# --- strides ----------------------------------------------------------------------------------------------------------


def layouts(x):
    """The same values in memory laid out otherwise."""
    B, S, C, D = x.shape
    larger = x.new_full((B + 1, S + 2, 2 * C, 3 * D + 1), float("nan"))
    larger[1:, 1:-1, ::2, 1::3] = x
    yield "channels first", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield "time last", x.transpose(1, 3).contiguous().transpose(1, 3)
    yield "a slice of a larger tensor", larger[1:, 1:-1, ::2, 1::3]


@pytest.mark.parametrize("turn", range(3))
def test_any_layout_gives_the_same_numbers(backend, device, turn):
    """Each argument in each layout in turn, beside others in others."""
    problem = Problem.random((2, 5, 2, 3), Neighborhood(2, 3), "each", weighted=True, device=device)
    expected = problem.solve(backend)
    for number, argument in enumerate(("z", "u", "dt", "mu", "weights")):
        x = getattr(problem, argument)
        _, laid_out = list(layouts(x.reshape((1,) * (4 - x.ndim) + x.shape)))[(number + turn) % 3]
        setattr(problem, argument, laid_out if x.ndim == 4 else laid_out[0, 0])
        assert torch.equal(getattr(problem, argument), x)
    for output, actual in problem.solve(backend).items():
        if backend == "triton":  # walks the elements in its own order, whatever the layout
            assert torch.equal(actual, expected[output]), output
        else:  # PyTorch's sums go along memory: their order, and so the last bits, follow the layout
            assert_within(output, actual, expected[output].double().cpu(), 2 * problem.bounds()[output])


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), exhaustive((1, 3)), (0, 1, 2, 3)])
def test_expanded_inputs(backend, device, axes):
    """z, u and dt with stride 0: the values, and the gradient summed over the copies."""
    shape = (2, 5, 2, 3)
    problem = Problem.random(shape, small_neighborhood(), "each", device=device)
    for name in ("z", "u", "dt"):
        x = getattr(problem, name)
        for axis in axes:
            x = x.narrow(axis, 0, 1)
        setattr(problem, name, x.expand(shape))
    problem.check(backend)


def test_incoming_gradients_as_networks_send_them(backend, device):
    """The gradients of sum, mean, cat, expand, transpose, slices and permuted products arrive expanded or strided."""
    problem = Problem.random((2, 4, 1, 4), Neighborhood(2, 3), "scalar", device=device)
    other = torch.randn(2, 4, 1, 4, generator=torch.Generator().manual_seed(5)).to(device)
    factors = torch.arange(12, device=device)
    ways = {
        "sum": lambda t: t.sum(),
        "mean over frames": lambda t: t.mean(1).square().sum(),
        "sum of a slice": lambda t: t[:, 1:4, :, ::2].sum(),
        "cat, then product": lambda t: (torch.cat([other, t, other], 3) * factors).sum(),
        "expand": lambda t: (t[None].expand(3, *t.shape) * other).sum(),
        "transpose, then sums": lambda t: (t.transpose(1, 3) * other.transpose(1, 3)).cumsum(1).sum(),
        "unbind": lambda t: t.unbind(1)[2].sum() + (t.unbind(3)[0] * other[..., 0]).sum(),
    }
    for way, loss in ways.items():
        leaves = [x.detach().clone().requires_grad_() for x in problem.leaves.values()]
        t = operation(problem, backend)(*leaves)
        gradients = torch.autograd.grad(loss(t), leaves)
        value = t.detach().requires_grad_()
        (problem.dt,) = torch.autograd.grad(loss(value), value)
        expected, bounds = problem.judge(), problem.bounds()
        for name, g in zip(problem.leaves, gradients, strict=True):
            assert_within(f"{way}: d{name}", g, expected[f"d{name}"], bounds[f"d{name}"])


class Ends(torch.autograd.Function):
    """A function that says of its input that it has no gradient."""

    @staticmethod
    def forward(ctx, t):
        """Copy."""
        return t.clone()

    @staticmethod
    def backward(ctx, dt):
        """None."""
        return None


def test_no_incoming_gradient_gives_none(backend, device):
    problem = Problem.random((2, 4, 1, 4), Neighborhood(2, 3), "scalar", weighted=True, device=device)
    leaves = [x.requires_grad_() for x in problem.leaves.values()]
    Ends.apply(operation(problem, backend)(*leaves)).sum().backward()
    assert [x.grad for x in leaves] == [None] * 4


def test_nothing_given_is_written_to(backend, device):
    problem = Problem.random((2, 5, 2, 3), small_neighborhood(), "each", weighted=True, device=device)
    before = {name: getattr(problem, name).clone() for name in ("z", "u", "mu", "weights", "dt")}
    problem.solve(backend)
    for name, x in before.items():
        assert torch.equal(getattr(problem, name), x), name


def test_one_tensor_as_z_and_u(backend, device):
    """Their gradients add up."""
    problem = Problem.random((2, 5, 2, 3), small_neighborhood(), "scalar", device=device)
    problem.u = problem.z
    x = problem.z.clone().requires_grad_()
    t = topographic(x, x, problem.mu, problem.neighborhood, eps=problem.eps, backend=backend)
    t.backward(problem.dt)
    expected, bounds = problem.judge(), problem.bounds()
    total = expected["dz"] + expected["du"]
    rounding = total.abs() * torch.finfo(torch.float32).eps / 2
    assert_within("dz + du", x.grad, total, bounds["dz"] + bounds["du"] + rounding)
