"""The logs of a training run: rows of numbers as files, and the same by a logger for a browser."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from lightning_fabric.loggers import Logger, TensorBoardLogger
from torch import Tensor

from ..config import LoggerKind
from ..files import replacing
from .run import Run, RunError


class TrainingLog:
    """The course of training and of validation, as a CSV file each and by a logger of Lightning Fabric.

    Opened again after `step` steps it forgets what was logged later, so that a resumed run leaves the same rows as an
    uninterrupted one. (The CSV logger of Lightning Fabric deletes the old file instead.)

    Args:
        run: where the files are.
        step: how many steps are done.
        logger: "tensorboard" for events in the run, "wandb" for Weights & Biases, "none", or a logger of Fabric's kind.

    Raises:
        RunError: here and in every method, where a file is damaged or the disk is full.

    """

    def __init__(self, run: Run, step: int, logger: LoggerKind | Logger = "tensorboard"):
        self._run = run
        self._files = {"train": CSVLog(run, run.metrics, step), "validation": CSVLog(run, run.validation, step)}
        with run.writing():
            self._logger = _made(logger, run, step)

    def log(self, step: int, values: Mapping[str, float], part: Literal["train", "validation"] = "train") -> None:
        """Append one row."""
        self._files[part].append(step, values)
        if self._logger is not None:
            with self._run.writing(), _disk_errors():
                self._logger.log_metrics({f"{part}/{name}": value for name, value in values.items()}, step)

    @property
    def shows_images(self) -> bool:
        """Say whether the logger is one of TensorBoard's kind."""
        return hasattr(getattr(self._logger, "experiment", None), "add_image")

    def show(self, step: int, title: str, images: Float[Tensor, "row frame height width channel"]) -> None:
        """Show rows of frames."""
        with self._run.writing():
            mosaic = images.movedim(2, 1).flatten(0, 1).flatten(1, 2)
            self._logger.experiment.add_image(title, mosaic, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what the logger still holds back."""
        if self._logger is not None:
            with self._run.writing():
                self._logger.finalize("success")


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Take for errors of the disk what Fabric's loggers take for wrong values."""
    try:
        yield
    except ValueError as error:
        raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from error


def _made(logger: LoggerKind | Logger, run: Run, step: int) -> Logger | None:
    """Return the logger of a name."""
    if logger == "none":
        return None
    if logger == "tensorboard":
        return TensorBoardLogger(run.path, name="", version="tensorboard", purge_step=step + 1)
    if logger == "wandb":
        from wandb.integration.lightning.fabric import WandbLogger

        return WandbLogger(project="tvae", name=run.path.name, dir=run.path, resume="allow")
    return logger


class CSVLog:
    """A CSV file of a run, of numbers by step."""

    def __init__(self, run: Run, path: Path, step: int):
        self._writing = run.writing
        self._path = path
        self._columns: list[str] | None = None
        with run.writing():
            rows = _rows_of(path, step) if path.exists() else b""
            if rows:
                with replacing(path) as partial:
                    partial.write_bytes(rows)
            else:
                path.unlink(missing_ok=True)

    def append(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row; every row has the columns of the first, which an older version may have written."""
        row = {"step": step, **values}
        with self._writing():
            if self._columns is None and self._path.exists():
                self._columns = _columns(self._path.read_bytes())
                if not {"step", "loss"} <= set(self._columns) <= set(row):
                    names = ", ".join(self._columns)
                    raise RunError(f"{self._path} has the columns {names}, should have {', '.join(row)}")
            with self._path.open("a", newline="") as file:
                writer = csv.DictWriter(file, self._columns or row.keys(), extrasaction="ignore")
                if self._columns is None:
                    writer.writeheader()
                    self._columns = list(row)
                writer.writerow(row)


def _rows_of(path: Path, step: int) -> bytes:
    """Return the header and the rows of a log up to some step."""
    try:
        return rows_until(step, path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}; mend it, or move it away to begin a new one") from error


def _columns(log: bytes) -> list[str]:
    """Return the names in the header of a log."""
    return log.partition(b"\n")[0].decode("ascii", "backslashreplace").strip().split(",")


def rows_until(step: int, log: bytes) -> bytes:
    """Return the header and the rows of a log up to some step; nothing, where there is no such row.

    What follows may be half a row, or anything, if a crash has cut it off: only what a checkpoint follows is sure.

    Raises:
        ValueError: rows up to the step are damaged, too, for one of them stands behind what is none.

    """
    header, *rows = log.splitlines(keepends=True) or [b""]
    columns, kept, last = header.count(b",") + 1, 0, 0
    for row in rows:
        if not _is_whole(row, columns) or not last < _number_of(row) <= step:
            break
        kept, last = kept + 1, _number_of(row)
    ended = kept == len(rows) or (kept == len(rows) - 1 and not rows[kept].endswith(b"\n"))  # or cut off within a row
    if not ended and any(last < _number_of(row) <= step for row in rows[kept:]):
        raise ValueError(f"line {kept + 2} is {rows[kept][:60]!r}")
    return header + b"".join(rows[:kept]) if kept else b""


def _is_whole(row: bytes, columns: int) -> bool:
    """Say whether a row is one of numbers, as many as there are columns."""
    try:
        return row.endswith(b"\n") and len(list(map(float, row.split(b",")))) == columns
    except ValueError:
        return False


def _number_of(row: bytes) -> int:
    """Return the step that a row begins with, -1 for what is none."""
    number = row.partition(b",")[0]
    return int(number) if number.isdigit() and len(number) < 20 else -1
