"""Where a figure was measured: hardware, versions, commit and date."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "lightning-fabric")


def describe() -> dict:
    """Hardware, driver, versions, commit and date, to stand beside every figure."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _output("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> dict:
    if not torch.cuda.is_available():
        return {"gpu": "none: not measured on a GPU"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "gpu memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "gpu cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": query.splitlines()[0] if query else "unknown",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """Return what a command prints; nothing where it is missing or fails."""
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
