"""A run directory: the configuration, the checkpoint, the metrics over time and the results of one training run.

    config.json              everything that decides the result
    metrics.csv              the course of training
    validation.csv           the same on sequences that no model is trained on, at every checkpoint
    tensorboard              both, and what the model makes of some of these sequences
    checkpoint.safetensors   weights and optimiser state, replaced at every checkpoint
    model.safetensors        the trained model, for `tvae.load`
    evaluation.json          metrics on the test set beside their chance levels
    figures/                 capsule traversals

Nothing in it is a pickle. A checkpoint does not know how many processes trained together. It and the rows of
both logs up to its step are on the disk before it takes the place of the one before, so that a run that is killed,
or whose machine loses power, goes on from it.
"""

from __future__ import annotations

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

from ..config import Config
from ..files import checksum, replacing, sync, write_text
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
        self.validation = path / "validation.csv"
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

        A model of fewer steps is no longer the run's, nor are its metrics: the checkpoint holds it.

        Raises:
            RunError: the configuration cannot be written, or the run has done more steps already.

        """
        with self.lock(), self.writing():
            done = self.steps_done()
            if done > config.training.steps:
                raise RunError(self._too_many(done, config.training.steps))
            if config.training != self.config.training:
                self.model_file.unlink(missing_ok=True)
                self.evaluation_file.unlink(missing_ok=True)
            write_text(self.path / "config.json", config.to_json())
        self.config = config

    def steps_done(self) -> int:
        """Return the step of the last checkpoint, 0 without one.

        Raises:
            RunError: the file is damaged.

        """
        if not self.checkpoint.exists():
            return 0
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                return _step(file.metadata() or {})
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise RunError(f"cannot restore {self.checkpoint}: {error!r}") from error

    def _too_many(self, done: int, asked: int) -> str:
        return f"{self.path} has done {done} steps already, more than the {asked} asked for"

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
            except NotImplementedError as error:  # a file system without locks
                raise RunError(f"{self.path} cannot be locked: {error}; choose another --run-dir") from error

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
        groups = json.dumps(optimizer_state["param_groups"], default=float)  # of a rate that is a tensor
        metadata = {"step": str(step), "param_groups": groups, "checksum": checksum(tensors, str(step))}
        with self.writing(), replacing(self.checkpoint) as partial:
            partial.write_bytes(save(tensors, metadata))  # save_file, when killed, leaves a hidden file behind
            for log in (self.metrics, self.validation):
                if log.exists():
                    sync(log)

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
            step = _step(metadata)
            if step > self.config.training.steps:
                raise RunError(self._too_many(step, self.config.training.steps))
            wanted = _expected(model, optimizer, self.config.training.optimizer)
            _check_tensors({name: _described(x) for name, x in tensors.items()}, wanted)
            found = checksum(tensors, str(step))
            if metadata.get("checksum", found) != found:
                raise ValueError("its checksum is another one")
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
        except RunError:
            raise
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split()) or repr(error)
            raise RunError(f"cannot restore {self.checkpoint}: {reason}") from error

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


def _step(metadata: dict[str, str]) -> int:
    """Return the step of a checkpoint, from its metadata."""
    text = metadata["step"]
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 20 and int(text) > 0):
        raise ValueError(f"its step is {text[:20]}")
    return int(text)


def _described(x: Tensor) -> str:
    """Describe a tensor by its type and shape."""
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _expected(model: nn.Module, optimizer: Optimizer, kind: str) -> dict[str, str]:
    """Describe all tensors of a checkpoint, by name: the weights, and the optimiser's state."""
    expected = {f"model.{name}": _described(x) for name, x in model.state_dict().items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    momentum = any(group.get("momentum") for group in optimizer.param_groups)
    for index, parameter in enumerate(parameters):
        like = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",) * momentum}[kind]
        expected |= {f"optimizer.{index}.{name}": _described(parameter) for name in like}
        if kind == "adam":
            expected[f"optimizer.{index}.step"] = _described(torch.zeros((), dtype=torch.float32))
    return expected


def _check_tensors(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Refuse tensors of other names, types or shapes: PyTorch's optimisers read past the end of those too short."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')}, should be {wanted.get(name, 'none')}")
