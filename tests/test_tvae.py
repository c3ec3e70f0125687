"""The Topographic VAE: its capsules, their topographies, what is beyond the ends of a sequence, and known axes."""

import pytest
import torch
from torch import nn

import tvae
from tvae import TVAE
from tvae.data import SequenceBatch
from tvae.models.layers import kl_from_prior
from tvae_kernels import Neighborhood, roll_capsules, topographic

SHAPE = (2, 5, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return SequenceBatch(torch.rand(2, 7, *SHAPE))


@pytest.fixture
def model():
    return TVAE(SHAPE, 3, 6, Neighborhood(4, 3), mu_init=5.0)


def test_t_is_the_topographic_variable_of_the_sampled_z_and_u(model, batch):
    torch.manual_seed(1)
    t = model.encode(batch)
    torch.manual_seed(1)
    qz, qu = model.posterior(batch.images)
    z, u = qz.rsample(), qu.rsample()
    expected = topographic(z, u, model.topographic.mu, Neighborhood(4, 3), backend="reference")
    torch.testing.assert_close(t, expected)


def test_hooks_on_the_layer_see_every_step(model, batch):
    calls = []
    model.topographic.register_forward_hook(lambda module, arguments, result: calls.append(len(arguments)))
    model(batch)
    assert calls == [2]


def test_without_sampling_t_is_taken_at_the_means_of_z_and_of_u_squared(model, batch):
    qz, qu = model.posterior(batch.images)
    draws = torch.cat([qu.sample((100,)).square() for _ in range(40)])
    # the mean of 4,000 squares is known to √2 · 1.6 (their spread, at most) / √4000: 4 % to about 1 standard deviation
    expected = topographic(qz.mean, draws.mean(0).sqrt(), model.topographic.mu, Neighborhood(4, 3))
    torch.testing.assert_close(model.encode(batch, sample=False), expected, rtol=0.05, atol=1e-6)


def test_samples_are_decoded_from_the_prior():
    model = TVAE(SHAPE, 3, 6, Neighborhood(4, 3))
    torch.manual_seed(3)
    images = model.sample(4, time=9)
    torch.manual_seed(3)
    z, u = torch.randn(4, 9, 3, 6), torch.randn(4, 9, 3, 6)
    expected = torch.sigmoid(model.decode(topographic(z, u, model.topographic.mu, Neighborhood(4, 3))))
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize(
    ("neighborhood", "seen"),
    [
        (Neighborhood(1), [0]),
        (Neighborhood(4), [0, 1, 2, 7]),  # taps -1 … 2
        (Neighborhood(4, time_boundary="zero"), [0, 1, 2]),
        (Neighborhood(3, causal=True), [0, 6, 7]),
        (Neighborhood(8), list(range(8))),
    ],
)
def test_t0_sees_the_frames_of_its_window(neighborhood, seen):
    model = TVAE((1, 2, 2), 1, 8, neighborhood)
    assert model.frames_seen(8).nonzero().flatten().tolist() == seen


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
def test_every_topography_makes_a_model_that_trains(batch, neighborhood, window, tmp_path):
    model = TVAE(SHAPE, 3, 6, neighborhood, mu_init=1.0, window=window)
    elbo = model(batch)
    assert elbo.total.shape == (2, 7)
    (-elbo.total.mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors")
    assert loaded.topographic.neighborhood == neighborhood
    assert loaded.settings == model.settings
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))
    assert model.sample(2, 7).shape == model.traverse(batch).shape == batch.images.shape


@others
def test_the_kl_of_frames_beyond_the_ends_counts_at_the_ends(batch, neighborhood):
    model = TVAE(SHAPE, 3, 6, neighborhood)
    qz, qu = model.posterior(batch.images)
    kl_z, kl_u = (model(batch).terms[name] for name in ("kl_z", "kl_u"))
    torch.testing.assert_close(kl_u.sum(1), kl_from_prior(qu).sum(1))
    torch.testing.assert_close(kl_u[:, 1:-1], kl_from_prior(qu)[:, model.frames_before + 1 :][:, :5])
    torch.testing.assert_close(kl_z, kl_from_prior(qz))


def test_padded_sequences_are_extended_by_repetition(batch):
    model = TVAE(SHAPE, 3, 6, OTHERS["padded"])
    _, qu = model.posterior(batch.images)
    assert qu.mean.shape == (2, 1 + 7 + 2, 3, 6 + 2 + 3)  # taps -1 … 2 in time, -1 - 1 … 2 + 1 along the capsule
    assert torch.equal(qu.mean[:, 0], qu.mean[:, 1])
    assert torch.equal(qu.mean[:, -1], qu.mean[:, -3])
    assert not torch.equal(qu.mean[:, 1], qu.mean[:, 2])


def test_an_encoder_of_u_is_given_the_padded_sequence(batch):
    seen = []

    class Encoder(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x.flatten(1))

    encoder = Encoder(40, 2 * 3 * 11)
    model = TVAE(SHAPE, 3, 6, OTHERS["padded"], u_encoder=encoder)
    _, qu = model.posterior(batch.images)
    assert qu.mean.shape == (2, 10, 3, 11)
    (x,) = seen
    assert torch.equal(x.unflatten(0, (2, 10)), batch.images[:, [0, 0, 1, 2, 3, 4, 5, 6, 6, 6]])


def test_traversals_roll_along_the_topography(batch):
    model = TVAE(SHAPE, 3, 6, OTHERS["a root for each axis"])
    t = model.encode(batch, sample=False)
    traversals = model.traversals(batch)
    assert list(traversals) == ["Roll$_l(t_0)$, axis 0", "Roll$_l(t_0)$, axis 1"]
    for axis, images in enumerate(traversals.values()):
        rolled = t[:, 0].unflatten(-1, (2, 3)).roll(2, -2 + axis).flatten(-2)
        expected = model.likelihood.mean(model.decode(rolled[:, None]))
        torch.testing.assert_close(model.traverse(batch, axis=axis)[:, 2], expected[:, 0])
        assert torch.equal(images, model.traverse(batch, axis=axis))


def test_a_model_is_told_along_which_axis_each_sequence_rolls(batch, tmp_path):
    """Every method has its part of the batch from the layer that knows the axis."""
    neighborhood = OTHERS["a root for each axis"]
    model, axis = TVAE(SHAPE, 3, 6, neighborhood, mu_init=1.0, told_axis=True), torch.tensor([1, 0])
    x, batch = batch.images, batch._replace(axis=axis)
    assert torch.equal(model.axis(batch), axis)
    qz, qu = model.posterior(x)
    root = (qu.mean.square() + qu.variance).sqrt()
    t = torch.cat([model.topographic(qz.mean[b : b + 1], root[b : b + 1], int(a)) for b, a in enumerate(axis)])
    torch.testing.assert_close(model.encode(batch, sample=False), t)
    torch.testing.assert_close(model.reconstruct(batch), model.likelihood.mean(model.decode(t)))
    expected = model.likelihood.mean(model.decode(roll_capsules(t[:, :1], 2, neighborhood, 0)))
    torch.testing.assert_close(model.traverse(batch, axis=0)[:, 2], expected[:, 0])
    results = []
    for call in (
        lambda b: model(b).terms["log_likelihood"],
        lambda b: torch.stack(list(model.log_weights(b, 2))),
        lambda b: model.encode(b),
        lambda b: model.sample(2, 7, b.axis),
    ):
        for a in (axis, 1 - axis):
            torch.manual_seed(0)
            results.append(call(batch._replace(axis=a)))
        assert not torch.isclose(*results[-2:]).all()
        with pytest.raises(ValueError, match=r"a model with told_axis=True got (a batch without an|the) axis"):
            call(SequenceBatch(x))
    assert torch.equal(model(batch).axis, axis)
    model.save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.reconstruct(batch), model.reconstruct(batch))


def test_the_motion_of_its_own_is_the_roll_that_traversals_show(model, batch):
    moved = model.moved(batch)
    assert torch.equal(moved[:, 0], model.encode(batch, sample=False)[:, 0])
    torch.testing.assert_close(model.likelihood.mean(model.decode(moved)), model.traverse(batch), rtol=0, atol=0)

    axes = Neighborhood(3, 1, axes=(2, 3), roots="each axis")
    assert TVAE(SHAPE, 3, 6, axes).moved(batch) is None  # along which of the two?
    told = TVAE(SHAPE, 3, 6, axes, told_axis=True)
    batch = batch._replace(axis=torch.tensor([1, 0]))
    along = [told.traverse(batch, axis=a) for a in (0, 1)]
    expected = torch.stack((along[1][0], along[0][1]))
    torch.testing.assert_close(told.likelihood.mean(told.decode(told.moved(batch))), expected, rtol=0, atol=0)


def test_a_model_that_is_not_told_takes_no_axis(batch):
    axis = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="told_axis needs a root for each axis, got Neighborhood"):
        TVAE(SHAPE, 3, 6, OTHERS["torus"], told_axis=True)
    model = TVAE(SHAPE, 3, 6, OTHERS["a root for each axis"])
    knowing = batch._replace(axis=axis)
    assert model.axis(knowing) is None
    assert model(knowing).axis is None
    assert torch.equal(model.reconstruct(knowing), model.reconstruct(batch))
    with pytest.raises(ValueError, match="a model with told_axis=False got the axis"):
        model.sample(2, 7, axis)
