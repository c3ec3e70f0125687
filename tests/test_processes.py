"""Training by several processes against training by one: curves, weights, interruptions, failures and files.

Run by torchrun, this file trains as each of the processes; the tests look at what they have left.
"""

import contextlib
import csv
import json
import os
import runpy
import signal
import sys
from dataclasses import replace
from pathlib import Path

import acting
import pytest
import torch
from acting import Acting, interrupted_at, often, room_for, signalling, with_model, with_training
from safetensors.torch import load_file

from tvae.config import Config, DataSettings, TrainingSettings
from tvae.data import SequenceStream
from tvae.models import TVAE, FactorVAE
from tvae.training import Run, RunError, train, untrained_model
from tvae.training.processes import Launched
from tvae_kernels import Neighborhood

pytestmark = [pytest.mark.xdist_group("torchrun"), pytest.mark.slow]

SMALL = Config(
    DataSettings(),
    TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 3), weights="projected"),
    TrainingSettings(batch_size=6, steps=12, learning_rate=1e-4, seed=3),
)
CONFIGS = {"whole": SMALL, "free": with_training(with_model(SMALL, weights="free"), learning_rate=1e-3)}
TINY = "--capsules 2 --steps 3 --evaluation-sequences 8 --importance-samples 2 --device cpu"


def outcome(path, config=SMALL, sources=None, create=None):
    """Train, and say what came of it: whether it has finished, the status of its exit, or the error."""
    if (Launched.find().rank == 0 if create is None else create) and not path.exists():
        Run.create(path, config)
    try:
        return train(Run(path, config), "cpu", show_progress=False, sources=sources) is not None
    except (RunError, ValueError) as error:
        return str(error)
    except SystemExit as error:
        return error.code


def command_line(*arguments):
    """What `python -m tvae` does, and the status that it ends with."""
    sys.argv[1:] = arguments
    try:
        runpy.run_module("tvae", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code


def main(folder):
    """Train as one of several processes; only one of them is interrupted, gets images that are none or a full disk."""
    rank = Launched.find().rank

    def acts(number, step, action):
        """The sequences, and an action of the process of that number in a step."""
        return Acting(SMALL, {step: action} if rank == number else {}, rank, 2)

    outcomes = {name: outcome(folder / name, config) for name, config in CONFIGS.items()}
    outcomes["interrupted"] = outcome(folder / "interrupted", sources=acts(1, 6, signalling()))
    outcomes["terminated"] = outcome(folder / "terminated", sources=acts(1, 6, signalling(signal.SIGTERM)))
    outcomes["started by one"] = outcome(folder / "started by one")
    spoilt = acts(1, 7, lambda images: images * float("nan"))
    outcomes["not finite"] = outcome(folder / "not finite", sources=spoilt)
    with contextlib.ExitStack() as stack:
        filled = acts(0, 7, lambda images: stack.enter_context(room_for(10_000)))
        outcomes["full"] = outcome(folder / "full", sources=filled)
    outcomes["indivisible"] = outcome(folder / "indivisible", with_training(SMALL, batch_size=5))
    alone = replace(SMALL, model=FactorVAE.Settings(2, 15, units=8))
    outcomes["alone"] = outcome(folder / "alone", alone)
    outcomes["not shared"] = outcome(folder / ("interrupted", "not shared")[rank], create=rank == 1)
    (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))

    os.chdir(folder)
    status = command_line("train", "quickstart", *TINY.split(), "--batch-size", "4")
    (folder / f"status-{rank}.json").write_text(json.dumps(status))
    # At last, for torchrun ends the process that waits for one which has found the mistake.
    sys.exit(command_line("train", "quickstart", *TINY.split(), "--batch-size", "5", "--run-dir", "mistaken"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs by two processes, and of some by one, what both say came of theirs, and what torchrun says."""
    folder = tmp_path_factory.mktemp("processes")
    with often():
        assert outcome(folder / "started by one", sources=interrupted_at(SMALL, 6)) is False
        for name, config in CONFIGS.items():
            assert outcome(folder / f"{name}-one", config) is True
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = acting.run_script(*torchrun, __file__, folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    files = [folder / f"outcomes-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), result.stderr
    return folder, [json.loads(file.read_text()) for file in files], result


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
        atol = 6e-5 * moved + SMALL.training.steps * torch.finfo(torch.float32).eps * weight.abs().max()
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=float(atol))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_the_curve_and_the_weights_of_one(name, trained):
    folder, outcomes, _ = trained
    assert [x[name] for x in outcomes] == [True, True]
    assert_equal_runs(folder, name, f"{name}-one", CONFIGS[name])


def test_a_run_interrupted_with_one_process_goes_on_with_two(trained):
    folder, outcomes, _ = trained
    assert [x["started by one"] for x in outcomes] == [True, True]
    assert_equal_runs(folder, "started by one", "whole-one", SMALL)


@pytest.mark.parametrize(("name", "outcome_of_both"), [("interrupted", False), ("terminated", 143)])
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_goes_on(name, outcome_of_both, trained):
    folder, outcomes, _ = trained
    assert [x[name] for x in outcomes] == [outcome_of_both] * 2
    assert not (folder / name / "model.safetensors").exists()
    with often():
        assert outcome(folder / name) is True
    assert_equal_runs(folder, name, "whole-one", SMALL)


def test_a_loss_that_is_not_finite_in_one_process_ends_both_with_the_same_error(trained):
    folder, outcomes, _ = trained
    assert outcomes[0]["not finite"] == outcomes[1]["not finite"]
    assert outcomes[0]["not finite"].startswith("the loss is nan in step 8; the last good state is in")
    assert all(torch.isfinite(x).all() for x in load_file(folder / "not finite/checkpoint.safetensors").values())


def test_a_full_disk_ends_both_processes_with_the_same_error(trained):
    folder, outcomes, _ = trained
    assert outcomes[0]["full"] == outcomes[1]["full"]
    assert "cannot write the run: [Errno 27] File too large" in outcomes[0]["full"]
    assert not (folder / "full/checkpoint.partial").exists()
    with often():
        assert outcome(folder / "full") is True
    assert_equal_runs(folder, "full", "whole-one", SMALL)


def test_a_batch_that_the_processes_cannot_share_is_refused_before_anything_is_written(trained):
    folder, outcomes, _ = trained
    assert [x["indivisible"] for x in outcomes] == ["batch_size must be a multiple of the 2 processes, got 5"] * 2
    assert {file.name for file in (folder / "indivisible").iterdir()} - {"lock"} == {"config.json"}


def test_a_model_of_one_process_is_refused_before_it_is_trained(trained):
    folder, outcomes, _ = trained
    error = "a FactorVAE is trained by one process, got 2: it needs all of a batch in one place"
    assert [x["alone"] for x in outcomes] == [error] * 2
    assert [file.name for file in (folder / "alone").iterdir()] == ["config.json"]


def test_files_are_written_once(trained):
    folder, _, _ = trained
    assert len(list((folder / "whole/tensorboard").iterdir())) == 1
    names = {file.name for file in (folder / "whole").iterdir()} - {"lock"}
    assert names == {
        "checkpoint.safetensors",
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "tensorboard",
        "validation.csv",
    }


def test_processes_that_do_not_share_the_folder_of_a_run_are_refused(trained):
    _, outcomes, _ = trained
    for name, x in zip(("interrupted", "not shared"), outcomes, strict=True):
        assert x["not shared"].startswith("the processes do not share ")
        assert x["not shared"].endswith(f"/{name}: some find 7 steps there, some 0")


def test_the_parts_of_a_batch_are_those_of_the_whole():
    source = SMALL.open_source("train")
    parts = [SequenceStream(source, 6, 3, rank, 3) for rank in range(3)]
    assert [(part.part.start, part.part.stop) for part in parts] == [(0, 2), (2, 4), (4, 6)]
    whole, split = SequenceStream(source, 6, 3)[7], [part[7] for part in parts]
    assert [(batch.first, batch.total) for batch in (whole, *split)] == [(0, 6), (0, 6), (2, 6), (4, 6)]
    for expected, *found in zip(whole[:5], *(batch[:5] for batch in split), strict=True):
        assert torch.equal(torch.cat(found), expected)


def test_the_command_line_trains_with_torchrun_and_reports_once(trained):
    folder, _, result = trained
    assert [json.loads((folder / f"status-{rank}.json").read_text()) for rank in range(2)] == [0, 0], result.stderr
    assert result.stdout.count("capsule traversals: runs/quickstart/figures/traversals.png") == 1
    names = {file.name for file in (folder / "runs/quickstart").iterdir()}
    assert names >= {"model.safetensors", "evaluation.json", "figures"}
    assert not [name for name in names if "partial" in name]


def test_mistakes_under_torchrun_leave_nothing_behind(trained):
    folder, _, result = trained
    assert result.returncode == 1
    assert "tvae: error: batch_size must be a multiple of the 2 processes, got 5\n" in result.stderr
    assert not (folder / "mistaken").exists()


def test_other_commands_refuse_torchrun(monkeypatch, capsys):
    from tvae import cli

    monkeypatch.setattr(Launched, "find", classmethod(lambda cls: cls(1, 2, 2)))
    assert cli.main(["reproduce", "table1"]) == 2
    assert "torchrun is for `tvae train` alone; run `tvae reproduce` without it" in capsys.readouterr().err


if __name__ == "__main__":
    with often():
        main(Path(sys.argv[1]))
