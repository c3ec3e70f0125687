"""The blocks between markers in Markdown files, and the pictures beside them, each made by the command that owns it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from . import records, render
from .records import Result
from .registry import COMMANDS, load

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/performance.md", "docs/rivals.md")
BLOCK = re.compile(r"(<!-- benchmark: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
KINDS = {"cpu": "-cpu", "cuda": "-gpu"}  # of devices, in the names of blocks
MISSING = {"cpu": "Not measured.", "cuda": "Not measured on a GPU.", "none": "Not measured."}


def run() -> None:
    """Fill the benchmark tables of README.md and docs/ and draw the figures, from the results at hand."""
    for file in update():
        print(f"written to {file}")


def update(root: Path = ROOT, folder: Path = records.FOLDER) -> list[Path]:
    """Draw the pictures, and fill the blocks `<!-- benchmark: NAME -->` ... `<!-- end -->` of the documents.

    Args:
        root: of the repository.
        folder: with the results.

    Returns:
        The files written; `blocks` lists the names.

    Raises:
        ValueError: a document asks for a block that there is not.

    """
    results = records.load(folder)
    written = []
    for result in results:
        command = load(result.command)
        if hasattr(command, "draw"):
            file = root / "docs" / render.picture(command.PICTURE, result)
            file.parent.mkdir(exist_ok=True)
            command.draw(result).savefig(file, dpi=100)
            written.append(file)
    for document in (root / name for name in DOCUMENTS):
        if document.exists():
            before = document.read_text(encoding="utf-8")
            after = fill(before, results, Path(os.path.relpath(root / "docs", document.parent)).as_posix())
            if after != before:
                document.write_text(after, encoding="utf-8")
                written.append(document)
    return written


def fill(text: str, results: list[Result], docs: str = "docs") -> str:
    """Make the blocks of a text anew; `docs` is the path from it to the pictures."""
    pictures = "](" if docs == "." else f"]({docs}/"

    def block(match: re.Match) -> str:
        content = render_block(match["name"], results).replace("](docs/", pictures)
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(block, text)


def blocks() -> dict[str, tuple[str, tuple[str, ...], Callable[[Result], str]]]:
    """List all blocks by name: the command that owns it, the devices that it shows, and what makes its table.

    A name is that of the command, then for a single device "cpu" or "gpu", then the key of the table if it has one, as
    in "operation-cpu-targets".
    """
    found = {}
    for name in COMMANDS:
        command = load(name)
        chosen = {"": command.DEVICES} | {KINDS[device]: (device,) for device in command.DEVICES if device in KINDS}
        for kind, devices in chosen.items():
            for table, make in command.TABLES.items():
                found[f"{name}{kind}{'-' * bool(table)}{table}"] = name, devices, make
    return found


def render_block(name: str, results: list[Result]) -> str:
    """Make one block: a part for each machine, and what is missing.

    Raises:
        ValueError: there is no such block.

    """
    if name not in blocks():
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(blocks())}")
    command, devices, make = blocks()[name]
    chosen = [result for result in results if result.command == command and result.device in devices]
    missing = [MISSING[device] for device in devices if device not in {result.device for result in chosen}]
    return "\n\n".join([*map(make, chosen), *missing])
