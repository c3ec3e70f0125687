import copy
import pickle

import pytest
import torch

from tvae_kernels import (
    Latents,
    Neighborhood,
    TopographicLayer,
    exchange_halo,
    roll_capsules,
    topographic,
    topographic_latents,
)

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


def test_the_module_itself_takes_what_encoders_say():
    """So that a model may call it, and hooks see every call."""
    z, u = (torch.stack((x, x / 2), 2) for x in inputs())
    layer = TopographicLayer(NEIGHBORHOOD)
    torch.manual_seed(0)
    expected = layer.sample(z, u)
    calls = []
    layer.register_forward_pre_hook(lambda module, arguments: calls.append("before"))
    layer.register_forward_hook(lambda module, arguments, result: calls.append(type(result)))
    torch.manual_seed(0)
    found = layer(z, u)
    assert calls == ["before", Latents]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    noise = tuple(torch.ones(2, *z[:, :, 0].shape))
    assert torch.equal(layer(z, u, noise=noise).t, layer.sample(z, u, noise).t)
    with pytest.raises(ValueError, match="noise is for means and log-variances"):
        layer(z[:, :, 0], u[:, :, 0], noise=noise)


def test_the_parameters_may_be_elsewhere_between_calls():
    """As wrappers of modules do that shard or offload them: only around `forward` they are here."""
    z, u = (torch.stack((x, x / 2), 2) for x in inputs())
    model = torch.nn.ModuleDict({"layer": TopographicLayer(NEIGHBORHOOD, learn_weights=True)})
    layer, kept = model["layer"], {}

    def bring(module, arguments):
        for name, x in module._parameters.items():
            x.data = kept[name]

    def take(module, arguments, result):
        for name, x in module._parameters.items():
            kept[name], x.data = x.data, torch.empty(0)

    take(layer, None, None)
    layer.register_forward_pre_hook(bring)
    layer.register_forward_hook(take)
    assert layer(z, u).t.isfinite().all()


def test_prints_its_settings():
    text = repr(TopographicLayer(NEIGHBORHOOD, eps=0.5, backend="torch"))
    assert text == f"TopographicLayer({NEIGHBORHOOD}, eps=0.5, backend='torch')"


def test_refuses_wrong_settings_when_it_is_built():
    with pytest.raises(TypeError, match="neighborhood must be a Neighborhood, got int"):
        TopographicLayer(18)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference; got 'cuda'"):
        TopographicLayer(NEIGHBORHOOD, backend="cuda")
    for options, error, message in (
        ({"eps": "x"}, ValueError, "eps must be a finite number of at least 0, got 'x'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
        ({"mu_init": "x"}, TypeError, "mu_init must be a number, got 'x'"),
        ({"learn_weights": True, "weights_for_capsules": -1}, ValueError, "weights_for_capsules must be at least 1"),
        ({"learn_weights": True, "weights_for_capsules": 1.5}, TypeError, "weights_for_capsules must be an integer"),
    ):
        with pytest.raises(error, match=message):
            TopographicLayer(NEIGHBORHOOD, **options)


def test_wrong_kinds_of_arguments_are_named():
    z, u = inputs()
    stream = TopographicLayer(Neighborhood(3, causal=True, time_boundary="zero"))
    parameters = torch.stack((z, u), 2)
    noise = torch.ones_like(z)
    roots = Neighborhood(axes=(1, 3), roots="each axis")
    for call, error, message in (
        (
            lambda: roll_capsules(z, torch.tensor(2), NEIGHBORHOOD),
            TypeError,
            r"steps must be a number, got tensor\(2\)",
        ),
        (lambda: roll_capsules(z, float("nan"), NEIGHBORHOOD), ValueError, "steps must be finite, got nan"),
        (lambda: roll_capsules(z.tolist(), 1, NEIGHBORHOOD), TypeError, "t must be a tensor, got list"),
        (lambda: roll_capsules(z[0, 0, 0, 0], 1, NEIGHBORHOOD), ValueError, r"t must be \(..., capsule, dim\)"),
        (lambda: roll_capsules(z, 1, 3), TypeError, "neighborhood must be a Neighborhood, got int"),
        (lambda: roll_capsules(z, 1, roots, axis=True), ValueError, "axis must be one of those .* got True"),
        (lambda: topographic(z, u, 0.0, roots, axis=True), ValueError, "axis must be one of those .* got True"),
        (lambda: topographic(z, u, 0.0, NEIGHBORHOOD, eps="x"), ValueError, "eps must be a finite number"),
        (lambda: topographic(z, u, 0.0, NEIGHBORHOOD, eps=True), ValueError, "eps must be a finite number"),
        (lambda: stream.step(z.tolist(), u), TypeError, "z must be a tensor, got list"),
        (lambda: stream.step(z, u, 3), TypeError, "state must be a tensor, got int"),
        (lambda: stream.step(z[0], u[0]), ValueError, r"z and u must be \(batch, time, capsule, dim\)"),
        (lambda: exchange_halo([1.0], NEIGHBORHOOD), TypeError, "u must be a tensor, got list"),
        (lambda: exchange_halo(u, "x"), TypeError, "neighborhood must be a Neighborhood, got str"),
        (lambda: exchange_halo(u[0, 0, 0, 0], NEIGHBORHOOD), ValueError, r"u must be \(batch, time, ...\)"),
        (
            lambda: topographic_latents(parameters, parameters, noise=(noise * 1j, noise)),
            TypeError,
            "the noise for z must be a floating-point tensor, got torch.complex64",
        ),
        (
            lambda: topographic_latents(parameters, parameters, noise=noise),
            TypeError,
            "noise must be a tensor for z and one for u, got Tensor",
        ),
        (
            lambda: topographic_latents(parameters, parameters, first=0.5),
            TypeError,
            "first must be an integer, got 0.5",
        ),
        (lambda: topographic_latents(parameters, parameters, of="x"), TypeError, "of must be an integer, got 'x'"),
    ):
        with pytest.raises(error, match=message):
            call()
