"""The first seconds of the command line, and the environments that it may find: no package, no home, no main thread."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
from acting import often
from numerics import exhaustive

import tvae
from tvae import __main__, cli, files
from tvae.config import Config, DataSettings, TrainingSettings
from tvae.data import open_source
from tvae.models import VAE
from tvae.paper import runs
from tvae.training import Run, train
from tvae.training.processes import launch

ROOT = Path(__file__).parent.parent
SMALL = Config(DataSettings(), VAE.Settings(1, 3), TrainingSettings(batch_size=2, steps=2))

# Ctrl-C while a package is imported; what is imported may make another error of it, as extensions do.
PRESSED = """
import os, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            try:
                signal.raise_signal(signal.SIGINT)
                sum(range(10**4))
            except KeyboardInterrupt:
                raise ValueError("too many values to unpack")
sys.meta_path.insert(0, Press())
sys.argv = ["tvae", *{arguments!r}]
from tvae.__main__ import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torch", ["presets"]),
        ("tvae.paper", ["reproduce"]),
        exhaustive("tvae.cli", ["presets"]),
        exhaustive("pydantic", ["train"]),
        exhaustive("tvae.paper.exhibits", ["presets"]),
    ],
)
def test_ctrl_c_while_something_is_imported_is_an_interruption(name, arguments, tmp_path):
    code = PRESSED.format(name=name, arguments=arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert (result.returncode, result.stderr, result.stdout) == (130, "tvae: interrupted\n", "")


def test_an_interruption_that_became_another_error_is_one(monkeypatch, capsys):
    def press(*_):
        try:
            signal.raise_signal(signal.SIGINT)
            sum(range(10**4))  # where it is noticed
        except KeyboardInterrupt:
            raise ValueError("too many values to unpack") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli.Presets, "run", press)
    assert cli.main(["presets"]) == 130
    assert capsys.readouterr().err == "tvae: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_signals_that_are_handled_otherwise_stay_so(handler, capsys):
    """As of a command that the shell has started in the background, which ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert cli.main(["reproduce"]) == 0
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", ["jaxtyping", "tyro", "pydantic"])
def test_a_missing_package_is_one_line_of_advice(name, monkeypatch, capsys):
    for loaded in [module for module in sys.modules if module.startswith("tvae.") and module != "tvae.__main__"]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded, module in list(vars(tvae).items()):
        if isinstance(module, type(sys)):
            monkeypatch.setattr(tvae, loaded, module)  # to be put back
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert __main__.main() == 1
    assert capsys.readouterr().err == (
        f"tvae: error: the package {name} is missing; "
        'install what training needs with: pip install "tvae-kernels[train]"\n'
    )


# --- environments -----------------------------------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch):
    """No HOME, and a user that nobody knows."""

    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda path: unknown(path) if str(path).startswith("~") else path)


def test_without_a_home_folder_everything_else_works(homeless, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["presets"]) == 0
    assert cli.main(["train", "sprites-vae", "--capsules", "1", "--steps", "2", "--evaluation-sequences", "8"]) == 0
    assert cli._sprites("auto", None) == "sprites"
    capsys.readouterr()
    for words in (
        "train mnist-vae --run-dir x",
        "train sprites-vae --run-dir ~/x",
        "evaluate ~/x",
        "traverse ~nobody/x",
    ):
        assert cli.main(words.split()) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("is in no folder: Could not determine home directory.")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_library_expands_home_too(mnist_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(mnist_dir))
    assert len(open_source("mnist", "test", "~")) == 20


def test_a_scheduler_that_has_started_no_processes_is_not_asked(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    fabric = launch(torch.device("cpu"))
    assert (fabric.world_size, fabric.global_rank) == (1, 0)


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found


def test_a_run_is_trained_outside_of_the_main_thread(tmp_path):
    run = Run.create(tmp_path / "run", SMALL)
    with often():
        (model,) = in_another_thread(lambda: train(run, "cpu", show_progress=False))
    assert model is not None
    assert run.model_file.exists()
    (status,) = in_another_thread(lambda: cli.main(["evaluate", "nowhere"]))
    assert status == 1


def test_runs_are_given_to_workers_outside_of_the_main_thread(tmp_path):
    class Pool:
        def submit(self, *arguments):
            return arguments

    patch = tiny.presets()
    (job, _) = tiny.plan(tmp_path)
    patch.undo()
    (given,) = in_another_thread(lambda: runs._submitted(Pool(), job, "cpu"))
    assert given == (runs.carry_out, job, "cpu")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_wait_for_a_folder_keeps_the_file(number, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    Run.create(tmp_path / "run", SMALL)


def test_a_disk_that_fails_is_no_such_file_system(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*file"):
        files.write_text(tmp_path / "file", "new")
    assert not list(tmp_path.iterdir())
