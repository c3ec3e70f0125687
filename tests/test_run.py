"""Run directories: checkpoints, logs and models, whole on the disk or not at all."""

import csv
import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from acting import interrupted_at, often, room_for, with_training
from safetensors.torch import load_file

from tvae import files
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.models import TVAE
from tvae.training import Run, RunError, build_optimizer, train
from tvae.training.log import rows_until
from tvae_kernels import Neighborhood

SMALL = Config(
    DataSettings(),
    TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 3)),
    TrainingSettings(batch_size=2, steps=12, learning_rate=1e-3, seed=3),
)


@pytest.fixture(autouse=True)
def _log_often():
    with often():
        yield


def test_a_run_directory_is_never_overwritten(tmp_path):
    Run.create(tmp_path / "run", SMALL)
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(RunError, match="exists already: continue it with `tvae train --resume"):
        Run.create(tmp_path / "run", with_training(SMALL, seed=5))
    assert (tmp_path / "run/config.json").read_text() == before


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    model = SMALL.build_model((1, 64, 64))
    optimizer = build_optimizer(SMALL.training, model)
    run.save_checkpoint(1, model, optimizer)
    before = run.checkpoint.read_bytes()
    model.decoder[0].bias.data[0] = float("inf")
    with pytest.raises(RunError, match=r"the weight decoder.0.bias is not finite after step 2"):
        run.save_checkpoint(2, model, optimizer)
    assert run.checkpoint.read_bytes() == before


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    run.checkpoint.write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"cannot restore .*checkpoint.safetensors"):
        train(run, "cpu")


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    with run.lock():
        with run.lock():  # the same process, again
            pass
        with pytest.raises(RunError, match=r"another process is at work in .*/run; wait for it or stop it"):
            train(Run.open(run.path), "cpu")
    assert {file.name for file in run.path.iterdir()} == {"config.json", "lock"}
    assert train(Run.open(run.path), "cpu") is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread raises, too
def test_a_full_disk_ends_the_run_and_keeps_the_last_good_state(tmp_path):
    whole, run = Run.create(tmp_path / "whole", SMALL), Run.create(tmp_path / "run", SMALL)
    assert train(whole, "cpu") is not None
    assert train(run, "cpu", sources=interrupted_at(SMALL, 6)) is None
    before, left = run.checkpoint.read_bytes(), {file.name for file in run.path.iterdir()}
    expected = (
        r"cannot write the run: .*File too large.*; the last good state is in .*checkpoint.safetensors; .* --resume"
    )
    with room_for(10_000), pytest.raises(RunError, match=expected):
        train(run, "cpu")
    assert run.checkpoint.read_bytes() == before
    assert {file.name for file in run.path.iterdir()} == left
    assert train(run, "cpu") is not None
    assert run.model_file.read_bytes() == whole.model_file.read_bytes()
    assert (run.path / "metrics.csv").read_text() == (whole.path / "metrics.csv").read_text()

    written = run.model_file.read_bytes()
    with room_for(10_000), pytest.raises(RunError, match=r"cannot write the run: .*File too large"):
        run.save_model(run.load_model())
    assert run.model_file.read_bytes() == written


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run.create(tmp_path / "run", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerow", full)
        with pytest.raises(RunError, match=r"cannot write the run: .*No space left on device; there is no checkpoint"):
            train(run, "cpu")
    assert train(run, "cpu") is not None


@pytest.mark.parametrize(
    ("log", "kept"),
    [
        (b"", b""),
        (b"step,loss\r\n", b""),
        (b"step,loss\r\n25,1.5\r\n50,1.25\r\n", b"step,loss\r\n25,1.5\r\n50,1.25\r\n"),
        (b"step,loss\r\n25,1.5\r\n50,1.25\r\n75,1.0\r\n", b"step,loss\r\n25,1.5\r\n50,1.25\r\n"),
        (b"step,loss\r\n25,1.5\r\n5", b"step,loss\r\n25,1.5\r\n"),
        (b"step,loss\r\n25,1.5\r\n50,1.2", b"step,loss\r\n25,1.5\r\n"),
        (b"step,loss\r\n25,1.5\r\n\0\0\0\0\0\0\n", b"step,loss\r\n25,1.5\r\n"),
        (b"step,loss\r\n75,1.5\r\n", b""),
    ],
)
def test_half_a_row_that_a_crash_has_left_is_no_row(log, kept):
    assert rows_until(50, log) == kept


@pytest.mark.slow
def test_a_log_of_an_older_version_goes_on_with_its_columns(tmp_path):
    whole, run = Run.create(tmp_path / "whole", SMALL), Run.create(tmp_path / "run", SMALL)
    assert train(whole, "cpu") is not None
    assert train(run, "cpu", sources=interrupted_at(SMALL, 5)) is None
    columns = ("step", "loss", "kl_u")

    def rows(path):
        with path.open(newline="") as file:
            return [{name: row[name] for name in columns} for row in csv.DictReader(file)]

    kept = rows(run.metrics)
    with run.metrics.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
    assert train(run, "cpu") is not None
    assert run.metrics.read_text().splitlines()[0] == "step,loss,kl_u"
    assert rows(run.metrics) == rows(whole.metrics)


def test_a_file_takes_its_place_when_it_is_on_the_disk(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "file.txt"
    path.write_text("old")
    fsync = os.fsync

    def note(descriptor):
        synced.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with files.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert [(Path(name).name, text) for name, text in synced] == [("file.partial", "old"), (tmp_path.name, "new")]


def test_a_file_that_several_replace_at_once_is_always_whole(tmp_path):
    """By threads; the last file differs in its suffix alone."""
    paths = [tmp_path / "file.txt"] * 3 + [tmp_path / "file.md"]
    wrong = []

    def replace_often(number):
        try:
            for _ in range(20):
                files.write_text(paths[number], f"{number}" * 10_000 * (number + 1))
                text = paths[number].read_text()
                if text not in {f"{n}" * 10_000 * (n + 1) for n in (range(3) if number < 3 else [number])}:
                    wrong.append(text)
        except OSError as error:
            wrong.append(error)

    threads = [threading.Thread(target=replace_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(tmp_path.iterdir()) == sorted(set(paths))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    def fail(partial):
        partial.write_text("half")
        raise OSError("no space")

    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="no space"), files.replacing(path) as partial:
        fail(partial)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_a_checkpoint_holds_weights_optimiser_and_step(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    assert train(run, "cpu", sources=interrupted_at(SMALL, 6)) is None
    model = SMALL.build_model((1, 64, 64))
    optimizer = build_optimizer(SMALL.training, model)
    assert run.load_checkpoint(model, optimizer) == 7
    written = load_file(run.checkpoint)
    for number, (name, p) in enumerate(model.named_parameters()):
        assert torch.equal(p, written[f"model.{name}"])
        assert torch.equal(optimizer.state[p]["momentum_buffer"], written[f"optimizer.{number}.momentum_buffer"])
