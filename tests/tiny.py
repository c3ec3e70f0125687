"""An exhibit of two models that train in a moment, for the tests of `tvae.paper`."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings
from tvae.models import TVAE, VAE
from tvae.paper import runs, tables
from tvae.paper.exhibits import Exhibit
from tvae.presets import PRESETS, Preset
from tvae_kernels import Neighborhood

MODELS = {
    "sprites-tvae-w4-k3": TVAE.Settings(2, neighborhood=Neighborhood(4, 3)),
    "sprites-vae": VAE.Settings(2),
}
EXHIBIT = Exhibit("Table 0: tiny models on dSprites", {name: {} for name in MODELS})
CONFIG = Config(DataSettings(), VAE.Settings(2), TrainingSettings(batch_size=2, steps=40), EvaluationSettings(48, 2))


def presets():
    """A patch under which the models are presets."""
    patch = pytest.MonkeyPatch()
    for name, model in MODELS.items():
        patch.setitem(PRESETS, name, Preset(replace(CONFIG, model=model), name))
    return patch


def plan(folder, seeds=1):
    return runs.plan(EXHIBIT.models, seeds, "2", None, folder)


def reproduce(folder, seeds=1):
    """Everything but the printing: the table, and the names of its files with what is in them."""
    jobs = plan(folder / "runs", seeds)
    assert runs.carry_out_all(jobs, torch.device("cpu"), 1, Console(quiet=True))
    results = tables.collect(EXHIBIT.title, EXHIBIT.models, jobs)
    return results, {file.name: file.read_text() for file in tables.write(results, "table0", folder / "out")}
