"""The command line: `tvae train`, `tvae evaluate`, `tvae traverse`, `tvae reproduce` and `tvae presets`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from .data import DataError, DSpritesSequences, SequenceStream
from .paper import EXHIBITS, shown_in
from .presets import CACHE, DEFAULT_PRESET, PRESETS, Config, StepKind, check_machine
from .processes import Launched, disconnect
from .run import Run, RunError

# training, evaluation and figures are imported where needed: they take seconds, which help and errors can do without.

USAGE = """\
Topographic VAEs: train them, measure how equivariant their capsules are, look at capsule traversals.

  tvae train [PRESET] [--option ...]   train a model; `tvae train PRESET --help` lists the options
  tvae train --resume RUN              continue an interrupted run
  tvae evaluate RUN                    print the metrics of a trained model beside their chance levels
  tvae traverse RUN                    draw the capsule traversals of a trained model
  tvae reproduce TARGET                make a table or figure of the paper again; without TARGET, list them
  tvae presets                         list the presets
"""

Device = Literal["auto", "cpu", "cuda"]
console = Console()


@dataclass(frozen=True)
class TrainOptions:
    """Train a model, evaluate it and draw its capsule traversals."""

    config: Annotated[Config, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
    run_dir: Path
    """New directory for the run."""
    device: Device = "auto"
    """Where to train."""
    step: StepKind = "eager"
    """How a step is taken, to the same result within rounding: one operation at a time, the model compiled by
    torch.compile, or the whole step as a CUDA graph, which takes a GPU."""


@dataclass(frozen=True)
class ResumeOptions:
    """Continue an interrupted run to the same result as an uninterrupted one."""

    resume: Path
    """Directory of the run."""
    device: Device = "auto"
    """Where to train."""
    step: StepKind = "eager"
    """How a step is taken, as of a new run."""


@dataclass(frozen=True)
class RunOptions:
    """Look at a trained run."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    data_dir: Path | None = None
    """Folder of local data files, if not the one the run was trained with."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class ReproduceOptions:
    """Train what a table or figure of the paper needs, then write the table and draw the figure.

    What is finished is not done again, and what was interrupted goes on: give the same command again.
    """

    target: tyro.conf.Positional[str]
    """Table or figure; `tvae reproduce` lists them."""
    budget: str = "full"
    """Training steps: "full" (the paper's), "small" (a quick look: 100 steps, evaluated on 200 sequences), a fraction
    of the paper's steps, or a number of steps."""
    seeds: int = 1
    """Train every model with the seeds 0 ... N - 1."""
    jobs: int | None = None
    """Runs at once; by default one for each core, and 8 at most."""
    data_dir: Path | None = None
    """Folder of local data files. Without it, what is not in ~/.cache/tvae is downloaded."""
    data: Literal["auto", "sprites", "dsprites"] = "auto"
    """What stands for dSprites: our own sprites, or the real file; by default the real one where it is at hand."""
    device: Device = "auto"
    """Where to compute."""
    runs: Path = Path("runs/reproduce")
    """Folder of the runs, which targets share."""
    output: Path = Path("runs/reproduce")
    """Folder for TARGET.md, TARGET.csv, TARGET.json and TARGET.png."""
    page: Path | None = None
    """Markdown page to include the result in, between the lines <!-- reproduce: TARGET --> and <!-- end -->."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 0 done, 1 an error that is explained in one line, 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "traverse": _traverse,
        "reproduce": _reproduce,
        "presets": _presets,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if arguments[0] not in commands:
            raise ValueError(f"unknown command {arguments[0]!r}; choose from {', '.join(commands)}")
        if arguments[0] != "train" and Launched.find().count > 1:
            raise ValueError(f"torchrun is for `tvae train` alone; run `tvae {arguments[0]}` without it")
        return commands[arguments[0]](arguments[1:])
    except (DataError, RunError, ValueError, OSError) as error:
        print(f"tvae: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tvae: interrupted", file=sys.stderr)
        return 130


def _train(arguments: list[str]) -> int:
    if any(argument.split("=")[0] == "--resume" for argument in arguments):
        options = tyro.cli(ResumeOptions, args=arguments, prog="tvae train")
        run, device = Run.open(options.resume), _device(options.device)
    else:
        named = bool(arguments) and not arguments[0].startswith("-")
        preset = arguments[0] if named else DEFAULT_PRESET
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; `tvae presets` lists them")
        default = TrainOptions(PRESETS[preset].config, run_dir=Path("runs") / preset)
        options = tyro.cli(TrainOptions, args=arguments[named:], default=default, prog=f"tvae train {preset}")
        device = _device(options.device)
        check_machine(options.step, options.config.precision, device, Launched.find().count)
        run = _new_run(options)
    from .training import train

    try:
        finished, status = train(run, device.type, step=options.step), 130
    except SystemExit as terminated:
        finished, status = False, terminated.code
    disconnect()
    if Launched.find().rank > 0:
        return 0 if finished else status
    if not finished:
        console.print(f"Interrupted; the state is saved. Continue with: tvae train --resume {run.path}", soft_wrap=True)
        return status
    _report(run, run.config, device)
    _draw(run, run.config, device)
    return 0


def _new_run(options: TrainOptions) -> Run:
    """Check all that can be checked before anything is written, then make the run directory.

    Of several processes the first one does it; the others wait for it when they connect with it.
    """
    config, launched = options.config, Launched.find()
    if config.data_dir is not None:
        config = replace(config, data_dir=config.data_dir.expanduser().resolve())
    if launched.rank > 0:
        return Run(options.run_dir, config)
    source = config.open_source("train")
    SequenceStream(source, config.batch_size, config.seed, launched.rank, launched.count)
    with torch.device("meta"):
        config.build_model(source.image_shape)
    return Run.create(options.run_dir, config)


def _evaluate(arguments: list[str]) -> int:
    options = tyro.cli(RunOptions, args=arguments, prog="tvae evaluate")
    run = Run.open(options.run)
    _report(run, _with_data(run.config, options.data_dir), _device(options.device))
    return 0


def _traverse(arguments: list[str]) -> int:
    options = tyro.cli(RunOptions, args=arguments, prog="tvae traverse")
    run = Run.open(options.run)
    _draw(run, _with_data(run.config, options.data_dir), _device(options.device))
    return 0


def _reproduce(arguments: list[str]) -> int:
    if not arguments:
        return _targets()
    options = tyro.cli(ReproduceOptions, args=arguments, prog="tvae reproduce")
    if options.target not in EXHIBITS:
        raise ValueError(f"unknown target {options.target!r}; choose from {', '.join(EXHIBITS)}")
    device, data_dir = _device(options.device), options.data_dir and options.data_dir.expanduser().resolve()
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    from . import figures, reproduction

    if options.page is not None:
        reproduction.read_block(options.page, options.target)
    exhibit = EXHIBITS[options.target].with_data(_sprites(options.data, data_dir))
    jobs = reproduction.plan(exhibit, options.seeds, options.budget, data_dir, options.runs)
    if not reproduction.carry_out_all(jobs, device.type, options.jobs, console):
        console.print("Interrupted; the state is saved. Go on with the same command.")
        return 130
    results = reproduction.collect(exhibit, jobs)
    files = reproduction.write(results, options.target, options.output)
    figure, picture = reproduction.draw(options.target, results, jobs, device), None
    if figure is not None:
        picture = options.output / f"{options.target}.png"
        figures.save(figure, picture, results.title)
        files.append(picture)
    if options.page is not None:
        reproduction.include(options.page, options.target, files[0], picture)
    console.print(Markdown(reproduction.to_markdown(results)))
    console.print(" ".join(map(str, files)), soft_wrap=True)
    return 0


def _targets() -> int:
    table = Table("target", "what it is", box=None, pad_edge=False)
    for name, exhibit in EXHIBITS.items():
        table.add_row(name, exhibit.title)
    console.print(table)
    return 0


def _sprites(choice: Literal["auto", "sprites", "dsprites"], data_dir: Path | None) -> str:
    """What stands for dSprites."""
    if choice != "auto":
        return choice
    return "dsprites" if DSpritesSequences.file(data_dir or CACHE / "dsprites").exists() else "sprites"


def _presets(arguments: list[str]) -> int:
    if arguments:
        raise ValueError(f"`tvae presets` takes no arguments, got {' '.join(arguments)}")
    table = Table(Column("preset", no_wrap=True), "model", "shown in", box=None, pad_edge=False)
    for name, preset in PRESETS.items():
        table.add_row(name, preset.description, ", ".join(shown_in(name)))
    console.print(table)
    console.print("\nDATA-MODEL-wW-kK[-OPTION]: W frames (the paper's 2L) and K capsule positions in the window.")
    return 0


def _report(run: Run, config: Config, device: torch.device) -> None:
    """Evaluate the trained model, write the metrics into the run and print them."""
    from . import evaluation

    model = run.load_model(device)
    source = config.open_source("test", device)
    with console.status("evaluating"):
        sequences = evaluation.FixedSequences.of(source, config.evaluation_sequences, config.batch_size)
        rows = evaluation.evaluate(model, sequences, config.importance_samples)
    evaluation.save(rows, config.evaluation_sequences, run.evaluation_file)
    title = f"{run.path}: {config.evaluation_sequences:,} test sequences after {config.steps:,} steps"
    console.print(evaluation.table(rows, title))


def _draw(run: Run, config: Config, device: torch.device) -> None:
    """Draw the capsule traversals, or the torus of a model of still images, into the run and print the path."""
    from . import evaluation, figures

    model, source = run.load_model(device), config.open_source("test", device)
    if source.sequence_length == 1:
        name, path = "most activating images", run.figures / "torus.png"
        figure = figures.torus_map(model, evaluation.FixedSequences.of(source, len(source), config.batch_size).batches)
    else:
        name, path = "capsule traversals", run.figures / "traversals.png"
        figure = figures.traversals(model, source)
    figures.save(figure, path)
    console.print(f"{name}: {path}", soft_wrap=True)


def _with_data(config: Config, data_dir: Path | None) -> Config:
    return config if data_dir is None else replace(config, data_dir=data_dir)


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch finds no such device; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = Launched.find().on_machine
    if name == "cuda" and torch.cuda.device_count() < processes:
        raise ValueError(f"{processes} processes need a GPU each, but there are {torch.cuda.device_count()}")
    return torch.device(name)
