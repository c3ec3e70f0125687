"""Runs and commands whose processes are interrupted and killed, against the same in peace.

They are killed by SIGKILL at a step or at an operation on files that is chosen beforehand, or as they wait after they
have left a mark: whatever the machine's speed and load, the same happens every time. See acting.py.

`pytest -m long` kills at as many random operations as the environment variable TVAE_KILLS says, and fills a fourth as
many disks, and prints how many these were.
"""

import json
import os
from collections import Counter
from itertools import groupby

import acting
import pytest
import torch
from acting import (
    CHECKPOINT_EVERY,
    MODELS,
    THREADS,
    Toy,
    often,
    reproduce,
    run_script,
    short_config,
    steps_saved,
    toy_config,
    toy_presets,
)
from safetensors.torch import load_file

from tvae.data import SOURCES
from tvae.presets import PRESETS
from tvae.training import Run, train

pytestmark = [pytest.mark.xdist_group("kills"), pytest.mark.slow]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of runs that processes have left which were stopped, and how these ended."""
    folder = tmp_path_factory.mktemp("kills")
    result = run_script(acting.__file__, folder, limit=3 * acting.NO_HANG)  # each of its processes has one
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return folder, json.loads((folder / "outcomes.json").read_text())


@pytest.fixture
def toy(monkeypatch):
    """The toys, known by their names; with the threads of a worker."""
    monkeypatch.setitem(SOURCES, "toy", Toy)
    for name, preset in toy_presets().items():
        monkeypatch.setitem(PRESETS, name, preset)
    monkeypatch.setattr(Toy, "rendered", [])
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with often(log=25, checkpoint=CHECKPOINT_EVERY):
        yield
    torch.set_num_threads(threads)


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(stopped, toy, tmp_path):
    folder = stopped[0] / "kill_again_and_again"
    *kills, last = stopped[1]["kill_again_and_again"]
    assert (set(kills), last) == ({-9}, 0), (folder / "errors").read_text()
    # Before and after every change of a file, and halfway.
    assert set((folder / "hit.txt").read_text().splitlines()) >= {
        "open metrics.csv",
        "open metrics.partial",
        "half metrics.partial",
        "os.rename metrics.partial",
        "open checkpoint.partial",
        "half checkpoint.partial",
        "os.rename checkpoint.partial",
        "open .",
        "open model.partial",
        "half model.partial",
        "os.rename model.partial",
    }
    assert_ended_like(Run.open(folder / "run"), undisturbed(tmp_path / "whole", toy_config()))


def undisturbed(path, config):
    whole = Run.create(path, config)
    with often(2, 1):
        assert train(whole, "cpu", show_progress=False) is not None
    return whole


def assert_ended_like(run, whole):
    for name in ("metrics.csv", "model.safetensors"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert_equal(run.checkpoint, whole.checkpoint)
    assert {file.name for file in run.path.iterdir()} == {file.name for file in whole.path.iterdir()}


def assert_equal(checkpoint, expected):
    """All tensors are; the metadata of a checkpoint has no certain order."""
    tensors, expected = load_file(checkpoint), load_file(expected)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(tensors[name], x), name


@pytest.fixture
def in_peace(toy, tmp_path):
    """The table of runs one after the other that nothing disturbs."""
    return reproduce(tmp_path / "in-peace")


def test_a_killed_and_repeated_command_gives_the_same_table_and_loses_one_checkpoint_interval(stopped, in_peace):
    folder = stopped[0] / "kill_command"
    assert stopped[1]["kill_command"] == -9, (folder / "errors").read_text()
    assert steps_saved(folder) == {"toy-tvae": 20}
    Toy.rendered.clear()
    assert reproduce(folder) == in_peace
    # What remains of the first model, and the second.
    assert [number for number, _ in groupby(Toy.rendered)] == [*range(20, 40), *range(40)]


def test_several_at_once_stop_when_interrupted_die_with_their_parent_and_end_in_the_same_table(stopped, in_peace):
    """One command is interrupted, given again and killed, and given again: against runs one after the other."""
    folder = stopped[0] / "stop_commands_at_work"
    errors = {file.parent.name: file.read_text() for file in folder.glob("*/errors")}
    # Interrupted in batch 17, which is saved, and killed in batch 35; their workers, too, or they would hold the locks.
    saved = [[130, dict.fromkeys(MODELS, 18)], [-9, dict.fromkeys(MODELS, 30)]]
    assert stopped[1]["stop_commands_at_work"] == saved, errors
    assert errors == {"interrupted": "", "killed": ""}
    assert len(list((folder / "interrupted").glob("*.woken"))) == len(MODELS)
    assert not list(folder.rglob("evaluation.json"))
    assert reproduce(folder) == in_peace


@pytest.mark.long
def test_nothing_is_lost_by_many_kills_full_disks_and_meetings(toy, tmp_path, capsys):
    """Every run ends like one that nothing disturbs, and what is refused is refused in one line."""
    kills, seed = (os.environ.get(name, default) for name, default in (("TVAE_KILLS", "200"), ("TVAE_SEED", "0")))
    result = run_script(acting.__file__, tmp_path, kills, seed, limit=None)
    assert (result.returncode, result.stderr) == (0, "")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    whole = undisturbed(tmp_path / "whole", short_config())
    for name, found in outcomes.items():
        folder = tmp_path / name
        assert type(found) is list, found
        statuses = Counter(x for each in found for x in (each if type(each) is list else [each]))
        refused = folder / "refused.txt"
        lines = refused.read_text().splitlines() if refused.exists() else []
        assert statuses.keys() <= {0, -9 if name == "kill_at_random" else 3, -9 if name == "meet_at_random" else 0}
        assert statuses[3] == len(lines)
        for line in lines:
            start = "cannot write the run: " if name == "fill_disks_at_random" else "another process is at work in "
            assert line.startswith(start)
        runs = [Run.open(path) for path in folder.glob("run-*")]
        for run in runs:
            assert_ended_like(run, whole)
        hit = folder / "hit.txt"
        operations = Counter(hit.read_text().splitlines() if hit.exists() else [])
        with capsys.disabled():
            print(f"\n{name}: {len(found)} in {len(runs)} runs, {dict(statuses)}; at {dict(operations)}")
    assert all(last == 0 for *_, last in outcomes["meet_at_random"])
