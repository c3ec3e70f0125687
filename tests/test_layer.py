import copy
import pickle

import pytest
import torch

from tvae_kernels import Neighborhood, TopographicLayer, topographic

NEIGHBORHOOD = Neighborhood(3, 2, shift=-1, causal=True, capsule_boundary="zero")


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 2, 3, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", ["auto", "torch", "reference"])
def test_is_the_function_with_its_own_settings(name):
    z, u = inputs()
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.25, eps=0.5, backend=name)
    assert torch.equal(layer(z, u), topographic(z, u, 0.25, NEIGHBORHOOD, eps=0.5, backend=name))


def test_triton_through_the_layer(triton, device):
    z, u = inputs().to(device)
    layer = TopographicLayer(NEIGHBORHOOD, backend=triton).to(device)
    assert torch.equal(layer(z, u), topographic(z, u, 30.0, NEIGHBORHOOD, backend=triton))


def test_mu_starts_at_thirty_and_learns():
    z, u = inputs()
    layer = TopographicLayer(NEIGHBORHOOD)
    assert {name: p.item() for name, p in layer.named_parameters()} == {"mu": 30.0}
    assert layer.mu.shape == ()
    assert layer.eps == 1e-6
    layer(z, u).sum().backward()
    mu = torch.tensor(30.0, requires_grad=True)
    topographic(z, u, mu, NEIGHBORHOOD).sum().backward()
    assert torch.equal(layer.mu.grad, mu.grad)
    assert layer.mu.grad != 0


def test_state_dict_round_trip():
    layer, other = TopographicLayer(NEIGHBORHOOD, mu_init=1.5), TopographicLayer(NEIGHBORHOOD)
    assert layer.state_dict() == {"mu": torch.tensor(1.5)}
    other.load_state_dict(layer.state_dict())
    z, u = inputs()
    assert torch.equal(other(z, u), layer(z, u))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate):
    z, u = inputs()
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=1.5, eps=0.5, backend="reference")
    twin = duplicate(layer)
    assert (twin.neighborhood, twin.eps, twin.backend) == (NEIGHBORHOOD, 0.5, "reference")
    assert torch.equal(twin(z, u), layer(z, u))
    twin.mu.data.zero_()
    assert layer.mu.item() == 1.5


def test_moves_between_types():
    z, u = inputs(torch.float64)
    layer = TopographicLayer(NEIGHBORHOOD, mu_init=0.1).to(torch.float64)
    assert layer.mu.dtype == layer(z, u).dtype == torch.float64
    assert layer(z.float(), u.float()).dtype == torch.float32  # mu has no axes: it does not promote
    assert layer.half()(z.half(), u.half()).dtype == torch.float16


def test_prints_its_settings():
    text = repr(TopographicLayer(NEIGHBORHOOD, eps=0.5, backend="torch"))
    assert text == f"TopographicLayer({NEIGHBORHOOD}, eps=0.5, backend='torch')"


def test_refuses_wrong_settings_when_it_is_built():
    with pytest.raises(TypeError, match="neighborhood must be a Neighborhood, got int"):
        TopographicLayer(18)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference; got 'cuda'"):
        TopographicLayer(NEIGHBORHOOD, backend="cuda")
