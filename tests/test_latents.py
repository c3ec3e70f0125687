"""From means and log-variances to `t` and the KL terms: values, gradients, the sampler, and what is refused."""

import math
from functools import cache

import pytest
import torch
from numerics import exhaustive

from tvae_kernels import Latents, Neighborhood, TopographicLayer, topographic, topographic_latents
from tvae_kernels.arguments import compute_dtype

FUSED = {
    "shifting": ((2, 6, 5, 6), Neighborhood(3, 2)),
    "stationary": ((2, 7, 3, 5), Neighborhood(5, 3, shift=0)),
    "whole sequence": ((1, 18, 2, 18), Neighborhood(18, 3)),
    "causal, cut": ((2, 5, 2, 9), Neighborhood(4, 1, causal=True, time_boundary="zero")),
    "one element": ((1, 1, 1, 1), Neighborhood()),
    "many capsules": ((2, 2, 70, 2), Neighborhood(1, 2)),
    "empty": ((0, 3, 2, 3), Neighborhood(2, 1)),
}
COMPOSED = {
    "long": ((1, 33, 2, 4), Neighborhood(5, 2)),
    "diagonals that do not close": ((1, 5, 2, 4), Neighborhood(3, 2)),
    "capsule cut": ((1, 4, 2, 5), Neighborhood(2, 3, capsule_boundary="zero")),
    "padded": ((1, 4, 2, 5), Neighborhood(3, 3, time_boundary="padded", capsule_boundary="padded")),
    "torus": ((2, 3, 1, 12), Neighborhood(2, (3, 2), axes=(3, 4))),
    "roots": ((1, 3, 2, 9), Neighborhood(2, 2, axes=(3, 3), roots="each axis")),
    "fraction": ((1, 4, 2, 4), Neighborhood(3, 1, 0.5)),
}
PROBLEMS = FUSED | COMPOSED


def tensors(shape, neighborhood, dtype, device="cpu", seed=0):
    """`z` and `u` with gradients, `mu`, and noise for both."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    B, S, C, D = shape
    _, S_U, _, D_U = neighborhood.shape_of_u(shape)
    z, u = normal(B, S, 2, C, D).requires_grad_(), normal(B, S_U, 2, C, D_U).requires_grad_()
    mu = torch.tensor(1.5, dtype=compute_dtype(dtype), device=device, requires_grad=True)
    return z, u, mu, (normal(*shape), normal(B, S_U, C, D_U))


def equivalent(z, u, mu, neighborhood, noise, weights=None):
    """What the docstring says, in float64."""
    z, u, mu, noise_z, noise_u = (x.double() for x in (z, u, mu, *noise))
    (z_mean, z_log), (u_mean, u_log) = z.unbind(2), u.unbind(2)
    sample_z, sample_u = z_mean + (z_log / 2).exp() * noise_z, u_mean + (u_log / 2).exp() * noise_u
    t = topographic(sample_z, sample_u, mu, neighborhood, weights, backend="reference")
    kl_z = (z_mean.square() + z_log.exp() - 1 - z_log).sum((-2, -1)) / 2
    kl_u = (u_mean.square() + u_log.exp() - 1 - u_log).sum((-2, -1)) / 2
    return Latents(t, kl_z, kl_u)


def with_gradients(outputs, inputs):
    """The outputs and the gradients of a sum of them, with factors that are no multiples of each other."""
    factors = [torch.linspace(0.5, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) for x in outputs]
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, factors)


def assert_close(found, expected, dtype, terms):
    """By norm: every result is a sum of at most so many terms, behind some thirty other roundings."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        if y.numel():
            eps = torch.finfo(x.dtype).eps if x.dtype == torch.bfloat16 else torch.finfo(compute_dtype(dtype)).eps
            error = (x.double() - y.double()).norm(torch.inf) / y.double().norm(torch.inf).clamp(min=1e-300)
            assert error <= (30 + 3 * terms) * eps


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in FUSED for dtype in (torch.float64, torch.float32)]
    # Of operations that have tests of their own
    + [("padded", torch.float64), ("roots", torch.float64), ("long", torch.float32)]
    + [exhaustive(name, dtype) for name in COMPOSED for dtype in (torch.float64, torch.float32)],
    ids=str,
)
def test_values_and_gradients(backend, device, name, dtype):
    shape, neighborhood = PROBLEMS[name]
    z, u, mu, noise = tensors(shape, neighborhood, dtype, device)
    outputs = topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise)
    assert [x.dtype for x in outputs] == [dtype] * 3
    expected = equivalent(z, u, mu, neighborhood, noise)
    terms = neighborhood.time_window * 9 + shape[2] * shape[3] * 4 + math.prod(shape)
    assert_close(with_gradients(outputs, (z, u, mu)), with_gradients(expected, (z, u, mu)), dtype, terms)


def test_bfloat16_is_computed_in_float32(backend, device):
    shape, neighborhood = FUSED["shifting"]
    z, u, mu, noise = tensors(shape, neighborhood, torch.bfloat16, device)
    outputs = topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise)
    assert [x.dtype for x in outputs] == [torch.bfloat16, torch.float32, torch.float32]
    expected = equivalent(z, u, mu, neighborhood, noise)
    found = with_gradients(outputs, (z, u, mu))
    # dt is rounded to bfloat16 as well, once on each way, and t of the composition is rounded once more
    assert_close(found[1:3], expected[1:], torch.float32, 100)
    for x, y in zip((found[0], *found[3:]), (expected[0], *with_gradients(expected, (z, u, mu))[3:]), strict=True):
        assert (x.double() - y.double()).norm(torch.inf) <= 4 * 2**-8 * y.double().norm(torch.inf)


def test_gradients_of_strided_tensors_and_expanded_gradients(backend, device):
    shape, neighborhood = FUSED["shifting"]
    z, u, mu, noise = tensors(shape, neighborhood, torch.float64, device)
    strided = [torch.stack((x, x), -1)[..., 0].detach().requires_grad_() for x in (z, u)]
    strided[1] = strided[1].detach().transpose(3, 4).contiguous().transpose(3, 4).requires_grad_()
    outputs = topographic_latents(*strided, mu, neighborhood, backend=backend, noise=noise)
    found = torch.autograd.grad(sum(x.sum() for x in outputs), (*strided, mu))
    expected = torch.autograd.grad(sum(x.sum() for x in equivalent(z, u, mu, neighborhood, noise)), (z, u, mu))
    assert_close(found, expected, torch.float64, 300)


@pytest.mark.parametrize("axis", [1, torch.tensor([1, 0])], ids=["all", "each its own"])
def test_a_known_axis_is_the_denominator_alone(backend, device, axis):
    neighborhood = Neighborhood(2, 2, axes=(3, 3), roots="each axis")
    z, u, mu, noise = tensors((2, 3, 2, 9), neighborhood, torch.float64, device)
    axis = axis.to(device) if isinstance(axis, torch.Tensor) else axis
    found = topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise, axis=axis)
    samples = (x[:, :, 0] + (x[:, :, 1] / 2).exp() * y for x, y in zip((z, u), noise, strict=True))
    torch.testing.assert_close(found.t, topographic(*samples, mu, neighborhood, backend="reference", axis=axis))
    with pytest.raises(ValueError, match="axis must be one of those that have a root each, got 1"):
        topographic_latents(*(x.detach()[:1] for x in (z, u)), mu, backend=backend, axis=1)


def test_one_output_alone_has_gradients(backend, device):
    shape, neighborhood = FUSED["stationary"]
    z, u, mu, noise = tensors(shape, neighborhood, torch.float64, device)
    outputs = topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise)
    for x, y in zip(outputs, equivalent(z, u, mu, neighborhood, noise), strict=True):
        found, expected = (
            torch.autograd.grad(a.square().sum(), (z, u, mu), retain_graph=True, allow_unused=True) for a in (x, y)
        )
        for gradient, wanted in zip(found, expected, strict=True):
            wanted = torch.zeros_like(gradient) if wanted is None and gradient is not None else wanted
            if gradient is not None:
                torch.testing.assert_close(gradient, wanted)


def test_gradcheck(backend, device):
    neighborhood = Neighborhood(2, 2)
    z, u, mu, noise = tensors((1, 3, 2, 3), neighborhood, torch.float64, device)

    def call(z, u, mu):
        return topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise)

    assert torch.autograd.gradcheck(call, (z, u, mu), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (z, u, mu), fast_mode=True)


def test_gradient_of_a_gradient_needs_the_noise(triton, device):
    shape, neighborhood = FUSED["shifting"]
    z, u, mu, _ = tensors(shape, neighborhood, torch.float32, device)
    t = topographic_latents(z, u, mu, neighborhood, backend=triton).t
    with pytest.raises(RuntimeError, match="give it to differentiate the gradient"):
        torch.autograd.grad(t.sum(), z, create_graph=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_layer_samples_with_its_settings(backend, device, weighted):
    shape, neighborhood = FUSED["shifting"]
    z, u, _, noise = tensors(shape, neighborhood, torch.float32, device)
    layer = TopographicLayer(neighborhood, mu_init=3, eps=0.25, backend=backend, learn_weights=weighted).to(device)
    found = layer.sample(z, u, noise)
    t = layer(z[:, :, 0] + (z[:, :, 1] / 2).exp() * noise[0], u[:, :, 0] + (u[:, :, 1] / 2).exp() * noise[1])
    torch.testing.assert_close(found.t, t)


def test_what_a_lane_cannot_hold_is_composed(triton, device):
    from tvae_kernels.backends.triton import launch

    for problems, fused in ((FUSED, True), (COMPOSED, False)):
        for name, (shape, neighborhood) in problems.items():
            if 0 in shape:
                continue  # nothing is launched for an empty batch
            z, u, mu, _ = tensors(shape, neighborhood, torch.float32, device)
            with launch.recorded() as launches:
                topographic_latents(z, u, mu, neighborhood, backend=triton)
            names = [launched.kernel.fn.__name__ for launched in launches]
            assert ("latents_forward_kernel" in names) == fused, name
            assert len(names) == 1, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so
@pytest.mark.parametrize("given", [False, exhaustive(True)])
def test_compiled_in_one_graph(backend, device, given):
    shape, neighborhood = FUSED["stationary"]
    z, u, mu, noise = tensors(shape, neighborhood, torch.float32, device)
    noise = noise if given else None

    def call(z, u, mu):
        return topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise)

    torch.compiler.reset()
    torch.manual_seed(1)
    expected = with_gradients(call(z, u, mu), (z, u, mu))
    torch.manual_seed(1)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(with_gradients(compiled(z, u, mu), (z, u, mu)), expected, torch.float32, 100)


def test_under_torch_func(backend, device):
    shape, neighborhood = FUSED["shifting"]
    z, u, mu, noise = tensors(shape, neighborhood, torch.float64, device)

    def loss(z):
        return sum(x.square().sum() for x in topographic_latents(z, u, mu, neighborhood, backend=backend, noise=noise))

    (expected,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), expected)


# --- the sampler ------------------------------------------------------------------------------------------------------

SHAPE = (4, 16, 8, 8)  # few programs, which take the interpreter a second each


@cache
def drawn(backend, device, shape=SHAPE, first=0, of=None, gradients=False):
    """The noise of `z` and of `u`, found out through what is made of it: `t`, or else the gradients."""
    B, S, C, D = shape
    neighborhood = Neighborhood()  # a window of one element: t = (z - mu) / |u|
    z, u = torch.zeros(2, B, S, 2, C, D, device=device)
    z[:, :, 0] += 10  # so that no sample changes its sign
    u[:, :, 0] += 10
    nothing = torch.full((B, S, 1, C, D), -torch.inf, device=device)  # a variance of 0: the mean itself
    noise = []
    for which in (0, 1):
        torch.manual_seed(7)
        one_z, one_u = (torch.cat((x[:, :, :1], nothing), 2) if i != which else x for i, x in enumerate((z, u)))
        one_z, one_u = (x.detach().requires_grad_() for x in (one_z, one_u))
        t = topographic_latents(one_z, one_u, 0.0, neighborhood, eps=0.0, backend=backend, first=first, of=of).t
        if gradients:
            (gradient,) = torch.autograd.grad(t.sum(), (one_z, one_u)[which])
            noise.append(2 * gradient[:, :, 1] / gradient[:, :, 0])
        else:
            noise.append((t * 10 if which == 0 else 10 / t).detach() - 10)
    return noise


def test_noise_is_normal(backend, device):
    for x in drawn(backend, device):
        n = x.numel()
        moments = [x.pow(k).mean().item() for k in (1, 2, 3, 4)]
        spread = [1, 2, 15, 96]  # variances of the powers of a normal variable
        for moment, expected, variance in zip(moments, (0, 1, 0, 3), spread, strict=True):
            assert abs(moment - expected) <= 5 * math.sqrt(variance / n)  # once in a million
        uniform = torch.special.ndtr(x.double().flatten()).sort().values.cpu()
        ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
        assert (uniform - ranks).abs().max() <= 2.7 / math.sqrt(n)  # Kolmogorov and Smirnov: once in a million


def test_noise_is_independent_between_elements_variables_and_steps(backend, device):
    z, u = drawn(backend, device)
    pairs = {"z and u": (z, u)}
    for axis, name in enumerate(("sequence", "frame", "capsule", "position")):
        for distance in (1, 2, 3):
            for x, which in ((z, "z"), (u, "u")):
                pairs[f"{which}, {name} {distance}"] = (
                    x.narrow(axis, distance, x.shape[axis] - distance),
                    x.narrow(axis, 0, x.shape[axis] - distance),
                )
    for name, (x, y) in pairs.items():
        for power in (1, 2):
            a, b = ((v.pow(power) - v.pow(power).mean()) for v in (x, y))
            correlation = (a * b).mean() / (a.std() * b.std())
            assert abs(correlation) <= 5 / math.sqrt(a.numel()), name


def test_noise_follows_the_seed(backend, device):
    shape, neighborhood = FUSED["shifting"]
    z, u, mu, _ = tensors(shape, neighborhood, torch.float32, device)

    def t():
        return topographic_latents(z, u, mu, neighborhood, backend=backend).t.detach()

    torch.manual_seed(3)
    first, second = t(), t()
    torch.manual_seed(3)
    assert torch.equal(t(), first)
    assert torch.equal(t(), second)
    assert not torch.isclose(first, second).any()


def test_the_backward_pass_draws_the_same_noise_again(backend, device):
    part = (2, *SHAPE[1:]), 1, 4
    forwards, backwards = drawn(backend, device, *part), drawn(backend, device, *part, gradients=True)
    for forward, backward in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-4)  # 10 ± 1, minus 10, in float32


def test_parts_of_a_batch_share_its_noise(backend, device):
    whole = drawn(backend, device)
    part = drawn(backend, device, (2, *SHAPE[1:]), 1, 4)
    for x, y in zip(part, whole, strict=True):
        torch.testing.assert_close(x, y[1:3])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_errors(backend):
    z = torch.zeros(2, 3, 2, 4, 5)
    n = Neighborhood(3, 1)
    with pytest.raises(ValueError, match=r"z must be \(batch, time, 2, capsule, dim\), got \(2, 3, 4, 5\)"):
        topographic_latents(z[:, :, 0], z, 0.0, n, backend=backend)
    with pytest.raises(ValueError, match=r"u must be \(batch, time, 2, capsule, dim\), got \(2, 3, 3, 4, 5\)"):
        topographic_latents(z, torch.zeros(2, 3, 3, 4, 5), 0.0, n, backend=backend)
    with pytest.raises(TypeError, match="u must be a tensor, got NoneType"):
        topographic_latents(z, None, 0.0, n, backend=backend)
    with pytest.raises(ValueError, match="4"):
        topographic_latents(z, z, 0.0, Neighborhood(4), backend=backend)
    with pytest.raises(ValueError, match=r"noise must be \(2, 3, 4, 5\) and \(2, 3, 4, 5\), got \(2, 3, 4\) and"):
        topographic_latents(z, z, 0.0, n, backend=backend, noise=(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5)))
    with pytest.raises(ValueError, match="2 sequences from number 3 on are not in a batch of 4"):
        topographic_latents(z, z, 0.0, n, backend=backend, first=3, of=4)
