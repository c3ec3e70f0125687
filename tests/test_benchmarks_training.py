"""The benchmark of training: variants take the same steps, and tables and targets follow from their stages."""

import math

import pytest
import torch
from benchmarked import training_records, written
from test_benchmarks_operation import Counter

from benchmarks import peers, training
from benchmarks.measuring import measure_all
from benchmarks.problems import WrongResultError
from benchmarks.variants import MNIST, SPRITES, VARIANTS, Convolution, Products, Trainer, Variant, check
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import TVAE
from tvae.training import untrained_model
from tvae_kernels import Neighborhood

CPU = torch.device("cpu")
CONFIG = Config(DataSettings(), TVAE.Settings(2, neighborhood=Neighborhood(10, 1)), TrainingSettings(batch_size=2))
CASE = training.Case(SPRITES, CONFIG)


def with_convolution(convolve) -> dict[str, Variant]:
    """Ours, the reference, and a layer with another convolution."""
    variants = {name: VARIANTS[name] for name in ("eager", "reference")}
    return variants | {"convolution": Variant(lambda layer: Convolution(layer, convolve))}


def test_every_variant_takes_the_same_step_with_its_own_layer():
    called = []
    variants = with_convolution(lambda *x: called.append(len(x)) or peers.convolution(*x))
    source = CONFIG.open_source("train")
    assert Trainer(variants["reference"], CONFIG, source).model.module.topographic.backend == "reference"
    found = training.measure(CASE, device=CPU, samples=3, variants=variants)
    assert len(called) == 2 + 1 + 1 + 3  # warm and checked; to see how long it takes; first of the block; sampled
    assert [record.variant for record in found] == ["eager", "reference", "convolution", "products"]
    *steps, products = found
    weights = sum(p.numel() for p in untrained_model(CONFIG, source).parameters())
    for record in steps:
        assert set(record.samples) == {"data", "forward", "backward", "optimiser"}
        assert 4 * weights <= record.memory["step"] < 3 * 4 * weights  # gradients are there at once
        assert record.values == {"frames": 30}
    assert set(products.samples) == {"products"}
    for record in found:
        assert record.case == {"preset": SPRITES, "batch_size": 2}
        assert all(len(x) == 3 and min(x) > 0 for x in record.samples.values())
    assert steps[0].error == 0
    assert 0 < steps[2].error <= 1


def test_a_variant_that_takes_another_step_is_refused_before_any_is_timed():
    called = []

    def wrong(z, u, mu, n):
        called.append(n)
        return peers.convolution(z, u + 1e-3 * u.detach(), mu, n)

    with pytest.raises(WrongResultError, match=r"convolution: .* is off by \d"):
        training.measure(CASE, device=CPU, samples=3, variants=with_convolution(wrong))
    assert len(called) == 2
    one = {"loss": torch.ones(())}
    with pytest.raises(WrongResultError, match="broken: loss is off by nan"):
        check("broken", {"loss": one["loss"] * math.nan}, one, bound=1.0)


def test_a_variant_that_cannot_run_is_named_and_ours_must():
    def broken(*_):
        raise RuntimeError("no such convolution\nand more")

    variants = with_convolution(broken)
    found = training.measure(CASE, device=CPU, samples=1, variants=variants)
    assert [record.variant for record in found if record.samples] == ["eager", "reference", "products"]
    assert found[-1].variant == "convolution"
    assert found[-1].not_measured == "RuntimeError: no such convolution"
    with pytest.raises(RuntimeError, match="no such convolution"):
        training.measure(CASE, device=CPU, samples=1, variants={"convolution": variants["convolution"]})


def test_other_layers_take_over_the_parameters_of_the_one_they_replace():
    source = CONFIG.open_source("train")
    model = untrained_model(CONFIG, source)
    names = [name for name, _ in model.named_parameters()]
    for name in ("given noise", "convolution"):
        mu = model.topographic.mu
        model.topographic = VARIANTS[name].layer(model.topographic)
        assert model.topographic.mu is mu
        assert [name for name, _ in model.named_parameters()] == names


def test_stages_are_timed_from_the_end_of_the_one_before():
    trainer = Trainer(VARIANTS["eager"], CONFIG, CONFIG.open_source("train"))
    first, second = trainer(Counter(), 2)
    assert first == {"data": 3, "forward": 5, "backward": 7, "optimiser": 9}
    assert second == {"data": 11, "forward": 13, "backward": 15, "optimiser": 17}
    assert trainer.next == 2


def test_products_are_those_of_all_layers_there_and_back():
    products = Products(CONFIG, CONFIG.open_source("train"))
    n, pixels, frames = 2 * 15, 64 * 64, 2 * 15
    into = [(pixels, 3 * n), (3 * n, 2 * n), (2 * n, 2 * n)]
    out = [(n, 2 * n), (2 * n, 3 * n), (3 * n, pixels)]
    multiplications = frames * (
        3 * sum(a * b for a, b in into * 2 + out) - 2 * pixels * 3 * n
    )  # images need no gradient
    assert sum(a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in products.operands) == multiplications
    assert products(Counter(), 2) == [{"products": 3}, {"products": 5}]


def test_training_steps_are_reported_with_rates_and_shares(tmp_path):
    found = training_records(MNIST, 8, {"eager": 80.0, "compiled": 50.0, "reference": 100.0}, products=40.0)
    result = written(tmp_path, "training", "cpu", found)
    text = training.table(result)
    # 600,000 steps of 50 ms are 30,000 s.
    row = f"| `{MNIST}` | 8 | ours, compiled | 50 ms (50 ms to 50 ms) | 20 | 80 % | 8.33 hours |"
    assert row in text
    assert text.endswith(f"\n\nNot timed: convolution layer, eager, `{MNIST}`, batch 8: it broke")
    row = f"| `{MNIST}` | 8 | ours, eager | 8 ms | 24 ms | 40 ms | 8 ms |  | 1,800 | 1 MiB |"
    assert row in training.stages_table(result)
    targets = training.targets_table(result)
    assert "at most 60 ms a step (published code: 237 ms) | 50 ms, compiled | yes |" in targets
    assert "at most 75 ms a step (published code: 420 ms) | not measured | - |" in targets
    (axis,) = training.draw(result).axes
    assert [text.get_text() for text in axis.texts] == [" 100 ms", " 50 ms", " 80 ms"]


def test_training_targets_of_a_gpu(tmp_path):
    found = training_records(MNIST, 8, {"eager": 3.0}, products=0.1, replayed=0.4)
    found += training_records(MNIST, 128, {"eager": 3.0}, products=0.5, replayed=0.8)
    found += training_records(SPRITES, 128, {"eager": 3.0}, products=0.5, replayed=1.0)
    judged = training.promises(written(tmp_path, "training", "cuda", found))
    expected = [("2,500 steps/s", True), ("4 minutes", True), ("62 %", True), ("50 %", False)]
    assert [(target.measured, target.holds) for target in judged] == expected
    nothing = training.promises(written(tmp_path, "training", "cuda", []))
    assert [target.holds for target in nothing] == [None] * 4


def test_a_measured_result_has_all_tables(tmp_path):
    def measure(case, say):
        return training.measure(case, say, device=CPU, samples=2, variants={"eager": VARIANTS["eager"]})

    result = measure_all("training", [CASE], measure, "cpu", {}, tmp_path / "training-cpu.json")
    assert len(result.records[0].samples["forward"]) == 2
    for make in training.TABLES.values():
        assert make(result)
    assert "published code" in training.TABLES["targets"](result)


def test_training_cases_are_the_paper_s_sizes_and_sixteen_times_their_batch(tmp_path):
    found = [
        (case.preset, case.config.training.batch_size, case.config.data.folder) for case in training.cases(tmp_path)
    ]
    assert found == [(name, batch, tmp_path) for name in (MNIST, SPRITES) for batch in (8, 128)]
    assert [case.preset for case in training.cases(None)] == [SPRITES] * 2
    assert [case.name for case in training.cases(None)] == [f"{SPRITES}, batch {batch}" for batch in (8, 128)]
