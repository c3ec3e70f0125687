"""The ways to take a training step: ours, eager, compiled or as a graph, and with other layers in place of the model's.

What the benchmarks of training know of the insides of `tvae` stands here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from tvae.config import Config, StepKind
from tvae.data import SequenceSource, SequenceStream
from tvae.presets import PRESETS
from tvae.training import build_optimizer, build_step, untrained_model
from tvae.training.loop import seed_noise
from tvae.training.steps import GraphStep
from tvae_kernels import Latents, TopographicLayer
from tvae_kernels.latents import composed, drawn

from . import devices, peers
from .problems import WrongResultError

MNIST, SPRITES = "mnist-tvae-w18-k3", "sprites-tvae-w10-k1"  # the paper's main models


def config_of(preset: str, data_dir: Path | None = None, times: int = 1) -> Config:
    """Take a preset's configuration, with data from a folder, at many times its batch."""
    config = PRESETS[preset].config
    training = replace(config.training, batch_size=times * config.training.batch_size)
    return replace(config, data=replace(config.data, folder=data_dir), training=training)


class GivenNoise(TopographicLayer):
    """Computes ours with noise that PyTorch draws, as for the other layers: kernels draw their own.

    It takes over the parameters of the layer that it replaces.
    """

    def __init__(self, layer: TopographicLayer):
        super().__init__(layer.neighborhood, eps=layer.eps, backend=layer.backend)
        self.mu, self.raw_weights = layer.mu, layer.raw_weights

    def sample(self, z: Tensor, u: Tensor, noise: None = None, first=0, of=None, axis=None) -> Latents:
        """See `TopographicLayer.sample`."""
        return super().sample(z, u, drawn(z[:, :, 0], u[:, :, 0], first, of), axis=axis)


class Convolution(GivenNoise):
    """Computes the layer as the code published with the paper does, for plain windows, which know no axes."""

    def __init__(self, layer: TopographicLayer, convolve: Callable[..., Tensor] = peers.convolution):
        super().__init__(layer)
        self.convolve = convolve

    def forward(self, z: Tensor, u: Tensor, *arguments, **settings) -> Tensor | Latents:
        """See `peers.convolution`."""
        if z.ndim == 5:
            return self.sample(z, u, *arguments, **settings)
        return self.convolve(z, u, self.mu, self.neighborhood)

    def sample(self, z: Tensor, u: Tensor, noise: None = None, first=0, of=None, axis=None) -> Latents:
        """See `TopographicLayer.sample`."""
        return composed(z, u, drawn(z[:, :, 0], u[:, :, 0], first, of), self)


def reference(layer: TopographicLayer) -> TopographicLayer:
    """Make the layer compute the equation as written."""
    layer.backend = "reference"
    return layer


@dataclass(frozen=True)
class Variant:
    """Says how to take a step: with which layer in place of the model's own, and by which kind of step."""

    layer: Callable[[TopographicLayer], nn.Module] = lambda layer: layer
    step: StepKind = "eager"
    own_noise: bool = False  # drawn by our kernels, where they run


VARIANTS = {
    "eager": Variant(own_noise=True),
    "compiled": Variant(step="compiled"),
    "graph": Variant(step="graph", own_noise=True),
    "given noise": Variant(GivenNoise),
    "reference": Variant(reference),
    "convolution": Variant(Convolution),
}


class Trainer:
    """Takes the steps of a configuration in the way of a variant, with a model of its own."""

    def __init__(self, variant: Variant, config: Config, source: SequenceSource):
        settings = config.training
        self.seed, self.device = settings.seed, source.device
        model = untrained_model(config, source)
        self.initial = copy.deepcopy(model.state_dict())
        self.warm_up = GraphStep.EAGER_STEPS if variant.step == "graph" else 1
        if hasattr(model, "topographic"):
            model.topographic = variant.layer(model.topographic)
        fabric = Fabric(accelerator=source.device.type, devices=1)
        self.model, self.optimizer = fabric.setup(model, build_optimizer(settings, model))
        stream = SequenceStream(source, settings.batch_size, settings.seed)
        self.mark: Callable[[str], object] = lambda stage: None
        self.step = build_step(
            variant.step,
            settings.precision,
            fabric,
            self.model,
            self.optimizer,
            stream,
            lambda stage: self.mark(stage),
        )
        self.next = 0

    def take(self, i: int, mark: Callable[[str], object] = lambda stage: None) -> Tensor:
        """Take step i, tell `mark` the name of every stage that is done, and give the loss."""
        seed_noise(self.seed, i)
        self.mark = mark
        return -self.step(i).objective.mean()

    def __call__(self, clock, count: int) -> list[dict[str, float]]:
        """Take the microseconds of every stage of the next steps, without waiting for a GPU between them."""
        names, marks = [], [clock.mark()]

        def mark(stage: str) -> None:
            names.append(stage)
            marks.append(clock.mark())

        for i in range(self.next, self.next + count):
            self.take(i, mark)
        self.next += count
        times, stages = clock.microseconds(*marks), len(names) // count
        return [dict(zip(names[:stages], times[i:], strict=False)) for i in range(0, len(times), stages)]

    def first_step(self) -> tuple[dict[str, Tensor], int]:
        """Give loss and gradients of the first step, warm, and its peak memory beyond weights, momentum and data."""
        for i in range(self.warm_up):
            self.take(i)
        self.model.load_state_dict(self.initial)
        self.optimizer.zero_grad()
        found = {}
        memory = devices.peak_memory(self.device, lambda: found.update(loss=self.take(0)))
        return found | {name: p.grad.clone() for name, p in self.model.module.named_parameters()}, memory


class Products:
    """Takes the matrix products of a step alone, the floor: forward, for the weights' gradients, and the inputs'."""

    def __init__(self, config: Config, source: SequenceSource):
        self.operands: list[tuple[Tensor, Tensor, Tensor]] = []
        model = untrained_model(config, source).to(source.device)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            layer.register_forward_hook(self._add)
        model(SequenceStream(source, config.training.batch_size, config.training.seed)[0])

    def _add(self, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        x, y, w = (torch.randn_like(t) for t in (inputs[0].flatten(0, -2), output.flatten(0, -2), layer.weight))
        pairs = [(x, w.T), (y.T, x)] + [(y, w)] * inputs[0].requires_grad
        self.operands += [(a, b, a.new_empty(a.shape[0], b.shape[1])) for a, b in pairs]

    def __call__(self, clock, count: int) -> list[dict[str, float]]:
        """Take the microseconds of all, one after the other, `count` times."""
        marks = [clock.mark()]
        for _ in range(count):
            for a, b, result in self.operands:
                torch.mm(a, b, out=result)
            marks.append(clock.mark())
        return [{"products": time} for time in clock.microseconds(*marks)]


def rounding(products: Products, config: Config) -> float:
    """Say how far two ways to take the same step may be apart, relatively, in float32.

    The errors of a chain of n additions are as good as random, and add up to more than 6·sqrt(n) of them with a
    probability of 4e-8 (see `problems.Judge`). The longest chain goes through the inner products of all layers, there
    and back, of the weights' gradients, and three window sums, for r cubed is in the gradient.
    """
    terms = sum(a.shape[1] for a, _, _ in products.operands) + 3 * sum(1 for _ in config.model.neighborhood.taps())
    return 6 * math.sqrt(terms) * torch.finfo(torch.float32).eps


def check(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> float:
    """Give the largest difference of a loss or gradient from the one wanted, by norm, as a fraction of the bound.

    Raises:
        WrongResultError: it is above 1.

    """
    worst = 0.0
    for what, x in found.items():
        error = ((x - wanted[what]).norm() / wanted[what].norm()).item() / bound
        if not error <= 1:  # also for NaN
            raise WrongResultError(f"{name}: {what} is off by {error:.3g} times its error bound")
        worst = max(worst, error)
    return worst
