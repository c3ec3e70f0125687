"""Every model: sizes, initialisation, likelihoods, the ELBO, files, networks and models of a user's own."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import distributions as D
from torch import nn

import tvae
from tvae import TVAE, VAE, BubbleVAE, SequenceModel
from tvae.data import SequenceBatch
from tvae.models import MODELS, Gaussian, ModelSettings, base, register
from tvae.models.layers import gaussian, kl_from_prior
from tvae.settings import settings
from tvae_kernels import Neighborhood

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
def batch():
    return SequenceBatch(torch.rand(2, 7, *SHAPE))


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


def test_projected_weights_are_of_norm_one_from_the_start_and_after_a_projection():
    model = TVAE(SHAPE, 3, 6, Neighborhood(4, 3), weights="projected")
    layers = [m for net in (model.z_encoder, model.u_encoder, model.decoder) for m in net[::2]]
    assert len(layers) == 9
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


def test_elbo_is_its_terms_at_the_returned_sample(model, batch):
    torch.manual_seed(1)
    elbo = model(batch)
    decoded = model.decode(elbo.t)
    if isinstance(model.likelihood, Gaussian):
        p = D.Normal(decoded, 1.0)
    else:
        p = D.Bernoulli(logits=decoded, validate_args=False)
    expected = {"log_likelihood": p.log_prob(batch.images).flatten(2).sum(2)}
    for name, q in zip(("kl_z", "kl_u"), model.posterior(batch.images), strict=False):  # of a VAE the first alone
        expected[name] = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum((2, 3))
    assert list(elbo.terms) == list(expected)
    for name, term in elbo.terms.items():
        torch.testing.assert_close(term, expected[name])
    log_likelihood, *costs = elbo.terms.values()
    torch.testing.assert_close(elbo.total, log_likelihood - sum(costs))
    assert torch.equal(elbo.objective, elbo.total)
    assert elbo.axis is None


@pytest.mark.parametrize(
    "model", [VAE((1, 4, 4), 3, 5), TVAE((1, 4, 4), 3, 5, Neighborhood(3, 2))], ids=["VAE", "TVAE"]
)
def test_parts_of_a_batch_draw_the_noise_of_the_whole(model):
    batch = SequenceBatch(torch.rand(5, 4, 1, 4, 4))
    torch.manual_seed(0)
    whole = model(batch)
    torch.manual_seed(0)
    part = model(batch.select([2, 3])._replace(first=2, total=5))
    for name, term in part.terms.items():
        torch.testing.assert_close(term, whole.terms[name][2:4])
    for found, expected in ((part.total, whole.total), (part.t, whole.t)):
        torch.testing.assert_close(found, expected[2:4])


def test_vae_has_no_topography(batch):
    model = VAE(SHAPE, 3, 6)
    torch.testing.assert_close(model.encode(batch, sample=False), model.posterior(batch.images)[0].mean)


def test_encoder_reads_means_first_and_log_variances_second(batch):
    model = VAE(SHAPE, 3, 6)
    out = model.z_encoder(batch.images.flatten(0, 1)).unflatten(0, (2, 7))
    (q,) = model.posterior(batch.images)
    torch.testing.assert_close(q.mean.flatten(2), out[..., :18])
    torch.testing.assert_close(q.variance.log().flatten(2), out[..., 18:])


def test_kl_from_prior_is_zero_for_the_prior_and_known_for_a_shift():
    q = D.Normal(torch.tensor([0.0, 2.0])[:, None, None, None].expand(2, 3, 4, 5), torch.ones(2, 3, 4, 5))
    torch.testing.assert_close(kl_from_prior(q), torch.tensor([[0.0] * 3, [4 * 5 * 2.0] * 3]))


def test_log_weights_are_exact_when_the_images_do_not_depend_on_the_latents(model, batch):
    # With posteriors equal to the prior and a constant decoder, every weight is p(x).
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim and not name.endswith("original1"):  # the directions of normalised weights have no zero
                p.zero_()
    expected = model.likelihood.log_prob(torch.zeros_like(batch.images), batch.images)
    for weights in model.log_weights(batch, samples=3):
        torch.testing.assert_close(weights, expected)


def test_log_weights_average_to_the_elbo(model, batch):
    # E[log w] is the ELBO with KL terms estimated by sampling: compare means over 400 samples, drawn 40 at a time.
    many = SequenceBatch(batch.images.repeat(40, 1, 1, 1, 1))
    with torch.no_grad():
        weights = torch.cat([w.unflatten(0, (40, 2)).mean((1, 2)) for w in model.log_weights(many, samples=10)])
        elbos = torch.cat([model(many).total.unflatten(0, (40, 2)).mean((1, 2)) for _ in range(10)])
    error = math.hypot(weights.std().item(), elbos.std().item()) / math.sqrt(400)
    assert weights.mean().item() == pytest.approx(elbos.mean().item(), abs=5 * error)


def test_every_parameter_receives_a_gradient(model, batch):
    (-model(batch).objective.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_traversal_decodes_rolled_copies_of_one_frame(model, batch):
    t = model.encode(batch, sample=False)
    images = model.traverse(batch, frame=2)
    assert images.shape == batch.images.shape
    for l in range(7):
        expected = model.likelihood.mean(model.decode(t[:, 2:3].roll(l - 2, dims=-1)))[:, 0]
        torch.testing.assert_close(images[:, l], expected, rtol=1e-5, atol=1e-4)  # activations near 30
    (label, first), *others = model.traversals(batch).items()
    assert (label, others) == ("Roll$_l(t_0)$", [])
    assert torch.equal(first, model.traverse(batch, frame=0))
    torch.testing.assert_close(images[:, 2], model.reconstruct(batch)[:, 2])


def test_without_topography_t0_sees_frame_0_alone():
    assert VAE((1, 2, 2), 1, 8).frames_seen(8).nonzero().flatten().tolist() == [0]


def test_samples_of_a_vae_are_decoded_from_the_prior():
    model = VAE(SHAPE, 3, 6)
    torch.manual_seed(3)
    images = model.sample(4, time=9)
    torch.manual_seed(3)
    torch.testing.assert_close(images, torch.sigmoid(model.decode(torch.randn(4, 9, 3, 6))))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_whole(model, batch, tmp_path):
    model.save(tmp_path / "model.safetensors")
    for loader in (tvae.load, type(model).load, VAE.load):  # any reads every registered model
        loaded = loader(tmp_path / "model.safetensors")
        assert type(loaded) is type(model)
        assert loaded.settings == model.settings
        assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a model file"):
        tvae.load(path)
    with pytest.raises(FileNotFoundError):
        tvae.load(tmp_path / "missing.safetensors")


OLDER = {
    "vae": (VAE(SHAPE, 3, 6), {}),
    "tvae": (
        TVAE(SHAPE, 3, 6, Neighborhood(3, (1, 2), axes=(2, 3), roots="each axis"), mu_init=2.0, window="capsule"),
        {
            "neighborhood": {
                "time_window": 3,
                "capsule_window": [1, 2],
                "shift": [1, 1],
                "causal": False,
                "time_boundary": "circular",
                "capsule_boundary": "circular",
                "axes": [2, 3],
                "roots": "each axis",
                "speeds": None,
                "roll": "linear",
            },
            "mu_init": 2.0,
            "window": "capsule",
        },
    ),
    "bubblevae": (  # of the first version, which knew fewer settings
        BubbleVAE(SHAPE, 3, 6, Neighborhood(3, 1, 0)),
        {
            "neighborhood": {
                "time_window": 3,
                "capsule_window": 1,
                "shift": 0,
                "causal": False,
                "time_boundary": "circular",
                "capsule_boundary": "circular",
            },
            "mu_init": 30.0,
        },
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_files_of_older_versions_are_read(name, batch, tmp_path):
    model, settings = OLDER[name]
    values = {"model": name, "image_shape": [2, 5, 4], "capsules": 3, "capsule_dim": 6, "likelihood": "bernoulli"}
    save_file(model.state_dict(), tmp_path / "old.safetensors", {"model": json.dumps(values | settings)})
    loaded = tvae.load(tmp_path / "old.safetensors")
    assert type(loaded) is type(model)
    assert loaded.settings == model.settings
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))


class Encoder(nn.Module):
    """A network that is no MLP, from frames (N, 2, 5, 4)."""

    def __init__(self, outputs):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(18, outputs)

    def forward(self, x):
        assert x.shape[1:] == SHAPE
        return self.linear(self.convolution(x).relu().flatten(1))


class Decoder(nn.Module):
    """A network that is no MLP, from capsules (N, 3, 6) to frames (N, 2, 5, 4)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 40)

    def forward(self, t):
        assert t.shape[1:] == (3, 6)
        return self.linear(t).sum(1).unflatten(-1, SHAPE)


def networks(kind):
    encoders = {"z_encoder": Encoder(36)} if kind is VAE else {"z_encoder": Encoder(36), "u_encoder": Encoder(36)}
    return {**encoders, "decoder": Decoder()}


@pytest.mark.parametrize(("kind", "window"), [(VAE, ()), (TVAE, (Neighborhood(4, 3),))], ids=["VAE", "TVAE"])
def test_networks_are_arguments(kind, window, batch, tmp_path):
    given = networks(kind)
    model = kind(SHAPE, 3, 6, *window, **given)
    for name, network in given.items():
        assert getattr(model, name) is network
    q = model.posterior(batch.images)[-1]
    out = list(given.values())[-2](batch.images[1])
    torch.testing.assert_close(q.mean[1], out[:, :18].view(7, 3, 6))
    torch.testing.assert_close(q.variance[1].log(), out[:, 18:].view(7, 3, 6))
    t = torch.randn(2, 7, 3, 6)
    torch.testing.assert_close(model.decode(t)[1], given["decoder"](t[1]))
    model(batch).objective.sum().backward()
    assert all(p.grad.any() for p in model.parameters())

    model.save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors", **networks(kind))
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a model file of this version:(.|\n)*decoder"):
        tvae.load(tmp_path / "model.safetensors")


# --- models of a user's own, and the registry -------------------------------------------------------------------------


class Mine(TVAE):
    """Changes one thing of a model, and has its settings."""

    def frames_seen(self, steps):
        return torch.ones(steps, dtype=torch.bool)


@settings
class TiltedSettings(ModelSettings):
    """Settings of a model with one of its own."""

    tilt: float = 0.5


class Tilted(SequenceModel):
    """A model of a user's own, from the base alone, with a term that nobody knows."""

    Settings = TiltedSettings

    def __init__(self, image_shape, capsules, capsule_dim, **values):
        super().__init__(image_shape, self.Settings(capsules, capsule_dim, **values))
        self.rolls = Neighborhood()
        self.z_encoder, self.decoder = self.mlp_encoder(2 * capsules * capsule_dim), self.mlp_decoder()

    def posterior(self, x):
        return (gaussian(self.encoded(self.z_encoder, x, self.capsule_shape)),)

    def topography(self, z, axis=None):
        return z

    def encode(self, batch, sample=True):
        return self.posterior(batch.images)[0].mean

    def forward(self, batch):
        t = self.encode(batch)
        return self.bound(batch, t, {"tilt": self.settings.tilt * t.square().sum((2, 3))})


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back afterwards."""
    monkeypatch.setattr(base, "MODELS", dict(MODELS))
    return base.MODELS


def test_a_class_of_a_users_own_saves_and_loads_through_itself(batch, tmp_path):
    model = Mine(SHAPE, 3, 6, Neighborhood(4, 3), mu_init=5.0)
    assert Mine.name == "mine"
    model.save(tmp_path / "model.safetensors")
    loaded = Mine.load(tmp_path / "model.safetensors")
    assert type(loaded) is Mine
    assert loaded.settings == model.settings
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))
    for loader in (tvae.load, TVAE.load):
        with pytest.raises(ValueError, match=r"no model 'mine' is registered, only tvae, bubblevae, vae, .*; import"):
            loader(tmp_path / "model.safetensors")


def test_a_registered_model_is_found_by_its_name_settings_and_file(registry, batch, tmp_path):
    assert register(Tilted) is Tilted
    assert register(Tilted) is Tilted  # again is no harm
    model = Tilted(SHAPE, 3, 6, tilt=0.25)
    assert base.find("tilted") is base.model_of(model.settings) is Tilted
    assert list(registry) == [*MODELS, "tilted"]
    model.save(tmp_path / "model.safetensors")
    loaded = VAE.load(tmp_path / "model.safetensors")
    assert type(loaded) is Tilted
    assert loaded.settings == TiltedSettings(3, 6, tilt=0.25)
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))


def test_names_and_settings_are_one_models(registry):
    register(Tilted)

    class Other(Tilted):
        name = "tilted"

    with pytest.raises(ValueError, match="there is a model 'tilted' already: Tilted"):
        register(Other)
    with pytest.raises(ValueError, match="Mine needs a class of Settings of its own, not TVAE's"):
        register(Mine)
    assert "mine" not in registry
    assert registry["tilted"] is Tilted
    with pytest.raises(ValueError, match=r"no model 'flow' is registered, only tvae, bubblevae, vae, .*, tilted"):
        base.find("flow")
    with pytest.raises(ValueError, match=r"no model \['vae'\] is registered"):  # as a broken file may say
        base.find(["vae"])
    with pytest.raises(ValueError, match="no registered model has settings of ModelSettings; there are tvae,"):
        base.model_of(ModelSettings())


def test_a_cost_of_any_name_is_subtracted(batch):
    model = Tilted(SHAPE, 3, 6, tilt=0.25)
    elbo = model(batch)
    assert list(elbo.terms) == ["log_likelihood", "tilt"]
    torch.testing.assert_close(elbo.terms["tilt"], 0.25 * elbo.t.square().sum((2, 3)))
    torch.testing.assert_close(elbo.total, elbo.terms["log_likelihood"] - elbo.terms["tilt"])


def test_wrong_sizes_and_names_are_refused(batch):
    with pytest.raises(ValueError, match="likelihood: input should be 'bernoulli' or 'gaussian', got 'poisson'"):
        VAE(SHAPE, 3, 6, likelihood="poisson")
    with pytest.raises(ValueError, match="weights: input should be 'free', 'normalised' or 'projected', got 'heavy'"):
        VAE(SHAPE, 3, 6, weights="heavy")
    with pytest.raises(ValueError, match="capsules: input should be greater than or equal to 1, got 0"):
        VAE(SHAPE, 0, 6)
    with pytest.raises(ValueError, match=r"must be \(channel, height, width\), each at least 1, got \(5, 4\)"):
        VAE((5, 4), 3, 6)
    with pytest.raises(ValueError, match="there is no setting mu_init"):
        VAE(SHAPE, 3, 6, mu_init=5.0)
    with pytest.raises(ValueError, match="capsule_window of 7 does not fit 6"):
        TVAE(SHAPE, 3, 6, Neighborhood(1, 7))
    with pytest.raises(ValueError, match="window: input should be 'ones', 'shared' or 'capsule', got 'free'"):
        TVAE(SHAPE, 3, 6, Neighborhood(), window="free")
    with pytest.raises(ValueError, match="needs shift 0, got 1"):
        BubbleVAE(SHAPE, 3, 6, Neighborhood(3, 1))
    with pytest.raises(ValueError, match=r"x must be \(batch, time, 2, 5, 4\), got \(2, 7, 2, 5, 3\)"):
        VAE(SHAPE, 3, 6)(SequenceBatch(batch.images[..., :3]))


@pytest.mark.parametrize("model_class", [TVAE, VAE, BubbleVAE])
def test_a_model_of_numbers_of_numpy_is_saved(model_class, tmp_path):
    n = () if model_class is VAE else (Neighborhood(np.int64(2), np.int32(1), 0 if model_class is BubbleVAE else 1),)
    values = {} if model_class is VAE else {"mu_init": np.float32(30)}
    model = model_class((np.int64(1), np.int64(4), np.int32(4)), np.int64(3), np.int16(2), *n, **values)
    model.save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors")
    assert loaded.settings == model.settings
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


@settings
class OddSettings(VAE.Settings):
    """Settings that a file may not be able to hold."""

    odd: object = None
    """Anything."""


class Odd(VAE):
    """A model of them."""

    Settings = OddSettings


@pytest.mark.parametrize("odd", [{1, 2}, 1j, (1, 2), float("nan")], ids=str)
def test_what_cannot_be_saved_is_refused_when_the_model_is_made(odd):
    with pytest.raises(ValueError, match="settings that"):
        Odd(SHAPE, 2, 3, odd=odd)
    assert Odd(SHAPE, 2, 3, odd=[1, "x"]).settings.odd == [1, "x"]
