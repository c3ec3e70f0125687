"""Training, from data to checkpoint, in the order in which it happens."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from tvae_kernels import Neighborhood

from .data import SequenceSource, SequenceStream
from .metrics import equivariance_error
from .models import ELBO, VAE
from .presets import Config, StepKind, check_machine
from .run import MetricsLog, Run, RunError
from .steps import build_step, matmul_precision

LOG_EVERY = 25  # steps
CHECKPOINT_EVERY = 500  # steps


def train(run: Run, device: str = "auto", show_progress: bool = True, step: StepKind = "eager") -> bool:
    """Train the model of a run to the end of its steps, from its last checkpoint where it has one.

    Every step draws its sequences and its noise from generators seeded by (seed, step) alone. A resumed run therefore
    gives the result of an uninterrupted one, bit for bit on a CPU, and no random state is saved.

    Args:
        run: a new or an interrupted run.
        device: "auto", "cpu" or "cuda".
        show_progress: draw a progress bar.
        step: how the machine takes a step, as in `build_step`; the result is the same within float32 rounding.

    Returns:
        True when the run is finished and its model written, False when it was interrupted and its state saved.

    Raises:
        RunError: the loss or a weight is not finite, or the checkpoint cannot be read; the last good state is kept.
        DataError: the data is missing or damaged.
        ValueError: the device has not what the step or the precision needs.

    """
    config = run.config
    fabric = Fabric(accelerator=device, devices=1)
    check_machine(step, config.precision, fabric.device)
    source = config.open_source("train", fabric.device)
    model = untrained_model(config, source)
    optimizer = build_optimizer(config, model)
    model, optimizer = fabric.setup(model, optimizer)
    first_step = run.load_checkpoint(model, optimizer)

    stream = SequenceStream(source, config.batch_size, config.seed)
    take_step = build_step(step, config.precision, fabric, model, optimizer, stream)
    done = first_step
    with (
        matmul_precision(config.precision),
        closing(MetricsLog(run, first_step)) as log,
        interruption() as interrupted,
        progress_bar(config.steps, first_step, show_progress) as show,
    ):
        while done < config.steps:
            seed_noise(config.seed, done)
            elbo = take_step(done)
            done += 1

            if done % LOG_EVERY == 0 or done == config.steps:
                values = measure(elbo, model.module.rolls)
                # Only here, for a GPU would have to be waited for; checkpoints refuse weights that are not finite.
                if not math.isfinite(values["loss"]):
                    raise RunError(f"the loss is {values['loss']} in step {done}; {run.advice_after_divergence()}")
                log.log(done, values)
                show(done, values)
            if done % CHECKPOINT_EVERY == 0 or done == config.steps or interrupted():
                run.save_checkpoint(done, model, optimizer)
            if interrupted():
                break
    if done < config.steps:
        return False
    model.module.save(run.model_file)
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
        "equivariance_error": equivariance_error(elbo.t, rolls).mean().item(),
    }


@contextmanager
def interruption() -> Iterator:
    """Turn the first Ctrl-C into a question asked between steps; the second one interrupts at once."""
    caught = []

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, before)


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
