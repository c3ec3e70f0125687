"""The command line: `tvae train`, `tvae evaluate`, `tvae traverse`, `tvae play`, `tvae reproduce` and `tvae presets`.

A file of one's own that registers models, sources, metrics or presets ends with `sys.exit(main())` and is then this
command line with all of these: `python mine.py train ...`.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Union

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Column, Table

from .config import Config, EvaluationSettings, LoggerKind, Sources, StepKind, check_logger, check_run, choices
from .data import (
    CACHE,
    SOURCES,
    DataError,
    FixedSequences,
    SequenceBatch,
    Sequences,
    SequenceSource,
    SequenceStream,
    is_path,
)
from .data.dsprites import DSpritesSequences
from .files import expanded
from .models import MODELS, ModelSettings, SequenceModel, find
from .models.likelihoods import LIKELIHOODS
from .presets import DEFAULT_PRESET, OWN_PRESET, PRESETS
from .progress import phase, progress
from .training.processes import Launched, disconnect, find_device
from .training.run import Run, RunError

# training, evaluation and figures are imported where needed: they take seconds, which help and errors can do without.

DESCRIPTION = """\
Topographic VAEs and their rivals: train them, measure how equivariant their capsules are, look at traversals.

`tvae COMMAND --help` lists the options of a command.

`tvae train PRESET --help` lists those of a preset's model.

`tvae --tyro-print-completion bash` prints completions for the shell."""

COMMANDS = ("train", "evaluate", "traverse", "play", "reproduce", "presets")
_PLAYED = 64  # sequences of the test set on the page of `tvae play`
Device = Literal["auto", "cpu", "cuda"]
console = Console()
_FROM_MODELS = choices(MODELS)
_FROM_PRESETS = lambda default: f"(`tvae presets` lists them; default: {DEFAULT_PRESET})"  # noqa: E731


class UsageError(ValueError):
    """The words of the command line are wrong."""


@dataclass(frozen=True)
class Train:
    """Train a model, evaluate it and draw its capsule traversals."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET", help_behavior_hint=_FROM_PRESETS)]
    """Named configuration, whose settings the options change."""
    config: Annotated[Config, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
    run_dir: Path
    """New directory for the run."""
    model: Annotated[str, tyro.conf.arg(help_behavior_hint=_FROM_MODELS)] = ""
    """Another model in place of the preset's, with options of its own."""
    device: Device = "auto"
    """Where to train."""
    step: StepKind = "eager"
    """How a step is taken, to the same result within rounding: one operation at a time, the model compiled by
    torch.compile, or the whole step as a CUDA graph, which takes a GPU."""
    logger: LoggerKind = "tensorboard"
    """Where the course of training is shown, beside the run's metrics.csv and validation.csv: in the run for
    TensorBoard, with what the model makes of some sequences, at Weights & Biases, or nowhere."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        config = _with_folder(self.config, self.config.data.folder)
        with _wrong_values():
            device = find_device(self.device)
            check_run(config, self.step, device, Launched.find().count)
            check_logger(self.logger)
            config = _looked_at(config)
        sources = Sources(config, device)
        run_dir = expanded(self.run_dir)
        if Launched.find().rank == 0:  # the other processes wait for the first one when they connect with it
            with _wrong_values():
                _check(config, sources)
            return _train(Run.create(run_dir, config), sources, self.step, self.logger)
        return _train(Run(run_dir, config), sources, self.step, self.logger)


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run to the same result as an uninterrupted one, or a finished one for more steps."""

    resume: Path
    """Directory of the run."""
    steps: int | None = None
    """Batches to train on in all, if not as many as the run was made for."""
    data_dir: Path | None = None
    """Folder of local data files, if not where they were."""
    device: Device = "auto"
    """Where to train."""
    step: StepKind = "eager"
    """How a step is taken, as of a new run."""
    logger: LoggerKind = "tensorboard"
    """Where the course of training is shown, as of a new run."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        run, device = Run.open(expanded(self.resume)), find_device(self.device)
        config = _with_folder(run.config, self.data_dir)
        if self.steps is not None:
            config = replace(config, training=replace(config.training, steps=self.steps))
        check_run(config, self.step, device, Launched.find().count)
        with _wrong_values():
            check_logger(self.logger)
        sources = Sources(config, device)
        _check(config, sources)
        if config != run.config and Launched.find().rank == 0:
            run.change(config)
        run.config = config
        return _train(run, sources, self.step, self.logger)


@dataclass(frozen=True)
class OfRun:
    """Look at a trained run."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Directory of the run."""
    data_dir: Path | None = None
    """Folder of local data files, if not the one the run was trained with."""
    device: Device = "auto"
    """Where to compute."""

    def open(self) -> tuple[Run, SequenceModel, Sources]:
        """Find the run, its model and its sequences."""
        run, device = Run.open(expanded(self.path)), find_device(self.device)
        return run, run.load_model(device), Sources(_with_folder(run.config, self.data_dir), device)


@dataclass(frozen=True)
class Evaluate(OfRun):
    """Print the metrics of a trained model beside their chance levels, and write them into the run.

    By other settings than the run's own they are printed alone.
    """

    sequences: int | None = None
    """Sequences of the fixed test set, if not as many as the run says."""
    importance_samples: int | None = None
    """Samples for the estimates of log p(x), if not as many as the run says."""
    json: bool = False
    """Print what the run's evaluation.json holds in place of a table."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        run, model, sources = self.open()
        asked = {"sequences": self.sequences, "importance_samples": self.importance_samples}
        with _wrong_values():
            settings = replace(run.config.evaluation, **{name: x for name, x in asked.items() if x is not None})
        return _report(run, model, sources, settings, self.json)


@dataclass(frozen=True)
class Traverse(OfRun):
    """Draw the capsule traversals of a trained model."""

    format: Literal["png", "gif", "mp4", "html"] = "png"
    """As what: a figure of all frames, an animation, a video, which takes the extra `video`, or a page with a slider,
    which a browser opens without a server."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        if self.format == "png":
            _draw(*self.open())
        else:
            _animate(*self.open(), self.format)
        return 0


@dataclass(frozen=True)
class Play(OfRun):
    """Move the capsules of a trained model by hand, on a page in the browser; takes the extra `play`."""

    port: int = 8080
    """Where the page is: http://HOST:PORT."""
    host: str = "127.0.0.1"
    """Address to listen at. Anything but the default lets other machines see the page, and use this one."""
    browser: bool = True
    """Whether to open the page in a browser."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        from . import play
        from .figures import titles_of

        nicegui = play.find_nicegui()
        with _wrong_values():
            play.check_address(self.host, self.port)
        run, model, sources = self.open()
        source, settings = _opened(sources, "test"), sources.config
        count = min(_PLAYED, settings.evaluation.sequences)
        with phase("drawing sequences", console):
            batches = FixedSequences.take(source, count, settings.training.batch_size).batches
        batch = SequenceBatch.joined(batches).select(list(range(count)))
        player = play.Player(model, batch, titles_of(source, batch))
        console.print(f"{run.path}: http://{self.host}:{self.port}, until Ctrl-C", soft_wrap=True, markup=False)
        play.serve(nicegui, player, self.host, self.port, self.browser, _described(model, sources))
        return 0


@dataclass(frozen=True)
class Presets:
    """List the presets."""

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        from .paper.exhibits import shown_in

        table = Table(Column("preset", no_wrap=True), "model", "shown in", box=None, pad_edge=False)
        for name, preset in PRESETS.items():
            table.add_row(name, preset.description, ", ".join(shown_in(name)))
        console.print(table)
        console.print("\nDATA-MODEL-wW-kK[-OPTION]: W frames (the paper's 2L) and K capsule positions in the window.")
        return 0


@dataclass(frozen=True)
class Reproduce:
    """Make a table or figure of the paper again; without TARGET, list them.

    Trains what it needs, then writes the table and draws the figure. What is finished is not done again, and what was
    interrupted goes on: give the same command again.
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")] = ""
    """Table or figure."""
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

    def run(self) -> int:
        """Carry the command out; returns the exit status."""
        from . import figures
        from .paper import runs, tables
        from .paper.exhibits import EXHIBITS

        if not self.target:
            table = Table("target", "what it is", box=None, pad_edge=False)
            for name, exhibit in EXHIBITS.items():
                table.add_row(name, exhibit.title)
            console.print(table)
            return 0
        if self.target not in EXHIBITS:
            known = f"{_similar(self.target, EXHIBITS)}; choose from {', '.join(EXHIBITS)}"
            raise UsageError(f"unknown target {self.target!r}{known}")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, got {self.jobs}")
        data_dir, output = self.data_dir and expanded(self.data_dir).resolve(), expanded(self.output)
        page = self.page and expanded(self.page)
        exhibit = EXHIBITS[self.target].with_data(_sprites(self.data, data_dir))
        with _wrong_values():
            device = find_device(self.device)
            if page is not None:
                tables.read_block(page, self.target)
            with phase("looking for runs and data", console):
                jobs = runs.plan(exhibit.models, self.seeds, self.budget, data_dir, expanded(self.runs))
        if not runs.carry_out_all(jobs, device, self.jobs, console):
            console.print("Interrupted; the state is saved. Go on with the same command.")
            return 130
        results = tables.collect(exhibit.title, exhibit.models, jobs, exhibit.reported, exhibit.note)
        files, picture = tables.write(results, self.target, output), None
        if exhibit.draw is not None:
            picture = output / f"{self.target}.png"
            with phase("drawing", console):
                figures.save(exhibit.draw(results, jobs, device), picture, results.title)
            files.append(picture)
        if page is not None:
            tables.include(page, self.target, files[0], picture)
        console.print(Markdown(tables.to_markdown(results)))
        console.print(" ".join(map(str, files)), soft_wrap=True, markup=False)
        likelihoods = [line for line in results.lines if line.key == "log_likelihood"]
        wrong = [line.preset for line in likelihoods if not all(map(math.isfinite, line.ours))]
        if wrong:
            names = ", ".join(dict.fromkeys(wrong))
            print(f"tvae: error: log p(x) is not finite of {names}, which has diverged", file=sys.stderr)
        return 1 if wrong else 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 0 done, 1 an error that is explained in one line, 2 the same of the words of the command and the values of its
    options, 130 interrupted by Ctrl-C, 143 by SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # which may be one of ASCII alone
            stream.reconfigure(errors="replace")
    try:
        if arguments == ["--version"]:
            print(f"tvae-kernels {version('tvae-kernels')}, torch {torch.__version__}, Python {sys.version.split()[0]}")
            return 0
        if not arguments or arguments[0] == "help":  # `tvae help train` is `tvae train --help`
            arguments = [*arguments[1:], "--help"]
        if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            known = f"{_similar(arguments[0], COMMANDS)}; choose from {', '.join(COMMANDS)}"
            raise UsageError(f"unknown command {arguments[0]!r}{known}")
        with _heeding_interruptions():
            return _carried_out(arguments)
    except UsageError as error:
        print(f"tvae: error: {error}", file=sys.stderr)
        return 2
    except (DataError, RunError, ValueError, OSError) as error:
        print(f"tvae: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tvae: interrupted", file=sys.stderr)
        return 130


def _carried_out(arguments: list[str]) -> int:
    """Carry out the command that the words name; returns the exit status.

    Raises:
        UsageError: they name none.
        OSError: it takes more memory than there is.

    """
    command = _parsed(arguments)
    if not isinstance(command, (Train, Resume)) and Launched.find().count > 1:
        raise UsageError(f"torchrun is for `tvae train` alone; run `tvae {arguments[0]}` without it")
    try:
        return command.run()
    except (MemoryError, RuntimeError) as error:
        text = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
            raise OSError(f"out of memory ({text}); take a smaller --batch-size or a smaller model") from error
        raise


@contextlib.contextmanager
def _heeding_interruptions() -> Iterator[None]:
    """Take what goes wrong after Ctrl-C for an interruption, of which libraries make other errors."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = []

    def press(*_: object) -> None:
        pressed.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _parsed(arguments: list[str]) -> Train | Resume | Evaluate | Traverse | Play | Reproduce | Presets:
    """Make the command that the words name.

    Raises:
        UsageError: they name none; in one line, where tyro draws a box.
        SystemExit: help was asked for, and printed.

    """
    training = Resume if _option("--resume", arguments) is not None else Train
    default = _defaults(arguments[1:]) if training is Train and arguments[0] == "train" else None
    first = tyro.conf.subcommand("train") if default is None else tyro.conf.subcommand("train", default=default)
    commands = Union[  # noqa: UP007 - not made of classes alone
        Annotated[training, first],
        Annotated[Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[Traverse, tyro.conf.subcommand("traverse")],
        Annotated[Play, tyro.conf.subcommand("play")],
        Annotated[Reproduce, tyro.conf.subcommand("reproduce")],
        Annotated[Presets, tyro.conf.subcommand("presets")],
    ]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command = tyro.cli(commands, args=arguments, prog="tvae", description=DESCRIPTION)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_unboxed(box.getvalue())) from None
    if default is not None and command.preset != default.preset:  # whose options these are
        raise UsageError(f"write the preset before the options: tvae train {command.preset} ...")
    return command


def _defaults(arguments: list[str]) -> Train:
    """Return what `tvae train` does with the preset and the model that the words name, and no other options."""
    data = _option("--data", arguments) or ""
    if data in PRESETS and data not in SOURCES:
        raise UsageError(f"{data} is a preset, and no data: tvae train {data}")
    own = bool(data) and (is_path(data) or isinstance(SOURCES.get(data), Sequences))
    default = OWN_PRESET if own else DEFAULT_PRESET
    name = arguments[0] if arguments and not arguments[0].startswith("-") else default
    if name not in PRESETS:
        if is_path(name):
            raise UsageError(f"{name} is no preset; for sequences of your own: tvae train --data {name}")
        raise UsageError(f"unknown preset {name!r}{_similar(name, PRESETS)}; `tvae presets` lists them")
    config, model = PRESETS[name].config, _option("--model", arguments)
    if model is not None:
        if model not in MODELS:
            raise UsageError(f"unknown model {model!r}{_similar(model, MODELS)}; choose from {', '.join(MODELS)}")
        config = replace(config, model=_converted(config.model, find(model).Settings))
    return Train(name, config, Path("runs") / name, config.model_class.name)


def _converted(settings: ModelSettings, kind: type[ModelSettings]) -> ModelSettings:
    """Return the settings of another model, with all that both have inherited; or only what all have, if that is wrong.

    What merely goes by the same name means another thing: a weight `beta` of one objective is none of another.
    """
    shared = next(x for x in kind.__mro__ if isinstance(settings, x))
    for names in ({x.name for x in fields(shared)}, {x.name for x in fields(ModelSettings)}):
        with contextlib.suppress(ValueError):
            return kind(**{name: value for name, value in vars(settings).items() if name in names})
    return kind()


@contextlib.contextmanager
def _wrong_values() -> Iterator[None]:
    """Take what is found to be wrong meanwhile for values of options."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def _similar(name: str, known: Iterable[str]) -> str:
    """Ask whether another name was meant, where one is similar."""
    found = difflib.get_close_matches(name, known, 1)
    return f", did you mean {found[0]}?" if found else ""


def _option(name: str, arguments: list[str]) -> str | None:
    """Return the value of an option, "" where it is missing; None without the option."""
    for word, value in itertools.pairwise([*arguments, ""]):
        if word == name:
            return value
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _unboxed(text: str) -> str:
    """Return in one line what tyro says in a box."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours
    lines = [line.strip("│ ") for line in text.splitlines() if not re.match(r"[╭╰]| \S", line)]  # no title and edges
    parts = [" ".join(part.split()) for part in re.split(r"[─-]{8,}", "\n".join(lines))]
    text = "; ".join(part for part in parts if part and not part.startswith("For full helptext"))
    text = re.sub(r"Error parsing (__tyro-dummy-inner__[\w.-]*: )?", "", text)
    return text[:1].lower() + text[1:]


def _with_folder(config: Config, folder: Path | None) -> Config:
    """Return the configuration with its data in another folder, if one is given."""
    if folder is None:
        return config
    return replace(config, data=replace(config.data, folder=expanded(folder).resolve()))


def _looked_at(config: Config) -> Config:
    """Look at sequences of the user's own, if these are, say what was found, and return how they are known again."""
    if all(name is None or isinstance(SOURCES.get(name), type) for name in (config.data.name, config.data.evaluation)):
        return config
    with phase(f"looking at {config.data.name}", console):
        data, found = config.data.look()
    if Launched.find().rank == 0:
        for sequences in found:
            console.print(str(sequences), soft_wrap=True, markup=False, highlight=False)
    return replace(config, data=data)


def _check(config: Config, sources: Sources) -> None:
    """Check all that can be checked before anything is written."""
    settings, launched = config.training, Launched.find()
    source = _opened(sources, "train")
    stream = SequenceStream(source, settings.batch_size, settings.seed, launched.rank, launched.count)
    LIKELIHOODS[config.model.likelihood]().check(stream[0].images)
    try:
        with torch.device("meta"):
            model = config.build_model(source.image_shape)
    except RuntimeError as error:  # a size that no tensor can have
        raise ValueError(
            f"there can be no such model: {str(error).splitlines()[0]}; its settings are {config.model}"
        ) from error
    needed, memory = _BYTES_A_WEIGHT * sum(x.numel() for x in model.parameters()), _memory_of(sources.device)
    if memory is not None and needed > memory:
        raise ValueError(
            f"the model needs {needed / 2**30:,.0f} GiB, more than the {memory / 2**30:,.0f} GiB that the device has: "
            "take fewer --capsules, or a smaller --capsule-dim"
        )


_BYTES_A_WEIGHT = 4 * 3  # itself, its gradient, and what an optimiser keeps of it


def _memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory that a device has, None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    return math.prod(map(os.sysconf, names)) if set(names) <= set(getattr(os, "sysconf_names", ())) else None


def _opened(sources: Sources, split: Literal["train", "test"], console: Console = console) -> SequenceSource:
    """Open the sequences of one split, and say so where that takes its time."""
    name = sources.config.data.name
    if not is_path(name) and SOURCES[name].files is None:
        return sources[split]
    with phase(f"opening {name}", console):
        return sources[split]


def _train(run: Run, sources: Sources, step: StepKind, logger: LoggerKind) -> int:
    """Train a run to its end, then evaluate and draw its model; returns the exit status."""
    from .training import train

    try:
        model, status = train(run, sources.device, step=step, sources=sources, logger=logger), 130
    except SystemExit as terminated:
        model, status = None, terminated.code
    disconnect()
    if Launched.find().rank > 0:
        return status if model is None else 0
    if model is None:
        text = f"Interrupted; the state is saved. Continue with: tvae train --resume {run.path}"
        console.print(text, soft_wrap=True, markup=False)
        return status
    status = _report(run, model, sources)
    _draw(run, model, sources)
    return status


def _report(
    run: Run, model: SequenceModel, sources: Sources, settings: EvaluationSettings | None = None, as_json: bool = False
) -> int:
    """Evaluate the trained model and print the metrics; returns the exit status.

    They are written into the run, where no other settings than its own are given.
    """
    from . import evaluation

    settings, steps = settings or run.config.evaluation, sources.config.training.steps
    shown = Console(stderr=True) if as_json else console
    sequences = FixedSequences.take(
        _opened(sources, "test", shown), settings.sequences, sources.config.training.batch_size
    )
    with progress("evaluating", len(sequences.batches), console=shown) as show:
        rows = evaluation.evaluate(model, sequences, settings, show, lambda: _opened(sources, "train", shown))
    count = min(settings.sequences, len(sequences.source)) if sequences.source.recorded else settings.sequences
    if as_json:
        print(evaluation.to_json(rows, count))
    else:
        title = f"{run.path}: {count:,} test sequences after {steps:,} steps"
        console.print(evaluation.table(rows, title))
    if settings == run.config.evaluation:
        try:
            with run.lock():
                evaluation.save(rows, count, run.evaluation_file)
        except (OSError, RunError) as error:
            print(f"tvae: warning: the metrics are not written: {error}", file=sys.stderr)
    wrong = [row.label for row in rows if row.unit == "nats/frame" and not math.isfinite(row.value)]
    if wrong:
        print(f"tvae: error: {', '.join(wrong)} is not finite; {run.advice_after_divergence()}", file=sys.stderr)
    return 1 if wrong else 0


def _draw(run: Run, model: SequenceModel, sources: Sources) -> None:
    """Draw the capsule traversals, or the torus of a model of still images, into the run and print the path."""
    from . import figures

    source = _opened(sources, "test")
    with phase("drawing", console):
        name, figure = figures.portrait(model, source, sources.config.training.batch_size)
        path = run.figures / f"{name}.png"
        figures.save(figure, path)
    titles = {"torus": "most activating images", "traversals": "capsule traversals"}
    console.print(f"{titles[name]}: {path}", soft_wrap=True, markup=False)


def _animate(run: Run, model: SequenceModel, sources: Sources, kind: str) -> None:
    """Write the capsule traversals into the run as a file of frames that move, and print the path."""
    from . import animations, figures

    write, source = animations.writer(kind), _opened(sources, "test")
    path = run.figures / f"traversals.{kind}"
    with phase("drawing", console):
        animations.save(write, figures.traversal_panels(model, source), path, _described(model, sources))
    console.print(f"capsule traversals: {path}", soft_wrap=True, markup=False)


def _described(model: SequenceModel, sources: Sources) -> str:
    """Say in a line what a trained model is."""
    config = sources.config
    return f"{type(model).__name__} on {config.data.name}, after {config.training.steps:,} steps"


def _sprites(choice: Literal["auto", "sprites", "dsprites"], data_dir: Path | None) -> str:
    """Say what stands for dSprites."""
    if choice != "auto":
        return choice
    if data_dir is None:
        try:
            data_dir = expanded(CACHE) / "dsprites"
        except ValueError:  # without a home folder there is no cache
            return "sprites"
    return "dsprites" if DSpritesSequences.file(data_dir).exists() else "sprites"
