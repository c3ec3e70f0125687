"""Runs and commands whose processes are interrupted and killed, against the same in peace.

They are killed by SIGKILL at a step or at an operation on files that is chosen beforehand, or as they wait after they
have left a mark: whatever the machine's speed and load, the same happens every time. See acting.py.
"""

import json
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
    killed, whole = Run.open(folder / "run"), Run.create(tmp_path / "whole", toy_config())
    with often(2, 1):
        assert train(whole, "cpu", show_progress=False) is not None
    for name in ("metrics.csv", "model.safetensors"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert_equal(killed.checkpoint, whole.checkpoint)
    assert {file.name for file in killed.path.iterdir()} == {file.name for file in whole.path.iterdir()}


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
