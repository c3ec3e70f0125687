"""Time of one training step, data included, and how it divides: data, forward, backward, optimiser."""

import time
from pathlib import Path

import torch

from tvae.data import SequenceStream
from tvae.presets import PRESETS, Config
from tvae.training import build_optimizer

PARTS = ("data", "forward", "backward", "optimizer")
WARMUP = 5


def measure(config: Config, steps: int) -> dict[str, list[float]]:
    """Milliseconds of every part of `steps` training steps on the CPU, after a warm-up."""
    source = config.open_source("train")
    stream = SequenceStream(source, config.batch_size, config.seed)
    torch.manual_seed(config.seed)
    model = config.build_model(source.image_shape)
    optimizer = build_optimizer(config, model)
    samples = {part: [] for part in PARTS}
    for i in range(WARMUP + steps):
        marks = [time.perf_counter()]
        batch = stream[i]
        marks.append(time.perf_counter())
        loss = -model(batch.images).total.mean()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        if i >= WARMUP:
            for part, start, end in zip(PARTS, marks, marks[1:], strict=False):
                samples[part].append(1e3 * (end - start))
    return samples


def presets(data_dir: Path | None) -> dict[str, Config]:
    """The models at the paper's sizes; MNIST only where there is a folder with its files."""
    names = ["sprites-tvae-w10-k1", "sprites-vae"]
    if data_dir is not None:
        names = ["mnist-tvae-w18-k3", "mnist-tvae-w5-k3", "mnist-vae", *names]
    return {name: PRESETS[name].config for name in names}
