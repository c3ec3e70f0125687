"""How far long work is: a bar on a terminal, and lines now and then where the output is a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS = 30.0  # between two lines
SOON = 2.0  # seconds before work that is not over is worth a line
Show = Callable[..., None]


@contextmanager
def progress(
    work: str, total: int, done: int = 0, console: Console | None = None, visible: bool = True
) -> Iterator[Show]:
    """Show how far some work is; give a function of how much is done, and of a text about it.

    Args:
        work: what is done, as "training".
        total: of what is done, when all is.
        done: how much of it was done before.
        console: where to show it; None is standard output.
        visible: whether to show it at all.

    """
    console = console or Console()
    if not visible:
        yield lambda done, text="": None
    elif console.is_terminal:
        columns = (TextColumn(work, markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda done, text="": bar.update(task, completed=done, description=text)
    else:
        yield _lines(work, total, done, console)


@contextmanager
def phase(work: str, console: Console) -> Iterator[None]:
    """Show that some work is done meanwhile, of which nobody knows how much there is, where it takes its time."""
    if console.is_terminal:
        with console.status(Text(work)):
            yield
        return

    def say() -> None:
        console.print(Text(f"{work} ..."), soft_wrap=True)
        console.file.flush()

    timer = threading.Timer(SOON, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _lines(work: str, total: int, first: int, console: Console) -> Show:
    """Print a line at the start, every so often, and at the end."""
    start = last = time.monotonic()
    ended = False

    def say(done: int, text: str) -> None:
        line = f"{work}: {done:,} of {total:,}{', ' if text else ''}{text}"
        console.print(Text(line), soft_wrap=True)
        console.file.flush()

    def show(done: int, text: str = "") -> None:
        nonlocal last, ended
        now = time.monotonic()
        if (done < total or ended) and now - last < SECONDS:
            return
        last, ended = now, done >= total
        if first < done < total:
            left = (now - start) / (done - first) * (total - done)
            text += f"{', ' if text else ''}{left / 60:.0f} minutes left"
        say(done, text)

    say(first, "")
    return show
