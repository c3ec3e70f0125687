"""The runs behind a table or figure: which they are, and training and evaluating what is missing of them.

Each model and seed has a run directory of its own, `RUNS/PRESET/BUDGET/seed-N`. What is finished is never done again,
and what was interrupted goes on from its last checkpoint to the same result, so that the same command can be stopped,
killed and given again at any time.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import torch
from rich.console import Console

from .. import evaluation
from ..config import Config, Sources
from ..data import SOURCES, FixedSequences, SequenceStream
from ..presets import PRESETS
from ..progress import progress
from ..training import Run, RunError, train, untrained_model

SMALL_STEPS = 100  # twelve models, the most a target has, in 7 minutes on one CPU core
SMALL_SEQUENCES = 200
MOST_WORKERS = 8
LONGEST_ROW = 10_000  # bytes of a log, far more than any model has terms


@dataclass(frozen=True)
class Job:
    """One run of an exhibit: a model of it with one seed."""

    preset: str
    path: Path
    config: Config

    @property
    def untrained_file(self) -> Path:
        """Return where the metrics of the same model before training are."""
        return self.path / "untrained.json"

    @property
    def finished(self) -> bool:
        """Say whether nothing remains to be done."""
        return Run(self.path, self.config).evaluation_file.exists() and self.untrained_file.exists()


def budgeted(config: Config, budget: str) -> tuple[str, Config]:
    """Return the budget's name as a folder, and the configuration with its training steps.

    Args:
        config: a configuration with all of the paper's steps.
        budget: "full"; "small", for a quick look, which also evaluates on fewer sequences; a fraction of the paper's
            steps, above 0 and at most 1; or a number of steps, at least 2.

    Raises:
        ValueError: the budget is none of these.

    """
    if budget == "small":
        sequences = min(SMALL_SEQUENCES, config.evaluation.sequences)
        evaluation = replace(config.evaluation, sequences=sequences)
        return "small", replace(config, training=replace(config.training, steps=SMALL_STEPS), evaluation=evaluation)
    try:
        number = 1.0 if budget == "full" else float(budget)
    except ValueError:
        number = math.nan
    if not (0 < number <= 1 or (number >= 2 and number.is_integer())):
        raise ValueError(
            "--budget must be small, full, a fraction of the paper's steps (0 to 1) or a number of steps (from 2); "
            f"got {budget!r}"
        )
    steps = int(number) if number > 1 else max(1, round(number * config.training.steps))
    return f"{steps}-steps", replace(config, training=replace(config.training, steps=steps))


def plan(presets: Iterable[str], seeds: int, budget: str, data_dir: Path | None, runs: Path) -> list[Job]:
    """List the runs that an exhibit needs, all models with the first seed first.

    Raises:
        ValueError: the budget is unknown, or there are no seeds.
        RunError: an existing run was made with other settings.
        DataError: data is missing or damaged.

    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")
    jobs = []
    for seed in range(seeds):
        for preset in presets:
            config = PRESETS[preset].config
            folder = None if SOURCES[config.data.name].files is None else data_dir
            config = replace(config, data=replace(config.data, folder=folder))
            name, config = budgeted(replace(config, training=replace(config.training, seed=seed)), budget)
            jobs.append(Job(preset, runs / preset / name / f"seed-{seed}", config))
    for job in jobs:
        _check_settings(job)
    missing = [job.config for job in jobs if not job.finished]
    for config in {config.data: config for config in missing}.values():
        SequenceStream(config.open_source("train"), config.training.batch_size, config.training.seed)
        config.open_source("test")
    return jobs


def _check_settings(job: Job) -> None:
    """Refuse a run that was made with other settings, but for the place of the data."""
    if (job.path / "config.json").exists():
        found = Run.open(job.path).config
        found = replace(found, data=replace(found.data, folder=job.config.data.folder))
        was, wanted = ({"model": x.model_class.name, **_flat(x)} for x in (found, job.config))
        names = [name for name in {**was, **wanted} if was.get(name) != wanted.get(name)]
        if names:
            was, wanted = ({name: x[name] for name in names if name in x} for x in (was, wanted))
            raise RunError(f"{job.path} was made with {was}, not {wanted}; choose another --runs")


def _flat(config: Config) -> dict[str, object]:
    """Return all settings by their names."""
    return {name: x for part in fields(Config) for name, x in vars(getattr(config, part.name)).items()}


def carry_out(job: Job, device: torch.device, show_progress: bool = False) -> bool:
    """Train and evaluate what is missing of one run.

    Returns:
        True when it is finished, False when training was interrupted and its state saved.

    Raises:
        RunError: training cannot go on, or another process is at work in the run.

    """
    if not (job.path / "config.json").exists():
        Run.create(job.path, job.config)
    run = Run(job.path, job.config)
    with run.lock():
        sources = Sources(job.config, device)
        if not run.model_file.exists() and train(run, device, show_progress, sources=sources) is None:
            return False
        if not job.finished:
            _evaluate(job, run, sources, show_progress)
    return True


def _evaluate(job: Job, run: Run, sources: Sources, show_progress: bool) -> None:
    """Evaluate the model untrained and trained."""
    config, source = job.config, sources["test"]
    settings = config.evaluation
    sequences = FixedSequences.take(source, settings.sequences, config.training.batch_size)
    untrained = untrained_model(config, source).to(source.device)
    batches = len(sequences.batches)
    with progress("evaluating", 2 * batches, visible=show_progress) as show:
        for before, model, file in (
            (0, untrained, job.untrained_file),
            (batches, run.load_model(source.device), run.evaluation_file),
        ):
            shown = partial(_shown, show, before)
            rows = evaluation.evaluate(model, sequences, settings, shown, lambda: sources["train"])
            with run.writing():
                evaluation.save(rows, settings.sequences, file)


def _shown(show: Callable[[int], object], before: int, done: int) -> None:
    show(before + done)


def carry_out_all(jobs: list[Job], device: torch.device, workers: int | None, console: Console) -> bool:
    """Carry out all jobs that are not finished, several at once.

    Args:
        jobs: the runs.
        device: where.
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
        console.print(f"{job.preset}, seed {job.config.training.seed} ({number} of {len(missing)})", markup=False)
        if not carry_out(job, device, show_progress=True):
            return False
    return True


def _carry_out_at_once(jobs: list[Job], device: torch.device, workers: int, console: Console) -> bool:
    threads = max(1, (os.cpu_count() or 1) // workers)
    total = sum(job.config.training.steps for job in jobs)
    # Spawned and not forked: a forked process can use neither the GPU nor OpenMP's threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_follow_parent, initargs=(threads,))
    with pool, progress("training", total, sum(map(_steps_done, jobs)), console) as show:
        waiting, running = list(jobs), set()
        try:
            while waiting or running:
                # No more than are at work: the pool would start what it holds even after an interruption.
                while waiting and len(running) < workers:
                    running.add(_submitted(pool, waiting.pop(0), device))
                ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                if not all(future.result() for future in ended):
                    raise KeyboardInterrupt
                done = sum(map(_steps_done, jobs))
                finished = f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs finished"
                show(done, finished + (", evaluating" if running and done >= total else ""))
        except BaseException as error:
            _stop(running)
            if isinstance(error, BrokenProcessPool):
                raise RunError("a run's process has died, of too little memory perhaps; try fewer --jobs") from error
            if not isinstance(error, KeyboardInterrupt):
                raise
            return False
    return True


def _submitted(pool: ProcessPoolExecutor, job: Job, device: torch.device) -> Future:
    """Give the run to a worker. A new one inherits that it ignores interruptions, however long it takes to start."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        return pool.submit(carry_out, job, device)
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
    """Return the last step in a run's log, of its whole rows alone."""
    try:
        with (job.path / "metrics.csv").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * LONGEST_ROW))
            _, *rows, _ = file.read().split(b"\n")  # the first may be the end of a row, the last the beginning of one
            return int(rows[-1].split(b",")[0])
    except (OSError, ValueError, IndexError):
        return 0
