"""Training by several processes against training by one: curves, weights, interruptions, failures and files.

Run by torchrun, this file trains as each of the processes; the tests look at what they have left.
"""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvae import run, training
from tvae.data import SequenceStream
from tvae.presets import Config
from tvae.processes import Launched
from tvae.run import Run, RunError
from tvae.training import train, untrained_model
from tvae_kernels import Neighborhood

pytestmark = pytest.mark.slow  # mark what is not `quick`

SMALL = Config(
    capsules=2, neighborhood=Neighborhood(4, 3), weights="projected", batch_size=6, steps=12, learning_rate=1e-4, seed=3
)
CONFIGS = {"whole": SMALL, "free": replace(SMALL, weights="free", learning_rate=1e-3)}
TINY = "--capsules 2 --steps 3 --evaluation-sequences 8 --importance-samples 2 --device cpu"


@contextmanager
def often():
    """Log and save every few steps."""
    before = training.LOG_EVERY, training.CHECKPOINT_EVERY
    training.LOG_EVERY, training.CHECKPOINT_EVERY = 2, 5
    try:
        yield
    finally:
        training.LOG_EVERY, training.CHECKPOINT_EVERY = before


@contextmanager
def in_step(step, action):
    """Do something as the step starts."""
    seed_noise = training.seed_noise

    def act(seed, current):
        if current == step:
            action()
        seed_noise(seed, current)

    training.seed_noise = act
    try:
        yield
    finally:
        training.seed_noise = seed_noise


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def outcome(path, config=SMALL):
    """Train, and say what came of it."""
    if Launched.find().rank == 0 and not path.exists():
        Run.create(path, config)
    try:
        return train(Run(path, config), "cpu", show_progress=False)
    except (RunError, ValueError) as error:
        return str(error)
    except SystemExit as error:
        return error.code


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(folder):
    """Train as one of several processes; only the second one is interrupted or gets a loss that is not finite."""
    first, second = (Launched.find().rank == rank for rank in (0, 1))
    outcomes = {name: outcome(folder / name, config) for name, config in CONFIGS.items()}
    with in_step(6, lambda: second and interrupt()):
        outcomes["interrupted"] = outcome(folder / "interrupted")
    with in_step(6, lambda: second and interrupt(signal.SIGTERM)):
        outcomes["terminated"] = outcome(folder / "terminated")
    outcomes["started by one"] = outcome(folder / "started by one")
    forward = training.VAE.forward

    def spoilt(model, *arguments):
        elbo = forward(model, *arguments)
        return elbo._replace(log_likelihood=elbo.log_likelihood * float("nan"))

    with in_step(7, lambda: second and setattr(training.VAE, "forward", spoilt)):
        outcomes["not finite"] = outcome(folder / "not finite")
    training.VAE.forward = forward
    with in_step(7, lambda: first and setattr(run, "save", full)):
        outcomes["full"] = outcome(folder / "full")
    outcomes["indivisible"] = outcome(folder / "indivisible", replace(SMALL, batch_size=5))
    (folder / f"outcomes-{Launched.find().rank}.json").write_text(json.dumps(outcomes))


def torchrun(*arguments, cwd=None):
    """Two processes on this machine."""
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs by two processes, and of some by one, and what both processes say came of theirs."""
    folder = tmp_path_factory.mktemp("processes")
    with often():
        with in_step(6, interrupt):
            assert outcome(folder / "started by one") is False
        for name, config in CONFIGS.items():
            assert outcome(folder / f"{name}-one", config) is True
    result = torchrun(__file__, folder)
    assert result.returncode == 0, result.stderr
    return folder, [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(2)]


def assert_equal_runs(folder, name, whole, config):
    """Curves and weights agree up to the order of sums.

    A term of a gradient is the same to the last bits whoever computes it; sums over the 90 frames of a batch differ by
    up to 90 units of 6e-8 relative to their terms. Over 12 steps that may grow to 6e-5 of how far weights have moved.
    """
    curves = []
    for run_name in (name, whole):
        with (folder / run_name / "metrics.csv").open(newline="") as file:
            curves.append([{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)])
    assert [row["step"] for row in curves[0]] == [2, 4, 6, 8, 10, 12]
    for ours, expected in zip(*curves, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    start = untrained_model(config, config.open_source("train")).state_dict()
    ours, expected = (load_file(folder / run_name / "model.safetensors") for run_name in (name, whole))
    assert ours.keys() == expected.keys()
    for key, weight in expected.items():
        moved = (weight - start[key]).abs().max()
        assert moved > 0
        atol = 6e-5 * moved + SMALL.steps * torch.finfo(torch.float32).eps * weight.abs().max()
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=float(atol))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_curve_and_the_weights_of_one(name, trained):
    folder, outcomes = trained
    assert [x[name] for x in outcomes] == [True, True]
    assert_equal_runs(folder, name, f"{name}-one", CONFIGS[name])


def test_a_run_interrupted_with_one_process_goes_on_with_two(trained):
    folder, outcomes = trained
    assert [x["started by one"] for x in outcomes] == [True, True]
    assert_equal_runs(folder, "started by one", "whole-one", SMALL)


@pytest.mark.parametrize(("name", "outcome_of_both"), [("interrupted", False), ("terminated", 143)])
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_goes_on(name, outcome_of_both, trained):
    folder, outcomes = trained
    assert [x[name] for x in outcomes] == [outcome_of_both] * 2
    assert not (folder / name / "model.safetensors").exists()
    with often():
        assert outcome(folder / name) is True
    assert_equal_runs(folder, name, "whole-one", SMALL)


def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_the_same_error(trained):
    folder, outcomes = trained
    assert outcomes[0]["not finite"] == outcomes[1]["not finite"]
    assert outcomes[0]["not finite"].startswith("the loss is nan in step 8; the last good state is in")
    assert all(torch.isfinite(x).all() for x in load_file(folder / "not finite/checkpoint.safetensors").values())


def test_a_full_disk_ends_both_processes_with_the_same_error(trained):
    folder, outcomes = trained
    assert outcomes[0]["full"] == outcomes[1]["full"]
    assert "No space left on device" in outcomes[0]["full"]
    assert not (folder / "full/checkpoint.partial").exists()
    with often():
        assert outcome(folder / "full") is True
    assert_equal_runs(folder, "full", "whole-one", SMALL)


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_written(trained):
    folder, outcomes = trained
    assert [x["indivisible"] for x in outcomes] == ["batch_size must be a multiple of the 2 processes, got 5"] * 2
    assert [file.name for file in (folder / "indivisible").iterdir()] == ["config.json"]


def test_files_are_written_once(trained):
    folder, _ = trained
    assert len(list((folder / "whole/tensorboard").iterdir())) == 1
    names = {file.name for file in (folder / "whole").iterdir()}
    assert names == {"checkpoint.safetensors", "config.json", "metrics.csv", "model.safetensors", "tensorboard"}


def test_processes_that_do_not_share_the_folder_of_a_run_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "highest", lambda fabric, *values: [500, 0])
    with pytest.raises(RunError, match=r"the processes do not share .*/run: some find 500 steps there, some 0"):
        train(Run.create(tmp_path / "run", SMALL), "cpu", show_progress=False)


def test_the_parts_of_a_batch_are_those_of_the_whole():
    source = SMALL.open_source("train")
    parts = [SequenceStream(source, 6, 3, rank, 3) for rank in range(3)]
    assert [(part.part.start, part.part.stop) for part in parts] == [(0, 2), (2, 4), (4, 6)]
    for whole, *split in zip(SequenceStream(source, 6, 3)[7], *(part[7] for part in parts), strict=True):
        assert torch.equal(torch.cat(split), whole)


def test_the_command_line_trains_with_torchrun_and_reports_once(tmp_path):
    result = torchrun("-m", "tvae", "train", *TINY.split(), "--batch-size", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("capsule traversals: runs/quickstart/figures/traversals.png") == 1
    names = {file.name for file in (tmp_path / "runs/quickstart").iterdir()}
    assert names >= {"model.safetensors", "evaluation.json", "figures"}
    assert not [name for name in names if "partial" in name]


def test_mistakes_under_torchrun_leave_nothing_behind(tmp_path):
    result = torchrun("-m", "tvae", "train", *TINY.split(), "--batch-size", "5", cwd=tmp_path)
    assert result.returncode == 1
    assert "tvae: error: batch_size must be a multiple of the 2 processes, got 5\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_other_commands_refuse_torchrun(monkeypatch, capsys):
    from tvae import cli

    monkeypatch.setattr(Launched, "find", classmethod(lambda cls: cls(1, 2, 2)))
    assert cli.main(["reproduce", "table1"]) == 1
    assert "torchrun is for `tvae train` alone; run `tvae reproduce` without it" in capsys.readouterr().err


if __name__ == "__main__":
    with often():
        main(Path(sys.argv[1]))
