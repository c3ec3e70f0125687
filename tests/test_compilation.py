"""The kernels compile for real GPUs, which the interpreter cannot show, into the instructions they are meant to be.

By default a cover of all that `python -m benchmarks machine-code` compiles, with `-m exhaustive` the rest. What came
out is kept in pytest's cache, by all that it depends on, so that only what has changed is compiled again.
"""

import gzip
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import FORMS, TARGETS, Form, Kernel
from tvae_kernels import Neighborhood

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]

# The problems in `FORMS` of these kernels take most of a minute to compile: the cover has those once, else this one.
SMALL = Form("latents, small", (8, 4, 16, 4), Neighborhood(2, 3), latents=True)
TASKS = machine_code.tasks((SMALL, *FORMS))
DIRECTIONS = ("forward", "backward")
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
EPS = 1e-6
MOST_KEPT = 4000  # results and links, of which the cover makes some sixty each and all tasks three hundred
ROOT = Path(__file__).parent.parent


# --- which are compiled -----------------------------------------------------------------------------------------------


@cache
def kernel_of(form: Form, dtype: str, direction: str) -> str:
    """The name of the kernel that a problem launches."""
    task = next(t for t in TASKS if (t.form, t.type, t.direction) == (form, dtype, direction))
    return machine_code.launched(task)[0].fn.__name__


def shown(task) -> set[tuple]:
    """What the compilation of a task shows."""
    kernel = kernel_of(task.form, task.type, task.direction)
    return {
        ("form", task.form),
        ("form", task.form.name if task.form.latents else task.form, task.direction),
        ("target", task.target, kernel),
        ("target", task.target, task.type, task.direction),
        ("type", task.type, kernel),
    }


def work(task) -> int:
    """What the time to compile grows with: the taps of the frames that a lane holds, where they are unrolled."""
    kernel, S, W = (
        kernel_of(task.form, task.type, task.direction),
        task.form.shape[1],
        task.form.neighborhood.time_window,
    )
    return 100 + S * W * (10 if kernel.startswith("latents") else 1 if kernel.startswith("whole") else 0)


def cover(tasks: list) -> set:
    """Tasks that show everything there is to show: again and again the one that shows most for its work."""
    chosen, missing = set(), set().union(*map(shown, tasks))
    while missing:
        best = max(tasks, key=lambda task: len(shown(task) & missing) / work(task))
        chosen.add(best)
        missing -= shown(best)
    return chosen


COVER = cover(TASKS)


def of(**wanted):
    """Parametrise a test by the tasks whose fields are as wanted, or among them; outside of the cover, exhaustively."""

    def fits(task) -> bool:
        fields = vars(task) | {"form": task.form.name}
        return all(fields[name] in (v if isinstance(v, (list, tuple)) else [v]) for name, v in wanted.items())

    def marks(task) -> list:
        group = pytest.mark.xdist_group(f"compile {task.form.name} {task.target}")
        return [group] if task in COVER else [group, pytest.mark.exhaustive]

    parameters = [pytest.param(task, id=label(task), marks=marks(task)) for task in TASKS if fits(task)]
    return pytest.mark.parametrize("task", parameters)


def label(task) -> str:
    shape = "x".join(map(str, task.form.shape))
    return f"{task.form.name}-{shape}-{task.type}-{task.target}-{task.direction}"


# --- how --------------------------------------------------------------------------------------------------------------


def compile_kept(task, folder: Path) -> Path:
    """Where what `machine_code.compile_one` returns is kept, now or from before; in a process of the pool."""
    kernel, arguments = machine_code.launched(task)
    analysis = Path(machine_code.__file__).read_bytes()
    content = f"{machine_code.key(task, kernel, arguments)} {task}".encode() + analysis
    file = folder / hashlib.sha256(content).hexdigest()
    if not file.exists():
        found = machine_code.describe(task, kernel, arguments, machine_code.compiled(task, kernel, arguments))
        replace(file, gzip.compress(json.dumps(asdict(found)).encode()))
    return file


def replace(file: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new:
        new.write(content)
    os.replace(new.name, file)


@cache
def all_sources() -> str:
    """All that results depend on and more, known without a process that takes seconds to start."""
    files = [file for package in ("tvae_kernels", "benchmarks") for file in (ROOT / package).rglob("*.py")]
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("TRITON_"))
    return f"{contents} {version('triton')} {version('torch')} {variables}"


def found(task, folder: Path, compile) -> Kernel:
    """What is kept, or what `compile` keeps; a link by all sources leads to it for as long as none has changed."""
    link = folder / hashlib.sha256(f"{all_sources()} {task}".encode()).hexdigest()
    file = folder / link.read_text() if link.exists() else None
    if file is None or not file.is_file():
        file = compile(task, folder)
        replace(link, file.name.encode())
    for used in (link, file):
        used.touch()
    return Kernel(**json.loads(gzip.decompress(file.read_bytes())))


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """A function of a task: its kernel. One process compiles, beside one that waits for it; none, if all is kept."""
    folder = request.config.cache.mkdir("machine_code")
    with machine_code.pool(1, {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}) as pool:
        yield cache(lambda task: found(task, folder, lambda *of: pool.submit(compile_kept, *of).result()))
    with suppress(FileNotFoundError):  # another process removes, or has just written, the same
        for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST_KEPT]:
            file.unlink()


@pytest.fixture
def k(task, compiled) -> Kernel:
    """The kernel of a task."""
    return compiled(task)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_problems_reach_every_kernel():
    assert {kernel_of(t.form, t.type, t.direction) for t in TASKS} == {
        f"{kind}_{direction}_kernel"
        for kind in ("whole", "latents", "tile", "taps", "fourier")
        for direction in DIRECTIONS
    }


def test_the_cover_reaches_every_form_and_every_kernel_for_every_target_and_type():
    """That some problem in `FORMS` has, at a fraction of the tasks."""
    reached = {(kernel_of(t.form, t.type, t.direction), t.target) for t in COVER}
    assert reached == {(kernel_of(t.form, t.type, t.direction), t.target) for t in TASKS}
    assert len(reached) == 10 * len(TARGETS)
    assert {t.form for t in COVER} >= set(FORMS)
    assert {(t.form.name, t.direction) for t in COVER} == {(t.form.name, t.direction) for t in TASKS}
    assert {(t.form, t.direction) for t in COVER} >= {
        (form, d) for form in FORMS if not form.latents for d in DIRECTIONS
    }
    assert {(t.target, t.type, t.direction) for t in COVER} == {(t.target, t.type, t.direction) for t in TASKS}
    assert {(kernel_of(t.form, t.type, t.direction), t.type) for t in COVER} == {
        (kernel_of(t.form, t.type, t.direction), t.type) for t in TASKS
    }
    assert len(COVER) < len(TASKS) / 3


@of()
def test_every_problem_becomes_a_binary_for_every_target(task, k):
    assert (k.form, tuple(k.shape), k.target, k.type) == (task.form.name, task.form.shape, task.target, task.type)
    assert (k.direction, k.name) == (task.direction, kernel_of(task.form, task.type, task.direction))
    assert k.registers > 0


@of()
def test_nothing_is_spilled(k):
    assert k.spilled == 0


@of()
def test_no_float64_where_none_was_asked_for(k):
    """A Python float such as eps must not pull a kernel into float64, which is many times slower on most GPUs."""
    if k.type == "float64":
        assert k.double > 0
    else:
        assert k.double == 0
        assert not re.search(r"[._]f64\b", k.text)


@of(target=NVIDIA, type="float64")
def test_no_float32_in_a_float64_kernel(k):
    """A value that passes through float32 loses half its digits."""
    assert not re.search(r"\.f32\b", k.text)


@of(target=NVIDIA, form=["short", "short, time cut", "latents", "ring", "long", "long, r saved"])
def test_global_memory_is_touched_once(task, k):
    """Counted in the machine code: every input read once, every output written once.

    A tile also reads the frames around it that its windows reach into, and `r` where that is kept. Every thread, which
    has 15 elements or more, reads `mu`, and may write a number for its gradient. With latents it also reads a seed, and
    forward writes its share of the KL terms; backward it reads their gradients, and mean and log-variance of `u` again.
    """
    size, kept = SIZES[k.type], 4 if k.form == "long, r saved" else 0
    reads, writes = machine_code.floor(k.name, k.direction)
    if k.direction == "forward":
        reads, writes = reads * size, writes * size + kept
    else:  # without r a tile reads u once more at the end, from the cache: it has no registers to keep it in
        again = {"tile_backward_kernel": 0 if kept else 1, "latents_backward_kernel": 2}.get(k.name, 0)
        reads, writes = (reads + again) * size + kept, writes * size
    for_mu = 1.1 * max(size, 4) / 15
    if k.form == "latents":
        for_mu += 2 * 4 * 1.2 + 8 / 15
    assert reads <= k.loaded <= reads * k.halo + for_mu
    assert writes <= k.stored <= writes * k.halo + for_mu


@of(target=NVIDIA)
def test_roots_are_as_exact_as_promised(k):
    """The one approximate instruction is the reciprocal root of CUDA's own `rsqrt`, of 2 ulp.

    In float64 that is the one without `.ftz`, which the assembler completes with Newton's method.
    """
    approximate = set(re.findall(r"\b\w[\w.]*\.approx[\w.]*", k.text))
    expected = {"rsqrt.approx.f64" if k.type == "float64" else "rsqrt.approx.ftz.f32"}
    if k.name.startswith("latents"):  # the exponential of a log-variance; the root is in the noise
        expected |= {"ex2.approx.f32", "sqrt.approx.ftz.f32"}
    assert approximate <= expected


@of(target=NVIDIA, type=["float32", "float64"], direction="forward")
def test_eps_has_all_the_digits_of_its_type(k):
    form, prefix = (">f", "0f") if k.type == "float32" else (">d", "0d")
    assert prefix + struct.pack(form, EPS).hex().upper() in k.text


@of(target=NVIDIA, type="bfloat16")
def test_bfloat16_results_are_rounded_to_nearest(k):
    """The interpreter cuts them off instead, so that its tests cannot tell."""
    assert set(re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", k.text)) == {"rn"}


# --- the processes that compile ---------------------------------------------------------------------------------------

PARENT = """
import os, sys
from benchmarks import machine_code

def wait_for_word(fifo):  # a task that says when it has begun, and waits to be told to say that it lives
    os.write(1, b"begun\\n")
    with open(fifo, "rb", buffering=0) as file:
        file.read(1)
    os.write(1, b"alive\\n")
    os._exit(0)

if __name__ == "__main__":
    with machine_code.pool(1) as pool:
        pool.submit(wait_for_word, sys.argv[1]).result()
"""


def test_processes_that_compile_end_with_the_one_that_started_them(tmp_path):
    """It is killed in the midst of a task: what the process that has it is told then, that never reads."""
    fifo, script = tmp_path / "fifo", tmp_path / "parent.py"
    os.mkfifo(fifo)
    script.write_text(PARENT)
    word = os.open(fifo, os.O_RDWR)
    command = [sys.executable, str(script), str(fifo)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"begun\n"
        parent.kill()
        parent.wait()  # the kernel has sent the signal to its children then
        os.write(word, b"a")
        assert parent.stdout.read() == b""  # to its end: no process holds the other end of the pipe any more
    os.close(word)


def test_what_is_kept_is_read_again_and_a_change_is_compiled_again(tmp_path, monkeypatch):
    """In this process, where kernels are not compiled: a stand-in for the compiler counts what it is asked for.

    It is not even asked for its key while no source has changed.
    """
    task, calls, asked = TASKS[0], [], []
    kernel = Kernel(
        "form", (1, 2, 3, 4), (1, 2), "float32", "sm_80", "forward", "k", 1, 0, 0, 1.5, None, None, None, 0, ""
    )

    def describe(*_):
        calls.append(1)
        return kernel

    monkeypatch.setattr(machine_code, "compiled", lambda *_: None)
    monkeypatch.setattr(machine_code, "describe", describe)
    for key, sources, count, count_of_keys in (
        ("source 1", "all 1", 1, 1),
        ("source 1", "all 1", 1, 1),
        ("source 2", "all 2", 2, 2),
        ("source 1", "all 1", 2, 2),
        ("source 1", "all 3", 2, 3),
    ):
        monkeypatch.setattr(machine_code, "key", lambda *_, key=key: asked.append(key) or key)
        monkeypatch.setattr(sys.modules[__name__], "all_sources", lambda sources=sources: sources)
        result = found(task, tmp_path, compile_kept)
        assert (result.name, result.loaded, len(calls), len(asked)) == ("k", None, count, count_of_keys)
    assert len(list(tmp_path.iterdir())) == 2 + 3
    for file in tmp_path.iterdir():
        if len(file.read_bytes()) != 64:
            file.unlink()  # as what has not been used for long, before its links
    found(task, tmp_path, compile_kept)
    assert (len(calls), len(asked)) == (3, 4)


def test_a_change_of_any_source_or_variable_leads_nowhere(tmp_path, monkeypatch):
    seen = [all_sources.__wrapped__()]
    for name in ("tvae_kernels/backends/triton", "benchmarks"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "tvae_kernels/backends/triton/plain.py"
    for content in ("a", "b"):
        file.write_text(content)
        seen.append(all_sources.__wrapped__())
    monkeypatch.setenv("TRITON_X", "1")
    seen.append(all_sources.__wrapped__())
    assert len(set(seen)) == len(seen)
    assert all_sources.__wrapped__() == seen[-1]
