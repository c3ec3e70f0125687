"""The kernels compile for real GPUs, which the interpreter cannot show, and into the instructions they are meant to be.

Run as a script, in a process where the interpreter is off, this file compiles all that `python -m benchmarks
machine-code` does and writes what came out as JSON; run by pytest, it starts that process once and looks at the result.
"""

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import FORMS, TARGETS, Kernel

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
SIZES = {"float32": 4, "bfloat16": 2, "float64": 8}
EPS = 1e-6
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[Kernel]:
    """Every kernel of `machine_code.tasks()`, compiled."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    output = folder / "results.json"
    command = [sys.executable, __file__, str(output)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-4000:]
    return [Kernel(**data) for data in json.loads(output.read_text())]


def chosen(kernels: list[Kernel], **wanted: str) -> list[Kernel]:
    """Those whose fields are as wanted; there is at least one."""
    found = [k for k in kernels if all(getattr(k, name) == value for name, value in wanted.items())]
    assert found
    return found


def label(k: Kernel) -> str:
    """For messages: which kernel it is."""
    return f"{k.form} {k.shape} {k.window} {k.type} {k.target} {k.direction}"


def test_every_problem_becomes_a_binary_for_every_target(kernels):
    wanted = [
        (form.name, form.shape, target, dtype, direction)
        for form in FORMS
        for target in form.targets
        for dtype in form.types
        for direction in ("forward", "backward")
    ]
    assert [(k.form, tuple(k.shape), k.target, k.type, k.direction) for k in kernels] == wanted


def test_the_problems_reach_every_kernel(kernels):
    names = {k.name for k in kernels}
    assert names == {
        f"{kind}_{direction}_kernel"
        for kind in ("whole", "latents", "tile", "taps", "fourier")
        for direction in ("forward", "backward")
    }


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_spilled(kernels, target):
    spilled = {label(k): k.spilled for k in chosen(kernels, target=target) if k.spilled}
    assert not spilled


@pytest.mark.parametrize("target", TARGETS)
def test_no_float64_where_none_was_asked_for(kernels, target):
    """A Python float such as eps must not pull a kernel into float64, which is many times slower on most GPUs."""
    for dtype in ("float32", "bfloat16"):
        for k in chosen(kernels, target=target, type=dtype):
            assert k.double == 0, label(k)
            assert not re.search(r"[._]f64\b", k.text), label(k)
    for k in chosen(kernels, target=target, type="float64"):
        assert k.double > 0, label(k)


@pytest.mark.parametrize("target", NVIDIA)
def test_no_float32_in_a_float64_kernel(kernels, target):
    """A value that passes through float32 loses half its digits."""
    for k in chosen(kernels, target=target, type="float64"):
        assert not re.search(r"\.f32\b", k.text), label(k)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("form", ["short", "short, time cut", "latents", "ring", "long", "long, r saved"])
def test_global_memory_is_touched_once(kernels, target, form):
    """Counted in the machine code: every input read once, every output written once.

    A tile also reads the frames around it that its windows reach into, and `r` where that is kept. Every thread, which
    has 15 elements or more, reads `mu`, and may write a number for its gradient. With latents it also reads a seed, and
    forward writes its share of the KL terms; backward it reads their gradients, and mean and log-variance of `u` again.
    """
    for k in chosen(kernels, target=target, form=form):
        size, kept = SIZES[k.type], 4 if form == "long, r saved" else 0
        reads, writes = machine_code.floor(k.name, k.direction)
        if k.direction == "forward":
            reads, writes = reads * size, writes * size + kept
        else:  # without r a tile reads u once more at the end, from the cache: it has no registers to keep it in
            again = {"tile_backward_kernel": 0 if kept else 1, "latents_backward_kernel": 2}.get(k.name, 0)
            reads, writes = (reads + again) * size + kept, writes * size
        for_mu = 1.1 * max(size, 4) / 15
        if form == "latents":
            for_mu += 2 * 4 * 1.2 + 8 / 15
        assert reads <= k.loaded <= reads * k.halo + for_mu, label(k)
        assert writes <= k.stored <= writes * k.halo + for_mu, label(k)


@pytest.mark.parametrize("target", NVIDIA)
def test_roots_are_as_exact_as_promised(kernels, target):
    """The one approximate instruction is the reciprocal root of CUDA's own `rsqrt`, of 2 ulp.

    In float64 that is the one without `.ftz`, which the assembler completes with Newton's method.
    """
    for k in chosen(kernels, target=target):
        approximate = set(re.findall(r"\b\w[\w.]*\.approx[\w.]*", k.text))
        expected = {"rsqrt.approx.f64" if k.type == "float64" else "rsqrt.approx.ftz.f32"}
        if k.form == "latents":  # the exponential of a log-variance; the root is in the noise
            expected |= {"ex2.approx.f32", "sqrt.approx.ftz.f32"}
        assert approximate <= expected, label(k)


def test_eps_has_all_the_digits_of_its_type(kernels):
    as_float32 = "0f" + struct.pack(">f", EPS).hex().upper()
    as_float64 = "0d" + struct.pack(">d", EPS).hex().upper()
    assert all(as_float32 in k.text for k in chosen(kernels, target="sm_90", type="float32", direction="forward"))
    assert all(as_float64 in k.text for k in chosen(kernels, target="sm_90", type="float64", direction="forward"))


def test_bfloat16_results_are_rounded_to_nearest(kernels):
    """The interpreter cuts them off instead, so that its tests cannot tell."""
    for k in chosen(kernels, target="sm_90", type="bfloat16"):
        stores = re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", k.text)
        assert stores
        assert set(stores) == {"rn"}


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump([asdict(kernel) for kernel in machine_code.compile_all()], file)
