"""What is seen of long work where the output is a file: a line at the start, now and then, and at the end."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console

from tvae import cli, progress
from tvae.paper import exhibits, runs


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Flushed(io.StringIO):
    """A file that knows what of it has been written out."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_lines_are_written_out_at_the_start_now_and_then_and_at_the_end(clock):
    file = Flushed()
    with progress.progress("training", 1000, console=Console(file=file, width=20)) as show:
        assert file.seen == "training: 0 of 1,000\n"
        for done in (1, 2, 3):
            clock.now += 10.5
            show(done, "loss 3.0")
        assert file.seen.splitlines()[1:] == ["training: 3 of 1,000, loss 3.0, 174 minutes left"]
        clock.now += 1
        show(1000, "loss 1.0")
        assert file.seen.splitlines()[2:] == ["training: 1,000 of 1,000, loss 1.0"]
        clock.now += 29  # the bar is full, and something goes on
        show(1000, "evaluating")
        assert len(file.seen.splitlines()) == 3
        clock.now += 2
        show(1000, "evaluating")
        assert file.seen.splitlines()[3:] == ["training: 1,000 of 1,000, evaluating"]


def test_what_is_resumed_starts_where_it_was(clock):
    file = Flushed()
    with progress.progress("training", 100, 50, Console(file=file)) as show:
        clock.now = 60
        show(60)
    assert file.seen.splitlines() == ["training: 50 of 100", "training: 60 of 100, 4 minutes left"]


def test_nothing_is_shown_where_nothing_shall_be(clock, capsys):
    with progress.progress("training", 100, visible=False) as show:
        clock.now = 60
        show(60, "text")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_phase_is_seen_while_it_lasts(terminal, monkeypatch):
    """It waits for its own line: without one it would never end."""
    seen = threading.Event()

    class File(io.StringIO):
        def write(self, text):
            if "opening [red]x[/x]" in text:
                seen.set()
            return super().write(text)

    monkeypatch.setattr(progress, "SOON", 0.0)
    console = Console(file=File(), force_terminal=terminal, color_system=None)
    with progress.phase("opening [red]x[/x]", console):
        assert seen.wait(timeout=300)


def test_a_short_phase_is_not_worth_a_line(monkeypatch):
    monkeypatch.setattr(progress, "SOON", 1e6)
    file = io.StringIO()
    with progress.phase("opening", Console(file=file)):
        pass
    assert file.getvalue() == ""
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.slow
def test_training_and_evaluating_of_every_run_are_seen(tmp_path, capsys):
    patch = tiny.presets()
    try:
        jobs = tiny.plan(tmp_path)
        assert runs.carry_out_all(jobs, torch.device("cpu"), 1, Console())
    finally:
        patch.undo()
    lines = capsys.readouterr().out.splitlines()
    batches = 2 * 24  # of the model untrained and trained
    one = ["training: 0 of 2", "training: 2 of 2", "evaluating: 0 of 48", f"evaluating: {batches} of {batches}"]
    assert [line.partition(", loss")[0] for line in lines if line.startswith(("training", "evaluating"))] == 2 * one


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reproduce", "train", "traverse"])
def test_drawing_and_opening_are_phases(command, tmp_path, monkeypatch, mnist_dir):
    """Of every command that draws or opens files."""
    shown = []
    phase = progress.phase

    def note(work, console):
        shown.append(work)
        return phase(work, console)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "phase", note)
    small = "--evaluation-sequences 8 --importance-samples 1 --capsules 2 --steps 2 --run-dir run"
    if command == "reproduce":
        patch = tiny.presets()
        patch.setitem(exhibits.EXHIBITS, "fig", replace(tiny.EXHIBIT, draw=exhibits.draw_panels))
        try:
            words = "reproduce fig --budget 2 --jobs 1 --data sprites --runs runs --output out"
            assert cli.main(words.split()) == 0
        finally:
            patch.undo()
        assert shown == ["looking for runs and data", "drawing"]
        assert {file.suffix for file in Path("out").iterdir()} == {".md", ".csv", ".json", ".png"}
        return
    assert cli.main(f"train mnist-vae --data-dir {mnist_dir} {small}".split()) == 0
    assert shown == ["opening mnist", "opening mnist", "opening mnist", "drawing"]  # train and test, to draw again
    if command == "traverse":
        shown.clear()
        assert cli.main(["traverse", "run"]) == 0
        assert shown == ["opening mnist", "drawing"]
