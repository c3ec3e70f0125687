"""Configurations: that they survive the way through JSON, those of older runs too, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import TVAE, VAE
from tvae.presets import PRESETS
from tvae_kernels import Neighborhood

CONFIG = Config(DataSettings(), TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 3)))


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_the_way_through_json(name):
    config = PRESETS[name].config
    config = replace(config, data=replace(config.data, folder=Path("/some/where")))
    assert Config.from_json(config.to_json()) == config


def test_configurations_of_older_runs_are_read():
    # Where a field of older runs is now; and what they did before some could be chosen.
    added = {"weights": "free", "precision": "32-true", "told_axis": False}
    older = known = 0
    for file in (Path(__file__).parent.parent / "results").glob("*/config.json"):
        written, config = json.loads(file.read_text()), Config.from_json(file.read_text())
        if "training" in written:  # in the form of today
            assert config.to_json() == file.read_text()
            continue
        older += written.keys().isdisjoint(added)
        known += written.get("told_axis", False)
        written = {**added, **written}
        assert config.model_class.name == written["model"]
        assert (config.data.name, config.data.evaluation) == (written["data"], written.get("evaluation_data"))
        assert config.data.folder is None
        assert config.evaluation.sequences == written["evaluation_sequences"]
        assert config.evaluation.importance_samples == written["importance_samples"]
        for name in ("optimizer", "learning_rate", "momentum", "batch_size", "steps", "precision", "seed"):
            assert getattr(config.training, name) == written[name], name
        for name in ("capsules", "capsule_dim", "likelihood", "weights"):
            assert getattr(config.model, name) == written[name], name
        if written["model"] != "vae":
            for name in ("mu_init", "told_axis"):
                assert getattr(config.model, name) == written[name], name
            neighborhood = json.loads(json.dumps(asdict(config.model.neighborhood)))
            assert neighborhood == {**neighborhood, **written["neighborhood"]}
        assert Config.from_json(config.to_json()) == config
    assert older
    assert known


def test_a_model_is_evaluated_on_the_data_that_its_configuration_says(mnist_dir):
    config = PRESETS["mnist-tvae-w13-k3-generalisation"].config
    config = replace(config, data=replace(config.data, folder=mnist_dir))
    assert [config.open_source(split).name for split in ("train", "test")] == ["mnist", "mnist-rotation-hue"]
    with pytest.raises(ValueError, match=r"a model of mnist images.* cannot be evaluated on dsprites"):
        replace(config.data, evaluation="dsprites")


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="there is no setting neighborhood"):  # a VAE has no topography
        VAE.Settings(neighborhood=Neighborhood(3))
    with pytest.raises(ValueError, match=r"steps: .*greater than or equal to 1, got 0"):
        TrainingSettings(steps=0)
    with pytest.raises(ValueError, match=r"learning_rate: .*greater than 0, got -1"):
        TrainingSettings(learning_rate=-1)
    with pytest.raises(ValueError, match=r"momentum: .*less than 1, got 1"):
        TrainingSettings(momentum=1.0)
    with pytest.raises(ValueError, match=r"there is no setting .*rate"):
        TrainingSettings(rate=1)
    with pytest.raises(ValueError, match="told_axis needs a root for each axis, got Neighborhood"):
        replace(CONFIG.model, told_axis=True)
    axes = TVAE.Settings(2, 15, neighborhood=Neighborhood(4, 2, axes=(3, 5), roots="each axis"), told_axis=True)
    with pytest.raises(ValueError, match=r"needs an axis for each of scale, orientation, x, y, got \(3, 5\)"):
        replace(CONFIG, model=axes).open_source("train")
    with pytest.raises(ValueError, match="time_window of 16 does not fit 15"):
        replace(CONFIG, model=TVAE.Settings(2, 16, neighborhood=Neighborhood(16))).open_source("train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: 5, "not a configuration, but int"),
        (lambda values: {**values, "steps": 5}, "a configuration has the parts data, model, training and evaluation"),
        (lambda values: {**values, "data": 5}, "data must be an object, got 5"),
        (lambda values: {**values, "model": {"name": "x"}}, "no model 'x' is registered"),
        (lambda values: {**values, "training": {"seed": None}}, "training: seed: .* got None"),
        (lambda values: {**values, "training": {"steps": float("inf")}}, "training: steps: .* got inf"),
        (lambda values: {**values, "training": {"pace": 1}}, "training: there is no setting pace"),
    ],
)
def test_a_wrong_field_of_a_file_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(json.dumps(change(json.loads(CONFIG.to_json()))))
    with pytest.raises(ValueError, match="nested too deep"):
        Config.from_json("[" * 100_000)
