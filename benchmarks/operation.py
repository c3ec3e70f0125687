"""The time and memory of the operation beside its peers: each checked against float64 first, then timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from . import devices, peers, render, targets
from .measuring import Say, in_turn, matching, measure_all, reason, silent
from .problems import FLOOR, PAPER, Case, Copies, Judge, Problem, sample, sampler
from .records import Record, Result, tenths
from .render import markdown, milliseconds, where
from .targets import Target, figures

DEVICES = ("cpu", "cuda")
PICTURE = "roofline"
SHOWN = ("", "targets")
PATIENCE = 7e6  # microseconds of samples after which a slow peer is not sampled further
CONVOLVED_WINDOW = 18  # the convolution is so slow that one window has to do
LATENCY = ("graph replayed", "host")  # variants of `measure_latency`
COMPILED = ("reference compiled", "reference max-autotune")
LABELS = {
    "reference": "eager reference",
    "compiled": "compiled reference",
    "torch compiled": "`torch`, compiled",
    "convolution": "convolution",
}
COLORS = {"ours": "tab:blue", "torch compiled": "tab:cyan", "reference": "tab:red", "compiled": "tab:orange"}
COLORS |= {"convolution": "tab:purple"}


def run(samples: int = 15, match: str = "", output: Path | None = None, resume: bool = False) -> Result:
    """Time the operation beside its peers, on this machine's GPU if it has one.

    Every peer is checked against float64 before it is timed.

    Without `--output` and `--match` README.md, docs/ and the figure are made anew.

    Args:
        samples: of each peer in each direction; slow peers get fewer.
        match: only the cases whose names contain this regular expression, as "W18 K3 float32".
        output: JSON file to write, after every case; by default benchmarks/results/operation-MACHINE.json.
        resume: keep the cases that the file has already, from a run on the same machine, versions and commit.

    """
    device = devices.here()
    torch.backends.cudnn.allow_tf32 = False  # the convolution computes in float32 like the others
    settings = {"samples": samples, "match": match, "ours": peers.OURS[device.type]}
    measured = partial(measure, device=device, samples=samples)
    chosen = matching(cases(device.type), match)
    result = measure_all("operation", chosen, measured, device.type, settings, output, resume)
    if device.type == "cuda" and not any(record.variant in LATENCY for record in result.records):
        result.add(measure_latency(device, samples))
    return Result.read(result.file)


def cases(device_type: str) -> list[Case]:
    """List the cases for a CPU or a GPU. A window longer than the sequence becomes as long as the sequence, once."""
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


def measure(
    case: Case,
    say: Say = silent,
    *,
    device: torch.device,
    samples: int,
    calls: Mapping[str, Callable] | None = None,
    cache: int | None = None,
) -> list[Record]:
    """Check all peers on a case, then time them in turn, beside a copy.

    Args:
        case: the size.
        say: what is being done.
        device: where.
        samples: of each peer, fewer of the slow ones.
        calls: the peers by name, ours first; by default all of the device.
        cache: bytes that the buffers in turn have to outgrow; by default the device's.

    Returns:
        A record for each peer, with its samples by direction, its peak memory with the inputs, and its error.

    Raises:
        WrongResultError: a peer gives a wrong result; then nothing is timed.

    """
    torch.compiler.reset()
    clock = devices.clock(device)
    count = devices.rotation(3 * case.tensor_bytes, devices.cache_bytes(device) if cache is None else cache)
    problems = [Problem.random(case, device, seed) for seed in range(count)]
    say("float64")
    judge = Judge.build(problems[0], case.neighborhood)
    calls = calls or {name: peers.build(name, case.neighborhood) for name in peers_of(case, device.type)}
    timed, errors, memory, not_measured = {}, {}, {}, {}
    for name, call in calls.items():
        say(f"check {name}")
        try:
            errors[name] = judge.check(name, problems[0], call)
            memory[name] = problems[1].peaks(call)
        except RuntimeError as error:
            if name == next(iter(calls)):
                raise
            not_measured[name] = reason(error)
            continue
        timed[name] = sampler(partial(sample, call, problems), clock)
    del judge
    timed["copy"] = sampler(Copies(case, device, count).sample, clock)
    taken = in_turn(timed, samples, say, patience=PATIENCE)
    records = [Record(case.fields, name, taken[name], memory[name], errors[name]) for name in errors]
    records.append(Record(case.fields, "copy", taken["copy"]))
    return records + [Record(case.fields, name, not_measured=why) for name, why in not_measured.items()]


def peers_of(case: Case, device_type: str) -> list[str]:
    """Name the peers of a case on a device, the convolution for one window only."""
    every = peers.NAMES[device_type]
    return [name for name in every if name != "convolution" or case.time_window == CONVOLVED_WINDOW]


def measure_latency(device: torch.device, samples: int) -> list[Record]:
    """Time graph replays and the host at the paper's size; see `devices.latency`."""
    problem = Problem.random(PAPER, device, seed=0)
    call = peers.build(peers.OURS[device.type], PAPER.neighborhood)
    Judge.build(problem, PAPER.neighborhood).check(peers.OURS[device.type], problem, call)
    calls = {"forward": lambda: problem.forward(call), "both": lambda: problem.both(call)}
    taken = devices.latency(calls, samples)
    return [Record(PAPER.fields, name, times) for name, times in zip(LATENCY, taken, strict=True)]


@dataclass(frozen=True)
class Measured:
    """Holds the records of one case; "ours" and "compiled", the fastest compiled reference, are names of peers, too."""

    case: Case
    ours: str
    records: dict[str, Record]

    def record(self, peer: str, direction: str = "both") -> Record | None:
        """Find a peer's record, if it was timed on this case."""
        if peer == "compiled":
            timed = [name for name in COMPILED if self.record(name)]
            peer = min(timed, key=lambda name: self.median(name, direction), default="")
        found = self.records.get(self.ours if peer == "ours" else peer)
        return found if found and found.samples else None

    def median(self, peer: str, direction: str) -> float | None:
        """Give a peer's microseconds, if it was timed on this case."""
        found = self.record(peer, direction)
        return found and found.median(direction)

    def speedup(self, peer: str, direction: str) -> float | None:
        """Say how many times the peer's time ours is faster: 2 means half the time."""
        time = self.median(peer, direction)
        return time and time / self.median("ours", direction)

    def share_of_copy(self, direction: str) -> float:
        """Give the share of the copy's bandwidth at which ours moves the floor's bytes: 1 is the floor."""
        return self.median("copy", direction) / self.median("ours", direction)

    def bandwidth(self, peer: str, direction: str) -> float | None:
        """Give the floor's bytes over the peer's time, in GB/s."""
        time = self.median(peer, direction)
        return time and self.case.floor_bytes(direction) / time / 1e3

    def memory(self, direction: str, tensors: int) -> float:
        """Give the peak memory of ours over the size of so many tensors of the case."""
        return self.record("ours").memory[direction] / (tensors * self.case.tensor_bytes)


def measured(result: Result) -> list[Measured]:
    """Give every case of a result, without the latency."""
    cases = [records for records in result.by_case() if "copy" in records]
    fields = [next(iter(records.values())).case for records in cases]
    return [
        Measured(Case(**{**case, "shape": tuple(case["shape"])}), result.settings["ours"], records)
        for case, records in zip(fields, cases, strict=True)
    ]


def caption(result: Result) -> str:
    """Say where a result was measured."""
    return f"Measured {where(result, ('torch', 'triton', 'Python'))}"


def summary_table(result: Result) -> str:
    """Lay out forward + backward of the cases with K = 3: ours, and how many times as long every peer takes."""
    heads = ["shape (B, S, C, D)", "W", "type", _ours(result), "of the copy's bandwidth", *LABELS.values()]
    rows = []
    for m in measured(result):
        if m.case.capsule_window == 3:
            others = [_against(m, peer, "both") for peer in LABELS]
            rows.append([*_case(m), _spread(m, "both"), f"{100 * m.share_of_copy('both'):.0f} %", *others])
    return f"{caption(result)}\n\n{markdown(heads, rows)}"


def full_table(result: Result) -> str:
    """Lay out every case and direction: times with quantiles, bandwidth, the share of the copy's, and peak memory."""
    heads = ["shape (B, S, C, D)", "W", "type", "K", "direction", _ours(result), "GB/s"]
    heads += ["of the copy's bandwidth", "peak memory", "copy", *LABELS.values()]
    rows, missing = [], ""
    for m in measured(result):
        for direction in FLOOR:
            memory = m.record("ours").memory.get(direction)  # the backward pass has its peak within `both`
            row = [*_case(m), str(m.case.capsule_window), direction, _spread(m, direction)]
            row += [f"{m.bandwidth('ours', direction):.3g}", f"{100 * m.share_of_copy(direction):.0f} %"]
            row += [render.mebibytes(memory) if memory else "", milliseconds(m.median("copy", direction))]
            rows.append(row + [_against(m, peer, direction) for peer in LABELS])
        for peer, record in m.records.items():
            if record.not_measured:
                missing += f"\n\nNot timed: `{peer}`, {m.case.name}: {record.not_measured}"
    return f"{caption(result)}\n\n{markdown(heads, rows)}{missing}"


def targets_table(result: Result) -> str:
    """Lay out every promise beside what was measured."""
    return f"{caption(result)}\n\n{targets.table(promises(result))}"


def picture_link(result: Result) -> str:
    """Show the picture that `draw` draws."""
    text = "Achieved bytes per second by shape, beside the copy's"
    return f"{caption(result)}\n\n{render.link(text, PICTURE, result)}"


TABLES = {"": summary_table, "targets": targets_table, "all": full_table, "figure": picture_link}


def _case(m: Measured) -> list[str]:
    return [render.shape(m.case.shape), str(m.case.time_window), m.case.dtype]


def _ours(result: Result) -> str:
    return f"ours, `{result.settings['ours']}`"


def _spread(m: Measured, direction: str) -> str:
    low, high = (f"{x / 1e3:.3g}" for x in tenths(m.record("ours").samples[direction]))
    return f"{milliseconds(m.median('ours', direction))} ({low} to {high})"


def _against(m: Measured, peer: str, direction: str) -> str:
    time = m.median(peer, direction)
    return "-" if time is None else f"{milliseconds(time)} ({m.speedup(peer, direction):.3g}x)"


def promises(result: Result) -> list[Target]:
    """Judge the promises for the result's kind of machine."""
    return _promises_for_gpus(result) if result.device == "cuda" else _promises_for_cpus(measured(result))


def _promises_for_cpus(every: list[Measured]) -> list[Target]:
    wide = [m for m in every if m.case.time_window >= 10]
    text = "forward + backward against the"
    eager, compiled = (lambda m, peer=peer: m.speedup(peer, "both") for peer in ("reference", "compiled"))
    convolution = figures(every, lambda m: m.speedup("convolution", "both"))
    memory = figures(every, lambda m: m.memory("both", 3))
    return [
        targets.geometric_mean(f"{text} eager reference: at least 3x, W >= 10", figures(wide, eager), 3),
        targets.geometric_mean(f"{text} compiled reference: at least 2.5x, W >= 10", figures(wide, compiled), 2.5),
        targets.at_least(f"{text} eager reference: never slower", figures(every, eager), 1),
        targets.at_least(f"{text} convolution: at least 200x, W = 18", convolution, 200),
        targets.at_most("peak memory with the inputs: at most 4x the inputs `z`, `u` and `dt`", memory, 4),
    ]


def _promises_for_gpus(result: Result) -> list[Target]:
    every = measured(result)
    wide = [m for m in every if m.case.time_window >= 5]
    found = []
    for direction, least in (("forward", 90), ("backward", 80)):
        shares = figures(every, lambda m, direction=direction: 100 * m.share_of_copy(direction))
        promise = f"{direction}: at least {least} % of the copy's bandwidth"
        found.append(targets.at_least(promise, shares, least, " %"))
    for label, peer, least in (("best compiled", "compiled", 2), ("eager", "reference", 10)):
        factors = figures(wide, lambda m, peer=peer: m.speedup(peer, "both"))
        promise = f"forward + backward against the {label} reference: at least {least}x, W >= 5"
        found.append(targets.at_least(promise, factors, least))
    memory = figures(every, lambda m: m.memory("forward", 3))  # z, u, t
    memory += figures(every, lambda m: m.memory("both", 6))  # z, u, t, dt, dz, du
    found.append(targets.at_most("peak memory: at most the floor's tensors and 5 %", memory, 1.05))
    latency = {record.variant: record for record in result.records if record.variant in LATENCY}
    replayed, host = (latency.get(name) for name in LATENCY)
    for direction in ("forward", "both"):
        promise = f"paper's size, replay of a graph, {direction}: at most 2 us more than an empty kernel"
        found.append(_in_time(promise, replayed and replayed.median(direction) - replayed.median("empty"), 2))
    for direction, most in (("forward", 30), ("both", 60)):
        promise = f"paper's size, host time of an eager call, {direction}: at most {most} us"
        found.append(_in_time(promise, host and host.median(direction), most))
    return found


def _in_time(promise: str, time: float | None, most: float) -> Target:
    return Target(promise) if time is None else Target(promise, f"{time:.3g} us", time <= most)


def draw(result: Result) -> Figure:
    """Draw the floor's bytes over time, by case, for every peer and for the copy: the line none can pass for long."""
    every = measured(result)
    types = {dtype: [m for m in every if m.case.dtype == dtype] for dtype in dict.fromkeys(m.case.dtype for m in every)}
    width = len(types) * max(5, 1.5 + 0.32 * max(map(len, types.values())))
    figure = Figure((width, 9), layout="constrained")
    axes = figure.subplots(len(FLOOR), len(types), sharex="col", sharey=True, squeeze=False)
    for column, (dtype, chosen) in enumerate(types.items()):
        places = range(len(chosen))
        starts = [x for x in places if x == 0 or chosen[x].case.shape != chosen[x - 1].case.shape]
        for axis, direction in zip(axes[:, column], FLOOR, strict=True):
            copy = [m.bandwidth("copy", direction) for m in chosen]
            axis.step(places, copy, where="mid", color="black", label="copy")
            for peer, color in COLORS.items():
                points = [(x, m.bandwidth(peer, direction)) for x, m in zip(places, chosen, strict=True)]
                points = [(x, y) for x, y in points if y is not None]
                label = f"ours ({chosen[0].ours})" if peer == "ours" else LABELS[peer].replace("`", "")
                if points:
                    axis.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=label)
            axis.set(yscale="log", title=f"{direction}, {dtype}")
            axis.grid(alpha=0.3)
            for x in starts:
                axis.axvline(x - 0.5, color="gray", linewidth=0.5)
        labels = [f"W{m.case.time_window} K{m.case.capsule_window}" for m in chosen]
        axes[-1, column].set_xticks(places, labels, rotation=90, fontsize=7)
        for x in starts:
            shape = "×".join(map(str, chosen[x].case.shape))
            axes[-1, column].annotate(shape, (x, 0), (0, -44), ("data", "axes fraction"), "offset points", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s of the floor's bytes")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=3)
    figure.suptitle(result.environment["gpu" if result.device == "cuda" else "cpu"])
    return figure
