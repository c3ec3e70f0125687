"""The command line as a user types it: a whole small run, and every mistake with one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tvae.presets import PRESETS

TINY = "--capsules 2 --steps 3 --evaluation-sequences 8 --importance-samples 2"


def tvae(arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `tvae` with the arguments of a command line."""
    command = [sys.executable, "-W", "error", "-m", "tvae", *arguments.split()]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a finished run, and what training printed."""
    path = tmp_path_factory.mktemp("cli")
    return path, tvae(f"train {TINY}", path)


def test_train_ends_with_a_table_of_metrics_and_the_path_of_the_figure(trained):
    path, result = trained
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for text in ("ELBO", "log p(x), as published", "E_eq", "CapCorr orientation", "chance"):
        assert text in result.stdout
    figure = path / "runs/quickstart/figures/traversals.png"
    assert "capsule traversals: runs/quickstart/figures/traversals.png" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")
    names = {file.name for file in (path / "runs/quickstart").iterdir()}
    assert names == {
        "checkpoint.safetensors",
        "config.json",
        "evaluation.json",
        "figures",
        "metrics.csv",
        "model.safetensors",
        "tensorboard",
    }


def test_evaluate_gives_the_same_figures_again(trained):
    path, _ = trained
    file = path / "runs/quickstart/evaluation.json"
    before = json.loads(file.read_text())
    file.unlink()
    result = tvae("evaluate runs/quickstart", path)
    assert result.returncode == 0, result.stderr
    assert json.loads(file.read_text()) == before
    metrics = {row["metric"]: row for row in before["metrics"]}
    assert metrics["KL z"]["chance"] == 0
    assert metrics["ELBO"]["value"] == pytest.approx(
        metrics["log p(x|t)"]["value"] - metrics["KL z"]["value"] - metrics["KL u"]["value"]
    )


def test_traverse_draws_the_figure_again(trained):
    path, _ = trained
    figure = path / "runs/quickstart/figures/traversals.png"
    figure.unlink()
    result = tvae("traverse runs/quickstart", path)
    assert result.returncode == 0, result.stderr
    assert figure.exists()


def test_options_reach_the_configuration(trained, tmp_path):
    result = tvae(f"train sprites-vae {TINY} --run-dir here --seed 4 --learning-rate 3e-5", tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "here/config.json").read_text())
    assert (config["model"], config["seed"], config["learning_rate"], config["capsules"]) == ("vae", 4, 3e-5, 2)


def test_resuming_a_finished_run_reports_it_again(trained):
    path, _ = trained
    result = tvae("train --resume runs/quickstart", path)
    assert result.returncode == 0, result.stderr
    assert "ELBO" in result.stdout


def test_presets_are_listed(tmp_path):
    result = tvae("presets", tmp_path)
    assert result.returncode == 0
    assert all(name in result.stdout for name in PRESETS)


def test_help_names_every_command(tmp_path):
    for arguments in ("", "--help"):
        result = tvae(arguments, tmp_path)
        assert result.returncode == 0
        assert all(f"tvae {command}" in result.stdout for command in ("train", "evaluate", "traverse", "presets"))
    assert "--learning-rate" in tvae("train mnist-vae --help", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian'; choose from train, evaluate, traverse, presets"),
        ("train no-such", "unknown preset 'no-such'; `tvae presets` lists them"),
        ("train --time-window 16", "a circular time_window of 16 does not fit 15 time steps"),
        ("train --capsule-window 16", "a circular capsule_window of 16 does not fit 15 positions in a capsule"),
        ("train mnist-vae --data-dir nowhere", "nowhere"),
        ("train dsprites-vae --data-dir nowhere", "nowhere"),
        ("train sprites-vae --time-window 5", "a VAE has no topography"),
        ("train sprites-bubblevae-w10-k10 --shift 1", "needs shift 0, got 1"),
        ("train --steps 0", "steps must be at least 1, got 0"),
        ("train --batch-size 1000000", "batch_size must be between 1 and the 50625 examples"),
        ("train --resume nowhere", "nowhere is not a run directory"),
        ("evaluate nowhere", "nowhere is not a run directory"),
        ("traverse nowhere", "nowhere is not a run directory"),
        ("presets please", "takes no arguments"),
    ],
)
def test_a_mistake_gives_one_clear_error_and_leaves_nothing_behind(arguments, message, tmp_path):
    result = tvae(arguments, tmp_path)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_refused(tmp_path):
    result = tvae("train --learning-rat 1", tmp_path)
    assert result.returncode == 2
    assert "--learning-rat" in result.stdout + result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_never_overwritten(trained):
    path, _ = trained
    model = path / "runs/quickstart/model.safetensors"
    before = model.read_bytes()
    result = tvae(f"train {TINY}", path)
    assert result.returncode == 1
    assert "runs/quickstart exists already" in result.stderr
    assert model.read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    script = (
        "import os, signal, sys; from tvae import cli, training; noise = training.seed_noise\n"
        "def press(seed, step):\n"
        "    noise(seed, step)\n"
        "    step == 1 and os.kill(os.getpid(), signal.SIGINT)\n"
        "training.seed_noise = press; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "train", *TINY.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 130
    assert "Continue with: tvae train --resume runs/quickstart" in result.stdout
    resumed = tvae("train --resume runs/quickstart", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/quickstart/model.safetensors").exists()
