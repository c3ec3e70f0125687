"""Evaluate a model on the fixed test set, and print every metric beside its chance level."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from .config import EvaluationSettings
from .data import EVALUATION_SEED, FixedSequences, SequenceSource
from .files import replacing
from .metrics import METRICS, Row
from .models import SequenceModel


@torch.no_grad()
def evaluate(
    model: SequenceModel,
    sequences: FixedSequences,
    settings: EvaluationSettings,
    show: Callable[[int], object] = lambda done: None,
    training: Callable[[], SequenceSource] | None = None,
) -> list[Row]:
    """Measure every metric that applies to the model and the source.

    The same model gives the same figures every time: the noise is seeded.

    Args:
        model: the model, on the device of the sequences.
        sequences: what to evaluate it on.
        settings: how.
        show: called with the number of batches that are done.
        training: opens the training split, for metrics that are fitted to it; without it they leave out what they need
            it for.

    Raises:
        ValueError: the likelihood of the model is not one of such images.

    """
    source, device = sequences.source, sequences.source.device
    chosen = [metric for metric in METRICS.values() if metric.applies(model, source)]
    metrics = [metric.build(model, source, settings).to(device) for metric in chosen]
    model.eval()
    model.likelihood.check(sequences.batches[0].images)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for metric in metrics:
            if metric.fits and training is not None:
                metric.fit(model, training())
        torch.manual_seed(EVALUATION_SEED)
        for done, batch in enumerate(sequences.batches, 1):
            elbo = model(batch)
            for metric in metrics:
                metric.measure(model, batch, elbo)
            show(done)
    return [row for metric in metrics for row in metric.rows()]


def table(rows: list[Row], title: str) -> Table:
    """Lay the rows out as a table for the terminal."""
    result = Table("metric", title=Text(title))
    for column in ("value", "chance"):
        result.add_column(column, justify="right")
    result.add_column("unit")
    for row in rows:
        numbers = [f"{x:,.{row.digits}f}" for x in (row.value, row.chance)]
        if math.isnan(row.chance) and math.isfinite(row.value):  # of what no model could get by chance
            numbers[1] = ""
        result.add_row(Text(row.label), *numbers, Text(row.note or row.unit))
    return result


def save(rows: list[Row], sequences: int, path: Path) -> None:
    """Write the rows as `to_json` does; at once or not at all."""
    with replacing(path) as partial:
        partial.write_text(to_json(rows, sequences) + "\n")


def to_json(rows: list[Row], sequences: int) -> str:
    """Return the rows as JSON, which has null for NaN, beside the number of sequences that they are of."""
    metrics = [{_NAMES.get(name, name): None if x != x else x for name, x in row._asdict().items()} for row in rows]
    for row in metrics:
        if not row["note"]:
            del row["note"]
    return json.dumps({"sequences": sequences, "metrics": metrics}, indent=2)


def load(path: Path) -> list[Row]:
    """Read the rows that `save` wrote, now or in older versions.

    Raises:
        ValueError: the file holds something else.

    """
    try:
        return [_row(values) for values in json.loads(path.read_text())["metrics"]]
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no evaluation: {error!r}") from error


_MOST_DIGITS = 20
_NAMES = {"label": "metric"}  # what a file calls a field of a row


def _row(values: dict) -> Row:
    numbers = {name: math.nan if values[name] is None else _number(values[name]) for name in ("value", "chance")}
    label, unit = _text(values["metric"]), _text(values["unit"])
    if "key" not in values:
        return Row(*_older_key(label), label, **numbers, unit=unit, digits=_OLDER_DIGITS.get(label.split()[0], 1))
    part, digits = values["part"], values["digits"]
    if type(digits) is not int or not 0 <= digits <= _MOST_DIGITS:
        raise ValueError(f"digits of {label} are {digits!r}")
    part = None if part is None else _text(part)
    key, note = _text(values["key"]), _text(values.get("note", ""))
    return Row(key, part, label, **numbers, unit=unit, digits=digits, note=note)


def _number(x: object) -> float:
    if type(x) not in (int, float):
        raise TypeError(f"{x!r} is no number")
    return float(x)


def _text(x: object) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{x!r} is no text")
    return x


# Files of older versions know metrics by their labels alone.
_OLDER_KEYS = {
    "ELBO": ("elbo", None),
    "log p(x|t)": ("elbo", "log_likelihood"),
    "KL z": ("elbo", "kl_z"),
    "KL u": ("elbo", "kl_u"),
    "log p(x), as published": ("log_likelihood", "published"),
    "log p(x), bound": ("log_likelihood", "bound"),
    "E_eq": ("equivariance_error", None),
}
_OLDER_DIGITS = {"E_eq": 0, "CapCorr": 2}


def _older_key(label: str) -> tuple[str, str | None]:
    if label.startswith("CapCorr "):
        return "capcorr", label.removeprefix("CapCorr ")
    return _OLDER_KEYS[label.rpartition(", ")[0] if label.endswith(" samples") else label]
