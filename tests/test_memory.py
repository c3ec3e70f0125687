"""Windows of every kind take memory as tensors do, however many taps they have and however long sequences are."""

import subprocess
import sys

import pytest
import torch
from test_topographies import TOPOGRAPHIES, arguments, solve

from benchmarks import devices
from tvae_kernels import Neighborhood, roll_capsules, topographic
from tvae_kernels.backends import tables
from tvae_kernels.backends.torch import fourier, plain, taps

CODE = """
import resource, sys, torch
from tvae_kernels import Neighborhood, topographic

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def run(steps):
    torus = Neighborhood(9, (5, 5), (1, 0), axes=(8, 8))
    z, u = (torch.randn(1, steps, 1, 64, requires_grad=True) for _ in range(2))
    topographic(z, u, 0.3, torus, backend="torch").square().sum().backward()

run(10)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_long_sequence_on_a_torus_needs_little_memory():
    """Beside tables, whose size is bounded, at most 16 tensors like `z`; pairs of all taps would be gigabytes."""
    steps = 2048
    tensor = steps * 64 * 4 / 2**20
    making = 100 * taps.PAIRS_OF_A_PART / 2**20  # some bytes for each pair that is being made
    assert peak_of(steps) < 16 * tensor + making + 32


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_twenty_thousand_frames_on_a_torus_run_in_two_gigabytes():
    assert peak_of(20_000) < 2000


def peak_of(steps: int) -> int:
    """Return the MiB that a process needs for a sequence beyond those of a short one."""
    process = subprocess.run([sys.executable, "-c", CODE, str(steps)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return int(process.stdout)


def test_what_is_kept_is_bounded():
    """In bytes, whatever it is: pairs of a part, and tables of neighbourhoods of any size."""
    n, dim = TOPOGRAPHIES["torus"]
    bags = taps._bags(n, 1, dim, taps._Part(5, (0, dim), 0, 5, 5), False, torch.device("cpu"))
    pairs = 5 * dim * 6
    assert bags.source.nbytes + bags.entry.nbytes == 8 * pairs

    @tables.kept(10_000)
    def of_size(count: int) -> tuple[torch.Tensor]:
        return (torch.zeros(count, dtype=torch.uint8),)

    first = of_size(3000)
    assert of_size(3000) is first
    of_size(2000)
    assert of_size.kept_bytes() == 5000 + 2 * 1024  # with what the objects take
    of_size(3000)  # is now the last that was used
    of_size(4000)
    assert of_size.kept_bytes() == 7000 + 2 * 1024
    assert of_size(3000) is first
    of_size(20_000)
    assert of_size.kept_bytes() == 0
    assert taps._bags.kept_bytes() <= taps.KEPT_BYTES


TORUS = {"time_window": 9, "capsule_window": (5, 5), "shift": (1, 0), "axes": (8, 8)}
WINDOWS = {
    "plain": Neighborhood(9, 3),
    "cut": Neighborhood(9, 3, time_boundary="zero", capsule_boundary="zero"),
    "far": Neighborhood(9, 3, 5, capsule_boundary="zero"),
    "causal": Neighborhood(9, 3, causal=True),
    "padded": Neighborhood(9, 3, time_boundary="padded", capsule_boundary="padded"),
    "fraction": Neighborhood(9, 3, 1 / 3),
    "phase": Neighborhood(9, 3, 1 / 3, roll="fourier"),
    "phase, cut": Neighborhood(9, 3, 1 / 3, time_boundary="zero", roll="fourier"),
    "phases": Neighborhood(9, 3, speeds=(1, 0.5, 2, 1 / 3), roll="fourier"),
    "speeds": Neighborhood(9, 3, speeds=(1, 0.5, 2, -1)),
    "torus": Neighborhood(**TORUS),
    "roots": Neighborhood(**TORUS, roots="each axis"),
    "roots, padded": Neighborhood(**TORUS, roots="each axis", capsule_boundary="padded"),
    "3 roots": Neighborhood(5, 3, (1, 0, 1), axes=(4, 4, 4), roots="each axis"),
}
SHAPE = 4, 128, 4, 64


@pytest.fixture
def small_parts(monkeypatch):
    """Parts as small beside tensors of these tests as they are beside those of a hundred times the size."""
    for file, names in ((plain, ["MOST"]), (fourier, ["MOST"]), (taps, ["MOST", "MOST_PAIRS", "PAIRS_OF_A_PART"])):
        for name in names:
            monkeypatch.setattr(file, name, getattr(file, name) // 64)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_all_windows_take_four_times_the_tensors_at_most(small_parts, name, weighted):
    """Forward and backward, of float16, which is computed in tensors of twice the size."""
    neighborhood = WINDOWS[name]
    problem = leaves_and_gradient(neighborhood, weighted, torch.float16)
    z, u = problem[0][:2]
    tensors = 4 * z.nbytes + 2 * u.nbytes  # t, and a gradient for each of the three
    solved(neighborhood, *problem, "torch")  # with what is kept
    assert peak(lambda: solved(neighborhood, *problem, "torch")) + 2 * z.nbytes + u.nbytes <= 4 * tensors


@pytest.mark.parametrize("neighborhood", [Neighborhood(), Neighborhood(2, 2), Neighborhood(3)], ids=["1", "2x2", "3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_small_windows_take_no_more_than_the_reference(small_parts, neighborhood, weighted):
    problem = leaves_and_gradient(neighborhood, weighted, torch.float32)
    found, expected = (peak(lambda b=b: solved(neighborhood, *problem, b)) for b in ("torch", "reference"))
    assert found <= expected + 2**16  # numbers of positions


@pytest.mark.slow
@pytest.mark.parametrize("name", WINDOWS)
def test_capsules_are_rolled_in_four_times_the_tensors_at_most(name):
    t, dt = (torch.randn(SHAPE, requires_grad=grad) for grad in (True, False))

    def call():
        rolled = roll_capsules(t, 1.5, WINDOWS[name])
        return rolled, torch.autograd.grad(rolled, t, dt)

    assert peak(call) + 2 * t.nbytes <= 4 * 4 * t.nbytes + 2**16


def leaves_and_gradient(neighborhood: Neighborhood, weighted: bool, dtype: torch.dtype) -> tuple:
    """`z`, `u` and weights, which want gradients, and the gradient that arrives."""
    z, dt = (torch.randn(SHAPE, dtype=dtype) for _ in range(2))
    leaves = [z, torch.randn(neighborhood.shape_of_u(SHAPE), dtype=dtype)]
    if weighted:
        leaves.append(torch.rand(neighborhood.weights_shape, dtype=dtype))
    return [x.requires_grad_() for x in leaves], dt


def solved(neighborhood: Neighborhood, leaves: list, dt: torch.Tensor, backend: str) -> tuple:
    t = topographic(*leaves[:2], 0.5, neighborhood, *leaves[2:], backend=backend)
    return t, torch.autograd.grad(t, leaves, dt)


def peak(call) -> int:
    """Return how many bytes of tensors a call has at once on the CPU, beside those that there were before."""
    most = devices.peak_memory(torch.device("cpu"), call)
    assert most > 0
    return most


@pytest.mark.parametrize("name", [name for name in TOPOGRAPHIES if "phase" not in name])
@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
def test_sequences_in_parts_are_what_they_are_as_a_whole(monkeypatch, name, weighted):
    """Bit for bit: every sum has the same terms in the same order."""
    neighborhood, dim = TOPOGRAPHIES[name]
    given = arguments(neighborhood, dim, weighted, time=7)
    expected = solve("torch", neighborhood, *given)
    monkeypatch.setattr(taps, "MOST_PAIRS", 1)
    for frames in (1, 3, 5):
        pairs_of_a_frame = 2 * dim * sum(1 for _ in neighborhood.taps())
        monkeypatch.setattr(taps, "PAIRS_OF_A_PART", frames * pairs_of_a_frame)
        for x, y in zip(solve("torch", neighborhood, *given), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("boundary", ["circular", "zero", "padded"])
@pytest.mark.parametrize("weighted", ["", "shared", "capsule"])
def test_sequences_by_phase_in_parts_are_what_they_are_as_a_whole(monkeypatch, boundary, weighted):
    """Some frames of a window are then in no window of a part: nothing may be transformed there."""
    neighborhood = Neighborhood(5, 3, 1 / 3, time_boundary=boundary, roll="fourier")
    given = arguments(neighborhood, 6, weighted, time=7)
    expected = solve("torch", neighborhood, *given)
    for most in (1, 40, 150):
        monkeypatch.setattr(fourier, "MOST", most)
        for x, y in zip(solve("torch", neighborhood, *given), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
