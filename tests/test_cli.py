"""The command line as a user types it: a whole small run, and every mistake with one clear error.

Commands run in this process, which gives what a new one gives: `test_it_is_a_program` starts one.
"""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from acting import room_for
from filelock import FileLock
from rich.console import Console

from tvae import cli, config, evaluation, presets, progress
from tvae.data.sprites import SpriteSequences
from tvae.metrics import Row
from tvae.models import MODELS, BetaVAE, FactorVAE, FlowVAE, PoFlow, SlowVAE, load
from tvae.paper.exhibits import EXHIBITS, Exhibit
from tvae.presets import PRESETS
from tvae.training import Run, loop

pytestmark = pytest.mark.slow  # mark what is not `quick`

ROOT = Path(__file__).parent.parent
TINY = "--capsules 2 --steps 3 --evaluation-sequences 8 --importance-samples 2"
COMMANDS = ("train", "evaluate", "traverse", "play", "reproduce", "presets")


def tvae(arguments):
    """Return the exit status of `tvae ARGUMENTS`."""
    try:
        return cli.main(shlex.split(arguments))
    except SystemExit as end:  # help ends so
        return end.code or 0


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the command is given: an empty folder that is home, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(progress, "SOON", 1e6)  # whatever the machine's speed
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with a finished run."""
    path = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert tvae(f"train quickstart {TINY}") == 0
    return path


@pytest.fixture
def trained(finished, folder, capsys):
    """The same, copied to where the command is given: runs/quickstart."""
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


def error(capsys):
    """Return the one line of an error, without what all of them begin with."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tvae: error: ")
    return line.removeprefix("tvae: error: ")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_it_is_a_program(folder):
    """In a process of its own, its output in a file, and every warning an error."""
    command = [sys.executable, "-W", "error", "-m", "tvae", "train", "quickstart", *TINY.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("log").open("w") as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    printed = Path("log").read_text()
    assert "\x1b" not in printed  # colours and bars are for terminals
    assert max(map(len, printed.splitlines())) <= 80
    for text in ("ELBO", "log p(x), as published", "E_eq", "CapCorr orientation", "chance"):
        assert text in printed
    assert "capsule traversals: runs/quickstart/figures/traversals.png" in printed.splitlines()
    assert Path("runs/quickstart/figures/traversals.png").read_bytes().startswith(b"\x89PNG")


def test_train_ends_with_a_table_of_metrics_and_the_path_of_the_figure(capsys):
    assert tvae(f"train quickstart {TINY}") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for text in ("ELBO", "log p(x), as published", "E_eq", "CapCorr orientation", "chance"):
        assert text in captured.out
    assert "runs/quickstart: 8 test sequences after 3 steps" in captured.out
    assert "capsule traversals: runs/quickstart/figures/traversals.png" in captured.out.splitlines()
    run = Path("runs/quickstart")
    assert (run / "figures/traversals.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in run.iterdir() if not file.name.endswith("lock")} == {
        "checkpoint.safetensors",
        "config.json",
        "evaluation.json",
        "figures",
        "metrics.csv",
        "model.safetensors",
        "tensorboard",
        "validation.csv",
    }


def test_evaluate_gives_the_same_figures_again(trained, capsys):
    file = trained / "runs/quickstart/evaluation.json"
    before = json.loads(file.read_text())
    file.unlink()
    assert tvae("evaluate runs/quickstart") == 0
    assert json.loads(file.read_text()) == before
    assert "ELBO" in capsys.readouterr().out
    metrics = {(row["key"], row["part"]): row for row in before["metrics"]}
    assert metrics["elbo", "kl_z"]["chance"] == 0
    assert metrics["elbo", None]["value"] == pytest.approx(
        metrics["elbo", "log_likelihood"]["value"] - metrics["elbo", "kl_z"]["value"] - metrics["elbo", "kl_u"]["value"]
    )


def test_an_evaluation_by_other_settings_is_printed_alone(trained, capsys):
    file = trained / "runs/quickstart/evaluation.json"
    before = file.read_bytes()
    assert tvae("evaluate runs/quickstart --sequences 16 --importance-samples 3") == 0
    printed = capsys.readouterr().out
    assert "16 test sequences" in printed
    assert "3 samples" in printed
    assert file.read_bytes() == before
    assert tvae("evaluate runs/quickstart --sequences 0") == 2
    assert "sequences: input should be greater than or equal to 1, got 0" in capsys.readouterr().err


def test_an_evaluation_for_programs_is_what_the_file_holds(trained, capsys):
    assert tvae("evaluate runs/quickstart --json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((trained / "runs/quickstart/evaluation.json").read_text())


def test_a_logger_that_is_missing_is_said_before_a_run_is_made(monkeypatch, capsys):
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert tvae(f"train quickstart {TINY} --logger wandb --run-dir run") == 2
    assert error(capsys) == "--logger wandb needs the package wandb: pip install wandb"
    assert not Path("run").exists()


def test_traverse_draws_the_figure_again(trained):
    figure = trained / "runs/quickstart/figures/traversals.png"
    figure.unlink()
    assert tvae("traverse runs/quickstart") == 0
    assert figure.exists()


def test_options_reach_the_configuration():
    assert tvae(f"train sprites-vae {TINY} --run-dir here --seed 4 --learning-rate 3e-5") == 0
    config = json.loads(Path("here/config.json").read_text())
    assert config["model"] == {
        "name": "vae",
        "capsules": 2,
        "capsule_dim": 15,
        "likelihood": "bernoulli",
        "weights": "free",
    }
    assert (config["training"]["seed"], config["training"]["learning_rate"]) == (4, 3e-5)
    assert config["evaluation"] == {"sequences": 8, "importance_samples": 2}


def test_resuming_a_finished_run_reports_it_again(trained, capsys):
    assert tvae("train --resume runs/quickstart") == 0
    assert "ELBO" in capsys.readouterr().out


def test_an_existing_run_is_never_overwritten(trained, capsys):
    model = trained / "runs/quickstart/model.safetensors"
    before = model.read_bytes()
    assert tvae(f"train quickstart {TINY}") == 1
    assert "runs/quickstart exists already" in error(capsys)
    assert model.read_bytes() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_save_and_say_how_to_resume(number, status, monkeypatch, capsys):
    seed_noise = loop.seed_noise

    def press(seed, step):
        seed_noise(seed, step)
        if step == 1:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "seed_noise", press)
        assert tvae(f"train quickstart {TINY}") == status
    assert "Continue with: tvae train --resume runs/quickstart" in capsys.readouterr().out
    assert not Path("runs/quickstart/model.safetensors").exists()
    for command in ("evaluate", "traverse"):
        assert tvae(f"{command} runs/quickstart") == 1
        assert "holds no trained model yet: finish it with `tvae train --resume" in error(capsys)
    assert tvae("train --resume runs/quickstart") == 0
    assert Path("runs/quickstart/model.safetensors").exists()


def test_ctrl_c_outside_of_training_is_one_line(monkeypatch, capsys):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Presets, "run", press)
    assert tvae("presets") == 130
    assert capsys.readouterr().err == "tvae: interrupted\n"


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_path_is_printed_as_it_is(capsys):
    """Brackets are no markup, of which `[/x]` would be an error."""
    assert tvae(f"train sprites-vae {TINY} --run-dir 'runs/x[seed0][/x]'") == 0
    printed = capsys.readouterr().out
    assert "runs/x[seed0][/x]: 8 test sequences" in printed
    assert "capsule traversals: runs/x[seed0][/x]/figures/traversals.png" in printed.splitlines()
    assert tvae("evaluate 'runs/x[seed0][/x]'") == 0
    assert "runs/x[seed0][/x]: 8 test sequences" in capsys.readouterr().out
    assert tvae(f"train sprites-vae {TINY} --run-dir 'runs/x[seed0][/x]'") == 1
    assert "runs/x[seed0][/x] exists already" in error(capsys)


def test_a_path_of_an_interrupted_run_is_printed_as_it_is(monkeypatch, capsys):
    monkeypatch.setattr(loop, "seed_noise", lambda seed, step: signal.raise_signal(signal.SIGINT))
    assert tvae(f"train sprites-vae {TINY} --run-dir '[red]x[/x]'") == 130
    assert "Continue with: tvae train --resume [red]x[/x]" in capsys.readouterr().out


def test_home_is_expanded_where_the_shell_does_not(folder, mnist_dir, capsys):
    home = folder / "home"
    shutil.copytree(mnist_dir, home / "files")
    assert tvae(f"train mnist-vae {TINY} --evaluation-sequences 64 --data-dir=~/files --run-dir=~/x") == 0
    assert json.loads((home / "x/config.json").read_text())["data"]["folder"] == str(home / "files")
    for words in ("train --resume=~/x", "evaluate ~/x --data-dir=~/files", "traverse ~/x"):
        assert tvae(words) == 0
    assert not (folder / "~").exists()


# --- lists and help ---------------------------------------------------------------------------------------------------


def test_presets_and_targets_are_listed_whole_on_100_columns(monkeypatch, capsys):
    monkeypatch.setattr(cli, "console", Console(width=100))
    assert tvae("presets") == 0
    words = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(PRESETS) <= set(words)
    assert words["mnist-tvae-w5-k3"].split()[1:] == ["TVAE,", "L=5/36,", "K=3", "table1,", "fig8,", "covariance"]
    assert tvae("reproduce") == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} >= set(EXHIBITS)


def test_version(capsys):
    assert tvae("--version") == 0
    python = ".".join(map(str, sys.version_info[:3]))
    assert capsys.readouterr().out == (
        f"tvae-kernels {version('tvae-kernels')}, torch {torch.__version__}, Python {python}\n"
    )


@pytest.mark.parametrize("arguments", ["", "--help", "-h", "help"])
def test_help_names_every_command(arguments, capsys):
    assert tvae(arguments) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"• {command} " in text
    for line in ("`tvae COMMAND --help` lists", "`tvae train PRESET --help` lists", "--tyro-print-completion bash"):
        assert line in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command, capsys):
    assert tvae(f"help {command}") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: tvae {command} [-h]")
    assert tvae(f"{command} --help") == 0
    assert capsys.readouterr().out == text


OPTIONS = {
    "vae": {"--capsules", "--capsule-dim", "--likelihood", "--weights"},
    "tvae": {"--mu-init", "--window", "--told-axis", "--time-window", "--capsule-window", "--shift", "--roots"},
}
OPTIONS["bubblevae"] = OPTIONS["tvae"]
COMMON = {"--run-dir", "--model", "--data", "--evaluation-data", "--data-dir", "--learning-rate", "--steps", "--seed"}
COMMON |= {
    "--optimizer",
    "--momentum",
    "--batch-size",
    "--precision",
    "--device",
    "--step",
    "--logger",
    "--warmup-steps",
    "--decay-from",
}
COMMON |= {"--evaluation-sequences", "--importance-samples", "--help"}


def options(text):
    return set(re.findall(r"(?<=[ ,])--[a-z][a-z-]+", text)) - {"--no-told-axis"}


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("quickstart", "tvae"),
        ("sprites-vae", "vae"),
        ("sprites-bubblevae-w10-k10", "bubblevae"),
        ("quickstart --model vae", "vae"),
        ("sprites-vae --model=tvae", "tvae"),
    ],
)
def test_help_lists_the_options_of_the_presets_model_alone(words, model, capsys):
    assert tvae(f"train {words} --help") == 0
    text = capsys.readouterr().out
    found = options(text)
    assert found >= COMMON | OPTIONS["vae"] | OPTIONS[model]
    if model == "vae":
        assert found == COMMON | OPTIONS["vae"]
    assert f"{', '.join(MODELS)}; default: {model}" in " ".join(text.replace("│", " ").split())


def test_help_and_mistakes_are_printed_where_only_ascii_is(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for command in COMMANDS:
        assert tvae(f"{command} --help") == 0
    assert tvae("train sprites-vae --learning-rat 1") == 2
    assert tvae("presets") == 0
    assert "--learning-rate FLOAT" in out.buffer.getvalue().decode("ascii")
    (line,) = err.buffer.getvalue().decode("ascii").splitlines()
    assert line == (
        "tvae: error: unrecognized options: --learning-rat, 1; Perhaps you meant: --learning-rate FLOAT Step size, for "
        "the ELBO in nats a frame. (default: 0.0001) in tvae train --help"
    )


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_mistake_on_a_terminal_is_one_line_too(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", err)
    assert tvae("train quickstart --steps x") == 2
    assert err.getvalue() == (
        "tvae: error: --steps: invalid literal for int() with base 10: 'x'; Argument helptext: --steps "
        "INT Batches to train on. (default: 1400)\n"
    )


def test_completion_of_the_shell(capsys):
    assert tvae("--tyro-print-completion bash") == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--run-dir", "--learning-rate"):
        assert word in script


def test_another_model_keeps_the_presets_settings_that_it_has():
    assert tvae(f"train sprites-tvae-w5-k1-normalised --model vae {TINY}") == 0
    model = load("runs/sprites-tvae-w5-k1-normalised/model.safetensors")
    assert type(model) is MODELS["vae"]
    assert model.settings == MODELS["vae"].Settings(2, 15, weights="normalised")
    assert tvae(f"train sprites-vae --model tvae --time-window 5 --mu-init 10 {TINY}") == 0
    model = load("runs/sprites-vae/model.safetensors")
    assert type(model) is MODELS["tvae"]
    assert (model.settings.neighborhood.time_window, model.settings.mu_init) == (5, 10)


@pytest.mark.parametrize(
    ("settings", "model", "expected"),
    [
        (BetaVAE.Settings(2, 3, beta=8), "slowvae", SlowVAE.Settings(2, 3)),
        (
            FactorVAE.Settings(2, 3, gamma=30, weights="projected"),
            "slowvae",
            SlowVAE.Settings(2, 3, weights="projected"),
        ),
        (FactorVAE.Settings(2, weights="projected"), "poflow", PoFlow.Settings(2, weights="projected")),
        (
            FlowVAE.Settings(2, 3, transformations=4, gamma=2.0),
            "poflow",
            PoFlow.Settings(2, 3, transformations=4, gamma=2.0),
        ),
        (SlowVAE.Settings(2, 3, gamma=5.0), "slowvae", SlowVAE.Settings(2, 3, gamma=5.0)),
    ],
)
def test_settings_that_go_by_one_name_but_mean_other_things_are_left_behind(settings, model, expected):
    assert cli._converted(settings, MODELS[model].Settings) == expected


# --- reproduce --------------------------------------------------------------------------------------------------------


def test_reproduce_writes_a_table_and_a_figure_and_fills_a_page(mnist_dir, folder, monkeypatch, capsys):
    home = folder / "home"
    home.mkdir()
    page = home / "page.md"
    page.write_text("<!-- reproduce: fig1 -->\n<!-- end -->\n")
    name = "mnist-rotation-hue-tvae-w13-k3"
    config = PRESETS[name].config
    small = replace(config, evaluation=replace(config.evaluation, sequences=16, importance_samples=2))
    monkeypatch.setitem(presets.PRESETS, name, replace(PRESETS[name], config=small))
    arguments = "--page=~/page.md --output=~/out --runs=~/runs"
    assert tvae(f"reproduce fig1 --budget 2 --jobs 1 --data-dir {mnist_dir} {arguments}") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "E_eq" in captured.out
    files = [f"fig1.{ending}" for ending in ("md", "csv", "json", "png")]
    assert captured.out.splitlines()[-1].split() == [str(home / "out" / file) for file in files]
    assert {file.name for file in (home / "out").iterdir()} == set(files)
    assert (home / "runs" / name / "2-steps/seed-0/model.safetensors").exists()
    assert "![Fig. 1: a capsule traversal" in page.read_text()
    assert "](out/fig1.png)" in page.read_text()
    assert "(reduced budget: 2 of 600,000 training steps)" in page.read_text()
    assert {file.name for file in folder.iterdir()} == {"home"}


def test_the_page_of_the_reproduction_has_blocks_for_targets_alone_and_shows_the_committed_tables():
    page = (ROOT / "docs/reproduction.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- reproduce: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    assert set(blocks) <= set(EXHIBITS)
    for name, text in blocks.items():
        table = ROOT / f"results/reproduction/{name}.md"
        assert text.endswith(f"{table.read_text(encoding='utf-8')}\n") if table.exists() else text == ""


# --- mistakes ---------------------------------------------------------------------------------------------------------


WRONG_WORDS = [
    (
        "trian",
        "unknown command 'trian', did you mean train?; choose from train, evaluate, traverse, play, reproduce, presets",
    ),
    ("xyz", "unknown command 'xyz'; choose from train, evaluate, traverse, play, reproduce, presets"),
    ("help trian", "unknown command 'trian', did you mean train?"),
    ("--verson", "unrecognized options: --verson"),
    ("train no-such", "unknown preset 'no-such'; `tvae presets` lists them"),
    ("train quikstart", "unknown preset 'quikstart', did you mean quickstart?; `tvae presets` lists them"),
    ("train mnist-vea", "did you mean mnist-vae?"),
    ("train --steps 3 sprites-vae", "write the preset before the options: tvae train sprites-vae ..."),
    ("train quickstart sprites-vae", "unrecognized options: sprites-vae"),
    ("train --learning-rat 1", "unrecognized options: --learning-rat, 1; Perhaps you meant: --learning-rate FLOAT"),
    ("train sprites-vae --time-window 5", "unrecognized options: --time-window, 5"),
    ("train quickstart --model vae --time-window 5", "unrecognized options: --time-window, 5"),
    ("train --model tave", "unknown model 'tave', did you mean tvae?; choose from tvae, bubblevae, vae,"),
    ("train --model", "unknown model ''; choose from tvae, bubblevae, vae,"),
    ("train --resume", "missing value for argument '--resume'"),
    ("evaluate", "missing from tvae evaluate: RUN Directory of the run. (required)"),
    ("evaluate a b", "unrecognized options: b"),
    ("presets please", "unrecognized options: please"),
    ("reproduce table9", "unknown target 'table9', did you mean table5?; choose from table1, table2"),
    ("reproduce xyz", "unknown target 'xyz'; choose from table1, table2"),
]
WRONG_VALUES = [
    ("train --time-window 16", "a circular time_window of 16 does not fit 15 time steps"),
    ("train --capsule-window 16", "a circular capsule_window of 16 does not fit 15 positions in a capsule"),
    ("train sprites-bubblevae-w10-k10 --shift 1", "needs shift 0, got 1"),
    ("train --steps 0", "steps: input should be greater than or equal to 1, got 0"),
    ("train --steps three", "--steps: invalid literal for int() with base 10: 'three'"),
    (
        "train sprites-vae --model tvae",
        "a window of a single u² cannot start from mu_init 30, for |u| is often",
    ),
    ("train --time-window 1 --capsule-window 1", "cannot start from mu_init 30"),
    ("train --capsules 100000000000", "there can be no such model"),
    ("train --capsules 1000000", "GiB that the device has: take fewer --capsules, or a smaller --capsule-dim"),
    ("train --seed 9007199254740992", "seed: input should be less than 9007199254740992"),
    ("train --seed -1", "seed: input should be greater than or equal to 0, got -1"),
    ("train --learning-rate nan", "learning_rate: input should be a finite number, got nan"),
    ("train quickstart --batch-size 1000000", "batch_size must be between 1 and the 50625 examples"),
    ("train --data sprits", "no data 'sprits' is registered, only sprites, sprites-shifts"),
    (
        "train mnist-vae --evaluation-data sprites",
        "a model of mnist images, (3, 28, 28), cannot be evaluated on sprites",
    ),
    ("train --device gpu", "invalid choice 'gpu' for argument '--device'. Expected one of ('auto', 'cpu', 'cuda')."),
    ("train --step graph --device cpu", "--step graph needs a GPU, got the device cpu"),
    (
        "train --data shapes3d --step graph --device cpu",
        "--step graph is for data that is made on the GPU, not for shapes3d, which is read from its file",
    ),
    ("train --precision tf32 --device cpu", "--precision tf32 needs an NVIDIA GPU of compute capability 8.0"),
    ("reproduce table2 --budget 0", "--budget must be small, full, a fraction"),
    ("reproduce table2 --seeds 0", "--seeds must be at least 1, got 0"),
    ("reproduce table2 --jobs 0", "--jobs must be at least 1, got 0"),
    (
        "reproduce table2 --page nowhere.md",
        "nowhere.md has no block for the result: the lines <!-- reproduce: table2 --> and <!-- end -->",
    ),
]
MISSING_FILES = [
    ("train mnist-vae --data-dir nowhere", "nowhere/MNIST/raw"),
    ("train dsprites-vae --data-dir nowhere", "nowhere; pass --data-dir with the folder that holds it"),
    ("train --data shapes3d --data-dir nowhere", "nowhere; pass --data-dir with the folder that holds 3dshapes.h5"),
    ("train --resume nowhere", "nowhere is not a run directory"),
    ("evaluate nowhere", "nowhere is not a run directory"),
    ("traverse nowhere", "nowhere is not a run directory"),
    ("reproduce table1 --data-dir nowhere", "nowhere/MNIST/raw"),
    ("reproduce table2 --data dsprites --data-dir nowhere", "nowhere; pass --data-dir with the folder that holds it"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        *((*mistake, 2) for mistake in WRONG_WORDS),
        *((*mistake, 2) for mistake in WRONG_VALUES),
        *((*mistake, 1) for mistake in MISSING_FILES),
    ],
)
def test_a_mistake_gives_one_clear_error_and_leaves_nothing_behind(arguments, message, status, folder, capsys):
    assert tvae(arguments) == status
    assert message in error(capsys)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing_is_a_wrong_value(folder, capsys):
    assert tvae("train --device cuda") == 2
    assert "--device cuda was asked for, but PyTorch finds no such device" in error(capsys)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "traverse", "train --resume"])
def test_a_damaged_run_is_no_fault_of_the_words(command, trained, capsys):
    (trained / "runs/quickstart/config.json").write_text("{}")
    assert tvae(f"{command} runs/quickstart") == 1
    assert "runs/quickstart/config.json" in error(capsys)


def test_torchrun_is_for_training_alone(monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, str(value))
    assert tvae("presets") == 2
    assert error(capsys) == "torchrun is for `tvae train` alone; run `tvae presets` without it"


def test_without_a_word_more_shapes_are_learnt():
    command = cli._parsed(["train"])
    assert (command.preset, command.config) == ("shapes-tvae", PRESETS["shapes-tvae"].config)
    assert command.run_dir == Path("runs/shapes-tvae")


# --- what may go wrong with a run -------------------------------------------------------------------------------------


@pytest.fixture
def too_bright(monkeypatch):
    """Sprites in 0 ... 255."""
    render = SpriteSequences.render
    monkeypatch.setattr(SpriteSequences, "render", lambda *arguments: 255 * render(*arguments))


def test_images_that_the_likelihood_is_not_one_of_are_refused_before_anything_is_made(too_bright, folder, capsys):
    assert tvae(f"train sprites-vae {TINY}") == 2
    assert error(capsys) == 'likelihood "bernoulli" needs images in [0, 1], got 0 to 255'
    assert list(folder.iterdir()) == []


SPRITES = "--data sprites --runs runs --output out"


def test_images_that_the_likelihood_is_not_one_of_are_neither_evaluated_nor_trained_on(trained, too_bright, capsys):
    for words in (
        "evaluate runs/quickstart",
        "train --resume runs/quickstart",
        f"reproduce table2 --budget 2 --jobs 1 {SPRITES}",
    ):
        assert tvae(words) == 1
        assert "needs images in [0, 1], got 0 to 255\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_metrics_that_are_not_finite_do_not_end_well(value, trained, monkeypatch, capsys):
    rows = [Row("elbo", None, "ELBO", value, -1.0, "nats/frame"), Row("capcorr", "x", "CapCorr x", math.nan, 0.0)]
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: rows)
    for words in ("evaluate runs/quickstart", "train --resume runs/quickstart"):
        assert tvae(words) == 1
        captured = capsys.readouterr()
        assert "ELBO" in captured.out
        (line,) = captured.err.splitlines()
        assert line.startswith("tvae: error: ELBO is not finite; the last good state is in runs/quickstart/checkpoint")


def test_likelihoods_of_a_reproduction_that_are_not_finite_do_not_end_well(monkeypatch, capsys):
    rows = [Row("log_likelihood", "published", "log p(x), as published", math.nan, -1.0, "nats/frame")]
    monkeypatch.setattr(evaluation, "evaluate", lambda *arguments: rows)
    monkeypatch.setitem(EXHIBITS, "one", Exhibit("One model", {"sprites-vae": {}}))
    assert tvae(f"reproduce one --budget 2 --jobs 1 {SPRITES}") == 1
    assert capsys.readouterr().err == "tvae: error: log p(x) is not finite of sprites-vae, which has diverged\n"
    assert {file.name for file in Path("out").iterdir()} == {"one.md", "one.csv", "one.json"}


def test_an_empty_folder_is_used(folder):
    (folder / "here").mkdir()
    assert tvae(f"train sprites-vae {TINY} --run-dir here") == 0
    assert (folder / "here/model.safetensors").exists()


@pytest.mark.parametrize("name", ["here", "here/file"])
def test_a_folder_that_holds_something_and_a_file_are_in_the_way(name, folder, capsys):
    (folder / "here").mkdir()
    (folder / "here/file").write_text("something")
    assert tvae(f"train sprites-vae {TINY} --run-dir {name}") == 1
    assert f"{name} exists already" in error(capsys)
    assert [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))] == ["here", "here/file"]


def test_memory_that_ends_is_one_line(monkeypatch, capsys):
    for failure in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nC++")):

        def fail(*_, failure=failure):
            raise failure

        monkeypatch.setattr(cli.Presets, "run", fail)
        assert tvae("presets") == 1
        assert error(capsys).startswith("out of memory (")


# --- going on ---------------------------------------------------------------------------------------------------------


def steps_of(run):
    return [row.split(",")[0] for row in Path(run, "metrics.csv").read_text().splitlines()[1:]]


def interrupt(arguments):
    """Give a command and press Ctrl-C in its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "seed_noise", lambda seed, step: signal.raise_signal(signal.SIGINT))
        assert tvae(arguments) == 130


def test_until_more_steps_are_done_the_model_of_fewer_is_not_the_runs(trained, capsys):
    assert tvae("train --resume runs/quickstart --steps 2") == 1
    assert "runs/quickstart has done 3 steps already, more than the 2 asked for" in error(capsys)
    assert json.loads(Path("runs/quickstart/config.json").read_text())["training"]["steps"] == 3
    interrupt("train --resume runs/quickstart --steps 5")
    assert tvae("evaluate runs/quickstart") == 1
    assert "holds no trained model yet: finish it" in capsys.readouterr().err
    assert not Path("runs/quickstart/evaluation.json").exists()


def test_a_finished_run_is_trained_longer_to_the_result_of_a_longer_one(trained):
    assert tvae("train --resume runs/quickstart --steps 5") == 0
    assert tvae(f"train quickstart {TINY.replace('--steps 3', '--steps 5')} --run-dir whole") == 0
    for name in ("model.safetensors", "evaluation.json", "config.json"):
        assert Path("runs/quickstart", name).read_bytes() == Path("whole", name).read_bytes()
    assert steps_of("runs/quickstart") == ["3", "5"]


def test_data_that_has_moved_is_found_and_remembered(mnist_dir, folder, capsys):
    first, second = folder / "first", folder / "second"
    shutil.copytree(mnist_dir, first)
    assert tvae(f"train mnist-vae {TINY} --data-dir first --run-dir run") == 0
    first.rename(second)
    for command in ("evaluate run", "traverse run", "train --resume run"):
        capsys.readouterr()
        assert tvae(command) == 1
        assert "--data-dir" in capsys.readouterr().err
        assert tvae(f"{command} --data-dir second") == 0
    assert json.loads(Path("run/config.json").read_text())["data"]["folder"] == str(second)
    assert tvae("train --resume run") == 0


def test_a_learning_rate_that_was_changed_in_the_configuration_is_honoured(monkeypatch):
    rates, build = [], loop.build_step

    def note(kind, precision, fabric, model, optimizer, stream):
        rates.append(optimizer.param_groups[0]["lr"])
        return build(kind, precision, fabric, model, optimizer, stream)

    monkeypatch.setattr(loop, "build_step", note)
    interrupt(f"train quickstart {TINY} --run-dir run")
    file = Path("run/config.json")
    file.write_text(file.read_text().replace('"learning_rate": 0.0005', '"learning_rate": 0.00025'))
    assert tvae("train --resume run") == 0
    assert rates == [0.0005, 0.00025]


# --- what cannot be written -------------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_written_are_printed(trained, capsys):
    file = trained / "runs/quickstart/evaluation.json"
    before = file.read_bytes()
    with room_for(10):
        assert tvae("evaluate runs/quickstart") == 0
    captured = capsys.readouterr()
    assert "ELBO" in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("tvae: warning: the metrics are not written: ")
    assert "evaluation.json" in line
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.partial"))


def test_metrics_of_a_run_that_another_process_works_on_are_printed(trained, capsys):
    before = (trained / "runs/quickstart/evaluation.json").read_bytes()
    with FileLock(trained / "runs/quickstart/lock"):
        assert tvae("evaluate runs/quickstart") == 0
    captured = capsys.readouterr()
    assert "ELBO" in captured.out
    assert captured.err.startswith("tvae: warning: the metrics are not written: another process is at work in runs/")
    assert (trained / "runs/quickstart/evaluation.json").read_bytes() == before


def test_a_picture_that_cannot_be_written_leaves_the_old_one_and_is_named(trained, capsys):
    figure = trained / "runs/quickstart/figures/traversals.png"
    before = figure.read_bytes()
    with room_for(100):
        assert tvae("traverse runs/quickstart") == 1
    assert "File too large: 'runs/quickstart/figures/traversals.png'" in error(capsys)
    assert figure.read_bytes() == before
    assert [file.name for file in figure.parent.iterdir()] == ["traversals.png"]


def hold(path, word):
    """Keep others out of a run from one word to the next."""
    with Run.open(path).lock():
        word.send("held")
        word.recv()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of what no thread here has to do with
def test_two_processes_on_one_run(trained, capsys):
    """The second is refused in one line, whatever it wants to write; it waits for nothing but the first one's word."""
    files = {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    context = get_context("fork")
    word, of_first = context.Pipe()
    first = context.Process(target=hold, args=(Path("runs/quickstart"), of_first), daemon=True)
    first.start()
    of_first.close()  # so that its end would be seen
    assert word.recv() == "held"
    for words in ("train --resume runs/quickstart", "train --resume runs/quickstart --steps 5"):
        assert tvae(words) == 1
        assert error(capsys) == "another process is at work in runs/quickstart; wait for it or stop it"
    assert {file: file.read_bytes() for file in files} == files
    word.send("let go")
    first.join()
    assert first.exitcode == 0
    assert tvae("train --resume runs/quickstart --steps 4") == 0
    assert steps_of("runs/quickstart") == ["3", "4"]
