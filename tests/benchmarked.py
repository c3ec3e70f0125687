"""Results for the tests of the benchmarks, with times that are easy to compute with."""

from pathlib import Path

from benchmarks import records
from benchmarks.problems import FLOOR, Case
from benchmarks.records import Record, Result

ENVIRONMENT = {"cpu": "a CPU", "threads": 2, "gpu": "NVIDIA Tiny", "driver": "1", "cuda": "13", "torch": "2"}
ENVIRONMENT |= {"triton": "3", "python": "3.11", "commit": "abc", "date": "2026-01-02T03:04:05+00:00"}
CASE = Case((8, 18, 18, 18), 18, 3)
BYTES = CASE.tensor_bytes
CPU_TIMES = {"torch": 2e3, "torch compiled": 1e3, "reference": 8e3, "reference compiled": 4600.0, "copy": 100.0}
GPU_TIMES = {
    "triton": 10.0,
    "reference": 101.0,
    "reference compiled": 30.0,
    "reference max-autotune": 20.0,
    "copy": 9.0,
}


def written(folder: Path, command: str, device: str, found: list[Record], **settings) -> Result:
    """Write a result and read it again."""
    file = records.path(command, ENVIRONMENT, device, folder)
    Result(file, command, ENVIRONMENT, device, "us", settings, found).write()
    return Result.read(file)


def operation_records(ours: str, times: dict[str, float], memory: float, case: Case = CASE) -> list[Record]:
    """One case, where every peer's samples are around its time in microseconds."""
    kept = {"forward": int(memory * 3 * BYTES), "both": int(memory * 6 * BYTES)}
    samples = {peer: {way: [0.5 * x, x, 4 * x] for way in FLOOR} for peer, x in times.items()}
    return [Record(case.fields, peer, x, kept if peer == ours else {}) for peer, x in samples.items()]


def operation_result(folder: Path, device: str, times: dict[str, float], memory: float) -> Result:
    """A result with one case, on which the convolution could not run."""
    ours = {"cpu": "torch", "cuda": "triton"}[device]
    broken = [] if "convolution" in times else [Record(CASE.fields, "convolution", not_measured="it broke")]
    return written(folder, "operation", device, operation_records(ours, times, memory) + broken, ours=ours)


def training_records(
    preset: str, batch: int, times: dict[str, float], products: float, replayed: float | None = None
) -> list[Record]:
    """A case whose steps take so many milliseconds, a tenth of them for data."""
    case = {"preset": preset, "batch_size": batch}
    shares = {"data": 100, "forward": 300, "backward": 500, "optimiser": 100}
    samples = {name: {stage: [x * t] * 3 for stage, x in shares.items()} for name, t in times.items()}
    if replayed is not None:
        samples["graph"] = {"data": [0.0, 0.0], "replay": [1e3 * replayed] * 2}
    return [
        *(Record(case, name, x, {"step": 2**20}, 0.5, {"frames": 18 * batch}) for name, x in samples.items()),
        Record(case, "products", {"products": [1e3 * products] * 2}),
        Record(case, "convolution", not_measured="it broke"),
    ]
