"""Tables of an exhibit from its finished runs: as Markdown, CSV and JSON, and inside of a page."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np

from .. import evaluation
from ..config import Config
from ..files import replacing, write_text
from ..metrics import Row
from ..presets import PRESETS, coherence_length
from ..training import Run, RunError
from .runs import Job

Metric = tuple[str, str | None]  # key and part
Printed = dict[Metric, tuple[float, float]]  # by metric: mean and standard deviation
LOG_LIKELIHOOD: Metric = ("log_likelihood", "published")
BOUND: Metric = ("log_likelihood", "bound")
EQUIVARIANCE_ERROR: Metric = ("equivariance_error", None)
CAPCORR = "capcorr"
REPORTED = ("log_likelihood", "equivariance_error", CAPCORR)  # keys of the metrics in the paper's tables
_SHORT = {LOG_LIKELIHOOD: "log p(x), published", BOUND: "log p(x), bound"}
_BLOCK = r"(<!-- reproduce: {name} -->\n).*?(<!-- end -->)"


@dataclass(frozen=True)
class Line:
    """One metric of one model: what the paper prints and what the seeds gave, trained and untrained."""

    key: str  # of the metric
    part: str | None
    metric: str  # for people
    digits: int
    preset: str
    model: str
    L: Fraction | None
    K: str
    weights: str
    description: str  # of the model, and of its data where the table has several
    paper: tuple[float, float] | None
    ours: tuple[float, ...]
    chance: float
    untrained: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """The table of an exhibit."""

    title: str
    note: str
    lines: list[Line]


def collect(
    title: str, models: dict[str, Printed], jobs: list[Job], reported: Sequence[str | Metric] = REPORTED, note: str = ""
) -> Results:
    """Make the table of an exhibit from its finished runs: by metric, then by model.

    Args:
        title: of the exhibit.
        models: the numbers that the paper prints of each model, by preset.
        jobs: the runs.
        reported: what to report: keys of metrics, with all their parts, or single parts.
        note: what else stands below the table.

    Raises:
        RunError: the evaluations do not belong together.
        ValueError: a file holds no evaluation.

    """
    lines = []
    for preset, printed in models.items():
        runs = [job for job in jobs if job.preset == preset]
        trained = [_reported(Run(job.path, job.config).evaluation_file, reported) for job in runs]
        untrained = [_reported(job.untrained_file, reported) for job in runs]
        if len({frozenset(rows) for rows in trained + untrained}) > 1:
            raise RunError(f"the evaluations of {preset} have different metrics; delete them to do them again")
        for metric, row in trained[0].items():
            lines.append(
                Line(
                    row.key,
                    row.part,
                    row.label,
                    row.digits,
                    preset,
                    *_in_the_papers_terms(runs[0].config),
                    _description(preset, models),
                    paper=printed.get(metric),
                    ours=tuple(rows[metric].value for rows in trained),
                    chance=row.chance,
                    untrained=tuple(rows[metric].value for rows in untrained),
                )
            )
    if not lines:
        raise RunError(f"the runs have none of the metrics {', '.join(map(str, reported))}")
    order = list(dict.fromkeys((line.key, line.part) for line in lines))
    lines.sort(key=lambda line: order.index((line.key, line.part)))  # a stable sort: models stay in the paper's order
    return Results(_title(title, jobs), " ".join(filter(None, (_note(jobs), note))), lines)


def _reported(file: Path, reported: Sequence[str | Metric]) -> dict[Metric, Row]:
    rows = {(row.key, row.part): row for row in evaluation.load(file)}
    return {metric: row for metric, row in rows.items() if row.key in reported or metric in reported}


def _in_the_papers_terms(config: Config) -> tuple[str, Fraction | None, str, str]:
    """Return model, L, K and weights."""
    name, length = config.model_class.__name__, coherence_length(config.model)
    if length is None:
        return name, None, "", config.model.weights
    return name, length, str(config.model.neighborhood.capsule_window), config.model.weights


def _description(preset: str, models: Iterable[str]) -> str:
    """Return what a preset is, and of which data it is where there are models of several."""
    data = PRESETS[preset].config.data
    several = len({PRESETS[name].config.data.name for name in models}) > 1
    return f"{data.name}: {PRESETS[preset].description}" if several else PRESETS[preset].description


def _title(title: str, jobs: list[Job]) -> str:
    """Return the exhibit's title, with the data where it is not the paper's and the budget where it is not all."""
    if any(job.config.data.name == "sprites" for job in jobs):
        title += ", here on sprites drawn in the manner of dSprites"
    budgets = {(job.config.training.steps, PRESETS[job.preset].config.training.steps) for job in jobs}
    reduced = " and ".join(f"{steps:,} of {full:,}" for steps, full in sorted(budgets) if steps < full)
    return title + (f" (reduced budget: {reduced} training steps)" if reduced else "")


def _note(jobs: list[Job]) -> str:
    seeds = len({job.config.training.seed for job in jobs})
    mean = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    sequences = " and ".join(f"{n:,}" for n in sorted({job.config.evaluation.sequences for job in jobs}))
    samples = " and ".join(str(n) for n in sorted({job.config.evaluation.importance_samples for job in jobs}))
    return (
        f"Ours: {mean}, evaluated on {sequences} sequences of the fixed test set, log p(x) in nats a frame from "
        f"{samples} samples. Chance: a model that knows nothing of the individual frame. Untrained: the same models "
        "before training."
    )


def to_markdown(results: Results) -> str:
    """Write the table as Markdown, under its title in bold: in the paper's terms, if it prints any of the numbers."""
    printed = any(line.paper is not None for line in results.lines)
    heads = ["model", "L", "K", "weights", "paper"] if printed else ["model"]
    heads = ["metric", *heads, "ours", "chance", "untrained"]
    rules = ["---:" if head in ("paper", "ours", "chance", "untrained") else "---" for head in heads]
    rows = ["| " + " | ".join(heads) + " |", "|" + "|".join(rules) + "|"]
    above = None
    for line in results.lines if printed else _alike_once(results.lines):
        label = _SHORT.get((line.key, line.part), line.metric)
        metric, above, digits = "" if label == above else label, label, line.digits
        ours, untrained = (_plus_minus(*mean_and_std(values), digits) for values in (line.ours, line.untrained))
        paper = "" if line.paper is None else _plus_minus(*line.paper, digits)
        names = (line.model, _text(line.L), line.K, line.weights, paper) if printed else (line.description,)
        rows.append("| " + " | ".join((metric, *names, ours, f"{line.chance:,.{digits}f}", untrained)) + " |")
    return f"**{results.title}**\n\n" + "\n".join(rows) + f"\n\n{results.note}\n"


def _alike_once(lines: Sequence[Line]) -> Iterator[Line]:
    """Give what is the same for all models of the same data, such as the levels of a source, once for all."""
    for _, group in groupby(lines, lambda line: (line.key, line.part, _data_of(line))):
        first, *others = group
        numbers = (first.ours, first.chance, first.untrained)
        if others and all((line.ours, line.chance, line.untrained) == numbers for line in others):
            yield replace(first, description=f"{_data_of(first)}all")
        else:
            yield from (first, *others)


def _data_of(line: Line) -> str:
    """Return what a description says of the data before it describes the model."""
    data, colon, _ = line.description.rpartition(": ")
    return data + colon


def _text(length: Fraction | None) -> str:
    return "" if length is None else str(length)


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation; None for that of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _plus_minus(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:,.{digits}f}" + ("" if std is None else f" ± {std:,.{digits}f}")


def write(results: Results, name: str, folder: Path) -> list[Path]:
    """Write the table as NAME.md, NAME.csv and NAME.json; CSV and JSON hold all digits, JSON every seed's value too."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, table, values = (folder / f"{name}.{ending}" for ending in ("md", "csv", "json"))
    write_text(markdown, to_markdown(results))
    rows = [_columns(line) for line in results.lines]
    with replacing(table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for row, line in zip(rows, results.lines, strict=True):
        row |= {"ours by seed": line.ours, "untrained by seed": line.untrained}
    content = {"title": results.title, "note": results.note, "rows": _without_nan(rows)}
    write_text(values, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return [markdown, table, values]


def _columns(line: Line) -> dict:
    """Lay a line out with means and standard deviations in columns of their own."""
    names = ("key", "part", "metric", "preset", "description", "model", "L", "K", "weights")
    columns = {name: getattr(line, name) for name in names}
    columns["L"] = _text(line.L)
    columns["paper"], columns["paper std"] = line.paper or (None, None)
    columns["ours"], columns["ours std"] = mean_and_std(line.ours)
    columns["chance"] = line.chance
    columns["untrained"], columns["untrained std"] = mean_and_std(line.untrained)
    return columns


def _without_nan(x):
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def read_block(page: Path, name: str) -> tuple[str, re.Match]:
    """Return a Markdown page, and where `<!-- reproduce: NAME -->` ... `<!-- end -->` lies in it.

    Raises:
        ValueError: the page is missing or has no such block.

    """
    try:
        text = page.read_text(encoding="utf-8") if page.exists() else ""
    except ValueError as error:
        raise ValueError(f"{page} is not a page of UTF-8 text: {error}") from error
    block = re.search(_BLOCK.format(name=re.escape(name)), text, re.DOTALL)
    if block is None:
        raise ValueError(f"{page} has no block for the result: the lines <!-- reproduce: {name} --> and <!-- end -->")
    return text, block


def include(page: Path, name: str, table: Path, figure: Path | None) -> None:
    """Put a table and its figure into their block of a Markdown page; raises as `read_block`."""
    text, block = read_block(page, name)
    content = table.read_text(encoding="utf-8")
    if figure is not None:
        place = os.path.relpath(figure, page.parent)
        place = f"<{place}>" if re.search(r"[\s()]", place) else place  # which else would end the link
        content = f"![{content.split('**')[1]}]({place})\n\n{content}"
    write_text(page.resolve(), f"{text[: block.end(1)]}\n{content}\n{text[block.start(2) :]}")
