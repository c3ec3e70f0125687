"""The fast window sum against the one as written; the whole backend is tested in test_topographic.py."""

import pytest
import torch
from hypothesis import given, settings
from numerics import MU_SHAPES, Problem, assert_within, problems

from benchmarks import devices
from tvae_kernels import Neighborhood, reference, topographic
from tvae_kernels.arguments import Inputs, Window
from tvae_kernels.backends.torch import plain


@settings(max_examples=300)
@given(problems(longest=12, widest=16, dtypes=[torch.float64]))
def test_window_sum_equals_the_sum_as_written_in_both_directions(problem):
    x, n = problem.u.square(), problem.neighborhood
    # both add the same W·K non-negative terms, each within W·K - 1 roundings of half an eps
    tolerance = n.time_window * n.capsule_window * torch.finfo(x.dtype).eps
    for adjoint in (False, True):
        expected = reference.window_sum(x, n, adjoint=adjoint)
        torch.testing.assert_close(plain.window_sum(x, n, adjoint), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("boundary", ["circular", "zero"])
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_as_long_as_time_is(steps, boundary, shift):
    """On a circle whose diagonals close, all windows on one are alike; where time is cut they are not."""
    x = torch.rand(1, steps, 2, 6, dtype=torch.float64)
    for window in (steps, steps + 1) if boundary == "zero" else (steps,):
        n = Neighborhood(window, 3, shift * 6 // steps, time_boundary=boundary)
        torch.testing.assert_close(plain.window_sum(x, n), reference.window_sum(x, n), rtol=1e-14, atol=0)


@settings(max_examples=100)
@given(problems(longest=12, widest=16, dtypes=[torch.float64]))
def test_the_adjoint_is_the_transposed_sum(problem):
    """`<window_sum(x), y> = <x, window_sum(y, adjoint)>`."""
    x, y, n = problem.u.square(), problem.z.square(), problem.neighborhood
    left = (plain.window_sum(x, n) * y).sum()
    right = (x * plain.window_sum(y, n, adjoint=True)).sum()
    # W·K additions, the weight, one product and a sum over all elements; all terms are non-negative
    roundings = n.time_window * n.capsule_window + 2 + x.numel()
    torch.testing.assert_close(left, right, rtol=roundings * torch.finfo(x.dtype).eps, atol=0)


def test_window_sum_leaves_its_input_alone():
    x = torch.rand(1, 4, 1, 4)
    before = x.clone()
    for n in (Neighborhood(), Neighborhood(4, 3), Neighborhood(3, 2, time_boundary="zero", capsule_boundary="zero")):
        plain.window_sum(x, n)
        assert torch.equal(x, before)


@pytest.mark.parametrize("mu", [name for name in MU_SHAPES if name != "none"])
def test_mu_and_its_gradient_keep_their_shape(mu):
    """The backend takes any `mu` that broadcasts to `(C, D)`, without expanding it."""
    problem = Problem.random((2, 4, 2, 3), Neighborhood(3, 2), mu)
    arguments = Inputs(problem.z, problem.u, problem.mu, None), Window(problem.neighborhood, problem.eps)
    t, r = plain.forward(*arguments, True)
    dz, du, dmu, _ = plain.backward(*arguments, r, problem.dt)
    expected, bounds = problem.judge(), problem.bounds()
    assert dmu.shape == problem.mu.shape
    for name, x in {"t": t, "dz": dz, "du": du, "dmu": dmu}.items():
        assert_within(name, x, expected[name], bounds[name])


@pytest.mark.parametrize(
    ("shape", "neighborhood"),
    [
        ((64, 18, 18, 18), Neighborhood(18, 3)),
        ((64, 15, 15, 15), Neighborhood(15, 3)),
        ((8, 18, 18, 18), Neighborhood(18, 3)),
        ((8, 256, 16, 64), Neighborhood(18, 3)),
    ],
)
def test_memory_stays_within_four_times_the_inputs(shape, neighborhood):
    """`t`, `r` and the gradients make two and a half times `z` and `u`; the rest is the working space."""
    z, u = (torch.ones(shape, requires_grad=True) for _ in range(2))
    mu = torch.tensor(0.5, requires_grad=True)
    dt = torch.ones(shape)

    def run():
        t = topographic(z, u, mu, neighborhood, backend="torch")
        return t, *torch.autograd.grad(t, (z, u, mu), dt)

    run()
    peak = devices.peak_memory(torch.device("cpu"), run)
    assert sum(x.nbytes for x in run()) <= peak  # the profiler has seen the results
    assert peak <= 4 * (z.nbytes + u.nbytes)


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")
@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own code
def test_the_default_compiler_gives_the_same_numbers():
    problem = Problem.random((2, 18, 3, 18), Neighborhood(18, 3))
    leaves = [x.detach().requires_grad_() for x in problem.leaves.values()]
    compiled = torch.compile(topographic, fullgraph=True)
    t = compiled(*leaves, problem.neighborhood, eps=problem.eps, backend="torch")
    gradients = torch.autograd.grad(t, leaves, problem.dt)
    expected, bounds = problem.judge(), problem.bounds()
    for name, x in zip(expected, (t, *gradients), strict=True):
        assert_within(name, x, expected[name], bounds[name])
