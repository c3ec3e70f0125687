"""The oracle against the definition of the operation, written out element by element."""

from itertools import product

import pytest
import torch
from numerics import Problem, window_matrix

from tvae_kernels import Neighborhood, reference, topographic
from tvae_kernels.arguments import Inputs, Window

BOUNDARIES = list(product(["circular", "zero"], repeat=2))
EPS64 = torch.finfo(torch.float64).eps


def all_neighborhoods(time_boundary: str, capsule_boundary: str):
    """Odd, even and full windows, causal and not, for the shifts that behave differently on 5 frames × 4 positions."""
    windows = [(1, 1), (1, 3), (2, 1), (3, 2), (4, 4), (5, 3)]
    windows += [(9, 1)] if time_boundary == "zero" else []
    windows += [(2, 8)] if capsule_boundary == "zero" else []
    for (W, K), shift, causal in product(windows, [1, 0, -2, 11], [False, True]):
        yield Neighborhood(W, K, shift, causal, time_boundary, capsule_boundary)


@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_window_sum_is_the_matrix_of_the_definition(time_boundary, capsule_boundary, weighted):
    B, S, C, D = 2, 5, 2, 4
    x = torch.rand(B, S, C, D, dtype=torch.float64)
    for neighborhood in all_neighborhoods(time_boundary, capsule_boundary):
        W, K = neighborhood.time_window, neighborhood.capsule_window
        weights = torch.rand(W, K, dtype=torch.float64) if weighted else None
        matrix = window_matrix(neighborhood, S, D, weights)
        for adjoint in (False, True):
            rows = x.movedim(2, 1).reshape(B * C, S * D)
            expected = (rows @ (matrix if adjoint else matrix.T)).reshape(B, C, S, D).movedim(1, 2)
            actual = reference.window_sum(x, neighborhood, weights, adjoint)
            # W·K non-negative terms on either side, each side within W·K roundings of half an EPS64 of the sum
            assert ((actual - expected).abs() <= W * K * EPS64 * expected).all(), neighborhood


@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
def test_value_and_gradient_are_those_of_the_definition(time_boundary, capsule_boundary):
    """The whole operation, and autograd through it, from the dense matrix."""
    S, D = 6, 5
    for neighborhood in (
        Neighborhood(4, 3, 1, False, time_boundary, capsule_boundary),
        Neighborhood(5, 2, -2, True, time_boundary, capsule_boundary),
    ):
        problem = Problem.random((2, S, 1, D), neighborhood, mu="position", dtype=torch.float64)
        z, u, mu = (x.detach().requires_grad_() for x in (problem.z, problem.u, problem.mu))
        v = (u.square().reshape(2, S * D) @ window_matrix(neighborhood, S, D).T).reshape(2, S, 1, D)
        t = (z - mu) / (v + problem.eps) ** 0.5
        dz, du, dmu = torch.autograd.grad(t, (z, u, mu), problem.dt)
        actual, bounds = problem.solve("reference"), problem.bounds()
        for name, expected in {"t": t, "dz": dz, "du": du, "dmu": dmu}.items():
            assert ((actual[name] - expected).abs() <= bounds[name]).all(), (name, neighborhood)


@pytest.mark.parametrize(("time_boundary", "capsule_boundary"), BOUNDARIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_formula_is_what_autograd_gives(time_boundary, capsule_boundary, weighted):
    neighborhood = Neighborhood(4, 3, -1, False, time_boundary, capsule_boundary)
    problem = Problem.random((2, 6, 2, 5), neighborhood, mu="each", weighted=weighted, dtype=torch.float64)
    inputs = Inputs(problem.z, problem.u, problem.mu, problem.weights)
    formula = reference.topographic_backward(inputs, Window(neighborhood, problem.eps), problem.dt)
    expected, bounds = problem.judge(), problem.bounds()
    for name, actual in zip(("dz", "du", "dmu", "dweights"), formula, strict=True):
        if actual is None:
            assert not weighted
        else:
            assert ((actual - expected[name]).abs() <= bounds[name]).all(), name


def t_of_u(u, neighborhood, backend):
    """`v^(-1/2)`, the operation with nothing but the window sum in it."""
    return topographic(torch.ones_like(u), u, 0.0, neighborhood, eps=0.0, backend=backend)


@pytest.mark.parametrize("size", [3, 4, 7, 18])
def test_direction_a_full_diagonal_window_travels_with_the_capsule(backend, device, size):
    """For `W = S = D`, `K = 1` and any `u`: `v[l + 1] = Roll_1(v[l])`, and not for the opposite shift."""
    u = torch.randn(2, size, 1, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    # both sides add the same `size` terms in another order, so they are at most 2·(size + 6)/2 half EPS64 apart
    tolerance = (size + 6) * EPS64
    t = t_of_u(u, Neighborhood(size, shift=1), backend)
    torch.testing.assert_close(t.roll(-1, 1), t.roll(1, 3), rtol=tolerance, atol=0)
    other = t_of_u(u, Neighborhood(size, shift=-1), backend)
    assert not torch.allclose(other.roll(-1, 1), other.roll(1, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("window", [3, 4, 7])
def test_direction_a_capsule_that_follows_its_input_has_one_value_in_its_window(backend, device, window):
    """For `u[l] = Roll_l(u[0])`: `v = W·u²` element by element, and not for the opposite shift."""
    S = D = 7
    first = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    u = torch.stack([first.roll(l) for l in range(S)]).reshape(1, S, 1, D)
    expected = (window * u.square()).rsqrt()
    t = t_of_u(u, Neighborhood(window, shift=1), backend)
    torch.testing.assert_close(t, expected, rtol=(window + 6) * EPS64, atol=0)
    other = t_of_u(u, Neighborhood(window, shift=-1), backend)
    assert not torch.allclose(other, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(t[:, 1:], t[:, :-1].roll(1, 3), rtol=2 * (window + 6) * EPS64, atol=0)
