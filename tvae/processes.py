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
        """Of the environment; without torchrun, one process."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))


def launch(device: str) -> Fabric:
    """The device of this process, connected with the others through gloo (CPU) or NCCL (GPU).

    Args:
        device: "auto", "cpu" or "cuda".

    """
    from lightning_fabric import Fabric

    launched = Launched.find()
    fabric = Fabric(accelerator=device, devices=launched.on_machine, num_nodes=launched.count // launched.on_machine)
    if launched.count > 1:
        fabric.launch()
    return fabric


def disconnect() -> None:
    """Disconnect this process from the others, if there are any: metrics would ask them for their share."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def mean(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes; as their parts of a batch are equal, that over all sequences."""
    if fabric.world_size == 1:
        return values
    total = _reduced(fabric, values.values(), dist.ReduceOp.SUM)
    return {name: x / fabric.world_size for name, x in zip(values, total, strict=True)}


def highest(fabric: Fabric, *values: int) -> list[int]:
    """The highest of each value that any process has."""
    if fabric.world_size == 1:
        return list(values)
    return list(map(int, _reduced(fabric, values, dist.ReduceOp.MAX)))


def _reduced(fabric: Fabric, values: Iterable[float], operation: dist.ReduceOp) -> list[float]:
    # Not by `fabric.all_reduce`, which waits in a barrier before.
    x = torch.tensor(list(values), dtype=torch.float64, device=fabric.device)
    dist.all_reduce(x, operation)
    return x.tolist()


def on_first(fabric: Fabric, action: Callable[..., T], *arguments) -> T | None:
    """What the action of the first process returns, None for the others, which wait for its end.

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
