"""The house is open: what one file of tests/toys adds is used like what the package has, and no other file knows it."""

import ast
import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tvae
from tvae.cli import main
from tvae.data import SOURCES
from tvae.data import register as register_source
from tvae.evaluation import load as load_rows
from tvae.metrics import METRICS
from tvae.metrics import register as register_metric
from tvae.models import MODELS
from tvae.models import register as register_model
from tvae.paper.exhibits import EXHIBITS
from tvae.presets import PRESETS
from tvae.training import loop

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOYS = ROOT / "tests/toys"
REGISTRIES = {"model": MODELS, "source": SOURCES, "metric": METRICS, "exhibit": EXHIBITS, "preset": PRESETS}
ADDED = {
    "toy_model": {"model": ["slow"], "preset": ["sprites-slow"]},
    "toy_source": {"source": ["dots"], "preset": ["dots-tvae"]},
    "toy_metric": {"metric": ["change-a-frame"]},
    "toy_exhibit": {"exhibit": ["small-moves"], "preset": ["small-rolls", "small-stays"]},
}
PUBLIC = {"cli", "config", "data", "metrics", "models", "presets"}
FEW = "--evaluation-sequences 8 --importance-samples 2 --batch-size 4"


@pytest.fixture(autouse=True)
def closed(monkeypatch, tmp_path):
    """Forget after a test what its toys have added, and start it in an empty folder."""
    before = [dict(registry) for registry in REGISTRIES.values()]
    monkeypatch.chdir(tmp_path)
    yield
    forget(before)


def forget(before):
    for registry, entries in zip(REGISTRIES.values(), before, strict=True):
        registry.clear()
        registry.update(entries)


def python(toy, arguments):
    """Do what `python tests/toys/TOY.py ARGUMENTS` does, in this process, which then forgets it; the exit status."""
    before = [dict(registry) for registry in REGISTRIES.values()]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{toy}.py", *arguments.split()])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(TOYS / f"{toy}.py"), run_name="__main__")
    finally:
        forget(before)
    return end.value.code


def imported(toy):
    """Import a toy as the user's scripts do, anew in every test."""
    sys.modules.pop(toy, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOYS)
        return importlib.import_module(toy)


def interrupt_in(step, monkeypatch):
    """Press Ctrl-C as a step of training starts."""
    seed_noise = loop.seed_noise

    def press(seed, current):
        seed_noise(seed, current)
        if current == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "seed_noise", press)


def labels(path):
    return [row.label for row in load_rows(Path(path) / "evaluation.json")]


# --- what a toy is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", ADDED)
def test_a_toy_imports_public_names_and_adds_what_it_is_about(toy):
    tree = ast.parse((TOYS / f"{toy}.py").read_text())
    places = {node.module: node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    public = PUBLIC | {"paper.exhibits"} if toy == "toy_exhibit" else PUBLIC
    for name, node in places.items():
        assert node.level == 0
        if name.split(".")[0] in ("tvae", "tvae_kernels"):
            assert name in {"tvae", "tvae_kernels", *(f"tvae.{part}" for part in public)}
            module = importlib.import_module(name)
            for alias in node.names:
                assert not alias.name.startswith("_")
                assert alias.name in getattr(module, "__all__", dir(module))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert set(modules) <= {"sys", "torch", "torch.nn.functional"}
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert [name for name in attributes if name.startswith("_") and name not in ("_replace", "__init__")] == []

    before = {kind: set(registry) for kind, registry in REGISTRIES.items()}
    imported(toy)
    added = {kind: sorted(set(registry) - before[kind]) for kind, registry in REGISTRIES.items()}
    assert {kind: names for kind, names in added.items() if names} == ADDED[toy]


def test_no_file_of_the_package_knows_a_toy():
    names = {*ADDED, "toys", "CalmVAE", "CalmSettings", "Dots"}
    names |= {name for added in ADDED.values() for entries in added.values() for name in entries}
    for file in (ROOT / "tvae").rglob("*.py"):
        tree = ast.parse(file.read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        words |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        assert not words & names, file


def test_imports_go_up_the_map_in_contributing():
    """A file of the package imports what stands above it there, or in its own line."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## What to add where")[2]
    lines = re.findall(r"^    (tvae/\S+(?:, \S+\.py)*)  ", text, re.MULTILINE)
    parts = [[re.sub(r"tvae/|\.py|/", "", name) for name in line.split(", ")] for line in lines]
    level = {name: number for number, names in enumerate(parts) for name in names}
    package = {file.stem for file in (ROOT / "tvae").glob("*.py")} - {"__init__", "__main__"}
    assert set(level) == package | {file.parent.name for file in (ROOT / "tvae").glob("*/__init__.py")}
    for file in (ROOT / "tvae").rglob("*.py"):
        place = file.relative_to(ROOT / "tvae").with_suffix("").parts
        if place[0] not in level:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(place):
                for name in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                    assert level[name] <= level[place[0]], (file, name)


@pytest.mark.parametrize(
    ("toy", "register", "registry", "name"),
    [
        ("toy_model", register_model, MODELS, "slow"),
        ("toy_source", register_source, SOURCES, "dots"),
        ("toy_metric", register_metric, METRICS, "change-a-frame"),
    ],
)
def test_a_name_is_given_once(toy, register, registry, name):
    imported(toy)
    assert register(registry[name]) is registry[name]  # the same again is no other
    with pytest.raises(ValueError, match=f"there is a .* {name!r} already"):
        register(type("Other", (registry[name],), {"name": name, "key": name}))


def test_the_file_is_the_command_line_with_what_it_adds(tmp_path):
    command = [sys.executable, "-W", "error", str(TOYS / "toy_model.py"), "train", "sprites-slow", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "--beta FLOAT Nats that a squared change of capsules by one costs. (default: 2.0)" in text
    assert f"{', '.join(MODELS)}, slow; default: slow" in text


# --- a model ----------------------------------------------------------------------------------------------------------


def test_a_model_is_trained_evaluated_saved_loaded_and_drawn(capsys):
    assert python("toy_model", f"train sprites-slow --steps 3 --capsules 2 --beta 0.25 {FEW}") == 0
    run = Path("runs/sprites-slow")
    assert json.loads((run / "config.json").read_text())["model"] == {
        "name": "slow",
        "capsules": 2,
        "capsule_dim": 15,
        "likelihood": "bernoulli",
        "weights": "free",
        "beta": 0.25,
    }
    printed = capsys.readouterr().out
    for label in ("ELBO", "KL z", "penalty", "E_eq", "CapCorr x"):
        assert label in printed
        assert label in labels(run)
    assert (run / "figures/traversals.png").read_bytes().startswith(b"\x89PNG")
    assert "penalty" in (run / "metrics.csv").read_text().partition("\n")[0].split(",")
    rows = {row.label: row for row in load_rows(run / "evaluation.json")}
    assert rows["ELBO"].value == pytest.approx(rows["log p(x|t)"].value - rows["KL z"].value)
    assert rows["penalty"].value > rows["penalty"].chance == 0
    before = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    assert python("toy_model", f"evaluate {run}") == 0
    assert (run / "evaluation.json").read_bytes() == before
    (run / "figures/traversals.png").unlink()
    assert python("toy_model", f"traverse {run}") == 0
    assert (run / "figures/traversals.png").exists()

    for command in (f"evaluate {run}", f"traverse {run}", f"train --resume {run}"):  # by a file that does not know it
        capsys.readouterr()
        assert python("toy_metric", command) == 1
        assert capsys.readouterr().err == (
            f"tvae: error: cannot read {run}/config.json: no model 'slow' is registered, only {', '.join(MODELS)}; "
            "import the file that defines it\n"
        )
    with pytest.raises(ValueError, match=r"no model 'slow' is registered, .*; import the file that defines it"):
        tvae.load(run / "model.safetensors")
    toy = imported("toy_model")
    model = toy.CalmVAE.load(run / "model.safetensors")
    assert type(model) is type(tvae.load(run / "model.safetensors")) is toy.CalmVAE
    assert model.settings == toy.CalmSettings(2, 15, beta=0.25)
    del MODELS["slow"]  # which the class itself can do without
    again = toy.CalmVAE.load(run / "model.safetensors")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_the_objective_of_a_model_is_what_it_is_trained_on():
    for beta in (0, 1000):
        arguments = f"--run-dir {beta} --steps 40 --capsules 2 --learning-rate 3e-3 --beta {beta} {FEW}"
        assert python("toy_model", f"train sprites-slow {arguments}") == 0
    model = imported("toy_model").CalmVAE
    batch = SOURCES["sprites"]().sequences(torch.arange(4), torch.zeros(4, 5, dtype=torch.int64), torch.full((4,), 3))
    changes = [model.load(f"{beta}/model.safetensors").encode(batch).diff(dim=1).square().sum() for beta in (0, 1000)]
    assert changes[1] < changes[0] / 100


def test_an_interrupted_run_of_a_model_goes_on_to_the_same_result(monkeypatch, capsys):
    train = f"train sprites-slow --steps 4 --capsules 2 {FEW} --run-dir"
    assert python("toy_model", f"{train} whole") == 0
    with monkeypatch.context() as patch:
        interrupt_in(1, patch)
        assert python("toy_model", f"{train} parts") == 130
    assert "Continue with: tvae train --resume parts" in capsys.readouterr().out
    assert not Path("parts/model.safetensors").exists()
    steps = []
    seed_noise = loop.seed_noise
    monkeypatch.setattr(loop, "seed_noise", lambda seed, step: steps.append(step) or seed_noise(seed, step))
    assert python("toy_model", "train --resume parts") == 0
    assert steps == [2, 3]
    whole, parts = (load_file(f"{path}/model.safetensors") for path in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
    for file in ("metrics.csv", "evaluation.json", "config.json"):
        assert Path("whole", file).read_bytes() == Path("parts", file).read_bytes()


# --- a source ---------------------------------------------------------------------------------------------------------


def test_a_source_without_factors_and_labels_is_trained_on_evaluated_and_drawn(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_in(1, patch)
        assert python("toy_source", f"train dots-tvae --steps 3 {FEW}") == 130
    assert python("toy_source", "train --resume runs/dots-tvae") == 0
    run = Path("runs/dots-tvae")
    assert "8 test sequences after 3 steps" in " ".join(capsys.readouterr().out.split())
    assert "E_eq" in labels(run)  # capsules roll, and sequences have 8 frames
    assert not [label for label in labels(run) if label.startswith("CapCorr")]  # but no factor is known
    assert (run / "figures/traversals.png").exists()
    assert tvae.load(run / "model.safetensors").image_shape == (3, 6, 8)
    before = (run / "evaluation.json").read_bytes()
    assert python("toy_source", f"evaluate {run}") == 0
    assert (run / "evaluation.json").read_bytes() == before
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 1
    assert capsys.readouterr().err == (
        f"tvae: error: cannot read {run}/config.json: data: no data 'dots' is registered, only "
        "sprites, sprites-shifts, dsprites, mnist, fashion-mnist, kmnist, mnist-rotation-hue, mnist-perspective-hue, "
        "mnist-still, mnist-open, mnist-open-seen, mnist-open-unseen, mnist-posed, mnist-posed-shift, "
        "mnist-posed-scale, mnist-turning, rooms, shapes3d; "
        "import the file that defines it, or give the path of your own sequences\n"
    )


def test_a_source_serves_the_models_that_it_fits(capsys):
    assert python("toy_source", f"train sprites-vae --data dots --steps 2 --capsules 2 --capsule-dim 8 {FEW}") == 0
    assert json.loads(Path("runs/sprites-vae/config.json").read_text())["data"]["name"] == "dots"
    capsys.readouterr()
    assert python("toy_source", "train sprites-tvae-w15-k1 --data dots --run-dir wide") == 2
    assert "a circular time_window of 15 does not fit 8 time steps" in capsys.readouterr().err
    assert not Path("wide").exists()


# --- a metric ---------------------------------------------------------------------------------------------------------


def test_a_metric_is_printed_and_written_where_it_applies(capsys):
    small = f"--steps 2 --capsules 2 {FEW}"
    assert python("toy_metric", f"train sprites-vae {small}") == 0
    assert "change a frame" in capsys.readouterr().out
    (row,) = [row for row in load_rows(Path("runs/sprites-vae/evaluation.json")) if row.key == "change-a-frame"]
    assert row.value == pytest.approx(row.chance, rel=0.1)  # t of an untrained VAE is the noise of its posterior
    assert (row.part, row.chance, row.digits) == (None, 2.0, 3)
    before = Path("runs/sprites-vae/evaluation.json").read_bytes()
    assert python("toy_metric", "evaluate runs/sprites-vae") == 0
    assert Path("runs/sprites-vae/evaluation.json").read_bytes() == before
    assert main(["evaluate", "runs/sprites-vae"]) == 0  # without the file everything else is the same
    everything = json.loads(before)["metrics"]
    assert json.loads(Path("runs/sprites-vae/evaluation.json").read_text())["metrics"] == [
        row for row in everything if row["key"] != "change-a-frame"
    ]
    capsys.readouterr()
    assert python("toy_metric", f"train sprites-tvae-w5-k1 {small}") == 0
    assert "change a frame" not in capsys.readouterr().out


# --- all together -----------------------------------------------------------------------------------------------------


def test_a_model_a_source_and_a_metric_that_do_not_know_each_other_work_together(capsys):
    for toy in ("toy_model", "toy_source", "toy_metric"):
        imported(toy)
    assert main(f"train dots-tvae --model slow --beta 3 --steps 2 {FEW}".split()) == 0
    printed = capsys.readouterr().out
    for label in ("penalty", "change a frame", "E_eq"):
        assert label in printed
    values = json.loads(Path("runs/dots-tvae/config.json").read_text())
    assert (values["data"]["name"], values["model"]["name"], values["model"]["beta"]) == ("dots", "slow", 3)
    assert values["model"]["capsules"] == 4  # of the preset
    assert main(["presets"]) == 0
    assert {"sprites-slow", "dots-tvae"} <= set(capsys.readouterr().out.split())


def test_an_exhibit_is_reproduced(capsys):
    arguments = "reproduce small-moves --budget small --jobs 1 --runs runs --output out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvae.paper.runs.SMALL_STEPS", 2)
        patch.setattr("tvae.paper.runs.SMALL_SEQUENCES", 8)
        assert python("toy_exhibit", arguments) == 0
    assert {file.suffix for file in Path("out").glob("small-moves.*")} == {".md", ".csv", ".json", ".png"}
    text = Path("out/small-moves.md").read_text()
    assert "How far small capsules move (reduced budget: 2 of 1,400 training steps)" in text
    assert "| E_eq | small rolls | " in text
    assert "|  | small stays | " in text
    assert "out/small-moves.md" in capsys.readouterr().out
