"""The model of clusters and poses: its mixture, its bound over starts, its penalties, the contracts of the house."""

import math
from dataclasses import replace

import pytest
import torch
from acting import often
from contracts import assert_resumed_bit_for_bit, assert_same_curves
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import tvae
from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings, check_run
from tvae.data import FixedSequences, SequenceBatch, open_source
from tvae.evaluation import evaluate
from tvae.metrics import METRICS
from tvae.models import ClusterVAE
from tvae.models.group import DIMENSIONS, exp, warped
from tvae.models.weak_flow_vae import balance
from tvae.training import Run, train

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
CPU = torch.device("cpu")
SHAPE = (1, 6, 6)
SMALL = {"code": 3, "clusters": 4, "starts": 5, "units": 16, "warm_steps": 4}
TRAINING = TrainingSettings(optimizer="adam", learning_rate=1e-3, batch_size=4, steps=6, seed=3)


def made(shape=SHAPE, capsule_dim=7, **values):
    """One in float64 whose outputs differ from image to image."""
    torch.manual_seed(0)
    model = ClusterVAE(shape, 1, capsule_dim, **SMALL | values).double()
    with torch.no_grad():
        for network in (model.z_encoder, model.decoder):
            for layer in network[::2]:
                layer.weight.mul_(2)
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return SequenceBatch(torch.rand(5, 3, *SHAPE, dtype=torch.float64))


def at_sample(model, batch, seed=2):
    """One sample of the bound, and what the text of the model says of it, written out for every start by itself."""
    torch.manual_seed(seed)
    elbo = model(batch)
    torch.manual_seed(seed)
    x, frames = batch.images, batch.images.flatten(0, 1)
    code, variation, _ = model.sizes
    noise = torch.randn(*x.shape[:2], len(model.angles), sum(model.sizes), dtype=x.dtype).flatten(0, 1)
    bounds, parts = [], []
    for r, angle in enumerate(model.angles):
        turned_back = warped(frames, exp(-angle[None]).expand(len(frames), 3, 3))
        mean, log_variance = model.z_encoder(turned_back).chunk(2, -1)
        q = Normal(mean, (log_variance / 2).exp())
        h = q.mean + noise[:, r] * q.stddev
        y = torch.sigmoid(model.decoder(h[:, : code + variation])).view_as(frames)
        motion = exp(h[:, code + variation :] * model.spread) @ exp(angle[None]).expand(len(h), 3, 3)
        image = warped(y, motion).clamp(1e-5, 1 - 1e-5)
        likelihood = (torch.xlogy(frames, image) + torch.xlogy(1 - frames, 1 - image)).sum((1, 2, 3))
        prior = mixture(model).log_prob(h[:, :code])
        kl = kl_divergence(q, Normal(torch.zeros_like(mean), 1.0))
        costs = {
            "kl_c": q.log_prob(h)[:, :code].sum(1) - prior,
            "kl_v": kl[:, code : code + variation].sum(1),
            "kl_pose": kl[:, code + variation :].sum(1),
        }
        bounds.append(likelihood - sum(costs.values()))
        parts.append({"likelihood": likelihood, "h": h, "y": y, "mean": mean, **costs})
    stacked = {name: torch.stack([part[name] for part in parts], 1).unflatten(0, x.shape[:2]) for name in parts[0]}
    return elbo, torch.stack(bounds, 1).unflatten(0, x.shape[:2]), stacked


def mixture(model):
    means = model.means
    return MixtureSameFamily(
        Categorical(torch.ones(len(means), dtype=means.dtype)), Independent(Normal(means, torch.ones_like(means)), 1)
    )


# --- the mixture ------------------------------------------------------------------------------------------------------


def test_the_density_of_a_class_is_the_mixtures():
    model = made()
    h = torch.randn(7, 2, sum(model.sizes), dtype=torch.float64)
    found = model.log_prior(h)
    torch.testing.assert_close(found[..., 0], mixture(model).log_prob(h[..., :3]), **DOUBLE)
    torch.testing.assert_close(found[..., 1:], Normal(0.0, 1.0).log_prob(h[..., 3:]), **DOUBLE)


def test_one_cluster_costs_the_divergence_of_gaussians_on_average():
    model = made(clusters=1)
    shape = (1, 1, 1, sum(model.sizes))
    torch.manual_seed(3)
    q = Normal(torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64) + 0.2)
    samples = 20_000
    h = q.mean + torch.randn(samples, *shape[1:], dtype=torch.float64) * q.stddev
    found = model.costs(q, h)["kl_c"]
    centre = Normal(model.means, torch.ones_like(model.means))
    expected = kl_divergence(Normal(q.mean[0, 0, :, :3], q.stddev[0, 0, :, :3]), centre).sum()
    assert found.mean().item() == pytest.approx(expected.item(), abs=5 * found.std().item() / math.sqrt(samples))


def test_the_mean_of_the_bound_is_below_the_likelihood_of_a_toy():
    """A class in one dimension, no variation; turned by nothing: the image is of one pixel."""
    torch.manual_seed(4)
    model = ClusterVAE((1, 1, 1), 1, 3, code=1, clusters=3, starts=1, units=8).double().eval()
    with torch.no_grad():
        model.means.mul_(3)
        model.decoder[-1].weight.mul_(20)
    x = torch.tensor(0.8, dtype=torch.float64).view(1, 1, 1, 1, 1)
    z = torch.linspace(-15, 15, 3001, dtype=torch.float64)[:, None]
    y = torch.sigmoid(model.decoder(z)).view(-1)
    # Only the centre of the pixel is looked at, which no turn moves.
    density = mixture(model).log_prob(z) + 0.8 * y.log() + 0.2 * (1 - y).log()
    log_p = torch.trapezoid(density.exp(), z[:, 0]).log().item()
    copies = SequenceBatch(x.expand(4000, 1, 1, 1, 1))
    bound = model(copies).total.detach()
    assert bound.mean().item() < log_p - 5 * bound.std().item() / math.sqrt(4000)
    weights = torch.stack(list(model.log_weights(copies, 50))).detach()
    estimate = (weights.logsumexp(0) - math.log(50)).exp()
    assert estimate.mean().item() == pytest.approx(math.exp(log_p), abs=5 * estimate.std().item() / math.sqrt(4000))


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", DIMENSIONS)
def test_the_bound_is_the_sum_over_all_starts(group, batch):
    model = made(capsule_dim=6 + DIMENSIONS[group], group=group).eval()
    elbo, bounds, parts = at_sample(model, batch)
    assert (bounds.amax(-1) - bounds.amin(-1)).mean() > 0.1
    torch.testing.assert_close(elbo.total, bounds.logsumexp(-1) - math.log(5), **DOUBLE)
    assert torch.equal(elbo.objective, elbo.total)
    r = bounds.softmax(-1)
    expected = {
        "log_likelihood": (r * parts["likelihood"]).sum(-1),
        **{name: (r * parts[name]).sum(-1) for name in ("kl_c", "kl_v", "kl_pose")},
        "kl_start": (r * (5 * r).log()).sum(-1),
    }
    assert list(elbo.terms) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(elbo.terms[name], values, **DOUBLE)
    best = bounds.argmax(-1)
    assert len(best.unique()) > 1
    t = torch.cat((parts["h"], model.angles.expand(5, 3, 5)[..., None]), -1)
    b, s = torch.meshgrid(torch.arange(5), torch.arange(3), indexing="ij")
    torch.testing.assert_close(elbo.t[:, :, 0], t[b, s, best], **DOUBLE)
    torch.manual_seed(2)
    (weights,) = model.log_weights(batch, 1)
    h = parts["h"]
    torch.manual_seed(2)
    again = model.by_start(batch.images).rsample()
    torch.testing.assert_close(again, h, **DOUBLE)
    ratio = model.log_prior(h).sum(-1) - model.by_start(batch.images).log_prob(h).sum(-1)
    torch.testing.assert_close(weights, (parts["likelihood"] + ratio).logsumexp(-1) - math.log(5), **DOUBLE)


def test_capsules_decode_into_what_was_likely(batch):
    model = made().eval()
    elbo, bounds, parts = at_sample(model, batch)
    found = model.likelihood.log_prob(model.decode(elbo.t), batch.images)
    best = parts["likelihood"].take_along_dim(bounds.argmax(-1, keepdim=True), -1)[..., 0]
    torch.testing.assert_close(found, best, **DOUBLE)
    assert model.sample(2, 3).shape == (2, 3, *SHAPE)


def test_the_numbers_of_starts_are_angles_of_a_half_circle():
    degrees = made(starts=6).angles.rad2deg()
    expected = torch.tensor([-75.0, -45, -15, 15, 45, 75], dtype=torch.float64)
    torch.testing.assert_close(degrees, expected, rtol=0, atol=4 * 2**-23 * 90)  # a few roundings in float32
    alone = made(starts=1)
    assert alone.angles.tolist() == [0]
    assert alone.spread.tolist() == [pytest.approx(math.pi / math.sqrt(12))]


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_warms_divergences_up_and_pays_for_what_differs(batch):
    model = made(gamma=0.3, balance=7.0, prototypes=0.4, agreement=3.0)
    for call in range(6):
        elbo, bounds, parts = at_sample(model, batch)
        assert model.training_calls == call + 1
        weight_of_divergences = min(1, call / 4)
        cost = sum(parts[name] for name in ("kl_c", "kl_v", "kl_pose"))
        warmed = (parts["likelihood"] - weight_of_divergences * cost).logsumexp(-1) - math.log(5)
        best = bounds.argmax(-1, keepdim=True)
        m = parts["mean"].take_along_dim(best[..., None], 2)[:, :, 0]
        y = parts["y"].take_along_dim(best[..., None, None, None], 2)[:, :, 0]

        r = mixture(model).component_distribution.log_prob(m[..., None, :3]).softmax(-1)
        joint = sum(torch.outer(r[b, s], r[b, s + 1]) for b in range(5) for s in range(2)) / 10
        joint = (joint + joint.T) / 2
        information = (joint * (joint / torch.outer(joint.sum(0), joint.sum(0))).log()).sum()
        torch.testing.assert_close(elbo.terms["uninformed"], (math.log(4) - information).expand(5, 3), **DOUBLE)

        change = (m[:, 1:, :5] - m[:, :-1, :5]).square().sum(-1)
        for a, b in ((y[:, 1:], y[:, :-1]), (y[:, :-1], y[:, 1:])):
            a = a.clamp(1e-5, 1 - 1e-5)
            change = change - (b * a.log() + (1 - b) * (1 - a).log()).sum((2, 3, 4)) / 2
        torch.testing.assert_close(elbo.terms["difference"][:, 1:], 1.5 * change, **DOUBLE)
        assert not elbo.terms["difference"][:, 0].any()

        start = model.angles[best[..., 0]].flatten()[:, None]
        pose = (m[..., 5:] * model.spread).flatten(0, 1)
        back = torch.linalg.inv(exp(pose) @ exp(start))
        x = warped(batch.images.flatten(0, 1), back).view(5, 3, -1)
        z = torch.cat((model.means, torch.zeros(4, 2, dtype=x.dtype)), 1)
        shown = torch.sigmoid(model.decoder(z)).clamp(1e-5, 1 - 1e-5)
        likelihoods = x @ shown.log().T + (1 - x) @ (1 - shown).log().T
        scores = likelihoods.mean(1).T / 10
        s = (scores + balance(scores)).softmax(0).T[:, None]
        torch.testing.assert_close(s.mean(0), torch.full_like(s[0], 1 / 4), rtol=0, atol=1e-3)
        torch.testing.assert_close(elbo.terms["prototypes"], -(s * likelihoods).sum(-1), **DOUBLE)
        torch.testing.assert_close(elbo.terms["disagreement"], -(s * r.log()).sum(-1), **DOUBLE)

        weights = {"uninformed": 7, "prototypes": 0.4, "disagreement": 3, "difference": 0.3}
        expected = warmed - sum(weight * elbo.terms[name] for name, weight in weights.items())
        torch.testing.assert_close(elbo.objective, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(elbo.total, bounds.logsumexp(-1) - math.log(5), **DOUBLE)
    assert weight_of_divergences == 1
    model.eval()(batch)
    assert model.training_calls == 6


def test_prototypes_learn_from_images_and_codes_from_prototypes(batch):
    """Neither the pose nor who is responsible learns by it."""
    model = made()
    q = model.by_start(batch.images)
    m = q.mean[:, :, 2]
    unlikely, disagreement = model.taught(batch.images, m, model.angles[2].expand(5, 3))
    of_encoder, of_decoder = list(model.z_encoder.parameters()), list(model.decoder.parameters())
    found = torch.autograd.grad(
        unlikely.sum(), [*of_encoder, *of_decoder, model.means], allow_unused=True, retain_graph=True
    )
    assert all(x is None for x in found[: len(of_encoder)])
    assert all(x.any() for x in found[len(of_encoder) :])
    found = torch.autograd.grad(disagreement.sum(), [*of_encoder, *of_decoder, model.means, m], allow_unused=True)
    assert all(x is None for x in found[len(of_encoder) : -2])
    assert found[-2].any()
    assert found[-1][..., :3].any()
    assert not found[-1][..., 3:].any()


def test_clusters_that_are_certain_alike_and_constant_leave_nothing_to_pay():
    model = made()
    with torch.no_grad():
        model.means.copy_(100 * torch.eye(4, 3, dtype=torch.float64) - 50)
    m = torch.zeros(8, 2, sum(model.sizes), dtype=torch.float64)
    m[..., :3] = model.means.detach().repeat(2, 1)[:, None]
    assert model.uninformed(m).item() == pytest.approx(0, abs=1e-12)
    assert model.uninformed(m[:, :1]).item() == pytest.approx(0, abs=1e-12)  # a frame alone is its own pair
    assert model.uninformed(m[:1]).item() == pytest.approx(math.log(4))  # one cluster has taken all
    m[:, 1] = m[:, 1].roll(1, 0)  # another cluster in the other pose: as informative only where it is not symmetric
    joint = (torch.eye(4).roll(1, 0) + torch.eye(4).roll(-1, 0)) / 8
    expected = math.log(4) - torch.xlogy(joint, 16 * joint).sum().item()
    assert model.uninformed(m).item() == pytest.approx(expected, abs=1e-6)
    between = torch.zeros_like(m)
    between[..., :3] = model.means.detach().mean(0)
    assert model.uninformed(between).item() > 1


def test_the_canonical_image_of_the_other_frame_is_held_still():
    model = made()
    y = torch.rand(1, 2, *SHAPE, dtype=torch.float64, requires_grad=True)
    m = torch.zeros(1, 2, sum(model.sizes), dtype=torch.float64)
    model.difference(m, y).sum().backward()
    first, second = y.detach().unbind(1)
    # Of the cross-entropy of each by the other alone, twice by frames over pairs, and halved.
    expected = torch.stack([-b / a + (1 - b) / (1 - a) for a, b in ((first, second), (second, first))], 1)
    torch.testing.assert_close(y.grad, expected, rtol=1e-10, atol=1e-10)


# --- what it identifies -----------------------------------------------------------------------------------------------


def test_what_is_identified_is_of_the_best_start_at_the_means(batch):
    model = made().eval()
    found = model.identified(batch)
    q = model.by_start(batch.images)
    t = model.encode(batch, sample=False)[:, :, 0]
    bounds = model.likelihoods(model.canonical(q.mean), q.mean, batch.images)
    bounds = bounds - sum(model.costs(q, q.mean).values())
    best = bounds.argmax(-1)
    assert torch.equal(t[..., -1], model.angles[best])
    mean = q.mean.take_along_dim(best[..., None, None], 2)[:, :, 0]
    assert torch.equal(t[..., :-1], mean)
    assert torch.equal(found.code, mean[..., :3])
    assert found.clusters == 4
    responsibilities = (mean[..., None, :3] - model.means).square().sum(-1).argmin(-1)
    assert torch.equal(found.cluster, responsibilities)
    torch.testing.assert_close(found.angle, (t[..., -1] + t[..., -2] * model.spread[0]).rad2deg(), **DOUBLE)
    torch.testing.assert_close(
        found.canonical, torch.sigmoid(model.decoder(t[..., :5].flatten(0, 1))).view(5, 3, *SHAPE)
    )
    assert list(model.traversals(batch)) == ["canonical", "cluster"]
    (posterior,) = model.posterior(batch.images)
    assert torch.equal(posterior.mean[:, :, 0], t)
    assert not posterior.stddev[..., -1].any()


def test_the_angle_of_a_turned_image_is_turned():
    """By a decoder that draws one mark at the top: the start that turns the image there is the best."""

    class Sees(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2 * 5)

    class Draws(torch.nn.Module):
        def forward(self, z):
            image = torch.full((1, 15, 15), -9.0)
            image[0, 1:5, 6:9] = 9
            return image.expand(len(z), 1, 15, 15)

    model = ClusterVAE((1, 15, 15), 1, 6, code=3, z_encoder=Sees(), decoder=Draws()).eval()
    upright = torch.sigmoid(Draws()(torch.zeros(1, 1)))
    degrees = torch.tensor([-75.0, -15.0, 45.0])
    images = warped(upright.expand(3, -1, -1, -1), exp(degrees.deg2rad()[:, None]))
    found = model.identified(SequenceBatch(images[:, None]))
    torch.testing.assert_close(found.angle[:, 0], degrees)


# --- contracts of the house -------------------------------------------------------------------------------------------


@pytest.fixture
def trained(mnist_dir):
    def train_one(folder, steps=6, step="eager", **values):
        model = ClusterVAE.Settings(1, 7, **SMALL | values)
        data = DataSettings("mnist-posed", folder=mnist_dir)
        run = Run.create(folder, Config(data, model, replace(TRAINING, steps=steps)))
        return train(run, "cpu", step=step), run

    return train_one


def test_interrupted_training_is_resumed_bit_for_bit_and_models_are_read_again(trained, tmp_path):
    with often():
        whole, run = trained(tmp_path / "whole")
        assert whole.training_calls == 6
        assert_resumed_bit_for_bit(whole, run, tmp_path / "cut")


@pytest.mark.exhaustive
@pytest.mark.xdist_group("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
def test_compiled_steps_are_eager_ones_within_rounding(trained, tmp_path):
    with often():
        (_, eager), (_, compiled) = (trained(tmp_path / step, 3, step) for step in ("eager", "compiled"))
    assert_same_curves(eager, compiled, 28 * 28)


def test_the_evaluation_of_a_model_is_the_same_every_time_and_has_what_applies(mnist_dir):
    source = open_source("mnist-posed", "test", mnist_dir)
    torch.manual_seed(0)
    model, sequences = ClusterVAE(source.image_shape, 1, 7, **SMALL), FixedSequences.take(source, 20, batch_size=5)
    first = evaluate(model.train(), sequences, EvaluationSettings(20, 2))
    torch.manual_seed(1)  # whatever the random state before
    assert str(evaluate(model.train(), sequences, EvaluationSettings(20, 2))) == str(first)
    assert [key for key, metric in METRICS.items() if metric.applies(model, source)] == [
        "elbo",
        "log_likelihood",
        "clustering",
        "poses",
        "total_correlation",
        "active_units",
    ]
    assert "penalty" not in str(first)


def test_what_does_not_fit_is_refused_by_name(batch, mnist_dir):
    for setting in ("beta", "rate", "transformations"):
        with pytest.raises(ValueError, match=f"there is no setting {setting}"):
            made(**{setting: 1})
    with pytest.raises(ValueError, match=r"group: input should be 'SO\(2\)', 'SE\(2\)' or 'Sim\(2\)', got 'SO\(3\)'"):
        made(group="SO(3)")
    with pytest.raises(
        ValueError, match=r"capsules of 1 x 4 numbers are too few for 3 of the class, 1 of SO\(2\) and 1 of the start"
    ):
        made(capsule_dim=4)
    assert made(capsule_dim=5).sizes == (3, 0, 1)
    with pytest.raises(ValueError, match=r"images that are turned must be square, got \(1, 4, 6\)"):
        made(shape=(1, 4, 6))
    with pytest.raises(ValueError, match="a ClusterVAE learns from all 10 sequences of a batch at once, got 5 of them"):
        made()(batch._replace(first=0, total=10))
    with pytest.raises(ValueError, match=r"x must be \(batch, time, 1, 6, 6\), got \(5, 3, 1, 6, 5\)"):
        made()(SequenceBatch(batch.images[..., :5]))
    still = open_source("mnist-still", "test", mnist_dir)
    with pytest.raises(ValueError, match=r"at least 2 frames, those of mnist-still have 1; set gamma to 0 \(--gamma\)"):
        ClusterVAE.Settings().check_fits(still)
    ClusterVAE.Settings(gamma=0).check_fits(still)
    config = Config(DataSettings("mnist-posed"), ClusterVAE.Settings(), TRAINING)
    with pytest.raises(ValueError, match="a ClusterVAE is trained by one process, got 2"):
        check_run(config, "eager", CPU, 2)


def test_a_gaussian_likelihood_has_canonical_images_of_any_values(batch, tmp_path):
    model = made(likelihood="gaussian")
    elbo = model(batch)
    elbo.objective.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.float().save(tmp_path / "model.safetensors")
    assert tvae.load(tmp_path / "model.safetensors").settings.likelihood == "gaussian"
