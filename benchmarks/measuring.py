"""What all commands do alike: choose cases, take them one by one, show progress, write results, sample in turn."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import records
from .environment import describe
from .records import Record, Result

FEWEST_SAMPLES = 3
PAUSE = 30  # seconds between lines of progress in a file
Say = Callable[[str], object]
console = Console()


def silent(what: str) -> None:
    """Say nothing: the default of everything that takes a `Say`."""


class Case(Protocol):
    """Says what is measured at once."""

    @property
    def name(self) -> str:
        """Tell a person which case it is."""

    @property
    def fields(self) -> dict:
        """Say in a record which case it is."""


def measure_all(
    command: str,
    cases: Sequence[Case],
    measure: Callable[[Case, Say], list[Record]],
    device: str,
    settings: Mapping[str, object],
    output: Path | None = None,
    resume: bool = False,
    unit: str = "us",
) -> Result:
    """Measure every case and write the result after each.

    Args:
        command: of `python -m benchmarks`.
        cases: what to measure.
        measure: makes the records of a case, and says what it is doing.
        device: as in a `Result`.
        settings: as in a `Result`.
        output: the file; by default that of the command and the machine in `records.FOLDER`.
        resume: keep the cases that the file has already.
        unit: as in a `Result`.

    Returns:
        The result as it was written.

    Raises:
        SystemExit: the file to resume is of another machine, of other versions or of another commit.

    """
    environment = describe()
    file = output or records.path(command, environment, device)
    result = Result(file, command, environment, device, unit, dict(settings))
    if resume and file.exists():
        before = Result.read(file)
        changed = [name for name in environment if name != "date" and before.environment.get(name) != environment[name]]
        if changed:
            raise SystemExit(f"cannot resume: {', '.join(changed)} changed since the file was written")
        result.environment, result.records = before.environment, before.records
    done = {records.key(record.case) for record in result.records}
    with progress(command, len(cases)) as show:
        for number, case in enumerate(cases):
            if records.key(case.fields) not in done:
                show(number, case.name)
                result.add(measure(case, lambda what, number=number, case=case: show(number, f"{case.name}: {what}")))
            show(number + 1, case.name)
    return Result.read(file)


def matching(cases: Sequence[Case], match: str) -> list[Case]:
    """Choose the cases whose names contain a regular expression.

    Raises:
        SystemExit: there is none.

    """
    chosen = [case for case in cases if re.search(match, case.name)]
    if not chosen:
        raise SystemExit(f"no case matches {match!r}; there is {cases[0].name!r}, for one")
    return chosen


@contextmanager
def progress(
    title: str,
    total: int,
    console: Console = console,
    pause: float = PAUSE,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int, str], None]]:
    """Show how many cases are done and what is being done: in a bar, or where no terminal is in a line now and then.

    Args:
        title: of the work.
        total: the number of cases.
        console: where.
        pause: seconds between lines.
        clock: tells seconds.

    Yields:
        A function of the number of cases done and of what is being done.

    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done, what: bar.update(task, completed=done, description=what)
        return
    begin = last = clock()
    console.print(f"{title}: {total} case{'s' * (total != 1)}", soft_wrap=True)

    def show(done: int, what: str) -> None:
        nonlocal last
        if clock() - last >= pause:
            last = clock()
            console.print(f"{title}: {done} of {total} after {last - begin:.0f} s; {what}", soft_wrap=True)

    yield show
    console.print(f"{title}: done after {clock() - begin:.0f} s", soft_wrap=True)


def in_turn(
    timed: Mapping[str, Callable[[int], list[dict[str, float]]]],
    samples: int,
    say: Say = silent,
    *,
    patience: float,
    block: int = 1,
    skipped: int = 0,
) -> dict[str, dict[str, list[float]]]:
    """Take samples of every variant in turn after a warm-up, so that what disturbs one disturbs all.

    Args:
        timed: by variant what takes so many samples one after the other, each the microseconds of every stage.
        samples: of each variant, fewer of the slow ones.
        say: what is being done.
        patience: microseconds of samples after which a slow variant is not sampled further.
        block: samples of a variant before it is another's turn.
        skipped: samples at the start of a block that are not counted, for the caches are full of another's data.

    Returns:
        By variant and stage the samples.

    """
    say("warm up")
    first = {name: sum(take(1)[0].values()) for name, take in timed.items()}
    left = {name: min(samples, max(FEWEST_SAMPLES, int(patience / time))) for name, time in first.items()}
    taken = {name: [] for name in timed}
    while any(left.values()):
        say(f"time {samples - max(left.values())} of {samples}")
        for name, take in timed.items():
            count = min(block, left[name])
            left[name] -= count
            if count:
                taken[name] += take(skipped + count)[skipped:]
    return {name: {stage: [x[stage] for x in rows] for stage in rows[0]} for name, rows in taken.items()}


def reason(error: Exception) -> str:
    """Say in one line why something could not be measured."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
