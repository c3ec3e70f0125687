"""Random problems through the front end of Triton's compiler, for a real target: `front_end.py COUNT SEED`.

It is what the interpreter does not do: types are checked, and what a loop carries along must keep its own.
"""

import os
import sys
from collections import Counter

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel's module is first imported

import torch
from hypothesis import HealthCheck, given, seed, settings
from random_problems import Case, cases
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from benchmarks.machine_code import TARGETS, _source
from tvae_kernels import topographic
from tvae_kernels.backends.triton import launch

TARGET = GPUTarget(*TARGETS["sm_90"])


def compile_front(kernel, arguments: dict) -> None:
    """From the source of a kernel to the compiler's first representation."""
    source, options = _source(kernel, arguments)
    backend, context = make_backend(TARGET), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(options)
    source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def launches(case: Case) -> list:
    """What a problem launches forward and backward, on tensors without memory."""
    z, u, mu, weights, dt, _ = case.tensors()
    leaves = [x.to("meta").requires_grad_() if isinstance(x, torch.Tensor) else x for x in (z, u, mu, weights)]
    with launch.recorded() as found:
        t = topographic(*leaves[:3], case.neighborhood, leaves[3], case.eps, "triton", 0 if case.axis else None)
        t.backward(dt.to("meta", t.dtype))
    return found


def main(count: int, number: int) -> None:
    """Take a number of problems, and each of their kernels once."""
    seen, done = Counter(), set()

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(10**6, (torch.float32, torch.float64, torch.bfloat16)))  # what `machine_code` has names of
    def run(case):
        seen["problems"] += 1
        for kernel, _, arguments in launches(case):
            described = kernel.fn.__name__, str({k: getattr(v, "dtype", v) for k, v in arguments.items()})
            if described not in done:
                done.add(described)
                seen[kernel.fn.__name__] += 1
                compile_front(kernel, arguments)

    run()
    print(", ".join(f"{name}: {number}" for name, number in seen.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
