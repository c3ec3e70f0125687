"""Training, from data to checkpoint, in the order in which it happens."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from tvae_kernels import Neighborhood

from .data import SequenceSource, SequenceStream
from .metrics import equivariance_error
from .models import ELBO, VAE
from .presets import Config, StepKind, check_machine
from .processes import highest, launch, mean, on_first
from .run import MetricsLog, Run, RunError
from .steps import build_step, matmul_precision

LOG_EVERY = 25  # steps
CHECKPOINT_EVERY = 500  # steps


def train(run: Run, device: str = "auto", show_progress: bool = True, step: StepKind = "eager") -> bool:
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

    Returns:
        True when the run is finished and its model written, False when it was interrupted and its state saved.

    Raises:
        RunError: the loss or a weight is not finite, the checkpoint cannot be read, or a file cannot be written; the
            last good state is kept.
        DataError: the data is missing or damaged.
        ValueError: the device has not what the step or the precision needs, or the processes cannot share a batch.
        SystemExit: SIGTERM has ended training, its state saved; with the status 143.

    """
    config = run.config
    fabric = launch(device)
    check_machine(step, config.precision, fabric.device, fabric.world_size)
    with fabric.rank_zero_first(local=True):  # which may download the data
        source = config.open_source("train", fabric.device)
    stream = SequenceStream(source, config.batch_size, config.seed, fabric.global_rank, fabric.world_size)
    model = untrained_model(config, source)
    optimizer = build_optimizer(config, model)
    model, optimizer = fabric.setup(model, optimizer)
    first_step = run.load_checkpoint(model, optimizer)
    last, minus_first = highest(fabric, first_step, -first_step)
    if last != -minus_first:
        raise RunError(f"the processes do not share {run.path}: some find {last} steps there, some {-minus_first}")

    take_step = build_step(step, config.precision, fabric, model, optimizer, stream)
    done, stop = first_step, 0
    log = on_first(fabric, MetricsLog, run, first_step)
    with (
        matmul_precision(config.precision),
        closing(log) if fabric.is_global_zero else nullcontext(),
        interruption() as interrupted,
        progress_bar(config.steps, first_step, show_progress and fabric.is_global_zero) as show,
    ):
        while done < config.steps:
            seed_noise(config.seed, done)
            elbo = take_step(done)
            done += 1

            if done % LOG_EVERY == 0 or done == config.steps:
                values = mean(fabric, measure(elbo, model.module.rolls))
                # Only here, for a GPU would have to be waited for; checkpoints refuse weights that are not finite.
                if not math.isfinite(values["loss"]):  # which it is not where that of any process is not
                    raise RunError(f"the loss is {values['loss']} in step {done}; {run.advice_after_divergence()}")
                on_first(fabric, lambda: log.log(done, values))  # noqa: B023 - called at once
                show(done, values)
            (stop,) = highest(fabric, interrupted())  # the same in all processes; SIGTERM outranks SIGINT
            if done % CHECKPOINT_EVERY == 0 or done == config.steps or stop:
                on_first(fabric, run.save_checkpoint, done, model, optimizer)
            if stop:
                break
    if stop == signal.SIGTERM:
        raise SystemExit(128 + stop)
    if stop:
        return False
    on_first(fabric, run.save_model, model.module)
    return True


def untrained_model(config: Config, source: SequenceSource) -> VAE:
    """The model on the CPU as training finds it: initialised from the seed of the configuration."""
    torch.manual_seed(config.seed)
    return config.build_model(source.image_shape)


def build_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The optimiser over all parameters: SGD with momentum, as in the paper, or Adam; fused, one pass over memory."""
    if config.optimizer == "adam":
        return Adam(model.parameters(), lr=config.learning_rate, fused=True)
    return SGD(model.parameters(), lr=config.learning_rate, momentum=config.momentum, fused=True)


def seed_noise(seed: int, step: int) -> None:
    """Seed the noise of the latent variables of one step; the key sets it apart from the stream's draws."""
    (state,) = np.random.SeedSequence(seed, spawn_key=(1000, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state))


@torch.no_grad()
def measure(elbo: ELBO, rolls: Neighborhood) -> dict[str, float]:
    """The metrics of one batch, in nats a frame, and its E_eq under the rolls of the model's topography."""
    return {
        "loss": -elbo.total.mean().item(),
        "log_likelihood": elbo.log_likelihood.mean().item(),
        "kl_z": elbo.kl_z.mean().item(),
        "kl_u": elbo.kl_u.mean().item(),
        "equivariance_error": equivariance_error(elbo.t, rolls, elbo.axis).mean().item(),
    }


@contextmanager
def interruption() -> Iterator[Callable[[], int]]:
    """Turn Ctrl-C and SIGTERM into a question asked between steps: the number of the signal, or 0.

    The second Ctrl-C interrupts at once. The second SIGTERM does not: a process may get one from its scheduler and one
    from torchrun.
    """
    caught = [0]

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: max(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(steps: int, first_step: int, visible: bool) -> Iterator:
    """A bar with loss, E_eq and steps/s, advanced by calling it with the number of steps done and their metrics."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), disable=not visible) as progress:
        task = progress.add_task("", total=steps, completed=first_step)
        start = time.perf_counter()

        def show(done: int, values: dict[str, float]) -> None:
            rate = (done - first_step) / (time.perf_counter() - start)
            text = f"loss {values['loss']:.1f}  E_eq {values['equivariance_error']:.0f}  {rate:.1f} steps/s"
            progress.update(task, completed=done, description=text)

        yield show
