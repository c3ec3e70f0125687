"""The one format of every result: where something was measured, and a record for each variant of each case.

    {"command": "operation",                        of `python -m benchmarks`
     "environment": {"cpu": ..., "commit": ...},    hardware, versions, commit and date
     "device": "cpu",                               or "cuda", or "none" where nothing ran on either
     "unit": "us",                                  of the samples, or "none" without
     "settings": {"samples": 15, ...},              the command's options, and what its tables need
     "records": [
      {"case": {"shape": [8, 18, 18, 18], ...},     what was measured, by named fields
       "variant": "torch",                          which of the things that are compared
       "samples": {"forward": [344.1, ...], ...},   every sample, by stage
       "memory": {"forward": 139968, ...},          the peak in bytes, by stage
       "error": 0.123,                              the largest error, as a fraction of its bound
       "values": {"registers": 56, ...},            other numbers, by name
       "not_measured": "RuntimeError: ..."}]}       why there is nothing else

A record leaves out what it has nothing to say of. Numbers have four significant digits; NaN is null.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """Holds one variant of one case, as it was measured: see the module for what the fields hold."""

    case: dict
    variant: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    not_measured: str = ""

    def median(self, stage: str) -> float | None:
        """Give the median of a stage's samples, or None where the variant has no such stage."""
        return statistics.median(self.samples[stage]) if stage in self.samples else None

    def whole(self) -> list[float]:
        """Give the sums over all stages, which were sampled one after the other."""
        return [sum(stages) for stages in zip(*self.samples.values(), strict=True)]


@dataclass
class Result:
    """Holds what a command has measured, and the file that it is written to."""

    file: Path
    command: str
    environment: dict
    device: str
    unit: str
    settings: dict
    records: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Result:
        """Read what `write` wrote.

        Raises:
            ValueError: the file is none of this format.

        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(file, **content | {"records": [Record(**record) for record in content["records"]]})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no result of this version: {error}") from error

    def write(self) -> None:
        """Write the file, a line for each record."""
        head = {name: _plain(value) for name, value in vars(self).items() if name not in ("file", "records")}
        lines = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()]
        records = ",\n".join(f"  {json.dumps(_filled(record))}" for record in self.records)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(f'{{\n{"".join(lines)} "records": [\n{records}\n ]\n}}\n', encoding="utf-8")

    def add(self, records: Iterable[Record]) -> None:
        """Take in new records, and write the file."""
        self.records += records
        self.write()

    @property
    def machine(self) -> str:
        """Name what was measured on, as in the names of files: "cpu", or the GPU."""
        return machine(self.environment, self.device)

    def by_case(self) -> list[dict[str, Record]]:
        """Give the records of each case by variant, the cases in the order in which they were measured."""
        cases: dict[str, dict[str, Record]] = {}
        for record in self.records:
            cases.setdefault(key(record.case), {})[record.variant] = record
        return list(cases.values())


def load(folder: Path = FOLDER) -> list[Result]:
    """Read every result in the folder."""
    return [Result.read(file) for file in sorted(folder.glob("*.json"))]


def path(command: str, environment: dict, device: str, folder: Path = FOLDER) -> Path:
    """Name the file of a result: `operation-cpu.json`, `operation-NAME-OF-THE-GPU.json`, or without a device."""
    return folder / f"{command}{'' if device == 'none' else '-' + machine(environment, device)}.json"


def machine(environment: dict, device: str) -> str:
    """Name a device so that the name can be part of a file's: "cpu", or the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-") if device == "cuda" else device


def key(case: dict) -> str:
    """Tell cases apart, whether they come from a file or not."""
    return json.dumps(_plain(case))


def tenths(samples: list[float]) -> tuple[float, float]:
    """Give the 10 % and the 90 % quantile."""
    low, *_, high = statistics.quantiles(samples, n=10, method="inclusive")
    return low, high


def _filled(record: Record) -> dict:
    """Leave out the fields that have their default."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(record)}
    return {name: _plain(value) for name, value in asdict(record).items() if value != defaults[name]}


def _plain(x):
    """Round numbers to four significant digits, and make NaN None, which JSON has."""
    if isinstance(x, float):
        return None if math.isnan(x) else float(f"{x:.4g}")
    if isinstance(x, dict):
        return {name: _plain(value) for name, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, (list, tuple)) else x
