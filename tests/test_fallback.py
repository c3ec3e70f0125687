"""The fast window sum against the plain one; the whole backend is tested in test_topographic.py."""

import torch
from hypothesis import given, settings
from numerics import problems

from tvae_kernels import Neighborhood, fallback, reference


@settings(max_examples=300)
@given(problems(longest=12, widest=16, dtypes=[torch.float64]))
def test_window_sum_equals_the_plain_sum_in_both_directions(problem):
    x, n = problem.u.square(), problem.neighborhood
    # both add the same W·K non-negative terms, each within W·K - 1 roundings of half an eps
    tolerance = n.time_window * n.capsule_window * torch.finfo(x.dtype).eps
    for adjoint in (False, True):
        expected = reference.window_sum(x, n, problem.weights, adjoint)
        torch.testing.assert_close(
            fallback.window_sum(x, n, problem.weights, adjoint), expected, rtol=tolerance, atol=0
        )


@settings(max_examples=100)
@given(problems(longest=12, widest=16, dtypes=[torch.float64]))
def test_the_adjoint_is_the_transposed_sum(problem):
    """`<window_sum(x), y> = <x, window_sum(y, adjoint)>`."""
    x, y, n = problem.u.square(), problem.z.square(), problem.neighborhood
    left = (fallback.window_sum(x, n, problem.weights) * y).sum()
    right = (x * fallback.window_sum(y, n, problem.weights, adjoint=True)).sum()
    # W·K additions, the weight, one product and a sum over all elements; all terms are non-negative
    roundings = n.time_window * n.capsule_window + 2 + x.numel()
    torch.testing.assert_close(left, right, rtol=roundings * torch.finfo(x.dtype).eps, atol=0)


def test_window_sum_leaves_its_input_alone():
    x = torch.rand(1, 4, 1, 4)
    before = x.clone()
    for n in (Neighborhood(), Neighborhood(4, 3), Neighborhood(3, 2, time_boundary="zero", capsule_boundary="zero")):
        fallback.window_sum(x, n)
        assert torch.equal(x, before)
