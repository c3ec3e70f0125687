"""The runs behind an exhibit: plans, and what of them is done again. Interrupting them is in test_kills.py."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from filelock import FileLock

from tvae.data import DataError
from tvae.paper import runs
from tvae.paper.exhibits import EXHIBITS
from tvae.presets import PRESETS
from tvae.training import Run, RunError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def presets():
    patch = tiny.presets()
    yield
    patch.undo()


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "name", "steps", "sequences"),
    [
        ("full", "600000-steps", 600_000, 1000),
        ("1", "600000-steps", 600_000, 1000),
        ("0.01", "6000-steps", 6000, 1000),
        ("1e-9", "1-steps", 1, 1000),
        ("6000", "6000-steps", 6000, 1000),
        ("small", "small", 100, 200),
    ],
)
def test_budgets(budget, name, steps, sequences):
    config = PRESETS["mnist-vae"].config
    training, evaluation = replace(config.training, steps=steps), replace(config.evaluation, sequences=sequences)
    assert runs.budgeted(config, budget) == (name, replace(config, training=training, evaluation=evaluation))


@pytest.mark.parametrize("budget", ["0", "-3", "1.5", "2.5", "nan", "inf", "much"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"--budget must be small, full, a fraction .*; got '{budget}'"):
        runs.budgeted(PRESETS["mnist-vae"].config, budget)


def test_a_plan_has_all_models_for_each_seed_and_needs_their_data(tmp_path, mnist_dir):
    models = EXHIBITS["fig4"].models
    jobs = runs.plan(models, 2, "small", mnist_dir, tmp_path)
    assert [(job.preset, job.config.training.seed) for job in jobs] == [
        (name, seed) for seed in (0, 1) for name in models
    ]
    assert jobs[3].path == tmp_path / "mnist-tvae-w13-k3" / "small" / "seed-1"
    assert [job.config.data.folder for job in jobs] == [None, mnist_dir, None, mnist_dir]
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="nowhere"):
        runs.plan(models, 1, "small", Path("nowhere"), tmp_path)
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        runs.plan(models, 0, "small", mnist_dir, tmp_path)


def test_runs_with_other_settings_are_refused_by_name(tmp_path):
    (job, _) = tiny.plan(tmp_path)
    training = replace(job.config.training, learning_rate=0.5)
    Run.create(job.path, replace(job.config, training=training))
    with pytest.raises(RunError, match=r"was made with {'learning_rate': 0.5}, not {'learning_rate': 0.0001}"):
        tiny.plan(tmp_path)


def test_runs_of_another_model_are_refused_by_name(tmp_path):
    job, other = tiny.plan(tmp_path)
    Run.create(job.path, other.config)
    with pytest.raises(RunError, match=r"was made with {'model': 'vae'}, not {'model': 'tvae', 'neighborhood': "):
        tiny.plan(tmp_path)


def test_runs_whose_data_has_moved_are_the_same_runs(tmp_path, mnist_dir):
    for folder in (mnist_dir, mnist_dir / ".." / mnist_dir.name):
        (job,) = runs.plan(["mnist-vae"], 1, "2", folder, tmp_path)
        if not job.path.exists():
            Run.create(job.path, job.config)
    assert job.config.data.folder != Run.open(job.path).config.data.folder


# --- what is done, and what is not done again -------------------------------------------------------------------------


def test_a_run_leaves_the_model_and_both_evaluations(tmp_path):
    results, _ = tiny.reproduce(tmp_path, seeds=1)
    (job, _) = tiny.plan(tmp_path / "runs")
    assert job.finished
    assert Run(job.path, job.config).load_model().settings == tiny.MODELS["sprites-tvae-w4-k3"]
    trained, untrained = (json.loads(file.read_text()) for file in (job.path / "evaluation.json", job.untrained_file))
    assert trained["sequences"] == untrained["sequences"] == 48
    assert trained["metrics"] != untrained["metrics"]
    line = next(line for line in results.lines if line.preset == job.preset and line.key == "equivariance_error")
    for file, values in ((trained, line.ours), (untrained, line.untrained)):
        assert [row["value"] for row in file["metrics"] if row["key"] == "equivariance_error"] == list(values)


def test_what_is_finished_is_skipped(tmp_path, monkeypatch):
    _, first = tiny.reproduce(tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    monkeypatch.setattr(runs, "carry_out", None)  # may not be called
    assert tiny.reproduce(tmp_path)[1] == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*") if file.is_file()} == files


def test_evaluation_alone_is_done_again_where_it_is_missing(tmp_path, monkeypatch):
    _, first = tiny.reproduce(tmp_path)
    for missing in ("evaluation.json", "untrained.json"):
        (file,) = (tmp_path / "runs/sprites-vae").rglob(missing)
        file.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(runs, "train", None)
            assert tiny.reproduce(tmp_path)[1] == first


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    (job, _) = tiny.plan(tmp_path)
    Run.create(job.path, job.config)
    with FileLock(job.path / "lock"), pytest.raises(RunError, match=r"another process is at work in .*seed-0"):
        runs.carry_out(job, CPU)


@pytest.mark.parametrize("columns", [1, 12, 400])
@pytest.mark.parametrize("cut", ["", "1", "10000", "10000,1.2"])
def test_the_last_logged_step_is_read_from_the_end_of_the_log(columns, cut, tmp_path):
    job = runs.Job("", tmp_path, tiny.CONFIG)
    assert runs._steps_done(job) == 0
    values = ",16.830497741699219" * columns
    rows = "".join(f"{25 * i}{values}\n" for i in range(1, 400))
    (tmp_path / "metrics.csv").write_text(f"step{',reconstruction' * columns}\n{rows}{cut}")
    assert runs._steps_done(job) == 25 * 399
