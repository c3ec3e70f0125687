"""The rivals that differ from the VAE in the objective alone: beta-VAE, FactorVAE and SlowVAE."""

import math
from dataclasses import replace

import pytest
import torch
from acting import often
from contracts import assert_resumed_bit_for_bit, assert_same_curves
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from tvae import cli
from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings, check_run
from tvae.data import FixedSequences, SequenceBatch
from tvae.data.sprites import SpriteSequences
from tvae.evaluation import evaluate
from tvae.models import VAE, BetaVAE, FactorVAE, SlowVAE
from tvae.models.factor_vae import permuted
from tvae.models.slow_vae import laplace_cross_entropy, laplace_divergence
from tvae.training import Run, build_optimizer, train
from tvae.training.processes import Launched

CPU = torch.device("cpu")
SHAPE = (1, 5, 4)
RIVALS = (BetaVAE, FactorVAE, SlowVAE)
SMALL = {BetaVAE: {}, FactorVAE: {"units": 8}, SlowVAE: {}}
TRAINING = TrainingSettings(optimizer="adam", learning_rate=1e-3, batch_size=2, steps=5, seed=3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return SequenceBatch(torch.rand(3, 4, *SHAPE))


def trained(kind, folder, steps=5, step="eager", **values):
    config = Config(DataSettings(), kind.Settings(2, 3, **SMALL.get(kind, {}) | values), with_steps(steps))
    run = Run.create(folder, config)
    return train(run, "cpu", step=step), run


def with_steps(steps):
    return replace(TRAINING, steps=steps)


# --- what all have in common ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "neutral", "others"),
    [
        (BetaVAE, {"beta": 1}, [{"beta": 4}]),
        (FactorVAE, {"gamma": 0}, [{"gamma": 10}]),
        (SlowVAE, {"beta": 2, "gamma": 0}, [{"beta": 1, "gamma": 0}, {"beta": 2, "gamma": 10}]),
    ],
    ids=["beta", "factor", "slow"],
)
def test_with_neutral_weights_each_trains_bit_for_bit_as_the_vae(kind, neutral, others, tmp_path):
    expected = trained(VAE, tmp_path / "vae")[0].state_dict()
    found = trained(kind, tmp_path / "neutral", **neutral)[0].state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    for i, values in enumerate(others):
        found = trained(kind, tmp_path / str(i), **values)[0].state_dict()
        assert not any(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("kind", RIVALS)
def test_the_bound_is_that_of_the_vae_and_penalties_are_of_training_alone(kind, batch):
    model = kind(SHAPE, 2, 3, **SMALL[kind])
    torch.manual_seed(1)
    trained = model(batch)
    torch.manual_seed(1)
    evaluated = model.eval()(batch)
    assert torch.equal(trained.total, evaluated.total)
    assert torch.equal(evaluated.total, evaluated.objective)
    assert list(evaluated.terms) == ["log_likelihood", "kl_z"]
    assert torch.equal(trained.objective, trained.total - trained.terms["penalty"])
    assert all(x.shape == (3, 4) for x in trained.terms.values())


@pytest.mark.parametrize("kind", RIVALS)
def test_interrupted_training_is_resumed_bit_for_bit_and_models_are_read_again(kind, tmp_path):
    with often():
        assert_resumed_bit_for_bit(*trained(kind, tmp_path / "whole"), tmp_path / "cut")


@pytest.mark.parametrize("kind", [BetaVAE, SlowVAE])
def test_parts_of_a_batch_have_the_gradients_of_the_whole(kind):
    """Their mean, as several processes take it: in float64, up to the order of sums."""
    model = kind(SHAPE, 2, 3).double()
    whole = SequenceBatch(torch.rand(4, 3, *SHAPE, dtype=torch.float64))
    parts = [whole.select([i, i + 1])._replace(first=i, total=4) for i in (0, 2)]
    found = []
    for batches in ([whole], parts):
        model.zero_grad()
        for batch in batches:
            torch.manual_seed(1)
            (model(batch).objective.mean() / len(batches)).backward()
        found.append([p.grad for p in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", RIVALS)
def test_the_evaluation_of_a_model_is_the_same_every_time(kind):
    source = SpriteSequences()
    model, sequences = kind(source.image_shape, 2, 3, **SMALL[kind]), FixedSequences.take(source, 4, batch_size=2)
    first = str(evaluate(model.train(), sequences, EvaluationSettings(4, 2)))
    torch.manual_seed(1)  # whatever the random state before
    assert str(evaluate(model.train(), sequences, EvaluationSettings(4, 2))) == first
    assert "penalty" not in first


@pytest.mark.parametrize(
    ("kind", "setting"), [(BetaVAE, "gamma"), (BetaVAE, "rate"), (FactorVAE, "beta"), (SlowVAE, "units")]
)
def test_the_settings_of_another_are_refused(kind, setting):
    with pytest.raises(ValueError, match=f"there is no setting {setting}"):
        kind(SHAPE, 2, 3, **{setting: 1})


@pytest.mark.exhaustive
@pytest.mark.xdist_group("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("kind", RIVALS)
def test_compiled_steps_are_eager_ones_within_rounding(kind, tmp_path):
    with often():
        (_, eager), (_, compiled) = (trained(kind, tmp_path / step, 3, step) for step in ("eager", "compiled"))
    assert_same_curves(eager, compiled, 64 * 64)


# --- beta-VAE ---------------------------------------------------------------------------------------------------------


def test_the_objective_of_the_beta_vae_falls_by_the_divergence_for_every_one_of_beta(batch):
    found = []
    for beta in (2, 5):
        torch.manual_seed(0)
        model = BetaVAE(SHAPE, 2, 3, beta=beta)
        found.append(model(batch))
    assert torch.equal(found[0].terms["kl_z"], found[1].terms["kl_z"])
    # two roundings of numbers of that size
    torch.testing.assert_close(
        found[0].objective - found[1].objective, 3 * found[0].terms["kl_z"], rtol=0, atol=4 * 2**-23 * 20
    )


# --- FactorVAE --------------------------------------------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.mean().backward()
    of = lambda network: [p.grad for p in network.parameters() if p.grad is not None and p.grad.any()]  # noqa: E731
    return of(model.z_encoder), of(model.decoder), of(model.discriminator)


def test_each_player_gets_its_own_gradient(batch):
    model = FactorVAE(SHAPE, 2, 3, units=8)
    elbo = model(batch)
    encoder, decoder, discriminator = gradients(model, elbo.terms["total_correlation"])
    assert encoder
    assert not decoder
    assert not discriminator
    encoder, decoder, discriminator = gradients(model, model(batch).terms["discriminator_loss"])
    assert not encoder
    assert not decoder
    assert len(discriminator) == 14
    groups = build_optimizer(TRAINING, model).param_groups
    assert [(group["lr"], group["betas"], len(group["params"])) for group in groups] == [
        (1e-3, (0.9, 0.999), 12),
        (1e-4, (0.5, 0.9), 14),
    ]
    assert build_optimizer(replace(TRAINING, optimizer="sgd"), model).param_groups[1]["lr"] == 1e-4


def test_the_model_pays_for_the_logit_and_the_discriminator_for_its_mistakes(batch):
    model = FactorVAE(SHAPE, 2, 3, units=8, gamma=3.0)
    torch.manual_seed(1)
    elbo = model(batch)
    torch.manual_seed(1)
    torch.randn(3, 4, 2, 3)  # the noise of z
    z = elbo.t.detach().view(12, 6)
    logits, of_permuted = (model.discriminator(x).view(3, 4) for x in (z, permuted(z)))
    logistic = torch.nn.functional.logsigmoid
    loss = -(logistic(logits) + logistic(-of_permuted)) / 2
    torch.testing.assert_close(elbo.terms["total_correlation"], logits)
    torch.testing.assert_close(elbo.terms["discriminator_loss"], loss)
    torch.testing.assert_close(elbo.objective, elbo.total - 3 * logits - loss)


def test_the_discriminator_is_six_layers_of_leaky_relus():
    first, *layers = FactorVAE(SHAPE, 2, 3).discriminator
    assert (first.in_features, first.out_features) == (6, 1000)
    assert [x.negative_slope for x in layers[::2]] == [0.2] * 6
    assert [(x.in_features, x.out_features) for x in layers[1::2]] == [(1000, 1000)] * 5 + [(1000, 1)]


@pytest.mark.slow
def test_the_best_discriminator_gives_the_total_correlation():
    """Of a Gaussian with a correlation of 0.9, -log(1 - 0.81) / 2 = 0.83."""
    logit = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    model = FactorVAE((1, 1, 1), 1, 2, discriminator=logit)
    optimizer = torch.optim.Adam(logit.parameters(), lr=3e-3)
    law, q = MultivariateNormal(torch.zeros(2), torch.tensor([[1, 0.9], [0.9, 1]])), None
    elbo = model(SequenceBatch(torch.rand(2, 2, 1, 1, 1)))
    found = []
    for step in range(400):
        t = law.sample((512,))[:, None, None]
        terms = model.regularised(elbo._replace(t=t, total=torch.zeros(512, 1), objective=torch.zeros(512, 1)), q).terms
        optimizer.zero_grad()
        terms["discriminator_loss"].mean().backward()
        optimizer.step()
        if step >= 300:
            found.append(terms["total_correlation"].mean().item())
    # a mean of 100 batches whose logits have a spread of about 1.3
    assert sum(found) / len(found) == pytest.approx(0.830, abs=0.1)
    assert terms["discriminator_loss"].mean() < math.log(2)


def test_every_variable_is_permuted_by_itself():
    z = torch.arange(200.0).view(50, 4)
    found = permuted(z)
    assert torch.equal(found.sort(0).values, z)
    orders = {tuple((found[:, d] - d).tolist()) for d in range(4)}
    assert len(orders) == 4
    assert tuple(z[:, 0].tolist()) not in orders


def test_several_processes_are_refused(batch):
    config = Config(DataSettings(), FactorVAE.Settings(), TRAINING)
    check_run(config, "eager", CPU, 1)
    check_run(replace(config, model=VAE.Settings()), "eager", CPU, 2)
    with pytest.raises(ValueError, match="a FactorVAE is trained by one process, got 2: it needs all of a batch"):
        check_run(config, "eager", CPU, 2)
    model = FactorVAE(SHAPE, 2, 3, units=8)
    part = batch._replace(first=0, total=6)
    with pytest.raises(ValueError, match="a FactorVAE learns from all 6 sequences of a batch at once, got 3 of them"):
        model(part)
    model.eval()(part)


def test_the_command_line_refuses_several_processes_before_anything_is_made(tmp_path, monkeypatch, capsys):
    run = Run.create(tmp_path / "run", Config(DataSettings(), FactorVAE.Settings(2, 15, units=8), TRAINING))
    before = (run.path / "config.json").read_bytes()
    monkeypatch.setattr(Launched, "find", classmethod(lambda cls: cls(0, 2, 2)))
    new = ["train", "sprites-vae", "--model", "factorvae", "--device", "cpu", "--run-dir", str(tmp_path / "new")]
    resumed = ["train", "--resume", str(run.path), "--steps", "9", "--device", "cpu"]
    for words, status in ((new, 2), (resumed, 1)):
        assert cli.main(words) == status
        error = "a FactorVAE is trained by one process, got 2: it needs all of a batch in one place"
        assert capsys.readouterr().err == f"tvae: error: {error}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert [file.name for file in run.path.iterdir()] == ["config.json"]
    assert (run.path / "config.json").read_bytes() == before


def test_projected_weights_are_those_of_the_vae_alone():
    model = FactorVAE(SHAPE, 2, 3, units=8, weights="projected")
    before = model.discriminator[0].weight.clone()
    model.z_encoder[0].weight.data *= 2
    model.project_weights()
    assert torch.equal(model.discriminator[0].weight, before)
    torch.testing.assert_close(model.z_encoder[0].weight.norm(dim=1), torch.ones(18))


# --- SlowVAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "std", "rate", "expected"), [(0.3, 0.5, 6, 1.713424), (2, 0.1, 6, 10.901388), (0, 1, 1, 1.491032)]
)
def test_the_cross_entropy_with_a_laplace_distribution_is_an_integral(distance, std, rate, expected):
    m, s = (torch.tensor(x, dtype=torch.float64) for x in (distance, std))
    z = m + s * torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    integrand = (rate * z.abs() - math.log(rate / 2)) * Normal(m, s).log_prob(z).exp()
    assert torch.trapezoid(integrand, z).item() == pytest.approx(expected, abs=1e-6)
    assert laplace_cross_entropy(m, s, rate).item() == pytest.approx(expected, abs=1e-6)
    # the error of the trapezoids goes with the square of their width at the kink
    assert laplace_cross_entropy(m, s, rate).item() == pytest.approx(torch.trapezoid(integrand, z).item(), abs=1e-7)


def test_the_slow_divergence_is_positive_and_the_same_backwards():
    q = Normal(torch.randn(5, 4, 2, 3), torch.rand(5, 4, 2, 3) + 0.1)
    found = laplace_divergence(q, 6.0)
    assert found.shape == (5, 3)
    assert (found > 0).all()
    backwards = laplace_divergence(Normal(q.mean.flip(1), q.stddev.flip(1)), 6.0)
    torch.testing.assert_close(backwards.flip(1), found)


def test_a_still_and_certain_sequence_costs_as_much_as_its_certainty():
    """For s → 0 the Laplace distribution is flat over the Gaussian: the divergence is -log s + constant."""
    found = [
        laplace_divergence(Normal(torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), s)), 6.0) for s in (1e-6, 1e-8)
    ]
    assert (found[1] - found[0]).item() == pytest.approx(math.log(100), abs=1e-4)


@pytest.mark.parametrize("std", [1e-30, 1e-3, 1e3])
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1.0, 1e6])
def test_gradients_of_the_cross_entropy_are_finite(distance, std):
    m, s = (torch.tensor(x, requires_grad=True) for x in (distance, std))
    laplace_cross_entropy(m, s, 6.0).backward()
    assert m.grad.isfinite()
    assert s.grad.isfinite()


def test_pairs_are_adjacent_frames_of_one_sequence():
    mean = torch.randn(3, 4, 2, 3)
    other = mean.clone()
    other[1] += 1
    other[0, 3] += 1
    found, changed = (laplace_divergence(Normal(x, torch.ones(())).expand(x.shape), 6.0) for x in (mean, other))
    assert torch.equal(found[2], changed[2])
    assert torch.equal(found[0, :2], changed[0, :2])  # the last frame and the first are no pair
    assert found[0, 2] != changed[0, 2]


@pytest.mark.parametrize("frames", [2, 4])
def test_the_objective_of_a_sequence_is_the_mean_over_its_pairs(frames, batch):
    model = SlowVAE(SHAPE, 2, 3, beta=3.0, gamma=7.0, rate=2.0)
    batch = batch._replace(images=batch.images[:, :frames])
    elbo = model(batch)
    (q,) = model.posterior(batch.images)
    likelihood, divergence = elbo.terms["log_likelihood"], elbo.terms["kl_z"]
    slow = 2 * laplace_divergence(q, 2.0)
    expected = likelihood.mean(1) - 3 / 2 * divergence.mean(1) - 7 / 4 * slow.mean(1)
    torch.testing.assert_close(elbo.objective.mean(1), expected)
    # A pair counts at the frame that ends it.
    torch.testing.assert_close(
        elbo.objective - likelihood + 3 / 2 * divergence,
        -7 / 4 * nn.functional.pad(slow * frames / (frames - 1), (1, 0)),
        rtol=0,
        atol=8 * torch.finfo(torch.float32).eps * likelihood.abs().max().item(),
    )
    if frames == 2:  # the published case
        pair = likelihood.sum(1) - 3 * divergence.sum(1) / 2 - 7 * slow[:, 0] / 2
        torch.testing.assert_close(elbo.objective.mean(1), pair / 2)


def test_still_images_are_refused():
    class Still(SpriteSequences):
        sequence_length = 1

    SlowVAE.Settings().check_fits(SpriteSequences())
    with pytest.raises(ValueError, match="a SlowVAE needs sequences of at least 2 frames, those of sprites have 1"):
        SlowVAE.Settings().check_fits(Still())
