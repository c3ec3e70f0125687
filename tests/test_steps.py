"""One step of training, taken in other ways: compiled, as a graph, in other precisions; against the eager one."""

import math
from dataclasses import replace

import pytest
import torch
from acting import interrupted_at, often, with_training
from contracts import curve, rounding
from safetensors.torch import load_file

from tvae.config import Config, DataSettings, TrainingSettings, check_machine
from tvae.data import SequenceStream
from tvae.models import TVAE
from tvae.training import Run, RunError, build_optimizer, build_step, loop, steps, train, untrained_model
from tvae.training.processes import find_device, launch
from tvae_kernels import Neighborhood

SMALL = Config(
    DataSettings(),
    TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 3)),
    TrainingSettings(batch_size=2, steps=12, learning_rate=1e-3, seed=3),
)
AXES = Config(
    DataSettings("sprites-shifts"),
    TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 2, axes=(3, 5), roots="each axis"), told_axis=True),
    TrainingSettings(batch_size=2, steps=12, learning_rate=1e-4, seed=3),
)


@pytest.fixture(autouse=True)
def _log_often():
    with often():
        yield


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")
@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
def test_compiled_steps_give_the_curve_of_eager_ones(tmp_path, monkeypatch):
    config = with_training(SMALL, steps=6)
    eager, compiled = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "compiled", config)
    assert train(eager, "cpu") is not None
    called = []
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **kw: (called.append(m), compile_model(m, **kw)))
    assert train(compiled, "cpu", step="compiled") is not None
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


@pytest.fixture
def _played(monkeypatch):
    """What a GPU alone has, replaced."""
    monkeypatch.setattr(steps, "Graph", Played)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(loop, "check_run", lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("_played")
@pytest.mark.parametrize("config", [SMALL, with_training(SMALL, optimizer="adam"), AXES], ids=["sgd", "adam", "axes"])
def test_what_is_captured_and_replayed_is_the_eager_step_interruptions_included(config, tmp_path):
    eager, played = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "played", config)
    assert train(eager, "cpu") is not None
    assert train(played, "cpu", step="graph", sources=interrupted_at(config, 6)) is None
    assert train(played, "cpu", step="graph") is not None
    state = load_file(played.checkpoint)
    assert all(torch.equal(state[name], expected) for name, expected in load_file(eager.checkpoint).items())
    assert (played.path / "metrics.csv").read_text() == (eager.path / "metrics.csv").read_text()


def test_adam_knows_of_the_capture_and_of_nothing_else(monkeypatch):
    seen = []
    monkeypatch.setattr(Played, "capture", lambda self, _: seen.append([g["capturable"] for g in adam.param_groups]))
    model = SMALL.build_model((1, 64, 64))
    adam, sgd = (build_optimizer(with_training(SMALL, optimizer=name).training, model) for name in ("adam", "sgd"))
    for optimizer in (adam, sgd):
        step = object.__new__(steps.GraphStep)
        step.optimizer, step.graph = optimizer, Played()
        step.capture()
    assert seen == [[True], [False]]
    assert "capturable" not in sgd.param_groups[0]


@pytest.mark.usefixtures("_played")
@pytest.mark.parametrize(
    ("kind", "stages"), [("eager", ["data", "forward", "backward", "optimiser"]), ("graph", ["data", "replay"])]
)
def test_the_end_of_every_stage_is_marked(kind, stages):
    fabric, source, marked = launch(find_device("cpu")), SMALL.open_source("train"), []
    model = untrained_model(SMALL, source)
    model, optimizer = fabric.setup(model, build_optimizer(SMALL.training, model))
    stream = SequenceStream(source, 2, 3)
    step = build_step(kind, "32-true", fabric, model, optimizer, stream, marked.append)
    assert marked == []
    for i in range(5):
        elbo = step(i)
        assert marked == (i + 1) * stages
        assert not elbo.total.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_replayed_graph_gives_the_curve_of_eager_steps(optimizer, tmp_path):
    config = with_training(SMALL, optimizer=optimizer, steps=20, learning_rate=1e-4)
    eager, graph = Run.create(tmp_path / "eager", config), Run.create(tmp_path / "graph", config)
    assert train(eager, "cuda") is not None
    assert train(graph, "cuda", step="graph") is not None
    tolerance = rounding(config)
    torch.testing.assert_close(curve(graph), curve(eager), rtol=tolerance, atol=0)
    for name, expected in load_file(eager.model_file).items():
        x = load_file(graph.model_file)[name]
        assert (x - expected).norm() <= tolerance * expected.norm(), name


def test_what_the_machine_lacks_is_said_before_anything_is_written(tmp_path, monkeypatch):
    cpu, run = torch.device("cpu"), Run.create(tmp_path / "run", with_training(SMALL, precision="tf32"))
    with pytest.raises(
        ValueError, match=r"^--step graph needs a GPU, got the device cpu; use --step eager or compiled"
    ):
        check_machine("graph", "32-true", cpu)
    with pytest.raises(ValueError, match=r"^--precision tf32 needs an NVIDIA GPU of compute capability 8.0 .* got cpu"):
        train(run, "cpu")
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    files = Run.create(tmp_path / "files", replace(SMALL, data=DataSettings("shapes3d")))
    with pytest.raises(ValueError, match="made on the GPU, not for shapes3d, which is read from its file"):
        train(files, "cpu", step="graph")
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
    check_machine("graph", "tf32", cuda, data="rooms")
    check_machine("compiled", "tf32", cuda, data="shapes3d")


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
    model = untrained_model(SMALL, source)
    batch = SequenceStream(source, 8, 0)[0]

    def elbo(mixed=False):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return model(batch)

    exact, found = elbo(), elbo(mixed=True)
    for p in model.parameters():
        p.data = p.bfloat16().float()
    unit = (elbo().total - exact.total).square().mean().sqrt()
    error = (found.total - exact.total).abs().max()
    assert found.t.dtype == found.total.dtype == torch.float32
    assert unit / 10 < error < 6 * math.sqrt(3) * unit


@pytest.mark.slow
def test_training_in_bfloat16_follows_training_in_float32(tmp_path):
    runs = [
        Run.create(tmp_path / p, with_training(SMALL, precision=p, learning_rate=1e-4))
        for p in ("32-true", "bf16-mixed")
    ]
    assert all(train(run, "cpu") is not None for run in runs)
    float32, bfloat16 = (curve(run)[:, 1] for run in runs)
    assert not torch.equal(bfloat16, float32)
    # Every product has an error of three roundings to 8 bits, and a loss starts with those of the steps before it.
    torch.testing.assert_close(bfloat16, float32, rtol=SMALL.training.steps * 3 * 2**-9, atol=0)
    assert bfloat16[-1] < bfloat16[0]
