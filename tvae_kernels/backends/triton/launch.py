"""Launching kernels, and watching it: tests and benchmarks see every launch here instead of on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}
WARP = 64 if torch.version.hip else 32
_instead: Callable | None = None  # of launching


class Launch(NamedTuple):
    """A kernel with what it was to be launched with."""

    kernel: object
    grid: tuple[int, ...]
    arguments: dict[str, object]  # by name, and the options


def launch(x: Tensor, kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch on the device of `x`, which need not be the current one; an empty grid has nothing to launch."""
    if 0 in grid:
        return
    if _instead is not None:
        _instead(x, kernel, grid, *args, **options)
    elif x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def intercepted(instead: Callable[..., None]) -> Iterator[None]:
    """Within this context, call `instead` with what `launch` is called with; tensors may then be on any device.

    It sees the launches of all threads; `kernel[grid](*args, **options)` makes one.
    """
    global _instead
    outer, _instead = _instead, instead
    try:
        yield
    finally:
        _instead = outer


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within this context, keep a list of launches instead of launching; results are memory that nobody wrote."""
    launches = []

    def record(x, kernel, grid, *args, **options):
        launches.append(Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | options))

    with intercepted(record):
        yield launches


def takes_any_device() -> bool:
    """Say whether tensors need not be on a GPU: the kernels run through Triton's interpreter, or not at all."""
    return _instead is not None or interpreted()


def interpreted() -> bool:
    """Say whether the kernels run through Triton's interpreter, as `TRITON_INTERPRET` said when they were imported."""
    return isinstance(_like_all_kernels, InterpretedFunction)


@triton.jit
def _like_all_kernels():
    pass


def constants(kind: type, fields: dict):
    """Return the fields of what a kernel is compiled for, as it wants them."""
    return kind(**{name: tl.constexpr(value) for name, value in fields.items()})


def ceiling(n: int, divisor: int) -> int:
    """Return `n / divisor` rounded up, in a tenth of the time of `triton.cdiv`."""
    return -(-n // divisor)
