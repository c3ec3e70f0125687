"""Training: a loop written out here, interruption and resumption bit for bit, and what ends it."""

import csv
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from acting import Acting, interrupted_at, often, with_model, with_training
from lightning_fabric.loggers.logger import Logger
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tvae.config
from tvae.config import Config, DataSettings, Sources, TrainingSettings
from tvae.data import EVALUATION_SEED, FixedSequences, SequenceStream
from tvae.metrics import equivariance_error
from tvae.models import TVAE
from tvae.training import Run, RunError, build_optimizer, build_step, loop, train, untrained_model
from tvae.training.loop import seed_noise
from tvae.training.processes import find_device, launch
from tvae_kernels import Neighborhood

SMALL = Config(
    DataSettings(),
    TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 3)),
    TrainingSettings(batch_size=2, steps=12, learning_rate=1e-3, seed=3),
)
AXES = replace(
    with_training(SMALL, learning_rate=1e-4),
    data=DataSettings("sprites-shifts"),
    model=TVAE.Settings(capsules=2, neighborhood=Neighborhood(4, 2, axes=(3, 5), roots="each axis"), told_axis=True),
)


@pytest.fixture(autouse=True)
def _log_often():
    with often():
        yield


def saved_step(run):
    with safe_open(run.checkpoint, "pt") as file:
        return int(file.metadata()["step"])


def rows(run):
    with run.metrics.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", [SMALL, AXES], ids=["one axis", "axis known, of two"])
def test_training_is_stochastic_gradient_descent_on_the_negative_elbo(config, tmp_path):
    run, settings = Run.create(tmp_path / "run", config), config.training
    trained = train(run, "cpu")
    source = config.open_source("train")
    torch.manual_seed(settings.seed)
    model = config.build_model(source.image_shape)
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    stream = SequenceStream(source, 2, settings.seed)
    for step in range(settings.steps):
        seed_noise(settings.seed, step)
        batch = stream[step]
        elbo = model(batch)
        if config is AXES:
            assert torch.equal(elbo.axis, batch.transformation - 3)  # factor 3 is x, 4 is y
        loss = -elbo.total.mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                velocity[name] = settings.momentum * velocity[name] + gradient
                p -= settings.learning_rate * velocity[name]
    found = run.load_model().state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected)
        assert torch.equal(trained.state_dict()[name], found[name])


def test_metrics_are_logged_with_the_values_of_the_batch(tmp_path):
    half = with_training(with_model(SMALL, neighborhood=replace(SMALL.model.neighborhood, shift=0.5)), steps=4)
    run = Run.create(tmp_path / "run", half)
    assert train(run, "cpu") is not None
    found = rows(run)
    assert [row["step"] for row in found] == ["2", "4"]
    for row, elbo in zip(found, elbos(half)[1::2], strict=True):
        assert float(row["loss"]) == pytest.approx(-elbo.total.mean().item())
        expected = equivariance_error(elbo.t, half.model.neighborhood).mean().item()
        assert float(row["equivariance_error"]) == pytest.approx(expected)
        for name, term in elbo.terms.items():
            assert float(row[name]) == pytest.approx(term.mean().item())
        total = float(row["log_likelihood"]) - float(row["kl_z"]) - float(row["kl_u"])
        assert -float(row["loss"]) == pytest.approx(total)
    assert list((run.path / "tensorboard").glob("events.*"))


def test_validation_is_of_fixed_sequences_that_no_step_sees(tmp_path, monkeypatch):
    """At every checkpoint, by the weights that it has."""
    run = Run.create(tmp_path / "run", SMALL)
    calls, opened, open_source = [], [], Config.open_source

    def note(config, split, *arguments):
        opened.append(split)
        return open_source(config, split, *arguments)

    monkeypatch.setattr(Config, "open_source", note)
    model = train(run, "cpu", callback=lambda step, values, model: calls.append((step, values, model.training)))
    with run.validation.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["step"] for row in found] == ["5", "10", "12"]
    sequences = FixedSequences.take(SMALL.open_source("validation"), 16, SMALL.training.batch_size)
    terms, weights = {}, []
    torch.manual_seed(EVALUATION_SEED)  # whatever the seed of the run
    for batch in sequences.batches:
        values = loop.measure(model.eval()(batch), model.rolls)
        weights.append(len(batch.images))
        for name, value in values.items():
            terms.setdefault(name, []).append(value)
    assert list(found[-1]) == ["step", *terms]
    for name, values in terms.items():
        assert float(found[-1][name]) == pytest.approx(np.average(values, weights=weights), rel=1e-6)
    assert opened == ["train", "validation", "validation"]  # the last one here
    assert [step for step, _, _ in calls] == [2, 4, 6, 8, 10, 12]
    assert all(training for *_, training in calls)
    for (_, values, _), row in zip(calls, rows(run), strict=True):
        assert {name: float(x) for name, x in row.items() if name != "step"} == pytest.approx(values)


def test_few_sequences_for_validation_are_taken_as_they_are(tmp_path):
    """Of a split that has fewer than a batch."""
    sources, run = Sources(SMALL), Run.create(tmp_path / "run", SMALL)
    few = sources["validation"]
    few.__class__ = type("Few", (type(few),), {"__len__": lambda source: 1})
    assert train(run, "cpu", sources=sources) is not None
    assert run.validation.read_bytes().count(b"\n") == 4


@pytest.mark.slow
def test_what_is_shown_in_a_browser(tmp_path):
    """Numbers of both parts, and what the model makes of a sequence of every transformation."""
    run = Run.create(tmp_path / "run", SMALL)
    train(run, "cpu")
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {"train/loss", "train/kl_z", "validation/loss", "validation/kl_u"} <= set(events.Tags()["scalars"])
    for part, file in (("train", run.metrics), ("validation", run.validation)):
        with file.open(newline="") as log:
            expected = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(log)}
        shown = {event.step: event.value for event in events.Scalars(f"{part}/loss")}
        assert shown == pytest.approx(expected)
    assert set(events.Tags()["images"]) == {"scale", "orientation", "x", "y"}
    (*_, last) = events.Images("x")
    assert (last.step, last.width, last.height) == (12, 15 * 64, 3 * 64)


class Noted(Logger):
    """A logger of one's own."""

    name, version = "noted", 0

    def __init__(self):
        self.values = []

    def log_metrics(self, metrics, step=None):
        self.values.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


@pytest.mark.parametrize("logger", ["none", Noted()], ids=["none", "own"])
def test_other_loggers(logger, tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    train(run, "cpu", logger=logger)
    assert not (run.path / "tensorboard").exists()
    assert [row["step"] for row in rows(run)] == ["2", "4", "6", "8", "10", "12"]
    if logger != "none":
        steps = [step for step, _ in logger.values]
        assert steps == [2, 4, 5, 6, 8, 10, 10, 12, 12]
        assert {name.split("/")[0] for _, values in logger.values for name in values} == {"train", "validation"}
        assert logger.values[-2][1]["train/loss"] == float(rows(run)[-1]["loss"])


def test_loggers_that_there_are_not_are_named(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", SMALL)
    with pytest.raises(ValueError, match=r"^logger must be one of tensorboard, wandb, none, .*; got 'visdom'"):
        train(run, "cpu", logger="visdom")
    monkeypatch.setattr(tvae.config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--logger wandb needs the package wandb: pip install wandb"):
        train(run, "cpu", logger="wandb")
    assert not run.checkpoint.exists()


def test_the_learning_rate_grows_at_first_and_falls_along_a_cosine():
    settings = TrainingSettings(warmup_steps=3, decay_from=0.5, steps=12)
    found = [settings.rate_factor(step) for step in range(12)]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1] + [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(1, 6)]
    assert found == pytest.approx(expected, rel=1e-15)
    assert [TrainingSettings(steps=12).rate_factor(step) for step in (0, 5, 11)] == [1, 1, 1]
    assert TrainingSettings(decay_from=0, steps=2).rate_factor(1) == pytest.approx(0.5)
    for wrong in ({"warmup_steps": -1}, {"decay_from": 1.5}, {"decay_from": -0.1}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: input should be"):
            TrainingSettings(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "graph"])
def test_every_step_has_its_learning_rate(kind, tmp_path, monkeypatch):
    """For a graph in a tensor that keeps its place, where the graph reads it."""
    config, rates, places, build = with_training(SMALL, warmup_steps=4, decay_from=0.5), [], set(), loop.build_step

    def note(wanted, precision, fabric, model, optimizer, stream):
        step = build("eager", precision, fabric, model, optimizer, stream)

        def noted(i):
            (group,) = optimizer.param_groups
            rates.append(float(group["lr"]))
            places.add(id(group["lr"]) if isinstance(group["lr"], torch.Tensor) else None)
            return step(i)

        return noted

    monkeypatch.setattr(loop, "build_step", note)
    monkeypatch.setattr(loop, "check_run", lambda *arguments: None)
    run = Run.create(tmp_path / "run", config)
    assert train(run, "cpu", step=kind, sources=interrupted_at(config, 6)) is None
    assert train(run, "cpu", step=kind) is not None
    expected = [config.training.learning_rate * config.training.rate_factor(step) for step in range(12)]
    assert rates == pytest.approx(expected, rel=1e-7)
    assert len(set(rates)) > 8
    assert places == {None} if kind == "eager" else len(places) == 2 and None not in places


def elbos(config):
    """What the steps of a training return, taken one by one."""
    fabric, settings, source = launch(find_device("cpu")), config.training, config.open_source("train")
    model = untrained_model(config, source)
    model, optimizer = fabric.setup(model, build_optimizer(settings, model))
    stream = SequenceStream(source, settings.batch_size, settings.seed)
    step, found = build_step("eager", settings.precision, fabric, model, optimizer, stream), []
    for i in range(settings.steps):
        seed_noise(settings.seed, i)
        found.append(step(i))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(optimizer, tmp_path):
    config = with_training(SMALL, optimizer=optimizer)
    whole = Run.create(tmp_path / "whole", config)
    assert train(whole, "cpu") is not None

    parts = Run.create(tmp_path / "parts", config)
    before = signal.getsignal(signal.SIGINT)
    assert train(parts, "cpu", sources=interrupted_at(config, 6)) is None
    assert signal.getsignal(signal.SIGINT) is before
    assert saved_step(parts) == 7  # that step is finished, and no other begun
    assert [row["step"] for row in rows(parts)] == ["2", "4", "6"]
    assert not parts.model_file.exists()
    with pytest.raises(RunError, match="no trained model yet: finish it with `tvae train --resume"):
        parts.load_model()
    assert train(Run.open(parts.path), "cpu") is not None
    assert_equal_runs(parts, whole)


def assert_equal_runs(run, whole):
    state = load_file(run.checkpoint)
    for name, expected in load_file(whole.checkpoint).items():
        assert torch.equal(state[name], expected), name
    assert run.model_file.read_bytes() == whole.model_file.read_bytes()
    assert run.metrics.read_text() == whole.metrics.read_text()
    assert run.validation.read_text() == whole.validation.read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of `SMALL` that nothing disturbs."""
    run = Run.create(tmp_path_factory.mktemp("whole") / "run", SMALL)
    with often():
        assert train(run, "cpu") is not None
    return run


def test_a_killed_run_resumes_from_its_last_checkpoint_and_forgets_later_metrics(whole, tmp_path):
    def die(images):
        raise SystemExit

    killed = Run.create(tmp_path / "killed", SMALL)
    with pytest.raises(SystemExit):
        train(killed, "cpu", sources=Acting(SMALL, {9: die}))
    assert saved_step(killed) == 5
    assert [row["step"] for row in rows(killed)] == ["2", "4", "6", "8"]
    assert train(killed, "cpu") is not None  # from step 5: the rows of steps 6 and 8 are written again, once
    assert_equal_runs(killed, whole)


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_the_state_and_exits_with_143(times, whole, tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_status:
        train(run, "cpu", sources=interrupted_at(SMALL, 6, signal.SIGTERM, times))
    assert exit_status.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved_step(run) == 7
    assert len(rows(run)) == 3
    assert train(run, "cpu") is not None
    assert_equal_runs(run, whole)


def test_the_second_ctrl_c_ends_training_at_once(whole, tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests are a shell's job
    try:
        with pytest.raises(KeyboardInterrupt):
            train(run, "cpu", sources=interrupted_at(SMALL, 6, times=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved_step(run) == 5
    assert len(rows(run)) == 3
    assert train(run, "cpu") is not None
    assert_equal_runs(run, whole)


def test_an_interruption_in_the_last_step_is_heeded(whole, tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    assert train(run, "cpu", sources=interrupted_at(SMALL, SMALL.training.steps - 1)) is None
    assert not run.model_file.exists()
    assert train(run, "cpu") is not None
    assert_equal_runs(run, whole)


@pytest.mark.slow
def test_projected_weights_have_norm_one_after_training_and_normalised_ones_resume(tmp_path):
    run = Run.create(tmp_path / "projected", with_training(with_model(SMALL, weights="projected"), steps=3))
    assert train(run, "cpu") is not None
    for name, weight in load_file(run.model_file).items():
        if name.endswith("weight"):
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))

    config = with_model(SMALL, weights="normalised")
    whole, parts = Run.create(tmp_path / "whole", config), Run.create(tmp_path / "parts", config)
    assert train(whole, "cpu") is not None
    assert train(parts, "cpu", sources=interrupted_at(config, 6)) is None
    assert train(parts, "cpu") is not None
    assert parts.model_file.read_bytes() == whole.model_file.read_bytes()
    assert "z_encoder.0.parametrizations.weight.original0" in load_file(whole.model_file)


def test_another_seed_gives_another_model(tmp_path):
    first, second = (train(Run.create(tmp_path / str(seed), config), "cpu") for seed, config in seeded(0, 1))
    assert not torch.equal(first.decoder[0].weight, second.decoder[0].weight)


def seeded(*seeds):
    return [(seed, with_training(SMALL, seed=seed, steps=2)) for seed in seeds]


def test_sequences_that_are_open_are_not_opened_again(tmp_path, monkeypatch):
    sources = Sources(SMALL)
    source, _ = sources["train"], sources["validation"]
    monkeypatch.setattr(Config, "open_source", None)  # may not be called
    assert train(Run.create(tmp_path / "run", with_training(SMALL, steps=2)), "cpu", sources=sources) is not None
    assert sources["train"] is source


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_state(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    spoilt = Acting(SMALL, {7: lambda images: images * float("nan")})
    with pytest.raises(
        RunError, match=r"the loss is nan in step 8; the last good state is in .*checkpoint.safetensors"
    ):
        train(run, "cpu", sources=spoilt)
    state = load_file(run.checkpoint)
    assert all(torch.isfinite(x).all() for x in state.values())
    assert not run.model_file.exists()
    assert len(rows(run)) == 3
