"""The benchmarks: peers compute what they are compared with, and reports say what was measured."""

import json
import math
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from numerics import Problem as Numerics
from numerics import assert_within

from benchmarks import (
    __main__,
    agreement,
    devices,
    environment,
    operation,
    overhead,
    peers,
    report,
    results,
    targets,
    topographies,
    training,
)
from benchmarks.operation import Case, Copies, Judge, Problem, WrongResultError
from tvae.presets import PRESETS, Config
from tvae_kernels import Neighborhood, latents

CPU = torch.device("cpu")
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
    judge = Judge.of(problem, case.neighborhood)
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


def test_overhead_launches_nothing_and_puts_everything_back(monkeypatch):
    kernels = pytest.importorskip("tvae_kernels.kernels", exc_type=ImportError)
    launch, interpreted = kernels._launch, kernels.interpreted
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(kernels, "whole_forward_kernel", None)  # a launch would fail
    taken = overhead.measure(samples=3)
    assert [len(x) for x in taken.values()] == [3] * 6
    assert all(x >= 0 for samples in taken.values() for x in samples)
    assert (kernels._launch, kernels.interpreted) == (launch, interpreted)


def small_topographies():
    """Those of all presets, with one sequence and two capsules."""
    for topography in islice(topographies.topographies("cpu"), len(topographies.NAMES)):
        _, *steps, capsules, dim = topography.shape
        n = topography.neighborhood
        speeds = n.speeds and n.speeds[:: capsules - 1]
        yield replace(topography, neighborhood=replace(n, speeds=speeds), shape=(1, *steps, 2, dim))


def test_every_topography_is_checked_and_timed_beside_its_reference(monkeypatch, small_cache):
    for topography in small_topographies():
        data = topographies.measure(topography, CPU, samples=2)
        assert data["samples"].keys() == data["error"].keys() == {"torch", "reference"}
        assert all(len(x) >= 2 for times in data["samples"].values() for x in times.values())
        problem = topography.problem(CPU, seed=0)
        call = topography.peer("reference", CPU)
        monkeypatch.setitem(
            peers.FUNCTIONS, "wrong", lambda z, u, mu, n, *w, call=call, **_: call(z, u + 1e-3 * u.detach(), mu, *w)
        )
        with pytest.raises(WrongResultError, match=f"wrong: t of {topography.name}"):
            topographies.check(topography, "wrong", problem)


def test_a_layer_that_is_told_its_axes_is_timed_with_both():
    (told,) = (x for x in small_topographies() if x.told)
    told = replace(told, shape=(2, *told.shape[1:]))
    z, u, mu = told.problem(CPU, seed=0).inputs.values()
    both = [peers.build("reference", told.neighborhood.along(axis))(z, u, mu)[axis] for axis in (0, 1)]
    torch.testing.assert_close(told.peer("torch", CPU)(z, u, mu), torch.stack(both))


def test_topographies_are_reported_by_machine(tmp_path):
    case = {"preset": "plain", "shape": [1, 2, 3, 4], "error": {}}
    case["samples"] = {
        "torch": {"forward": [1e3, 3e3, 2e3], "backward": [1], "both": [4e3]},
        "reference": {"forward": [5e3], "backward": [1], "both": [6e3]},
    }
    content = {"environment": environment.describe(), "unit": "us", "ours": "torch", "cases": [case]}
    results.write(tmp_path / "topographies-cpu.json", content)
    text = report.all_machines("topographies", tmp_path, tmp_path)
    assert "| `plain` | 1, 2, 3, 4 | 2 ms | 5 ms (2.5x) | 4 ms | 6 ms (1.5x) |" in text
    assert text.endswith(report.NOT_MEASURED)


@pytest.fixture
def small_cache(monkeypatch):
    monkeypatch.setattr(devices, "cache_bytes", lambda _: 2**10)


def test_measure_refuses_a_wrong_peer_before_it_times_any(monkeypatch, small_cache):
    monkeypatch.setattr(peers, "NAMES", {"cpu": ("torch", "reference")})
    monkeypatch.setitem(peers.FUNCTIONS, "reference", lambda z, u, mu, _: z / (u.abs() + 1) + mu)
    monkeypatch.setattr(operation, "sample", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResultError, match="reference: t is off"):
        operation.measure(Case((1, 4, 1, 4), 2, 1), CPU, samples=1)


def test_measure_keeps_every_sample_and_says_which_peer_could_not_run(monkeypatch, small_cache):
    def broken(z, u, mu, _):
        raise RuntimeError("no such convolution\nand more")

    monkeypatch.setattr(peers, "NAMES", {"cpu": ("torch", "reference", "convolution")})
    monkeypatch.setattr(operation, "CONVOLVED_WINDOW", 2)
    monkeypatch.setitem(peers.FUNCTIONS, "convolution", broken)
    case = Case((1, 4, 1, 4), 2, 1)
    data = operation.measure(case, CPU, samples=4)
    assert data["samples"].keys() == {"torch", "reference", "copy"}
    for samples in data["samples"].values():
        assert {direction: len(x) for direction, x in samples.items()} == {"forward": 4, "backward": 4, "both": 4}
        assert all(x > 0 for times in samples.values() for x in times)
    assert data["not_timed"] == {"convolution": "RuntimeError: no such convolution"}
    assert data["error"].keys() == data["memory"].keys() == {"torch", "reference"}

    monkeypatch.setitem(peers.FUNCTIONS, "torch", broken)  # ours may not be left out
    with pytest.raises(RuntimeError, match="no such convolution"):
        operation.measure(case, CPU, samples=1)


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
    case = Case((1, 4, 1, 4), 2, 1)
    problems = [Problem.random(case, CPU, seed) for seed in range(2)]
    times = operation.sample(peers.build("torch", case.neighborhood), problems, Counter(), turn=0)
    assert times == {"forward": [3], "backward": [9], "both": [16]}
    assert Copies(case, CPU, 1).sample(Counter(), 0) == {"forward": [3], "backward": [7], "both": [11]}


def test_copies_move_the_bytes_of_the_floor(monkeypatch):
    case = Case((2, 3, 5, 7), 1, 1, "bfloat16")
    moved = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b: (moved.append(a.nbytes + b.nbytes), copy(a, b))[1])
    Copies(case, CPU, 2).sample(devices.CpuClock(), 0)
    elements = 2 * 3 * 5 * 7
    assert moved == pytest.approx([3 * 2 * elements, 5 * 2 * elements, 8 * 2 * elements], abs=8)


def test_peak_memory_is_what_is_held_at_once():
    def run():
        a = torch.ones(1000)
        b = a + 1  # 8,000 bytes
        del a
        return b + 1  # and again

    assert 8000 <= devices.peak_memory(CPU, run) < 8100  # the numbers 1 become tensors, too


def test_rotation_outgrows_the_cache(small_cache):
    assert devices.rotation(CPU, 100) * 100 >= 2 * 2**10
    assert devices.rotation(CPU, 2**20) == 2


def test_cases_fit_their_axes_and_have_distinct_names():
    for device_type, count in (("cpu", 32), ("cuda", 84)):
        cases = operation.cases(device_type)
        for case in cases:
            case.neighborhood.check_fits(time=case.shape[1], dim=case.shape[3])
        assert len({case.name for case in cases}) == len(cases) == count
    assert operation.PAPER in operation.cases("cpu")


CASE = {"shape": [8, 18, 18, 18], "time_window": 18, "capsule_window": 3, "dtype": "float32"}
BYTES = 8 * 18**3 * 4


def content(ours: str, device: str, times: dict[str, float], memory: float) -> dict:
    """A result with one case, where every peer's samples are around its time in microseconds."""
    samples = {peer: {way: [0.5 * x, x, 4 * x] for way in operation.FLOOR} for peer, x in times.items()}
    kept = {ours: {"forward": int(memory * 3 * BYTES), "both": int(memory * 6 * BYTES)}}
    environment = {"cpu": "a CPU", "threads": 2, "gpu": "NVIDIA Tiny", "driver": "1", "cuda": "13", "torch": "2"}
    environment |= {"triton": "3", "python": "3.11", "commit": "abc", "date": "2026-01-02T03:04:05+00:00"}
    case = CASE | {"samples": samples, "memory": kept, "error": {}, "not_timed": {"convolution": "it broke"}}
    return {"environment": environment, "device": device, "unit": "us", "ours": ours, "cases": [case]}


CPU_TIMES = {
    "torch": 2000.0,
    "torch compiled": 1000.0,
    "reference": 8000.0,
    "reference compiled": 4600.0,
    "copy": 100.0,
}
GPU_TIMES = {
    "triton": 10.0,
    "reference": 101.0,
    "reference compiled": 30.0,
    "reference max-autotune": 20.0,
    "copy": 9.0,
}


@pytest.fixture
def folder(tmp_path):
    results.write(tmp_path / "operation-cpu.json", content("torch", "cpu", CPU_TIMES, memory=1.25))
    return tmp_path


def test_written_results_are_compact_json(tmp_path):
    data = content("torch", "cpu", {"torch": 1234.5678, "copy": 0.00123456}, memory=1)
    file = tmp_path / "new" / "operation-cpu.json"
    results.write(file, data)
    written = json.loads(file.read_text())
    assert written["cases"][0]["samples"]["torch"]["forward"] == [617.3, 1235.0, 4938.0]
    assert written["cases"][0]["samples"]["copy"]["both"] == [0.0006173, 0.001235, 0.004938]
    assert written["environment"] == data["environment"]
    assert '    "torch": {"forward": [617.3, 1235.0, 4938.0], "backward"' in file.read_text()


def test_figures_follow_from_the_samples(folder):
    (result,) = report.load(folder)
    (m,) = result.measured
    assert m.median("ours", "both") == 2000
    assert m.quantiles("ours", "both") == pytest.approx((1200, 6800))  # a tenth of the way from 1000 to 2000, ...
    assert m.speedup("compiled", "both") == pytest.approx(2.3)
    assert m.speedup("convolution", "both") is None
    assert m.of_copy("forward") == pytest.approx(0.05)
    assert m.bandwidth("ours", "backward") == pytest.approx(5 * BYTES / 2000e-6 / 1e9)
    assert m.memory("both", 2) == pytest.approx(1.25 * 6 / 2)


def test_report_fills_the_blocks_and_leaves_the_rest(folder):
    page = (
        "# Before\n\n<!-- benchmark: operation-cpu -->\nold\n<!-- end -->\n\nbetween\n\n"
        "<!-- benchmark: operation-gpu -->\n<!-- end -->\nafter\n"
    )
    expected = """# Before

<!-- benchmark: operation-cpu -->

Measured on a CPU, 2 threads; torch 2, triton 3, Python 3.11; commit abc, 2026-01-02.

| shape (B, S, C, D) | W | type | ours, `torch` | of the copy's bandwidth | eager reference | compiled reference | `torch`, compiled | convolution |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 8, 18, 18, 18 | 18 | float32 | 2 ms (1.2 to 6.8) | 5 % | 8 ms (4x) | 4.6 ms (2.3x) | 1 ms (0.5x) | - |

<!-- end -->

between

<!-- benchmark: operation-gpu -->

Not measured on a GPU.

<!-- end -->
after
"""  # noqa: E501 - a table's row
    filled = report.fill(page, report.load(folder))
    assert filled == expected
    assert report.fill(filled, report.load(folder)) == expected


def test_every_block_renders_and_an_unknown_one_is_refused(folder):
    loaded = report.load(folder)
    full = report.render("operation-cpu-all", loaded)
    assert "| backward | 2 ms (1.2 to 6.8) | 0.467 | 5 % |  | 0.1 ms | 8 ms (4x) |" in full
    assert "| both | 2 ms (1.2 to 6.8) | 0.746 | 5 % | 1.33 MiB | 0.1 ms |" in full
    assert full.endswith("\n\nNot timed: `convolution`, 8x18x18x18 W18 K3 float32: it broke")
    assert "](../docs/roofline-cpu.png)" in report.render("operation-cpu-figure", loaded, report.ROOT / "tests")
    assert report.render("operation-gpu-targets", loaded) == "Not measured on a GPU."
    for name in ("operation-tpu", "speed-cpu", "operation-cpu-best"):
        with pytest.raises(ValueError, match=f"no benchmark '{name}'.*operation-cpu-targets"):
            report.render(name, loaded)


def test_update_writes_documents_and_figures(folder, monkeypatch):
    monkeypatch.setattr(report, "ROOT", folder)
    (folder / "page.md").write_text("<!-- benchmark: operation-cpu-targets -->\n<!-- end -->\n")
    figure = folder / "docs" / "roofline-cpu.png"
    assert report.update(folder, (folder / "page.md", folder / "missing.md")) == [figure, folder / "page.md"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "| target | measured | holds |" in (folder / "page.md").read_text()


def evaluated(tmp_path, data: dict) -> dict[str, targets.Target]:
    file = tmp_path / "operation-tiny.json"
    file.write_text(json.dumps(data))
    return {target.promise: target for target in targets.evaluate(results.Result.read(file))}


def test_cpu_targets(tmp_path):
    found = evaluated(tmp_path, content("torch", "cpu", CPU_TIMES | {"convolution": 402000.0}, memory=2.01))
    assert [target.holds for target in found.values()] == [True, False, True, True, False]
    eager, compiled, slowest, convolution, memory = (target.measured for target in found.values())
    assert eager == "4x, geometric mean of 1 cases (4x to 4x)"
    assert compiled.startswith("2.3x, geometric mean")
    assert slowest == "4x at worst (8x18x18x18 W18 K3 float32), 4x median, 1 of 1 keep it"
    assert convolution.startswith("201x at worst")
    assert memory.startswith("4.02x at worst")


def test_geometric_means_leave_small_windows_out_but_the_worst_case_does_not(tmp_path):
    data = content("torch", "cpu", CPU_TIMES, memory=1)
    narrow = content("torch", "cpu", CPU_TIMES | {"reference": 1900.0}, memory=1)["cases"][0] | {"time_window": 5}
    wide = content("torch", "cpu", CPU_TIMES | {"reference": 2000.0}, memory=1)["cases"][0] | {"time_window": 10}
    data["cases"] += [narrow, wide]
    eager, _, slowest, *_ = evaluated(tmp_path, data).values()
    assert eager.measured == "2x, geometric mean of 2 cases (1x to 4x)"
    assert not eager.holds
    assert slowest.measured == "0.95x at worst (8x18x18x18 W5 K3 float32), 1x median, 2 of 3 keep it"
    assert not slowest.holds


def test_gpu_targets(tmp_path):
    data = content("triton", "cuda", GPU_TIMES, memory=1.04)
    latency = {"empty": [1.0, 2.0, 3.0], "forward": [4.0, 4.0, 4.0], "both": [4.1, 4.1, 4.1]}
    data["latency"] = latency | {"host forward": [30.0], "host both": [60.1]}
    found = evaluated(tmp_path, data)
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
    worse = content("triton", "cuda", GPU_TIMES | {"triton": 11.5}, memory=1)
    worse["cases"][0]["memory"]["triton"]["both"] = int(1.06 * 6 * BYTES)
    found = evaluated(tmp_path, worse)
    assert [target.holds for target in found.values()] == [False, False, False, False, False, None, None, None, None]


def test_the_suite_is_not_part_of_the_default_run(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]


def test_one_command_measures_the_cases_asked_for_and_resumes(monkeypatch, small_cache, tmp_path, capsys):
    cases = [Case((1, 4, 1, 4), window, 3) for window in (1, 2, 3)]
    monkeypatch.setattr(operation, "cases", lambda _: cases)
    monkeypatch.setattr(peers, "NAMES", {"cpu": ("torch", "reference"), "cuda": ("torch", "reference")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "operation-cpu.json"
    __main__.run_operation(samples=3, match="W[12] ", output=file)
    first = json.loads(file.read_text())
    assert [data["time_window"] for data in first["cases"]] == [1, 2]
    assert "never slower" in capsys.readouterr().out
    __main__.run_operation(samples=3, output=file, resume=True)
    second = json.loads(file.read_text())
    assert second["cases"][:2] == first["cases"]
    assert [data["time_window"] for data in second["cases"]] == [1, 2, 3]
    second["environment"]["torch"] = "another"
    file.write_text(json.dumps(second))
    with pytest.raises(SystemExit, match="cannot resume: torch changed"):
        __main__.run_operation(samples=3, output=file, resume=True)
    with pytest.raises(SystemExit, match="no case matches 'W99'"):
        __main__.run_operation(match="W99", output=file)


@pytest.mark.gpu
def test_latency_has_every_sample():
    times = operation.measure_latency(torch.device("cuda"), samples=3)
    assert times.keys() == {"empty", "forward", "both", "host forward", "host both"}
    assert all(len(x) == 3 and min(x) > 0 for x in times.values())


TRAINED = Config(capsules=2, neighborhood=Neighborhood(10, 1), batch_size=2)


@pytest.fixture
def small_training(monkeypatch):
    monkeypatch.setitem(training.VARIANTS, "cpu", ("eager", "reference", "convolution"))
    monkeypatch.setattr(training, "ROUND", 2)
    return TRAINED


def test_every_variant_takes_the_same_step_with_its_own_layer(small_training, monkeypatch):
    called = []
    convolution = peers.convolution
    monkeypatch.setattr(peers, "convolution", lambda *x: called.append(len(x)) or convolution(*x))
    source = small_training.open_source("train")
    assert training.Variant("reference", small_training, source).model.module.topographic.backend == "reference"
    data = training.measure("sprites-tvae-w10-k1", small_training, CPU, samples=3)
    assert len(called) == 2 + 1 + 2 + 3  # warm and checked; to see how long it takes; first of two rounds; sampled
    stages = {"data", "forward", "backward", "optimiser"}
    assert {name: set(times) for name, times in data["samples"].items()} == {
        "eager": stages,
        "reference": stages,
        "convolution": stages,
        "products": {"products"},
    }
    assert all(len(x) == 3 and min(x) > 0 for times in data["samples"].values() for x in times.values())
    assert data["error"]["eager"] == 0
    assert 0 < data["error"]["convolution"] <= 1
    weights = sum(p.numel() for p in training.untrained_model(small_training, source).parameters())
    assert all(4 * weights <= peak < 3 * 4 * weights for peak in data["memory"].values())  # gradients are there at once
    assert (data["preset"], data["batch_size"], data["frames"], data["not_timed"]) == ("sprites-tvae-w10-k1", 2, 30, {})


def test_a_variant_that_takes_another_step_is_refused_before_any_is_timed(small_training, monkeypatch):
    right = peers.convolution
    monkeypatch.setattr(peers, "convolution", lambda z, u, mu, n: right(z, u + 1e-3 * u.detach(), mu, n))
    monkeypatch.setattr(training, "in_turn", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResultError, match=r"convolution: .* of sprites is off by \d"):
        training.measure("sprites-tvae-w10-k1", small_training, CPU, samples=3)
    one = {"loss": torch.ones(())}
    with pytest.raises(WrongResultError, match="off by nan"):
        training.check("broken", {"loss": one["loss"] * math.nan}, one, TRAINED, bound=1.0)


def test_a_variant_that_cannot_run_is_named_and_ours_must(small_training, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such convolution\nand more")

    monkeypatch.setattr(peers, "convolution", broken)
    data = training.measure("sprites-tvae-w10-k1", small_training, CPU, samples=1)
    assert data["not_timed"] == {"convolution": "RuntimeError: no such convolution"}
    assert data["samples"].keys() == {"eager", "reference", "products"}
    monkeypatch.setitem(training.VARIANTS, "cpu", ("convolution", "eager"))
    with pytest.raises(RuntimeError, match="no such convolution"):
        training.measure("sprites-tvae-w10-k1", small_training, CPU, samples=1)


def test_stages_are_timed_from_the_end_of_the_one_before():
    variant = training.Variant("eager", TRAINED, TRAINED.open_source("train"))
    first, second = variant(Counter(), 2)
    assert first == {"data": 3, "forward": 5, "backward": 7, "optimiser": 9}
    assert second == {"data": 11, "forward": 13, "backward": 15, "optimiser": 17}
    assert variant.next == 2


def test_products_are_those_of_all_layers_there_and_back():
    source = TRAINED.open_source("train")
    model = training.untrained_model(TRAINED, source)
    products = training.Products(model, torch.zeros(2, 15, 1, 64, 64))
    n, pixels, frames = 2 * 15, 64 * 64, 2 * 15
    into = [(pixels, 3 * n), (3 * n, 2 * n), (2 * n, 2 * n)]
    out = [(n, 2 * n), (2 * n, 3 * n), (3 * n, pixels)]
    multiplications = frames * (
        3 * sum(a * b for a, b in into * 2 + out) - 2 * pixels * 3 * n
    )  # images need no gradient
    assert sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in products.operands) == multiplications
    assert products(Counter(), 2) == [{"products": 3}, {"products": 5}]


def test_slow_variants_are_sampled_less_and_the_first_step_of_a_round_never(monkeypatch):
    monkeypatch.setattr(training, "PATIENCE", 40)
    calls = {"fast": [], "slow": []}

    def fake(name, time):
        def call(clock, count):
            calls[name].append(count)
            return [{"data": time + i} for i in range(count)]

        return call

    taken = training.in_turn({"fast": fake("fast", 1), "slow": fake("slow", 10)}, None, 12, lambda _: None)
    assert calls == {"fast": [1, 6, 6, 3], "slow": [1, 5]}
    assert taken["slow"]["data"] == [11, 12, 13, 14]
    assert len(taken["fast"]["data"]) == 12
    assert min(taken["fast"]["data"]) == 2


def trained(preset, batch, times, products, replayed=None):
    """A case whose steps take so many milliseconds, a tenth of them for data."""
    samples = {
        name: {
            "data": [100.0 * t] * 3,
            "forward": [300.0 * t] * 3,
            "backward": [500.0 * t] * 3,
            "optimiser": [100.0 * t] * 3,
        }
        for name, t in times.items()
    }
    if replayed is not None:
        samples["graph"] = {"data": [0.0], "replay": [1e3 * replayed]}
    return {
        "preset": preset,
        "batch_size": batch,
        "frames": 18 * batch,
        "samples": samples | {"products": {"products": [1e3 * products]}},
        "memory": dict.fromkeys(samples, 2**20),
        "error": {},
        "not_timed": {"convolution": "it broke"},
    }


def written_training(folder, name, device, cases):
    file = folder / f"training-{name}.json"
    described = environment.describe() | {"gpu": "Tiny"}
    results.write(file, {"environment": described, "device": device, "unit": "us", "cases": cases})
    return file


def test_training_steps_are_reported_with_rates_and_shares(tmp_path):
    cases = [trained("mnist-tvae-w18-k3", 8, {"eager": 80.0, "compiled": 50.0, "reference": 100.0}, products=40.0)]
    file = written_training(tmp_path, "cpu", "cpu", cases)
    text = report.training_table(file)
    # 600,000 steps of 50 ms are 30,000 s.
    row = "| `mnist-tvae-w18-k3` | 8 | ours, compiled | 50 ms (50 ms to 50 ms) | 20 | 80 % | 8.33 hours |"
    assert row in text
    assert text.endswith("\n\nNot timed: convolution layer, eager, `mnist-tvae-w18-k3`, batch 8: it broke")
    row = "| `mnist-tvae-w18-k3` | 8 | ours, eager | 8 ms | 24 ms | 40 ms | 8 ms |  | 1,800 | 1 MiB |"
    assert row in report.training_stages(file)
    targets = report.training_targets(file)
    assert "at most 60 ms a step (published code: 237 ms) | 50 ms, compiled | yes |" in targets
    assert "at most 75 ms a step (published code: 420 ms) | not measured | - |" in targets
    assert "](../docs/training-cpu.png)" in report.training_link(file, report.ROOT / "tests")
    assert report.training_figure(file, tmp_path / "new.png").read_bytes().startswith(b"\x89PNG")


def test_training_targets_of_a_gpu(tmp_path):
    mnist, sprites = "mnist-tvae-w18-k3", "sprites-tvae-w10-k1"
    cases = [
        trained(mnist, 8, {"eager": 3.0}, products=0.1, replayed=0.4),
        trained(mnist, 128, {"eager": 3.0}, products=0.5, replayed=0.8),
        trained(sprites, 128, {"eager": 3.0}, products=0.5, replayed=1.0),
    ]
    content = {"cases": [results.Steps(case) for case in cases]}
    found = [(target.measured, target.holds) for target in targets.training(content["cases"], on_gpu=True)]
    assert found == [("2,500 steps/s", True), ("4 minutes", True), ("62 %", True), ("50 %", False)]
    assert [target.holds for target in targets.training([], on_gpu=True)] == [None] * 4


def test_training_blocks_say_what_was_not_measured(tmp_path, monkeypatch):
    for name in report.MACHINES:
        assert report.all_machines(name, tmp_path, tmp_path) == "Not measured.\n\nNot measured on a GPU."
    cases = [trained("sprites-tvae-w10-k1", 8, {"eager": 80.0}, products=40.0)]
    written_training(tmp_path, "cpu", "cpu", cases)
    text = report.all_machines("training", tmp_path, tmp_path)
    assert "ours, eager" in text
    assert text.endswith("\n\nNot measured on a GPU.")
    written_training(tmp_path, "tiny", "cuda", cases)
    text = report.all_machines("training", tmp_path, tmp_path)
    assert "Measured on Tiny;" in text
    assert "Not measured" not in text
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert set(report.update(tmp_path, ())) == {tmp_path / "docs" / f"training-{name}.png" for name in ("cpu", "tiny")}


def test_one_command_measures_training(small_training, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "cases", lambda data_dir: [("sprites-tvae-w10-k1", small_training)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "training-cpu.json"
    __main__.run_training(samples=2, output=file)
    (case,) = json.loads(file.read_text())["cases"]
    assert len(case["samples"]["reference"]["forward"]) == 2
    assert "published code" in capsys.readouterr().out


@pytest.mark.slow
def test_training_fused_and_in_other_precisions_is_compared_by_its_metrics(monkeypatch):
    data = agreement.measure("sprites-tvae-w10-k1", TRAINED, CPU, steps=3, sequences=24)
    assert (
        data["metrics"].keys()
        == data["difference"].keys()
        == {"unfused", "unfused, nudged", "fused", "fused, bf16-mixed"}
    )
    assert {"ELBO", "E_eq", "CapCorr scale"} < data["metrics"]["fused"].keys()
    assert data["difference"]["unfused"] == 0
    assert 0 < data["difference"]["unfused, nudged"] < 1e-5
    assert data["difference"]["fused"] < 1e-5 < data["difference"]["fused, bf16-mixed"] < 0.05
    right = latents.topographic

    def wrong(z, u, mu, neighborhood, weights, eps, backend, axis):
        return right(z, u if backend == "reference" else 1.001 * u, mu, neighborhood, weights, eps, backend, axis)

    monkeypatch.setattr(latents, "topographic", wrong)
    data = agreement.measure("sprites-tvae-w10-k1", TRAINED, CPU, steps=3, sequences=24)
    assert data["difference"]["fused"] > 1e-5


def test_presets_to_compare_are_those_with_a_topography_whose_data_is_there(tmp_path):
    assert not any(PRESETS[name].config.model == "vae" for name in agreement.configs(tmp_path))
    without = sum(preset.config.model == "vae" for preset in PRESETS.values())
    assert without + len(agreement.configs(tmp_path)) == len(PRESETS)
    assert all(config.data.startswith("sprites") for config in agreement.configs(None).values())
    assert [training.precision for training in agreement.trainings("quickstart", CPU)] == ["32-true"] * 3


@pytest.mark.slow
def test_one_command_compares_metrics_and_its_tables_show_them(monkeypatch, tmp_path, capsys):
    configs = {"quickstart": TRAINED, "sprites-tvae-w10-k1": TRAINED, "dsprites-vae": replace(TRAINED, data="dsprites")}
    configs["dsprites-vae"] = replace(configs["dsprites-vae"], data_dir=tmp_path)
    monkeypatch.setattr(agreement, "configs", lambda data_dir: configs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "agreement-cpu.json"
    __main__.run_agreement(steps=1, sequences=24, output=file)
    content = json.loads(file.read_text())
    assert [case["preset"] for case in content["cases"]] == ["quickstart", "sprites-tvae-w10-k1"]
    assert content["left_out"].keys() == {"dsprites-vae"}
    assert "Left out, for their data was not there" in capsys.readouterr().out
    metrics = {"ELBO": -1234.56, "E_eq": 567.89, "CapCorr x": 0.5, "CapCorr y": 1.0}
    other = {"ELBO": -1000.0, "CapCorr x": math.nan}
    cases = [
        {
            "preset": "a",
            "metrics": {"unfused": metrics, "fused": metrics},
            "difference": {"fused": 1.23e-6, "unfused, nudged": 0.5},
        },
        {
            "preset": "b",
            "metrics": {"unfused": other, "fused": other, "fused, tf32": metrics},
            "difference": {"fused": 0.0, "fused, tf32": 0.25, "unfused, nudged": 0.0},
        },
    ]
    results.write(file, content | {"cases": cases, "left_out": {}})
    assert "NaN" not in file.read_text()
    table = report.agreement_table(file)
    assert "1 steps of each training, evaluated on 24 sequences." in table
    assert "| `a` | -1235.0 | -1235.0 | 567.9 | 567.9 | 0.750 | 0.750 | 1.2e-06 | 0.5 |" in table
    assert "Left out" not in table
    table = report.precision_table(file)
    assert "`a`" not in table
    assert "| `b` | `32-true` | -1000.0 |  | nan | 0 |\n| `b` | `tf32` | -1235.0 | 567.9 | 0.750 | 0.25 |" in table


def test_training_cases_are_the_paper_s_sizes_and_sixteen_times_their_batch(tmp_path):
    found = [(name, config.batch_size, config.data_dir) for name, config in training.cases(tmp_path)]
    names = ("mnist-tvae-w18-k3", "sprites-tvae-w10-k1")
    assert found == [(name, batch, tmp_path) for name in names for batch in (8, 128)]
    assert [name for name, _ in training.cases(None)] == [names[1]] * 2
