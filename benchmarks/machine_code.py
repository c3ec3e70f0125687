"""What the compilers make of the kernels, for GPUs that need not be there: registers, memory, instructions, bytes.

`python -m benchmarks machine-code` compiles the kernels ahead of time for every target below and prints a table; the
tests assert what it shows.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch

from tvae_kernels import Neighborhood, backends
from tvae_kernels.arguments import Inputs, Noise, Window, compute_dtype

from . import environment, records
from .measuring import progress
from .records import Record, Result
from .render import markdown, shape

DEVICES = ("none",)
SHOWN = ("all",)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64"}
POINTERS = TYPES | {"int32": "*i32", "int64": "*i64"}
HEADS = ["problem", "type", "target", "direction", "registers", "spilled", "shared", "instructions", "loaded", "stored"]
FLOOR = {"forward": (2, 1), "backward": (3, 2)}  # elements that must be read and written, an element
FLOOR_OF_LATENTS = {"forward": (4, 1), "backward": (5, 4)}  # from means and log-variances


def run(output: Path | None = None) -> Result:
    """Compile the kernels ahead of time, for GPUs that need not be there, and count what their machine code does.

    Without `--output` the table in docs/ is made anew.

    Args:
        output: JSON file to write; by default benchmarks/results/machine-code.json.

    """
    found, unit = environment.describe(), "instructions and bytes an element of the result"
    file = output or records.path("machine-code", found, "none")
    result = Result(file, "machine-code", found, "none", unit, {})
    kernels = []
    with progress("machine-code", len(tasks())) as show:
        for kernel in compile_all():
            kernels.append(record(kernel))
            show(len(kernels), f"{kernel.form} for {kernel.target}")
    result.add(kernels)
    return Result.read(file)


@dataclass(frozen=True)
class Form:
    """A class of problems that share a kernel: `(B, S, C, D)` and a window, for some types."""

    name: str
    shape: tuple[int, int, int, int]
    neighborhood: Neighborhood
    types: tuple[str, ...] = ("float32",)
    weighted: bool = False
    latents: bool = False  # from the encoders' outputs
    targets: tuple[str, ...] = tuple(TARGETS)


FORMS = (
    Form("short", (8, 18, 18, 18), Neighborhood(18, 3), tuple(TYPES)),
    Form("short", (8, 18, 18, 18), Neighborhood(5, 9)),
    Form("short", (8, 15, 15, 15), Neighborhood(10, 1), ("float32", "bfloat16")),
    Form("short, time cut", (8, 32, 16, 32), Neighborhood(5, 3, time_boundary="zero")),
    Form("latents", (8, 18, 18, 18), Neighborhood(18, 3), latents=True),
    Form("latents", (8, 15, 15, 15), Neighborhood(10, 1), ("float32", "bfloat16"), latents=True, targets=("sm_90",)),
    Form("ring", (256, 64, 32, 128), Neighborhood(18, 3), ("float32", "bfloat16")),
    Form("ring", (256, 64, 32, 128), Neighborhood(64, 9)),
    Form("long", (64, 1024, 16, 64), Neighborhood(5, 3), tuple(TYPES)),
    Form("long", (64, 1024, 16, 64), Neighborhood(18, 9), ("float32", "bfloat16")),
    Form("long, r saved", (64, 1024, 16, 64), Neighborhood(64, 3)),
    Form("weighted", (8, 18, 18, 18), Neighborhood(18, 3), tuple(TYPES), weighted=True),
    Form("capsule cut", (8, 18, 18, 18), Neighborhood(5, 3, capsule_boundary="zero")),
    Form("capsules padded", (8, 18, 18, 18), Neighborhood(5, 3, time_boundary="padded", capsule_boundary="padded")),
    Form("shift of 1/2", (8, 18, 18, 9), Neighborhood(18, 3, 0.5), tuple(TYPES)),
    Form("phase shift", (8, 18, 18, 9), Neighborhood(18, 3, 0.5, roll="fourier"), tuple(TYPES)),
    Form("phase shift, weighted", (8, 18, 18, 9), Neighborhood(18, 3, 0.5, roll="fourier"), weighted=True),
    Form("speeds", (8, 18, 18, 18), Neighborhood(18, 3, speeds=tuple(range(1, 19)))),
    Form("torus", (128, 1, 1, 324), Neighborhood(1, 5, axes=(18, 18)), tuple(TYPES)),
    Form("torus, 3 axes", (8, 18, 8, 125), Neighborhood(18, 3, axes=(5, 5, 5))),
    Form("2 roots", (8, 18, 18, 36), Neighborhood(18, 3, axes=(6, 6), roots="each axis"), tuple(TYPES)),
    Form("3 roots, weighted", (8, 18, 8, 125), Neighborhood(5, 3, axes=(5, 5, 5), roots="each axis"), weighted=True),
    # Triton compiles arguments that are 1 as constants, so that axes of one element are another program.
    Form("one element", (1, 1, 1, 1), Neighborhood(), targets=("sm_90",)),
    Form("rare, cut", (2, 7, 1, 63), Neighborhood(4, 2, -2, True, "zero", "zero"), targets=("sm_90",)),
    Form("rare, far shift", (2, 129, 3, 129), Neighborhood(2, 1, 70), targets=("sm_90",)),
)


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: what the compiler says of its resources, and what its machine code holds."""

    form: str
    shape: tuple[int, int, int, int]
    window: tuple[int, int | tuple[int, ...]]
    type: str
    target: str
    direction: str  # "forward" or "backward"
    name: str
    registers: int  # of a thread
    spilled: int  # bytes of a thread that did not fit its registers
    shared: int  # bytes of a program
    instructions: float | None  # of a thread, an element of the result; None where loops hide the number
    halo: float | None  # frames that a program holds for each frame that it answers
    loaded: float | None  # bytes from global memory, an element of the result
    stored: float | None  # bytes to global memory, an element of the result
    double: int  # instructions in float64
    text: str  # of the assembler


@dataclass(frozen=True)
class _Task:
    form: Form
    type: str
    target: str
    direction: str


def tasks(forms: tuple[Form, ...] = FORMS) -> list[_Task]:
    """Everything there is to compile."""
    return [
        _Task(form, dtype, target, direction)
        for form in forms
        for target in form.targets
        for dtype in form.types
        for direction in FLOOR
    ]


def compile_all() -> Iterator[Kernel]:
    """Compile everything, on all cores."""
    with pool(os.cpu_count()) as workers:
        yield from workers.map(compile_one, tasks())


def pool(workers: int, variables: dict[str, str] | None = None) -> ProcessPoolExecutor:
    """Start processes that compile: without Triton's interpreter, with these environment variables.

    They end with this process, however it ends. Linux says so to what the thread started that ends: submit from a
    thread that lives as long as the pool.
    """
    context = get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), variables or {}))


def _begin(parent: int, variables: dict[str, str]) -> None:
    """Return what each of them does first."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # which ended before
            os._exit(1)
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel's module is first imported
    os.environ.update(variables)


def compile_one(task: _Task) -> Kernel:
    """Compile a kernel for the arguments of a real launch, the way Triton would there."""
    kernel, arguments = launched(task)
    return describe(task, kernel, arguments, compiled(task, kernel, arguments))


def launched(task: _Task) -> tuple:
    """Return the kernel that the operation launches last for a task, and its arguments by name."""
    from tvae_kernels.backends.triton import launch

    with launch.recorded() as launches:
        _call(task)
    kernel, _, arguments = launches[-1]
    return kernel, arguments


def compiled(task: _Task, kernel, arguments: dict):
    """Return what Triton makes of what `launched` returned. Not in a process where its interpreter is on."""
    from tvae_kernels.backends.triton import launch

    if launch.interpreted():
        raise RuntimeError("kernels are not compiled where TRITON_INTERPRET is set")
    return _compile(kernel, arguments, TARGETS[task.target])


def describe(task: _Task, kernel, arguments: dict, compiled) -> Kernel:
    """Take apart what `compiled` returned for a task."""
    nvidia = "cubin" in compiled.asm
    resources = _nvidia(compiled) if nvidia else _amd(compiled)
    n = task.form.neighborhood
    return Kernel(
        task.form.name,
        task.form.shape,
        (n.time_window, n.capsule_window),
        task.type,
        task.target,
        task.direction,
        kernel.fn.__name__,
        shared=compiled.metadata.shared,
        text=compiled.asm["ptx" if nvidia else "amdgcn"],
        **resources,
        **_traffic(compiled, kernel, arguments, task),
    )


def _call(task: _Task) -> None:
    """One direction of the operation on tensors without memory."""
    form = task.form
    x = torch.empty(form.shape, dtype=getattr(torch, task.type), device="meta")
    if form.latents:
        return _call_latents(task, x)
    u = x.new_empty(form.neighborhood.shape_of_u(form.shape))
    accumulator = compute_dtype(x.dtype)
    mu = torch.empty((), dtype=accumulator, device="meta")
    weights = torch.empty(form.neighborhood.weights_shape, dtype=accumulator, device="meta") if form.weighted else None
    inputs, window = Inputs(x, u, mu, weights), Window(form.neighborhood, 1e-6)
    _, r = backends.forward("triton", inputs, window, True)
    if task.direction == "backward":
        backends.backward("triton", inputs, window, r, x)


def _call_latents(task: _Task, x: torch.Tensor) -> None:
    (B, S, C, D), accumulator = x.shape, compute_dtype(x.dtype)
    z, mu, kl = x.new_empty(B, S, 2, C, D), x.new_empty((), dtype=accumulator), x.new_empty(B, S, dtype=accumulator)
    seed = x.new_empty(1, dtype=torch.int64)
    arguments = Inputs(z, z, mu, None), Window(task.form.neighborhood, 1e-6), Noise(None, None, seed)
    backends.latents_forward(*arguments)
    if task.direction == "backward":
        backends.latents_backward(*arguments, x, kl, kl)


def _compile(kernel, arguments: dict, target: tuple):
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _source(kernel, arguments)
    return triton.compile(source, target=GPUTarget(*target), options=options)


def key(task: _Task, kernel, arguments: dict) -> str:
    """Return what the result of `compiled` depends on: Triton itself, the sources, what is constant, the target."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, make_backend

    source, options = _source(kernel, arguments)
    backend = make_backend(GPUTarget(*TARGETS[task.target]))
    return get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())


def _source(kernel, arguments: dict) -> tuple:
    """Return a kernel with the types of its arguments, as Triton has it, and the options to compile it with."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[str(value.dtype).removeprefix("torch.")]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif kernel.params[position].is_constexpr or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": arguments["num_warps"]} if "num_warps" in arguments else {}
    return ASTSource(kernel, signature, constants, attributes), options


def _nvidia(compiled) -> dict:
    usage = _tool("cuobjdump", compiled, "--dump-resource-usage")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "double": sum(op.startswith(("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")) for op in _instructions(compiled)),
    }


def _amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    return {
        "registers": int(found["vgpr_count"]),
        "spilled": 4 * int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"]),
        "double": len(re.findall(r"^\s*v_\w+_f64", text, re.MULTILINE)),
    }


def _traffic(compiled, kernel, arguments: dict, task: _Task) -> dict:
    """Count what is in the machine code of NVIDIA's kernels without loops; lanes that hold nothing load nothing."""
    from tvae_kernels.backends.triton.lanes import Plan

    nothing = {"instructions": None, "halo": None, "loaded": None, "stored": None}
    if "cubin" not in compiled.asm or not isinstance(arguments["P"], Plan):
        return nothing
    plan = arguments["P"]
    held, answered = _frames(plan, kernel, task)
    elements = plan.CAPSULES.value * plan.D.value * answered
    threads = 32 * compiled.metadata.num_warps
    used = plan.CAPSULES.value * plan.D.value / plan.LANES.value
    operations = [op for op in _instructions(compiled) if op != "NOP"]

    def moved(name: str) -> float:
        bits = sum(_bits(op) for op in operations if op.startswith(name))
        return bits / 8 * threads * used / elements

    return {
        "instructions": len(operations) * threads / elements,
        "halo": held / answered,
        "loaded": moved("LDG"),
        "stored": moved("STG"),
    }


def _bits(operation: str) -> int:
    """Return the bytes that a load or a store moves."""
    return int((re.search(r"\.[US]?(8|16|64|128)\b", operation) or (0, 32))[1])


def _frames(plan, kernel, task: _Task) -> tuple[int, int]:
    """Return the frames that a program holds, and those whose results it writes."""
    if kernel.fn.__name__.startswith(("whole", "latents")) or plan.RING.value:
        return plan.S.value, plan.S.value
    halos = 1 if task.direction == "forward" or plan.SAVE_R.value else 2
    return plan.FRAMES.value, plan.FRAMES.value - halos * (plan.W.value - 1)


@lru_cache(maxsize=1)
def _instructions(compiled) -> list[str]:
    """Return the operations of the machine code, in order, with their modifiers."""
    text = _tool("nvdisasm", compiled)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)


def _tool(name: str, compiled, *options: str) -> str:
    """Return what a tool of the CUDA toolkit, which comes with Triton, says of a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def floor(name: str, direction: str) -> tuple[int, int]:
    """Elements that a kernel must read and write, an element of the result."""
    return (FLOOR_OF_LATENTS if name.startswith("latents") else FLOOR)[direction]


def record(kernel: Kernel) -> Record:
    """Keep all but the assembler."""
    values = {name: value for name, value in asdict(kernel).items() if name != "text"}
    case = {name: values.pop(name) for name in ("form", "shape", "window", "type", "direction", "name")}
    return Record(case, values.pop("target"), values=values)


def table(result: Result) -> str:
    """Lay out one target of the three alike, and say what holds for all."""
    every = result.records
    shown = [r for r in every if r.variant == "sm_90" and r.values["loaded"] is not None]
    spilled = sum(r.values["spilled"] > 0 for r in every)
    e, names = result.environment, ", ".join(dict.fromkeys(r.variant for r in every))
    text = f"{len(every)} kernels compiled for {names} by triton {e['triton']}, commit {e['commit']}; "
    text += f"{spilled} of them spill registers. Those for sm_90 whose instructions can be counted:"
    return f"{text}\n\n{_table(shown, without=('target', 'spilled'))}"


def full_table(result: Result) -> str:
    """Lay out all targets."""
    return _table(result.records)


TABLES = {"": table, "all": full_table}


def _table(kernels: list[Record], without: tuple[str, ...] = ()) -> str:
    """Lay out a row for each kernel; bytes as counted, and in brackets the least there can be."""
    heads = [name for name in HEADS if name not in without]
    rows = []
    for r in kernels:
        case, values, size = r.case, r.values, getattr(torch, r.case["type"]).itemsize
        reads, writes = floor(case["name"], case["direction"])
        window = f"W {case['window'][0]}, K {case['window'][1]}"
        row = {"problem": f"{case['form']}: {shape(case['shape'])}; {window}", "target": r.variant}
        row |= {name: case[name] for name in ("type", "direction")}
        row |= {name: str(values[name]) for name in ("registers", "spilled", "shared")}
        if values["loaded"] is not None:
            row["instructions"] = f"{values['instructions']:.0f}"
            row["loaded"] = f"{values['loaded']:.1f} ({reads * size})"
            row["stored"] = f"{values['stored']:.1f} ({writes * size})"
        rows.append([row.get(name, "") for name in heads])
    return markdown(heads, rows)
