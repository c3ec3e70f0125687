"""The benchmark of the operation: peers compute what they are compared with, and targets follow from the samples."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from benchmarked import BYTES, CASE, CPU_TIMES, GPU_TIMES, operation_records, operation_result, written
from numerics import Problem as Numerics
from numerics import assert_within

from benchmarks import devices, operation, peers
from benchmarks.measuring import measure_all
from benchmarks.problems import PAPER, Case, Copies, Judge, Problem, WrongResultError, sample
from benchmarks.records import Record
from benchmarks.targets import Target
from tvae_kernels import Neighborhood

CPU = torch.device("cpu")
CACHE = 2**10
WINDOWS = [(1, 1), (5, 3), (6, 2), (9, 3)]  # on (7 to 9 frames, 11 positions); even, odd, a whole sequence


@pytest.mark.parametrize(("time_window", "capsule_window"), WINDOWS)
@pytest.mark.parametrize("name", ["reference", "torch", "convolution"])
def test_peers_compute_the_operation_in_float64(name, time_window, capsule_window):
    problem = Numerics.random((2, 9, 3, 11), Neighborhood(time_window, capsule_window), dtype=torch.float64)
    call = peers.build(name, problem.neighborhood)
    leaves = [x.detach().requires_grad_() for x in (problem.z, problem.u, problem.mu)]
    t = call(*leaves)
    found = {"t": t.detach()} | dict(zip(("dz", "du", "dmu"), torch.autograd.grad(t, leaves, problem.dt), strict=True))
    exact, bounds = problem.judge(), problem.bounds()
    for what, x in found.items():
        assert_within(what, x, exact[what], bounds[what])


@pytest.mark.parametrize("boundary", [{"shift": 0}, {"time_boundary": "zero"}, {"capsule_boundary": "zero"}])
def test_convolution_refuses_what_it_does_not_compute(boundary):
    x = torch.randn(1, 5, 1, 5)
    with pytest.raises(ValueError, match="shift 1 and circular"):
        peers.convolution(x, x, torch.tensor(0.0), Neighborhood(3, **boundary))


def test_a_peer_without_a_name_is_refused():
    with pytest.raises(ValueError, match="got 'fastest'"):
        peers.build("fastest", Neighborhood())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_judge_accepts_each_peer_and_refuses_small_mistakes(dtype):
    case = Case((2, 9, 2, 11), 5, 3, dtype)
    problem = Problem.random(case, CPU, seed=1)
    judge = Judge.build(problem, case.neighborhood)
    for name in ("reference", "torch", "convolution"):
        assert 0 <= judge.check(name, problem, peers.build(name, case.neighborhood)) <= 1
    right = peers.build("reference", case.neighborhood)
    off = 1 + 100 * torch.finfo(getattr(torch, dtype)).eps
    mistakes = {
        "t is off": lambda z, u, mu: right(z, u, mu) * off,
        "dz is off": lambda z, u, mu: right(z * off + z.detach() * (1 - off), u, mu),
        "du is off": lambda z, u, mu: right(z, u * off + u.detach() * (1 - off), mu),
        "dmu is off": lambda z, u, mu: right(z, u, mu * 1.01 + mu.detach() * (1 - 1.01)),
        "t is .* not like": lambda z, u, mu: right(z, u, mu)[:1],
    }
    if dtype == "float32":
        for message, wrong in mistakes.items():
            with pytest.raises(WrongResultError, match=message):
                judge.check("wrong", problem, wrong)
    with pytest.raises(WrongResultError, match="t is off by up to nan"):
        judge.check("wrong", problem, lambda z, u, mu: right(z, u, mu) * math.nan)


SMALL = Case((1, 4, 1, 4), 2, 1)


def small_calls(**others):
    """Ours and others for the small case."""
    return {"torch": peers.build("torch", SMALL.neighborhood)} | others


def test_measure_refuses_a_wrong_peer_before_it_times_any():
    called = []
    ours = small_calls()["torch"]
    calls = {
        "torch": lambda *x: called.append(x) or ours(*x),
        "reference": lambda z, u, mu: z / (u.abs() + 1) + mu,
    }
    with pytest.raises(WrongResultError, match="reference: t is off"):
        operation.measure(SMALL, device=CPU, samples=1, calls=calls, cache=CACHE)
    assert len(called) == 4  # checked and measured for memory, in both directions


def test_measure_keeps_every_sample_and_says_which_peer_could_not_run():
    def broken(z, u, mu):
        raise RuntimeError("no such convolution\nand more")

    calls = small_calls(reference=peers.build("reference", SMALL.neighborhood), convolution=broken)
    found = operation.measure(SMALL, device=CPU, samples=4, calls=calls, cache=CACHE)
    assert [record.variant for record in found] == ["torch", "reference", "copy", "convolution"]
    assert all(record.case == SMALL.fields for record in found)
    for record in found[:3]:
        assert {direction: len(x) for direction, x in record.samples.items()} == {
            "forward": 4,
            "backward": 4,
            "both": 4,
        }
        assert all(x > 0 for times in record.samples.values() for x in times)
    for record in found[:2]:
        assert 0 < record.error <= 1
        assert record.memory["both"] > record.memory["forward"] > 2 * SMALL.tensor_bytes
    assert found[-1] == Record(SMALL.fields, "convolution", not_measured="RuntimeError: no such convolution")
    with pytest.raises(RuntimeError, match="no such convolution"):  # ours may not be left out
        operation.measure(SMALL, device=CPU, samples=1, calls={"torch": broken}, cache=CACHE)


def test_peak_memory_counts_the_inputs():
    problem = Problem.random(SMALL, CPU, seed=0)
    size = SMALL.tensor_bytes
    peaks = problem.peaks(lambda z, u, mu: torch.addcmul(mu, z, u))
    assert peaks["forward"] == 3 * size  # z, u, t
    assert 6 * size < peaks["both"] <= 7 * size  # z, u, t, dt, dz, du, and what is summed up in dmu


def test_the_convolution_is_timed_for_one_window_only():
    for device_type, names in peers.NAMES.items():
        assert operation.peers_of(PAPER, device_type) == [*names]
        assert operation.peers_of(SMALL, device_type) == [name for name in names if name != "convolution"]


class Counter:
    """A clock whose marks are 1, 4, 9, 16, ...: each difference says between which marks it was taken."""

    marks = 0

    def start(self):
        pass

    def mark(self):
        self.marks += 1
        return self.marks**2

    def microseconds(self, *marks):
        return [b - a for a, b in pairwise(marks)]


def test_sample_times_backward_as_what_comes_after_forward():
    problems = [Problem.random(SMALL, CPU, seed) for seed in range(2)]
    times = sample(peers.build("torch", SMALL.neighborhood), problems, Counter(), turn=0)
    assert times == {"forward": 3, "backward": 9, "both": 16}
    assert Copies(SMALL, CPU, 1).sample(Counter(), 0) == {"forward": 3, "backward": 7, "both": 11}


def test_copies_move_the_bytes_of_the_floor():
    copies = Copies(Case((2, 3, 5, 7), 1, 1, "bfloat16"), CPU, 2)
    moved = [sum(x.nbytes for x in copies.pair(direction, turn=1)) for direction in ("forward", "backward", "both")]
    elements = 2 * 3 * 5 * 7
    assert moved == pytest.approx([3 * 2 * elements, 5 * 2 * elements, 8 * 2 * elements], abs=8)
    source, target = copies.pair("both", turn=0)
    copies.sample(devices.CpuClock(), 0)
    assert torch.equal(target[: len(source) * 3 // 8], source[: len(source) * 3 // 8])


def test_cases_fit_their_axes_and_have_distinct_names():
    for device_type, count in (("cpu", 32), ("cuda", 84)):
        cases = operation.cases(device_type)
        for case in cases:
            case.neighborhood.check_fits(time=case.shape[1], dim=case.shape[3])
        assert len({case.name for case in cases}) == len(cases) == count
    assert operation.PAPER in operation.cases("cpu")


def test_a_measured_result_has_all_tables(tmp_path):
    def measure(case, say):
        calls = {name: peers.build(name, case.neighborhood) for name in ("torch", "reference")}
        return operation.measure(case, say, device=CPU, samples=3, calls=calls, cache=CACHE)

    cases = [Case((1, 4, 1, 4), window, 3) for window in (1, 2)]
    result = measure_all("operation", cases, measure, "cpu", {"ours": "torch"}, tmp_path / "operation-cpu.json")
    assert [m.case for m in operation.measured(result)] == cases
    assert all("| 1, 4, 1, 4 | 2 | float32 |" in operation.TABLES[name](result) for name in ("", "all"))
    assert operation.draw(result).axes


def test_figures_follow_from_the_samples(tmp_path):
    (m,) = operation.measured(operation_result(tmp_path, "cpu", CPU_TIMES, memory=1.25))
    assert m.median("ours", "both") == 2000
    assert m.speedup("compiled", "both") == pytest.approx(2.3)
    assert m.speedup("convolution", "both") is None
    assert m.share_of_copy("forward") == pytest.approx(0.05)
    assert m.bandwidth("ours", "backward") == pytest.approx(5 * BYTES / 2000e-6 / 1e9)
    assert m.memory("both", 2) == pytest.approx(1.25 * 6 / 2)


def test_tables_show_every_case_and_direction(tmp_path):
    result = operation_result(tmp_path, "cpu", CPU_TIMES, memory=1.25)
    full = operation.full_table(result)
    assert "| backward | 2 ms (1.2 to 6.8) | 0.467 | 5 % |  | 0.1 ms | 8 ms (4x) |" in full
    assert "| both | 2 ms (1.2 to 6.8) | 0.746 | 5 % | 1.33 MiB | 0.1 ms |" in full
    assert full.endswith("\n\nNot timed: `convolution`, 8x18x18x18 W18 K3 float32: it broke")
    narrow = operation_records("torch", CPU_TIMES, 1, replace(CASE, capsule_window=1))
    assert "8 ms" not in operation.summary_table(written(tmp_path, "operation", "cpu", narrow, ours="torch"))


def promised(result) -> dict[str, Target]:
    return {target.promise: target for target in operation.promises(result)}


def test_cpu_targets(tmp_path):
    found = promised(operation_result(tmp_path, "cpu", CPU_TIMES | {"convolution": 402000.0}, memory=2.01))
    assert [target.holds for target in found.values()] == [True, False, True, True, False]
    eager, compiled, slowest, convolution, memory = (target.measured for target in found.values())
    assert eager == "4x, geometric mean of 1 cases (4x to 4x)"
    assert compiled.startswith("2.3x, geometric mean")
    assert slowest == "4x at worst (8x18x18x18 W18 K3 float32), 4x median, 1 of 1 keep it"
    assert convolution.startswith("201x at worst")
    assert memory.startswith("4.02x at worst")


def test_geometric_means_leave_small_windows_out_but_the_worst_case_does_not(tmp_path):
    found = operation_records("torch", CPU_TIMES, memory=1)
    for window, time in ((5, 1900.0), (10, 2000.0)):
        case = replace(CASE, time_window=window)
        found += operation_records("torch", CPU_TIMES | {"reference": time}, memory=1, case=case)
    eager, _, slowest, *_ = promised(written(tmp_path, "operation", "cpu", found, ours="torch")).values()
    assert eager.measured == "2x, geometric mean of 2 cases (1x to 4x)"
    assert not eager.holds
    assert slowest.measured == "0.95x at worst (8x18x18x18 W5 K3 float32), 1x median, 2 of 3 keep it"
    assert not slowest.holds


def test_gpu_targets(tmp_path):
    replayed = {"empty": [1.0, 2.0, 3.0], "forward": [4.0, 4.0, 4.0], "both": [4.1, 4.1, 4.1]}
    latency = [
        Record(PAPER.fields, "graph replayed", replayed),
        Record(PAPER.fields, "host", {"forward": [30.0], "both": [60.1]}),
    ]
    case = replace(CASE, shape=(4096, 18, 18, 18))  # the paper's size is not among those of a GPU
    found = operation_records("triton", GPU_TIMES, memory=1.04 * 512, case=case)
    found = promised(written(tmp_path, "operation", "cuda", found + latency, ours="triton"))
    assert {promise: (target.measured.split(" at worst")[0], target.holds) for promise, target in found.items()} == {
        "forward: at least 90 % of the copy's bandwidth": ("90 %", True),
        "backward: at least 80 % of the copy's bandwidth": ("90 %", True),
        "forward + backward against the best compiled reference: at least 2x, W >= 5": ("2x", True),
        "forward + backward against the eager reference: at least 10x, W >= 5": ("10.1x", True),
        "peak memory: at most the floor's tensors and 5 %": ("1.04x", True),
        "paper's size, replay of a graph, forward: at most 2 us more than an empty kernel": ("2 us", True),
        "paper's size, replay of a graph, both: at most 2 us more than an empty kernel": ("2.1 us", False),
        "paper's size, host time of an eager call, forward: at most 30 us": ("30 us", True),
        "paper's size, host time of an eager call, both: at most 60 us": ("60.1 us", False),
    }
    worse = operation_records("triton", GPU_TIMES | {"triton": 11.5}, memory=1)
    worse[0].memory["both"] = int(1.06 * 6 * BYTES)
    found = promised(written(tmp_path, "operation", "cuda", worse, ours="triton"))
    assert [target.holds for target in found.values()] == [False, False, False, False, False, None, None, None, None]


@pytest.mark.gpu
def test_latency_has_every_sample():
    replayed, host = operation.measure_latency(torch.device("cuda"), samples=3)
    assert replayed.samples.keys() == {"empty", "forward", "both"}
    assert host.samples.keys() == {"forward", "both"}
    assert all(len(x) == 3 and min(x) > 0 for record in (replayed, host) for x in record.samples.values())
