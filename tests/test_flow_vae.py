"""The flow VAE: its paths, its bound against the exact likelihood, its penalty, and what is asked of every model."""

import math

import pytest
import torch
from acting import interrupted_at, often
from flowing import FRAMES, SHAPE, Known, Moving, batch_of, configuration, followed
from safetensors.torch import load_file
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import grad

import tvae
from tvae.config import EvaluationSettings
from tvae.data import SOURCES, FixedSequences, SequenceBatch
from tvae.data.mnist import MNISTSequences
from tvae.data.sprites import SpriteSequences
from tvae.evaluation import evaluate
from tvae.metrics import METRICS, Folds, LogLikelihood
from tvae.models import VAE, FlowVAE, PoFlow, WeakFlowVAE
from tvae.models.flow_vae import PotentialFlow, hamilton_jacobi
from tvae.training import Run, loop, steps, train

MODELS = {
    "flowvae": FlowVAE.Settings(2, 3),
    "flowvae, substeps": FlowVAE.Settings(2, 3, steps_per_frame=2),
}
OTHERS = {
    "weakflowvae": WeakFlowVAE.Settings(2, 3, frames=FRAMES, anneal_steps=3),
    "poflow": PoFlow.Settings(2, 3),
}
flow_vae = pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
each_model = pytest.mark.parametrize("values", [*MODELS.values(), *OTHERS.values()], ids=[*MODELS, *OTHERS])
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def _registered(monkeypatch):
    monkeypatch.setitem(SOURCES, "moving", Moving)


def made(values, strength=10.0):
    """A model whose flows move, in float64."""
    model = tvae.models.model_of(values)(SHAPE, **vars(values)).double()
    with torch.no_grad():
        model.potentials.w.mul_(strength)
    return model


def potential(model, k):
    """The potential number k as a function of one point and a time."""
    time = lambda t: torch.tensor([t], dtype=torch.float64)  # noqa: E731
    return lambda z, t: model.potentials(z[None, None], time(t), torch.tensor([k])).value()[0, 0]


# --- paths ------------------------------------------------------------------------------------------------------------


@flow_vae
def test_paths_follow_the_gradient_of_the_sequences_own_potential(values):
    model, batch = made(values), batch_of(4, torch.float64)
    m, start = values.steps_per_frame, model.start(batch)
    assert torch.equal(start, model.posterior(batch.images)[0].mean[:, 0].flatten(1))
    path, points = [start], [start]
    for frame in range(1, FRAMES):
        z = path[-1]
        for j in range(m):
            slopes = [grad(potential(model, k % 3))(z[k], frame + j / m) for k in range(4)]
            z = z + torch.stack(slopes) / m
            points.append(z)
        path.append(z)
    expected = torch.stack(path, 1)
    assert (expected.diff(dim=1).norm(dim=-1) > 0.01).all()
    for found in (model.moved(batch), model.encode(batch, sample=False)):
        torch.testing.assert_close(found.flatten(2), expected, **DOUBLE)
    for found in (followed(model, start, batch.axis), model.walk_along(start, FRAMES, batch.axis).points):
        torch.testing.assert_close(found, torch.stack(points, 1), **DOUBLE)
    torch.testing.assert_close(model.reconstruct(batch), model.likelihood.mean(model.decode(model.moved(batch))))
    each = model.traversals(batch)
    assert list(each) == ["flow 1", "flow 2", "flow 3"]
    for k, images in enumerate(each.values()):
        other = model.reconstruct(batch._replace(axis=torch.full((4,), k)))
        torch.testing.assert_close(images, other, **DOUBLE)


@flow_vae
def test_a_mix_switches_and_superposes_transformations(values):
    """And time starts anew with another one: with every step of the first sequence, in the third of the second."""
    model, batch = made(values), batch_of(2, torch.float64)
    m, z = values.steps_per_frame, model.start(batch)
    rows = torch.tensor([[[1, 0, 0], [0, 0, 1], [0, 1, 0.5]], [[0, 1, 0], [0, 1, 0], [1, 1, 1]]], dtype=torch.float64)
    times = ((1, 1, 1), (1, 2, 1))
    for l in range(1, FRAMES):
        for j in range(m):
            expected = z.clone()
            for b in range(2):
                for k in range(3):
                    slope = grad(potential(model, k))(z[b], times[b][l - 1] + j / m)
                    expected[b] += rows[b, l - 1, k] * slope / m
            z = expected
        torch.testing.assert_close(model.moved(batch, rows)[:, l].flatten(1), z, **DOUBLE)
    own = torch.eye(3, dtype=torch.float64)[batch.axis][:, None].expand(-1, FRAMES - 1, -1)
    torch.testing.assert_close(model.moved(batch, own), model.moved(batch), **DOUBLE)
    with pytest.raises(ValueError, match=r"^mix must be of 3 steps, got \(2, 4, 3\)"):
        model.moved(batch, torch.zeros(2, 4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^mix must be of shape \(2, frames - 1, 3\), got \(2, 3, 2\)"):
        model.moved(batch, torch.zeros(2, 3, 2, dtype=torch.float64))


def test_the_first_frame_alone_is_encoded():
    model, batch = made(FlowVAE.Settings(2, 3)), batch_of(3, torch.float64)
    other = batch._replace(images=torch.cat((batch.images[:, :1], batch.images[:, 1:].flip(1)), 1))
    first = batch._replace(images=torch.cat((1 - batch.images[:, :1], batch.images[:, 1:]), 1))
    assert torch.equal(model.moved(other), model.moved(batch))
    assert not torch.isclose(model.moved(first)[:, 0], model.moved(batch)[:, 0]).any()
    assert model.frames_seen(FRAMES).tolist() == [True, False, False, False]


def test_samples_are_paths_from_the_prior_of_flows_that_are_drawn_uniformly():
    model = FlowVAE(SHAPE, 2, 3)
    with torch.no_grad():
        model.potentials.w.mul_(10)
    torch.manual_seed(1)
    images = model.sample(300, time=5)
    torch.manual_seed(1)
    z, axis = torch.randn(300, 6), torch.randint(3, (300,))
    assert axis.bincount().min() > 100 - 5 * math.sqrt(300 * 2 / 9)
    expected = model.path(model.walk_along(z, 5, axis).points)
    torch.testing.assert_close(images, model.likelihood.mean(model.decode(expected)), rtol=0, atol=0)
    torch.manual_seed(1)
    torch.testing.assert_close(model.sample(300, 5, axis), images, rtol=0, atol=0)


# --- the bound --------------------------------------------------------------------------------------------------------


@flow_vae
def test_the_bound_has_one_divergence_and_what_it_is_made_of(values):
    model, batch = made(values), batch_of(5, torch.float64)
    torch.manual_seed(2)
    elbo = model(batch)
    torch.manual_seed(2)
    (q,) = model.posterior(batch.images)
    z = q.mean + torch.randn(q.mean.shape, dtype=torch.float64) * q.stddev
    t = model.path(model.walk_along(z.flatten(1), FRAMES, batch.axis).points)
    torch.testing.assert_close(elbo.t, t, rtol=0, atol=0)
    kl = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum((2, 3))
    expected = {
        "log_likelihood": model.likelihood.log_prob(model.decode(t), batch.images),
        "kl_z": torch.cat((kl, torch.zeros(5, FRAMES - 1, dtype=torch.float64)), 1),
    }
    for name, x in expected.items():
        torch.testing.assert_close(elbo.terms[name], x, **DOUBLE)
    torch.testing.assert_close(elbo.total, expected["log_likelihood"] - expected["kl_z"], **DOUBLE)
    assert list(elbo.terms) == [*expected, "hamilton_jacobi", "penalty"]
    model.eval()
    torch.manual_seed(2)
    evaluated = model(batch)
    assert list(evaluated.terms) == list(expected)
    assert torch.equal(evaluated.objective, evaluated.total)
    torch.testing.assert_close(evaluated.total, elbo.total, rtol=0, atol=0)


class Linear(nn.Module):
    """A network of one layer without a bias: an encoder to means and fixed log-variances, or a decoder to a frame."""

    def __init__(self, weight, log_variance=None):
        super().__init__()
        self.weight, self.log_variance = weight, log_variance

    def forward(self, x):
        y = x.flatten(1) @ self.weight.T
        if self.log_variance is None:
            return y.unflatten(-1, (1, 1, 3))
        return torch.cat((y, self.log_variance.expand_as(y)), 1)


def linear_model(Q, variance, weight):
    """A model of frames `x_l = W (I + Q)^l z_0 + noise` of 3 pixels, and the covariance of all of them."""
    W = torch.randn(3, 2, dtype=torch.float64)
    encoder = Linear(weight(W), torch.as_tensor(variance(W), dtype=torch.float64).log())
    model = FlowVAE((1, 1, 3), 1, 2, transformations=1, likelihood="gaussian", z_encoder=encoder, decoder=Linear(W))
    model.potentials = Known(gradient=lambda z, t, k: z @ Q)
    M = torch.cat([W @ torch.linalg.matrix_power(torch.eye(2, dtype=torch.float64) + Q, l) for l in range(FRAMES)])
    exact = MultivariateNormal(torch.zeros(len(M), dtype=torch.float64), torch.eye(len(M)) + M @ M.T)
    return model.eval(), exact


def linear_batch(exact, count, repeats=1):
    x = exact.sample((count,)).repeat_interleave(repeats, 0)
    return SequenceBatch(x.unflatten(1, (FRAMES, 1, 1, 3)), axis=torch.zeros(len(x), dtype=torch.int64)), x


def test_the_bound_is_below_the_exact_likelihood_and_importance_sampling_converges_to_it():
    Q = torch.tensor([[0.3, 0.2], [0.2, -0.4]], dtype=torch.float64)
    model, exact = linear_model(Q, lambda W: 0.5, lambda W: 0.1 * W.T)
    batch, x = linear_batch(exact, 3, 20_000)
    log_p = exact.log_prob(x).unflatten(0, (3, -1))[:, 0]
    totals = model(batch).total.sum(1).unflatten(0, (3, -1))
    error = totals.std(1) / math.sqrt(20_000)
    assert (totals.mean(1) + 5 * error < log_p).all()
    weights = next(model.log_weights(batch, 1)).sum(1).unflatten(0, (3, -1))
    torch.testing.assert_close(weights.mean(1), totals.mean(1), rtol=0, atol=10 * error.max().item())
    ratio = (weights - log_p[:, None]).exp()
    error = ratio.std(1) / math.sqrt(20_000)
    assert error.max() < 0.1
    assert ((ratio.mean(1) - 1).abs() < 5 * error).all()


def test_the_bound_is_exact_at_the_true_posterior_where_the_first_frame_alone_informs():
    still = -torch.eye(2, dtype=torch.float64)  # a step to 0, from where nothing is learned of where it came from
    precision = {}

    def variance(W):
        return 1 / precision["values"]

    def weight(W):  # in the coordinates in which the posterior is a diagonal Gaussian
        W.copy_(torch.linalg.qr(W)[0] * torch.tensor([0.7, 1.6], dtype=torch.float64))
        precision["values"] = 1 + W.square().sum(0)
        return W.T / precision["values"][:, None]

    model, exact = linear_model(still, variance, weight)
    batch, x = linear_batch(exact, 4)
    for weights in model.log_weights(batch, 3):
        torch.testing.assert_close(weights.sum(1), exact.log_prob(x), rtol=1e-10, atol=0)
    (q,) = model.posterior(batch.images)
    gap = kl_divergence(q, q).sum()
    assert gap == 0
    many = SequenceBatch(batch.images.repeat_interleave(5000, 0), axis=batch.axis.repeat_interleave(5000))
    totals = model(many).total.sum(1).unflatten(0, (4, -1))
    assert ((totals.mean(1) - exact.log_prob(x)).abs() < 5 * totals.std(1) / math.sqrt(5000)).all()


def test_weights_count_what_the_latent_variable_costs_at_frame_0_alone():
    model, batch = made(FlowVAE.Settings(2, 3)), batch_of(3, torch.float64)
    torch.manual_seed(1)
    (weights,) = model.log_weights(batch, 1)
    torch.manual_seed(1)
    (q,) = model.posterior(batch.images)
    z = q.rsample()
    t = model.path(model.walk_along(z.flatten(1), FRAMES, batch.axis).points)
    expected = model.likelihood.log_prob(model.decode(t), batch.images)
    prior = torch.distributions.Normal(0.0, 1.0)
    expected[:, 0] += (prior.log_prob(z) - q.log_prob(z)).sum((1, 2, 3))
    torch.testing.assert_close(weights, expected, **DOUBLE)
    assert LogLikelihood.build(model, Moving(), EvaluationSettings()).forms == ("bound",)


# --- the penalty ------------------------------------------------------------------------------------------------------


def with_potential(**derivatives):
    model = FlowVAE(SHAPE, 2, 3, transformations=1).double()
    model.potentials = Known(**derivatives)
    return model


def residual(model, z, frames=6):
    flow = torch.zeros(len(z), dtype=torch.int64)
    walk = model.walk_along(z, frames, flow)
    return walk.points, hamilton_jacobi(walk)


SPREAD = {  # u = |z|² / 2(1 + t), along which points move away from 0 at the speeds that they have
    "gradient": lambda z, t, k: z / (1 + t),
    "rate": lambda z, t, k: -z.square().sum(-1) / (2 * (1 + t[..., 0]) ** 2),
}


def test_the_penalty_is_zero_for_exact_solutions_and_on_one_side():
    z, a = torch.randn(5, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    points, penalty = residual(with_potential(**SPREAD), z)
    torch.testing.assert_close(penalty, torch.zeros_like(penalty), rtol=0, atol=1e-28)  # squares of rounding errors
    for l in range(6):  # the steps of this potential, of which the first leads to frame 1, are exact
        torch.testing.assert_close(points[:, l], z * (1 + (1 + l)) / 2, **DOUBLE)
    half = a.square().sum() / 2
    for excess, expected in ((0.0, 0.0), (-0.3, 0.0), (0.3, 0.09)):  # u = a z - |a|² t / 2, and another rate
        model = with_potential(
            gradient=lambda z, t, k: a.expand_as(z),
            rate=lambda z, t, k, excess=excess: (excess - half).expand(z.shape[:-1]),
        )
        points, penalty = residual(model, z)
        torch.testing.assert_close(penalty, torch.full_like(penalty, expected), **DOUBLE)
    torch.testing.assert_close(points[:, -1], z + 5 * a, **DOUBLE)


@flow_vae
def test_the_penalty_is_of_every_sequence_by_itself_and_only_the_objective_pays(values):
    model, batch = made(values, strength=30), batch_of(4, torch.float64)
    torch.manual_seed(1)
    elbo = model(batch)
    m, points = values.steps_per_frame, elbo.t.flatten(2)
    if m > 1:
        points = followed(model, points[:, 0], batch.axis)
    found = []
    for b in range(4):
        u, residuals = potential(model, b % 3), []
        for i in range((FRAMES - 1) * m):
            z, t = points[b, i].detach(), 1 + i / m
            rate = (u(z, t + 1e-5) - u(z, t - 1e-5)) / 2e-5
            residuals.append(rate + grad(u)(z, t).square().sum() / 2)
        found.append(torch.stack(residuals).clamp(min=0).square().mean())
    expected = torch.stack(found)[:, None].expand(-1, FRAMES)
    assert expected.max() > 0.01
    torch.testing.assert_close(elbo.terms["hamilton_jacobi"], expected, rtol=1e-6, atol=0)  # of differences in time
    torch.testing.assert_close(elbo.objective, elbo.total - elbo.terms["hamilton_jacobi"], **DOUBLE)

    twice = batch.select([0, 1, 2, 3, 0, 1, 2, 3])
    penalty = hamilton_jacobi(model.walk_along(torch.cat((points[:, 0], points[:, 0])), FRAMES, twice.axis))
    torch.testing.assert_close(penalty[4:, None].expand(-1, FRAMES), elbo.terms["hamilton_jacobi"], **DOUBLE)

    objectives = []
    for gamma in (0.0, 2.0):
        other = type(model)(SHAPE, **{**vars(values), "gamma": gamma}).double()
        other.load_state_dict(model.state_dict())
        torch.manual_seed(1)
        objectives.append(other(batch).objective)
    torch.testing.assert_close(objectives[0], elbo.total, rtol=0, atol=0)
    torch.testing.assert_close(objectives[1], elbo.total - 2 * elbo.terms["hamilton_jacobi"], **DOUBLE)


# --- steps that fold --------------------------------------------------------------------------------------------------


@flow_vae
@pytest.mark.parametrize("strength", [0, 200])
def test_steps_fold_where_the_least_eigenvalue_is_not_positive(values, strength):
    model, batch = made(values, strength), batch_of(12, torch.float64)
    folding, m = model.folds(batch), values.steps_per_frame
    points = followed(model, model.start(batch), batch.axis)
    for b in range(12):
        for i in range((FRAMES - 1) * m):
            t = torch.tensor([1 + i / m], dtype=torch.float64)
            H = model.potentials(points[b : b + 1, i : i + 1], t, batch.axis[b : b + 1]).hessian()[0, 0]
            least = torch.linalg.eigvalsh(torch.eye(6) + H / m)[0]
            assert folding[b, i] == (least <= 0)
    assert folding.shape == (12, (FRAMES - 1) * m)
    assert 0.1 < folding.double().mean() < 0.9 if strength else not folding.any()


def test_the_share_of_steps_that_fold_is_a_metric_of_flows_on_few_examples():
    model, source = FlowVAE(SHAPE, 2, 3), Moving()
    with torch.no_grad():
        model.potentials.w.mul_(200)
    metric = Folds.build(model, source, None)
    batches = FixedSequences.take(source, 96, 24).batches
    for batch in batches:
        metric.measure(model, batch, None)
    first = torch.cat([model.folds(batch) for batch in batches])[:64]
    (row,) = metric.rows()
    assert (row.key, row.part, row.label, row.chance) == ("folds", None, "steps that fold", 0.0)
    assert row.value == pytest.approx(first.double().mean().item())
    assert 0.1 < row.value < 0.9
    assert METRICS["folds"] is Folds
    assert Folds.applies(model, source)
    assert not Folds.applies(VAE(SHAPE, 2, 3), source)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_by_name(mnist_dir):
    with pytest.raises(
        ValueError, match=r"^3 flows \(--transformations\) do not fit sprites, which has 4: scale, orient"
    ):
        FlowVAE.Settings().check_fits(SpriteSequences())
    with pytest.raises(ValueError, match=r"^2 flows .* do not fit mnist, which has 3: rotation, scale, hue$"):
        FlowVAE.Settings(transformations=2).check_fits(MNISTSequences(mnist_dir, "test"))
    still = type("Still", (Moving,), {"sequence_length": 1})
    with pytest.raises(ValueError, match=r"^flows need sequences of at least 2 frames, those of moving have 1$"):
        FlowVAE.Settings().check_fits(still())
    FlowVAE.Settings().check_fits(Moving())
    for values, message in (
        ({"transformations": 0}, "transformations: input should be greater than or equal to 1, got 0"),
        ({"gamma": -1.0}, "gamma: input should be greater than or equal to 0, got -1.0"),
        ({"steps_per_frame": 0}, "steps_per_frame: input should be greater than or equal to 1, got 0"),
        ({"beta": 1.0}, "there is no setting beta"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowVAE(SHAPE, 2, 3, **values)
    model, unknown = FlowVAE(SHAPE, 2, 3), SequenceBatch(torch.rand(2, FRAMES, *SHAPE))
    for call in (model, model.moved, model.encode, lambda b: next(model.log_weights(b, 1))):
        with pytest.raises(ValueError, match=r"^a FlowVAE got a batch without an axis: the transformation of each"):
            call(unknown)


# --- what the house asks of every model -------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [*MODELS.values(), OTHERS["poflow"]], ids=[*MODELS, "poflow"])
def test_parts_of_a_batch_draw_the_noise_of_the_whole(values):
    model, batch = made(values), batch_of(5, torch.float64)
    torch.manual_seed(0)
    whole = model(batch)
    torch.manual_seed(0)
    part = model(batch.select([2, 3])._replace(first=2, total=5))
    assert list(part.terms) == list(whole.terms)
    for name, term in part.terms.items():
        torch.testing.assert_close(term, whole.terms[name][2:4], **DOUBLE)
    torch.testing.assert_close(part.objective, whole.objective[2:4], **DOUBLE)


@each_model
def test_every_parameter_receives_a_gradient(values):
    model = made(values)
    (-model(batch_of(6, torch.float64)).objective.mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_model
def test_a_saved_model_is_loaded_whole(values, tmp_path):
    model, batch = made(values).float(), batch_of(4)
    model(batch)  # in training, which buffers may count
    model.save(tmp_path / "model.safetensors")
    loaded = tvae.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    assert loaded.settings == model.settings == values
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)
    assert torch.equal(loaded.moved(batch), model.moved(batch))


@pytest.mark.slow
@pytest.mark.usefixtures("_registered")
@each_model
def test_resumed_and_replayed_training_is_that_of_an_uninterrupted_one(values, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "Graph", Played)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(loop, "check_run", lambda *_: None)
    config = configuration(values)
    runs = {name: Run.create(tmp_path / name, config) for name in ("whole", "resumed", "graph")}
    with often():
        assert train(runs["whole"], "cpu", show_progress=False) is not None
        for name, step in (("resumed", "eager"), ("graph", "graph")):
            stopping = interrupted_at(config, 4)
            assert train(runs[name], "cpu", show_progress=False, step=step, sources=stopping) is None
            assert train(runs[name], "cpu", show_progress=False, step=step) is not None
    whole = load_file(runs["whole"].checkpoint)
    for name in ("resumed", "graph"):
        found = load_file(runs[name].checkpoint)
        assert found.keys() == whole.keys()
        assert all(torch.equal(x, whole[key]) for key, x in found.items())
        assert (runs[name].path / "metrics.csv").read_text() == (runs["whole"].path / "metrics.csv").read_text()

    model, sequences = runs["whole"].load_model(), FixedSequences.take(Moving(), 8, 4)
    rows = [evaluate(model, sequences, config.evaluation) for _ in range(2)]
    assert repr(rows[0]) == repr(rows[1])
    assert "folds" in [row.key for row in rows[0]]
    shown = [row.part for row in rows[0] if row.key == "log_likelihood"]
    assert ("published" in shown) != model.shares_latents


class Played:
    """In place of a CUDA graph: a capture computes nothing, a replay does it all."""

    def warm_up(self, function):
        function()

    def capture(self, function):
        self.replay = function


COMPILERS = [
    pytest.param({"backend": "aot_eager"}, id="traced"),
    pytest.param({"options": {"fallback_random": True}}, id="compiled", marks=pytest.mark.exhaustive),
]


@pytest.mark.slow
@pytest.mark.xdist_group("compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own code
@pytest.mark.parametrize("compiler", COMPILERS)
@each_model
def test_a_compiled_step_is_the_eager_one(values, compiler):
    """The objective and its gradients, up to rounding: sums of some hundred terms."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, batch = tvae.models.model_of(values)(SHAPE, **vars(values)), batch_of(6)
        if compiled:
            model.compile(dynamic=False, fullgraph=True, **compiler)
        for _ in range(2):  # which a buffer may count
            model.zero_grad()
            torch.manual_seed(1)
            objective = model(batch).objective
            objective.mean().backward()
        found.append((objective.detach(), [p.grad for p in model.parameters()], list(model.buffers())))
    tolerance = 100 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=0)
    for eager, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(other, eager, rtol=tolerance, atol=tolerance * eager.abs().max().item())
    assert all(map(torch.equal, found[1][2], found[0][2]))


def test_flows_are_computed_in_float32_where_products_are_rounded():
    model, batch = FlowVAE(SHAPE, 2, 3), batch_of(4)
    z = model.start(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, walk = followed(model, z, batch.axis), model.walk_along(z, FRAMES, batch.axis)
        penalty = hamilton_jacobi(walk)
    assert torch.equal(mixed, followed(model, z, batch.axis))
    expected = model.walk_along(z, FRAMES, batch.axis)
    assert all(map(torch.equal, walk, expected))
    assert torch.equal(penalty, hamilton_jacobi(expected))


def test_potentials_have_as_many_units_as_latent_variables_up_to_128():
    assert FlowVAE(SHAPE, 2, 3).potentials.A.shape == (3, 6, 6)
    assert FlowVAE(SHAPE, 12, 12, transformations=2).potentials.A.shape == (2, 128, 144)
    assert issubclass(FlowVAE, PotentialFlow)
