"""Every preset trained with the fused latents and without, and in lower precision, on the same noise: their metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from tvae.evaluation import FixedSequences, evaluate
from tvae.presets import PRESETS, Config, Precision, check_machine
from tvae.steps import matmul_precision
from tvae.training import seed_noise

from .training import NAMES, Variant

IMPORTANCE_SAMPLES = 10


@dataclass(frozen=True)
class Training:
    """One way to train a preset: `variant` as in `training.Variant`, in a precision, from weights nudged or not."""

    name: str
    variant: str
    precision: Precision = "32-true"
    nudged: bool = False


UNFUSED, FUSED = Training("unfused", "reference"), Training("fused", "given noise")
NUDGED = Training("unfused, nudged", "reference", nudged=True)


def trainings(preset: str, device: torch.device) -> list[Training]:
    """The unfused one, nudged too, and the fused one; of the paper's two models all precisions that the machine has."""
    chosen = [UNFUSED, NUDGED, FUSED]
    for precision in get_args(Precision)[1:] if preset in NAMES else ():
        try:
            check_machine("eager", precision, device)
        except ValueError:
            continue
        chosen.append(Training(f"fused, {precision}", "given noise", precision))
    return chosen


def configs(data_dir: Path | None) -> dict[str, Config]:
    """Every preset with a topography, by name, with the folder's data; without a folder those that need no files."""
    return {
        name: replace(preset.config, data_dir=data_dir)
        for name, preset in PRESETS.items()
        if preset.config.model != "vae" and (data_dir is not None or preset.config.data.startswith("sprites"))
    }


def measure(
    preset: str,
    config: Config,
    device: torch.device,
    steps: int,
    sequences: int,
    say: Callable[[str], object] = lambda _: None,
) -> dict:
    """Train a preset in every way, on the same weights, sequences and noise, and evaluate each model as it was trained.

    How far apart rounding errors alone drive two trainings is seen in the nudged one.

    Args:
        preset: the configuration's name.
        config: the preset.
        device: where.
        steps: of training.
        sequences: to evaluate on.
        say: told what is being done.

    Returns:
        `preset`; `metrics`, by training and metric; `difference`, by training the largest difference of a metric from
        that of the unfused training in float32, over the latter's value. CapCorr is left out: it is made of
        positions of maxima, and changes in jumps.

    Raises:
        DataError: the preset's data is not in the folder.

    """
    train, test = (config.open_source(split, device) for split in ("train", "test"))
    fixed = FixedSequences.of(test, sequences, config.batch_size)
    metrics, difference = {}, {}
    for training in trainings(preset, device):
        say(training.name)
        variant = Variant(training.variant, replace(config, precision=training.precision), train)
        if training.nudged:
            nudge(variant.model)
        with matmul_precision(training.precision):
            for i in range(steps):
                seed_noise(config.seed, i)
                variant.step(i)
        rows = {row.metric: row.value for row in evaluate(variant.model.module, fixed, IMPORTANCE_SAMPLES)}
        metrics[training.name] = rows
        wanted = metrics[UNFUSED.name]
        smooth = [metric for metric in rows if not metric.startswith("CapCorr")]
        difference[training.name] = max(abs(rows[metric] - wanted[metric]) / abs(wanted[metric]) for metric in smooth)
    return {"preset": preset, "metrics": metrics, "difference": difference}


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every weight to the next number that there is in its type."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
