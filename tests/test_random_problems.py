"""Random problems over all options: values and all gradients against the definition, and kernels through a compiler.

By default a few of each; `pytest -m long` takes as many as the environment variable TVAE_CASES says, and prints how
many they were of each kind.
"""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from numerics import interpreted
from random_problems import Case, cases, definition

from tvae_kernels import topographic
from tvae_kernels.arguments import compute_dtype
from tvae_kernels.neighborhood import Neighborhood

CASES = int(os.environ.get("TVAE_CASES", "2000"))
SEED = int(os.environ.get("TVAE_SEED", "0"))
FRONT_END = Path(__file__).parent / "front_end.py"


def solve(case: Case, backend: str, device="cpu") -> list:
    z, u, mu, weights, dt, axis = case.tensors(device)
    leaves = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in (z, u, mu, weights)]
    t = topographic(*leaves[:3], case.neighborhood, leaves[3], case.eps, backend, axis)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor)]
    dt = dt.to(t.dtype)
    return [t.detach(), *torch.autograd.grad(t, wanted, dt)]


def bounds(case: Case, backend: str, expected: list) -> list:
    """How far each element may be off: rounding errors along the longest path, times what there is without cancelling.

    A phase shift adds D terms of the size of the largest `u`, and so do its transforms; what that is of a root is the
    condition of the root.
    """
    z, u, mu, weights, dt, axis = case.tensors()
    n, D = case.neighborhood, case.shape[3]
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in (z, u, mu, weights, dt)]
    z, u, mu, weights, dt = exact
    nothing = torch.zeros_like(mu) if isinstance(mu, torch.Tensor) else 0.0
    sizes = definition(case, (z - mu).abs(), u, nothing, weights, -dt.abs(), axis)
    taps = sum(1 for _ in n.taps()) * 2 ** len(n.axes or (0,))
    in_r = (taps + 5) / 2 + 4 + n.root_count
    in_du = 3 * in_r + taps + 9
    counts = [in_r + 2, in_r + 1, in_du]
    if isinstance(mu, torch.Tensor):
        counts.append(in_r + 1 + z.numel())
    if weights is not None:
        counts.append(in_du + z.numel())
    in_phases = 0.0
    if n.by_phase and z.numel():
        ones = torch.ones_like(z)
        largest = definition(case, ones, u, 0.0, weights, dt, axis)[0].nan_to_num(0, 0, 0).max()
        total = taps if weights is None else weights.sum().item()
        in_phases = 12 * D * (1 + total**0.5 * u.nan_to_num(0).abs().max() * largest)
    accumulated, out = torch.finfo(compute_dtype(case.dtype)), torch.finfo(case.dtype)
    h = 1.01 * accumulated.eps / 2 * (2 if case.dtype == torch.float64 else 1)
    rounding_out = 0 if out.bits == accumulated.bits else out.eps / 2
    if case.dtype == torch.bfloat16 and backend == "triton" and interpreted():
        rounding_out = out.eps  # the interpreter cuts float32 off
    floor = out.smallest_normal * max(out.eps, 1e-7)
    found = []
    for size, x, count in zip(sizes, expected, counts, strict=True):
        size = size.abs()
        if n.by_phase and size.numel():
            size = torch.full_like(size, size.nan_to_num(0, 0, 0).max())
        found.append((count + in_phases) * h * size + rounding_out * x.abs() + floor)
    return found


def check(case: Case, backend: str, device="cpu") -> None:
    z, u, mu, weights, dt, axis = case.tensors()
    expected = definition(case, z, u, mu, weights, dt, axis)
    actual = solve(case, backend, device)
    for name, x, y, bound in zip(("t", "z", "u", "mu", "w"), *_named(case, actual, expected, backend), strict=False):
        assert x.shape == y.shape, (name, case)
        x = x.cpu().double()
        limit = 0.99 * torch.finfo(case.dtype).max
        comparable = ~(y.isfinite() & (y.abs() > limit))
        finite = y.isfinite() & bound.isfinite() & comparable
        excess = ((x - y).abs() / bound)[finite]
        assert (excess <= 1).all(), (name, excess.max().item(), case)
        strange = ~y.isfinite()
        if name == "u":
            unread = strange & ~are_read(case)
            assert not x[unread].nan_to_num(0, 8, 9).any(), (name, case)  # 0, or 0 times what is not finite
            strange &= ~unread
        if case.neighborhood.by_phase:
            assert not x[strange].isfinite().any(), (name, case)
        else:
            assert torch.equal(x[strange].nan_to_num(7, 8, 9), y[strange].nan_to_num(7, 8, 9)), (name, case)


def are_read(case: Case) -> torch.Tensor:
    """Say which elements of `u` are in any window: those on which the sizes of all denominators depend."""
    z, u, _, weights, dt, axis = case.tensors()
    weights = None if weights is None else torch.ones_like(weights, dtype=torch.float64)
    ones = [torch.ones(x.shape, dtype=torch.float64) for x in (z, u, dt)]
    return definition(replace(case, eps=0.5), ones[0], ones[1], 0.0, weights, ones[2], axis)[2] != 0


def _named(case, actual, expected, backend):
    return actual, expected, bounds(case, backend, expected)


def kind(case: Case) -> str:
    n = case.neighborhood
    return "phase" if n.by_phase else "roots" if n.root_count > 1 else "plain" if n.is_plain else "table"


def sweep(backend: str, count: int, most: int, device="cpu") -> Counter:
    seen = Counter()

    @seed(SEED)
    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(most))
    def run(case):
        seen[kind(case)] += 1
        check(case, backend, device)

    run()
    return seen


@pytest.mark.parametrize(("backend", "count", "most"), [("reference", 40, 60), ("torch", 80, 60)])
def test_random_problems(backend, count, most):
    assert sweep(backend, count, most).total() >= count


@pytest.mark.slow
def test_random_problems_in_the_kernels(triton, device):
    assert sweep(triton, 12, 12, device).total() >= 12


def front_end(count: int) -> str:
    """Random problems through the front end of Triton's compiler, which runs where its interpreter does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    command = [sys.executable, str(FRONT_END), str(count), str(SEED)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_compiler_takes_the_kernels_of_random_problems():
    pytest.importorskip("triton")
    assert front_end(8).startswith("problems: ")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_many_random_problems(backend, device, request, capsys):
    triton = backend == "triton"
    if triton:
        request.getfixturevalue("triton")
    seen = sweep(backend, CASES // 10 if triton else CASES, 30 if triton else 200, device if triton else "cpu")
    with capsys.disabled():
        print(f"\n{backend}: {seen.total()} problems, {dict(seen)}")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_the_compiler_takes_the_kernels_of_many_random_problems(capsys):
    pytest.importorskip("triton")
    text = front_end(max(8, CASES // 10))
    with capsys.disabled():
        print(f"\n{text}")


def test_the_definition_is_that_of_the_paper():
    """Eq. 9 by hand: W 3 and K 1 along a diagonal."""
    n = Neighborhood(3, 1)
    case = Case(n, (1, 4, 1, 4), "", None, torch.float64, 0.5, "contiguous", "", "", 3)
    z, u, mu, weights, dt, axis = case.tensors()
    v = sum(u.square().roll((-i, -i), (1, 3)) for i in (-1, 0, 1))
    expected = (z - 0.5) / (v + 0.5).sqrt()
    torch.testing.assert_close(definition(case, z, u, mu, weights, dt, axis)[0], expected, rtol=1e-14, atol=1e-14)


def test_the_definition_knows_what_no_window_reads():
    """A window that is two positions back in the frame before, and cut there."""
    n = Neighborhood(2, 1, 2, causal=True, time_boundary="padded", capsule_boundary="zero")
    case = Case(n, (1, 2, 1, 3), "shared", None, torch.float64, 0.0, "contiguous", "", "", 3)
    # only the last position of the first frame reaches the padding; each frame is read by itself
    assert are_read(case).tolist() == [[[[True, False, False]], [[True] * 3], [[True] * 3]]]
