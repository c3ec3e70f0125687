"""An exhibit of one's own: two models beside each other, in a table and a figure of how their capsules move."""

import sys

from matplotlib.figure import Figure

from tvae.cli import main
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import TVAE, VAE
from tvae.paper.exhibits import EXHIBITS, Exhibit
from tvae.presets import PRESETS, Preset
from tvae_kernels import Neighborhood

TRAINING = TrainingSettings(optimizer="adam", learning_rate=5e-4, steps=1400)
MODELS = {"small-rolls": TVAE.Settings(2, 15, neighborhood=Neighborhood(10, 1)), "small-stays": VAE.Settings(2, 15)}
for name, model in MODELS.items():
    PRESETS[name] = Preset(Config(DataSettings("sprites-shifts"), model, TRAINING), name.replace("-", " "))


def draw(results, jobs, device) -> Figure:
    """Draw E_eq of both models as bars."""
    figure = Figure(figsize=(3, 3), layout="constrained")
    lines = [line for line in results.lines if line.key == "equivariance_error"]
    figure.subplots().bar([line.preset for line in lines], [line.ours[0] for line in lines])
    return figure


EXHIBITS["small-moves"] = Exhibit("How far small capsules move", {name: {} for name in MODELS}, draw)

if __name__ == "__main__":
    sys.exit(main())
