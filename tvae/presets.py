"""The configuration of a training run, and named configurations for the models of the paper's tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from tvae_kernels import Neighborhood

from .data import SequenceSource, open_source
from .models import MODELS, VAE

CACHE = Path("~/.cache/tvae").expanduser()


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a training run.

    Raises:
        ValueError: values that do not fit each other.

    """

    data: Literal["sprites", "mnist", "dsprites"] = "sprites"
    """Sequences to train on: our own sprites (no files needed), MNIST digits, or the real dSprites."""
    data_dir: Path | None = None
    """Folder of local data files. Without it, mnist and dsprites are downloaded to ~/.cache/tvae once."""
    model: Literal["tvae", "bubblevae", "vae"] = "tvae"
    """Shifting, stationary or no temporal coherence."""
    neighborhood: Neighborhood = field(default_factory=Neighborhood)
    """Which squared activations share a denominator; of no use to the VAE, which must leave it alone."""
    capsules: int = 15
    """Number of capsules C."""
    capsule_dim: int = 15
    """Dimensions D of a capsule; equal to the length of a sequence in the paper."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Distribution of a pixel."""
    mu_init: float = 30.0
    """Initial value of mu in t = (z - mu) / sqrt(W u^2)."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum is the paper's."""
    learning_rate: float = 1e-4
    """Step size, for the ELBO in nats a frame."""
    momentum: float = 0.9
    """Momentum of SGD."""
    batch_size: int = 8
    """Sequences in a batch."""
    steps: int = 1000
    """Batches to train on."""
    seed: int = 0
    """Decides initial weights, sequences and noise."""
    evaluation_sequences: int = 1000
    """Sequences of the fixed test set to evaluate on."""
    importance_samples: int = 10
    """Samples for the estimates of log p(x)."""

    def __post_init__(self):
        if self.model == "vae" and self.neighborhood != Neighborhood():
            raise ValueError(f"a VAE has no topography, but the neighborhood is {self.neighborhood}")
        for name in ("batch_size", "steps", "evaluation_sequences", "importance_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def open_source(self, split: Literal["train", "test"], device="cpu") -> SequenceSource:
        """The sequences of one split.

        Raises:
            DataError: the data is missing or damaged.
            ValueError: the time window does not fit the sequences.

        """
        download = self.data_dir is None
        source = open_source(self.data, split, CACHE / self.data if download else self.data_dir, device, download)
        if self.model != "vae":
            self.neighborhood.check_fits(time=source.sequence_length, dim=self.capsule_dim)
        return source

    def build_model(self, image_shape: tuple[int, int, int]) -> VAE:
        """A freshly initialised model for images of `(channel, height, width)`."""
        settings = {"likelihood": self.likelihood}
        if self.model != "vae":
            settings |= {"neighborhood": self.neighborhood, "mu_init": self.mu_init}
        return MODELS[self.model](image_shape, self.capsules, self.capsule_dim, **settings)

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(asdict(self), default=str, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not a configuration of this version.

        """
        try:
            values = json.loads(text)
            values["neighborhood"] = Neighborhood(**values["neighborhood"])
            if values["data_dir"] is not None:
                values["data_dir"] = Path(values["data_dir"])
            return Config(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a configuration of this version: {error!r}") from error


@dataclass(frozen=True)
class Preset:
    """A named configuration and what it is for."""

    config: Config
    description: str


def _paper_presets(base: Config, table: str, rows: tuple[tuple[str, str, int, int], ...]) -> dict[str, Preset]:
    """One preset a row `(model, L, time window, capsule window)` of a table, named data-model-wW-kK."""
    presets = {f"{base.data}-vae": Preset(replace(base, model="vae"), f"{table}: VAE")}
    for model, label, time_window, capsule_window in rows:
        shift = 0 if model == "BubbleVAE" else 1
        neighborhood = Neighborhood(time_window, capsule_window, shift)
        name = f"{base.data}-{model.lower()}-w{time_window}-k{capsule_window}"
        presets[name] = Preset(
            replace(base, model=model.lower(), neighborhood=neighborhood), f"{table}: {model}, L = {label}"
        )
    return presets


_MNIST = Config(data="mnist", capsules=18, capsule_dim=18, steps=600_000)  # 100 epochs of 48,000 / 8 batches
_SPRITES = Config(data="sprites", capsules=15, capsule_dim=15, steps=632_800)  # 100 epochs of 50,625 // 8 batches

_MNIST_ROWS = (("TVAE", "1/2", 18, 3), ("TVAE", "5/36", 5, 3), ("TVAE", "0", 1, 9), ("BubbleVAE", "5/36", 5, 5))
_SPRITES_ROWS = (
    ("TVAE", "1/2", 15, 1),
    ("TVAE", "1/3", 10, 1),
    ("TVAE", "1/6", 5, 1),
    ("TVAE", "0", 1, 10),
    ("BubbleVAE", "1/3", 10, 10),
)

PRESETS: dict[str, Preset] = {
    "quickstart": Preset(
        replace(
            _SPRITES,
            neighborhood=Neighborhood(10, 1),
            optimizer="adam",
            learning_rate=5e-4,
            steps=1400,
            evaluation_sequences=200,
        ),
        "A TVAE on sprites in two minutes on two CPU cores",
    ),
    **_paper_presets(_MNIST, "Table 1", _MNIST_ROWS),
    **_paper_presets(_SPRITES, "Table 2 on sprites", _SPRITES_ROWS),
    **_paper_presets(replace(_SPRITES, data="dsprites"), "Table 2", _SPRITES_ROWS),
}
DEFAULT_PRESET = "quickstart"
