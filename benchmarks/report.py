"""From result files to tables, the blocks between markers in Markdown files, and the roofline figure."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from tvae.presets import PRESETS

from . import machine_code, overhead, results, targets
from .agreement import FUSED, NUDGED, UNFUSED
from .operation import FLOOR
from .results import Measured, Result, Steps

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
NOT_MEASURED = "Not measured on a GPU."
BLOCK = re.compile(r"(<!-- benchmark: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = {
    "reference": "eager reference",
    "compiled": "compiled reference",
    "torch compiled": "`torch`, compiled",
    "convolution": "convolution",
}
COLORS = {"ours": "tab:blue", "torch compiled": "tab:cyan", "reference": "tab:red", "compiled": "tab:orange"}
COLORS |= {"convolution": "tab:purple"}


def load(folder: Path = results.FOLDER) -> list[Result]:
    """Every result of the operation in the folder."""
    return [Result.read(file) for file in sorted(folder.glob("operation-*.json"))]


def update(folder: Path = results.FOLDER, documents: tuple[Path, ...] = DOCUMENTS) -> list[Path]:
    """Draw the figures, and fill the blocks `<!-- benchmark: NAME -->` ... `<!-- end -->` of the documents.

    Returns:
        The files written; `render` lists the names.

    Raises:
        ValueError: a document asks for a block that there is not.

    """
    loaded = load(folder)
    written = [roofline(result, ROOT / "docs" / f"roofline-{result.name}.png") for result in loaded]
    written += [training_figure(file, ROOT / "docs" / f"{file.stem}.png") for file in folder.glob("training-*.json")]
    for document in documents:
        if document.exists():
            before = document.read_text(encoding="utf-8")
            after = fill(before, loaded, document.parent)
            if after != before:
                document.write_text(after, encoding="utf-8")
                written.append(document)
    return written


def fill(text: str, loaded: list[Result], folder: Path = ROOT) -> str:
    """The text with fresh blocks; links in it are relative to `folder`."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{render(match['name'], loaded, folder)}\n\n{match[3]}", text)


def render(name: str, loaded: list[Result], folder: Path = ROOT) -> str:
    """One block: `operation-KIND`, `operation-KIND-targets`, `operation-KIND-all`, `operation-KIND-figure`, or others.

    KIND is `cpu` or `gpu`. The first is forward + backward at K = 3, `all` every case in every direction. The others
    are those of `MACHINES` and of `OTHERS`.
    """
    if name in OTHERS:
        return OTHERS[name]()
    if name in MACHINES:
        return all_machines(name, folder)
    _, kind, what = (*name.split("-"), "")[:3]
    if name.split("-")[0] != "operation" or kind not in ("cpu", "gpu") or what not in RENDERERS:
        known = ", ".join(f"operation-{kind}{'-' * bool(x)}{x}" for kind in ("cpu", "gpu") for x in RENDERERS)
        known += "".join(f", {other}" for other in (*MACHINES, *OTHERS))
        raise ValueError(f"there is no benchmark {name!r}; there are {known}")
    chosen = [result for result in loaded if result.on_gpu == (kind == "gpu")]
    parts = [f"{caption(result)}\n\n{RENDERERS[what](result, folder)}" for result in chosen]
    return "\n\n".join(parts) or (NOT_MEASURED if kind == "gpu" else "Not measured.")


def caption(result: Result) -> str:
    """Hardware, versions, commit and date in one line."""
    e = result.environment
    machine = (
        f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}"
        if result.on_gpu
        else f"{e['cpu']}, {e['threads']} threads"
    )
    versions = f"torch {e['torch']}, triton {e['triton']}, Python {e['python']}"
    return f"Measured on {machine}; {versions}; commit {e['commit']}, {e['date'][:10]}."


def summary_table(result: Result, _: Path | None = None) -> str:
    """Forward + backward of the cases with K = 3: ours, and how many times as long every peer takes."""
    heads = ["shape (B, S, C, D)", "W", "type", f"ours, `{result.measured[0].ours}`", "of the copy's bandwidth"]
    rows = []
    for m in result.measured:
        if m.case.capsule_window == 3:
            others = [_against(m, peer, "both") for peer in PEERS]
            rows.append([*_case(m), _spread(m, "ours", "both"), f"{100 * m.of_copy('both'):.0f} %", *others])
    return _markdown(heads + list(PEERS.values()), rows)


def full_table(result: Result, _: Path | None = None) -> str:
    """Every case and direction: times with quantiles, bandwidth, the share of the copy's, and peak memory."""
    heads = ["shape (B, S, C, D)", "W", "type", "K", "direction", f"ours, `{result.measured[0].ours}`", "GB/s"]
    heads += ["of the copy's bandwidth", "peak memory", "copy", *PEERS.values()]
    rows = []
    for m in result.measured:
        for direction in FLOOR:
            bandwidth = f"{m.bandwidth('ours', direction):.3g}"
            memory = m.data["memory"][m.ours].get(direction)  # the backward pass has its peak within `both`
            row = [*_case(m), str(m.case.capsule_window), direction, _spread(m, "ours", direction), bandwidth]
            row += [f"{100 * m.of_copy(direction):.0f} %", f"{memory / 2**20:.3g} MiB" if memory else ""]
            row += [_milliseconds(m.median("copy", direction))]
            rows.append(row + [_against(m, peer, direction) for peer in PEERS])
    missing = [f"`{peer}`, {m.case.name}: {why}" for m in result.measured for peer, why in m.data["not_timed"].items()]
    return _markdown(heads, rows) + "".join(f"\n\nNot timed: {text}" for text in missing)


def targets_table(result: Result, _: Path | None = None) -> str:
    """Every promise beside what was measured."""
    return _targets(targets.evaluate(result))


def _targets(evaluated: list[targets.Target]) -> str:
    marks = {True: "yes", False: "**no**", None: "-"}
    rows = [[target.promise, target.measured, marks[target.holds]] for target in evaluated]
    return _markdown(["target", "measured", "holds"], rows)


def figure_link(result: Result, folder: Path) -> str:
    """The roofline figure."""
    target = Path(os.path.relpath(ROOT / "docs" / f"roofline-{result.name}.png", folder)).as_posix()
    return f"![Achieved bytes per second by shape, beside the copy's]({target})"


RENDERERS: dict[str, Callable[[Result, Path], str]] = {
    "": summary_table,
    "targets": targets_table,
    "all": full_table,
    "figure": figure_link,
}


def machine_code_table(file: Path = results.FOLDER / "machine-code.json") -> str:
    """One target of the three alike; and what holds for all."""
    content = json.loads(file.read_text())
    shown = [k for k in content["kernels"] if k["target"] == "sm_90" and k["loaded"] is not None]
    spilled = sum(k["spilled"] > 0 for k in content["kernels"])
    targets = ", ".join(dict.fromkeys(k["target"] for k in content["kernels"]))
    e = content["environment"]
    text = f"{len(content['kernels'])} kernels compiled for {targets} by triton {e['triton']}, commit {e['commit']}; "
    text += f"{spilled} of them spill registers. Those for sm_90 whose instructions can be counted:"
    heads, rows = machine_code.HEADS, machine_code.rows(shown)
    left_out = [heads.index(name) for name in ("target", "spilled")]
    heads, *rows = [[x for i, x in enumerate(row) if i not in left_out] for row in (heads, *rows)]
    return f"{text}\n\n{_markdown(heads, rows)}"


def overhead_table(file: Path = results.FOLDER / "overhead.json") -> str:
    """Medians."""
    content = json.loads(file.read_text())
    e = content["environment"]
    text = f"Measured on {e['cpu']}; torch {e['torch']}, Python {e['python']}; commit {e['commit']}, {e['date'][:10]}."
    rows = [[way, f"{median:.0f} us"] for way, median in overhead.medians(content["samples"]).items()]
    return f"{text}\n\n{_markdown(['call', 'time of the host'], rows)}"


def topographies_table(file: Path, _: Path | None = None) -> str:
    """Medians of ours, and how many times as long every peer takes."""
    content = json.loads(file.read_text())
    e, ours = content["environment"], content["ours"]
    others = [peer for peer in content["cases"][0]["samples"] if peer != ours]
    text = f"Measured {_where(e, on_gpu=file.stem != 'topographies-cpu')}"
    heads = ["layer of the preset", "shape (B, S, C, D)"]
    names = [peer if " " in peer else f"eager {peer}" for peer in others]
    for direction in ("forward", "forward + backward"):
        heads += [f"{direction}: ours, `{ours}`", *names]
    rows = []
    for case in content["cases"]:
        row = [f"`{case['preset']}`", ", ".join(map(str, case["shape"]))]
        for direction in ("forward", "both"):
            median = {peer: statistics.median(samples[direction]) for peer, samples in case["samples"].items()}
            row.append(_milliseconds(median[ours]))
            row += [f"{_milliseconds(median[peer])} ({median[peer] / median[ours]:.3g}x)" for peer in others]
        rows.append(row)
    return f"{text}\n\n{_markdown(heads, rows)}"


STAGES = {"data": "0.25", "forward": "tab:blue", "backward": "tab:orange", "optimiser": "0.8", "replay": "tab:cyan"}
WAYS = {
    "eager": "ours, eager",
    "compiled": "ours, compiled",
    "graph": "ours, graph replayed",
    "reference": "reference layer, eager",
    "convolution": "convolution layer, eager",
}


def _training(file: Path) -> tuple[str, bool, list[Steps]]:
    """Caption, whether it was on a GPU, and the cases."""
    content = json.loads(file.read_text())
    e, on_gpu = content["environment"], content["device"] == "cuda"
    return f"Measured {_where(e, on_gpu)}", on_gpu, [Steps(case) for case in content["cases"]]


def _where(e: dict, on_gpu: bool) -> str:
    """Hardware, versions, commit and date of an environment."""
    machine = e["gpu"] if on_gpu else f"{e['cpu']}, {e['threads']} thread{'s' * (e['threads'] != 1)}"
    return f"on {machine}; torch {e['torch']}, triton {e['triton']}; commit {e['commit']}, {e['date'][:10]}."


def training_table(file: Path, _: Path | None = None) -> str:
    """Whole steps: medians, rates, and how long the paper's training takes."""
    heads = ["whole step", "steps/s", "in matrix products", "the paper's 100 epochs"]

    def row(case: Steps, variant: str) -> list[str]:
        low, *_, high = statistics.quantiles(case.whole(variant), n=10, method="inclusive")
        rate = 1e6 / case.median(variant)
        config = PRESETS[case.data["preset"]].config
        return [
            f"{_milliseconds(case.median(variant))} ({_milliseconds(low)} to {_milliseconds(high)})",
            f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}",
            f"{100 * case.products(variant):.0f} %",
            _duration(case.hours(variant, config.batch_size * config.steps)),
        ]

    return _training_table(file, heads, row)


def training_stages(file: Path, _: Path | None = None) -> str:
    """Medians of the stages of a step, frames and memory."""
    stages = ("data", "forward", "backward", "optimiser", "replay")

    def row(case: Steps, variant: str) -> list[str]:
        times = [case.stage(variant, stage) for stage in stages]
        memory = f"{case.data['memory'][variant] / 2**20:.3g} MiB"
        frames = f"{case.data['frames'] / case.median(variant) * 1e6:,.0f}"
        return ["" if time is None else _milliseconds(time) for time in times] + [frames, memory]

    return _training_table(file, [*stages, "frames/s", "peak memory"], row)


def _training_table(file: Path, heads: list[str], row: Callable[[Steps, str], list[str]]) -> str:
    text, _, cases = _training(file)
    rows, missing = [], ""
    for case in cases:
        preset, batch = f"`{case.data['preset']}`", str(case.data["batch_size"])
        rows += [[preset, batch, WAYS[variant], *row(case, variant)] for variant in case.variants]
        for variant, why in case.data["not_timed"].items():
            missing += f"\n\nNot timed: {WAYS[variant]}, {preset}, batch {batch}: {why}"
    return f"{text}\n\n{_markdown(['preset', 'batch', 'step', *heads], rows)}{missing}"


def training_targets(file: Path, _: Path | None = None) -> str:
    """Every promise beside what was measured."""
    text, on_gpu, cases = _training(file)
    return f"{text}\n\n{_targets(targets.training(cases, on_gpu))}"


def training_link(file: Path, folder: Path) -> str:
    """The figure of `training_figure`."""
    target = Path(os.path.relpath(ROOT / "docs" / f"{file.stem}.png", folder)).as_posix()
    return f"![Stages of a training step, beside the matrix products alone]({target})"


def training_figure(file: Path, picture: Path) -> Path:
    """Draw every step as a bar of its stages, one panel a case, and the matrix products alone as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text, _, cases = _training(file)
    size = (8, 0.8 + sum(0.7 + 0.3 * len(case.variants) for case in cases))
    heights = [1 + len(case.variants) for case in cases]
    figure, axes = plt.subplots(len(cases), figsize=size, squeeze=False, layout="constrained", height_ratios=heights)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        shown = case.variants[::-1]
        left = [0.0] * len(shown)
        for stage, color in STAGES.items():
            width = [(case.stage(variant, stage) or 0) / 1e3 for variant in shown]
            if any(width):
                axis.barh(range(len(shown)), width, left=left, color=color, edgecolor="black", label=stage)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.axvline(case.median("products") / 1e3, color="black", linestyle="--", label="matrix products alone")
        ours = max(total for variant, total in zip(shown, left, strict=True) if variant != "convolution")
        limit = min(max(left), 3 * ours)  # what is longer is cut, and says how long it is
        for place, total in enumerate(left):
            axis.text(min(total, limit), place, f" {_milliseconds(1e3 * total)}", va="center", fontsize=8)
        axis.set_xlim(0, 1.15 * limit)
        axis.set_yticks(range(len(shown)), [WAYS[variant] for variant in shown], fontsize=8)
        axis.set_title(f"{case.data['preset']}, {case.data['batch_size']} sequences", fontsize=9)
    axes[-1, 0].set_xlabel("milliseconds of a step, medians of its stages")
    entries = {}
    for axis in axes[:, 0]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", fontsize=8, ncols=len(entries))
    figure.suptitle(text, fontsize=7)
    picture.parent.mkdir(exist_ok=True)
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    return picture


METRICS = ("ELBO", "E_eq", "CapCorr")


def agreement_table(file: Path, _: Path | None = None) -> str:
    """Metrics of every preset, trained unfused and fused on the same noise."""
    text, cases, left_out = _agreement(file)
    rows = []
    for case in cases:
        unfused, fused = (_metrics(case["metrics"][name]) for name in (UNFUSED.name, FUSED.name))
        pairs = [x for pair in zip(unfused, fused, strict=True) for x in pair]
        differences = [f"{case['difference'][way.name]:.2g}" for way in (FUSED, NUDGED)]
        rows.append([f"`{case['preset']}`", *pairs, *differences])
    heads = [f"{metric}, {way}" for metric in METRICS for way in (UNFUSED.name, FUSED.name)]
    names = ", ".join(f"`{name}`" for name in left_out)
    missing = f"\n\nLeft out, for their data was not there: {names}." if names else ""
    return f"{text}\n\n{_markdown(['preset', *heads, 'largest difference', 'if nudged'], rows)}{missing}"


def precision_table(file: Path, _: Path | None = None) -> str:
    """Metrics of the presets that were trained in several precisions."""
    text, cases, _ = _agreement(file)
    rows = []
    for case in cases:
        ways = [name for name in case["metrics"] if name.startswith(FUSED.name)]
        for name in ways if len(ways) > 1 else ():
            precision = name.removeprefix(FUSED.name).removeprefix(", ") or FUSED.precision
            metrics, difference = _metrics(case["metrics"][name]), f"{case['difference'][name]:.2g}"
            rows.append([f"`{case['preset']}`", f"`{precision}`", *metrics, difference])
    return f"{text}\n\n{_markdown(['preset', 'precision', *METRICS, 'largest difference'], rows)}"


def _agreement(file: Path) -> tuple[str, list[dict], dict[str, str]]:
    """Caption, cases, and by preset why it was left out."""
    content = json.loads(file.read_text())
    text = f"{content['steps']} steps of each training, evaluated on {content['sequences']} sequences. "
    text += f"Computed {_where(content['environment'], content['device'] == 'cuda')}"
    return text, content["cases"], content["left_out"]


def _metrics(values: dict[str, float]) -> list[str]:
    """ELBO in nats a frame, E_eq, and the mean of CapCorr over the factors; the latter two of sequences that move."""
    correlations = [math.nan if x is None else x for metric, x in values.items() if metric.startswith("CapCorr")]
    error = f"{values['E_eq']:.4g}" if "E_eq" in values else ""
    return [f"{values['ELBO']:.1f}", error, f"{statistics.mean(correlations):.3f}" if correlations else ""]


# Blocks with a part for each machine: what names its files, and what makes the part of one, with links from a folder.
MACHINES: dict[str, tuple[str, Callable[[Path, Path], str]]] = {
    "topographies": ("topographies", topographies_table),
    "training": ("training", training_table),
    "training-stages": ("training", training_stages),
    "training-targets": ("training", training_targets),
    "training-figure": ("training", training_link),
    "agreement": ("agreement", agreement_table),
    "agreement-precision": ("agreement", precision_table),
}
OTHERS = {"machine-code": machine_code_table, "overhead": overhead_table}


def all_machines(name: str, folder: Path, files: Path = results.FOLDER) -> str:
    """One part for each machine; and what is missing."""
    what, renderer = MACHINES[name]
    found = sorted(files.glob(f"{what}-*.json"))
    missing = [] if any(file.stem == f"{what}-cpu" for file in found) else ["Not measured."]
    missing += [] if any(file.stem != f"{what}-cpu" for file in found) else [NOT_MEASURED]
    return "\n\n".join([*(renderer(file, folder) for file in found), *missing])


def roofline(result: Result, file: Path) -> Path:
    """Draw the floor's bytes over time, by case, for every peer and for the copy: the line none can pass for long."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    types = list(dict.fromkeys(m.case.dtype for m in result.measured))
    widest = max(sum(m.case.dtype == dtype for m in result.measured) for dtype in types)
    size = (len(types) * max(5, 1.5 + 0.32 * widest), 9)
    figure, axes = plt.subplots(
        len(FLOOR), len(types), figsize=size, sharex="col", sharey=True, squeeze=False, layout="constrained"
    )
    for column, dtype in enumerate(types):
        chosen = [m for m in result.measured if m.case.dtype == dtype]
        places = range(len(chosen))
        for axis, direction in zip(axes[:, column], FLOOR, strict=True):
            copy = [m.bandwidth("copy", direction) for m in chosen]
            axis.step(places, copy, where="mid", color="black", label="copy")
            for peer, color in COLORS.items():
                points = [(x, m.bandwidth(peer, direction)) for x, m in zip(places, chosen, strict=True)]
                points = [(x, y) for x, y in points if y is not None]
                label = f"ours ({chosen[0].ours})" if peer == "ours" else PEERS[peer].replace("`", "")
                if points:
                    axis.plot(*zip(*points, strict=True), "o", color=color, markersize=4, label=label)
            axis.set(yscale="log", title=f"{direction}, {dtype}")
            axis.grid(alpha=0.3)
            starts = [x for x in places if x == 0 or chosen[x].case.shape != chosen[x - 1].case.shape]
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
    figure.suptitle(result.environment["gpu"] if result.on_gpu else result.environment["cpu"])
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return file


def _case(m: Measured) -> list[str]:
    return [", ".join(map(str, m.case.shape)), str(m.case.time_window), m.case.dtype]


def _spread(m: Measured, peer: str, direction: str) -> str:
    low, high = (f"{x / 1e3:.3g}" for x in m.quantiles(peer, direction))
    return f"{_milliseconds(m.median(peer, direction))} ({low} to {high})"


def _against(m: Measured, peer: str, direction: str) -> str:
    time = m.median(peer, direction)
    return "-" if time is None else f"{_milliseconds(time)} ({m.speedup(peer, direction):.3g}x)"


def _milliseconds(microseconds: float) -> str:
    x = microseconds / 1e3
    return f"{x:.0f} ms" if x >= 100 else f"{x:.3g} ms"


def _duration(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
