"""Sizes, initialisation, likelihoods, the ELBO and the generative functions of the models."""

import math

import pytest
import torch
from torch import distributions as D

from tvae import TVAE, VAE, BubbleVAE
from tvae.models import Gaussian, kl_from_prior
from tvae_kernels import Neighborhood, roll_capsules, topographic

SHAPE = (2, 5, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def models():
    yield VAE(SHAPE, 3, 6)
    yield TVAE(SHAPE, 3, 6, Neighborhood(4, 3), mu_init=5.0)
    yield BubbleVAE(SHAPE, 3, 6, Neighborhood(3, 1, shift=0), likelihood="gaussian")
    yield TVAE(SHAPE, 3, 6, Neighborhood(4, 3), weights="normalised")
    yield VAE(SHAPE, 3, 6, weights="projected")


@pytest.fixture(params=range(5), ids=["VAE", "TVAE", "BubbleVAE", "normalised TVAE", "projected VAE"])
def model(request):
    return list(models())[request.param]


@pytest.fixture
def x():
    return torch.rand(2, 7, *SHAPE)


@pytest.mark.parametrize(
    ("image_shape", "capsules", "sizes"),
    [((3, 28, 28), 18, (2352, 972, 648, 648, 324)), ((1, 64, 64), 15, (4096, 675, 450, 450, 225))],
    ids=["mnist", "dsprites"],
)
def test_layers_have_the_sizes_and_the_initialisation_of_the_paper(image_shape, capsules, sizes):
    model = TVAE(image_shape, capsules, capsules, Neighborhood(capsules, 1))
    pixels, first, second, last, latent = sizes
    for encoder in (model.z_encoder, model.u_encoder):
        assert [m.weight.shape for m in encoder[::2]] == [(first, pixels), (second, first), (last, second)]
    assert [m.weight.shape for m in model.decoder[::2]] == [(second, latent), (first, second), (pixels, first)]
    for layer in [*model.z_encoder[::2], *model.decoder[::2]]:
        bound = 1 / math.sqrt(layer.in_features)
        largest = layer.weight.abs().max().item()
        assert 0.99 * bound < largest <= bound * (1 + 1e-6)  # the largest of > 100,000 uniform draws
        # standard deviation of U(±a) is a/√3; of n draws it is known to about 1/√n
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(layer.weight.numel()))
        assert layer.bias.abs().max() <= bound * (1 + 1e-6)
    assert model.topographic.mu.item() == 30


def test_normalised_weights_start_where_free_ones_do_and_are_a_length_times_a_direction():
    layers = []
    for weights in ("free", "normalised"):
        torch.manual_seed(4)
        layers.append(VAE(SHAPE, 3, 6, weights=weights).decoder[0])
    free, normalised = layers
    torch.testing.assert_close(normalised.weight, free.weight)
    names = dict(normalised.named_parameters())
    g, v = names["parametrizations.weight.original0"], names["parametrizations.weight.original1"]
    with torch.no_grad():
        v.mul_(7)
        g.copy_(torch.arange(1, len(g) + 1)[:, None])
    torch.testing.assert_close(normalised.weight.norm(dim=1), torch.arange(1.0, len(g) + 1))
    torch.testing.assert_close(normalised.weight / g, free.weight / free.weight.norm(dim=1, keepdim=True))


def test_projected_weights_are_of_norm_one_from_the_start_and_after_a_projection(x):
    model = TVAE(SHAPE, 3, 6, Neighborhood(4, 3), weights="projected")
    layers = [m for net in (model.z_encoder, model.u_encoder, model.decoder) for m in net[::2]]
    before = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(torch.linspace(0.5, 3, len(layer.weight))[:, None])
    model.project_weights()
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(len(weight)))
        torch.testing.assert_close(layer.weight, weight)


def test_only_projected_weights_are_projected():
    model = VAE(SHAPE, 3, 6)
    before = model.decoder[0].weight.clone()
    model.project_weights()
    assert torch.equal(model.decoder[0].weight, before)


def test_elbo_is_its_terms_at_the_returned_sample(model, x):
    torch.manual_seed(1)
    elbo = model(x)
    decoded = model.decode(elbo.t)
    if isinstance(model.likelihood, Gaussian):
        p = D.Normal(decoded, 1.0)
    else:
        p = D.Bernoulli(logits=decoded, validate_args=False)
    torch.testing.assert_close(elbo.log_likelihood, p.log_prob(x).flatten(2).sum(2))
    posteriors = model.posterior(x)
    for term, q in zip((elbo.kl_z, elbo.kl_u), posteriors, strict=True):
        if q is None:
            assert torch.equal(term, torch.zeros(2, 7))
        else:
            expected = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum((2, 3))
            torch.testing.assert_close(term, expected)
    torch.testing.assert_close(elbo.total, elbo.log_likelihood - elbo.kl_z - elbo.kl_u)


def test_t_is_the_topographic_variable_of_the_sampled_z_and_u(x):
    model = list(models())[1]
    torch.manual_seed(1)
    t = model.encode(x)
    torch.manual_seed(1)
    qz, qu = model.posterior(x)
    z, u = qz.rsample(), qu.rsample()
    expected = topographic(z, u, model.topographic.mu, Neighborhood(4, 3), backend="reference")
    torch.testing.assert_close(t, expected)


def test_parts_of_a_batch_draw_the_noise_of_the_whole():
    model = TVAE((1, 4, 4), 3, 5, Neighborhood(3, 2))
    x = torch.rand(5, 4, 1, 4, 4)
    torch.manual_seed(0)
    whole = model(x)
    torch.manual_seed(0)
    part = model(x[2:4], first=2, of=5)
    for found, expected in zip(part[:4], whole[:4], strict=True):
        torch.testing.assert_close(found, expected[2:4])


def test_without_sampling_t_is_taken_at_the_means_of_z_and_of_u_squared(x):
    model = list(models())[1]
    qz, qu = model.posterior(x)
    draws = torch.stack([qu.sample().square() for _ in range(4000)])
    # the mean of 4,000 squares is known to √2 · 1.6 (their spread, at most) / √4000: 4 % to about 1 standard deviation
    expected = topographic(qz.mean, draws.mean(0).sqrt(), model.topographic.mu, Neighborhood(4, 3))
    torch.testing.assert_close(model.encode(x, sample=False), expected, rtol=0.05, atol=1e-6)


def test_vae_has_no_topography(x):
    model = VAE(SHAPE, 3, 6)
    torch.testing.assert_close(model.encode(x, sample=False), model.posterior(x)[0].mean)


def test_encoder_reads_means_first_and_log_variances_second(x):
    model = VAE(SHAPE, 3, 6)
    out = model.z_encoder(x.flatten(2))
    q, _ = model.posterior(x)
    torch.testing.assert_close(q.mean.flatten(2), out[..., :18])
    torch.testing.assert_close(q.variance.log().flatten(2), out[..., 18:])


def test_kl_from_prior_is_zero_for_the_prior_and_known_for_a_shift():
    q = D.Normal(torch.tensor([0.0, 2.0])[:, None, None, None].expand(2, 3, 4, 5), torch.ones(2, 3, 4, 5))
    torch.testing.assert_close(kl_from_prior(q), torch.tensor([[0.0] * 3, [4 * 5 * 2.0] * 3]))


def test_log_weights_are_exact_when_the_images_do_not_depend_on_the_latents(model, x):
    # With posteriors equal to the prior and a constant decoder, every weight is p(x).
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim and not name.endswith("original1"):  # the directions of normalised weights have no zero
                p.zero_()
    expected = model.likelihood.log_prob(torch.zeros_like(x), x)
    for weights in model.log_weights(x, samples=3):
        torch.testing.assert_close(weights, expected)


def test_log_weights_average_to_the_elbo(model, x):
    # E[log w] is the ELBO with KL terms estimated by sampling: compare means over many samples.
    with torch.no_grad():
        weights = torch.stack(list(model.log_weights(x, samples=400))).mean((1, 2))
        elbos = torch.stack([model(x).total.mean() for _ in range(400)])
    error = math.hypot(weights.std().item(), elbos.std().item()) / math.sqrt(400)
    assert weights.mean().item() == pytest.approx(elbos.mean().item(), abs=5 * error)


def test_every_parameter_receives_a_gradient(model, x):
    (-model(x).total.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_traversal_decodes_rolled_copies_of_one_frame(model, x):
    t = model.encode(x, sample=False)
    images = model.traverse(x, frame=2)
    assert images.shape == x.shape
    for l in range(7):
        expected = model.likelihood.mean(model.decode(t[:, 2:3].roll(l - 2, dims=-1)))[:, 0]
        torch.testing.assert_close(images[:, l], expected, rtol=1e-5, atol=1e-4)  # activations near 30
    torch.testing.assert_close(images[:, 2], model.reconstruct(x)[:, 2])


def test_samples_are_decoded_from_the_prior():
    model = TVAE(SHAPE, 3, 6, Neighborhood(4, 3))
    torch.manual_seed(3)
    images = model.sample(4, time=9)
    torch.manual_seed(3)
    z, u = torch.randn(4, 9, 3, 6), torch.randn(4, 9, 3, 6)
    expected = torch.sigmoid(model.decode(topographic(z, u, model.topographic.mu, Neighborhood(4, 3))))
    torch.testing.assert_close(images, expected)


def test_a_saved_model_is_loaded_whole(model, x, tmp_path):
    model.save(tmp_path / "model.safetensors")
    loaded = VAE.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    assert loaded.settings == model.settings
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a model file"):
        VAE.load(path)
    with pytest.raises(FileNotFoundError):
        VAE.load(tmp_path / "missing.safetensors")


def test_wrong_sizes_and_names_are_refused(x):
    with pytest.raises(ValueError, match="likelihood must be one of bernoulli, gaussian; got 'poisson'"):
        VAE(SHAPE, 3, 6, likelihood="poisson")
    with pytest.raises(ValueError, match="weights must be one of free, normalised, projected; got 'heavy'"):
        VAE(SHAPE, 3, 6, weights="heavy")
    with pytest.raises(ValueError, match="sizes must be positive"):
        VAE(SHAPE, 0, 6)
    with pytest.raises(ValueError, match="capsule_window of 7 does not fit 6"):
        TVAE(SHAPE, 3, 6, Neighborhood(1, 7))
    with pytest.raises(ValueError, match="needs shift 0, got 1"):
        BubbleVAE(SHAPE, 3, 6, Neighborhood(3, 1))
    with pytest.raises(ValueError, match=r"x must be \(batch, time, 2, 5, 4\), got \(2, 7, 2, 5, 3\)"):
        VAE(SHAPE, 3, 6)(x[..., :3])


# --- other topographies -----------------------------------------------------------------------------------------------

OTHERS = {
    "torus": Neighborhood(1, (2, 3), axes=(2, 3)),
    "a root for each axis": Neighborhood(3, 2, axes=(2, 3), roots="each axis"),
    "half shift": Neighborhood(4, 3, 0.5),
    "phase shift": Neighborhood(4, 3, 0.5, roll="fourier"),
    "padded": Neighborhood(4, 3, time_boundary="padded", capsule_boundary="padded"),
    "padded, causal": Neighborhood(4, 3, causal=True, time_boundary="padded", capsule_boundary="padded"),
    "speeds": Neighborhood(4, 3, speeds=(1, 2, 0.5)),
}
others = pytest.mark.parametrize("neighborhood", OTHERS.values(), ids=OTHERS)


@others
@pytest.mark.parametrize("window", ["ones", "shared", "capsule"])
def test_every_topography_makes_a_model_that_trains(x, neighborhood, window, tmp_path):
    model = TVAE(SHAPE, 3, 6, neighborhood, mu_init=1.0, window=window)
    elbo = model(x)
    assert elbo.total.shape == (2, 7)
    (-elbo.total.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.save(tmp_path / "model.safetensors")
    loaded = VAE.load(tmp_path / "model.safetensors")
    assert loaded.topographic.neighborhood == neighborhood
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    assert model.sample(2, 7).shape == model.traverse(x).shape == x.shape


@others
def test_the_kl_of_frames_beyond_the_ends_counts_at_the_ends(x, neighborhood):
    model = TVAE(SHAPE, 3, 6, neighborhood)
    qz, qu = model.posterior(x)
    elbo = model(x)
    torch.testing.assert_close(elbo.kl_u.sum(1), kl_from_prior(qu).sum(1))
    torch.testing.assert_close(elbo.kl_u[:, 1:-1], kl_from_prior(qu)[:, model.frames_before + 1 :][:, :5])
    torch.testing.assert_close(elbo.kl_z, kl_from_prior(qz))


def test_padded_sequences_are_extended_by_repetition(x):
    model = TVAE(SHAPE, 3, 6, OTHERS["padded"])
    _, qu = model.posterior(x)
    assert qu.mean.shape == (2, 1 + 7 + 2, 3, 6 + 2 + 3)  # taps -1 … 2 in time, -1 - 1 … 2 + 1 along the capsule
    assert torch.equal(qu.mean[:, 0], qu.mean[:, 1])
    assert torch.equal(qu.mean[:, -1], qu.mean[:, -3])
    assert not torch.equal(qu.mean[:, 1], qu.mean[:, 2])


def test_traversals_roll_along_the_topography(x):
    model = TVAE(SHAPE, 3, 6, OTHERS["a root for each axis"])
    t = model.encode(x, sample=False)
    for axis in (0, 1):
        rolled = t[:, 0].unflatten(-1, (2, 3)).roll(2, -2 + axis).flatten(-2)
        expected = model.likelihood.mean(model.decode(rolled[:, None]))
        torch.testing.assert_close(model.traverse(x, along=axis)[:, 2], expected[:, 0])


def test_a_model_is_told_along_which_axis_each_sequence_rolls(x, tmp_path):
    """Every method has its part of the batch from the layer that knows the axis."""
    neighborhood = OTHERS["a root for each axis"]
    model, axis = TVAE(SHAPE, 3, 6, neighborhood, mu_init=1.0, told_axis=True), torch.tensor([1, 0])
    assert torch.equal(model.told(axis), axis)
    qz, qu = model.posterior(x)
    root = (qu.mean.square() + qu.variance).sqrt()
    t = torch.cat([model.topographic(qz.mean[b : b + 1], root[b : b + 1], int(a)) for b, a in enumerate(axis)])
    torch.testing.assert_close(model.encode(x, sample=False, axis=axis), t)
    torch.testing.assert_close(model.reconstruct(x, axis), model.likelihood.mean(model.decode(t)))
    expected = model.likelihood.mean(model.decode(roll_capsules(t[:, :1], 2, neighborhood, 0)))
    torch.testing.assert_close(model.traverse(x, along=0, axis=axis)[:, 2], expected[:, 0])
    results = []
    for call in (
        lambda a: model(x, axis=a).log_likelihood,
        lambda a: torch.stack(list(model.log_weights(x, 2, a))),
        lambda a: model.sample(2, 7, a),
        lambda a: model.encode(x, axis=a),
    ):
        for a in (axis, 1 - axis):
            torch.manual_seed(0)
            results.append(call(a))
        assert not torch.isclose(*results[-2:]).all()
        with pytest.raises(ValueError, match="a model with told_axis=True got the axis None"):
            call(None)
    assert torch.equal(model(x, axis=axis).axis, axis)
    model.save(tmp_path / "model.safetensors")
    loaded = VAE.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.reconstruct(x, axis), model.reconstruct(x, axis))


def test_a_model_that_is_not_told_takes_no_axis(x):
    axis = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="told_axis needs a root for each axis, got Neighborhood"):
        TVAE(SHAPE, 3, 6, OTHERS["torus"], told_axis=True)
    model = TVAE(SHAPE, 3, 6, OTHERS["a root for each axis"])
    assert model.told(axis) is None
    with pytest.raises(ValueError, match="a model with told_axis=False got the axis"):
        model(x, axis=axis)


def test_an_unknown_kind_of_window_is_refused():
    with pytest.raises(ValueError, match="window must be one of ones, shared, capsule; got 'free'"):
        TVAE(SHAPE, 3, 6, Neighborhood(), window="free")
