"""Presets: that each is what its name says, and the same in the flat form of older configurations."""

import json
import re
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest

from tvae.config import Config, EvaluationSettings, TrainingSettings
from tvae.models import TVAE, VAE, BubbleVAE
from tvae.presets import DEFAULT_PRESET, OWN_PRESET, PRESETS, coherence_length, describe
from tvae_kernels import Neighborhood

RESULTS = Path(__file__).parents[1] / "results"
NAME = re.compile(
    r"(?P<data>mnist-rotation-hue|mnist-perspective-hue|mnist|sprites|dsprites)-(?P<model>tvae|bubblevae|vae)"
    r"(-w(?P<W>\d+)-k(?P<K>\d+))?(-(?P<option>normalised|projected|generalisation))?"
)
NAMED = [name for name in PRESETS if NAME.fullmatch(name)]


def flat(config):
    """What older versions wrote of a configuration: one object, in which a VAE had a neighbourhood of no use."""
    model = asdict(config.model)
    unused = {"neighborhood": asdict(Neighborhood()), "mu_init": 30.0, "window": "ones", "told_axis": False}
    data = {"data": config.data.name, "evaluation_data": config.data.evaluation, "data_dir": config.data.folder}
    evaluation = {
        "evaluation_sequences": config.evaluation.sequences,
        "importance_samples": config.evaluation.importance_samples,
    }
    training = {name: x for name, x in vars(config.training).items() if name not in ("warmup_steps", "decay_from")}
    return {**data, "model": config.model_class.name, **unused, **model, **training, **evaluation}


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_is_what_its_name_says(name):
    part = NAME.fullmatch(name).groupdict()
    config, mnist = PRESETS[name].config, part["data"].startswith("mnist")
    size = 18 if mnist else 15
    values = {"weights": part["option"] if part["option"] in ("normalised", "projected") else "free"}
    if part["model"] != "vae":
        shift = 0 if part["model"] == "bubblevae" else 1
        values["neighborhood"] = Neighborhood(int(part["W"]), int(part["K"]), shift)
    kind = {"tvae": TVAE, "bubblevae": BubbleVAE, "vae": VAE}[part["model"]]
    assert config.model_class is kind
    assert config.model == kind.Settings(size, size, **values)
    assert config.data.name == part["data"]
    assert config.data.evaluation == ("mnist-rotation-hue" if part["option"] == "generalisation" else None)
    assert config.data.folder is None
    training = config.training  # the paper's
    assert (training.optimizer, training.learning_rate, training.momentum, training.batch_size) == ("sgd", 1e-4, 0.9, 8)
    assert training.steps == (100 * 48_000 // 8 if mnist else 100 * (50_625 // 8))
    assert config.evaluation == EvaluationSettings(1000, 10)


RIVALS = [f"{data}-{model}" for data in ("mnist", "sprites") for model in ("betavae", "factorvae", "slowvae")]
COMPARED = [*RIVALS, *(f"{data}-{model}-adam" for data in ("mnist", "sprites") for model in ("vae", "tvae"))]


def test_rivals_and_what_is_compared_with_them_differ_in_the_model_alone():
    papers = {"mnist-tvae-adam": "mnist-tvae-w13-k3", "sprites-tvae-adam": "sprites-tvae-w10-k1"}
    for name in COMPARED:
        config = PRESETS[name].config
        wanted = PRESETS[papers.get(name, f"{config.data.name}-vae")].config
        assert config == replace(
            wanted,
            training=replace(wanted.training, optimizer="adam", learning_rate=5e-4),
            model=config.model if name in RIVALS else wanted.model,
        )
        if name in RIVALS:
            size = wanted.model.capsules
            assert config.model == config.model_class.Settings(size, size)  # their own weights
            assert config.model_class.name == name.split("-")[1]


CLUSTERS = [name for name in PRESETS if name.startswith(("mnist-posed", "mnist-turning"))]
FLOWS = [name for name in PRESETS if name.startswith(("mnist-open", "rooms"))]


def test_models_on_open_paths_are_of_one_size_and_trained_alike():
    for data, size, steps, transformations, frames in (("mnist-open", 18, 90_000, 3, 9), ("rooms", 15, 100_000, 4, 8)):
        names = [name for name in FLOWS if re.fullmatch(rf"{data}-[a-z]+", name)]
        kinds = ["vae", "betavae", "factorvae", "slowvae", "tvae", "poflow", "flowvae", "weakflowvae"]
        assert names == [f"{data}-{kind}" for kind in kinds]
        for name, kind in zip(names, kinds, strict=True):
            config = PRESETS[name].config
            assert config.model_class.name == kind
            assert (config.model.capsules, config.model.capsule_dim) == (size, size)
            assert config.training == TrainingSettings("adam", 5e-4, batch_size=16, steps=steps)
            assert config.data.name == data
            assert getattr(config.model, "transformations", transformations) == transformations
            assert getattr(config.model, "frames", frames) == frames
            if kind == "tvae":
                assert config.model.neighborhood == Neighborhood(5, 3, time_boundary="zero")


def test_models_of_clusters_have_the_data_of_their_group():
    for data, group, size in (("", "SO(2)", 15), ("-shift", "SE(2)", 17), ("-scale", "Sim(2)", 18)):
        config = PRESETS[f"mnist-posed{data}-clustervae"].config
        assert config.data.name == f"mnist-posed{data}"
        assert (config.model.group, config.model.capsules, config.model.capsule_dim) == (group, 1, size)
        assert config.training == TrainingSettings("adam", 1e-3, batch_size=32, steps=20_000)
        assert PRESETS[f"mnist-posed{data}-clustervae"].description == f"ClusterVAE, {group}"
    assert PRESETS["mnist-turning-tvae"].config.model == TVAE.Settings(18, 18, neighborhood=Neighborhood(13, 3))
    assert {PRESETS[name].config.training.batch_size for name in CLUSTERS if "turning" in name} == {16}
    assert len(CLUSTERS) == 7


def test_ablations_change_one_thing():
    flow = PRESETS["mnist-open-flowvae"].config
    for option, change in (
        ("free", {"gamma": 0}),
        ("steps2", {"steps_per_frame": 2}),
        ("steps4", {"steps_per_frame": 4}),
    ):
        assert PRESETS[f"mnist-open-flowvae-{option}"].config == replace(flow, model=replace(flow.model, **change))
    for kind in ("flowvae", "poflow"):
        seen = PRESETS[f"mnist-open-seen-{kind}"].config
        assert seen.data.name == "mnist-open-seen"
        assert seen.data.evaluation is None
        assert replace(seen, data=flow.data) == PRESETS[f"mnist-open-{kind}"].config
        unseen = PRESETS[f"mnist-open-seen-{kind}-generalisation"].config
        assert unseen == replace(seen, data=replace(seen.data, evaluation="mnist-open-unseen"))


def test_few_presets_have_names_of_another_form():
    assert set(PRESETS) - set(NAMED) - set(COMPARED) - set(FLOWS) - set(CLUSTERS) == {
        DEFAULT_PRESET,
        "quickstart",
        OWN_PRESET,
        "mnist-still-tvae-torus",
        "sprites-shifts-tvae-axes",
        "sprites-shifts-tvae-told",
        *(f"sprites-tvae-{name}" for name in ("third", "phase", "padded", "causal", "speeds", "learned")),
    }
    assert len(NAMED) == 55
    assert {name.replace("dsprites", "sprites", 1) for name in NAMED if name.startswith("dsprites")} == {
        name for name in NAMED if name.startswith("sprites")
    }


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(RIVALS) - set(FLOWS) - set(CLUSTERS) - {DEFAULT_PRESET}))
def test_older_configurations_are_read_as_what_they_are_now(name):
    config = PRESETS[name].config
    older = json.dumps(flat(config), default=str)
    assert Config.from_json(older) == config
    # Of every field another value, which has to arrive.
    training = replace(
        config.training,
        optimizer="sgd" if config.training.optimizer == "adam" else "adam",
        learning_rate=0.5,
        momentum=0.25,
        batch_size=3,
        steps=7,
        precision="tf32",
        seed=11,
    )
    data = replace(config.data, folder=Path("/some/where"))
    changed = replace(config, data=data, training=training, evaluation=EvaluationSettings(5, 6))
    changed = replace(changed, model=replace(config.model, likelihood="gaussian", weights="projected"))
    assert Config.from_json(json.dumps(flat(changed), default=str)) == changed


def test_an_older_configuration_may_lack_what_could_not_be_chosen_then():
    older = flat(PRESETS["sprites-tvae-w10-k1"].config)
    for name in ("evaluation_data", "weights", "window", "told_axis", "precision"):
        del older[name]
    for name in ("axes", "roots", "speeds", "roll"):
        del older["neighborhood"][name]
    assert Config.from_json(json.dumps(older)) == PRESETS["sprites-tvae-w10-k1"].config


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/config.json")), ids=lambda p: p.name)
def test_the_results_are_of_the_presets_that_they_are_named_after(folder):
    """Files that older versions wrote; less was trained and evaluated on than presets say."""
    config = Config.from_json((folder / "config.json").read_text())
    preset = PRESETS[re.sub(r"(-adam)?-\d+-steps$|-bf16-mixed$", "", folder.name)].config
    assert config.model == preset.model
    assert config.data == preset.data
    steps = re.search(r"(\d+)-steps", folder.name)
    assert config.training.steps == (int(steps[1]) if steps else preset.training.steps)
    if "-bf16-mixed" in folder.name:
        assert config.training == replace(preset.training, precision="bf16-mixed")
    elif "-adam" not in folder.name:
        assert config.training == replace(preset.training, steps=config.training.steps)


def test_models_are_described_in_the_terms_of_the_paper():
    descriptions = {
        "mnist-tvae-w18-k3": "TVAE, L=1/2, K=3",
        "mnist-tvae-w5-k3": "TVAE, L=5/36, K=3",
        "mnist-tvae-w1-k9": "TVAE, L=0, K=9",
        "sprites-bubblevae-w10-k10": "BubbleVAE, L=1/3, K=10",
        "sprites-vae": "VAE",
    }
    for name, text in descriptions.items():
        assert PRESETS[name].description == describe(PRESETS[name].config) == text
    assert coherence_length(PRESETS["sprites-tvae-w12-k1-normalised"].config.model) == Fraction(2, 5)
    assert coherence_length(PRESETS["sprites-vae"].config.model) is None
