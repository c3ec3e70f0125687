"""`tvae reproduce`: plans, interruption at any moment, the tables and figures that come out."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console

from tvae import evaluation, presets, reproduction, training
from tvae.data import DataError
from tvae.evaluation import Row
from tvae.paper import BOUND, EXHIBITS, LOG_LIKELIHOOD, Exhibit, shown_in
from tvae.presets import DEFAULT_PRESET, PRESETS, Config, Preset, describe
from tvae.run import Run, RunError
from tvae_kernels import Neighborhood

pytestmark = pytest.mark.slow  # mark what is not `quick`

PRINTED = {LOG_LIKELIHOOD: (-186.8, 0.1), "E_eq": (574, 2)}
TINY = {
    "sprites-tvae-w4-k3": Config(capsules=2, neighborhood=Neighborhood(4, 3)),
    "sprites-vae": Config(capsules=2, model="vae"),
}
TINY = {name: replace(x, batch_size=2, evaluation_sequences=48, importance_samples=2) for name, x in TINY.items()}
EXHIBIT = Exhibit("Table 0: tiny models on dSprites", {name: {} for name in TINY})


@pytest.fixture
def tiny(monkeypatch):
    """Presets that train in a moment."""
    presets = {name: Preset(replace(config, steps=40), describe(config)) for name, config in TINY.items()}
    monkeypatch.setattr(reproduction, "PRESETS", presets)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 10)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like that of a worker: sums round alike
    yield presets
    torch.set_num_threads(threads)


def reproduce(folder, budget="full", seeds=1, workers=1):
    """Everything but the printing; the table as text, or None when interrupted."""
    jobs = reproduction.plan(EXHIBIT, seeds, budget, None, folder / "runs")
    if not reproduction.carry_out_all(jobs, "cpu", workers, Console(quiet=True)):
        return None
    results = reproduction.collect(EXHIBIT, jobs)
    return [file.read_text() for file in reproduction.write(results, "table0", folder / "out")]


# The paper


def test_every_exhibit_has_presets_and_every_preset_is_exhibited():
    for exhibit in EXHIBITS.values():
        assert set(exhibit.models) <= set(PRESETS)
        assert set(exhibit.with_data("dsprites").models) <= set(PRESETS)
    # The paper proposes more topographies than it shows.
    proposed = set(presets._topographies()) - {"mnist-still-tvae-torus"}
    assert {name for name in PRESETS if not shown_in(name)} == {DEFAULT_PRESET} | proposed


def test_printed_numbers_agree_with_what_is_known_of_them():
    for name in ("table1", "table3", "table4"):
        for preset, printed in EXHIBITS[name].models.items():
            assert -220 < printed[LOG_LIKELIHOOD][0] < -180
            # the VAE is at chance: 13,268, and topography of any kind below
            assert (printed["E_eq"][0] > 13_200) == (PRESETS[preset].config.model == "vae")
    for name in ("table2", "table5"):
        for preset, printed in EXHIBITS[name].models.items():
            capcorr = [value for metric, (value, _) in printed.items() if metric.startswith("CapCorr")]
            assert len(capcorr) == 4
            config = PRESETS[preset].config
            if config.model == "tvae" and config.neighborhood.time_window >= 10:
                assert capcorr == [1.0] * 4


def test_the_published_rows_have_the_windows_of_the_paper():
    windows = [PRESETS[name].config.neighborhood for name in EXHIBITS["table1"].models]
    assert [(n.time_window, n.capsule_window, n.shift) for n in windows] == [
        (18, 3, 1),
        (5, 3, 1),
        (1, 9, 1),
        (5, 3, 0),
        (1, 1, 1),
    ]
    assert {PRESETS[name].config.weights for name in EXHIBITS["table1"].models} == {"free"}
    assert [PRESETS[name].config.weights for name in EXHIBITS["table3"].models] == [
        "projected",
        "normalised",
        "projected",
        "normalised",
        "free",
    ]
    assert PRESETS["mnist-tvae-w13-k3-generalisation"].config.evaluation_data == "mnist-rotation-hue"


# Plans


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
    expected = replace(config, steps=steps, evaluation_sequences=sequences)
    assert reproduction.budgeted(config, budget) == (name, expected)


@pytest.mark.parametrize("budget", ["0", "-3", "1.5", "2.5", "nan", "inf", "much"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=f"--budget must be small, full, a fraction .*; got '{budget}'"):
        reproduction.budgeted(PRESETS["mnist-vae"].config, budget)


def test_a_plan_has_all_models_for_each_seed_and_needs_their_data(tmp_path, mnist_dir):
    exhibit = EXHIBITS["fig4"]
    jobs = reproduction.plan(exhibit, 2, "small", mnist_dir, tmp_path)
    assert [(job.preset, job.config.seed) for job in jobs] == [
        (name, seed) for seed in (0, 1) for name in exhibit.models
    ]
    assert jobs[3].path == tmp_path / "mnist-tvae-w13-k3" / "small" / "seed-1"
    assert [job.config.data_dir for job in jobs] == [None, mnist_dir, None, mnist_dir]
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="nowhere"):
        reproduction.plan(exhibit, 1, "small", Path("nowhere"), tmp_path)
    with pytest.raises(ValueError, match="--seeds must be at least 1, got 0"):
        reproduction.plan(exhibit, 0, "small", mnist_dir, tmp_path)


def test_runs_with_other_settings_are_refused_by_name(tiny, tmp_path):
    (job, _) = reproduction.plan(EXHIBIT, 1, "full", None, tmp_path)
    Run.create(job.path, replace(job.config, learning_rate=0.5))
    with pytest.raises(RunError, match=r"was made with {'learning_rate': 0.5}, not {'learning_rate': 0.0001}"):
        reproduction.plan(EXHIBIT, 1, "full", None, tmp_path)


# Interruption


def test_what_is_finished_is_skipped(tiny, tmp_path, monkeypatch):
    first = reproduce(tmp_path, budget="2")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    monkeypatch.setattr(reproduction, "carry_out", None)  # may not be called
    assert reproduce(tmp_path, budget="2") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*") if file.is_file()} == files


def test_evaluation_alone_is_done_again_where_it_is_missing(tiny, tmp_path, monkeypatch):
    first = reproduce(tmp_path, budget="2")
    for missing in ("evaluation.json", "untrained.json"):
        (file,) = (tmp_path / "runs/sprites-vae").rglob(missing)
        file.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(reproduction, "train", None)
            assert reproduce(tmp_path, budget="2") == first


def test_a_killed_and_repeated_command_gives_the_same_table_and_loses_one_checkpoint_interval(
    tiny, tmp_path, monkeypatch
):
    script = (
        "import os, signal, sys, torch; from pathlib import Path; from tvae import training\n"
        "sys.path.insert(0, sys.argv[2]); import test_reproduction as t\n"
        "from tvae.presets import Preset; from dataclasses import replace\n"
        "t.reproduction.PRESETS = {name: Preset(replace(x, steps=40), name) for name, x in t.TINY.items()}\n"
        "training.CHECKPOINT_EVERY = 10; noise = training.seed_noise; torch.set_num_threads(1)\n"
        "def die(seed, step):\n"
        "    noise(seed, step)\n"
        "    step == 27 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "training.seed_noise = die; t.reproduce(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "killed"), str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not list((tmp_path / "killed").rglob("model.safetensors"))

    steps = []
    seed_noise = training.seed_noise
    monkeypatch.setattr(training, "seed_noise", lambda seed, step: steps.append(step) or seed_noise(seed, step))
    again = reproduce(tmp_path / "killed")
    assert steps == [*range(20, 40), *range(40)]  # the rest of the first model, and the second
    assert again == reproduce(tmp_path / "whole")


def test_several_at_once_stop_when_told_die_with_their_parent_and_end_in_the_same_table(tmp_path, monkeypatch):
    """One command is interrupted, given again and killed, and given again: against runs one after the other."""
    long = {name: Preset(replace(config, steps=120), name) for name, config in TINY.items()}
    monkeypatch.setattr(reproduction, "PRESETS", long)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "if __name__ == '__main__':\n"
        "    import test_reproduction as t\n"
        "    from tvae.presets import Preset; from dataclasses import replace\n"
        "    t.reproduction.PRESETS = {name: Preset(replace(x, steps=120), name) for name, x in t.TINY.items()}\n"
        "    sys.exit(130 if t.reproduce(Path(sys.argv[1]), workers=2) is None else 0)"
    )
    folder = tmp_path / "at-once"
    command = [sys.executable, "-W", "error", "-c", script, str(folder), str(Path(__file__).parent)]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = {file: file.read_text() for file in folder.rglob("metrics.csv")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(len(log.read_text()) > len(before.get(log, "")) for log in folder.rglob("metrics.csv")):
                break
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert errors == ""
        for run in folder.rglob("seed-0"):
            with FileLock(run / "lock", timeout=20):  # released at once, or by the worker's end soon after
                assert (run / "checkpoint.safetensors").exists()
    assert len(list(folder.rglob("evaluation.json"))) < len(TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert reproduce(folder) == reproduce(tmp_path / "in-turn")
    finally:
        torch.set_num_threads(threads)


def test_a_run_that_another_process_works_on_is_left_alone(tiny, tmp_path):
    (job, _) = reproduction.plan(EXHIBIT, 1, "2", None, tmp_path)
    Run.create(job.path, job.config)
    with FileLock(job.path / "lock"), pytest.raises(RunError, match=r"another process is at work in .*seed-0"):
        reproduction.carry_out(job, "cpu")


# What comes out


@pytest.fixture
def fabricated(tmp_path, monkeypatch):
    """Two seeds of two models, with evaluations that nobody measured."""
    presets = {"mnist-tvae-w5-k3": PRESETS["mnist-tvae-w5-k3"], "mnist-vae": PRESETS["mnist-vae"]}
    exhibit = Exhibit("Table 0: likelihood", {"mnist-tvae-w5-k3": PRINTED, "mnist-vae": {}})
    jobs = []
    for seed in (0, 1):
        for i, (name, preset) in enumerate(presets.items()):
            config = replace(preset.config, steps=6000, seed=seed)
            job = reproduction.Job(name, tmp_path / name / str(seed), config)
            job.path.mkdir(parents=True)
            for file, shift in (("evaluation.json", 0), ("untrained.json", 1000)):
                values = {"ELBO": -1.0, LOG_LIKELIHOOD: -200.25 - i - 2 * seed, BOUND: -210.0, "E_eq": 3000.0 * (i + 1)}
                values["CapCorr hue"] = math.nan if i else 0.5
                rows = [Row(metric, value - shift, -435.5, "") for metric, value in values.items()]
                evaluation.save(rows, 1000, job.path / file)
            jobs.append(job)
    return exhibit, jobs


def test_a_table_holds_paper_ours_chance_and_untrained_by_metric_and_model(fabricated, tmp_path):
    exhibit, jobs = fabricated
    results = reproduction.collect(exhibit, jobs)
    markdown, table, values = reproduction.write(results, "table0", tmp_path / "out")
    title = "Table 0: likelihood (reduced budget: 6,000 of 600,000 training steps)"
    text = markdown.read_text()
    assert text.startswith(f"**{title}**\n\n| metric | model | L | K | weights | paper | ours | chance | untrained |\n")
    std = math.sqrt(2)  # of x and x - 2
    for line in (
        "| log p(x), published | TVAE | 5/36 | 3 | free | -186.8 ± 0.1 | -201.2 ± 1.4 | -435.5 | -1,201.2 ± 1.4 |",
        "|  | VAE |  |  | free |  | -202.2 ± 1.4 | -435.5 | -1,202.2 ± 1.4 |",
        "| log p(x), bound | TVAE | 5/36 | 3 | free |  | -210.0 ± 0.0 | -435.5 | -1,210.0 ± 0.0 |",
        "| E_eq | TVAE | 5/36 | 3 | free | 574 ± 2 | 3,000 ± 0 | -436 | 2,000 ± 0 |",
        "|  | VAE |  |  | free |  | nan ± nan | -435.50 | nan ± nan |",
    ):
        assert line in text.splitlines()
    assert "ELBO" not in text
    assert "over 2 seeds, evaluated on 1,000 sequences" in text.replace("\n", " ")

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert [rows[0][name] for name in ("preset", "paper", "paper std")] == ["mnist-tvae-w5-k3", "-186.8", "0.1"]
    assert float(rows[0]["ours"]) == -201.25
    assert float(rows[0]["ours std"]) == pytest.approx(std)
    assert rows[1]["paper"] == ""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(values.read_text(), parse_constant=refuse)
    assert content["title"] == title
    assert content["rows"][0]["ours by seed"] == [-200.25, -202.25]
    assert content["rows"][-1]["ours"] is None


def test_a_title_names_the_data_and_the_budget_where_they_are_not_the_papers():
    def title(name, sprites, budget):
        exhibit = EXHIBITS[name].with_data(sprites)
        jobs = [
            reproduction.Job(preset, Path(preset), reproduction.budgeted(PRESETS[preset].config, budget)[1])
            for preset in exhibit.models
        ]
        return reproduction._title(exhibit, jobs)

    assert title("table2", "dsprites", "full") == "Table 2: CapCorr and equivariance error on dSprites"
    assert title("table2", "sprites", "6000") == (
        "Table 2: CapCorr and equivariance error on dSprites, here on sprites drawn in the manner of dSprites "
        "(reduced budget: 6,000 of 632,800 training steps)"
    )
    assert title("fig4", "dsprites", "0.5").endswith(
        "(reduced budget: 300,000 of 600,000 and 316,400 of 632,800 training steps)"
    )


def test_one_seed_has_no_standard_deviation(fabricated):
    exhibit, jobs = fabricated
    text = reproduction.to_markdown(reproduction.collect(exhibit, jobs[:2]))
    assert "| -200.2 | -435.5 | -1,200.2 |" in text
    assert "Ours: one seed" in text


def test_fig5_averages_the_transformations_for_each_seed():
    def line(metric, model, L, ours):
        return reproduction.Line(metric, f"{model}{L}", model, L, "1", "free", (0.3, 0.1), ours, 0.2, (1.0, 1.0))

    lines = [
        line("E_eq", "TVAE", "1/3", (9.0, 9.0)),
        line("CapCorr x", "TVAE", "1/3", (0.4, 0.6)),
        line("CapCorr x", "TVAE", "4/15", (0.1, 0.1)),
        line("CapCorr x", "VAE", "", (0.2, 0.2)),
        line("CapCorr y", "TVAE", "1/3", (0.6, 1.0)),
        line("CapCorr y", "TVAE", "4/15", (0.3, 0.3)),
        line("CapCorr y", "VAE", "", (0.2, 0.2)),
    ]
    panels, chance = reproduction.capcorr_series(lines)
    assert chance == pytest.approx(0.2)
    labels = {title: [series.label for series in panel] for title, panel in panels.items()}
    assert labels == {"ours": ["TVAE", "VAE", "TVAE, untrained", "VAE, untrained"], "paper": ["TVAE", "VAE"]}
    ours, printed = panels["ours"], panels["paper"]
    assert (ours[0].label, ours[0].L) == ("TVAE", pytest.approx([4 / 15, 1 / 3]))
    assert ours[0].mean == pytest.approx([0.2, 0.65])
    assert ours[0].std == pytest.approx([0, 0.3 / math.sqrt(2)])  # of 0.5 and 0.8
    assert (ours[1].L, ours[2].mean) == ([0.0], pytest.approx([1.0, 1.0]))
    assert (printed[0].mean, printed[0].std) == (pytest.approx([0.3, 0.3]), [0.0, 0.0])


def test_a_result_is_included_in_its_block_of_a_page_and_no_other(tmp_path):
    page, table = tmp_path / "docs" / "page.md", tmp_path / "out" / "fig5.md"
    for file in (page, table):
        file.parent.mkdir()
    table.write_text("**A title**\n\n| table |\n")
    text = "before\n<!-- reproduce: fig5 -->\nold\n<!-- end -->\nbetween\n<!-- reproduce: fig50 -->\n<!-- end -->\n"
    page.write_text(text)
    for _ in range(2):  # the second time changes nothing
        reproduction.include(page, "fig5", table, tmp_path / "out" / "fig5.png")
        block = "\n![A title](../out/fig5.png)\n\n**A title**\n\n| table |\n\n"
        assert page.read_text() == text.replace("old\n", block)
    with pytest.raises(ValueError, match=r"page.md has no block for the result: the lines <!-- reproduce: table9 -->"):
        reproduction.include(page, "table9", table, None)


@pytest.mark.parametrize(("name", "panels"), [("fig4", 2 * 4), ("fig12", 12), ("fig1", 4), ("covariance", 2 * 2 + 1)])
def test_figures_are_drawn_from_the_runs_of_the_first_seed(name, panels, tiny, tmp_path):
    reproduce(tmp_path, budget="2")
    jobs = reproduction.plan(EXHIBIT, 1, "2", None, tmp_path / "runs")
    figure = reproduction.draw(name, reproduction.collect(EXHIBIT, jobs), jobs, torch.device("cpu"))
    assert len(figure.axes) == panels


def test_tables_have_no_figure():
    assert reproduction.draw("table1", None, [], None) is None


def test_the_last_logged_step_is_read_from_the_end_of_the_log(tmp_path):
    job = reproduction.Job("", tmp_path, Config())
    assert reproduction._steps_done(job) == 0
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{25 * i},1.25\n" for i in range(1, 400)))
    assert reproduction._steps_done(job) == 25 * 399
    assert os.path.getsize(tmp_path / "metrics.csv") > 200
