"""Windows out of a table take memory as tensors do, however long sequences are."""

import subprocess
import sys

import pytest
import torch
from test_topographies import TOPOGRAPHIES, arguments, solve

from tvae_kernels.backends.torch import taps

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
    n, dim = TOPOGRAPHIES["torus"]
    bags = taps._kept_bags(n, 1, dim, taps._Part(5, 0, 5, 5), False, torch.device("cpu"))
    pairs = 5 * dim * 6
    assert bags.source.nbytes + bags.entry.nbytes == 8 * pairs
    assert taps._kept_bags.cache_info().maxsize * 8 * taps.MOST_PAIRS <= 2**27


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
