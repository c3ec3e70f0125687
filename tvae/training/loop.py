"""Training, from data to checkpoint, in the order in which it happens."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from tvae_kernels import Neighborhood

from ..config import Config, LoggerKind, Sources, StepKind, TrainingSettings, check_logger, check_run
from ..data import EVALUATION_SEED, FixedSequences, SequenceSource, SequenceStream
from ..figures import traversal_panels
from ..metrics import equivariance_error
from ..models import ELBO, SequenceModel
from ..progress import progress
from .log import TrainingLog
from .processes import find_device, highest, launch, mean, on_first
from .run import Run, RunError
from .steps import build_step, matmul_precision

LOG_EVERY = 25  # steps
CHECKPOINT_EVERY = 500  # steps
VALIDATION_SEQUENCES = 64

Callback = Callable[[int, dict[str, float], SequenceModel], object]


def train(
    run: Run,
    device: str | torch.device = "auto",
    show_progress: bool = True,
    step: StepKind = "eager",
    sources: Sources | None = None,
    logger: LoggerKind | Logger = "tensorboard",
    callback: Callback | None = None,
) -> SequenceModel | None:
    """Train the model of a run to the end of its steps, from its last checkpoint where it has one.

    Every step draws its sequences and its noise from generators seeded by (seed, step) alone. A resumed run therefore
    gives the result of an uninterrupted one, bit for bit on a CPU, and no random state is saved. Processes that
    torchrun has started share every batch and its noise, so that any number of them gives the result of one, up to the
    order of float32 sums.

    Args:
        run: a new or an interrupted run, in a folder that all processes share.
        device: "auto", "cpu" or "cuda".
        show_progress: draw a progress bar.
        step: how the machine takes a step, as in `build_step`; the result is the same within float32 rounding.
        sources: the sequences of the run's configuration, where they are open already.
        logger: what shows the course of training, as in `TrainingLog`.
        callback: called in the first process with the step, the values of its batch, as in metrics.csv, and the model,
            whenever they are logged: every 25 steps, and after the last one.

    Returns:
        The trained model, which is written, too; None when training was interrupted and its state saved.

    Raises:
        RunError: the loss or a weight is not finite, the checkpoint cannot be read, or a file cannot be written; the
            last good state is kept.
        DataError: the data is missing or damaged.
        ValueError: the device has not what the step or the precision needs, the processes cannot share a batch, or
            there is no such logger.
        SystemExit: SIGTERM has ended training, its state saved; with the status 143.

    """
    fabric = launch(find_device(device))
    check_run(run.config, step, fabric.device, fabric.world_size)
    if not isinstance(logger, Logger):
        check_logger(logger)
    lock = on_first(fabric, run.lock)
    with nullcontext() if lock is None else lock:  # which the first process holds for all
        return _train(fabric, run, sources, step, show_progress, logger, callback)


def _train(
    fabric: Fabric,
    run: Run,
    sources: Sources | None,
    step: StepKind,
    show_progress: bool,
    logger: LoggerKind | Logger,
    callback: Callback | None,
) -> SequenceModel | None:
    """Train a run that no other process is at work in, as `train` says."""
    config, settings = run.config, run.config.training
    with fabric.rank_zero_first(local=True):  # which may download the data
        if sources is None or sources.device != fabric.device:
            sources = Sources(config, fabric.device)
        source, _ = sources["train"], sources["validation"]  # which is missing now, if at all
    stream = SequenceStream(source, settings.batch_size, settings.seed, fabric.global_rank, fabric.world_size)
    model = untrained_model(config, source)
    optimizer = build_optimizer(settings, model)
    model, optimizer = fabric.setup(model, optimizer)
    first_step = run.load_checkpoint(model, optimizer)
    last, minus_first = highest(fabric, first_step, -first_step)
    if last != -minus_first:
        raise RunError(f"the processes do not share {run.path}: some find {last} steps there, some {-minus_first}")

    model.module.likelihood.check(stream[first_step].images)

    rates = [group["lr"] for group in optimizer.param_groups]
    if settings.scheduled and step == "graph":  # which reads the rates where they were when it was captured
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=fabric.device)
    take_step = build_step(step, settings.precision, fabric, model, optimizer, stream)
    done, stop = first_step, 0
    log = on_first(fabric, TrainingLog, run, first_step, logger)
    with (
        matmul_precision(settings.precision),
        closing(log) if fabric.is_global_zero else nullcontext(),
        interruption() as interrupted,
        progress("training", settings.steps, first_step, visible=show_progress and fabric.is_global_zero) as show,
    ):
        start = time.perf_counter()
        while done < settings.steps:
            seed_noise(settings.seed, done)
            set_rates(optimizer, [rate * settings.rate_factor(done) for rate in rates])
            elbo = take_step(done)
            done += 1

            if done % LOG_EVERY == 0 or done == settings.steps:
                values = mean(fabric, measure(elbo, model.module.rolls))
                # Only here, for a GPU would have to be waited for; checkpoints refuse weights that are not finite.
                if not math.isfinite(values["loss"]):  # which it is not where that of any process is not
                    raise RunError(f"the loss is {values['loss']} in step {done}; {run.advice_after_divergence()}")
                on_first(fabric, lambda: log.log(done, values))  # noqa: B023 - called at once
                if callback is not None and fabric.is_global_zero:
                    callback(done, values, model.module)
                show(done, described(values, (done - first_step) / (time.perf_counter() - start)))
            (stop,) = highest(fabric, interrupted())  # the same in all processes; SIGTERM outranks SIGINT
            regular = done % CHECKPOINT_EVERY == 0 or done == settings.steps
            if regular:  # and not where a run is interrupted, so that a resumed one has the same rows
                on_first(fabric, log_validation, log, done, model.module, sources)
            if regular or stop:
                on_first(fabric, run.save_checkpoint, done, model, optimizer)
            if stop:
                break
    if stop == signal.SIGTERM:
        raise SystemExit(128 + stop)
    if stop:
        return None
    on_first(fabric, run.save_model, model.module)
    return copy.deepcopy(model.module)  # a copy is not compiled


def untrained_model(config: Config, source: SequenceSource) -> SequenceModel:
    """Make the model on the CPU as training finds it: initialised from the seed of the configuration."""
    torch.manual_seed(config.training.seed)
    return config.build_model(source.image_shape)


def build_optimizer(settings: TrainingSettings, model: SequenceModel) -> Optimizer:
    """Make the optimiser of all parameters: SGD with momentum, as the paper, or Adam; fused, one pass over memory."""
    groups = model.parameter_groups()
    if settings.optimizer == "adam":
        return Adam(groups, lr=settings.learning_rate, fused=True)
    for group in groups:
        group.pop("betas", None)  # Adam's alone
    return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)


def set_rates(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of every group of weights."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def seed_noise(seed: int, step: int) -> None:
    """Seed the noise of the latent variables of one step; the key sets it apart from the stream's draws."""
    (state,) = np.random.SeedSequence(seed, spawn_key=(1000, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


@torch.no_grad()
def measure(elbo: ELBO, rolls: Neighborhood | None) -> dict[str, float]:
    """Measure one batch: its terms in nats a frame, and for capsules that roll their E_eq."""
    values = {"loss": -elbo.objective.mean().item()}
    values |= {name: term.mean().item() for name, term in elbo.terms.items()}
    if rolls is not None:
        values["equivariance_error"] = equivariance_error(elbo.t, rolls, elbo.axis).mean().item()
    return values


def log_validation(log: TrainingLog, step: int, model: SequenceModel, sources: Sources) -> None:
    """Log how well a model does with sequences that it is not trained on, and show what it makes of some."""
    source = sources["validation"]
    size = min(sources.config.training.batch_size, len(source))
    training = model.training
    log.log(step, validate(model, FixedSequences.take(source, VALIDATION_SEQUENCES, size)), "validation")
    if log.shows_images and source.sequence_length > 1:
        for panel in traversal_panels(model, source):
            log.show(step, panel.title, panel.images)
    model.train(training)


@torch.no_grad()
def validate(model: SequenceModel, sequences: FixedSequences) -> dict[str, float]:
    """Measure a model on fixed sequences as `measure` does a batch, with noise of its own."""
    total = Counter()
    model.eval()
    torch.manual_seed(EVALUATION_SEED)
    with torch.compiler.set_stance("force_eager"):
        for batch in sequences.batches:
            total.update({name: len(batch.images) * x for name, x in measure(model(batch), model.rolls).items()})
    count = sum(len(batch.images) for batch in sequences.batches)
    return {name: x / count for name, x in total.items()}


def described(values: dict[str, float], rate: float) -> str:
    """Describe the course of training in a few words."""
    error = f"  E_eq {values['equivariance_error']:.0f}" if "equivariance_error" in values else ""
    return f"loss {values['loss']:.1f}{error}  {rate:.1f} steps/s"


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Turn Ctrl-C and SIGTERM into a question asked between steps: the number of the signal, or 0.

    The second Ctrl-C interrupts at once. The second SIGTERM does not: a process may get one from its scheduler and one
    from torchrun. Outside of the main thread, which alone may handle signals, there is nothing to ask.
    """
    caught = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: max(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
