"""A run directory: the configuration, the checkpoint, the metrics over time and the results of one training run.

    config.json              everything that decides the result
    metrics.csv, tensorboard the course of training
    checkpoint.safetensors   weights and optimiser state, replaced at every checkpoint
    model.safetensors        the trained model, for `VAE.load`
    evaluation.json          metrics on the test set beside their chance levels
    figures/                 capsule traversals

Nothing in it is a pickle. A checkpoint does not know how many processes trained together. It and the rows of
metrics.csv up to its step are on the disk before it takes the place of the one before, so that a run that is killed,
or whose machine loses power, goes on from it.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from .files import replacing, sync
from .models import VAE
from .presets import Config


class RunError(RuntimeError):
    """A run directory is missing, in the way, or damaged; or its training cannot go on."""


class Run:
    """One run directory; make one with `Run.create` or `Run.open`."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        self.config = config
        self.checkpoint = path / "checkpoint.safetensors"
        self.metrics = path / "metrics.csv"
        self.model_file = path / "model.safetensors"
        self.evaluation_file = path / "evaluation.json"
        self.figures = path / "figures"

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Make a new run directory and write the configuration into it.

        Raises:
            RunError: the directory exists; nothing is changed.

        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise RunError(
                f"{path} exists already: continue it with `tvae train --resume {path}`, or choose another --run-dir"
            )
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as partial:
            new = Path(partial) / path.name
            new.mkdir()
            (new / "config.json").write_text(config.to_json())
            sync(new / "config.json")
            new.rename(path)
            sync(path.parent)
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> Run:
        """Find an existing run.

        Raises:
            RunError: there is no run at this path, or its configuration cannot be read.

        """
        try:
            return cls(path, Config.from_json((path / "config.json").read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{path} is not a run directory: it has no config.json") from None
        except ValueError as error:
            raise RunError(f"cannot read {path / 'config.json'}: {error}") from error

    def load_model(self, device: str | torch.device = "cpu") -> VAE:
        """The trained model.

        Raises:
            RunError: the run has not finished.

        """
        if not self.model_file.exists():
            raise RunError(f"{self.path} holds no trained model yet: finish it with `tvae train --resume {self.path}`")
        return VAE.load(self.model_file, device)

    def save_model(self, model: VAE) -> None:
        """Write the trained model.

        Raises:
            RunError: it cannot be written.

        """
        with self.writing():
            model.save(self.model_file)

    def save_checkpoint(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Replace the checkpoint by the state after `step` steps, at once or not at all.

        Raises:
            RunError: a weight is not finite, or the disk is full; the last checkpoint stays.

        """
        state = model.state_dict()
        for name, x in state.items():
            if not torch.isfinite(x).all():
                raise RunError(f"the weight {name} is not finite after step {step}; {self.advice_after_divergence()}")
        optimizer_state = optimizer.state_dict()
        tensors = {f"model.{name}": x for name, x in state.items()}
        for index, values in optimizer_state["state"].items():
            tensors |= {f"optimizer.{index}.{name}": x for name, x in values.items() if isinstance(x, Tensor)}
        metadata = {"step": str(step), "param_groups": json.dumps(optimizer_state["param_groups"])}
        with self.writing(), replacing(self.checkpoint) as partial:
            partial.write_bytes(save(tensors, metadata))  # save_file, when killed, leaves a hidden file behind
            if self.metrics.exists():
                sync(self.metrics)

    def load_checkpoint(self, model: nn.Module, optimizer: Optimizer) -> int:
        """Restore the last checkpoint, where there is one, and return the number of steps done.

        Raises:
            RunError: the file is damaged or belongs to another model.

        """
        if not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            model.load_state_dict({k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")})
            state = {}
            for name, x in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    state.setdefault(int(index), {})[key] = x
            optimizer.load_state_dict({"state": state, "param_groups": json.loads(metadata["param_groups"])})
            return int(metadata["step"])
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise RunError(f"cannot restore {self.checkpoint}: {error}") from error

    def advice_after_divergence(self) -> str:
        """What to do when training has left the finite numbers."""
        return f"{self._kept()}; train again with a smaller --learning-rate"

    @contextmanager
    def writing(self) -> Iterator:
        """Raise RunError where a file of the run cannot be written, because the disk is full for example."""
        try:
            yield
        except OSError as error:
            advice = f"{self._kept()}; when there is room, continue with `tvae train --resume {self.path}`"
            raise RunError(f"cannot write the run: {error}; {advice}") from error

    def _kept(self) -> str:
        return f"the last good state is in {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint"


class MetricsLog:
    """The course of training, as a CSV file and as TensorBoard events.

    Opened again after `step` steps it forgets what was logged later, so that a resumed run leaves the same rows as an
    uninterrupted one. (The CSV logger of Lightning Fabric deletes the old file instead.)

    Raises:
        RunError: here and in every method, where the disk is full.

    """

    def __init__(self, run: Run, step: int):
        self._run = run
        with run.writing():
            rows = rows_until(step, run.metrics.read_bytes()) if run.metrics.exists() else b""
            if rows:
                with replacing(run.metrics) as partial:
                    partial.write_bytes(rows)
            else:
                run.metrics.unlink(missing_ok=True)
            self._tensorboard = SummaryWriter(run.path / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one row; every row has the same columns."""
        row = {"step": step, **values}
        is_new = not self._run.metrics.exists()
        with self._run.writing():
            with self._run.metrics.open("a", newline="") as file:
                writer = csv.DictWriter(file, row.keys())
                if is_new:
                    writer.writeheader()
                writer.writerow(row)
            for name, value in values.items():
                self._tensorboard.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        with self._run.writing():
            self._tensorboard.close()


def rows_until(step: int, log: bytes) -> bytes:
    """The header and the rows of a metrics.csv up to some step; nothing, where there is no such row.

    What follows may be half a row, or anything, if a crash has cut it off: only what a checkpoint follows is sure.
    """
    header, *rows = log.splitlines(keepends=True) or [b""]
    kept = []
    for row in rows:
        number = row.partition(b",")[0]
        if not row.endswith(b"\n") or not number.isdigit() or int(number) > step:
            break
        kept.append(row)
    return header + b"".join(kept) if kept else b""
