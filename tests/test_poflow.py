"""PoFlow: the VAE in an evaluation, and in training decoded on the path of a flow that is to be a wave."""

import pytest
import torch
from flowing import FRAMES, SHAPE, Known, Moving, batch_of, followed
from torch.distributions import Normal

from tvae.config import EvaluationSettings
from tvae.data import SequenceBatch
from tvae.metrics import LogLikelihood
from tvae.models import VAE, PoFlow

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=[1, 2], ids=["one step", "two steps"])
def model(request):
    """One whose flows move, in float64."""
    torch.manual_seed(0)
    result = PoFlow(SHAPE, 2, 3, steps_per_frame=request.param, gamma=0.7).double()
    with torch.no_grad():
        result.potentials.w.mul_(30)
        result.c.copy_(torch.tensor([0.5, 1.0, 2.0]))
    return result


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return batch_of(5, torch.float64)


def test_an_evaluation_is_the_vaes_and_the_motion_is_the_flows(model, batch):
    model.eval()
    vae = VAE(SHAPE, 2, 3).double().eval()
    vae.load_state_dict({k: x for k, x in model.state_dict().items() if k.split(".")[0] in ("z_encoder", "decoder")})
    unknown = SequenceBatch(batch.images)  # what moves the sequences is asked of a motion alone
    found = []
    for each in (model, vae):
        torch.manual_seed(2)
        elbo = each(unknown)
        found.append((elbo.total, elbo.terms, elbo.t, *each.log_weights(unknown, 2), each.encode(unknown, False)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    settings = EvaluationSettings()
    assert LogLikelihood.build(model, Moving(), settings).forms == ("published", "bound")

    start = model.encode(batch, sample=False)[:, 0].flatten(1)
    expected = model.path(followed(model, start, batch.axis))
    torch.testing.assert_close(model.moved(batch), expected, **DOUBLE)
    with pytest.raises(ValueError, match=r"^a PoFlow got a batch without an axis"):
        model.moved(unknown)


def test_training_decodes_the_flow_and_pays_for_waves_and_for_what_its_posterior_does_not_expect(model, batch):
    torch.manual_seed(2)
    elbo = model(batch)
    torch.manual_seed(2)
    (q,) = model.posterior(batch.images)
    z = q.mean + torch.randn(q.mean.shape, dtype=torch.float64) * q.stddev
    points = followed(model, z[:, 0].flatten(1), batch.axis)
    path = model.path(points)
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum((2, 3))
    log_likelihood = model.likelihood.log_prob(model.decode(path), batch.images)
    torch.testing.assert_close(elbo.terms["log_likelihood"], log_likelihood, **DOUBLE)
    torch.testing.assert_close(elbo.terms["kl_z"], kl, **DOUBLE)
    torch.testing.assert_close(elbo.total, log_likelihood - kl, **DOUBLE)
    torch.testing.assert_close(elbo.t, path, **DOUBLE)

    m, waves = model.settings.steps_per_frame, torch.zeros(5, FRAMES, dtype=torch.float64)
    for b in range(5):
        k = b % 3
        for i in range((FRAMES - 1) * m):
            t = torch.tensor([1 + i / m], dtype=torch.float64)
            u = model.potentials(points[b : b + 1, i : i + 1], t, torch.tensor([k]))
            trace = u.hessian()[0, 0].trace()
            waves[b, 1 + i // m] += (u.second_rate()[0, 0] - (0.5, 1.0, 2.0)[k] ** 2 * trace) ** 2 / m
    matching = (Normal(0.0, 1.0).log_prob(path) - q.log_prob(path)).sum((2, 3))
    matching[:, 0] = 0
    assert waves[:, 1:].min() > 1e-6
    torch.testing.assert_close(elbo.terms["wave"], waves, **DOUBLE)
    torch.testing.assert_close(elbo.terms["matching"], matching, **DOUBLE)
    torch.testing.assert_close(elbo.objective, elbo.total - 0.7 * waves - matching, **DOUBLE)


def test_posteriors_of_later_frames_learn_where_the_flow_leads_and_it_does_not_learn_from_them(model, batch):
    """Else nothing but the divergence would change them, and they would say nothing of their images."""
    images = batch.images.clone().requires_grad_()
    model(batch._replace(images=images)).terms["matching"].sum().backward()
    assert images.grad[:, 1:].flatten(2).any(-1).all()
    assert not images.grad[:, 0].any()
    assert model.potentials.w.grad is None


def test_a_plane_wave_has_no_residual_and_only_at_its_own_speed(model):
    a, speed = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    length = a.norm(dim=1)

    def height(z, t, k):  # u = sin(a z - c |a| t), of a and c of each potential
        return torch.sin((z * a[k[:, 0], None]).sum(-1) - (speed * length)[k] * t[..., 0])

    model.potentials = Known(
        second_rate=lambda z, t, k: -((speed * length)[k] ** 2) * height(z, t, k),
        laplacian=lambda z, t, k: -(length[k] ** 2) * height(z, t, k),
    )
    points, flow = torch.randn(9, 7, 6, dtype=torch.float64), torch.arange(9) % 3
    found = model.wave_residual(points, flow)
    assert found.shape == (9, 6)
    torch.testing.assert_close(found, torch.zeros_like(found), **DOUBLE)
    with torch.no_grad():
        model.c.mul_(1.1)
    assert (model.wave_residual(points, flow).abs().amax(-1) > 0.01).all()
