"""The processes that train one model together: those that torchrun has started, or this one alone.

Every process takes its part of each batch. All of them go on, stop or fail after the same step, and the first one
writes the files. What is asked of several processes here costs a single one nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from .run import RunError

if TYPE_CHECKING:  # else imported where needed: it takes seconds
    from lightning_fabric import Fabric

T = TypeVar("T")


class Launched(NamedTuple):
    """What torchrun says about this process: its number, and how many there are, in all and on this machine."""

    rank: int = 0
    count: int = 1
    on_machine: int = 1

    @classmethod
    def find(cls) -> Launched:
        """Read the environment; without torchrun there is one process."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of a name: "auto" is a GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device, or not one for every process.

    """
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but PyTorch finds no such device; use --device cpu")
    processes = Launched.find().on_machine
    if kind.type == "cuda" and torch.cuda.device_count() < processes:
        raise ValueError(f"{processes} processes need a GPU each, but there are {torch.cuda.device_count()}")
    return kind


def launch(device: torch.device) -> Fabric:
    """Connect this process, on a device of that type, with the others through gloo (CPU) or NCCL (GPU)."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    launched = Launched.find()
    # Said here, for Fabric would also believe the variables of a scheduler that has started no processes.
    environment = LightningEnvironment() if launched.count == 1 else TorchElasticEnvironment()
    fabric = Fabric(
        accelerator=device.type,
        devices=launched.on_machine,
        num_nodes=launched.count // launched.on_machine,
        plugins=environment,
    )
    if launched.count > 1:
        fabric.launch()
    return fabric


def disconnect() -> None:
    """Disconnect this process from the others, if there are any: metrics would ask them for their share."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def mean(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over all processes: over all sequences, as their parts of a batch are equal."""
    if fabric.world_size == 1:
        return values
    total = _reduced(fabric, values.values(), dist.ReduceOp.SUM)
    return {name: x / fabric.world_size for name, x in zip(values, total, strict=True)}


def highest(fabric: Fabric, *values: int) -> list[int]:
    """Return the highest of each value that any process has."""
    if fabric.world_size == 1:
        return list(values)
    return list(map(int, _reduced(fabric, values, dist.ReduceOp.MAX)))


def _reduced(fabric: Fabric, values: Iterable[float], operation: dist.ReduceOp) -> list[float]:
    # Not by `fabric.all_reduce`, which waits in a barrier before.
    x = torch.tensor(list(values), dtype=torch.float64, device=fabric.device)
    dist.all_reduce(x, operation)
    return x.tolist()


def on_first(fabric: Fabric, action: Callable[..., T], *arguments) -> T | None:
    """Return what the action of the first process returns, None for the others, which wait for its end.

    Raises:
        RunError: the action has raised it; in all processes.

    """
    if fabric.world_size == 1:
        return action(*arguments)
    result = failure = None
    if fabric.is_global_zero:
        try:
            result = action(*arguments)
        except RunError as error:
            failure = error
    message = fabric.broadcast(None if failure is None else str(failure))
    if message is not None:
        raise RunError(message) from failure
    return result
