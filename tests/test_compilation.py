"""The kernels compile for real GPUs, which the interpreter cannot show, and into the instructions they are meant to be.

Run as a script, in a process where the interpreter is off, this file compiles the kernels for GPUs that need not be
there and writes what came out as JSON; run by pytest, it starts that process once and looks at the result.
"""

import json
import os
import re
import struct
import subprocess
import sys

import pytest
import torch

from tvae_kernels import Neighborhood

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
EPS = 1e-6
COMMON = ((8, 18, 18, 18), Neighborhood(18, 3))
# Triton compiles arguments that are 1 as constants, so that axes of one element are another program than longer ones.
RARE = {
    "one element": ((1, 1, 1, 1), Neighborhood()),
    "one tile, cut edges": ((2, 7, 1, 63), Neighborhood(4, 2, -2, True, "zero", "zero")),
    "many tiles, one edge cut": ((2, 129, 3, 129), Neighborhood(2, 1, 70, capsule_boundary="zero")),
}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch by name."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, None

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options


def compile_as_launched(recorder, target):
    """Compile a kernel for the arguments that the recorder saw, the way Triton would at that launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(recorder.kernel.arg_names):
        value = recorder.arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif recorder.kernel.params[position].is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(*target))


def compile_all():
    """Every kernel in its common form for every target, and its rare forms for one."""
    from tvae_kernels import kernels

    assert not kernels.interpreted()
    forward = kernels.topographic_forward_kernel = Recorder(kernels.topographic_forward_kernel)
    backward = kernels.topographic_backward_kernel = Recorder(kernels.topographic_backward_kernel)
    forms = [(target, "common", dtype, *COMMON) for target in TARGETS for dtype in TYPES]
    forms += [("sm_90", form, "float32", *arguments) for form, arguments in RARE.items()]
    results = []
    for target, form, dtype, shape, neighborhood in forms:
        x = torch.ones(shape, dtype=TYPES[dtype])
        accumulated = kernels.compute_dtype(x.dtype)
        mu = torch.ones(shape[2:], dtype=accumulated)
        for weighted in (False, True):
            windows = (neighborhood.time_window, neighborhood.capsule_window)
            weights = torch.ones(windows, dtype=accumulated) if weighted else None
            kernels.forward(x, x, mu, weights, neighborhood, EPS, save_r=form == "common")
            kernels.backward(x, x, x, mu, weights, x.to(accumulated), neighborhood)
            for name, recorder in (("forward", forward), ("backward", backward)):
                compiled = compile_as_launched(recorder, TARGETS[target])
                binary, text = ("cubin", "ptx") if "ptx" in compiled.asm else ("hsaco", "amdgcn")
                results.append(
                    {
                        "target": target,
                        "form": form,
                        "type": dtype,
                        "weighted": weighted,
                        "kernel": name,
                        "binary": len(compiled.asm[binary]),
                        "warps": compiled.metadata.num_warps,
                        "text": compiled.asm[text],
                    }
                )
    return results


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `compile_all` returns, from a process without the interpreter and with an empty cache."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    output = folder / "results.json"
    process = subprocess.run(
        [sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(output.read_text())


def texts(compiled, kernel=("forward", "backward"), **wanted) -> list[str]:
    """The assembler text of the kernels for which all the wanted entries hold; there is at least one."""
    found = [c["text"] for c in compiled if c["kernel"] in kernel and all(c[k] == v for k, v in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_becomes_a_binary(compiled, target):
    common = [c for c in compiled if c["target"] == target and c["form"] == "common"]
    assert len(common) == len(TYPES) * 2 * 2  # plain and weighted, forward and backward
    assert all(c["binary"] > 0 for c in common)
    assert all(c["warps"] <= 16 for c in common)


@pytest.mark.parametrize("form", RARE)
def test_rare_forms_become_binaries_too(compiled, form):
    sizes = [c["binary"] for c in compiled if c["form"] == form]
    assert len(sizes) == 2 * 2
    assert all(sizes)


@pytest.mark.parametrize("target", TARGETS)
def test_no_float64_where_none_was_asked_for(compiled, target):
    """A Python float such as eps must not pull a kernel into float64, which is many times slower on most GPUs."""
    double = re.compile(r"[._]f64\b")
    for dtype in ("float32", "bfloat16"):
        assert not any(double.search(text) for text in texts(compiled, target=target, type=dtype))
    assert all(double.search(text) for text in texts(compiled, target=target, type="float64"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_no_float32_in_a_float64_kernel(compiled, target):
    """A value that passes through float32 loses half its digits."""
    assert not any(re.search(r"\.f32\b", text) for text in texts(compiled, target=target, type="float64"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_root_and_the_quotient_are_rounded_correctly(compiled, target):
    for dtype, suffix in (("float32", "f32"), ("bfloat16", "f32"), ("float64", "f64")):
        for text in texts(compiled, ["forward"], target=target, type=dtype):
            assert f"sqrt.rn.{suffix}" in text
            assert f"div.rn.{suffix}" in text or f"rcp.rn.{suffix}" in text
            assert "approx" not in text
            assert "div.full" not in text


def test_eps_has_all_the_digits_of_its_type(compiled):
    as_float32 = "0f" + struct.pack(">f", EPS).hex().upper()
    as_float64 = "0d" + struct.pack(">d", EPS).hex().upper()
    assert all(as_float32 in text for text in texts(compiled, ["forward"], target="sm_90", type="float32"))
    assert all(as_float64 in text for text in texts(compiled, ["forward"], target="sm_90", type="float64"))


def test_bfloat16_results_are_rounded_to_nearest(compiled):
    """The interpreter cuts them off instead, so that its tests cannot tell."""
    for text in texts(compiled, target="sm_90", type="bfloat16"):
        stores = re.findall(r"cvt\.(\w+)\.bf16\w*\.f32", text)
        assert stores
        assert set(stores) == {"rn"}


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(compile_all(), file)
