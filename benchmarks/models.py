"""A training step of every model at the same sizes, and potentials in closed form beside automatic differentiation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tvae.models.potentials import Potentials

from . import devices, render, targets
from .measuring import Say, in_turn, measure_all, silent
from .problems import WrongResultError
from .records import Record, Result, tenths
from .render import markdown, milliseconds, where
from .targets import Target
from .variants import VARIANTS, Trainer, check, config_of

DEVICES = ("cpu", "cuda")
SHOWN = ("", "potentials", "targets")
MODELS = ("vae", "betavae", "slowvae", "factorvae", "tvae", "poflow", "flowvae", "weakflowvae")
BLOCK = 3  # steps of a variant before it is another's turn
PATIENCE = 30e6  # microseconds of samples after which a slow variant is not sampled further
BATCH, FRAMES, SIZE, HIDDEN = 16, 9, 324, 128  # of the flows on MNIST


def run(data_dir: Path | None = None, samples: int = 30, output: Path | None = None) -> Result:
    """Time a training step of every model, data included, and the same of potentials in closed form and by autograd.

    Without `--output` the tables in docs/ are made anew.

    Args:
        data_dir: folder with MNIST; without it models are measured on rooms alone.
        samples: steps of each variant; slow ones get fewer.
        output: JSON file to write, after every case; by default benchmarks/results/models-MACHINE.json.

    """
    device = devices.here()
    measured = partial(measure, device=device, samples=samples)
    return measure_all("models", cases(data_dir), measured, device.type, {"samples": samples}, output)


@dataclass(frozen=True)
class Models:
    """Names the data that all models are trained on."""

    data: str
    folder: Path | None

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return {"data": self.data}

    @property
    def name(self) -> str:
        """Name the case."""
        return f"models of {self.data}"


@dataclass(frozen=True)
class Equation:
    """Names the equation whose residual potentials pay for."""

    equation: str

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return {"equation": self.equation}

    @property
    def name(self) -> str:
        """Name the case."""
        return f"potentials, {self.equation} equation"


def cases(data_dir: Path | None) -> list[Models | Equation]:
    """List the data of the models, that of MNIST only where there is a folder with its files, and the equations."""
    names = ("mnist-open", "rooms") if data_dir is not None else ("rooms",)
    folders = {"mnist-open": data_dir}
    return [*(Models(name, folders.get(name)) for name in names), *map(Equation, RESIDUALS)]


def measure(case: Models | Equation, say: Say = silent, *, device: torch.device, samples: int) -> list[Record]:
    """Check and time everything that a case compares, in turn; raises WrongResultError before anything is timed."""
    kind = measure_models if isinstance(case, Models) else measure_potentials
    return kind(case, say, device=device, samples=samples)


# --- models -----------------------------------------------------------------------------------------------------------


def measure_models(
    case: Models, say: Say = silent, *, device: torch.device, samples: int, models: tuple[str, ...] = MODELS
) -> list[Record]:
    """Check that the first step of every model is finite and reaches all of its parameters; time steps in turn.

    Returns:
        A record for each model: samples by stage, the peak memory of a step beyond weights and data, and parameters.

    Raises:
        WrongResultError: a loss or a gradient is not finite, or a parameter has none.

    """
    timed, found = {}, {}
    for name in models:
        say(f"check {name}")
        config = config_of(f"{case.data}-{name}", case.folder)
        trainer = Trainer(VARIANTS["eager"], config, config.open_source("train", device))
        step, memory = trainer.first_step()
        wrong = [what for what, x in step.items() if not x.isfinite().all() or not x.any()]
        if wrong:
            raise WrongResultError(f"{name}: {', '.join(wrong)} is not finite or 0 everywhere")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        found[name] = {"memory": {"step": memory}, "values": {"parameters": parameters}}
        timed[name] = partial(trainer, devices.clock(device))
    taken = in_turn(timed, samples, say, patience=PATIENCE, block=BLOCK, skipped=1)
    return [Record(case.fields, name, taken[name], **found[name]) for name in models]


def table(result: Result) -> str:
    """Lay out steps of all models beside that of the VAE, their memory and parameters."""
    heads = ["data", "model", "step", "VAE's step", "forward", "backward", "peak memory", "parameters"]
    rows = []
    for records in result.by_case():
        if "vae" not in records:
            continue
        base = statistics.median(records["vae"].whole())
        for name, record in records.items():
            time, (low, high) = statistics.median(record.whole()), tenths(record.whole())
            rows.append(
                [
                    record.case["data"],
                    name,
                    f"{milliseconds(time)} ({milliseconds(low)} to {milliseconds(high)})",
                    f"{time / base:.2f}x",
                    *(milliseconds(record.median(stage)) for stage in ("forward", "backward")),
                    render.mebibytes(record.memory["step"]),
                    f"{record.values['parameters'] / 1e6:.2f} million",
                ]
            )
    return f"Measured {where(result)}\n\n{markdown(heads, rows)}"


# --- potentials -------------------------------------------------------------------------------------------------------

# From potentials, points `(1, N, n)` and the times of steps: all points on the way, and what the equation leaves over
# where a step starts.
Derive = Callable[[Potentials, Tensor, Tensor], tuple[Tensor, Tensor]]


def hamilton_jacobi(potentials: Potentials, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Leave `∂u/∂t + |∇u|² / 2` over, in closed form."""
    walk = potentials.walk(z, times)
    return walk.points, walk.rates + walk.gradients.square().sum(-1) / 2


def wave(potentials: Potentials, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Leave `∂²u/∂t² - Δu` over, in closed form."""
    points = potentials.walk(z, times).points
    starts = points[:, :, :-1]
    u = potentials(starts.flatten(1, 2), times.repeat(z.shape[1]))
    return points, (u.second_rate() - u.laplacian()).view(starts.shape[:-1])


def hamilton_jacobi_by_autograd(potentials: Potentials, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Give the same by differentiating `u`."""

    def residual(z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        gradient, rate = _differentiated(potentials, z, time)
        return gradient, rate + gradient.square().sum(-1) / 2

    return _step_by_step(residual, z, times)


def wave_by_autograd(potentials: Potentials, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Give the same by differentiating `u` twice: of the Hessian only the trace is summed, but all of it is made."""

    def residual(z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        gradient, rate = _differentiated(potentials, z, time)
        (second_rate,) = torch.autograd.grad(rate.sum(), time, create_graph=True)
        basis = torch.eye(z.shape[-1], device=z.device)[:, None, None].expand(-1, *z.shape)
        (hessian,) = torch.autograd.grad(gradient, z, basis, create_graph=True, is_grads_batched=True)
        return gradient, second_rate - (hessian * basis).sum((0, -1))

    return _step_by_step(residual, z, times)


def _step_by_step(residual: Callable, z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    points, residuals = [z], []
    for time in times:
        z = z if z.requires_grad else z.detach().requires_grad_()
        gradient, left = residual(z, time.expand(z.shape[1]).detach().requires_grad_())
        z = z + gradient
        points.append(z)
        residuals.append(left)
    return torch.stack(points, 2), torch.stack(residuals, 2)


def _differentiated(potentials: Potentials, z: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    gradient, rate = torch.autograd.grad(potentials(z, time).value().sum(), (z, time), create_graph=True)
    return gradient, rate[None]


RESIDUALS: Mapping[str, Mapping[str, Derive]] = {
    "Hamilton-Jacobi": {"closed form": hamilton_jacobi, "autograd": hamilton_jacobi_by_autograd},
    "wave": {"closed form": wave, "autograd": wave_by_autograd},
}


class TimedWalk:
    """Takes points along one potential, and the gradients of what they and their residuals come to."""

    def __init__(self, derive: Derive, potentials: Potentials, z: Tensor):
        self.derive, self.potentials, self.z = derive, potentials, z

    def step(self) -> dict[str, Tensor]:
        """Give the loss and the gradients of all weights: those of `w` and of the layers below it."""
        self.potentials.zero_grad()
        times = torch.arange(1.0, FRAMES, device=self.z.device)
        points, residuals = self.derive(self.potentials, self.z, times)
        loss = sum(x[:, :, i].square().mean() for x in (points[:, :, 1:], residuals) for i in range(len(times)))
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in self.potentials.named_parameters()}

    def __call__(self, clock, count: int) -> list[dict[str, float]]:
        """Take the microseconds of some steps."""
        marks = [clock.mark()]
        for _ in range(count):
            self.step()
            marks.append(clock.mark())
        return [{"step": time} for time in clock.microseconds(*marks)]


def measure_potentials(
    case: Equation,
    say: Say = silent,
    *,
    device: torch.device,
    samples: int,
    derivations: Mapping[str, Derive] | None = None,
    size: int = SIZE,
    hidden: int = HIDDEN,
) -> list[Record]:
    """Check that loss and gradients are those of the closed form; time both in turn.

    The bound is that of two ways to add the same terms, as in `variants.rounding`: through the layers of every step,
    there and back, twice over, for the residual is differentiated again.

    Raises:
        WrongResultError: they differ by more than rounding; then nothing is timed.

    """
    torch.manual_seed(0)
    potentials, z = Potentials(1, size, hidden).to(device), torch.randn(1, BATCH, size, device=device)
    bound = 6 * math.sqrt(FRAMES * 4 * (size + 2 * hidden)) * torch.finfo(torch.float32).eps
    derivations = derivations or RESIDUALS[case.equation]
    timed, errors, wanted = {}, {}, None
    for name, derive in derivations.items():
        say(f"check {name}")
        walk = TimedWalk(derive, potentials, z)
        found = walk.step()
        wanted = wanted or found
        errors[name] = check(name, found, wanted, bound)
        timed[name] = partial(walk, devices.clock(device))
    taken = in_turn(timed, samples, say, patience=PATIENCE, block=BLOCK, skipped=1)
    return [Record(case.fields, name, taken[name], error=errors[name]) for name in derivations]


def potentials_table(result: Result) -> str:
    """Lay out a step of the potentials in both ways."""
    rows = []
    for records in result.by_case():
        if "autograd" in records:
            ours, autograd = (records[name].median("step") for name in ("closed form", "autograd"))
            equation = records["autograd"].case["equation"]
            rows.append([equation, milliseconds(ours), milliseconds(autograd), f"{autograd / ours:.1f}x"])
    heads = ["equation", "closed form", "automatic differentiation", "ratio"]
    return f"Measured {where(result)}\n\n{markdown(heads, rows)}"


def targets_table(result: Result) -> str:
    """Lay out every promise beside what was measured."""
    found = {records["autograd"].case["equation"]: records for records in result.by_case() if "autograd" in records}
    return (
        f"Measured {where(result)}\n\n{targets.table(_faster(equation, found.get(equation)) for equation in RESIDUALS)}"
    )


def _faster(equation: str, records: dict[str, Record] | None) -> Target:
    promise = f"{equation} equation: closed forms at least 3 times as fast as automatic differentiation"
    if records is None:
        return Target(promise)
    ratio = records["autograd"].median("step") / records["closed form"].median("step")
    return Target(promise, f"{ratio:.1f}x", ratio >= 3)


TABLES = {"": table, "potentials": potentials_table, "targets": targets_table}
