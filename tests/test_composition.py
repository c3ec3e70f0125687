"""The operation inside PyTorch's program transformations: torch.compile, torch.export and torch.func."""

import copy

import pytest
import torch

from tvae_kernels import Neighborhood, TopographicLayer, topographic

NEIGHBORHOOD = Neighborhood(5, 3)
SHAPE = (4, 6, 3, 6)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time_boundary", ["circular", "zero"])
def test_compiled_in_one_graph_it_has_the_same_value_and_gradients(dtype, time_boundary):
    neighborhood = Neighborhood(5, 3, time_boundary=time_boundary)
    layer = TopographicLayer(neighborhood, mu_init=0.3, backend="torch")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        z, u = (normal(*SHAPE, seed=s).to(dtype).requires_grad_() for s in (1, 2))
        t = module(z, u)
        t.sin().sum().backward()
        results.append((t, z.grad, u.grad, module.mu.grad))
    for actual, expected in zip(*reversed(results), strict=True):
        # the same operations in the same order: nothing may differ
        assert torch.equal(actual, expected)
        assert expected.abs().sum() > 0


@pytest.fixture(scope="module", params=["torch", "triton"])
def transformed_backend(request):
    return request.getfixturevalue("triton") if request.param == "triton" else request.param


def functions(backend):
    """A scalar function of `(z, mu)` on the backend and on the reference."""
    u = normal(*SHAPE, seed=2)
    return [
        lambda z, mu, b=b: topographic(z, u, mu, NEIGHBORHOOD, backend=b).sin().sum() for b in (backend, "reference")
    ]


def assert_equal_up_to_rounding(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)  # float64 sums of at most 432 terms near 1


def test_func_grad(transformed_backend):
    z, mu = normal(*SHAPE), torch.tensor(0.3, dtype=torch.float64)
    actual, expected = (torch.func.grad(f, argnums=(0, 1))(z, mu) for f in functions(transformed_backend))
    assert_equal_up_to_rounding(actual, expected)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (4, 0)])
def test_vmap_over_z_and_mu(transformed_backend, in_dims):
    z = normal(*SHAPE) if in_dims[0] is None else normal(3, *SHAPE).movedim(0, in_dims[0])
    mu = torch.tensor(0.3, dtype=torch.float64) if in_dims[1] is None else normal(3)
    actual, expected = (torch.vmap(f, in_dims)(z, mu) for f in functions(transformed_backend))
    assert_equal_up_to_rounding(actual, expected)


def test_vmap_over_u_and_weights_without_gradients(transformed_backend):
    z, u = normal(*SHAPE, seed=1), normal(3, *SHAPE, seed=2)
    weights = normal(3, NEIGHBORHOOD.time_window, NEIGHBORHOOD.capsule_window, seed=3).abs()
    with torch.no_grad():
        actual, expected, shared = (
            torch.vmap(lambda u, w, b=b: topographic(z, u, 0.3, NEIGHBORHOOD, w, backend=b), (0, in_dim))(u, w)
            for b, w, in_dim in (
                (transformed_backend, weights, 0),
                ("reference", weights, 0),
                (transformed_backend, weights[0], None),
            )
        )
    assert_equal_up_to_rounding(actual, expected)
    assert_equal_up_to_rounding(shared[0], expected[0])


def test_gradients_of_every_sample_and_of_their_sum(transformed_backend):
    z, mu = normal(3, *SHAPE), normal(3)
    kernel, reference = functions(transformed_backend)
    each = [torch.vmap(torch.func.grad(f, argnums=(0, 1)))(z, mu) for f in (kernel, reference)]
    assert_equal_up_to_rounding(*each)
    total = [torch.func.grad(lambda z, mu, f=f: torch.vmap(f)(z, mu).sum(), (0, 1))(z, mu) for f in (kernel, reference)]
    assert_equal_up_to_rounding(*total)


def test_exported_program_gives_the_same():
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.3)
    z, u = normal(*SHAPE, seed=1).float(), normal(*SHAPE, seed=2).float()
    program = torch.export.export(layer, (z, u)).module()
    torch.testing.assert_close(program(z, u), layer(z, u))
