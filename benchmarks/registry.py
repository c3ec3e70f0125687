"""The commands by name. Each is a module of this package, which CONTRIBUTING.md says how to add."""

from importlib import import_module
from types import ModuleType

COMMANDS = (
    "operation",
    "topographies",
    "overhead",
    "machine-code",
    "training",
    "agreement",
    "models",
)


def load(command: str) -> ModuleType:
    """Import the module of a command, and of no other, so that nothing else is in the process that measures."""
    return import_module(f".{command.replace('-', '_')}", __package__)
