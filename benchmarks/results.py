"""Measured results of the operation and of training steps: the JSON files, and what follows from their samples."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import dataclass, fields
from pathlib import Path

from .operation import Case

FOLDER = Path(__file__).parent / "results"
COMPILED = ("reference compiled", "reference max-autotune")
OURS = ("eager", "compiled", "graph")  # ways to take a step


def path(environment: dict, device_type: str, what: str = "operation", folder: Path = FOLDER) -> Path:
    """`operation-cpu.json`, or for a GPU `operation-NAME-OF-THE-GPU.json`; or of something else."""
    name = re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-") if device_type == "cuda" else "cpu"
    return folder / f"{what}-{name}.json"


def write(file: Path, content: dict) -> None:
    """Write a result, one line for each peer of a case, numbers to four significant digits and NaN as null."""
    text = json.dumps(_rounded(content), indent=1)
    for innermost in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):  # on one line
        text = re.sub(
            innermost, lambda match: re.sub(r",\s+", ", ", re.sub(r"(?<=[\[{])\s+|\s+(?=[\]}])", "", match[0])), text
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def _rounded(x):
    if isinstance(x, float):
        return None if math.isnan(x) else float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return [_rounded(value) for value in x] if isinstance(x, (list, tuple)) else x


@dataclass(frozen=True)
class Measured:
    """One case with its samples."""

    case: Case
    ours: str
    data: dict

    def median(self, peer: str, direction: str) -> float | None:
        """Microseconds, or None if the peer was not timed on this case."""
        peer = self.fastest_compiled(direction) if peer == "compiled" else self.ours if peer == "ours" else peer
        samples = self.data["samples"].get(peer)
        return statistics.median(samples[direction]) if samples else None

    def quantiles(self, peer: str, direction: str) -> tuple[float, float]:
        """The 10 % and the 90 % quantile in microseconds."""
        samples = self.data["samples"][self.ours if peer == "ours" else peer][direction]
        tenths = statistics.quantiles(samples, n=10, method="inclusive")
        return tenths[0], tenths[-1]

    def fastest_compiled(self, direction: str) -> str | None:
        """The compiled reference in its best mode."""
        timed = [peer for peer in COMPILED if peer in self.data["samples"]]
        return min(timed, key=lambda peer: self.median(peer, direction), default=None)

    def speedup(self, peer: str, direction: str) -> float | None:
        """How many times the peer's time ours is faster: 2 means half the time."""
        time = self.median(peer, direction)
        return None if time is None else time / self.median("ours", direction)

    def of_copy(self, direction: str, peer: str = "ours") -> float:
        """The share of the copy's bandwidth at which the peer moves the floor's bytes: 1 is the floor."""
        return self.median("copy", direction) / self.median(peer, direction)

    def bandwidth(self, peer: str, direction: str) -> float | None:
        """The floor's bytes over the peer's time, in GB/s."""
        time = self.median(peer, direction)
        return None if time is None else self.case.floor_bytes(direction) / time / 1e3

    def memory(self, direction: str, tensors: int, peer: str = "ours") -> float:
        """Peak memory over the size of so many tensors of the case."""
        peer = self.ours if peer == "ours" else peer
        return self.data["memory"][peer][direction] / (tensors * self.case.tensor_bytes)


@dataclass(frozen=True)
class Result:
    """A result file."""

    name: str
    environment: dict
    on_gpu: bool
    measured: list[Measured]
    latency: dict[str, list[float]] | None

    @classmethod
    def read(cls, file: Path) -> Result:
        """Read what `write` wrote."""
        content = json.loads(file.read_text())
        names = [field.name for field in fields(Case)]
        measured = []
        for data in content["cases"]:
            case = Case(**{name: tuple(data[name]) if name == "shape" else data[name] for name in names})
            measured.append(Measured(case, content["ours"], data))
        return cls(
            file.stem.removeprefix("operation-"),
            content["environment"],
            content["device"] == "cuda",
            measured,
            content.get("latency"),
        )


@dataclass(frozen=True)
class Steps:
    """Training steps of one configuration, with the samples of every variant."""

    data: dict

    @property
    def variants(self) -> list[str]:
        """Those timed."""
        return [name for name in self.data["samples"] if name != "products"]

    def whole(self, variant: str) -> list[float]:
        """Microseconds of whole steps."""
        return [sum(stages) for stages in zip(*self.data["samples"][variant].values(), strict=True)]

    def median(self, variant: str) -> float:
        """Microseconds of a whole step, or of the matrix products alone if the variant is "products"."""
        return statistics.median(self.whole(variant))

    def stage(self, variant: str, stage: str) -> float | None:
        """Median microseconds of one stage; None if the variant has no such stage."""
        samples = self.data["samples"][variant].get(stage)
        return statistics.median(samples) if samples else None

    def fastest(self) -> str:
        """The variant of ours with the shortest step."""
        return min((name for name in OURS if name in self.data["samples"]), key=self.median)

    def products(self, variant: str) -> float:
        """The matrix products' share of the step: 1 is the floor."""
        return self.median("products") / self.median(variant)

    def hours(self, variant: str, sequences: int) -> float:
        """Of a training on so many sequences."""
        return sequences / self.data["batch_size"] * self.median(variant) / 3600e6
