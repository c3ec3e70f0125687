"""Measure on this machine, write JSON with every sample, and print tables."""

import sys
from collections.abc import Sequence

import tyro
from rich.markdown import Markdown

from . import report
from .measuring import console
from .records import FOLDER, Result
from .registry import COMMANDS, load


def show(result: Result) -> None:
    """Print the tables of a result."""
    command = load(result.command)
    for name in command.SHOWN:
        text = command.TABLES[name](result)
        console.print(Markdown(text) if console.is_terminal else f"{text}\n", markup=False, soft_wrap=True)
    console.print(f"written to {result.file}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names; a whole result in its usual place goes into the report."""
    arguments = sys.argv[1:] if arguments is None else arguments
    named = set(arguments[:1]) & set(COMMANDS) or COMMANDS
    runs = {name: load(name).run for name in COMMANDS if name in named} | {"report": report.run}
    result = tyro.extras.subcommand_cli_from_dict(
        runs,
        prog="python -m benchmarks",
        description=__doc__,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
    if result is not None:
        show(result)
        if result.file.parent == FOLDER and not result.settings.get("match"):
            report.run()


if __name__ == "__main__":
    main()
