"""`python -m benchmarks COMMAND`: measure on this machine, write JSON with every sample, print tables."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

from . import environment, results

console = Console()
AnyCase = TypeVar("AnyCase")


def run_operation(samples: int = 15, match: str = "", output: Path | None = None, resume: bool = False) -> None:
    """Time the operation beside its peers on this machine's GPU, or on its CPU if it has none.

    Every peer is checked against float64 before it is timed. Without `--output` and `--match` the tables in README.md
    and docs/ and the roofline figure are made from the result.

    Args:
        samples: of each peer in each direction; slow peers get fewer.
        match: only the cases whose names contain this regular expression, as "W18 K3 float32".
        output: JSON file to write, after every case; by default benchmarks/results/operation-MACHINE.json.
        resume: keep the cases that the file has already, from a run on the same machine, versions and commit.

    """
    from . import operation, peers, report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # the convolution computes in float32 like the others
    described = environment.describe()
    file = output or results.path(described, device.type)
    chosen = [case for case in operation.cases(device.type) if re.search(match, case.name)]
    if not chosen:
        raise SystemExit(f"no case matches {match!r}; there is {operation.PAPER.name!r}, for one")
    content = {
        "environment": described,
        "device": device.type,
        "unit": "us",
        "ours": peers.OURS[device.type],
        "cases": [],
    }
    if resume and file.exists():
        content = _resumed(json.loads(file.read_text()), described)
    done = {_name(data) for data in content["cases"]}
    for case, say in _each({case.name: case for case in chosen}):
        if case.name not in done:
            content["cases"].append(operation.measure(case, device, samples, say))
            results.write(file, content)
    if device.type == "cuda":
        content["latency"] = operation.measure_latency(device, samples)
        results.write(file, content)
    result = results.Result.read(file)
    texts = [f"{report.caption(result)}\n\n{table(result)}" for table in (report.summary_table, report.targets_table)]
    _finish(file, *texts, fill=output is None and not match)


def run_topographies(samples: int = 30, output: Path | None = None) -> None:
    """Time the layer of every preset with a topography of its own beside the reference.

    Without `--output` the table in docs/ is made from the result.

    Args:
        samples: of each peer in each direction; slow peers get fewer.
        output: JSON file to write; by default benchmarks/results/topographies-MACHINE.json.

    """
    from . import peers, report, topographies

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = environment.describe()
    file = output or results.path(described, device.type, "topographies")
    content = {"environment": described, "unit": "us", "ours": peers.OURS[device.type], "cases": []}
    chosen = {topography.name: topography for topography in topographies.topographies(device.type)}
    for topography, say in _each(chosen):
        content["cases"].append(topographies.measure(topography, device, samples, say))
    results.write(file, content)
    _finish(file, report.topographies_table(file), fill=output is None)


def run_report() -> None:
    """Fill the benchmark tables of README.md and docs/ and draw the figures, from the results at hand."""
    from . import report

    for file in report.update():
        console.print(f"written to {file}")


def run_training(data_dir: Path | None = None, samples: int = 50, output: Path | None = None) -> None:
    """Time a whole training step at the paper's sizes, data included, on this machine's GPU or CPU.

    Every way to take the step is checked against the first before it is timed. Without `--output` the tables in
    README.md and docs/ and the figure are made from the result.

    Args:
        data_dir: folder with MNIST; without it only the model of sprites is measured.
        samples: steps of each variant; slow ones get fewer.
        output: JSON file to write, after every case; by default benchmarks/results/training-MACHINE.json.

    """
    from . import report, training

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # the convolution computes in float32 like the others
    described = environment.describe()
    file = output or results.path(described, device.type, "training")
    content = {"environment": described, "device": device.type, "unit": "us", "cases": []}
    chosen = {f"{preset}, batch {config.batch_size}": (preset, config) for preset, config in training.cases(data_dir)}
    for (preset, config), say in _each(chosen):
        content["cases"].append(training.measure(preset, config, device, samples, say))
        results.write(file, content)
    _finish(file, report.training_table(file), report.training_targets(file), fill=output is None)


def run_agreement(
    data_dir: Path | None = None, steps: int = 50, sequences: int = 40, output: Path | None = None
) -> None:
    """Train every preset with a topography a little, fused and not, on the same noise, and compare their metrics.

    The models of the paper's main experiments are trained in all precisions that the machine has, too. Without
    `--output` the tables in docs/ are made from the result.

    Args:
        data_dir: folder with data files; presets whose data is not there are left out.
        steps: of each training.
        sequences: to evaluate each model on.
        output: JSON file to write, after every preset; by default benchmarks/results/agreement-MACHINE.json.

    """
    from tvae.data import DataError

    from . import agreement, report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    described = environment.describe()
    file = output or results.path(described, device.type, "agreement")
    content = {"environment": described, "device": device.type, "steps": steps, "sequences": sequences}
    content |= {"cases": [], "left_out": {}}
    chosen = {preset: (preset, config) for preset, config in agreement.configs(data_dir).items()}
    for (preset, config), say in _each(chosen):
        try:
            content["cases"].append(agreement.measure(preset, config, device, steps, sequences, say))
        except DataError as error:
            content["left_out"][preset] = str(error)
        results.write(file, content)
    _finish(file, report.agreement_table(file), report.precision_table(file), fill=output is None)


def run_machine_code(output: Path = results.FOLDER / "machine-code.json") -> None:
    """Compile the kernels ahead of time, for GPUs that need not be there, and count what their machine code does.

    Args:
        output: JSON file to write.

    """
    from . import machine_code

    kernels = list(track(machine_code.compile_all(), "compiling", total=len(machine_code.tasks()), console=console))
    content = machine_code.content(kernels, environment.describe())
    results.write(output, content)
    table = Table(*machine_code.HEADS, title="bytes and instructions an element; in brackets the least there can be")
    for row in machine_code.rows(content["kernels"]):
        table.add_row(*row)
    console.print(table)
    console.print(f"written to {output}")


def run_overhead(samples: int = 15, output: Path = results.FOLDER / "overhead.json") -> None:
    """Time what the host does for a call of the kernels, without launching them: it needs no GPU.

    Args:
        samples: each the mean of many calls.
        output: JSON file to write.

    """
    from . import overhead

    taken = overhead.measure(samples)
    results.write(output, {"environment": environment.describe(), "unit": "us", "samples": taken})
    table = Table("call", "microseconds", title="median time of the host's thread, nothing launched")
    for name, median in overhead.medians(taken).items():
        table.add_row(name, f"{median:.1f}")
    console.print(table)
    console.print(f"written to {output}")


def _each(cases: dict[str, AnyCase]) -> Iterator[tuple[AnyCase, Callable[[str], None]]]:
    """Every case under a progress bar, and whom to tell what is being done about it."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for name, case in cases.items():
            yield case, lambda what, name=name: progress.update(task, description=f"{name}: {what}")
            progress.advance(task)


def _finish(file: Path, *tables: str, fill: bool) -> None:
    """Print the tables of a result that is written, and make the report anew, or not."""
    for table in tables:
        console.print(Markdown(table))
    console.print(f"written to {file}")
    if fill:
        run_report()


def _resumed(content: dict, described: dict) -> dict:
    """The content of a file that a run described so may add to."""
    before = content["environment"]
    changed = [key for key in described if key != "date" and before.get(key) != described[key]]
    if changed:
        raise SystemExit(f"cannot resume: {', '.join(changed)} changed since the file was written")
    return content


def _name(data: dict) -> str:
    from .operation import Case

    return Case(tuple(data["shape"]), data["time_window"], data["capsule_window"], data["dtype"]).name


COMMANDS = {
    "operation": run_operation,
    "topographies": run_topographies,
    "overhead": run_overhead,
    "machine-code": run_machine_code,
    "training": run_training,
    "agreement": run_agreement,
    "report": run_report,
}


def main() -> None:
    """Run the command that the command line names."""
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)


if __name__ == "__main__":
    main()
