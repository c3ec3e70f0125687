"""The choice of a backend, and of the file of it that a window is for: made here and nowhere else.

    form      the windows it is for                                        torch/       triton/
    plain     whole positions along one axis, alike in all capsules        plain.py     plain.py
    taps      any taps, out of a table                                     taps.py      taps.py
    fourier   rolls by phase shifts                                        fourier.py   fourier.py

Every file has the same two functions, `forward(inputs, window, save_r)` and `backward(inputs, window, r, dt)`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import torch as pytorch  # `torch` is the folder of this package
from torch import Tensor

from ..arguments import Inputs, Noise, Window, compute_dtype
from ..neighborhood import Neighborhood
from .operators import operator
from .tables import shape_of_r
from .torch import fourier, plain, taps

BACKENDS = ("auto", "triton", "torch", "reference")
BACKEND_VARIABLE = "TVAE_KERNELS_BACKEND"
_FILES = {("torch", "plain"): plain, ("torch", "taps"): taps, ("torch", "fourier"): fourier}


class BackendUnavailableError(RuntimeError):
    """The requested backend cannot run here; the message says why and what to use instead."""


def resolve_backend(backend: str, device: pytorch.device) -> str:
    """Return the backend that will run for tensors on `device`: "triton", "torch" or "reference".

    Raises:
        ValueError: `backend`, or the environment variable that overrides "auto", names no backend.
        BackendUnavailableError: it cannot run on this device.

    """
    source = "backend"
    if backend == "auto" and BACKEND_VARIABLE in os.environ:
        backend, source = os.environ[BACKEND_VARIABLE], f"the environment variable {BACKEND_VARIABLE}"
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and _triton_installed() else "torch"
    if backend == "triton":
        _check_triton(device)
    return backend


def _triton_installed() -> bool:
    if "triton" in sys.modules:  # the search takes longer than a launch
        return sys.modules["triton"] is not None
    return importlib.util.find_spec("triton") is not None


def _check_triton(device: pytorch.device) -> None:
    advice = 'use backend="torch" or backend="auto"'
    if not _triton_installed():
        raise BackendUnavailableError(f"the triton backend needs the package triton, which is not installed: {advice}")
    if device.type != "cuda":
        from .triton import launch

        if not launch.takes_any_device():
            raise BackendUnavailableError(
                f"the triton backend runs on GPU tensors, and these are on {str(device)!r}: {advice}, or set "
                "TRITON_INTERPRET=1 before the first import to run the kernels through Triton's interpreter"
            )


def form(neighborhood: Neighborhood, weights: Tensor | None) -> str:
    """Return the stem of the file that a window is for, in every backend."""
    if neighborhood.is_plain:
        return "plain" if weights is None else "taps"
    return "fourier" if neighborhood.by_phase else "taps"


def implementation(backend: str, stem: str) -> ModuleType:
    """Return a file of a backend. Those of Triton are imported when one is first used: the package does without."""
    found = _FILES.get((backend, stem))
    if found is None:
        _import_triton()
        found = _FILES[backend, stem]
    return found


def _import_triton() -> None:
    from .triton import fourier, latents, plain, taps

    files = {"plain": plain, "taps": taps, "fourier": fourier, "latents": latents}
    _FILES.update({("triton", stem): file for stem, file in files.items()})


# --- what compilers see as operators ----------------------------------------------------------------------------------


def _looked_into(backend: str, inputs: Inputs, window: Window, *_) -> bool:
    """Say whether compilers trace the PyTorch operations: plain windows; and by phase where a program is exported.

    An exported program then needs nothing of this package.
    """
    stem = form(window.neighborhood, inputs.weights)
    if backend != "torch" or stem == "taps":
        return False
    return stem == "plain" or not pytorch.compiler.is_dynamo_compiling()


def _fake_forward(backend: str, inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    z, stem = inputs.z, form(window.neighborhood, inputs.weights)
    if save_r and backend == "triton" and stem == "plain":
        save_r = implementation(backend, stem).keeps_r(inputs, window.neighborhood)
    shape = shape_of_r(z, window.neighborhood)
    r = pytorch.empty(shape, dtype=compute_dtype(z.dtype), device=z.device) if save_r else None
    return _empty(z), r


@operator("topographic_forward", _fake_forward, _looked_into)
def forward(backend: str, inputs: Inputs, window: Window, save_r: bool) -> tuple[Tensor, Tensor | None]:
    """Return `t`, and what `backward` is to be given: `r`, as `tables.shape_of_r` says, or None if it needs none.

    Args:
        backend: "triton" or "torch".
        inputs: promoted.
        window: the taps and `eps`.
        save_r: whether there will be a backward pass.

    """
    return implementation(backend, form(window.neighborhood, inputs.weights)).forward(inputs, window, save_r)


def _fake_backward(
    backend: str, inputs: Inputs, window: Window, r: Tensor | None, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    z, u, mu, weights = inputs
    return _empty(z), _empty(u), _empty(mu), None if weights is None else _empty(weights)


@operator("topographic_backward", _fake_backward, _looked_into)
def backward(
    backend: str, inputs: Inputs, window: Window, r: Tensor | None, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of the inputs, each of the shape and type of its own; of no weights None."""
    return implementation(backend, form(window.neighborhood, inputs.weights)).backward(inputs, window, r, dt)


def fuses_latents(backend: str, inputs: Inputs, window: Window) -> bool:
    """Say whether the backend has kernels from the encoders' outputs to `t` and the KL terms of this problem."""
    if backend != "triton" or form(window.neighborhood, inputs.weights) != "plain":
        return False
    from .triton import latents  # as a statement, which compilers can trace

    return latents.fits(inputs, window.neighborhood)


def _fake_latents_forward(inputs: Inputs, window: Window, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    z = inputs.z
    kl_z, kl_u = (pytorch.empty(z.shape[:2], dtype=compute_dtype(z.dtype), device=z.device) for _ in range(2))
    return pytorch.empty((*z.shape[:2], *z.shape[3:]), dtype=z.dtype, device=z.device), kl_z, kl_u


@operator("latents_forward", _fake_latents_forward)
def latents_forward(inputs: Inputs, window: Window, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
    """Return `t` and the KL terms of every frame, `(B, S)`, of what `fuses_latents` accepts.

    Args:
        inputs: of means and log-variances, `(B, S, 2, C, D)`.
        window: the taps and `eps`.
        noise: given, contiguous, or a seed to draw it with.

    """
    return implementation("triton", "latents").forward(inputs, window, noise)


def _fake_latents_backward(inputs: Inputs, window: Window, noise: Noise, dt, dkl_z, dkl_u):
    return _empty(inputs.z), _empty(inputs.u), _empty(inputs.mu)


@operator("latents_backward", _fake_latents_backward)
def latents_backward(
    inputs: Inputs, window: Window, noise: Noise, dt: Tensor, dkl_z: Tensor, dkl_u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `z`, `u` and `mu`, from the arguments of `latents_forward` and of its results."""
    return implementation("triton", "latents").backward(inputs, window, noise, dt, dkl_z, dkl_u)


def _empty(x: Tensor) -> Tensor:
    return pytorch.empty(x.shape, dtype=x.dtype, device=x.device)
