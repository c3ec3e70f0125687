"""Every preset trained with the fused latents and without, and in lower precision, on the same noise: their metrics."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from tvae.config import Config, EvaluationSettings, Precision, check_machine
from tvae.data import SOURCES, DataError, FixedSequences
from tvae.evaluation import evaluate
from tvae.models import TVAE
from tvae.presets import PRESETS
from tvae.training.steps import matmul_precision

from . import devices
from .measuring import Say, measure_all, silent
from .records import Record, Result
from .render import markdown, where
from .variants import MNIST, SPRITES, VARIANTS, Trainer, Variant, config_of

DEVICES = ("cpu", "cuda")
SHOWN = ("", "precision")
IMPORTANCE_SAMPLES = 10
METRICS = ("ELBO", "E_eq", "CapCorr")  # heads of the tables
CAPCORR = "capcorr"
JUMPING = (CAPCORR, "active_units", "transformation_accuracy", "vp_score")  # keys of metrics that are made of counts
DIFFERENCE = "largest difference"


def run(data_dir: Path | None = None, steps: int = 50, sequences: int = 40, output: Path | None = None) -> Result:
    """Train every preset a little, fused and not, on the same noise, and compare metrics.

    The paper's main models are trained in all precisions of the machine, too.

    Without `--output` the tables in docs/ are made anew.

    Args:
        data_dir: folder with data files; presets whose data is not there are left out.
        steps: of each training.
        sequences: to evaluate each model on.
        output: JSON file to write, after every preset; by default benchmarks/results/agreement-MACHINE.json.

    """
    device = devices.here()
    settings = {"steps": steps, "sequences": sequences}
    measured = partial(measure, device=device, **settings)
    return measure_all("agreement", cases(data_dir), measured, device.type, settings, output, unit="none")


@dataclass(frozen=True)
class Case:
    """Names a preset."""

    preset: str
    config: Config

    @property
    def name(self) -> str:
        """Name the preset."""
        return self.preset

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return {"preset": self.preset}


def cases(data_dir: Path | None) -> list[Case]:
    """List every preset with a topography, with the folder's data; without a folder those that need no files."""
    every = [
        Case(name, config_of(name, data_dir)) for name, x in PRESETS.items() if issubclass(x.config.model_class, TVAE)
    ]
    return [case for case in every if data_dir is not None or SOURCES[case.config.data.name].files is None]


@dataclass(frozen=True)
class Training:
    """Says how to train a preset: with which steps, in which precision, from weights that are nudged or not."""

    name: str
    variant: Variant
    precision: Precision = "32-true"
    nudged: bool = False


UNFUSED = Training("unfused", VARIANTS["reference"])
NUDGED = replace(UNFUSED, name="unfused, nudged", nudged=True)
FUSED = Training("fused", VARIANTS["given noise"])


def trainings(preset: str, device: torch.device) -> list[Training]:
    """List unfused, nudged and fused training; that of the paper's two models in all precisions of the machine."""
    chosen = [UNFUSED, NUDGED, FUSED]
    for precision in get_args(Precision)[1:] if preset in (MNIST, SPRITES) else ():
        try:
            check_machine("eager", precision, device)
        except ValueError:
            continue
        chosen.append(replace(FUSED, name=f"{FUSED.name}, {precision}", precision=precision))
    return chosen


def measure(
    case: Case,
    say: Say = silent,
    *,
    device: torch.device,
    steps: int,
    sequences: int,
    chosen: Sequence[Training] | None = None,
) -> list[Record]:
    """Train a preset in every way, on the same weights, sequences and noise, and evaluate each model as it was trained.

    How far apart rounding errors alone drive two trainings is seen in the nudged one.

    Args:
        case: the preset.
        say: what is being done.
        device: where.
        steps: of training.
        sequences: to evaluate on.
        chosen: the trainings, with which the first is compared; by default all that are for the preset.

    Returns:
        A record for each training: its metrics, and the largest difference of one from that of the first training,
        over the latter's value. CapCorr, which is made of positions of maxima, and other metrics that are made of
        counts are left out: they change in jumps, and may be 0. Where the preset's data is missing, there is one
        record, which says so.

    """
    config, chosen = case.config, chosen or trainings(case.preset, device)
    try:
        train, test = (config.open_source(split, device) for split in ("train", "test"))
    except DataError as error:
        return [Record(case.fields, chosen[0].name, not_measured=str(error))]
    fixed = FixedSequences.take(test, sequences, config.training.batch_size)
    metrics: dict[str, dict[str, float]] = {}
    jumping: set[str] = set()
    for training in chosen:
        say(training.name)
        trainer = Trainer(training.variant, _in_precision(config, training.precision), train)
        if training.nudged:
            nudge(trainer.model)
        with matmul_precision(training.precision):
            for i in range(steps):
                trainer.take(i)
        rows = evaluate(trainer.model.module, fixed, EvaluationSettings(importance_samples=IMPORTANCE_SAMPLES))
        metrics[training.name] = {_value_name(row.key, row.part): row.value for row in rows}
        jumping |= {_value_name(row.key, row.part) for row in rows if row.key in JUMPING}
    first = metrics[chosen[0].name]
    smooth = [metric for metric in first if metric not in jumping]
    differences = {x: max(abs(y[m] - first[m]) / abs(first[m]) for m in smooth) for x, y in metrics.items()}
    return [Record(case.fields, x, values=metrics[x] | {DIFFERENCE: differences[x]}) for x in metrics]


def _value_name(key: str, part: str | None) -> str:
    """Name a row of an evaluation in a record."""
    return key if part is None else f"{key} {part}"


def _in_precision(config: Config, precision: Precision) -> Config:
    return replace(config, training=replace(config.training, precision=precision))


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Move every weight to the next number that there is in its type."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))


def table(result: Result) -> str:
    """Lay out the metrics of every preset, trained unfused and fused on the same noise."""
    rows, missing = [], []
    for records in result.by_case():
        unfused = records[UNFUSED.name]
        preset = f"`{unfused.case['preset']}`"
        if unfused.not_measured:
            missing.append(preset)
            continue
        pairs = zip(_metrics(unfused), _metrics(records[FUSED.name]), strict=True)
        rows.append([preset, *(x for pair in pairs for x in pair)])
        rows[-1] += [f"{records[training.name].values[DIFFERENCE]:.2g}" for training in (FUSED, NUDGED)]
    heads = [f"{metric}, {training.name}" for metric in METRICS for training in (UNFUSED, FUSED)]
    heads = ["preset", *heads, DIFFERENCE, "if nudged"]
    left_out = f"\n\nLeft out, for their data was not there: {', '.join(missing)}." if missing else ""
    return f"{_caption(result)}\n\n{markdown(heads, rows)}{left_out}"


def precision_table(result: Result) -> str:
    """Lay out the metrics of the presets that were trained in several precisions."""
    rows = []
    for records in result.by_case():
        fused = {name: record for name, record in records.items() if name.startswith(FUSED.name)}
        for name, record in fused.items() if len(fused) > 1 else ():
            precision = name.removeprefix(FUSED.name).removeprefix(", ") or FUSED.precision
            row = [f"`{record.case['preset']}`", f"`{precision}`", *_metrics(record)]
            rows.append([*row, f"{record.values[DIFFERENCE]:.2g}"])
    return f"{_caption(result)}\n\n{markdown(['preset', 'precision', *METRICS, DIFFERENCE], rows)}"


TABLES = {"": table, "precision": precision_table}


def _caption(result: Result) -> str:
    settings = result.settings
    text = f"{settings['steps']} steps of each training, evaluated on {settings['sequences']} sequences."
    return f"{text} Computed {where(result)}"


def _metrics(record: Record) -> list[str]:
    """Write ELBO in nats a frame, E_eq, and the mean of CapCorr over the factors; the latter two if sequences move."""
    values = record.values
    correlations = [math.nan if x is None else x for name, x in values.items() if name.split()[0] == CAPCORR]
    error = f"{values['equivariance_error']:.4g}" if "equivariance_error" in values else ""
    return [f"{values['elbo']:.1f}", error, f"{statistics.mean(correlations):.3f}" if correlations else ""]
