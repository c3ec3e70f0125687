"""The flow VAE that finds the transformations: its bound over all flows, shares of a batch, and what it recognises."""

import math

import pytest
import torch
from flowing import FRAMES, SHAPE, Moving, followed
from torch.distributions import Normal

import tvae
from tvae.data import SequenceBatch
from tvae.metrics import LogLikelihood
from tvae.models import WeakFlowVAE
from tvae.models.weak_flow_vae import balance

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
ANNEAL = 8


@pytest.fixture
def model():
    """One whose flows move, in float64."""
    torch.manual_seed(0)
    result = WeakFlowVAE(SHAPE, 2, 3, frames=FRAMES, anneal_steps=ANNEAL).double()
    with torch.no_grad():
        result.potentials.w.mul_(30)
        result.recogniser[-1].weight.mul_(20)
    return result


@pytest.fixture
def batch():
    """Sequences that say nothing of their transformations."""
    torch.manual_seed(1)
    return SequenceBatch(torch.rand(12, FRAMES, *SHAPE, dtype=torch.float64))


def at_sample(model, batch, seed=2):
    """One sample of the bound, and what it is made of: `L` of every flow `(K, B)`, by frame, and the divergence."""
    torch.manual_seed(seed)
    elbo = model(batch)
    torch.manual_seed(seed)
    (q,) = model.posterior(batch.images)
    z = (q.mean + torch.randn(q.mean.shape, dtype=q.mean.dtype) * q.stddev).flatten(1)
    frames = []
    for k in range(3):
        flow = torch.full((len(z),), k)
        t = model.path(followed(model, z, flow))
        frames.append(model.likelihood.log_prob(model.decode(t), batch.images))
    frames = torch.stack(frames)
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum((1, 2, 3))
    return elbo, frames.sum(-1), frames, kl


def test_an_evaluation_takes_the_sum_over_all_flows(model, batch):
    elbo, L, frames, kl = at_sample(model.eval(), batch)
    assert (L.amax(0) - L.amin(0)).mean() > 0.1
    torch.testing.assert_close(elbo.total.sum(1), L.logsumexp(0) - math.log(3) - kl, **DOUBLE)
    r = L.softmax(0)
    expected = {"log_likelihood": (r[..., None] * frames).sum(0), "kl_z": kl, "kl_k": (r * (3 * r).log()).sum(0)}
    assert list(elbo.terms) == list(expected)
    for name, x in expected.items():
        if x.ndim == 1:
            assert not elbo.terms[name][:, 1:].any()
            torch.testing.assert_close(elbo.terms[name][:, 0], x, **DOUBLE)
        else:
            torch.testing.assert_close(elbo.terms[name], x, **DOUBLE)
    assert torch.equal(elbo.objective, elbo.total)
    assert len(L.argmax(0).unique()) > 1
    z = elbo.t[:, 0].flatten(1)
    heaviest = model.path(followed(model, z, L.argmax(0)))
    torch.testing.assert_close(elbo.t, heaviest, **DOUBLE)
    assert model.training_calls == 0
    assert elbo.axis is None

    order = [2, 0, 1]
    with torch.no_grad():
        for x in model.potentials.parameters():
            x.copy_(x[order].clone())
    relabelled, *_ = at_sample(model, batch)
    torch.testing.assert_close(relabelled.total, elbo.total, **DOUBLE)
    torch.testing.assert_close(relabelled.t, elbo.t, **DOUBLE)


def test_other_weights_make_the_bound_lower_and_training_takes_them_as_they_are(model, batch):
    best, L, _, kl = at_sample(model.eval(), batch)
    elbo, *_ = at_sample(model.train(), batch)
    r = ((L + 10 * balance(L / 10)) / 10).softmax(0)
    expected = (r * (L - r.log())).sum(0) - math.log(3) - kl
    torch.testing.assert_close(elbo.total.sum(1), expected, **DOUBLE)
    assert (elbo.total.sum(1) < best.total.sum(1)).all()
    for calls in (3, ANNEAL, 10 * ANNEAL):
        model.training_calls.fill_(calls)
        elbo, *_ = at_sample(model, batch)
        assert (elbo.total.sum(1) <= best.total.sum(1) + 1e-10).all()

    # Without a gradient through r, that of the objective is the one of the weighted flows.
    model.training_calls.zero_()
    weight = model.decoder[-1].weight
    (found,) = torch.autograd.grad(at_sample(model, batch)[0].objective.sum(), weight)
    _, L, _, _ = at_sample(model, batch)
    (expected,) = torch.autograd.grad((r.detach() * L).sum(), weight)
    torch.testing.assert_close(found, expected, **DOUBLE)


def test_temperature_and_biases_go_with_the_calls_in_training(model):
    torch.manual_seed(3)
    L = 30 * torch.randn(3, 64, dtype=torch.float64)
    for calls in range(2 * ANNEAL):
        assert model.training_calls == calls
        temperature = 10 - 9 * min(calls / ANNEAL, 1)
        kept = min(1, max(0, 3 - 2 * calls / ANNEAL))
        expected = (L / temperature + kept * balance(L / temperature)).log_softmax(0)
        torch.testing.assert_close(model.balanced(L), expected, **DOUBLE)
    torch.testing.assert_close(model.balanced(L), L.log_softmax(0), **DOUBLE)


@pytest.mark.parametrize("lead", [0.0, 5.0, 3000.0])
def test_flows_get_equal_shares_of_a_batch_though_one_leads_everywhere(lead):
    torch.manual_seed(4)
    scores = torch.randn(3, 24)
    scores[1] += lead
    shares = (scores + balance(scores)).softmax(0).mean(1)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=1e-3)
    assert torch.equal(balance(torch.zeros(3, 24)), torch.zeros(3, 1))


def test_the_recogniser_learns_the_weights_and_nothing_learns_from_it_otherwise(model, batch):
    elbo, L, _, _ = at_sample(model, batch)
    model.training_calls.zero_()
    r = model.balanced(L.detach()).exp()
    log_q = model.recogniser(batch.images).log_softmax(-1)
    expected = -(r.mT * log_q).sum(-1)[:, None].expand(-1, FRAMES)
    torch.testing.assert_close(elbo.terms["cross_entropy"], expected, **DOUBLE)
    penalty = elbo.terms["hamilton_jacobi"] + elbo.terms["cross_entropy"]
    torch.testing.assert_close(elbo.objective, elbo.total - penalty, **DOUBLE)
    recogniser, others = list(model.recogniser.parameters()), [model.potentials.w, model.decoder[0].weight]
    (elbo.total.sum() - elbo.terms["hamilton_jacobi"].sum()).backward(retain_graph=True)
    assert all(p.grad is None for p in recogniser)
    assert all(p.grad.any() for p in others)
    model.zero_grad()
    elbo.terms["cross_entropy"].sum().backward()
    assert all(p.grad.any() for p in recogniser)
    assert all(p.grad is None for p in others)


def test_the_penalty_of_every_flow_counts_as_much_as_the_flow(model, batch):
    elbo, L, _, _ = at_sample(model, batch)
    model.training_calls.zero_()
    r = model.balanced(L.detach()).exp()
    torch.manual_seed(2)
    (q,) = model.posterior(batch.images)
    z = (q.mean + torch.randn(q.mean.shape, dtype=q.mean.dtype) * q.stddev).flatten(1)
    expected = 0
    for k in range(3):
        flow = torch.full((12,), k)
        u = model.potentials(followed(model, z, flow)[:, :-1], model.times(FRAMES, z), flow)
        residual = u.rate() + u.gradient().square().sum(-1) / 2
        expected = expected + r[k] * residual.clamp(min=0).square().mean(1)
    assert expected.min() > 1e-3
    torch.testing.assert_close(elbo.terms["hamilton_jacobi"], expected[:, None].expand(-1, FRAMES), **DOUBLE)


def test_weights_are_of_the_likeliest_flow_and_what_the_others_add_is_at_frame_0(model, batch):
    torch.manual_seed(2)
    (weights,) = model.eval().log_weights(batch, 1)
    _, L, frames, _ = at_sample(model, batch)  # of the same noise
    torch.manual_seed(2)
    (q,) = model.posterior(batch.images)
    z = q.rsample()
    ratio = (Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum((1, 2, 3))
    torch.testing.assert_close(weights.sum(1), L.logsumexp(0) - math.log(3) + ratio, **DOUBLE)
    best = frames[L.argmax(0), torch.arange(12)]
    torch.testing.assert_close(weights[:, 1:], best[:, 1:], **DOUBLE)
    assert LogLikelihood.build(model, Moving(), tvae.config.EvaluationSettings()).forms == ("bound",)


def test_the_flow_that_is_recognised_moves_a_sequence_whatever_it_is_told(model, batch):
    k = model.inferred(batch)
    assert k.dtype == torch.int64
    assert torch.equal(k, model.recogniser(batch.images).argmax(-1))
    assert len(k.unique()) > 1
    expected = model.path(model.walk_along(model.start(batch), FRAMES, k).points)
    told = batch._replace(axis=(k + 1) % 3)
    mix = torch.eye(3, dtype=torch.float64)[(k + 1) % 3][:, None].expand(-1, FRAMES - 1, -1)
    for found in (model.moved(batch), model.moved(told), model.moved(told, mix), model.encode(told, sample=False)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    images = model.traversals(batch)
    assert list(images) == ["flow 1", "flow 2", "flow 3", "flow inferred"]
    for b in range(12):
        torch.testing.assert_close(images["flow inferred"][b], images[f"flow {k[b] + 1}"][b], **DOUBLE)
    assert model.frames_seen(FRAMES).all()
    assert not model.told_transformations


def test_what_does_not_fit_is_refused_by_name(model, batch):
    with pytest.raises(
        ValueError, match=r"^a WeakFlowVAE learns from all 24 sequences of a batch at once, got 12 of them: train it"
    ):
        model(batch._replace(first=12, total=24))
    assert model(batch._replace(total=12)).total.shape == (12, FRAMES)
    assert model.eval()(batch._replace(first=12, total=24)).total.shape == (12, FRAMES)
    assert model.one_process
    with pytest.raises(ValueError, match=r"^sequences must have 4 frames, got 3$"):
        model.inferred(SequenceBatch(batch.images[:, :3]))
    with pytest.raises(
        ValueError, match=r"^a recogniser of 9 frames \(--frames\) does not fit moving, whose .* have 4$"
    ):
        WeakFlowVAE.Settings().check_fits(Moving())
    with pytest.raises(
        ValueError, match=r"^2 flows \(--transformations\) do not fit moving, which has 3: across, down"
    ):
        WeakFlowVAE.Settings(frames=4, transformations=2).check_fits(Moving())
    WeakFlowVAE.Settings(frames=4).check_fits(Moving())
    with pytest.raises(ValueError, match="anneal_steps: input should be greater than or equal to 1, got 0"):
        WeakFlowVAE(SHAPE, 2, 3, anneal_steps=0)


def test_calls_are_counted_in_training_and_saved_with_the_weights(model, batch, tmp_path):
    for _ in range(3):
        model(batch)
    model.eval()(batch)
    next(model.log_weights(batch, 1))
    model.float().save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors")
    assert loaded.training_calls == 3
    loaded.double().train()(batch)
    assert loaded.training_calls == 4
