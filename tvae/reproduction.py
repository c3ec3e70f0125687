"""Make a table or figure of the paper again: train what is missing, evaluate it, write the table, draw the figure.

Each model and seed has a run directory of its own, `RUNS/PRESET/BUDGET/seed-N`. What is finished is never done again,
and what was interrupted goes on from its last checkpoint to the same result, so that the same command can be stopped,
killed and given again at any time.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import evaluation, figures
from .data import SequenceStream
from .evaluation import EVALUATION_SEED, FixedSequences, Row
from .paper import BOUND, LOG_LIKELIHOOD, Exhibit
from .presets import PRESETS, Config, coherence_length
from .run import Run, RunError
from .training import train, untrained_model

SMALL_STEPS = 100  # twelve models, the most a target has, in 7 minutes on one CPU core
SMALL_SEQUENCES = 200
MOST_WORKERS = 8
_REPORTED = ("log p(x),", "E_eq", "CapCorr")  # how the metrics begin that tables report
_SHORT = {LOG_LIKELIHOOD: "log p(x), published", BOUND: "log p(x), bound"}
_BLOCK = r"(<!-- reproduce: {name} -->\n).*?(<!-- end -->)"


@dataclass(frozen=True)
class Job:
    """One run of an exhibit: a model of it with one seed."""

    preset: str
    path: Path
    config: Config

    @property
    def untrained_file(self) -> Path:
        """The metrics of the same model before training."""
        return self.path / "untrained.json"

    @property
    def finished(self) -> bool:
        """Whether nothing remains to be done."""
        return Run(self.path, self.config).evaluation_file.exists() and self.untrained_file.exists()


def budgeted(config: Config, budget: str) -> tuple[str, Config]:
    """The budget's name as a folder, and the configuration with its training steps.

    Args:
        config: a configuration with all of the paper's steps.
        budget: "full"; "small", for a quick look, which also evaluates on fewer sequences; a fraction of the paper's
            steps, above 0 and at most 1; or a number of steps, at least 2.

    Raises:
        ValueError: the budget is none of these.

    """
    if budget == "small":
        sequences = min(SMALL_SEQUENCES, config.evaluation_sequences)
        return "small", replace(config, steps=SMALL_STEPS, evaluation_sequences=sequences)
    try:
        number = 1.0 if budget == "full" else float(budget)
    except ValueError:
        number = math.nan
    if not (0 < number <= 1 or (number >= 2 and number.is_integer())):
        raise ValueError(
            "--budget must be small, full, a fraction of the paper's steps (0 to 1) or a number of steps (from 2); "
            f"got {budget!r}"
        )
    steps = int(number) if number > 1 else max(1, round(number * config.steps))
    return f"{steps}-steps", replace(config, steps=steps)


def plan(exhibit: Exhibit, seeds: int, budget: str, data_dir: Path | None, runs: Path) -> list[Job]:
    """The runs that an exhibit needs, all models with the first seed first.

    Raises:
        ValueError: the budget is unknown, or there are no seeds.
        RunError: an existing run was made with other settings.
        DataError: data is missing or damaged.

    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    jobs = []
    for seed in range(seeds):
        for preset in exhibit.models:
            config = PRESETS[preset].config
            folder = None if config.data == "sprites" else data_dir
            name, config = budgeted(replace(config, seed=seed, data_dir=folder), budget)
            jobs.append(Job(preset, runs / preset / name / f"seed-{seed}", config))
    for job in jobs:
        _check_settings(job)
    missing = [job.config for job in jobs if not job.finished]
    for config in {(config.data, config.evaluation_data): config for config in missing}.values():
        SequenceStream(config.open_source("train"), config.batch_size, config.seed)
        config.open_source("test")
    return jobs


def _check_settings(job: Job) -> None:
    """Refuse a run that was made with other settings, but for the place of the data."""
    if (job.path / "config.json").exists():
        found = replace(Run.open(job.path).config, data_dir=job.config.data_dir)
        names = [x.name for x in fields(Config) if getattr(found, x.name) != getattr(job.config, x.name)]
        if names:
            found, wanted = ({name: getattr(config, name) for name in names} for config in (found, job.config))
            raise RunError(f"{job.path} was made with {found}, not {wanted}; choose another --runs")


def carry_out(job: Job, device: str, show_progress: bool = False) -> bool:
    """Train and evaluate what is missing of one run.

    Returns:
        True when it is finished, False when training was interrupted and its state saved.

    Raises:
        RunError: training cannot go on, or another process is at work in the run.

    """
    if not (job.path / "config.json").exists():
        Run.create(job.path, job.config)
    run = Run(job.path, job.config)
    try:
        with FileLock(job.path / "lock", timeout=0):
            if not run.model_file.exists() and not train(run, device, show_progress):
                return False
            if not job.finished:
                _evaluate(job, run, torch.device(device))
    except Timeout:
        raise RunError(f"another process is at work in {job.path}; wait for it or stop it") from None
    return True


def _evaluate(job: Job, run: Run, device: torch.device) -> None:
    config = job.config
    source = config.open_source("test", device)
    sequences = FixedSequences.of(source, config.evaluation_sequences, config.batch_size)
    untrained = untrained_model(config, source).to(device)
    for model, file in ((untrained, job.untrained_file), (run.load_model(device), run.evaluation_file)):
        rows = evaluation.evaluate(model, sequences, config.importance_samples)
        evaluation.save(rows, config.evaluation_sequences, file)


def carry_out_all(jobs: list[Job], device: str, workers: int | None, console: Console) -> bool:
    """Carry out all jobs that are not finished, several at once.

    Args:
        jobs: the runs.
        device: "cpu" or "cuda".
        workers: how many at once; None is one for each core, and `MOST_WORKERS` at most.
        console: where to show progress.

    Returns:
        False when it was interrupted; what was done is saved.

    """
    missing = [job for job in jobs if not job.finished]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them finished before")
    if workers is None:
        workers = min(os.cpu_count() or 1, MOST_WORKERS)
    workers = min(workers, len(missing))
    if workers > 1:
        return _carry_out_at_once(missing, device, workers, console)
    for number, job in enumerate(missing, 1):
        console.print(f"{job.preset}, seed {job.config.seed} ({number} of {len(missing)})")
        if not carry_out(job, device, show_progress=True):
            return False
    return True


def _carry_out_at_once(jobs: list[Job], device: str, workers: int, console: Console) -> bool:
    threads = max(1, (os.cpu_count() or 1) // workers)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    # Spawned and not forked: a forked process can use neither the GPU nor OpenMP's threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_follow_parent, initargs=(threads,))
    with pool, Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=sum(job.config.steps for job in jobs))
        waiting, running = list(jobs), set()
        try:
            while waiting or running:
                # No more than are at work: the pool would start what it holds even after an interruption.
                while waiting and len(running) < workers:
                    running.add(_submitted(pool, waiting.pop(0), device))
                done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                if not all(future.result() for future in done):
                    raise KeyboardInterrupt
                finished = f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs finished"
                progress.update(task, completed=sum(map(_steps_done, jobs)), description=finished)
        except BaseException as error:
            _stop(running)
            if isinstance(error, BrokenProcessPool):
                raise RunError("a run's process has died, of too little memory perhaps; try fewer --jobs") from error
            if not isinstance(error, KeyboardInterrupt):
                raise
            return False
    return True


def _submitted(pool: ProcessPoolExecutor, job: Job, device: str) -> Future:
    """The run, given to a worker. A new one inherits that it ignores interruptions, however long it takes to start."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(carry_out, job, device)
    finally:
        signal.signal(signal.SIGINT, handler)


def _stop(running: set[Future]) -> None:
    """Interrupt the runs at work until each has saved its state: one that still starts does not listen yet."""
    while running:
        for worker in active_children():
            os.kill(worker.pid, signal.SIGINT)
        _, running = wait(running, timeout=1)


def _follow_parent(threads: int) -> None:
    """Make a worker end when its parent does, even by a kill."""
    torch.set_num_threads(threads)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _steps_done(job: Job) -> int:
    """The last step in a run's log."""
    try:
        with (job.path / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
            return int(file.read().splitlines()[-1].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass(frozen=True)
class Line:
    """One metric of one model: what the paper prints and what the seeds gave, trained and untrained."""

    metric: str
    preset: str
    model: str
    L: str
    K: str
    weights: str
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


def collect(exhibit: Exhibit, jobs: list[Job]) -> Results:
    """The table of an exhibit from its finished runs: by metric, then by model."""
    lines = []
    for preset, printed in exhibit.models.items():
        runs = [job for job in jobs if job.preset == preset]
        trained = [_reported(Run(job.path, job.config).evaluation_file) for job in runs]
        untrained = [_reported(job.untrained_file) for job in runs]
        for metric, row in trained[0].items():
            lines.append(
                Line(
                    metric,
                    preset,
                    *_in_the_papers_terms(runs[0].config),
                    paper=printed.get(metric),
                    ours=tuple(rows[metric].value for rows in trained),
                    chance=row.chance,
                    untrained=tuple(rows[metric].value for rows in untrained),
                )
            )
    order = list(dict.fromkeys(line.metric for line in lines))
    lines.sort(key=lambda line: order.index(line.metric))  # a stable sort: models stay in the paper's order
    return Results(_title(exhibit, jobs), _note(jobs), lines)


def _reported(file: Path) -> dict[str, Row]:
    return {row.metric: row for row in evaluation.load(file) if row.metric.startswith(_REPORTED)}


def _in_the_papers_terms(config: Config) -> tuple[str, str, str, str]:
    """Model, L, K and weights."""
    model = {"tvae": "TVAE", "bubblevae": "BubbleVAE", "vae": "VAE"}[config.model]
    if config.model == "vae":
        return model, "", "", config.weights
    return model, str(coherence_length(config)), str(config.neighborhood.capsule_window), config.weights


def _title(exhibit: Exhibit, jobs: list[Job]) -> str:
    """The exhibit's title, with the data where it is not the paper's and the budget where it is not all of it."""
    title = exhibit.title
    if exhibit.has_sprites:
        title += ", here on sprites drawn in the manner of dSprites"
    budgets = {(job.config.steps, PRESETS[job.preset].config.steps) for job in jobs}
    reduced = " and ".join(f"{steps:,} of {full:,}" for steps, full in sorted(budgets) if steps < full)
    return title + (f" (reduced budget: {reduced} training steps)" if reduced else "")


def _note(jobs: list[Job]) -> str:
    seeds = len({job.config.seed for job in jobs})
    mean = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    sequences = " and ".join(f"{n:,}" for n in sorted({job.config.evaluation_sequences for job in jobs}))
    return (
        f"Ours: {mean}, evaluated on {sequences} sequences of the fixed test set, log p(x) in nats a frame from 10 "
        "samples. Chance: a model that knows nothing of the individual frame. Untrained: the same models before "
        "training."
    )


def to_markdown(results: Results) -> str:
    """The table as Markdown, under its title in bold."""
    rows = [
        "| metric | model | L | K | weights | paper | ours | chance | untrained |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    above = None
    for line in results.lines:
        metric, above = "" if line.metric == above else _SHORT.get(line.metric, line.metric), line.metric
        digits = evaluation.digits(line.metric)
        paper = "" if line.paper is None else _plus_minus(*line.paper, digits)
        ours, untrained = (_plus_minus(*mean_and_std(values), digits) for values in (line.ours, line.untrained))
        names = (metric, line.model, line.L, line.K, line.weights)
        rows.append("| " + " | ".join((*names, paper, ours, f"{line.chance:,.{digits}f}", untrained)) + " |")
    return f"**{results.title}**\n\n" + "\n".join(rows) + f"\n\n{results.note}\n"


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _plus_minus(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:,.{digits}f}" + ("" if std is None else f" ± {std:,.{digits}f}")


def write(results: Results, name: str, folder: Path) -> list[Path]:
    """Write the table as NAME.md, NAME.csv and NAME.json; CSV and JSON hold all digits, JSON every seed's value too."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, table, values = (folder / f"{name}.{ending}" for ending in ("md", "csv", "json"))
    markdown.write_text(to_markdown(results), encoding="utf-8")
    rows = [_columns(line) for line in results.lines]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for row, line in zip(rows, results.lines, strict=True):
        row |= {"ours by seed": line.ours, "untrained by seed": line.untrained}
    content = {"title": results.title, "note": results.note, "rows": _without_nan(rows)}
    values.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [markdown, table, values]


def _columns(line: Line) -> dict:
    """A line with means and standard deviations in columns of their own."""
    columns = {name: getattr(line, name) for name in ("metric", "preset", "model", "L", "K", "weights")}
    columns["paper"], columns["paper std"] = line.paper or (None, None)
    columns["ours"], columns["ours std"] = mean_and_std(line.ours)
    columns["chance"] = line.chance
    columns["untrained"], columns["untrained std"] = mean_and_std(line.untrained)
    return columns


def _without_nan(x):
    """The same with None for NaN, which JSON does not have."""
    if isinstance(x, dict):
        return {key: _without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def draw(name: str, results: Results, jobs: list[Job], device: torch.device) -> Figure | None:
    """The figure of an exhibit, of the models with the first seed; None for a table."""
    if name.startswith("table"):
        return None
    if name in ("fig5", "capcorr"):
        return figures.capcorr_against_coherence(*capcorr_series(results.lines))
    jobs = [job for job in jobs if job.config.seed == 0]
    if name == "covariance":
        return figures.covariance(dict(_correlation(job, device) for job in jobs))
    if name == "fig4":
        return figures.draw_panels([_panels(job, device, 1, f"{job.config.data}: ") for job in jobs])
    model, source = _model_and_source(jobs[0], device)
    if name == "fig3":
        return figures.torus_map(model, FixedSequences.of(source, len(source), jobs[0].config.batch_size).batches)
    return figures.traversals(model, source, each={"fig1": 1, "figB4": 6}.get(name, 12 // len(source.transformations)))


def _model_and_source(job: Job, device: torch.device):
    return Run(job.path, job.config).load_model(device), job.config.open_source("test", device)


def _panels(job: Job, device: torch.device, each: int, title: str) -> list[figures.Panel]:
    return figures.traversal_panels(*_model_and_source(job, device), each, title)


def _correlation(job: Job, device: torch.device) -> tuple[str, torch.Tensor]:
    model, source = _model_and_source(job, device)
    batches = FixedSequences.of(source, job.config.evaluation_sequences, job.config.batch_size).batches
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVALUATION_SEED)
        return PRESETS[job.preset].description, figures.squared_activation_correlation(model, batches)


def capcorr_series(lines: list[Line]) -> tuple[dict[str, list[figures.Series]], float]:
    """Average CapCorr over all transformations against L by model, of ours and the paper's; and chance."""
    lines = [line for line in lines if line.metric.startswith("CapCorr")]
    models = dict.fromkeys(line.model for line in lines)
    panels = {
        "ours": [_series(model, "ours", lines) for model in models]
        + [_series(model, "untrained", lines) for model in models],
        "paper": [_series(model, "paper", lines) for model in models],
    }
    return panels, float(np.mean([line.chance for line in lines]))


def _series(model: str, kind: str, lines: list[Line]) -> figures.Series:
    points = {}
    for preset in dict.fromkeys(line.preset for line in lines if line.model == model):
        chosen = [line for line in lines if line.preset == preset]
        points[_number(chosen[0].L)] = _average(chosen, kind)
    order = sorted(points)
    means, stds = zip(*(points[L] for L in order), strict=True)
    label = f"{model}, untrained" if kind == "untrained" else model
    return figures.Series(label, order, list(means), [std or 0.0 for std in stds])


def _average(lines: list[Line], kind: str) -> tuple[float, float | None]:
    """Mean over the transformations, and its standard deviation over the seeds (unknown for what is printed)."""
    if kind == "paper":
        return float(np.mean([line.paper[0] for line in lines])), None
    return mean_and_std(np.mean([getattr(line, kind) for line in lines], axis=0))


def _number(fraction: str) -> float:
    """ "5/36" as a number; a model without L has none: 0."""
    numerator, _, denominator = (fraction or "0").partition("/")
    return int(numerator) / int(denominator or 1)


def read_block(page: Path, name: str) -> tuple[str, re.Match]:
    """A Markdown page, and where `<!-- reproduce: NAME -->` ... `<!-- end -->` lies in it.

    Raises:
        ValueError: the page is missing or has no such block.

    """
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    block = re.search(_BLOCK.format(name=re.escape(name)), text, re.DOTALL)
    if block is None:
        raise ValueError(f"{page} has no block for the result: the lines <!-- reproduce: {name} --> and <!-- end -->")
    return text, block


def include(page: Path, name: str, table: Path, figure: Path | None) -> None:
    """Put a table and its figure into their block of a Markdown page; raises as `read_block`."""
    text, block = read_block(page, name)
    content = table.read_text(encoding="utf-8")
    if figure is not None:
        content = f"![{content.split('**')[1]}]({os.path.relpath(figure, page.parent)})\n\n{content}"
    page.write_text(f"{text[: block.end(1)]}\n{content}\n{text[block.start(2) :]}", encoding="utf-8")
