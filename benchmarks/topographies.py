"""Every topography beside its reference, at the size of the preset that has it: checked, then timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tvae.presets import PRESETS
from tvae_kernels import Neighborhood

from . import devices, operation, peers
from .operation import Problem, WrongResultError

PLAIN = "sprites-tvae-w10-k1"
NAMES = (
    PLAIN,
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


@dataclass(frozen=True)
class Topography:
    """A preset's layer: the neighbourhood, `z` of `shape` `(B, S, C, D)`, and what else it has.

    That is a window that each capsule has learned, or for each sequence an axis that the layer is told.
    """

    preset: str
    neighborhood: Neighborhood
    shape: tuple[int, int, int, int]
    learned: bool
    told: bool

    @property
    def name(self) -> str:
        """As in "sprites-tvae-third 8x15x45x5"."""
        return f"{self.preset} {'x'.join(map(str, self.shape))}"

    def peer(self, name: str, device: torch.device) -> Callable[..., torch.Tensor]:
        """A peer that does what the layer does, with sequences that roll along one axis after the other."""
        n = self.neighborhood
        axis = torch.arange(self.shape[0], device=device) % n.root_count if self.told else None
        return peers.build(name, n, axis)

    def problem(self, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Problem:
        """Normal `z`, `u` and `dt`, the latter with a mean, the paper's initial `mu`, and weights around 1."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        n, weights = self.neighborhood, None
        if self.learned:
            weights = torch.rand(self.shape[2], *n.weights_shape, generator=generator, device=device, dtype=dtype) + 0.5
        mu = torch.tensor(30.0, dtype=dtype, device=device)
        z, u, dt = normal(*self.shape), normal(*n.shape_of_u(self.shape)), normal(*self.shape) + 0.5
        return Problem(z, u, mu, dt, weights).leaves()


def topographies(device_type: str) -> Iterator[Topography]:
    """All of them, at the preset's batch and at many times that."""
    for times in BATCHES[device_type]:
        for name in NAMES:
            config = PRESETS[name].config
            frames = 1 if config.data == "mnist-still" else 15
            shape = (times * config.batch_size, frames, config.capsules, config.capsule_dim)
            yield Topography(name, config.neighborhood, shape, config.window == "capsule", config.told_axis)


def check(topography: Topography, peer: str, problem: Problem) -> float:
    """The largest error of a peer against float64, relative to the largest number of each result.

    By norm and not by element, as in `operation.Judge`: shifts by phase have coefficients of either sign.

    Raises:
        WrongResultError: it is above the rounding errors of as many terms as there are.

    """
    n = topography.neighborhood
    exact = {name: x.detach().double() for name, x in problem.inputs.items()}
    device = problem.z.device
    wanted = Problem(**exact, dt=problem.dt.double()).leaves().both(topography.peer("reference", device))
    terms = sum(1 for _ in n.taps()) + topography.shape[3] * (n.roll == "fourier")
    worst = 0.0
    for what, x in problem.both(topography.peer(peer, device)).items():
        # 3 times, for r cubed is in the gradients; sums over all elements as in operation.Judge.
        most = 3 * (terms + 10) + (6 * math.sqrt(problem.z.numel()) if what in ("dmu", "dweights") else 0)
        error = ((x.double() - wanted[what]).norm(torch.inf) / wanted[what].norm(torch.inf)).item()
        if not error <= most * torch.finfo(torch.float32).eps:
            raise WrongResultError(f"{peer}: {what} of {topography.name} is off by {error:.3g} of its largest number")
        worst = max(worst, error)
    return worst


def measure(
    topography: Topography, device: torch.device, samples: int, say: Callable[[str], object] = lambda _: None
) -> dict:
    """Check our backend and the references, then time them in turn.

    Returns:
        The preset and the shape; `samples`, by peer and direction in microseconds; `error`, by peer.

    Raises:
        WrongResultError: a peer gives a wrong result; then nothing is timed.

    """
    torch.compiler.reset()
    clock = devices.clock(device)
    bytes_each = 3 * math.prod(topography.shape) * torch.float32.itemsize
    problems = [topography.problem(device, seed) for seed in range(devices.rotation(device, bytes_each))]
    timed, errors = {}, {}
    for name in (peers.OURS[device.type], *PEERS[device.type]):
        say(f"check {name}")
        errors[name] = check(topography, name, problems[0])
        call = topography.peer(name, device)
        timed[name] = lambda turn, call=call: operation.sample(call, problems, clock, turn)
    taken = operation.in_turn(timed, samples, say)
    return {"preset": topography.preset, "shape": topography.shape, "samples": taken, "error": errors}
