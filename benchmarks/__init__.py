"""Benchmarks: `python -m benchmarks` lists them. Results are JSON files with hardware, versions and every sample."""
