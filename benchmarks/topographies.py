"""Every topography beside its reference, at the size of the preset that has it: checked, then timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tvae.data import SOURCES
from tvae.presets import PRESETS
from tvae_kernels import Neighborhood

from . import devices, peers, render
from .measuring import Say, in_turn, measure_all, silent
from .problems import Problem, WrongResultError, sample, sampler
from .records import Record, Result
from .render import milliseconds

DEVICES = ("cpu", "cuda")
SHOWN = ("",)
PATIENCE = 7e6  # microseconds of samples after which a slow peer is not sampled further
PRESETS_TIMED = (
    "sprites-tvae-w10-k1",  # plain
    "mnist-still-tvae-torus",
    "sprites-shifts-tvae-axes",
    "sprites-shifts-tvae-told",
    "sprites-tvae-third",
    "sprites-tvae-phase",
    "sprites-tvae-padded",
    "sprites-tvae-causal",
    "sprites-tvae-speeds",
    "sprites-tvae-learned",
)
BATCHES = {"cpu": (1, 8), "cuda": (1, 512)}  # times the preset's batch
PEERS = {"cpu": ("reference",), "cuda": ("reference", "reference compiled")}


def run(samples: int = 30, output: Path | None = None) -> Result:
    """Time the layer of every preset with a topography of its own, beside the reference.

    Without `--output` the table in docs/ is made anew.

    Args:
        samples: of each peer in each direction; slow peers get fewer.
        output: JSON file to write; by default benchmarks/results/topographies-MACHINE.json.

    """
    device = devices.here()
    settings = {"samples": samples, "ours": peers.OURS[device.type]}
    measured = partial(measure, device=device, samples=samples)
    return measure_all("topographies", cases(device.type), measured, device.type, settings, output)


@dataclass(frozen=True)
class Topography:
    """Describes a preset's layer, for `z` of `shape` `(B, S, C, D)`.

    Each capsule may have learned a window of its own, and each sequence may come with the axis along which it rolls.
    """

    preset: str
    neighborhood: Neighborhood
    shape: tuple[int, int, int, int]
    learned: bool
    with_axis: bool

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return {"preset": self.preset, "shape": self.shape}

    @property
    def name(self) -> str:
        """Name the case, as in "sprites-tvae-third 8x15x45x5"."""
        return f"{self.preset} {'x'.join(map(str, self.shape))}"

    def peer(self, name: str, device: torch.device) -> Callable[..., torch.Tensor]:
        """Build the peer that does what the layer does, with sequences that roll along one axis after the other."""
        n = self.neighborhood
        axis = torch.arange(self.shape[0], device=device) % n.root_count if self.with_axis else None
        return peers.build(name, n, axis)

    def problem(self, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Problem:
        """Draw normal `z`, `u` and `dt`, the latter with a mean, the paper's initial `mu`, and weights around 1."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        n, weights = self.neighborhood, None
        if self.learned:
            weights = torch.rand(self.shape[2], *n.weights_shape, generator=generator, device=device, dtype=dtype) + 0.5
        mu = torch.tensor(30.0, dtype=dtype, device=device)
        z, u, dt = normal(*self.shape), normal(*n.shape_of_u(self.shape)), normal(*self.shape) + 0.5
        return Problem(z, u, mu, dt, weights).leaves()


def cases(device_type: str) -> list[Topography]:
    """List all of them, at the preset's batch and at many times that."""
    return [topography(name, times) for times in BATCHES[device_type] for name in PRESETS_TIMED]


def topography(preset: str, times: int = 1) -> Topography:
    """Take the layer of a preset, at many times its batch."""
    config = PRESETS[preset].config
    frames, model = SOURCES[config.data.name].sequence_length, config.model
    shape = (times * config.training.batch_size, frames, model.capsules, model.capsule_dim)
    return Topography(preset, model.neighborhood, shape, model.window == "capsule", model.told_axis)


def check(topography: Topography, peer: str, call: Callable, problem: Problem) -> float:
    """Give the largest error of a peer against float64, as a fraction of its bound.

    By norm and not by element, as in `problems.Judge`: shifts by phase have coefficients of either sign. The bound is
    the rounding errors of as many terms as there are.

    Raises:
        WrongResultError: it is above 1.

    """
    n = topography.neighborhood
    exact = {name: x.detach().double() for name, x in problem.inputs.items()}
    reference = topography.peer("reference", problem.z.device)
    wanted = Problem(**exact, dt=problem.dt.double()).leaves().both(reference)
    terms = sum(1 for _ in n.taps()) + topography.shape[3] * (n.roll == "fourier")
    worst = 0.0
    for what, x in problem.both(call).items():
        # 3 times, for r cubed is in the gradients; sums over all elements as in problems.Judge.
        most = 3 * (terms + 10) + (6 * math.sqrt(problem.z.numel()) if what in ("dmu", "dweights") else 0)
        error = ((x.double() - wanted[what]).norm(torch.inf) / wanted[what].norm(torch.inf)).item()
        error /= most * torch.finfo(torch.float32).eps
        if not error <= 1:
            raise WrongResultError(f"{peer}: {what} of {topography.name} is off by {error:.3g} times its error bound")
        worst = max(worst, error)
    return worst


def measure(
    topography: Topography,
    say: Say = silent,
    *,
    device: torch.device,
    samples: int,
    calls: Mapping[str, Callable] | None = None,
    cache: int | None = None,
) -> list[Record]:
    """Check all peers on a topography, then time them in turn.

    Args:
        topography: the layer.
        say: what is being done.
        device: where.
        samples: of each peer, fewer of the slow ones.
        calls: the peers by name; by default our backend and the references of the device.
        cache: bytes that the buffers in turn have to outgrow; by default the device's.

    Returns:
        A record for each peer, with its samples by direction and its error.

    Raises:
        WrongResultError: a peer gives a wrong result; then nothing is timed.

    """
    torch.compiler.reset()
    clock = devices.clock(device)
    bytes_each = 3 * math.prod(topography.shape) * torch.float32.itemsize
    count = devices.rotation(bytes_each, devices.cache_bytes(device) if cache is None else cache)
    problems = [topography.problem(device, seed) for seed in range(count)]
    names = (peers.OURS[device.type], *PEERS[device.type])
    calls = calls or {name: topography.peer(name, device) for name in names}
    timed, errors = {}, {}
    for name, call in calls.items():
        say(f"check {name}")
        errors[name] = check(topography, name, call, problems[0])
        timed[name] = sampler(partial(sample, call, problems), clock)
    taken = in_turn(timed, samples, say, patience=PATIENCE)
    return [Record(topography.fields, name, taken[name], error=errors[name]) for name in taken]


def table(result: Result) -> str:
    """Lay out the medians of ours, and how many times as long every peer takes."""
    cases, ours = result.by_case(), result.settings["ours"]
    others = [peer for peer in cases[0] if peer != ours]
    heads = ["layer of the preset", "shape (B, S, C, D)"]
    for direction in ("forward", "forward + backward"):
        heads += [f"{direction}: ours, `{ours}`", *(peer if " " in peer else f"eager {peer}" for peer in others)]
    rows = []
    for records in cases:
        case = records[ours].case
        row = [f"`{case['preset']}`", render.shape(case["shape"])]
        for direction in ("forward", "both"):
            median = {peer: record.median(direction) for peer, record in records.items()}
            row.append(milliseconds(median[ours]))
            row += [f"{milliseconds(median[peer])} ({median[peer] / median[ours]:.3g}x)" for peer in others]
        rows.append(row)
    return f"Measured {render.where(result)}\n\n{render.markdown(heads, rows)}"


TABLES = {"": table}
