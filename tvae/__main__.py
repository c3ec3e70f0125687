"""The start of the command line, `tvae` or `python -m tvae`: light, so that it can say what goes wrong from here on."""

from __future__ import annotations

import sys


def main() -> int:
    """Import the command line and run it; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # of characters that the terminal's encoding does not have
    try:
        from .cli import main

        return main()
    except ModuleNotFoundError as error:
        advice = 'install what training needs with: pip install "tvae-kernels[train]"'
        print(f"tvae: error: the package {error.name} is missing; {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the command line could handle it
        print("tvae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
