"""Evaluate a model on the fixed test set, and print every metric beside its chance level."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from .data import SequenceBatch, SequenceSource, SequenceStream
from .files import replacing
from .metrics import BestSingleImage, CapCorr, ELBOTerms, EquivarianceError, LogLikelihood
from .models import VAE

EVALUATION_SEED = 2021  # of the fixed test set and of the noise, whatever the seed of the run


@dataclass(frozen=True)
class Row:
    """One metric: its value and what a model gets that knows nothing of the individual frame."""

    metric: str
    value: float
    chance: float
    unit: str


@dataclass(frozen=True)
class FixedSequences:
    """The sequences that every model is evaluated on, made once and kept: 0.17 MB each of MNIST, 0.25 MB of sprites."""

    source: SequenceSource
    batches: list[SequenceBatch]

    @staticmethod
    def of(source: SequenceSource, sequences: int, batch_size: int) -> FixedSequences:
        """The first `sequences` of the seeded stream of the test split, rounded up to whole batches."""
        stream = SequenceStream(source, batch_size, EVALUATION_SEED)
        return FixedSequences(source, [stream[i] for i in range(-(-sequences // batch_size))])


@torch.no_grad()
def evaluate(model: VAE, sequences: FixedSequences, samples: int) -> list[Row]:
    """Measure ELBO terms and log p(x), and of sequences of more than one frame E_eq and CapCorr.

    The same model gives the same figures every time: the noise is seeded.

    Args:
        model: the model, on the device of the sequences.
        sequences: what to evaluate it on.
        samples: importance samples for log p(x).

    Returns:
        One row a metric.

    """
    source, device = sequences.source, sequences.source.device
    moving = source.sequence_length > 1
    names = [source.transformations.get(index, factor.name) for index, factor in enumerate(source.factors)]
    terms, likelihood, error, correlation, constant = (
        metric.to(device)
        for metric in (
            ELBOTerms(),
            LogLikelihood(),
            EquivarianceError(model.rolls),
            CapCorr(names, model.rolls),
            BestSingleImage(model.likelihood, source.image_shape),
        )
    )
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVALUATION_SEED)
        for batch in sequences.batches:
            elbo = model(batch.images, axis=model.told(batch.axis))
            terms.update(elbo)
            if moving:
                error.update(elbo.t, elbo.axis)
                correlation.update(elbo.t, batch.factors, batch.transformation, elbo.axis)
            likelihood.update(torch.stack(list(model.log_weights(batch.images, samples, elbo.axis))))
            constant.update(batch.images)
    best_image = constant.compute()
    mean, log_p = terms.compute(), likelihood.compute()
    rows = [
        Row("ELBO", mean["elbo"], best_image, "nats/frame"),
        Row("log p(x|t)", mean["log_likelihood"], best_image, "nats/frame"),
        Row("KL z", mean["kl_z"], 0.0, "nats/frame"),
        Row("KL u", mean["kl_u"], 0.0, "nats/frame"),
        Row(f"log p(x), as published, {samples} samples", log_p["published"], best_image, "nats/frame"),
        Row(f"log p(x), bound, {samples} samples", log_p["bound"], best_image, "nats/frame"),
    ]
    if moving:
        correlations, random = correlation.compute(), correlation.chance()
        rows.append(Row("E_eq", error.compute().item(), error.chance(), ""))
        rows += [Row(f"CapCorr {name}", value, random[name], "") for name, value in correlations.items()]
    return rows


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for the terminal."""
    result = Table("metric", title=title)
    for column in ("value", "chance"):
        result.add_column(column, justify="right")
    result.add_column("unit")
    for row in rows:
        n = digits(row.metric)
        result.add_row(row.metric, f"{row.value:,.{n}f}", f"{row.chance:,.{n}f}", row.unit)
    return result


def digits(metric: str) -> int:
    """How many digits after the point a metric is printed with."""
    return 0 if metric == "E_eq" else 2 if metric.startswith("CapCorr") else 1


def save(rows: list[Row], sequences: int, path: Path) -> None:
    """Write the rows as JSON, which has null for NaN; at once or not at all."""
    metrics = [{key: None if x != x else x for key, x in asdict(row).items()} for row in rows]
    with replacing(path) as partial:
        partial.write_text(json.dumps({"sequences": sequences, "metrics": metrics}, indent=2) + "\n")


def load(path: Path) -> list[Row]:
    """Read the rows that `save` wrote."""
    rows = json.loads(path.read_text())["metrics"]
    return [Row(**{key: math.nan if x is None else x for key, x in row.items()}) for row in rows]
