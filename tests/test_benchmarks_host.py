"""The benchmarks that need no device: the host's time of a call, and the kernels' machine code."""

import pytest
from benchmarked import written

from benchmarks import machine_code, overhead
from benchmarks.machine_code import Kernel
from benchmarks.records import Record


def test_overhead_launches_nothing_and_puts_everything_back(monkeypatch):
    plain = pytest.importorskip("tvae_kernels.backends.triton.plain", exc_type=ImportError)
    launch = pytest.importorskip("tvae_kernels.backends.triton.launch", exc_type=ImportError)
    monkeypatch.setattr(plain, "whole_forward_kernel", None)  # a launch would fail
    taken = overhead.measure(samples=3, calls=2)
    assert [len(x) for x in taken.values()] == [3] * 6
    assert all(x >= 0 for samples in taken.values() for x in samples)
    with launch.recorded() as launches:
        pass
    assert launches == []
    assert launch.takes_any_device() == launch.interpreted()


def test_the_host_s_time_is_shown_by_call(tmp_path):
    found = [Record(overhead.CASE.fields, "topographic, forward", {"host": [1.0, 98.6, 1000.0]})]
    text = overhead.table(written(tmp_path, "overhead", "none", found))
    assert text.startswith("Measured on a CPU; torch 2, Python 3.11; commit abc, 2026-01-02.\n")
    assert text.endswith("\n| topographic, forward | 99 us |")


def test_kernels_are_shown_with_the_least_that_they_can_move(tmp_path):
    counted = {"registers": 56, "shared": 256, "instructions": 41.6, "halo": 1.0, "loaded": 8.22, "stored": 4.0}
    unknown = dict.fromkeys(("instructions", "halo", "loaded", "stored"))
    case = {"form": "short", "shape": (8, 18, 18, 18), "window": (18, 3), "type": "float32", "direction": "forward"}
    case |= {"name": "whole_forward_kernel", "double": 0, "text": "much"}
    kernels = [
        Kernel(**case, **counted, spilled=0, target="sm_90"),
        Kernel(**case | {"form": "latents", "name": "latents_forward_kernel"}, **counted, spilled=0, target="sm_90"),
        Kernel(**case, **counted, spilled=8, target="sm_80"),
        Kernel(**case, **counted | unknown, spilled=0, target="gfx942"),
    ]
    result = written(tmp_path, "machine-code", "none", [machine_code.record(kernel) for kernel in kernels])
    assert "much" not in result.file.read_text()
    text = machine_code.table(result)
    assert text.startswith("4 kernels compiled for sm_90, sm_80, gfx942 by triton 3, commit abc; 1 of them spill")
    problem, numbers = "8, 18, 18, 18; W 18, K 3 | float32", "42 | 8.2"
    assert f"| short: {problem} | forward | 56 | 256 | {numbers} (8) | 4.0 (4) |" in text
    assert f"| latents: {problem} | forward | 56 | 256 | {numbers} (16) | 4.0 (4) |" in text
    assert text.count("| short: ") == 1  # those of the other targets are not shown
    text = machine_code.full_table(result)
    assert f"| short: {problem} | sm_80 | forward | 56 | 8 | 256 | {numbers} (8) | 4.0 (4) |" in text
    assert f"| short: {problem} | gfx942 | forward | 56 | 0 | 256 |  |  |  |" in text
