"""Training, from data to checkpoint, and the run directories that it leaves."""

from .loop import build_optimizer, train, untrained_model
from .run import Run, RunError
from .steps import build_step

__all__ = ["LoggerKind", "Run", "RunError", "build_optimizer", "build_step", "check_logger", "train", "untrained_model"]
