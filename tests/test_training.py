"""Training: steps against a loop written out here, interruption, kills and resumption bit for bit, and its errors."""

import csv
import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tvae import files, training
from tvae.data import SequenceStream
from tvae.metrics import equivariance_error
from tvae.presets import PRESETS, Config
from tvae.run import Run, RunError, rows_until
from tvae.training import train
from tvae_kernels import Neighborhood

SMALL = Config(capsules=2, neighborhood=Neighborhood(4, 3), batch_size=2, steps=12, learning_rate=1e-3, seed=3)


@pytest.fixture(autouse=True)
def _log_often(monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 2)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 5)


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Press Ctrl-C, or send another signal, while the given step is computed."""
    seed_noise = training.seed_noise

    def pressed(seed, current):
        if current == step:
            os.kill(os.getpid(), number)
        seed_noise(seed, current)

    monkeypatch.setattr(training, "seed_noise", pressed)


def test_training_is_stochastic_gradient_descent_on_the_negative_elbo(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    assert train(run, "cpu")
    source = SMALL.open_source("train")
    torch.manual_seed(SMALL.seed)
    model = SMALL.build_model(source.image_shape)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    stream = SequenceStream(source, 2, SMALL.seed)
    for step in range(SMALL.steps):
        training.seed_noise(SMALL.seed, step)
        loss = -model(stream[step].images).total.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = SMALL.momentum * velocity[name] + gradient
                p -= SMALL.learning_rate * velocity[name]
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(run.load_model().state_dict()[name], expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(optimizer, tmp_path, monkeypatch):
    config = replace(SMALL, optimizer=optimizer)
    whole = Run.create(tmp_path / "whole", config)
    assert train(whole, "cpu")

    parts = Run.create(tmp_path / "parts", config)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert not train(parts, "cpu")
    assert not parts.model_file.exists()
    with pytest.raises(RunError, match="no trained model yet: finish it with `tvae train --resume"):
        parts.load_model()
    assert train(Run.open(parts.path), "cpu")

    for name, expected in load_file(whole.checkpoint).items():
        assert torch.equal(load_file(parts.checkpoint)[name], expected), name
    assert (parts.path / "metrics.csv").read_text() == (whole.path / "metrics.csv").read_text()


def test_a_killed_run_resumes_from_its_last_checkpoint_and_forgets_later_metrics(tmp_path, monkeypatch):
    whole, killed = Run.create(tmp_path / "whole", SMALL), Run.create(tmp_path / "killed", SMALL)
    assert train(whole, "cpu")

    def die(seed, step, seed_noise=training.seed_noise):
        if step == 9:
            raise SystemExit
        seed_noise(seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "seed_noise", die)
        with pytest.raises(SystemExit):
            train(killed, "cpu")
    assert train(killed, "cpu")  # from step 5: the rows of steps 6 and 8 are written again, once
    assert killed.model_file.read_bytes() == whole.model_file.read_bytes()
    assert (killed.path / "metrics.csv").read_text() == (whole.path / "metrics.csv").read_text()


def test_projected_weights_have_norm_one_after_training_and_normalised_ones_resume(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "projected", replace(SMALL, weights="projected", steps=3))
    assert train(run, "cpu")
    for name, weight in load_file(run.model_file).items():
        if name.endswith("weight"):
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))

    config = replace(SMALL, weights="normalised")
    whole, parts = Run.create(tmp_path / "whole", config), Run.create(tmp_path / "parts", config)
    assert train(whole, "cpu")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert not train(parts, "cpu")
    assert train(parts, "cpu")
    assert parts.model_file.read_bytes() == whole.model_file.read_bytes()
    assert "z_encoder.0.parametrizations.weight.original0" in load_file(whole.model_file)


def test_configurations_of_older_runs_are_read():
    for file in (Path(__file__).parent.parent / "results").glob("*/config.json"):
        assert Config.from_json(file.read_text()).weights == "free"


def test_a_model_is_evaluated_on_the_data_that_its_configuration_says(mnist_dir):
    config = replace(PRESETS["mnist-tvae-w13-k3-generalisation"].config, data_dir=mnist_dir)
    assert [config.open_source(split).name for split in ("train", "test")] == ["mnist", "mnist-rotation-hue"]
    with pytest.raises(ValueError, match="a model of mnist images cannot be evaluated on dsprites"):
        replace(config, evaluation_data="dsprites")


def test_another_seed_gives_another_model(tmp_path):
    models = []
    for seed in (0, 1):
        run = Run.create(tmp_path / str(seed), replace(SMALL, seed=seed, steps=2))
        assert train(run, "cpu")
        models.append(run.load_model())
    assert not torch.equal(models[0].decoder[0].weight, models[1].decoder[0].weight)


def test_metrics_are_logged_with_the_values_of_the_batch(tmp_path, monkeypatch):
    seen = []
    measure = training.measure
    monkeypatch.setattr(training, "measure", lambda elbo, rolls: seen.append((elbo, rolls)) or measure(elbo, rolls))
    half = replace(SMALL, steps=4, neighborhood=replace(SMALL.neighborhood, shift=0.5))
    run = Run.create(tmp_path / "run", half)
    assert train(run, "cpu")
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    for row, (elbo, rolls) in zip(rows, seen, strict=True):
        assert float(row["loss"]) == pytest.approx(-elbo.total.mean().item())
        assert rolls == half.neighborhood
        expected = equivariance_error(elbo.t, half.neighborhood).mean().item()
        assert float(row["equivariance_error"]) == pytest.approx(expected)
        total = float(row["log_likelihood"]) - float(row["kl_z"]) - float(row["kl_u"])
        assert -float(row["loss"]) == pytest.approx(total)
    assert list((run.path / "tensorboard").glob("events.*"))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", SMALL)
    built = []
    build_model, seed_noise = Config.build_model, training.seed_noise

    def remember(config, image_shape):
        built.append(build_model(config, image_shape))
        return built[0]

    def spoil(seed, step):
        seed_noise(seed, step)
        if step == 7:
            built[0].z_encoder[0].weight.data.fill_(float("nan"))

    monkeypatch.setattr(Config, "build_model", remember)
    monkeypatch.setattr(training, "seed_noise", spoil)
    with pytest.raises(
        RunError, match=r"the loss is nan in step 8; the last good state is in .*checkpoint.safetensors"
    ):
        train(run, "cpu")
    state = load_file(run.checkpoint)
    assert all(torch.isfinite(x).all() for x in state.values())
    assert not run.model_file.exists()


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    model = SMALL.build_model((1, 64, 64))
    optimizer = training.build_optimizer(SMALL, model)
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


def test_a_run_directory_is_never_overwritten(tmp_path):
    Run.create(tmp_path / "run", SMALL)
    before = (tmp_path / "run/config.json").read_text()
    with pytest.raises(RunError, match="exists already: continue it with `tvae train --resume"):
        Run.create(tmp_path / "run", replace(SMALL, seed=5))
    assert (tmp_path / "run/config.json").read_text() == before


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_the_way_through_json(name):
    config = replace(PRESETS[name].config, data_dir=Path("/some/where"))
    assert Config.from_json(config.to_json()) == config


def test_configurations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a VAE has no topography"):
        Config(model="vae", neighborhood=Neighborhood(3))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Config(steps=0)
    with pytest.raises(ValueError, match="learning_rate must be positive, got -1"):
        Config(learning_rate=-1)
    with pytest.raises(ValueError, match="momentum must be in"):
        Config(momentum=1.0)
    with pytest.raises(ValueError, match="time_window of 16 does not fit 15"):
        replace(SMALL, neighborhood=Neighborhood(16)).open_source("train")


KILLED = """
import os, random, signal, sys, time
from pathlib import Path

from tvae import training
from tvae.run import Run


def write_slowly(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        time.sleep(0.01)
        file.write(data[len(data) // 2 :])


Path.write_bytes = write_slowly  # so that kills find half-written files
training.LOG_EVERY, training.CHECKPOINT_EVERY = 2, 1
path, kills = Path(sys.argv[1]), int(sys.argv[2])
checkpoint = path / "checkpoint.safetensors"
random.seed(0)
for attempt in range(kills + 1):
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    if (child := os.fork()) == 0:
        training.train(Run.open(path), "cpu", show_progress=False)
        os._exit(0)
    if attempt < kills:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
            assert os.waitid(os.P_PID, child, ended) is None, "it failed"
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (-signal.SIGKILL if attempt < kills else 0), status
"""


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    config = replace(SMALL, steps=60)
    whole, killed = Run.create(tmp_path / "whole", config), Run.create(tmp_path / "killed", config)
    assert train(whole, "cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(killed.path), "8"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    for name in ("metrics.csv", "model.safetensors"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    for name, expected in load_file(whole.checkpoint).items():  # a checkpoint's metadata has no certain order
        assert torch.equal(load_file(killed.checkpoint)[name], expected), name
    assert {file.name for file in killed.path.iterdir()} == {file.name for file in whole.path.iterdir()}


@contextmanager
def room_for(size):
    """Let no file grow beyond so many bytes, like a disk that fills up within a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    whole, run = Run.create(tmp_path / "whole", SMALL), Run.create(tmp_path / "run", SMALL)
    assert train(whole, "cpu")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert not train(run, "cpu")
    before, left = run.checkpoint.read_bytes(), {file.name for file in run.path.iterdir()}
    expected = (
        r"cannot write the run: .*File too large.*; the last good state is in .*checkpoint.safetensors; .* --resume"
    )
    with room_for(10_000), pytest.raises(RunError, match=expected):
        train(run, "cpu")
    assert run.checkpoint.read_bytes() == before
    assert {file.name for file in run.path.iterdir()} == left
    assert train(run, "cpu")
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
    assert train(run, "cpu")


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


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_the_state_and_exits_with_143(times, tmp_path, monkeypatch):
    whole, run = Run.create(tmp_path / "whole", SMALL), Run.create(tmp_path / "run", SMALL)
    assert train(whole, "cpu")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        for _ in range(times):
            interrupt_at(patch, 6, signal.SIGTERM)
        with pytest.raises(SystemExit) as exit_status:
            train(run, "cpu")
    assert exit_status.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(run, "cpu")
    assert run.model_file.read_bytes() == whole.model_file.read_bytes()


def test_an_interruption_in_the_last_step_is_heeded(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", SMALL)
    with monkeypatch.context() as patch:
        interrupt_at(patch, SMALL.steps - 1)
        assert not train(run, "cpu")
    assert train(run, "cpu")
    assert run.model_file.exists()
