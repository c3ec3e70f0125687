"""How results are shown: where they were measured, numbers with their units, Markdown tables, links to pictures."""

from __future__ import annotations

from .records import Result

MARKS = {True: "yes", False: "**no**", None: "-"}


def where(result: Result, versions: tuple[str, ...] = ("torch", "triton")) -> str:
    """Say in one line on which machine, with which versions, at which commit and when."""
    e = result.environment
    machine = [e["gpu"] if result.device == "cuda" else e["cpu"]]
    if result.device == "cuda":
        machine += [f"{label} {e[name]}" for label, name in (("driver", "driver"), ("CUDA", "cuda")) if name in e]
    elif result.device == "cpu":
        machine.append(f"{e['threads']} thread{'s' * (e['threads'] != 1)}")
    packages = ", ".join(f"{name} {e[name.lower()]}" for name in versions)
    return f"on {', '.join(machine)}; {packages}; commit {e['commit']}, {e['date'][:10]}."


def milliseconds(microseconds: float) -> str:
    """Write a time as in "2.3 ms"."""
    x = microseconds / 1e3
    return f"{x:.0f} ms" if x >= 100 else f"{x:.3g} ms"


def hours(x: float) -> str:
    """Write a duration in hours, or in minutes if it is less than one."""
    return f"{x:.3g} hours" if x >= 1 else f"{60 * x:.3g} minutes"


def mebibytes(x: int) -> str:
    """Write a size as in "1.5 MiB"."""
    return f"{x / 2**20:.3g} MiB"


def shape(x: tuple[int, ...]) -> str:
    """Write a shape as in "8, 18, 18, 18"."""
    return ", ".join(map(str, x))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Lay out a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(stem: str, result: Result) -> str:
    """Name the picture of a result by what it shows and the machine."""
    return f"{stem}-{result.machine}.png"


def link(text: str, stem: str, result: Result) -> str:
    """Show a picture; the path is that from the root of the repository, until a document is filled."""
    return f"![{text}](docs/{picture(stem, result)})"
