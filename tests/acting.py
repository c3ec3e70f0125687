"""Sequences that stop, kill or spoil what is trained on them, at a batch of a test's choice; a script that is killed.

Nothing here depends on how fast a machine is: a process ends itself at a given batch or at a given file operation, or
it leaves a mark and waits for the signal that the test sends when the mark is there.

As a script, `python acting.py FOLDER` trains the runs of test_kills.py in processes that end like that, and writes what
came of them into FOLDER/outcomes.json. All of them are forked from one, for it takes seconds to start. With two numbers
behind it, `KILLS SEED`, it does so at random: with so many kills, a fourth as many full disks, and pairs of processes
on one run.
"""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from safetensors import safe_open

from tvae.config import Config, DataSettings, EvaluationSettings, Sources, TrainingSettings
from tvae.data import Factor, SequenceSource, SequenceStream, register
from tvae.models import TVAE, VAE
from tvae.paper import runs, tables
from tvae.presets import PRESETS, Preset
from tvae.training import Run, RunError, loop, train
from tvae_kernels import Neighborhood

NO_HANG = 300  # seconds for one process to end; nothing is measured by them


def with_training(config, **values):
    return replace(config, training=replace(config.training, **values))


def with_model(config, **values):
    return replace(config, model=replace(config.model, **values))


@contextlib.contextmanager
def often(log=2, checkpoint=5):
    """Log and save every few steps, and validate on few sequences."""
    before = loop.LOG_EVERY, loop.CHECKPOINT_EVERY, loop.VALIDATION_SEQUENCES
    loop.LOG_EVERY, loop.CHECKPOINT_EVERY, loop.VALIDATION_SEQUENCES = log, checkpoint, 16
    try:
        yield
    finally:
        loop.LOG_EVERY, loop.CHECKPOINT_EVERY, loop.VALIDATION_SEQUENCES = before


@contextlib.contextmanager
def room_for(size):
    """Let no file grow beyond so many bytes, like a disk that fills up within a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def batch_numbers(stream, steps):
    """The numbers of the stream's first batches, by the examples in them, all of one epoch."""
    numbers = {tuple(stream.draw(i)[0].tolist()): i for i in range(steps)}
    assert len(numbers) == steps
    return numbers


class Acting(Sources):
    """The sequences of a configuration; what is done with the images of a batch, by its number, may end all."""

    def __init__(self, config, actions, rank=0, processes=1):
        super().__init__(config)
        source, settings = self["train"], config.training
        self.actions = actions
        self.numbers = batch_numbers(
            SequenceStream(source, settings.batch_size, settings.seed, rank, processes), settings.steps
        )
        self._render, source.render = source.render, self.render

    def render(self, examples, factors):
        images = self._render(examples, factors)
        action = self.actions.get(self.numbers.get(tuple(examples.tolist())))
        changed = None if action is None else action(images)
        return images if changed is None else changed


def signalling(number=signal.SIGINT, times=1):
    """An action: the process sends itself a signal, which it gets at once."""

    def send(images):
        for _ in range(times):
            signal.raise_signal(number)

    return send


def interrupted_at(config, step, number=signal.SIGINT, times=1):
    """The sequences, and a signal while the given step is taken."""
    return Acting(config, {step: signalling(number, times)})


class Toy(SequenceSource):
    """Small images of no meaning, of which a test may set what is done before a training batch."""

    name = "toy"
    image_shape = (1, 8, 8)
    sequence_length = 15
    factors = (Factor("phase", tuple(range(15))),)
    rendered: list[int] = []  # noqa: RUF012 - the numbers of all training batches
    before_opening = staticmethod(lambda: None)
    before_batch = staticmethod(lambda number: None)

    def __init__(self, device="cpu"):
        self.device, self.numbers = torch.device(device), None

    @classmethod
    def open(cls, split, data_dir, device, download):
        source = cls(device)
        if split == "train":
            cls.before_opening()
            stream = SequenceStream(source, CONFIG.training.batch_size, CONFIG.training.seed)
            source.numbers = batch_numbers(stream, CONFIG.training.steps)
        return source

    def __len__(self):
        return 1000

    def render(self, examples, factors):
        if self.numbers is not None:
            number = self.numbers.get(tuple(examples.tolist()))
            self.before_batch(number)
            self.rendered.append(number)
        pixels = torch.arange(64, device=self.device) + 4 * factors + 7 * examples[:, None, None]
        return (pixels % 11 < 4).float().unflatten(-1, self.image_shape)


CONFIG = Config(
    DataSettings(),  # Toy, where it is registered
    TVAE.Settings(2, 15, neighborhood=Neighborhood(4, 3)),
    TrainingSettings(batch_size=2, steps=40),
    EvaluationSettings(48, 2),
)
MODELS = {"toy-tvae": CONFIG.model, "toy-vae": VAE.Settings(2, 15)}
THREADS = max(1, (os.cpu_count() or 1) // len(MODELS))  # of a worker: with as many sums round alike
CHECKPOINT_EVERY = 10
WAIT_AT = {"interrupted": 17, "killed": 35}  # the batches in which workers wait for these signals


def toy_config():
    return replace(CONFIG, data=DataSettings("toy"))


def toy_presets():
    return {name: Preset(replace(toy_config(), model=model), name) for name, model in MODELS.items()}


def reproduce(folder, workers=1):
    """Everything but the printing; the table as text, or None when interrupted."""
    jobs = runs.plan(MODELS, 1, "full", None, folder / "runs")
    if not runs.carry_out_all(jobs, torch.device("cpu"), workers, Console(quiet=True)):
        return None
    results = tables.collect("Table 0: toys", {name: {} for name in MODELS}, jobs)
    return [file.read_text() for file in tables.write(results, "table0", folder / "out")]


# --- the script -------------------------------------------------------------------------------------------------------


def wait_for_signal(mark):
    """Leave a mark, and wait until this process has been sent a signal that it listens to."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    mark.touch()
    os.read(reader, 1)
    signal.set_wakeup_fd(-1)
    mark.rename(mark.with_suffix(".woken"))


def worker_waits(marks):
    """Make a worker wait for a signal in a batch; one of those that are interrupted still opens its data till then."""

    def open_late():
        with contextlib.suppress(FileExistsError):
            (marks / "late").touch(exist_ok=False)
            while not (marks / "go").exists():
                time.sleep(0.01)

    def wait(number):
        if number == WAIT_AT[marks.name]:
            wait_for_signal(marks / f"{os.getpid()}.ready")

    if marks.name == "interrupted":
        Toy.before_opening = staticmethod(open_late)
    Toy.before_batch = staticmethod(wait)


class Forked:
    """A process forked from this one, which runs a function and exits with the status that it returns."""

    def __init__(self, function, *arguments, errors):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # threads, if any library has started one, do not matter to what follows
            self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests are a shell's job
                torch.set_num_threads(THREADS)
                status = function(*arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def wait_for(self, condition):
        """Wait until a condition holds, for as long as the process is there."""
        while not condition():
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise RuntimeError("the process has ended before")
            time.sleep(0.01)

    def end(self):
        """Wait for its end and return the status, minus the number of the signal that has killed it."""
        limit = time.monotonic() + NO_HANG
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
                raise RuntimeError("the process does not end")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def listens(self):
        """Say whether it does not ignore interruptions, as `tvae reproduce` does while it starts a worker."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
        return not int(ignored, 16) & 1 << signal.SIGINT - 1


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def act_at(chosen, path, hit, action=kill):
    """Do something at one of the operations on the files of a run, which `chosen` picks by number and name.

    Half of what is to be written into a file counts as one. The name of the operation is appended to the file `hit`.
    """
    operations = count()

    def operation(event, arguments):
        if event not in ("open", "half", "os.rename", "os.remove") or not isinstance(arguments[0], str | os.PathLike):
            return
        place = Path(arguments[0])
        if not place.is_relative_to(path) or "tensorboard" in place.parts:  # which another thread writes
            return
        name = f"{event} {place.relative_to(path)}"
        if chosen(next(operations), name):
            with hit.open("a") as file:
                file.write(f"{name}\n")
            action()

    def write_in_halves(place, data):
        with place.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            operation("half", (place,))
            file.write(data[len(data) // 2 :])

    Path.write_bytes = write_in_halves
    sys.addaudithook(operation)


def train_and_be_killed(path, hit, chosen):
    act_at(chosen, path, hit)
    with often(2, 1):
        return 0 if train(Run.open(path), "cpu", show_progress=False) is not None else 1


def kill_again_and_again(folder):
    """Train a run by processes of which each is killed at another operation on its files, and by a last one."""
    path, hit = folder / "run", folder / "hit.txt"
    Run.create(path, toy_config())
    chosen = [lambda i, name, n=n: i == n for n in reversed(range(30))]
    # And all operations on the file of the trained model, of which `n` are survived.
    for n in range(5):
        model = count()
        chosen.append(lambda i, name, n=n, model=model: "model" in name and next(model) == n)
    chosen.append(lambda i, name: False)
    return [Forked(train_and_be_killed, path, hit, which, errors=folder / "errors").end() for which in chosen]


def kill_command(folder):
    """Kill `tvae reproduce` in step 27 of its first model."""

    def command():
        Toy.before_batch = staticmethod(lambda number: number == 27 and kill())
        return 0 if reproduce(folder) else 130

    return Forked(command, errors=folder / "errors").end()


def stop_commands_at_work(folder):
    """Interrupt a command with a worker for each model, then kill the same command as it goes on.

    Returns the status of each, and the steps that are saved when its workers work no longer.
    """
    return [
        (stop_command(folder, name, number), steps_saved(folder))
        for name, number in (("interrupted", signal.SIGINT), ("killed", signal.SIGKILL))
    ]


def stop_command(folder, name, number):
    """Send the signal when one worker trains and the other does, or still opens its data."""
    marks = folder / name
    marks.mkdir()

    def command():
        os.environ["TOY_MARKS"] = str(marks)  # to its workers
        return 0 if reproduce(folder, workers=len(MODELS)) else 130

    process = Forked(command, errors=marks / "errors")
    wait_for_files = lambda *names: process.wait_for(lambda: all(list(marks.glob(x)) for x in names))  # noqa: E731
    if number == signal.SIGINT:
        wait_for_files("late", "*.ready")
    else:
        process.wait_for(lambda: len(list(marks.glob("*.ready"))) == len(MODELS))
    process.wait_for(process.listens)
    os.kill(process.pid, number)
    if number == signal.SIGINT:
        wait_for_files("*.woken")
        (marks / "go").touch()
    return process.end()


def steps_saved(folder):
    """The step of every checkpoint in a folder of runs that nobody works on any longer."""
    steps = {}
    for path in sorted(folder.glob("runs/*/*/seed-0")):
        with FileLock(path / "lock", timeout=NO_HANG), safe_open(path / "checkpoint.safetensors", "pt") as file:
            steps[path.parent.parent.name] = int(file.metadata()["step"])
    return steps


def short_config():
    """A run with some 70 operations on files, of which every step has some."""
    return with_training(toy_config(), steps=8)


def train_disturbed(path, folder, at=-1, action=kill, start=None):
    """Train a run, with something done at an operation; return 3 where it is refused, and why in a file of the folder.

    Args:
        path: of the run.
        folder: for what there is to say.
        at: number of the operation, if there is any.
        action: what is done.
        start: of a pipe, which is read first.

    """
    if start is not None:
        os.read(start, 1)
    act_at(lambda i, name: i == at, path, folder / "hit.txt", action)
    try:
        with often(2, 1):
            train(Run.open(path), "cpu", show_progress=False)
    except RunError as error:
        no_room_beyond(resource.RLIM_INFINITY)
        with (folder / "refused.txt").open("a") as file:
            file.write(f"{error}\n")
        return 3
    return 0


def no_room_beyond(size):
    """From now on let no file grow beyond so many bytes, as far as that may be said again."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def one_after_the_other(folder, count, choose, action):
    """Train run after run until so many processes have not finished, and return the status of all of them.

    Every run is taken up, each time with what is done at another operation, until a process has finished it.
    """
    found = []
    while sum(map(bool, found)) < count:
        path = folder / f"run-{found.count(0)}"
        Run.create(path, short_config())
        for _ in range(60):
            process = Forked(train_disturbed, path, folder, choose(90), action(), errors=folder / "errors")
            found.append(process.end())
            if found[-1] == 0:
                break
        else:
            raise RuntimeError(f"no process finishes {path}: {(folder / 'refused.txt').read_text()[-500:]}")
    return found


def kill_at_random(folder, count, choose):
    return one_after_the_other(folder, count, choose, lambda: kill)


def fill_disks_at_random(folder, count, choose):
    """Let no file grow beyond some bytes, from an operation on: one byte, as many as a checkpoint has, or between."""
    return one_after_the_other(folder, count // 4, choose, lambda: partial(no_room_beyond, choose(2 ** choose(22)) + 1))


def meet_at_random(folder, count, choose):
    """Let two processes start at once on a run, of which one may be killed, and then one finish it."""
    found = []
    for number in range(count // 20):
        path, (reader, writer) = folder / f"run-{number}", os.pipe()
        Run.create(path, short_config())
        at = [-1, choose(90)]
        both = [Forked(train_disturbed, path, folder, n, kill, reader, errors=folder / "errors") for n in at]
        os.write(writer, b"go")
        found.append([x.end() for x in both] + [Forked(train_disturbed, path, folder, errors=folder / "errors").end()])
    return found


def main(folder, count="", seed=""):
    loop.CHECKPOINT_EVERY = CHECKPOINT_EVERY
    PRESETS.update(toy_presets())
    outcomes, cases, arguments = {}, (kill_again_and_again, kill_command, stop_commands_at_work), ()
    if count:
        cases = kill_at_random, fill_disks_at_random, meet_at_random
        arguments = int(count), random.Random(int(seed)).randrange
    for case in cases:
        (folder / case.__name__).mkdir()
        try:
            outcomes[case.__name__] = case(folder / case.__name__, *arguments)
        except Exception:
            outcomes[case.__name__] = traceback.format_exc()
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def run_script(*arguments, limit=NO_HANG, **options):
    """Run a command and return what it has left; it and all that it has started end, whatever happens."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True} | options
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    with subprocess.Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException:
            process.terminate()  # torchrun ends what it has started, in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


if __name__ in ("__main__", "__mp_main__"):
    register(Toy)
if __name__ == "__mp_main__":  # a worker of a command, which registers what is registered there
    loop.CHECKPOINT_EVERY = CHECKPOINT_EVERY
    worker_waits(Path(os.environ["TOY_MARKS"]))
if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
