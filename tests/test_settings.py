"""What settings are made of: values that are accepted, converted or refused, each in one line, and where data is."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch

from tvae import config as config_module
from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings
from tvae.data import SOURCES, SequenceSource
from tvae.models import TVAE, VAE, BubbleVAE
from tvae.settings import settings
from tvae_kernels import Neighborhood


def test_numbers_of_numpy_are_numbers():
    model = TVAE.Settings(np.int64(3), np.int32(6), mu_init=np.float32(0.5), told_axis=np.bool_(False))
    assert model == TVAE.Settings(3, 6, mu_init=0.5)
    training = TrainingSettings(learning_rate=np.float64(0.25), steps=np.int64(4), seed=np.uint32(3))
    assert training == TrainingSettings(learning_rate=0.25, steps=4, seed=3)
    values = [model.capsules, model.capsule_dim, model.mu_init, training.learning_rate, training.steps, training.seed]
    assert list(map(type, values)) == [int, int, float, float, int, int]
    config = Config(DataSettings(), model, training)
    assert Config.from_json(config.to_json()) == config
    built = VAE((np.int64(1), 2, 2), np.int64(2), np.int64(3))
    assert (built.image_shape, built.capsule_shape) == ((1, 2, 2), (2, 3))
    assert all(type(n) is int for n in (*built.image_shape, *built.capsule_shape))


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        TrainingSettings().steps = 3


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TVAE.Settings, {"capsules": 0}, "capsules: input should be greater than or equal to 1, got 0"),
        (TVAE.Settings, {"capsules": 2.5}, "capsules: input should be a valid integer, got .*, got 2.5"),
        (TVAE.Settings, {"capsules": "many"}, "capsules: input should be a valid integer, .*, got 'many'"),
        (TVAE.Settings, {"capsule_dim": -1}, "capsule_dim: input should be greater than or equal to 1, got -1"),
        (TVAE.Settings, {"mu_init": float("nan")}, "mu_init: input should be a finite number, got nan"),
        (TVAE.Settings, {"likelihood": "poisson"}, "likelihood: .* 'bernoulli' or 'gaussian', got 'poisson'"),
        (TVAE.Settings, {"window": "free"}, "window: input should be 'ones', 'shared' or 'capsule', got 'free'"),
        (TVAE.Settings, {"neighborhood": 3}, "neighborhood: .* instance of Neighborhood, got 3"),
        (TVAE.Settings, {"neighborhood": {"time_windo": 3}}, "there is no setting neighborhood.time_windo"),
        (TVAE.Settings, {"neighborhood": {"time_window": 0}}, "time_window must be at least 1, got 0"),
        (TVAE.Settings, {"neighborhood": Neighborhood(1, 20)}, "capsule_window of 20 does not fit 15"),
        (TVAE.Settings, {"told_axis": True}, "told_axis needs a root for each axis, got Neighborhood"),
        (BubbleVAE.Settings, {"neighborhood": Neighborhood(3)}, "needs shift 0, got 1"),
        (VAE.Settings, {"mu_init": 3.0}, "there is no setting mu_init"),
        (TrainingSettings, {"optimizer": "lion"}, "optimizer: input should be 'sgd' or 'adam', got 'lion'"),
        (TrainingSettings, {"learning_rate": 0}, "learning_rate: input should be greater than 0, got 0"),
        (TrainingSettings, {"momentum": 1.0}, "momentum: input should be less than 1, got 1.0"),
        (TrainingSettings, {"momentum": -0.1}, "momentum: input should be greater than or equal to 0, got -0.1"),
        (TrainingSettings, {"batch_size": 0}, "batch_size: input should be greater than or equal to 1, got 0"),
        (TrainingSettings, {"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        (TrainingSettings, {"seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
        (TrainingSettings, {"precision": "16"}, "precision: .* '32-true', 'tf32' or 'bf16-mixed', got '16'"),
        (EvaluationSettings, {"sequences": 0}, "sequences: input should be greater than or equal to 1, got 0"),
        (EvaluationSettings, {"importance_samples": 0}, "importance_samples: .* equal to 1, got 0"),
        (DataSettings, {"name": "cifar"}, "no data 'cifar' is registered, only sprites, .*, mnist-still"),
        (DataSettings, {"evaluation": "cifar"}, "no data 'cifar' is registered, only"),
        (
            DataSettings,
            {"name": "sprites", "evaluation": "mnist"},
            r"a model of sprites images, \(1, 64, 64\), cannot be evaluated on mnist, \(3, 28, 28\)",
        ),
        (DataSettings, {"folder": 3}, "folder: .*, got 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(kind, values, message):
    with pytest.raises(ValueError, match=message) as raised:
        kind(**values)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_all_that_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"^steps: .* got 0; seed: .* got -1; there is no setting pace$"):
        TrainingSettings(steps=0, seed=-1, pace=3)


def test_settings_of_a_users_own_are_checked_with_those_that_they_add_to():
    @settings
    class Own(VAE.Settings):
        tilt: float = 0.5

        def __post_init__(self):
            if self.tilt > self.capsules:
                raise ValueError(f"tilt must be at most {self.capsules}, got {self.tilt}")

    assert Own(2, 3) == Own(capsules=2, capsule_dim=3, tilt=0.5)
    assert Own(2, 3, tilt="1") == Own(2, 3, tilt=1.0)  # as from a command line
    with pytest.raises(ValueError, match=r"^tilt must be at most 2, got 3.0$"):
        Own(2, 3, tilt=3)
    with pytest.raises(ValueError, match=r"^tilt: input should be a valid number, got None$"):
        Own(2, 3, tilt=None)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        "{}",
        '{"model": ["tvae"]}',
        '{"model": "flow"}',
        '{"model": "vae", "steps": 0}',
        '{"model": "tvae", "colour": 0}',
        '{"model": "tvae", "mu_init": NaN}',
        '{"model": "tvae", "neighborhood": 3}',
        '{"model": "tvae", "neighborhood": {"time_window": 0}}',
        '{"model": "tvae", "training": 3}',
        '{"model": {"name": ["tvae"]}, "training": {}, "data": {}, "evaluation": {}}',
        '{"model": {"name": "tvae"}, "training": [], "data": {}, "evaluation": {}}',
    ],
)
def test_text_that_is_no_configuration_is_a_value_error_of_one_line(text):
    with pytest.raises(ValueError, match=r".") as raised:
        Config.from_json(text)
    assert "\n" not in str(raised.value)


def test_a_wrong_field_of_an_older_configuration_is_named():
    for values, message in (
        ({"steps": 0}, "training: steps: input should be greater than or equal to 1, got 0"),
        ({"capsules": 0}, "model: capsules: input should be greater than or equal to 1, got 0"),
        ({"data": "cifar"}, "data: no data 'cifar' is registered"),
        ({"importance_samples": "x"}, "evaluation: importance_samples: .* got 'x'"),
        ({"colour": 0}, "model: there is no setting colour"),
    ):
        with pytest.raises(ValueError, match=message):
            Config.from_json(json.dumps({"model": "vae", **values}))


def test_a_model_is_built_of_its_settings():
    model = Config(DataSettings(), TVAE.Settings(2, 15, neighborhood=Neighborhood(4), mu_init=2.0)).build_model(
        (1, 4, 4)
    )
    assert type(model) is TVAE
    assert model.settings == TVAE.Settings(2, 15, neighborhood=Neighborhood(4), mu_init=2.0)
    assert model.image_shape == (1, 4, 4)
    assert model.topographic.mu.item() == 2.0


def test_files_are_in_the_folder_that_is_named_or_in_the_cache(monkeypatch):
    """Downloaded alone to the cache, where sources that read the same files share a folder."""
    opened = []
    monkeypatch.setattr(config_module, "open_source", lambda *values, **named: opened.append((*values, named)))
    monkeypatch.setattr(config_module, "CACHE", Path("/cache"))
    cpu = torch.device("cpu")
    folders = dict.fromkeys(("mnist", "mnist-rotation-hue", "mnist-open-unseen"), "mnist")
    for name, folder in (*folders.items(), ("dsprites", "dsprites"), ("shapes3d", "shapes3d")):
        DataSettings(name).open("train", cpu)
        DataSettings(name, folder=Path("/data")).open("validation", cpu)
        assert opened[-2:] == [
            (name, "train", Path("/cache") / folder, cpu, {"download": True}),
            (name, "validation", Path("/data"), cpu, {"download": False}),
        ]
    DataSettings().open("test", cpu)
    assert opened[-1] == ("sprites", "test", None, cpu, {"download": True})
    both = DataSettings("mnist", evaluation="mnist-rotation-hue")
    for split, name in (("train", "mnist"), ("validation", "mnist"), ("test", "mnist-rotation-hue")):
        both.open(split, cpu)
        assert opened[-1][:2] == (name, split)


def test_sources_of_a_users_own_can_be_named(monkeypatch):
    class Own(SequenceSource):
        name = "own"
        image_shape = (1, 64, 64)

    monkeypatch.setitem(SOURCES, "own", Own)
    assert DataSettings("sprites", evaluation="own").evaluation == "own"
    with pytest.raises(ValueError, match=r"a model of mnist images, \(3, 28, 28\), cannot be evaluated on own"):
        DataSettings("mnist", evaluation="own")
