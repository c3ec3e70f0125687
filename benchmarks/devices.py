"""The little that differs between timing on a CPU and on a GPU: clocks, peak memory, caches; and a GPU's latency."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

HEAD_START = 2_000_000  # GPU cycles, about a millisecond, in which the host queues a whole sample


class CpuClock:
    """Has marks that are moments of the host's clock."""

    def start(self) -> None:
        """Get ready for a sample."""

    def mark(self) -> float:
        """Tell the time."""
        return time.perf_counter()

    def microseconds(self, *marks: float) -> list[float]:
        """Give the times between successive marks."""
        return [1e6 * (end - begin) for begin, end in pairwise(marks)]


class CudaClock:
    """Has marks that are events in the GPU's queue; the GPU is kept busy first, so that it never waits for the host."""

    def start(self) -> None:
        """Get ready for a sample."""
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)

    def mark(self) -> torch.cuda.Event:
        """Note when the GPU gets here."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, *marks: torch.cuda.Event) -> list[float]:
        """Give the times between successive marks."""
        torch.cuda.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairwise(marks)]


def clock(device: torch.device) -> CpuClock | CudaClock:
    """Give the clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


def cache_bytes(device: torch.device) -> int:
    """Give the size of the last cache before memory; 32 MiB where a CPU's system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


def peak_memory(device: torch.device, function: Callable[[], object]) -> int:
    """Measure the bytes that `function` has allocated at the worst moment of its run, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else a build for GPUs reports that there is none
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):  # stable: keeps the order within a nanosecond
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def here() -> torch.device:
    """Choose this machine's GPU, or its CPU if it has none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def latency(calls: dict[str, Callable[[], object]], samples: int) -> tuple[dict[str, list[float]], ...]:
    """Take the microseconds on a GPU of one replay of each call's CUDA graph; and those of the host for an eager call.

    Both are by name; "empty" is the replay of a graph with a kernel that does nothing.
    """
    graphs = {"empty": _capture(lambda: torch.cuda._sleep(0))}
    graphs |= {name: _capture(call) for name, call in calls.items()}
    timer = CudaClock()
    replayed, host = ({name: [] for name in chosen} for chosen in (graphs, calls))
    for _ in range(samples):
        for name, graph in graphs.items():
            timer.start()
            begin = timer.mark()
            graph.replay()
            replayed[name] += timer.microseconds(begin, timer.mark())
        for name, call in calls.items():
            torch.cuda.synchronize()
            host[name].append(host_time(call))
    return replayed, host


def host_time(call: Callable[[], object], calls: int = 200) -> float:
    """Take the mean microseconds until `call` returns, of many in a row that wait for nothing in the queue."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - begin) / calls


def _capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up where the capture will run, as PyTorch's notes on CUDA graphs ask
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def rotation(bytes_each: int, cache: int) -> int:
    """Say how many sets of buffers of this size to go through so that none is still in a cache when its turn comes."""
    return max(2, math.ceil(2 * cache / bytes_each))
