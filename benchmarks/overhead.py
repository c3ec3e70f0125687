"""What the host does before a GPU can start: the time of a call whose kernels are not launched.

This decides how the kernels are called. A GPU needs a few microseconds for the paper's own size, so that in eager mode
the host takes longer; what is measured here runs on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from tvae_kernels import backends, topographic
from tvae_kernels.arguments import Inputs, Window

from . import peers
from .measuring import Say, measure_all
from .problems import PAPER, Case, Problem
from .records import Record, Result
from .render import markdown, where

DEVICES = ("none",)
SHOWN = ("",)
CASE = replace(PAPER, shape=(1, *PAPER.shape[1:]))  # a single sequence: the allocator of the CPU should not count
CALLS = 500  # in a row, for one sample


class Nothing(torch.autograd.Function):
    """What PyTorch itself takes for an operation of three inputs, of which it keeps all."""

    @staticmethod
    def forward(ctx, z, u, mu):
        """Return a new tensor."""
        ctx.save_for_backward(z, u, mu)
        return torch.empty_like(z)

    @staticmethod
    def backward(ctx, dt):
        """No new tensors."""
        return ctx.saved_tensors


def run(samples: int = 15, output: Path | None = None) -> Result:
    """Time what the host does for a call of the kernels, without launching them.

    It needs no GPU. Without `--output` the table in docs/ is made anew.

    Args:
        samples: each the mean of many calls.
        output: JSON file to write; by default benchmarks/results/overhead.json.

    """

    def measured(case: Case, say: Say) -> list[Record]:
        return [Record(case.fields, call, {"host": times}) for call, times in measure(samples).items()]

    return measure_all("overhead", [CASE], measured, "none", {"samples": samples}, output)


def measure(samples: int, calls: int = CALLS) -> dict[str, list[float]]:
    """Take the microseconds of the host for one call, by the way it is called, as means of many calls in a row."""
    from tvae_kernels.backends.triton import launch, plain

    with launch.intercepted(lambda *args, **options: None):
        problem = Problem.random(CASE, torch.device("cpu"), seed=0)
        n, eps = CASE.neighborhood, peers.EPS
        z, u, mu = (x.detach() for x in (problem.z, problem.u, problem.mu))

        def call(z, u, mu):
            return topographic(z, u, mu, n, eps=eps, backend="triton")

        def nothing(z, u, mu):
            return Nothing.apply(z, u, mu)

        inputs, window = Inputs(z, u, mu, None), Window(n, eps)
        ways = {
            "a Function that does nothing, forward": lambda: problem.forward(nothing),
            "a Function that does nothing, forward and backward": lambda: problem.both(nothing),
            "kernels.forward, direct": lambda: plain.forward(inputs, window, True),
            "kernels.forward as an operator": lambda: backends.forward.operator("triton", inputs, window, True),
            "topographic, forward": lambda: problem.forward(call),
            "topographic, forward and backward": lambda: problem.both(call),
        }
        taken = {name: [] for name in ways}
        for _ in range(samples):
            for name, way in ways.items():
                taken[name].append(_microseconds(way, calls))
    return taken


def _microseconds(way: Callable[[], object], calls: int) -> float:
    begin = time.thread_time()  # of this thread alone, whatever else runs
    for _ in range(calls):
        way()
    return 1e6 * (time.thread_time() - begin) / calls


def table(result: Result) -> str:
    """Lay out the medians."""
    text = f"Measured {where(result, ('torch', 'Python'))}"
    rows = [[record.variant, f"{record.median('host'):.0f} us"] for record in result.records]
    return f"{text}\n\n{markdown(['call', 'time of the host'], rows)}"


TABLES = {"": table}
