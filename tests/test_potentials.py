"""Potentials: their closed forms against nested automatic differentiation, and what a step does to densities."""

import math

import pytest
import torch
from torch.func import grad, jacrev

from tvae.models.potentials import Potentials

K, N = 3, 4
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # sums of some hundred terms below 1, in float64


def potentials(size, hidden, strength=1.0):
    torch.manual_seed(0)
    result = Potentials(K, size, hidden).double()
    with torch.no_grad():
        result.w.mul_(strength)
    return result


def value(p, k):
    """The potential number k as a function of one point and its time."""
    return lambda z, time: p(z[None, None], time[None], torch.tensor([k])).value()[0, 0]


@pytest.mark.parametrize(("size", "hidden"), [(7, 5), (3, 9), (1, 1)])
@pytest.mark.parametrize("selected", [None, [2, 0, 2, 1]], ids=["all", "chosen"])
def test_closed_forms_are_what_automatic_differentiation_gives(size, hidden, selected):
    p = potentials(size, hidden, strength=20)
    numbers = range(K) if selected is None else selected
    z = torch.randn(len(numbers), N, size, dtype=torch.float64)
    time = torch.tensor([1, 2.5, 3, 80], dtype=torch.float64)
    found = p(z, time, None if selected is None else torch.tensor(selected))
    scale = torch.eye(size, dtype=torch.float64)
    for row, k in enumerate(numbers):
        u = value(p, k)
        for i in range(N):
            at = z[row, i], time[i]
            H = jacrev(grad(u))(*at)
            expected = {
                "value": u(*at),
                "gradient": grad(u)(*at),
                "rate": grad(u, 1)(*at),
                "second_rate": grad(grad(u, 1), 1)(*at),
                "laplacian": H.trace(),
                "hessian": H,
                "log_det": torch.linalg.slogdet(scale + H)[1],
            }
            assert H.abs().max() > 1e-6
            for name, x in expected.items():
                torch.testing.assert_close(getattr(found, name)()[row, i], x, **CLOSE)
            half = torch.linalg.slogdet(scale + H / 2)[1]
            torch.testing.assert_close(found.log_det(0.5)[row, i], half, **CLOSE)


@pytest.mark.parametrize(("steps", "length"), [(1, 1.0), (4, 0.5)])
def test_a_walk_and_its_gradient_are_those_of_one_step_after_the_other(steps, length):
    p, times = potentials(5, 7, strength=20), torch.tensor([1, 2.5, 3, 80], dtype=torch.float64)[:steps]
    z = torch.randn(K, N, 5, dtype=torch.float64, requires_grad=True)
    point, points, gradients, rates = z, [z], [], []
    for time in times:
        u = p(point, time[None])
        gradients.append(u.gradient())
        rates.append(u.rate())
        point = point + length * gradients[-1]
        points.append(point)
    expected = [torch.stack(x, 2) for x in (points, gradients, rates)]
    found = p.walk(z, times, length)
    seeds = [torch.randn_like(x) for x in expected]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    leaves = [z, *p.parameters()]
    for used in ([0], [1], [2], [0, 1, 2]):  # as each is used alone, and as all are
        wanted, actual = (
            torch.autograd.grad([x[i] for i in used], leaves, [seeds[i] for i in used], retain_graph=True)
            for x in (expected, found)
        )
        for x, y in zip(actual, wanted, strict=True):
            assert y.abs().max() > 1e-3
            torch.testing.assert_close(x, y, **CLOSE)
    assert torch.equal(p.walk(z, times[:0]).points, z[:, :, None])


def test_the_gradient_of_a_walk_has_none_and_says_so():
    p = potentials(2, 3)
    z = torch.randn(K, N, 2, dtype=torch.float64, requires_grad=True)
    points = p.walk(z, torch.ones(2)).points
    with pytest.raises(RuntimeError, match=r"^the gradient of a walk along potentials has none itself"):
        torch.autograd.grad(points.sum(), z, create_graph=True)


def test_the_definition_is_two_layers_of_tanh_and_sines_of_time():
    p = potentials(2, 3)
    z, t = torch.randn(2, dtype=torch.float64), 3.0
    phases = [t / 2**j for j in range(8)]
    e = torch.tensor([*map(math.sin, phases), *map(math.cos, phases)], dtype=torch.float64)
    h1 = torch.tanh(p.A[1] @ z + p.a[1])
    expected = p.w[1] @ torch.tanh(p.B[1] @ h1 + p.C[1] @ e)
    torch.testing.assert_close(value(p, 1)(z, torch.tensor(t, dtype=torch.float64)), expected, **CLOSE)


def test_one_time_is_that_of_all_points():
    p, z = potentials(4, 3), torch.randn(K, N, 4, dtype=torch.float64)
    one, each = (p(z, torch.full((count,), 2.0, dtype=torch.float64)) for count in (1, N))
    for name in ("gradient", "rate", "second_rate"):
        torch.testing.assert_close(getattr(one, name)(), getattr(each, name)(), **CLOSE)


def test_potentials_are_independent_of_each_other():
    p, z = potentials(4, 3), torch.randn(K, N, 4, dtype=torch.float64)
    p(z, torch.ones(1, dtype=torch.float64)).gradient()[1].sum().backward()
    for x in p.parameters():
        assert x.grad[1].any()
        assert not x.grad[[0, 2]].any()


def test_weights_start_as_those_of_linear_layers_and_steps_near_the_identity():
    torch.manual_seed(0)
    p = Potentials(5, 324, 128)
    for x, inputs in ((p.A, 324), (p.a, 324), (p.B, 128), (p.C, 16)):
        largest = x.abs().max().item() * math.sqrt(inputs)
        assert 0.97 < largest <= 1 + 1e-6  # of at least 640 uniform draws
    assert p.w.std().item() == pytest.approx(0.05, rel=5 / math.sqrt(2 * p.w.numel()))
    gradient = p(torch.randn(5, 100, 324), torch.ones(1)).gradient()
    assert gradient.norm(dim=-1).max() < 0.02 * math.sqrt(324)  # of points that far from 0


def test_a_density_that_a_step_moves_keeps_its_mass():
    """Cells of a grid, moved by a step: what each is to hold by the determinant, times the area that it takes.

    By the sums of the rows of the Hessian, as in the published code, the masses would not add up to 1.
    """
    p, edges = potentials(2, 4, strength=25), torch.linspace(-5, 5, 101, dtype=torch.float64)
    time = torch.ones(1, dtype=torch.float64)

    def at(x):
        grid = torch.stack(torch.meshgrid(x, x, indexing="ij"), -1)
        return grid, p(grid.flatten(0, 1).expand(K, -1, 2), time)

    with torch.no_grad():
        corners, there = at(edges)
        moved = corners + there.gradient().unflatten(1, corners.shape[:2])
        (a, b), (c, d) = [[moved[:, i : i + 100, j : j + 100] for j in (0, 1)] for i in (0, 1)]
        first, second = d - a, b - c
        area = (first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]).abs() / 2  # of a quadrilateral
        centres, here = at((edges[1:] + edges[:-1]) / 2)
        density = torch.exp(-centres.square().sum(-1) / 2) / (2 * math.pi)
        rows = (1 + here.hessian().sum(-1)).abs().log().sum(-1)
        masses, wrong = (
            (density * torch.exp(-log_det.unflatten(1, density.shape)) * area).sum((1, 2))
            for log_det in (here.log_det(), rows)
        )
    torch.testing.assert_close(masses, torch.ones_like(masses), rtol=0, atol=1e-3)
    assert (wrong - 1).abs().min() > 0.01
