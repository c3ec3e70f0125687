"""The configuration of a training run, and named configurations for the models of the paper's tables."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import torch

from tvae_kernels import Neighborhood

from .data import SequenceSource, open_source
from .models import MODELS, VAE

CACHE = Path("~/.cache/tvae").expanduser()
Data = Literal[
    "sprites", "sprites-shifts", "dsprites", "mnist", "mnist-rotation-hue", "mnist-perspective-hue", "mnist-still"
]
Precision = Literal["32-true", "tf32", "bf16-mixed"]
StepKind = Literal["eager", "compiled", "graph"]


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a training run.

    Raises:
        ValueError: values that do not fit each other.

    """

    data: Data = "sprites"
    """Sequences to train on: our own sprites (no files needed), of which one factor advances, or one of x and y; the
    real dSprites; MNIST digits, of which one factor advances, or rotation and hue together, or perspective and hue
    together; or still digits."""
    evaluation_data: Data | None = None
    """Sequences to evaluate on, where they are not of the kind of `data`."""
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
    weights: Literal["free", "normalised", "projected"] = "free"
    """Rows of every layer's weights: free, weight normalisation, or norm 1 by projected gradient descent."""
    window: Literal["ones", "shared", "capsule"] = "ones"
    """Weights of the neighbourhood's taps: all 1, or learned, one window for all capsules or one a capsule."""
    told_axis: bool = False
    """Whether the model is told along which axis of its capsules a sequence rolls: axis 0 for the first transformation
    of the data, axis 1 for the second. Else it sums over the roots of all axes."""
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
    precision: Precision = "32-true"
    """Of the matrix products in training: float32; float32 with factors rounded to TF32 (10 bits of fraction), on
    GPUs that have it; or bfloat16 (7 bits), the rest in float32, which on most CPUs is slower than float32."""
    seed: int = 0
    """Decides initial weights, sequences and noise."""
    evaluation_sequences: int = 1000
    """Sequences of the fixed test set to evaluate on."""
    importance_samples: int = 10
    """Samples for the estimates of log p(x)."""

    def __post_init__(self):
        if self.model == "vae" and self.neighborhood != Neighborhood():
            raise ValueError(f"a VAE has no topography, but the neighborhood is {self.neighborhood}")
        if self.told_axis and self.neighborhood.roots != "each axis":
            raise ValueError(f"told_axis needs a root for each axis, got {self.neighborhood}")
        if self.evaluation_data is not None and ("mnist" in self.evaluation_data) != ("mnist" in self.data):
            raise ValueError(f"a model of {self.data} images cannot be evaluated on {self.evaluation_data}")
        for name in ("batch_size", "steps", "evaluation_sequences", "importance_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")

    def open_source(self, split: Literal["train", "test"], device="cpu") -> SequenceSource:
        """The sequences of one split; those of "test" are of the kind to evaluate on.

        Raises:
            DataError: the data is missing or damaged.
            ValueError: the time window or the axes do not fit the sequences.

        """
        data = self.data if split == "train" else self.evaluation_data or self.data
        download = self.data_dir is None
        folder = CACHE / data.split("-")[0] if download else self.data_dir
        source = open_source(data, split, folder, device, download)
        if self.model != "vae":
            self.neighborhood.check_fits(source.sequence_length, self.capsule_dim, self.capsules)
        if self.told_axis and len(source.transformations) != self.neighborhood.root_count:
            moves = ", ".join(source.transformations.values())
            raise ValueError(f"told_axis needs an axis for each of {moves}, got {self.neighborhood.axes}")
        return source

    def build_model(self, image_shape: tuple[int, int, int]) -> VAE:
        """A freshly initialised model for images of `(channel, height, width)`."""
        settings = {"likelihood": self.likelihood, "weights": self.weights}
        if self.model != "vae":
            for name in ("neighborhood", "mu_init", "window", "told_axis"):
                settings[name] = getattr(self, name)
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


def check_machine(kind: StepKind, precision: Precision, device: torch.device, processes: int = 1) -> None:
    """Whether the device, or as many as there are processes, can take steps of a kind in a precision.

    Raises:
        ValueError: it cannot, or there is no such kind or precision.

    """
    for name, value, choices in (("step", kind, get_args(StepKind)), ("precision", precision, get_args(Precision))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    if kind == "graph" and device.type != "cuda":
        raise ValueError(f"--step graph needs a GPU, got the device {device.type}; use --step eager or compiled")
    if kind == "graph" and processes > 1:
        raise ValueError(f"--step graph is for one process, got {processes}; use --step eager or compiled")
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and (not ampere or torch.version.hip):
        raise ValueError(f"--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more, got {device.type}")
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError("--precision bf16-mixed needs a GPU that computes in bfloat16, which this one does not")


@dataclass(frozen=True)
class Preset:
    """A named configuration and what it is."""

    config: Config
    description: str


def describe(config: Config) -> str:
    """The model in the paper's terms, as "TVAE, L=5/36, K=3": see `coherence_length`."""
    parts = [MODELS[config.model].__name__]
    if config.model != "vae":
        parts += [f"L={coherence_length(config)}", f"K={config.neighborhood.capsule_window}"]
    return ", ".join(parts)


def _topographies() -> dict[str, Preset]:
    """A model for every topography that the paper proposes beside those of its tables; all but the first with Adam."""
    torus = replace(
        _MNIST, data="mnist-still", capsules=1, capsule_dim=324, neighborhood=Neighborhood(1, 5, axes=(18, 18))
    )
    torus = replace(torus, mu_init=10.0, batch_size=128, steps=93_750)  # 250 epochs of 48,000 / 128 batches
    adam = replace(_SPRITES, optimizer="adam", learning_rate=5e-4)
    small = replace(adam, capsules=45, capsule_dim=5)
    axes = replace(adam, data="sprites-shifts", capsules=2, capsule_dim=225)
    axes = replace(axes, neighborhood=Neighborhood(10, 1, axes=(15, 15), roots="each axis"))
    padded = {"time_boundary": "padded", "capsule_boundary": "padded"}
    third = 1 / 3  # 5 positions for 15 frames
    models = {
        "mnist-still-tvae-torus": (torus, "TVAE on a torus of 18 x 18, windows of 5 x 5 (section 6.2)"),
        "sprites-shifts-tvae-axes": (axes, "TVAE, a root for each of two axes (Eq. 21)"),
        "sprites-shifts-tvae-told": (replace(axes, told_axis=True), "TVAE, told which of two axes rolls (Eq. 21)"),
        "sprites-tvae-third": (replace(small, neighborhood=Neighborhood(10, 1, third)), "TVAE, shift 1/3 (Eq. 19)"),
        "sprites-tvae-phase": (
            replace(small, neighborhood=Neighborhood(10, 1, third, roll="fourier")),
            "TVAE, shift 1/3 by phase (C.1)",
        ),
        "sprites-tvae-padded": (replace(adam, neighborhood=Neighborhood(9, 1, **padded)), "TVAE, not cyclic (C.2)"),
        "sprites-tvae-causal": (
            replace(adam, neighborhood=Neighborhood(9, 1, causal=True, **padded)),
            "TVAE, causal, not cyclic (Eq. 22)",
        ),
        "sprites-tvae-speeds": (
            replace(adam, neighborhood=Neighborhood(10, 1, speeds=(1,) * 8 + (2,) * 7)),
            "TVAE, 8 capsules of speed 1, 7 of speed 2",
        ),
        "sprites-tvae-learned": (
            replace(adam, neighborhood=Neighborhood(10, 3), window="capsule"),
            "TVAE, a learned window for each capsule",
        ),
    }
    return {name: Preset(*model) for name, model in models.items()}


def coherence_length(config: Config) -> Fraction:
    """The paper's L, half of the time window, relative to the length of the sequences (which is D in its models)."""
    window = config.neighborhood.time_window
    return Fraction(window if window > 1 else 0, 2 * config.capsule_dim)


def _named(name: str, base: Config) -> Config:
    """The configuration that a name says: DATA-MODEL[-wW-kK][-OPTION], as "mnist-tvae-w18-k3-normalised".

    W is the time window, K the capsule window; all else is the base's.
    """
    model, *rest = name.removeprefix(f"{base.data}-").split("-")
    options = _OPTIONS[rest.pop()] if rest and rest[-1] in _OPTIONS else {}
    if model != "vae":
        time_window, capsule_window = (int(part[1:]) for part in rest)
        options = options | {
            "neighborhood": Neighborhood(time_window, capsule_window, shift=0 if model == "bubblevae" else 1)
        }
    return replace(base, model=model, **options)


_OPTIONS = {
    "normalised": {"weights": "normalised"},
    "projected": {"weights": "projected"},
    "generalisation": {"evaluation_data": "mnist-rotation-hue"},
}
_MNIST = Config(data="mnist", capsules=18, capsule_dim=18, steps=600_000)  # 100 epochs of 48,000 / 8 batches
_SPRITES = Config(data="sprites", capsules=15, capsule_dim=15, steps=632_800)  # 100 epochs of 50,625 // 8 batches

_MNIST_MODELS = """
    tvae-w18-k3 tvae-w13-k3 tvae-w5-k3 tvae-w1-k9 bubblevae-w5-k3 vae
    tvae-w18-k3-normalised tvae-w13-k3-normalised tvae-w9-k3-normalised tvae-w5-k3-normalised tvae-w1-k9-normalised
    bubblevae-w18-k18-normalised bubblevae-w9-k9-normalised bubblevae-w5-k5-normalised bubblevae-w5-k3-normalised
    tvae-w5-k3-projected vae-projected vae-normalised
    tvae-w13-k3-generalisation
"""
_SPRITES_MODELS = """
    tvae-w15-k1 tvae-w10-k1 tvae-w5-k1 tvae-w1-k10 bubblevae-w10-k10 vae
    tvae-w15-k1-normalised tvae-w12-k1-normalised tvae-w10-k1-normalised tvae-w8-k1-normalised tvae-w5-k1-normalised
    tvae-w1-k10-normalised bubblevae-w15-k15-normalised bubblevae-w12-k12-normalised bubblevae-w10-k10-normalised
    bubblevae-w8-k8-normalised bubblevae-w5-k5-normalised
"""

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
        "TVAE, L=1/3, K=1; Adam",
    )
}
for _base, _models in (
    (_MNIST, _MNIST_MODELS),
    (replace(_MNIST, data="mnist-rotation-hue"), "tvae-w13-k3"),
    (replace(_MNIST, data="mnist-perspective-hue"), "tvae-w13-k3"),
    (_SPRITES, _SPRITES_MODELS),
    (replace(_SPRITES, data="dsprites"), _SPRITES_MODELS),
):
    for _name in (f"{_base.data}-{_model}" for _model in _models.split()):
        PRESETS[_name] = Preset(_named(_name, _base), describe(_named(_name, _base)))
PRESETS |= _topographies()
DEFAULT_PRESET = "quickstart"
