"""The training step at the paper's sizes, data included, and with other layers: checked first, then timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tvae.config import Config

from . import devices, render, targets
from .measuring import Say, in_turn, measure_all, reason, silent
from .records import Record, Result, tenths
from .render import markdown, milliseconds, where
from .targets import Target
from .variants import MNIST, SPRITES, VARIANTS, Products, Trainer, Variant, check, config_of, rounding

DEVICES = ("cpu", "cuda")
PICTURE = "training"
SHOWN = ("", "targets")
BATCHES = (1, 16)  # times the paper's
NAMES = {
    "cpu": ("eager", "compiled", "reference", "convolution"),
    "cuda": ("eager", "compiled", "graph", "reference", "convolution"),
}
OURS = ("eager", "compiled", "graph")
BLOCK = 5  # steps of a variant before it is another's turn
PATIENCE = 60e6  # microseconds of samples after which a slow variant is not sampled further
COLORS = {"data": "0.25", "forward": "tab:blue", "backward": "tab:orange", "optimiser": "0.8", "replay": "tab:cyan"}
LABELS = {
    "eager": "ours, eager",
    "compiled": "ours, compiled",
    "graph": "ours, graph replayed",
    "reference": "reference layer, eager",
    "convolution": "convolution layer, eager",
}


def run(data_dir: Path | None = None, samples: int = 50, output: Path | None = None) -> Result:
    """Time a whole training step at the paper's sizes, data included.

    Every way to take the step is checked against the first before it is timed.

    Without `--output` README.md, docs/ and the figure are made anew.

    Args:
        data_dir: folder with MNIST; without it only the model of sprites is measured.
        samples: steps of each variant; slow ones get fewer.
        output: JSON file to write, after every case; by default benchmarks/results/training-MACHINE.json.

    """
    device = devices.here()
    torch.backends.cudnn.allow_tf32 = False  # the convolution computes in float32 like the others
    measured = partial(measure, device=device, samples=samples)
    return measure_all("training", cases(data_dir), measured, device.type, {"samples": samples}, output)


@dataclass(frozen=True)
class Case:
    """Names a preset at some batch."""

    preset: str
    config: Config

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""
        return {"preset": self.preset, "batch_size": self.config.training.batch_size}

    @property
    def name(self) -> str:
        """Name the case, as in "sprites-tvae-w10-k1, batch 8"."""
        return f"{self.preset}, batch {self.config.training.batch_size}"


def cases(data_dir: Path | None) -> list[Case]:
    """List the paper's models at all batches; that of MNIST only where there is a folder with its files."""
    names = (MNIST, SPRITES) if data_dir is not None else (SPRITES,)
    return [Case(name, config_of(name, data_dir, times)) for name in names for times in BATCHES]


def measure(
    case: Case,
    say: Say = silent,
    *,
    device: torch.device,
    samples: int,
    variants: Mapping[str, Variant] | None = None,
) -> list[Record]:
    """Check all variants against ours with the same noise; time them and the matrix products alone in turn.

    Args:
        case: the preset.
        say: what is being done.
        device: where.
        samples: steps of each variant, fewer of the slow ones.
        variants: by name, ours first; by default all of the device.

    Returns:
        A record for each variant: samples by stage; the peak memory of a step beyond the weights, their momentum and
        the data set; the largest difference from ours; and the frames of a batch. And one of the products.

    Raises:
        WrongResultError: a variant takes another step; then nothing is timed.

    """
    torch.compiler.reset()
    variants = variants or {name: VARIANTS[name] for name in NAMES[device.type]}
    source = case.config.open_source("train", device)
    products = Products(case.config, source)
    bound = rounding(products, case.config)
    say("check given noise")
    with_given_noise, wanted = Trainer(VARIANTS["given noise"], case.config, source).first_step()[0], None
    timed, memory, errors, not_measured = {}, {}, {}, {}
    for name, variant in variants.items():
        say(f"check {name}")
        trainer = Trainer(variant, case.config, source)
        try:
            found, memory[name] = trainer.first_step()
        except RuntimeError as error:
            if wanted is None:
                raise
            not_measured[name] = reason(error)
            continue
        wanted = wanted or found
        errors[name] = check(name, found, wanted if variant.own_noise else with_given_noise, bound)
        timed[name] = trainer
    timed["products"] = products
    timed = {name: partial(take, devices.clock(device)) for name, take in timed.items()}
    taken = in_turn(timed, samples, say, patience=PATIENCE, block=BLOCK, skipped=1)
    frames = {"frames": case.config.training.batch_size * source.sequence_length}
    return [
        *(Record(case.fields, x, taken[x], {"step": memory[x]}, errors[x], frames) for x in errors),
        Record(case.fields, "products", taken["products"]),
        *(Record(case.fields, name, not_measured=why) for name, why in not_measured.items()),
    ]


@dataclass(frozen=True)
class Measured:
    """Holds the records of one case, by variant."""

    records: dict[str, Record]

    @property
    def preset(self) -> str:
        """Name the preset."""
        return self.records["products"].case["preset"]

    @property
    def batch_size(self) -> int:
        """Give the number of sequences in a batch."""
        return self.records["products"].case["batch_size"]

    @property
    def variants(self) -> list[str]:
        """List those timed."""
        return [name for name, record in self.records.items() if record.samples and name != "products"]

    def median(self, variant: str) -> float:
        """Give the microseconds of a whole step, or of the matrix products alone if the variant is "products"."""
        return statistics.median(self.records[variant].whole())

    def fastest(self) -> str:
        """Choose the variant of ours with the shortest step."""
        return min((name for name in OURS if name in self.variants), key=self.median)

    def share_of_products(self, variant: str) -> float:
        """Give the matrix products' share of the step: 1 is the floor."""
        return self.median("products") / self.median(variant)

    def hours(self, variant: str) -> float:
        """Say how long the training of the preset takes, as long as it is in the paper."""
        config = config_of(self.preset)
        return config.training.batch_size * config.training.steps / self.batch_size * self.median(variant) / 3600e6


def measured(result: Result) -> list[Measured]:
    """Give every case of a result."""
    return [Measured(records) for records in result.by_case()]


def table(result: Result) -> str:
    """Lay out whole steps: medians, rates, and how long the paper's training takes."""
    heads = ["whole step", "steps/s", "in matrix products", "the paper's 100 epochs"]

    def row(m: Measured, variant: str) -> list[str]:
        low, high = tenths(m.records[variant].whole())
        rate = 1e6 / m.median(variant)
        return [
            f"{milliseconds(m.median(variant))} ({milliseconds(low)} to {milliseconds(high)})",
            f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}",
            f"{100 * m.share_of_products(variant):.0f} %",
            render.hours(m.hours(variant)),
        ]

    return _table(result, heads, row)


def stages_table(result: Result) -> str:
    """Lay out the medians of the stages of a step, frames and memory."""

    def row(m: Measured, variant: str) -> list[str]:
        record = m.records[variant]
        times = [record.median(stage) for stage in COLORS]
        frames = f"{record.values['frames'] / m.median(variant) * 1e6:,.0f}"
        memory = render.mebibytes(record.memory["step"])
        return ["" if time is None else milliseconds(time) for time in times] + [frames, memory]

    return _table(result, [*COLORS, "frames/s", "peak memory"], row)


def _table(result: Result, heads: list[str], row: Callable[[Measured, str], list[str]]) -> str:
    rows, missing = [], ""
    for m in measured(result):
        preset, batch = f"`{m.preset}`", str(m.batch_size)
        rows += [[preset, batch, LABELS[variant], *row(m, variant)] for variant in m.variants]
        for variant, record in m.records.items():
            if record.not_measured:
                missing += f"\n\nNot timed: {LABELS[variant]}, {preset}, batch {batch}: {record.not_measured}"
    return f"Measured {where(result)}\n\n{markdown(['preset', 'batch', 'step', *heads], rows)}{missing}"


def targets_table(result: Result) -> str:
    """Lay out every promise beside what was measured."""
    return f"Measured {where(result)}\n\n{targets.table(promises(result))}"


def picture_link(result: Result) -> str:
    """Show the picture that `draw` draws."""
    return render.link("Stages of a training step, beside the matrix products alone", PICTURE, result)


TABLES = {"": table, "stages": stages_table, "targets": targets_table, "figure": picture_link}


def promises(result: Result) -> list[Target]:
    """Judge the promises of a whole training step, data included, on a GPU or on two cores of a CPU."""
    found = {(m.preset, m.batch_size): m for m in measured(result)}
    if result.device == "cuda":
        replayed = {size: m for size, m in found.items() if "graph" in m.variants}
        return _in_time(replayed.get((MNIST, 8))) + [_in_products(replayed.get((x, 128)), x) for x in (MNIST, SPRITES)]
    limits = ((MNIST, 60, 237), (SPRITES, 75, 420))
    return [_fastest(found.get((preset, 8)), preset, *limit) for preset, *limit in limits]


def _fastest(m: Measured | None, preset: str, most: float, published: float) -> Target:
    promise = f"`{preset}`, 8 sequences: at most {most} ms a step (published code: {published} ms)"
    if m is None:
        return Target(promise)
    time = m.median(m.fastest()) / 1e3
    return Target(promise, f"{time:.3g} ms, {m.fastest()}", time <= most)


def _in_time(m: Measured | None) -> list[Target]:
    by_rate = f"`{MNIST}`, 8 sequences, replayed: at least 2,500 steps/s"
    by_time = f"`{MNIST}`, 8 sequences, replayed: 100 epochs in less than 5 minutes"
    if m is None:
        return [Target(by_rate), Target(by_time)]
    rate, minutes = 1e6 / m.median("graph"), 60 * m.hours("graph")
    return [
        Target(by_rate, f"{rate:,.0f} steps/s", rate >= 2500),
        Target(by_time, f"{minutes:.3g} minutes", minutes < 5),
    ]


def _in_products(m: Measured | None, preset: str) -> Target:
    promise = f"`{preset}`, 128 sequences, replayed: at least 60 % of the step in matrix products"
    if m is None:
        return Target(promise)
    share = m.share_of_products("graph")
    return Target(promise, f"{100 * share:.0f} %", share >= 0.6)


def draw(result: Result) -> Figure:
    """Draw every step as a bar of its stages, one panel a case, and the matrix products alone as a line."""
    every = measured(result)
    figure = Figure((8, 0.8 + sum(0.7 + 0.3 * len(m.variants) for m in every)), layout="constrained")
    axes = figure.subplots(len(every), squeeze=False, height_ratios=[1 + len(m.variants) for m in every])
    for axis, m in zip(axes[:, 0], every, strict=True):
        shown = m.variants[::-1]
        left = [0.0] * len(shown)
        for stage, color in COLORS.items():
            width = [(m.records[variant].median(stage) or 0) / 1e3 for variant in shown]
            if any(width):
                axis.barh(range(len(shown)), width, left=left, color=color, edgecolor="black", label=stage)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.axvline(m.median("products") / 1e3, color="black", linestyle="--", label="matrix products alone")
        ours = max(total for variant, total in zip(shown, left, strict=True) if variant != "convolution")
        limit = min(max(left), 3 * ours)  # what is longer is cut, and says how long it is
        for place, total in enumerate(left):
            axis.text(min(total, limit), place, f" {milliseconds(1e3 * total)}", va="center", fontsize=8)
        axis.set_xlim(0, 1.15 * limit)
        axis.set_yticks(range(len(shown)), [LABELS[variant] for variant in shown], fontsize=8)
        axis.set_title(f"{m.preset}, {m.batch_size} sequences", fontsize=9)
    axes[-1, 0].set_xlabel("milliseconds of a step, medians of its stages")
    entries = {}
    for axis in axes[:, 0]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize=8, ncols=len(entries))
    figure.suptitle(f"Measured {where(result)}", fontsize=7)
    return figure
