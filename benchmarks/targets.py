"""Promises beside what was measured of them; each command says which are its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .render import MARKS, markdown

Figures = list[tuple[float, str]]  # of cases, with their names


@dataclass(frozen=True)
class Target:
    """Puts beside a promise what was measured of it, and whether it holds; None where there are no samples for it."""

    promise: str
    measured: str = "not measured"
    holds: bool | None = None


def table(targets: Iterable[Target]) -> str:
    """Lay out every promise beside what was measured."""
    rows = [[target.promise, target.measured, MARKS[target.holds]] for target in targets]
    return markdown(["target", "measured", "holds"], rows)


def figures(measured: Iterable[Any], figure: Callable[[Any], float | None]) -> Figures:
    """Give a figure of every case that has it, with the name of the case."""
    pairs = ((figure(m), m.case.name) for m in measured)
    return [(value, name) for value, name in pairs if value is not None]


def geometric_mean(promise: str, figures: Figures, least: float) -> Target:
    """Promise a geometric mean over all cases."""
    if not figures:
        return Target(promise)
    values = [value for value, _ in figures]
    mean = statistics.geometric_mean(values)
    text = f"{mean:.3g}x, geometric mean of {len(values)} cases ({min(values):.3g}x to {max(values):.3g}x)"
    return Target(promise, text, mean >= least)


def at_least(promise: str, figures: Figures, least: float, unit: str = "x") -> Target:
    """Promise of every case that a figure is not lower."""
    return _extreme(promise, figures, min, lambda value: value >= least, unit)


def at_most(promise: str, figures: Figures, most: float, unit: str = "x") -> Target:
    """Promise of every case that a figure is not higher."""
    return _extreme(promise, figures, max, lambda value: value <= most, unit)


def _extreme(promise: str, figures: Figures, pick: Callable, good: Callable[[float], bool], unit: str) -> Target:
    if not figures:
        return Target(promise)
    value, name = pick(figures, key=lambda figure: figure[0])
    median = statistics.median(value for value, _ in figures)
    kept = sum(good(value) for value, _ in figures)
    text = f"{value:.3g}{unit} at worst ({name}), {median:.3g}{unit} median, {kept} of {len(figures)} keep it"
    return Target(promise, text, good(value))
