"""What the project promises of the operation's speed and memory and of training, beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tvae.presets import PRESETS

from .results import Measured, Result, Steps


@dataclass(frozen=True)
class Target:
    """A promise, what was measured of it, and whether it holds; None where the result has no samples for it."""

    promise: str
    measured: str
    holds: bool | None


def evaluate(result: Result) -> list[Target]:
    """The targets for the result's kind of machine."""
    return _gpu(result) if result.on_gpu else _cpu(result)


def _cpu(result: Result) -> list[Target]:
    wide = [m for m in result.measured if m.case.time_window >= 10]
    eager, both = "forward + backward against the eager reference", "both"
    compiled = "forward + backward against the compiled reference"
    return [
        _geometric_mean(f"{eager}: at least 3x, W >= 10", _each(wide, lambda m: m.speedup("reference", both)), 3),
        _geometric_mean(f"{compiled}: at least 2.5x, W >= 10", _each(wide, lambda m: m.speedup("compiled", both)), 2.5),
        _lowest(f"{eager}: never slower", _each(result.measured, lambda m: m.speedup("reference", both)), 1),
        _lowest(
            "forward + backward against the convolution: at least 200x, W = 18",
            _each(result.measured, lambda m: m.speedup("convolution", both)),
            200,
        ),
        _highest(
            "peak memory with the inputs: at most 4x the inputs `z`, `u` and `dt`",
            _each(result.measured, lambda m: m.memory(both, 3)),
            4,
        ),
    ]


def _gpu(result: Result) -> list[Target]:
    wide = [m for m in result.measured if m.case.time_window >= 5]
    memory = _each(result.measured, lambda m: m.memory("forward", 3))  # z, u, t
    memory += _each(result.measured, lambda m: m.memory("both", 6))  # z, u, t, dt, dz, du
    targets = [
        _lowest(
            "forward: at least 90 % of the copy's bandwidth",
            _each(result.measured, lambda m: 100 * m.of_copy("forward")),
            90,
            " %",
        ),
        _lowest(
            "backward: at least 80 % of the copy's bandwidth",
            _each(result.measured, lambda m: 100 * m.of_copy("backward")),
            80,
            " %",
        ),
        _lowest(
            "forward + backward against the best compiled reference: at least 2x, W >= 5",
            _each(wide, lambda m: m.speedup("compiled", "both")),
            2,
        ),
        _lowest(
            "forward + backward against the eager reference: at least 10x, W >= 5",
            _each(wide, lambda m: m.speedup("reference", "both")),
            10,
        ),
        _highest("peak memory: at most the floor's tensors and 5 %", memory, 1.05),
    ]
    times = {name: statistics.median(x) for name, x in (result.latency or {}).items()}
    for direction in ("forward", "both"):
        over = times[direction] - times["empty"] if times else None
        promise = f"paper's size, replay of a graph, {direction}: at most 2 us more than an empty kernel"
        targets.append(_at_most(promise, over, 2))
    for direction, limit in (("forward", 30), ("both", 60)):
        promise = f"paper's size, host time of an eager call, {direction}: at most {limit} us"
        targets.append(_at_most(promise, times.get(f"host {direction}"), limit))
    return targets


MNIST, SPRITES = "mnist-tvae-w18-k3", "sprites-tvae-w10-k1"


def training(cases: list[Steps], on_gpu: bool) -> list[Target]:
    """The targets of a whole training step, data included, on a GPU or on two cores of a CPU."""
    found = {(case.data["preset"], case.data["batch_size"]): case for case in cases}
    if not on_gpu:
        limits = ((MNIST, 60, 237), (SPRITES, 75, 420))
        return [_fastest(found.get((preset, 8)), preset, *limit) for preset, *limit in limits]
    wide = [_in_products(found.get((preset, 128)), preset) for preset in (MNIST, SPRITES)]
    return _replayed(found.get((MNIST, 8))) + wide


def _fastest(case: Steps | None, preset: str, most: float, published: float) -> Target:
    promise = f"`{preset}`, 8 sequences: at most {most} ms a step (published code: {published} ms)"
    if case is None:
        return Target(promise, "not measured", None)
    time = case.median(case.fastest()) / 1e3
    return Target(promise, f"{time:.3g} ms, {case.fastest()}", time <= most)


def _replayed(case: Steps | None) -> list[Target]:
    rate_promise = f"`{MNIST}`, 8 sequences, replayed: at least 2,500 steps/s"
    time_promise = f"`{MNIST}`, 8 sequences, replayed: 100 epochs in less than 5 minutes"
    if case is None or "graph" not in case.variants:
        return [Target(promise, "not measured", None) for promise in (rate_promise, time_promise)]
    rate, minutes = 1e6 / case.median("graph"), 60 * case.hours("graph", 8 * PRESETS[MNIST].config.steps)
    return [
        Target(rate_promise, f"{rate:,.0f} steps/s", rate >= 2500),
        Target(time_promise, f"{minutes:.3g} minutes", minutes < 5),
    ]


def _in_products(case: Steps | None, preset: str) -> Target:
    promise = f"`{preset}`, 128 sequences, replayed: at least 60 % of the step in matrix products"
    if case is None or "graph" not in case.variants:
        return Target(promise, "not measured", None)
    return Target(promise, f"{100 * case.products('graph'):.0f} %", case.products("graph") >= 0.6)


Figures = list[tuple[float, Measured]]


def _each(measured: Iterable[Measured], figure) -> Figures:
    """A figure of every case that has it."""
    pairs = ((figure(m), m) for m in measured)
    return [(value, m) for value, m in pairs if value is not None]


def _geometric_mean(promise: str, figures: Figures, least: float) -> Target:
    if not figures:
        return Target(promise, "not measured", None)
    value = statistics.geometric_mean(value for value, _ in figures)
    low, high = min(value for value, _ in figures), max(value for value, _ in figures)
    text = f"{value:.3g}x, geometric mean of {len(figures)} cases ({low:.3g}x to {high:.3g}x)"
    return Target(promise, text, value >= least)


def _lowest(promise: str, figures: Figures, least: float, unit: str = "x") -> Target:
    return _extreme(promise, figures, min, lambda value: value >= least, unit)


def _highest(promise: str, figures: Figures, most: float) -> Target:
    return _extreme(promise, figures, max, lambda value: value <= most, "x")


def _extreme(promise: str, figures: Figures, pick, good, unit: str) -> Target:
    if not figures:
        return Target(promise, "not measured", None)
    value, m = pick(figures, key=lambda figure: figure[0])
    median = statistics.median(value for value, _ in figures)
    kept = sum(good(value) for value, _ in figures)
    worst = f"{value:.3g}{unit} at worst ({m.case.name})"
    return Target(promise, f"{worst}, {median:.3g}{unit} median, {kept} of {len(figures)} keep it", good(value))


def _at_most(promise: str, value: float | None, most: float) -> Target:
    if value is None:
        return Target(promise, "not measured", None)
    return Target(promise, f"{value:.3g} us", value <= most)
