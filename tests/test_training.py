"""Training: steps against a loop written out here, interruption, kills and resumption bit for bit, and its errors."""

import csv
import errno
import json
import math
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

from tvae import files, steps, training
from tvae.data import SequenceStream
from tvae.metrics import equivariance_error
from tvae.presets import PRESETS, Config, check_machine
from tvae.run import Run, RunError, rows_until
from tvae.training import train
from tvae_kernels import Neighborhood

pytestmark = pytest.mark.slow  # mark what is not `quick`

SMALL = Config(capsules=2, neighborhood=Neighborhood(4, 3), batch_size=2, steps=12, learning_rate=1e-3, seed=3)
TOLD = replace(
    SMALL,
    data="sprites-shifts",
    neighborhood=Neighborhood(4, 2, axes=(3, 5), roots="each axis"),
    told_axis=True,
    learning_rate=1e-4,
)


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


@pytest.mark.parametrize("config", [SMALL, TOLD], ids=["one axis", "told which of two"])
def test_training_is_stochastic_gradient_descent_on_the_negative_elbo(config, tmp_path):
    run = Run.create(tmp_path / "run", config)
    assert train(run, "cpu")
    source = config.open_source("train")
    torch.manual_seed(SMALL.seed)
    model = config.build_model(source.image_shape)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    stream = SequenceStream(source, 2, SMALL.seed)
    for step in range(SMALL.steps):
        training.seed_noise(SMALL.seed, step)
        batch = stream[step]
        axis = batch.transformation - 3 if config.told_axis else None  # factor 3 is x, 4 is y
        loss = -model(batch.images, axis=axis).total.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = config.momentum * velocity[name] + gradient
                p -= config.learning_rate * velocity[name]
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
    # What runs did before these could be chosen.
    added = {"weights": "free", "precision": "32-true", "told_axis": False}
    older = 0
    for file in (Path(__file__).parent.parent / "results").glob("*/config.json"):
        written, config = json.loads(file.read_text()), Config.from_json(file.read_text())
        older += written.keys().isdisjoint(added)
        for name, default in added.items():
            assert getattr(config, name) == written.get(name, default)
    assert older


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


def curve(run):
    """All that was logged, `(row, column)`."""
    with (run.path / "metrics.csv").open(newline="") as file:
        return torch.tensor([[float(x) for x in row.values()] for row in csv.DictReader(file)], dtype=torch.float64)


def rounding(config):
    """How far curves of one training may be apart, relatively, when sums are taken in another order.

    Errors of additions are as good as random and grow with the root of their number (see benchmarks/operation.py). The
    longest chain of a step adds the pixels three times: into the encoder, over the likelihood, and into the weights'
    gradients, and every step starts with the errors of those before it.
    """
    additions = config.steps * 3 * 64 * 64
    return 6 * math.sqrt(additions) * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
def test_compiled_steps_give_the_curve_of_eager_ones(tmp_path, monkeypatch):
    config = replace(SMALL, steps=6)
    eager, compiled = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "compiled", config)
    assert train(eager, "cpu")
    called = []
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: (called.append(m), compile_model(m, **kw)))
    assert train(compiled, "cpu", step="compiled")
    assert len(called) == 1
    torch.testing.assert_close(curve(compiled), curve(eager), rtol=rounding(config), atol=0)
    assert eager.load_model().state_dict().keys() == compiled.load_model().state_dict().keys()


def test_a_compiler_that_fails_is_named(tmp_path, monkeypatch):
    def fail(module, **_):
        error = steps.TorchDynamoException("no compiler\nand a page of advice")
        monkeypatch.setattr(module, "forward", lambda *_: (_ for _ in ()).throw(error))

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.raises(RunError, match=r"^torch.compile fails: no compiler; train with --step eager, which gives"):
        train(Run.create(tmp_path / "run", SMALL), "cpu", step="compiled")


class Played:
    """In place of a CUDA graph: a capture computes nothing, a replay does it all."""

    def warm_up(self, function):
        function()

    def capture(self, function):
        self.replay = function


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, optimizer="adam"), TOLD], ids=["sgd", "adam", "told"])
def test_what_is_captured_and_replayed_is_the_eager_step_interruptions_included(config, tmp_path, monkeypatch):
    eager, played = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "played", config)
    assert train(eager, "cpu")
    monkeypatch.setattr(steps, "Graph", Played)
    monkeypatch.setattr(training, "check_machine", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert not train(played, "cpu", step="graph")
    assert train(played, "cpu", step="graph")
    state = load_file(played.checkpoint)
    assert all(torch.equal(state[name], expected) for name, expected in load_file(eager.checkpoint).items())
    assert (played.path / "metrics.csv").read_text() == (eager.path / "metrics.csv").read_text()


def test_adam_is_told_of_the_capture_and_of_nothing_else(monkeypatch):
    told = []
    monkeypatch.setattr(Played, "capture", lambda self, _: told.append([g["capturable"] for g in adam.param_groups]))
    model = SMALL.build_model((1, 64, 64))
    adam, sgd = (training.build_optimizer(replace(SMALL, optimizer=name), model) for name in ("adam", "sgd"))
    for optimizer in (adam, sgd):
        step = object.__new__(steps.GraphStep)
        step.optimizer, step.graph = optimizer, Played()
        step.capture()
    assert told == [[True], [False]]
    assert "capturable" not in sgd.param_groups[0]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_replayed_graph_gives_the_curve_of_eager_steps(optimizer, tmp_path):
    config = replace(SMALL, optimizer=optimizer, steps=20, learning_rate=1e-4)
    eager, graph = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "graph", config)
    assert train(eager, "cuda")
    assert train(graph, "cuda", step="graph")
    tolerance = rounding(config)
    torch.testing.assert_close(curve(graph), curve(eager), rtol=tolerance, atol=0)
    for name, expected in load_file(eager.model_file).items():
        x = load_file(graph.model_file)[name]
        assert (x - expected).norm() <= tolerance * expected.norm(), name


def test_what_the_machine_lacks_is_said_before_anything_is_written(tmp_path, monkeypatch):
    cpu, run = torch.device("cpu"), Run.create(tmp_path / "run", replace(SMALL, precision="tf32"))
    with pytest.raises(
        ValueError, match=r"^--step graph needs a GPU, got the device cpu; use --step eager or compiled"
    ):
        check_machine("graph", "32-true", cpu)
    with pytest.raises(ValueError, match=r"^--precision tf32 needs an NVIDIA GPU of compute capability 8.0 .* got cpu"):
        train(run, "cpu")
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="step must be one of eager, compiled, graph; got 'fast'"):
        check_machine("fast", "32-true", cpu)
    with pytest.raises(ValueError, match="--step graph is for one process, got 2"):
        check_machine("graph", "32-true", torch.device("cuda"), 2)
    with pytest.raises(ValueError, match="precision must be one of 32-true, tf32, bf16-mixed; got '16'"):
        check_machine("eager", "16", cpu)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _: False)
    with pytest.raises(ValueError, match="tf32 needs an NVIDIA GPU"):
        check_machine("graph", "tf32", cuda)
    with pytest.raises(ValueError, match="bf16-mixed needs a GPU that computes in bfloat16"):
        check_machine("graph", "bf16-mixed", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_machine("graph", "tf32", cuda)


def test_tf32_is_a_setting_for_the_time_of_the_training_alone():
    before = torch.get_float32_matmul_precision()
    with steps.matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        with steps.matmul_precision("32-true"):
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_bfloat16_rounds_the_products_and_neither_noise_nor_likelihood():
    """Against float32, and in units of what rounding the weights alone changes.

    Mixed precision rounds the weights of every layer, its input and its result, three errors alike: it changes ELBOs by
    some sqrt(3) of these units, and by less than six times that. (Noise drawn in bfloat16 is off by 100 of them.)
    """
    source = SMALL.open_source("train")
    model = training.untrained_model(SMALL, source)
    images = SequenceStream(source, 8, 0)[0].images

    def elbo(mixed=False):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(images)

    exact, found = elbo(), elbo(mixed=True)
    for p in model.parameters():
        p.data = p.bfloat16().float()
    unit = (elbo().total - exact.total).square().mean().sqrt()
    error = (found.total - exact.total).abs().max()
    assert found.t.dtype == found.total.dtype == torch.float32
    assert unit / 10 < error < 6 * math.sqrt(3) * unit


def test_training_in_bfloat16_follows_training_in_float32(tmp_path):
    runs = [
        Run.create(tmp_path / p, replace(SMALL, precision=p, learning_rate=1e-4)) for p in ("32-true", "bf16-mixed")
    ]
    assert all(train(run, "cpu") for run in runs)
    float32, bfloat16 = (curve(run)[:, 1] for run in runs)
    assert not torch.equal(bfloat16, float32)
    # Every product has an error of three roundings to 8 bits, and a loss starts with those of the steps before it.
    torch.testing.assert_close(bfloat16, float32, rtol=SMALL.steps * 3 * 2**-9, atol=0)
    assert bfloat16[-1] < bfloat16[0]


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
    with pytest.raises(ValueError, match="told_axis needs a root for each axis, got Neighborhood"):
        replace(SMALL, told_axis=True)
    with pytest.raises(ValueError, match=r"needs an axis for each of scale, orientation, x, y, got \(3, 5\)"):
        replace(TOLD, data="sprites").open_source("train")
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
