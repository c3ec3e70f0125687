"""A small set under pytest-benchmark: `python -m pytest benchmarks/`. Every peer is checked before it is timed."""

import pytest
import torch

from benchmarks import devices, peers
from benchmarks.problems import PAPER, Case, Judge, Problem

# Importing the compiler warns of what torch itself deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
DEVICE = devices.here()
CASES = (Case((2, 7, 3, 9), 5, 3), PAPER)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def judged(request):
    """Give a case, its tensors and what the results should be."""
    problem = Problem.random(request.param, DEVICE, seed=0)
    return request.param, problem, Judge.build(problem, request.param.neighborhood)


@pytest.fixture(scope="module", params=peers.NAMES[DEVICE.type], ids=lambda name: name.replace(" ", "-"))
def checked(request, judged):
    """Give a peer that has given the right results on the case."""
    case, problem, judge = judged
    torch.compiler.reset()
    torch.backends.cudnn.allow_tf32 = False
    call = peers.build(request.param, case.neighborhood)
    judge.check(request.param, problem, call)
    return call, problem


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_calls(benchmark, checked, direction):
    call, problem = checked

    def run():
        getattr(problem, direction)(call)
        _wait()

    benchmark(run)


def test_backward(benchmark, checked):
    call, problem = checked

    def graph():
        t = call(problem.z, problem.u, problem.mu)
        _wait()
        return (t,), {}

    def backward(t):
        torch.autograd.grad(t, (problem.z, problem.u, problem.mu), problem.dt)
        _wait()

    benchmark.pedantic(backward, setup=graph, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_copy(benchmark, judged, direction):
    elements = judged[0].floor_bytes(direction) // 8
    source, target = torch.randn(2, elements, device=DEVICE)

    def copy():
        target.copy_(source)
        _wait()

    benchmark(copy)
    assert torch.equal(source, target)
