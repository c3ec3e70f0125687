"""Triton's interpreter in a hurry, as all other tests use it, against the interpreter as it is."""

from dataclasses import replace

import pytest
import torch

from tvae_kernels import Neighborhood, topographic, topographic_latents


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def results(backend):
    """Of a window of every file of the backend and every way to sum, values and gradients."""
    found = []
    for neighborhood in (
        Neighborhood(3, 2, time_boundary="zero"),
        Neighborhood(3, (1, 2), (0.5, 1), axes=(2, 2), roots="each axis", capsule_boundary="zero"),
        Neighborhood(2, 2, 0.5, roll="fourier"),
    ):
        z, u = normal(1, 3, 2, 4, seed=1), normal(1, 3, 2, 4, seed=2)
        weights = torch.ones(neighborhood.weights_shape, requires_grad=True)
        t = topographic(z, u, 0.3, neighborhood, weights, backend=backend)
        found += [t, *torch.autograd.grad(t.sin().sum(), (z, u, weights))]
    z, u = normal(1, 3, 2, 2, 4, seed=3), normal(1, 3, 2, 2, 4, seed=4)
    torch.manual_seed(0)
    outputs = topographic_latents(z, u, 0.3, Neighborhood(3, 2), backend=backend)
    return [*found, *outputs, *torch.autograd.grad(sum(x.sum() for x in outputs), (z, u))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_a_hurried_interpreter_gives_the_same_bits(triton, monkeypatch):
    from triton.language import core
    from triton.runtime import interpreter

    hurried = results(triton)
    patched, builder = [], interpreter.interpreter_builder
    for place, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (interpreter.GridExecutor, "__call__"),
        (core.tuple, "__init__"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name).__wrapped__)
    patch = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patched.append(fn) or patch(fn))
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=True))
    for actual, expected in zip(hurried, results(triton), strict=True):
        assert torch.equal(actual, expected)
    assert len(patched) > 100  # at every call of a function within the kernels
