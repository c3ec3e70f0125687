"""The start of the command line, `tvae` or `python -m tvae`: light, so that it can say what goes wrong from here on."""

from __future__ import annotations

import os
import signal
import sys
import threading


def main() -> int:
    """Import the command line and run it; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of characters that the terminal's encoding does not have
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    listens = listens and threading.current_thread() is threading.main_thread()
    try:
        if listens:
            signal.signal(signal.SIGINT, _end)
        from .cli import main

        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return main()
    except ModuleNotFoundError as error:
        advice = 'install what training needs with: pip install "tvae-kernels[train]"'
        print(f"tvae: error: the package {error.name} is missing; {advice}", file=sys.stderr)
        return 1
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    """End at once. An exception would not do: what is imported just then may catch it, or make another of it."""
    os.write(2, b"tvae: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
