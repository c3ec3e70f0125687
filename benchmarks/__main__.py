"""`python -m benchmarks step`: measure on this machine, write JSON, print a table."""

import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from . import environment, step

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    """Measure one benchmark on the machine at hand."""

    benchmark: tyro.conf.Positional[Literal["step"]]
    """step: the time of a whole training step at the paper's sizes, data included."""
    data_dir: Path | None = None
    """Folder with MNIST; without it only the models on sprites are measured."""
    steps: int = 50
    """Samples."""
    output: Path = RESULTS / "step-cpu.json"
    """JSON file to write."""


def main() -> None:
    """Run the benchmark that the command line names."""
    options = tyro.cli(Options)
    rows = {}
    for name, config in step.presets(options.data_dir).items():
        rows[name] = step.measure(replace(config, data_dir=options.data_dir), options.steps)
    options.output.parent.mkdir(exist_ok=True)
    result = {"environment": environment.describe(), "unit": "ms", "samples": rows}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(_table(rows))
    print(f"written to {options.output}")


def _table(rows: dict[str, dict[str, list[float]]]) -> Table:
    table = Table("preset", *step.PARTS, "whole step", title="median milliseconds of a training step")
    for name, samples in rows.items():
        whole = [sum(parts) for parts in zip(*samples.values(), strict=True)]
        table.add_row(name, *(f"{statistics.median(x):.1f}" for x in (*samples.values(), whole)))
    return table


if __name__ == "__main__":
    main()
