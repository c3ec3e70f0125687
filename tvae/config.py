"""The settings of a training run, by what they are about, as Python values and as the JSON of a run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from pydantic import Field

from .data import CACHE, SOURCES, DataError, Sequences, SequenceSource, is_path, located, open_sequences, open_source
from .files import expanded
from .models import ModelSettings, SequenceModel, find, model_of
from .settings import Count, Number, Whole, settings

Precision = Literal["32-true", "tf32", "bf16-mixed"]
StepKind = Literal["eager", "compiled", "graph"]
LoggerKind = Literal["tensorboard", "wandb", "none"]


def choices(registry: dict) -> Callable[[str], str]:
    """Say in the help of the command line what there is to choose from when it is asked."""
    return lambda default: f"({', '.join(registry)}; default: {default})"


_FROM_SOURCES = lambda default: f"({', '.join(SOURCES)}, or a path; default: {default})"  # noqa: E731


@settings
class DataSettings:
    """Which sequences a model is trained and evaluated on."""

    name: Annotated[str, tyro.conf.arg(name="data", help_behavior_hint=_FROM_SOURCES)] = "sprites"
    """Sequences to train on: our own sprites (no files needed), of which one factor advances, or one of x and y; the
    real dSprites; MNIST digits, of which one factor advances, or rotation and hue together, or perspective and hue
    together; still digits; digits on open paths, of which one factor advances and does not come round, and of these 0
    to 7 alone, or 8 and 9; digits in pairs of poses, turned, or shifted and scaled as well, and digits that turn once
    around, whose classes shall be found; our own rooms (no files needed), in the manner of 3D Shapes, on open paths; or
    the real 3D Shapes on the same. A path is that of your own: a .npy or .npz file, or a folder of folders of frames or
    of videos (docs/own-data.md)."""
    evaluation: Annotated[str | None, tyro.conf.arg(name="evaluation-data")] = None
    """Sequences to evaluate on, where they are not of the same kind; all of your own."""
    folder: Annotated[Path | None, tyro.conf.arg(name="data-dir")] = None
    """Folder of local data files. Without it, mnist, its like and dsprites are downloaded to ~/.cache/tvae once;
    shapes3d is looked for there, and not downloaded. Your own sequences are there, if not where they were."""
    contents: Annotated[str | None, tyro.conf.Suppress] = None
    """Of your own sequences: what was found, with a checksum, which must be found again."""
    evaluation_contents: Annotated[str | None, tyro.conf.Suppress] = None
    """The same of those to evaluate on."""

    def __post_init__(self):
        for name in (self.name, self.evaluation):
            if name is not None and name not in SOURCES and not is_path(name):
                raise ValueError(
                    f"no data {name!r} is registered, only {', '.join(SOURCES)}; import the file that defines it, or "
                    "give the path of your own sequences"
                )
        if not any(name is not None and is_path(name) for name in (self.name, self.evaluation)):
            _check_shapes(SOURCES[self.name], SOURCES.get(self.evaluation))

    def open(self, split: Literal["train", "validation", "test"], device: torch.device | str = "cpu") -> SequenceSource:
        """Open the sequences of one split; those of "test" are of the kind to evaluate on.

        Raises:
            DataError: the data is missing or damaged.

        """
        is_other = split == "test" and self.evaluation is not None
        name, contents = (self.evaluation, self.evaluation_contents) if is_other else (self.name, self.contents)
        own = is_path(name) or isinstance(SOURCES[name], Sequences)
        folder, files = self.folder, None if own else SOURCES[name].files
        if folder is None and files is not None:
            folder = expanded(CACHE) / files
        part = "all" if own and is_other and name != self.name else split
        source = open_source(name, part, folder, device, download=self.folder is None)
        if contents is not None and contents != source.contents:
            raise DataError(
                f"the sequences of {source.name} have changed: they were {contents}, are {source.contents}; put the "
                "old ones back, or train a new run"
            )
        return source

    def look(self) -> tuple[DataSettings, list[Sequences]]:
        """Look at sequences of the user's own; return the settings by which they are known again, and them.

        Raises:
            DataError: they are missing or not what they should be.

        """
        values, found = vars(self).copy(), {}
        for name, contents in (("name", "contents"), ("evaluation", "evaluation_contents")):
            value = values[name]
            if value is None or isinstance(SOURCES.get(value), type):
                continue
            own = open_sequences(located(value, self.folder)) if is_path(value) else SOURCES[value]
            values |= {name: own.name, contents: own.contents}
            found[own.name] = own
        _check_shapes(*(found.get(values[x], SOURCES.get(values[x])) for x in ("name", "evaluation")))
        return DataSettings(**values), list(found.values())


def _check_shapes(trained: SequenceSource, evaluated: SequenceSource | None) -> None:
    """Refuse to evaluate on images of another shape, where shapes are known."""
    first, second = (getattr(source, "image_shape", None) for source in (trained, evaluated))
    if evaluated is not None and first != second:
        raise ValueError(
            f"a model of {trained.name} images, {first}, cannot be evaluated on {evaluated.name}, {second}"
        )


@settings
class TrainingSettings:
    """How a model is trained."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """SGD with momentum is the paper's."""
    learning_rate: Annotated[Number, Field(gt=0)] = 1e-4
    """Step size, for the ELBO in nats a frame."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps in which the learning rate grows to its size."""
    decay_from: Annotated[Number, Field(ge=0, le=1)] = 1.0
    """Part of the steps after which the learning rate falls to 0, along a cosine; 1: it does not."""
    batch_size: Count = 8
    """Sequences in a batch."""
    steps: Count = 1000
    """Batches to train on."""
    precision: Precision = "32-true"
    """Of the matrix products in training: float32; float32 with factors rounded to TF32 (10 bits of fraction), on
    GPUs that have it; or bfloat16 (7 bits), the rest in float32, which on most CPUs is slower than float32."""
    seed: Annotated[Whole, Field(ge=0, lt=2**53)] = 0
    """Decides initial weights, sequences and noise."""

    @property
    def scheduled(self) -> bool:
        """Say whether the learning rate is another one in some of the steps."""
        return self.warmup_steps > 0 or self.decay_from < 1

    def rate_factor(self, step: int) -> float:
        """Return what step number `step`, from 0, multiplies the learning rate by."""
        factor = min(1.0, (step + 1) / (self.warmup_steps + 1))
        start = self.decay_from * self.steps
        if step > start:
            factor *= (1 + math.cos(math.pi * (step - start) / (self.steps - start))) / 2
        return factor


@settings
class EvaluationSettings:
    """What a trained model is evaluated on."""

    sequences: Annotated[Count, tyro.conf.arg(name="evaluation-sequences")] = 1000
    """Sequences of the fixed test set to evaluate on."""
    importance_samples: Count = 10
    """Samples for the estimates of log p(x)."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a training run.

    Args:
        data: Which sequences.
        model: The `Settings` of a registered model.
        training: How the model is trained.
        evaluation: What it is evaluated on.

    """

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    @property
    def model_class(self) -> type[SequenceModel]:
        """Return the class that the model's settings belong to."""
        return model_of(self.model)

    def on(self, data: Sequences) -> Config:
        """Return the same configuration for sequences that `tvae.open_sequences` has opened."""
        return replace(self, data=DataSettings(data.name, contents=data.contents))

    def open_source(
        self, split: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> SequenceSource:
        """Open the sequences of one split, which fit the model; those of "test" are of the kind to evaluate on.

        Raises:
            DataError: the data is missing or damaged.
            ValueError: the model cannot take these sequences.

        """
        source = self.data.open(split, device)
        self.model.check_fits(source)
        return source

    def build_model(self, image_shape: tuple[int, int, int]) -> SequenceModel:
        """Make a freshly initialised model for images of `(channel, height, width)`."""
        return self.model_class(image_shape, **vars(self.model))

    def to_json(self) -> str:
        """Write the configuration as JSON text."""
        values = asdict(self)
        for name in ("contents", "evaluation_contents"):
            if values["data"][name] is None:
                del values["data"][name]
        values["model"] = {"name": self.model_class.name, **values["model"]}
        return json.dumps(values, default=str, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Config:
        """Read what `to_json` wrote, or the flat form of older versions.

        Raises:
            ValueError: the text is not a configuration; the message names the field.

        """
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(values, dict):
            raise ValueError(f"not a configuration, but {type(values).__name__}")
        if "training" not in values:
            values = _nested(values)
        sections = {"data": DataSettings, "training": TrainingSettings, "evaluation": EvaluationSettings}
        if sorted(values) != sorted((*sections, "model")):
            raise ValueError(
                f"a configuration has the parts data, model, training and evaluation, got {sorted(values)}"
            )
        for name, part in values.items():
            if not isinstance(part, dict):
                raise ValueError(f"{name} must be an object, got {part!r}")
        model = dict(values["model"])
        sections["model"] = find(model.pop("name", None)).Settings
        return Config(
            **{name: _read(name, kind, values[name] if name != "model" else model) for name, kind in sections.items()}
        )


def _read(section: str, kind: type, values: dict):
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from error


# Where the fields of older, flat configurations have gone.
_OLDER_NAMES = {
    "data": ("data", "name"),
    "evaluation_data": ("data", "evaluation"),
    "data_dir": ("data", "folder"),
    "model": ("model", "name"),
    "evaluation_sequences": ("evaluation", "sequences"),
    "importance_samples": ("evaluation", "importance_samples"),
}
_OLDER_TRAINING = ("optimizer", "learning_rate", "momentum", "batch_size", "steps", "precision", "seed")
_OLDER_TOPOGRAPHIC = ("neighborhood", "mu_init", "window", "told_axis")  # which a VAE had, too, and did not use


def _nested(values: dict) -> dict:
    """Sort the fields of an older, flat configuration into their parts."""
    parts = {"data": {}, "model": {}, "training": {}, "evaluation": {}}
    for name, value in values.items():
        if values.get("model") == "vae" and name in _OLDER_TOPOGRAPHIC:
            continue
        part, new = _OLDER_NAMES.get(name, ("training" if name in _OLDER_TRAINING else "model", name))
        parts[part][new] = value
    return parts


class Sources:
    """The sequences of a configuration on a device, each split opened once.

    Raises:
        DataError: here and below, the data is missing or damaged.
        ValueError: the model cannot take the sequences.

    """

    def __init__(self, config: Config, device: torch.device | str = "cpu"):
        self.config = config
        self.device = torch.device(device)
        self._opened: dict[str, SequenceSource] = {}

    def __getitem__(self, split: Literal["train", "validation", "test"]) -> SequenceSource:
        if split not in self._opened:
            self._opened[split] = self.config.open_source(split, self.device)
        return self._opened[split]


def check_run(config: Config, kind: StepKind, device: torch.device, processes: int = 1) -> None:
    """Check that the device, or as many as there are processes, can train a configuration by steps of a kind.

    Raises:
        ValueError: it cannot, or the model is trained by one process, or there is no such kind.

    """
    check_machine(kind, config.training.precision, device, processes, config.data.name)
    if processes > 1 and config.model_class.one_process:
        name = config.model_class.__name__
        raise ValueError(f"a {name} is trained by one process, got {processes}: it needs all of a batch in one place")


def check_logger(name: LoggerKind) -> None:
    """Check that there is a logger of that name.

    Raises:
        ValueError: there is none, or its package is missing.

    """
    if name not in get_args(LoggerKind):
        raise ValueError(f"logger must be one of {', '.join(get_args(LoggerKind))}, or one of Fabric's; got {name!r}")
    if name == "wandb" and find_spec("wandb") is None:
        raise ValueError("--logger wandb needs the package wandb: pip install wandb")


def check_machine(
    kind: StepKind, precision: Precision, device: torch.device, processes: int = 1, data: str | None = None
) -> None:
    """Check that the device, or as many as there are processes, can take steps of a kind in a precision, on the data.

    Raises:
        ValueError: it cannot, or there is no such kind or precision.

    """
    for name, value, choices in (("step", kind, get_args(StepKind)), ("precision", precision, get_args(Precision))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    if kind == "graph" and data is not None and not (data in SOURCES and SOURCES[data].capturable):
        raise ValueError(
            f"--step graph is for data that is made on the GPU, not for {data}, which is read from its file batch by "
            "batch; use --step eager or compiled"
        )
    if kind == "graph" and device.type != "cuda":
        raise ValueError(f"--step graph needs a GPU, got the device {device.type}; use --step eager or compiled")
    if kind == "graph" and processes > 1:
        raise ValueError(f"--step graph is for one process, got {processes}; use --step eager or compiled")
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and (not ampere or torch.version.hip):
        raise ValueError(f"--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more, got {device.type}")
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ValueError("--precision bf16-mixed needs a GPU that computes in bfloat16, which this one does not")
