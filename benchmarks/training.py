"""The training step at the paper's sizes, data included, and with other layers: checked first, then timed in turn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from tvae import steps
from tvae.data import SequenceSource, SequenceStream
from tvae.models import VAE
from tvae.presets import PRESETS, Config
from tvae.training import build_optimizer, seed_noise, untrained_model
from tvae_kernels import Latents, TopographicLayer
from tvae_kernels.latents import composed, drawn

from . import devices, peers
from .operation import WrongResultError

NAMES = ("mnist-tvae-w18-k3", "sprites-tvae-w10-k1")
BATCHES = (1, 16)  # times the paper's
VARIANTS = {
    "cpu": ("eager", "compiled", "reference", "convolution"),
    "cuda": ("eager", "compiled", "graph", "reference", "convolution"),
}
WARM_UP = steps.GraphStep.EAGER_STEPS
ROUND = 5  # steps of a variant before it is another's turn
FEWEST_SAMPLES = 3
PATIENCE = 60e6  # microseconds of samples after which a slow variant is not sampled further


class GivenNoise(TopographicLayer):
    """Ours with noise drawn by PyTorch, as the other layers' is: kernels draw their own."""

    def sample(
        self,
        z: Tensor,
        u: Tensor,
        noise: None = None,
        first: int = 0,
        of: int | None = None,
        axis: Tensor | None = None,
    ) -> Latents:
        """See `TopographicLayer.sample`."""
        return super().sample(z, u, drawn(z[:, :, 0], u[:, :, 0], first, of), axis=axis)


class Convolution(TopographicLayer):
    """The layer of the code published with the paper, for plain windows, which have no axes to be told about."""

    def forward(self, z: Tensor, u: Tensor, axis: None = None) -> Tensor:
        """See `peers.convolution`."""
        return peers.convolution(z, u, self.mu, self.neighborhood)

    def sample(
        self, z: Tensor, u: Tensor, noise: None = None, first: int = 0, of: int | None = None, axis: None = None
    ) -> Latents:
        """See `TopographicLayer.sample`."""
        return composed(z, u, drawn(z[:, :, 0], u[:, :, 0], first, of), self)


LAYERS = {"given noise": GivenNoise, "convolution": Convolution}
OWN_NOISE = ("eager", "graph")  # variants whose noise is drawn by our kernels, where they run


def cases(data_dir: Path | None) -> list[tuple[str, Config]]:
    """The paper's models at all batches, by preset; those of MNIST only where there is a folder with its files."""
    names = [name for name in NAMES if data_dir is not None or "mnist" not in name]
    bases = {name: replace(PRESETS[name].config, data_dir=data_dir) for name in names}
    return [
        (name, replace(base, batch_size=times * base.batch_size)) for name, base in bases.items() for times in BATCHES
    ]


class Variant:
    """One way to take the steps of a configuration, with a model of its own: its layer, and the kind of its step."""

    def __init__(self, name: str, config: Config, source: SequenceSource):
        self.name = name
        self.seed = config.seed
        model = untrained_model(config, source)
        self.initial = copy.deepcopy(model.state_dict())
        if name == "reference":
            model.topographic.backend = "reference"
        elif name in LAYERS:
            model.topographic.__class__ = LAYERS[name]  # which differ in what they do, not in what they hold
        fabric = Fabric(accelerator=source.device.type, devices=1)
        self.model, optimizer = fabric.setup(model, build_optimizer(config, model))
        kind = name if name in steps.KINDS else "eager"
        stream = SequenceStream(source, config.batch_size, config.seed)
        self.step = steps.build_step(kind, config.precision, fabric, self.model, optimizer, stream)
        self.next = 0

    def __call__(self, clock, count: int) -> list[dict[str, float]]:
        """Microseconds of every stage of the next steps, without waiting for a GPU between them."""
        names, marks = [], [clock.mark()]
        for i in range(self.next, self.next + count):
            seed_noise(self.seed, i)
            for name in self.step.stages(i):
                names.append(name)
                marks.append(clock.mark())
        self.next += count
        times, stages = clock.microseconds(*marks), len(names) // count
        return [dict(zip(names[:stages], times[i:], strict=False)) for i in range(0, len(times), stages)]

    def first_step(self) -> tuple[dict[str, Tensor], int]:
        """Loss and gradients of the first step, warm; and the peak of its memory, beyond weights, momentum and data."""
        for i in range(WARM_UP if self.name == "graph" else 1):
            self.step(i)
        self.model.load_state_dict(self.initial)
        self.step.optimizer.zero_grad()
        seed_noise(self.seed, 0)
        memory = devices.peak_memory(self.step.fabric.device, lambda: self.step(0))
        result = {"loss": -self.step.elbo.total.mean()}
        return result | {name: p.grad.clone() for name, p in self.model.module.named_parameters()}, memory


def check(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], config: Config, bound: float) -> float:
    """The largest difference of a loss or gradient from the one wanted, by norm, as a fraction of the bound.

    Raises:
        WrongResultError: it is above 1.

    """
    worst = 0.0
    for what, x in found.items():
        error = ((x - wanted[what]).norm() / wanted[what].norm()).item() / bound
        if not error <= 1:  # also for NaN
            raise WrongResultError(f"{name}: {what} of {config.data} is off by {error:.3g} times its error bound")
        worst = max(worst, error)
    return worst


def rounding(model: VAE, products: Products, config: Config) -> float:
    """How far two ways to take the same step may be apart, relatively, in float32.

    The errors of a chain of n additions are as good as random, and add up to more than 6·sqrt(n) of them with a
    probability of 4e-8 (see `operation.Judge`). The longest chain goes through the inner products of all layers, there
    and back, of the weights' gradients, and three window sums, for r cubed is in the gradient.
    """
    terms = sum(a.shape[1] for a, _, _ in products.operands) + 3 * sum(1 for _ in config.neighborhood.taps())
    return 6 * math.sqrt(terms) * torch.finfo(torch.float32).eps


class Products:
    """The floor: the matrix products of a step alone, forward, for the weights' gradients, and for the inputs'."""

    def __init__(self, model: VAE, images: Tensor):
        self.operands: list[tuple[Tensor, Tensor, Tensor]] = []
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        hooks = [layer.register_forward_hook(self._add) for layer in layers]
        model(images)
        for hook in hooks:
            hook.remove()

    def _add(self, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        x, y, w = (torch.randn_like(t) for t in (inputs[0].flatten(0, -2), output.flatten(0, -2), layer.weight))
        pairs = [(x, w.T), (y.T, x)] + [(y, w)] * inputs[0].requires_grad
        self.operands += [(a, b, a.new_empty(a.shape[0], b.shape[1])) for a, b in pairs]

    def __call__(self, clock, count: int) -> list[dict[str, float]]:
        """Microseconds of all, one after the other, `count` times."""
        marks = [clock.mark()]
        for _ in range(count):
            for a, b, result in self.operands:
                torch.mm(a, b, out=result)
            marks.append(clock.mark())
        return [{"products": time} for time in clock.microseconds(*marks)]


def measure(
    preset: str, config: Config, device: torch.device, samples: int, say: Callable[[str], object] = lambda _: None
) -> dict:
    """Check all variants of a configuration against ours with the same noise; time them and the products alone in turn.

    Args:
        preset: the configuration's name.
        config: the preset, at some batch.
        device: where.
        samples: steps of each variant, fewer of the slow ones.
        say: told what is being done.

    Returns:
        `preset`, `batch_size` and `frames`, all of a batch; `samples`, by variant and stage in microseconds; `memory`,
        by variant the peak in bytes of a step beyond the weights, their momentum and the data set; `error`, by variant
        the largest difference from ours as a fraction of its bound; `not_timed`, by variant why.

    Raises:
        WrongResultError: a variant takes another step; then nothing is timed.

    """
    torch.compiler.reset()
    source = config.open_source("train", device)
    model = untrained_model(config, source).to(device)
    products = Products(model, SequenceStream(source, config.batch_size, config.seed)[0].images)
    bound = rounding(model, products, config)
    timed, memory, errors, not_timed = {}, {}, {}, {}
    say("check given noise")
    with_given_noise, wanted = Variant("given noise", config, source).first_step()[0], None
    for name in VARIANTS[device.type]:
        say(f"check {name}")
        variant = Variant(name, config, source)
        try:
            found, memory[name] = variant.first_step()
        except RuntimeError as error:
            if wanted is None:
                raise
            not_timed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        wanted = wanted or found
        errors[name] = check(name, found, wanted if name in OWN_NOISE else with_given_noise, config, bound)
        timed[name] = variant
    timed["products"] = products
    taken = in_turn(timed, devices.clock(device), samples, say)
    case = {"preset": preset, "batch_size": config.batch_size, "frames": config.batch_size * source.sequence_length}
    return case | {"samples": taken, "memory": memory, "error": errors, "not_timed": not_timed}


def in_turn(
    timed: dict[str, Callable[[object, int], list[dict[str, float]]]],
    clock,
    samples: int,
    say: Callable[[str], object],
) -> dict[str, dict[str, list[float]]]:
    """Take rounds of steps of each in turn, fewer of the slow ones; by name and stage.

    The first step of a round finds the caches full of another's data and is not counted.
    """
    say("warm up")
    first = {name: sum(call(clock, 1)[0].values()) for name, call in timed.items()}
    left = {name: min(samples, max(FEWEST_SAMPLES, int(PATIENCE / time))) for name, time in first.items()}
    taken = {name: [] for name in timed}
    while any(left.values()):
        say(f"time {samples - max(left.values())} of {samples}")
        for name, call in timed.items():
            count = min(ROUND, left[name])
            left[name] -= count
            if count:
                taken[name] += call(clock, 1 + count)[1:]
    return {name: {stage: [x[stage] for x in rows] for stage in rows[0]} for name, rows in taken.items()}
