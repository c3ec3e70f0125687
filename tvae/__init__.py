"""Topographic VAEs and their rivals: models, data, metrics, training, figures, presets and the command line."""

from __future__ import annotations

from importlib import import_module

__all__ = ["ELBO", "TVAE", "VAE", "BubbleVAE", "SequenceModel", "load", "open_sequences"]


def __getattr__(name: str) -> object:
    # Not imported before they are asked for: the command line starts with this file, and must be able to say that a
    # package is missing, or that it was interrupted, while PyTorch takes its seconds.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".data" if name == "open_sequences" else ".models", __name__), name)
