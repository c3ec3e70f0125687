"""The benchmark of the topographies: every preset's layer is checked and timed beside its reference."""

from dataclasses import replace

import pytest
import torch
from benchmarked import written

from benchmarks import peers, topographies
from benchmarks.problems import WrongResultError
from benchmarks.records import Record
from tvae.presets import PRESETS

CPU = torch.device("cpu")
NAMES = topographies.PRESETS_TIMED


def small(preset):
    """The layer of a preset, with one sequence and two capsules."""
    topography = topographies.topography(preset)
    _, *steps, capsules, dim = topography.shape
    n = topography.neighborhood
    speeds = n.speeds and n.speeds[:: capsules - 1]
    return replace(topography, neighborhood=replace(n, speeds=speeds), shape=(1, *steps, 2, dim))


@pytest.mark.parametrize("preset", NAMES)
def test_every_topography_is_checked_and_timed_beside_its_reference(preset):
    topography = small(preset)
    found = topographies.measure(topography, device=CPU, samples=2, cache=2**10)
    assert [record.variant for record in found] == ["torch", "reference"]
    for record in found:
        assert record.case == {"preset": preset, "shape": topography.shape}
        assert 0 < record.error <= 1
        assert [len(x) for x in record.samples.values()] == [2, 2, 2]
    problem = topography.problem(CPU, seed=0)
    right = topography.peer("reference", CPU)

    def wrong(z, u, mu, *weights):
        return right(z, u + 1e-3 * u.detach(), mu, *weights)

    with pytest.raises(WrongResultError, match=f"wrong: t of {topography.name} is off by"):
        topographies.check(topography, "wrong", wrong, problem)


def test_a_wrong_peer_is_refused_before_any_is_timed():
    topography = small(NAMES[0])
    ours, called = topography.peer("torch", CPU), []
    calls = {"torch": lambda *x: called.append(x) or ours(*x), "wrong": lambda *x: 1.001 * ours(*x)}
    with pytest.raises(WrongResultError, match="wrong: t of"):
        topographies.measure(topography, device=CPU, samples=2, calls=calls, cache=2**10)
    assert len(called) == 1


def test_a_layer_that_knows_its_axes_is_timed_with_both():
    (preset,) = (name for name in NAMES if small(name).with_axis)
    topography = replace(small(preset), shape=(2, *small(preset).shape[1:]))
    z, u, mu = topography.problem(CPU, seed=0).inputs.values()
    both = [peers.build("reference", topography.neighborhood.along(axis))(z, u, mu)[axis] for axis in (0, 1)]
    torch.testing.assert_close(topography.peer("torch", CPU)(z, u, mu), torch.stack(both))


def test_cases_are_those_of_the_presets_at_two_batches():
    cases = topographies.cases("cuda")
    assert [case.preset for case in cases] == [*NAMES, *NAMES]
    batches = [case.shape[0] / PRESETS[case.preset].config.training.batch_size for case in cases]
    assert batches == [1] * len(NAMES) + [512] * len(NAMES)


def test_the_table_shows_medians_beside_ours(tmp_path):
    samples = {
        "torch": {"forward": [1e3, 3e3, 2e3], "backward": [1], "both": [4e3]},
        "reference": {"forward": [5e3], "backward": [1], "both": [6e3]},
    }
    found = [Record({"preset": "plain", "shape": (1, 2, 3, 4)}, peer, x, error=0.5) for peer, x in samples.items()]
    text = topographies.table(written(tmp_path, "topographies", "cpu", found, ours="torch"))
    assert "| `plain` | 1, 2, 3, 4 | 2 ms | 5 ms (2.5x) | 4 ms | 6 ms (1.5x) |" in text
