"""The time and memory of the operation beside its peers: each checked against float64 first, then timed in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from tvae_kernels import Neighborhood, topographic

from . import devices, peers

FLOOR = {"forward": 3, "backward": 5, "both": 8}  # tensors that must move: z, u, t; dt, z, u, dz, du; all of them
FEWEST_SAMPLES = 3
PATIENCE = 5e6  # microseconds of samples after which a slow peer is not sampled further
CONVOLVED_WINDOW = 18  # the convolution is so slow that one window has to do


@dataclass(frozen=True)
class Case:
    """One problem: `z` and `u` of `shape` `(B, S, C, D)` and type `dtype`, a window of W frames and K positions."""

    shape: tuple[int, int, int, int]
    time_window: int
    capsule_window: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As in "64x18x18x18 W18 K3 float32"."""
        return f"{'x'.join(map(str, self.shape))} W{self.time_window} K{self.capsule_window} {self.dtype}"

    @property
    def neighborhood(self) -> Neighborhood:
        """The paper's: shift 1, circular."""
        return Neighborhood(self.time_window, self.capsule_window)

    @property
    def tensor_bytes(self) -> int:
        """Size of one of `z`, `u`, `t`, ..."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def floor_bytes(self, direction: str) -> int:
        """Bytes that any implementation moves: every input read once, every output written once."""
        return FLOOR[direction] * self.tensor_bytes


PAPER = Case((8, 18, 18, 18), 18, 3)


def cases(device_type: str) -> list[Case]:
    """The set for a CPU or a GPU. A window longer than the sequence becomes as long as the sequence, once."""
    if device_type == "cuda":
        shapes = ((4096, 18, 18, 18), (4096, 15, 15, 15), (256, 64, 32, 128), (64, 1024, 16, 64))
        windows, widths, dtypes = (1, 5, 18, 64), (1, 3, 9), ("float32", "bfloat16")
    else:
        shapes = ((8, 18, 18, 18), (64, 18, 18, 18), (64, 15, 15, 15), (8, 256, 16, 64))
        windows, widths, dtypes = (1, 5, 10, 18), (1, 3), ("float32",)
    return [
        Case(shape, window, width, dtype)
        for dtype in dtypes
        for shape in shapes
        for window in dict.fromkeys(min(window, shape[1]) for window in windows)
        for width in widths
    ]


@dataclass
class Problem:
    """Tensors for one run: leaves `z`, `u`, `mu` and perhaps weights, and the gradient `dt` that arrives at `t`."""

    z: Tensor
    u: Tensor
    mu: Tensor
    dt: Tensor
    weights: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The leaves by name."""
        named = {"z": self.z, "u": self.u, "mu": self.mu, "weights": self.weights}
        return {name: x for name, x in named.items() if x is not None}

    @classmethod
    def random(cls, case: Case, device: torch.device, seed: int) -> Problem:
        """Normal `z` and `u`, the paper's initial `mu` of 30, and a `dt` with a mean, so that `dmu` does not cancel."""
        generator = torch.Generator(device).manual_seed(seed)
        z, u, dt = torch.randn(3, *case.shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        mu = torch.tensor(30.0, dtype=torch.promote_types(z.dtype, torch.float32), device=device)
        return cls(z, u, mu, dt + 0.5).leaves()

    def leaves(self) -> Problem:
        """The same values, ready for autograd."""
        leaves = {name: x.detach().contiguous().requires_grad_() for name, x in self.inputs.items()}
        return replace(self, **leaves)

    def forward(self, call: Callable) -> Tensor:
        """`t`, without keeping anything for a gradient."""
        with torch.no_grad():
            return call(*self.inputs.values())

    def both(self, call: Callable, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
        """`t` and the gradient `d…` of every input; calls `between` when `t` is there."""
        t = call(*self.inputs.values())
        between()
        gradients = torch.autograd.grad(t, tuple(self.inputs.values()), self.dt)
        return {"t": t.detach()} | {f"d{name}": x for name, x in zip(self.inputs, gradients, strict=True)}


class WrongResultError(AssertionError):
    """A peer does not compute the operation: nothing of it is timed."""


@dataclass
class Judge:
    """What `t`, `dz`, `du` and `dmu` should be, in float64, and how far float32 sums may be from it, per element.

    Rounding errors are counted along the longest path (first order, as in tests/numerics.py) and multiplied by the
    size that the result would have without cancellation, which is the result for `|z - mu|` and `-|dt|`. For the sum
    over all elements in `dmu` the worst case says nothing; 6·sqrt(n) bounds it with probability 1 - 4e-8 (Higham &
    Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis", theorem 2.4: 2·exp(-36/2)).
    """

    exact: dict[str, Tensor]
    bounds: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, neighborhood: Neighborhood) -> Judge:
        """The reference's results, differentiated by autograd."""

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
        """The largest error of the peer `name`, forward and both ways, as a fraction of its bound.

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
    """The floor: copies that read and write as many bytes as the operation has to, in rotated buffers."""

    def __init__(self, case: Case, device: torch.device, count: int):
        self.case = case
        elements = max(FLOOR.values()) * case.tensor_bytes // 2 // 4
        self.buffers = [torch.randn(2, elements, device=device) for _ in range(count)]

    def sample(self, clock, turn: int) -> dict[str, list[float]]:
        """Microseconds of one copy a direction."""
        result = {}
        for direction in FLOOR:
            source, target = self.buffers[turn % len(self.buffers)][:, : self.case.floor_bytes(direction) // 2 // 4]
            turn += 1
            clock.start()
            begin = clock.mark()
            target.copy_(source)
            result[direction] = clock.microseconds(begin, clock.mark())
        return result


def sample(call: Callable, problems: list[Problem], clock, turn: int) -> dict[str, list[float]]:
    """Microseconds of one forward pass without a gradient, and of one with it, divided where `t` is there."""
    clock.start()
    marks = [clock.mark()]
    t = problems[turn % len(problems)].forward(call)
    marks.append(clock.mark())
    result = {"forward": clock.microseconds(*marks)}
    del t
    clock.start()
    marks = [clock.mark()]
    kept = problems[(turn + 1) % len(problems)].both(call, between=lambda: marks.append(clock.mark()))
    marks.append(clock.mark())
    _, backward = clock.microseconds(*marks)
    del kept
    return result | {"backward": [backward], "both": clock.microseconds(marks[0], marks[-1])}


def measure(case: Case, device: torch.device, samples: int, say: Callable[[str], object] = lambda _: None) -> dict:
    """Check all peers of the device on a case, then time them in turn, so that what disturbs one disturbs all.

    Args:
        case: the problem.
        device: where.
        samples: of each peer, fewer for the slow ones.
        say: told what is being done.

    Returns:
        The case's fields; `samples`, by peer and direction in microseconds; `memory`, by peer and direction the peak
        in bytes with the inputs; `error`, by peer the largest as a fraction of its bound; `not_timed`, by peer why.

    Raises:
        WrongResultError: a peer gives a wrong result; then nothing is timed.

    """
    torch.compiler.reset()
    clock = devices.clock(device)
    count = devices.rotation(device, 3 * case.tensor_bytes)
    problems = [Problem.random(case, device, seed) for seed in range(count)]
    say("float64")
    judge = Judge.of(problems[0], case.neighborhood)
    timed, errors, memory, not_timed = {}, {}, {}, {}
    for name in peers.NAMES[device.type]:
        if name == "convolution" and case.time_window != CONVOLVED_WINDOW:
            continue
        say(f"check {name}")
        call = peers.build(name, case.neighborhood)
        try:
            errors[name] = judge.check(name, problems[0], call)
            memory[name] = _peaks(case, device, problems[1], call)
        except RuntimeError as error:
            if name == peers.OURS[device.type]:
                raise
            not_timed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        timed[name] = lambda turn, call=call: sample(call, problems, clock, turn)
    del judge
    copies = Copies(case, device, count)
    timed["copy"] = lambda turn: copies.sample(clock, turn)

    taken = in_turn(timed, samples, say)
    return asdict(case) | {"samples": taken, "memory": memory, "error": errors, "not_timed": not_timed}


def in_turn(
    timed: dict[str, Callable[[int], dict[str, list[float]]]], samples: int, say: Callable[[str], object]
) -> dict[str, dict[str, list[float]]]:
    """Take samples of each in turn after a warm-up, fewer of the slow ones; by name and direction."""
    say("warm up")
    rounds = {}
    for name, run in timed.items():
        first = run(0)
        rounds[name] = max(FEWEST_SAMPLES, min(samples, int(PATIENCE / sum(first["forward"] + first["both"]))))
    taken = {name: {direction: [] for direction in FLOOR} for name in timed}
    turn = 1
    for i in range(samples):
        say(f"time {i + 1} of {samples}")
        for name, run in timed.items():
            if i < rounds[name]:
                for direction, microseconds in run(turn).items():
                    taken[name][direction] += microseconds
                turn += 3
    return taken


def _peaks(case: Case, device: torch.device, problem: Problem, call: Callable) -> dict[str, int]:
    """Peak bytes with the inputs: `z` and `u` forward, and `dt` both ways."""
    forward = devices.peak_memory(device, lambda: problem.forward(call))
    both = devices.peak_memory(device, lambda: problem.both(call))
    return {"forward": 2 * case.tensor_bytes + forward, "both": 3 * case.tensor_bytes + both}


def measure_latency(device: torch.device, samples: int) -> dict[str, list[float]]:
    """Microseconds of graph replays and of the host at the paper's size; see `devices.latency`."""
    problem = Problem.random(PAPER, device, seed=0)
    call = peers.build(peers.OURS[device.type], PAPER.neighborhood)
    Judge.of(problem, PAPER.neighborhood).check(peers.OURS[device.type], problem, call)
    return devices.latency({"forward": lambda: problem.forward(call), "both": lambda: problem.both(call)}, samples)
