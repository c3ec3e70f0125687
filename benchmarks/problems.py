"""The operation as it is timed: its cases, tensors, right results and their bounds, and the copies beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tvae_kernels import Neighborhood, topographic

from . import devices, peers

FLOOR = {"forward": 3, "backward": 5, "both": 8}  # tensors that must move: z, u, t; dt, z, u, dz, du; all of them


@dataclass(frozen=True)
class Case:
    """Gives shape `(B, S, C, D)` and type of `z` and `u`, and a window of W frames and K positions."""

    shape: tuple[int, int, int, int]
    time_window: int
    capsule_window: int
    dtype: str = "float32"

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return asdict(self)

    @property
    def name(self) -> str:
        """Name the case, as in "64x18x18x18 W18 K3 float32"."""
        return f"{'x'.join(map(str, self.shape))} W{self.time_window} K{self.capsule_window} {self.dtype}"

    @property
    def neighborhood(self) -> Neighborhood:
        """Give the paper's: shift 1, circular."""
        return Neighborhood(self.time_window, self.capsule_window)

    @property
    def tensor_bytes(self) -> int:
        """Give the size of one of `z`, `u`, `t`, ..."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def floor_bytes(self, direction: str) -> int:
        """Count what any implementation moves: every input read once, every output written once."""
        return FLOOR[direction] * self.tensor_bytes


PAPER = Case((8, 18, 18, 18), 18, 3)


@dataclass
class Problem:
    """Holds the tensors of one run: leaves `z`, `u`, `mu`, maybe weights; and the gradient `dt` that arrives at `t`."""

    z: Tensor
    u: Tensor
    mu: Tensor
    dt: Tensor
    weights: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Give the leaves by name."""
        named = {"z": self.z, "u": self.u, "mu": self.mu, "weights": self.weights}
        return {name: x for name, x in named.items() if x is not None}

    @classmethod
    def random(cls, case: Case, device: torch.device, seed: int) -> Problem:
        """Draw normal `z` and `u`, and a `dt` with a mean, so that `dmu` does not cancel; `mu` is the paper's 30."""
        generator = torch.Generator(device).manual_seed(seed)
        z, u, dt = torch.randn(3, *case.shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        mu = torch.tensor(30.0, dtype=torch.promote_types(z.dtype, torch.float32), device=device)
        return cls(z, u, mu, dt + 0.5).leaves()

    def leaves(self) -> Problem:
        """Give the same values, ready for autograd."""
        leaves = {name: x.detach().contiguous().requires_grad_() for name, x in self.inputs.items()}
        return replace(self, **leaves)

    def forward(self, call: Callable) -> Tensor:
        """Compute `t`, without keeping anything for a gradient."""
        with torch.no_grad():
            return call(*self.inputs.values())

    def both(self, call: Callable, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
        """Compute `t` and the gradient `d…` of every input; call `between` when `t` is there."""
        t = call(*self.inputs.values())
        between()
        gradients = torch.autograd.grad(t, tuple(self.inputs.values()), self.dt)
        return {"t": t.detach()} | {f"d{name}": x for name, x in zip(self.inputs, gradients, strict=True)}

    def peaks(self, call: Callable) -> dict[str, int]:
        """Measure the peak in bytes with the inputs: `z` and `u` forward, and `dt` both ways."""
        forward = devices.peak_memory(self.z.device, lambda: self.forward(call))
        both = devices.peak_memory(self.z.device, lambda: self.both(call))
        return {"forward": 2 * self.z.nbytes + forward, "both": 3 * self.z.nbytes + both}


class WrongResultError(AssertionError):
    """Says that something does not compute what it is compared with: nothing is timed."""


@dataclass
class Judge:
    """Knows what `t`, `dz`, `du` and `dmu` should be, in float64, and how far float32 sums may be from it, per element.

    Rounding errors are counted along the longest path (first order, as in tests/numerics.py) and multiplied by the
    size that the result would have without cancellation, which is the result for `|z - mu|` and `-|dt|`. For the sum
    over all elements in `dmu` the worst case says nothing; 6·sqrt(n) bounds it with probability 1 - 4e-8 (Higham &
    Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis", theorem 2.4: 2·exp(-36/2)).
    """

    exact: dict[str, Tensor]
    bounds: dict[str, Tensor]

    @classmethod
    def build(cls, problem: Problem, neighborhood: Neighborhood) -> Judge:
        """Take the reference's results, differentiated by autograd, and count the roundings."""

        def call(z: Tensor, u: Tensor, mu: Tensor) -> Tensor:
            return topographic(z, u, mu, neighborhood, eps=peers.EPS, backend="reference")

        dtype = problem.z.dtype
        z, u, mu, dt = (x.detach().double() for x in (problem.z, problem.u, problem.mu, problem.dt))
        exact = Problem(z, u, mu, dt).leaves().both(call)
        sizes = Problem((z - mu).abs(), u, torch.zeros_like(mu), -dt.abs()).leaves().both(call)
        in_r = (neighborhood.time_window * neighborhood.capsule_window + 3) / 2 + 4
        in_du = 3 * in_r + 5 + neighborhood.time_window * neighborhood.capsule_window + 2
        counts = {"t": in_r + 2, "dz": in_r + 1, "du": in_du, "dmu": in_r + 1 + 6 * math.sqrt(z.numel())}
        out = torch.finfo(dtype)
        judges = 2 if dtype == torch.float64 else 1  # the judge then rounds as often as the judged
        h = judges * 1.01 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
        last = dict.fromkeys(("t", "dz", "du"), out.eps / 2)  # rounding to the type of z; mu keeps float32
        bounds = {
            name: (counts[name] * h + last.get(name, 0)) * size.abs() + out.smallest_normal
            for name, size in sizes.items()
        }
        return cls(exact, bounds)

    def check(self, name: str, problem: Problem, call: Callable) -> float:
        """Give the largest error of the peer `name`, forward and both ways, as a fraction of its bound.

        Raises:
            WrongResultError: it is above 1, or a result is not finite, or has another shape or type.

        """
        alike = {"t": problem.z, "dz": problem.z, "du": problem.u, "dmu": problem.mu}
        worst = 0.0
        for run in (lambda: {"t": problem.forward(call)}, lambda: problem.both(call)):
            for what, x in run().items():
                if x.shape != alike[what].shape or x.dtype != alike[what].dtype:
                    raise WrongResultError(f"{name}: {what} is {tuple(x.shape)} {x.dtype}, not like its argument")
                error = ((x.double() - self.exact[what]).abs() / self.bounds[what]).max().item()
                if not error <= 1:  # also for NaN
                    raise WrongResultError(f"{name}: {what} is off by up to {error:.3g} times its error bound")
                worst = max(worst, error)
        return worst


class Copies:
    """Copies as many bytes as the operation has to read and write, in rotated buffers: the floor."""

    def __init__(self, case: Case, device: torch.device, count: int):
        self.case = case
        elements = max(FLOOR.values()) * case.tensor_bytes // 2 // 4
        self.buffers = [torch.randn(2, elements, device=device) for _ in range(count)]

    def pair(self, direction: str, turn: int) -> Tensor:
        """Give the two tensors of which one is copied to the other, that move the bytes of a direction."""
        return self.buffers[turn % len(self.buffers)][:, : self.case.floor_bytes(direction) // 2 // 4]

    def sample(self, clock, turn: int) -> dict[str, float]:
        """Take the microseconds of one copy a direction."""
        result = {}
        for i, direction in enumerate(FLOOR):
            source, target = self.pair(direction, turn + i)
            clock.start()
            begin = clock.mark()
            target.copy_(source)
            (result[direction],) = clock.microseconds(begin, clock.mark())
        return result


def sample(call: Callable, problems: list[Problem], clock, turn: int) -> dict[str, float]:
    """Take the microseconds of one forward pass without a gradient, and of one with it, divided where `t` is there."""
    clock.start()
    begin = clock.mark()
    t = problems[turn % len(problems)].forward(call)
    (forward,) = clock.microseconds(begin, clock.mark())
    del t
    clock.start()
    marks = [clock.mark()]
    kept = problems[(turn + 1) % len(problems)].both(call, between=lambda: marks.append(clock.mark()))
    marks.append(clock.mark())
    _, backward = clock.microseconds(*marks)
    (both,) = clock.microseconds(marks[0], marks[-1])
    del kept
    return {"forward": forward, "backward": backward, "both": both}


def sampler(once: Callable[[object, int], dict[str, float]], clock) -> Callable[[int], list[dict[str, float]]]:
    """Make of `once(clock, turn)` what takes many samples, each with the buffers that were not used for longest."""
    turns = itertools.count(step=3)
    return lambda count: [once(clock, next(turns)) for _ in range(count)]
