"""Files that are replaced at once or not at all, whether a process is killed, the disk is full or the power fails."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # which Windows does not have
    fcntl = None

# What file systems say that cannot wait for a folder, or for anything.
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, whose file takes the place of `path` once it is whole and on the disk.

    It is always the same, so that nothing stays behind for long when a process is killed. Threads and processes that
    replace one file, or two that differ in the suffix, wait for each other.
    """
    partial = path.with_suffix(".partial")
    try:
        with _alone(partial):
            try:
                yield partial
                sync(partial)  # before it is renamed: after a power cut the name may else stand for an empty file
                os.replace(partial, path)
                sync(path.parent)
            except BaseException:
                with suppress(OSError):  # of a folder that may only be read
                    partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial), partial):
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
        raise


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Make a file, and keep all others who ask for it waiting until the context ends."""
    descriptor = None
    while fcntl is not None and (descriptor is None or not _is_open_as(descriptor, path)):
        if descriptor is not None:  # whoever was here before has renamed it, or removed it
            os.close(descriptor)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in (*_CANNOT, errno.ENOLCK):
                os.close(descriptor)
                raise
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # explicitly, for a process that was forked meanwhile has it open, too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Say whether a path is still the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a directory, are on the disk."""
    if os.name != "posix":  # which alone lets directories be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by some text, at once or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def expanded(path: Path) -> Path:
    """Return a path whose ~ is the home folder.

    Raises:
        ValueError: there is none.

    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} is in no folder: {error}") from error


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the CRC-32 of tensors, with their names, types and shapes, and of a text."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), total)
        total = zlib.crc32(x.reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"
