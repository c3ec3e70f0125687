"""The benchmark of models: steps of all of them, and potentials in closed form beside automatic differentiation."""

from dataclasses import replace

import pytest
import torch
from benchmarked import written

from benchmarks import models
from benchmarks.problems import WrongResultError
from benchmarks.records import Record
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import VAE, BetaVAE
from tvae.presets import PRESETS, Preset

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Small models of sprites as presets."""
    for kind in (VAE, BetaVAE):
        config = Config(DataSettings(), kind.Settings(2, 3), TrainingSettings(batch_size=2, steps=2))
        monkeypatch.setitem(PRESETS, f"sprites-{kind.name}", Preset(config, kind.name))


def test_a_step_of_every_model_is_timed_by_its_stages(small):
    case = models.Models("sprites", None)
    found = models.measure_models(case, device=CPU, samples=2, models=("vae", "betavae"))
    assert [record.variant for record in found] == ["vae", "betavae"]
    for record in found:
        assert record.case == {"data": "sprites"}
        assert set(record.samples) == {"data", "forward", "backward", "optimiser"}
        assert all(len(x) == 2 for x in record.samples.values())
        assert record.values == {"parameters": found[0].values["parameters"]}
        assert record.memory["step"] > 4 * record.values["parameters"]


def test_a_model_that_is_not_finite_is_refused_before_any_is_timed(small, monkeypatch):
    preset = PRESETS["sprites-betavae"]
    model = replace(preset.config.model, beta=1e38)
    monkeypatch.setitem(PRESETS, "sprites-betavae", Preset(replace(preset.config, model=model), ""))
    with pytest.raises(WrongResultError, match=r"betavae: .*loss.* is not finite"):
        models.measure_models(models.Models("sprites", None), device=CPU, samples=2, models=("vae", "betavae"))


@pytest.mark.parametrize("equation", models.RESIDUALS)
def test_closed_forms_are_what_automatic_differentiation_gives(equation):
    case = models.Equation(equation)
    found = models.measure_potentials(case, device=CPU, samples=2, size=6, hidden=5)
    assert [record.variant for record in found] == ["closed form", "autograd"]
    assert all(0 <= record.error <= 1 for record in found)
    right = models.RESIDUALS[equation]["closed form"]

    def wrong(potentials, z, time):
        gradient, residual = right(potentials, z, time)
        return 1.001 * gradient, residual

    derivations = {"right": right, "wrong": wrong}
    with pytest.raises(WrongResultError, match=r"wrong: .* is off by \d"):
        models.measure_potentials(case, device=CPU, samples=2, size=6, hidden=5, derivations=derivations)


def test_cases_are_the_data_at_hand_and_both_equations(tmp_path):
    names = ["models of rooms", "potentials, Hamilton-Jacobi equation", "potentials, wave equation"]
    assert [case.name for case in models.cases(None)] == names
    assert [case.name for case in models.cases(tmp_path)] == ["models of mnist-open", *names]


def test_tables_show_ratios_and_promises(tmp_path):
    stages = {"data": [1e3], "forward": [3e3], "backward": [5e3], "optimiser": [1e3]}
    found = [
        Record(
            {"data": "rooms"}, name, {k: [scale * x[0]] * 3 for k, x in stages.items()}, {"step": 2**20}, None, values
        )
        for name, scale, values in (("vae", 1, {"parameters": 2e6}), ("flowvae", 1.5, {"parameters": 3e6}))
    ]
    for equation, ratio in (("Hamilton-Jacobi", 2), ("wave", 50)):
        case = {"equation": equation}
        found += [Record(case, "closed form", {"step": [1e3]}), Record(case, "autograd", {"step": [ratio * 1e3]})]
    result = written(tmp_path, "models", "cpu", found)
    row = "| rooms | flowvae | 15 ms (15 ms to 15 ms) | 1.50x | 4.5 ms | 7.5 ms | 1 MiB | 3.00 million |"
    assert row in models.table(result)
    assert "| wave | 1 ms | 50 ms | 50.0x |" in models.potentials_table(result)
    text = models.targets_table(result)
    assert "| Hamilton-Jacobi equation: closed forms at least 3 times as fast" in text
    assert "| 2.0x | **no** |" in text
    assert "| 50.0x | yes |" in text
