"""Files that are replaced at once or not at all, whether a process is killed, the disk is full or the power fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of `path` once it is whole and on the disk."""
    partial = path.with_suffix(".partial")
    try:
        yield partial
        sync(partial)  # before it is renamed: after a power cut the name may else stand for an empty file
        os.replace(partial, path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a directory, are on the disk."""
    if os.name != "posix":  # which alone lets directories be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which some file systems say to all that are not files
            raise
    finally:
        os.close(descriptor)
