"""The command line as a user types it: a whole small run, and every mistake with one clear error."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tvae.paper import EXHIBITS
from tvae.presets import PRESETS

pytestmark = pytest.mark.slow  # mark what is not `quick`

ROOT = Path(__file__).parent.parent
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


def test_presets_and_targets_are_listed_whole_on_100_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = tvae("presets", tmp_path)
    assert result.returncode == 0
    words = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert set(PRESETS) <= set(words)
    assert words["mnist-tvae-w5-k3"].split()[1:] == ["TVAE,", "L=5/36,", "K=3", "table1,", "fig8,", "covariance"]
    result = tvae("reproduce", tmp_path)
    assert {line.split()[0] for line in result.stdout.splitlines()[1:]} >= set(EXHIBITS)


def test_reproduce_writes_a_table_and_a_figure_and_fills_a_page(mnist_dir, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- reproduce: fig1 -->\n<!-- end -->\n")
    script = (
        "import sys; from dataclasses import replace; from tvae import cli, presets\n"
        "name = 'mnist-rotation-hue-tvae-w13-k3'; preset = presets.PRESETS[name]\n"
        "config = replace(preset.config, evaluation_sequences=16, importance_samples=2, batch_size=8)\n"
        "presets.PRESETS[name] = replace(preset, config=config); sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = f"reproduce fig1 --budget 2 --jobs 1 --data-dir {mnist_dir} --page page.md --output out"
    command = [sys.executable, "-W", "error", "-c", script, *arguments.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"fig1.md", "fig1.csv", "fig1.json", "fig1.png"}
    assert (tmp_path / "runs/reproduce/mnist-rotation-hue-tvae-w13-k3/2-steps/seed-0/model.safetensors").exists()
    assert "![Fig. 1: a capsule traversal" in page.read_text()
    assert "](out/fig1.png)" in page.read_text()
    assert "(reduced budget: 2 of 600,000 training steps)" in page.read_text()


def test_the_page_of_the_reproduction_has_blocks_for_targets_alone_and_shows_the_committed_tables():
    page = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- reproduce: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    assert set(blocks) <= set(EXHIBITS)
    for name, text in blocks.items():
        table = ROOT / f"results/reproduction/{name}.md"
        assert text.endswith(f"{table.read_text(encoding='utf-8')}\n") if table.exists() else text == ""


def test_help_names_every_command(tmp_path):
    for arguments in ("", "--help"):
        result = tvae(arguments, tmp_path)
        assert result.returncode == 0
        for command in ("train", "evaluate", "traverse", "reproduce", "presets"):
            assert f"tvae {command}" in result.stdout
    assert "--learning-rate" in tvae("train mnist-vae --help", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "unknown command 'trian'; choose from train, evaluate, traverse, reproduce, presets"),
        ("train no-such", "unknown preset 'no-such'; `tvae presets` lists them"),
        ("train --time-window 16", "a circular time_window of 16 does not fit 15 time steps"),
        ("train --capsule-window 16", "a circular capsule_window of 16 does not fit 15 positions in a capsule"),
        ("train mnist-vae --data-dir nowhere", "nowhere"),
        ("train dsprites-vae --data-dir nowhere", "nowhere"),
        ("train sprites-vae --time-window 5", "a VAE has no topography"),
        ("train sprites-bubblevae-w10-k10 --shift 1", "needs shift 0, got 1"),
        ("train --steps 0", "steps must be at least 1, got 0"),
        ("train --batch-size 1000000", "batch_size must be between 1 and the 50625 examples"),
        ("train --step graph --device cpu", "--step graph needs a GPU, got the device cpu"),
        ("train --precision tf32 --device cpu", "--precision tf32 needs an NVIDIA GPU of compute capability 8.0"),
        ("train --resume nowhere", "nowhere is not a run directory"),
        ("evaluate nowhere", "nowhere is not a run directory"),
        ("traverse nowhere", "nowhere is not a run directory"),
        ("presets please", "takes no arguments"),
        ("train mnist-vae --evaluation-data sprites", "a model of mnist images cannot be evaluated on sprites"),
        ("reproduce table9", "unknown target 'table9'; choose from table1, table2"),
        ("reproduce table1 --data-dir nowhere", "nowhere"),
        ("reproduce table2 --data dsprites --data-dir nowhere", "nowhere"),
        ("reproduce table2 --budget 0", "--budget must be small, full, a fraction"),
        ("reproduce table2 --seeds 0", "--seeds must be at least 1, got 0"),
        (
            "reproduce table2 --page nowhere.md",
            "nowhere.md has no block for the result: the lines <!-- reproduce: table2",
        ),
        ("reproduce table2 --jobs 0", "--jobs must be at least 1, got 0"),
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


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_and_sigterm_save_and_say_how_to_resume(name, status, tmp_path):
    script = (
        "import os, signal, sys; from tvae import cli, training; noise = training.seed_noise\n"
        "def press(seed, step):\n"
        "    noise(seed, step)\n"
        f"    step == 1 and os.kill(os.getpid(), signal.{name})\n"
        "training.seed_noise = press; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "train", *TINY.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == status
    assert "Continue with: tvae train --resume runs/quickstart" in result.stdout
    resumed = tvae("train --resume runs/quickstart", tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "runs/quickstart/model.safetensors").exists()
