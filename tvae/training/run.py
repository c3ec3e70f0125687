"""A run directory: the configuration, the checkpoint, the metrics over time and the results of one training run.

    config.json              everything that decides the result
    metrics.csv, tensorboard the course of training
    checkpoint.safetensors   weights and optimiser state, replaced at every checkpoint
    model.safetensors        the trained model, for `tvae.load`
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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from ..config import Config
from ..files import replacing, sync
from ..models import SequenceModel


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
        self._lock = FileLock(path / "lock", timeout=0)

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Make a new run directory and write the configuration into it.

        Raises:
            RunError: the directory exists; nothing is changed.

        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                advice = f"continue it with `tvae train --resume {path}`, or choose another --run-dir"
                raise RunError(f"{path} exists already: {advice}")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as partial:
                new = Path(partial) / path.name
                new.mkdir()
                (new / "config.json").write_text(config.to_json())
                sync(new / "config.json")
                new.rename(path)  # over an empty directory, too
                sync(path.parent)
        except OSError as error:
            raise RunError(f"cannot make {path}: {error}") from error
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

    def change(self, config: Config) -> None:
        """Go on with another configuration from here: more steps, or data that has moved.

        Raises:
            RunError: the configuration cannot be written.

        """
        with self.writing(), replacing(self.path / "config.json") as partial:
            partial.write_text(config.to_json())
        self.config = config

    def lock(self) -> AbstractContextManager:
        """Keep other processes out of the run until the context ends; within it, it may be asked for again.

        Raises:
            RunError: another process is at work in the run.

        """
        with self.writing():
            try:
                return self._lock.acquire()
            except Timeout:  # which is an OSError, too
                raise RunError(f"another process is at work in {self.path}; wait for it or stop it") from None

    def load_model(self, device: str | torch.device = "cpu") -> SequenceModel:
        """Load the trained model.

        Raises:
            RunError: the run has not finished.

        """
        if not self.model_file.exists():
            raise RunError(f"{self.path} holds no trained model yet: finish it with `tvae train --resume {self.path}`")
        return SequenceModel.load(self.model_file, device)

    def save_model(self, model: SequenceModel) -> None:
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
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            step = int(metadata["step"])
            if not step > 0:
                raise ValueError(f"its step is {step}")
            wanted = _expected(model, optimizer, self.config.training.optimizer)
            _check_tensors({name: tuple(x.shape) for name, x in tensors.items()}, wanted)
            model.load_state_dict({k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")})
            state = {}
            for name, x in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".", 2)
                    state.setdefault(int(index), {})[key] = x
            # Its settings are those of the configuration, which may have been changed since.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
            return step
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError, OSError) as error:
            raise RunError(f"cannot restore {self.checkpoint}: {error}") from error

    def advice_after_divergence(self) -> str:
        """Say what to do when training has left the finite numbers."""
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


def _expected(model: nn.Module, optimizer: Optimizer, kind: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of a checkpoint, by name: of the weights, and of the optimiser's state."""
    shapes = {f"model.{name}": tuple(x.shape) for name, x in model.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    for index, parameter in enumerate(parameters):
        like = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",) * momentum}[kind]
        shapes |= {f"optimizer.{index}.{name}": tuple(parameter.shape) for name in like}
        if kind == "adam":
            shapes[f"optimizer.{index}.step"] = ()
    return shapes


def _check_tensors(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse tensors of other names or shapes: PyTorch's optimisers read past the end of those that are too short."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            was, should = (f"of shape {x[name]}" if name in x else "missing" for x in (found, wanted))
            if name not in wanted:
                should = "none"
            raise ValueError(f"{name} is {was}, should be {should}")


class MetricsLog:
    """The course of training, as a CSV file and as TensorBoard events.

    Opened again after `step` steps it forgets what was logged later, so that a resumed run leaves the same rows as an
    uninterrupted one. (The CSV logger of Lightning Fabric deletes the old file instead.)

    Raises:
        RunError: here and in every method, where the disk is full.

    """

    def __init__(self, run: Run, step: int):
        self._run = run
        self._columns: list[str] | None = None
        with run.writing():
            rows = rows_until(step, run.metrics.read_bytes()) if run.metrics.exists() else b""
            if rows:
                with replacing(run.metrics) as partial:
                    partial.write_bytes(rows)
            else:
                run.metrics.unlink(missing_ok=True)
            self._tensorboard = SummaryWriter(run.path / "tensorboard", purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one row; every row has the columns of the first, which an older version may have written."""
        row = {"step": step, **values}
        with self._run.writing():
            if self._columns is None and self._run.metrics.exists():
                self._columns = self._run.metrics.read_text().partition("\n")[0].strip().split(",")
            with self._run.metrics.open("a", newline="") as file:
                writer = csv.DictWriter(file, self._columns or row.keys(), extrasaction="ignore")
                if self._columns is None:
                    writer.writeheader()
                    self._columns = list(row)
                writer.writerow(row)
            for name, value in values.items():
                self._tensorboard.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        with self._run.writing():
            self._tensorboard.close()


def rows_until(step: int, log: bytes) -> bytes:
    """Return the header and the rows of a metrics.csv up to some step; nothing, where there is no such row.

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
