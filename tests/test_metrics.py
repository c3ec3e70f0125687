"""The registry of metrics: which apply to which models and sources, and a user's own among them."""

import math
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from tvae import VAE, evaluation
from tvae.config import EvaluationSettings
from tvae.data import Factor, FixedSequences, SequenceSource
from tvae.evaluation import evaluate
from tvae.metrics import METRICS, CapCorr, EvaluationMetric, Row, base


class Source(SequenceSource):
    """Noise, of some length, with or without factors."""

    name = "noise"
    image_shape = (1, 3, 3)

    def __init__(self, steps, factors=()):
        self.sequence_length, self.factors = steps, factors

    def __len__(self):
        return 24

    def render(self, examples, factors):
        generator = torch.Generator().manual_seed(int(examples[0]))
        return torch.rand(len(examples), self.sequence_length, *self.image_shape, generator=generator)


TURN = Factor("turn", (0, 1, 2, 3))
HUE = Factor("hue", (0, 1, 2, 3))


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back afterwards, by the two names that it goes under."""
    own = dict(METRICS)
    monkeypatch.setattr(base, "METRICS", own)
    monkeypatch.setattr(evaluation, "METRICS", own)
    return own


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Source(4, (TURN, HUE)), ["elbo", "log_likelihood", "equivariance_error", "capcorr"]),
        (Source(4), ["elbo", "log_likelihood", "equivariance_error"]),
        (Source(4, (replace(TURN, transforms=False),)), ["elbo", "log_likelihood", "equivariance_error"]),
        (Source(1, (TURN,)), ["elbo", "log_likelihood"]),
    ],
    ids=["moving", "without factors", "standing still", "one frame"],
)
def test_metrics_apply_to_the_sources_that_they_mean_something_for(source, expected):
    model = VAE(source.image_shape, 2, 4)
    always = ["total_correlation", "active_units"]
    expected = [*expected, *always]
    assert [key for key, metric in METRICS.items() if metric.applies(model, source)] == expected
    rows = evaluate(model, FixedSequences.take(source, 24, batch_size=12), EvaluationSettings(importance_samples=2))
    assert [key for key, _ in groupby(row.key for row in rows)] == expected
    assert all(row.part is None for row in rows if row.label in ("ELBO", "E_eq"))
    assert all(math.isfinite(row.value) for row in rows if row.key != "capcorr")  # NaN where a roll never varies
    model.rolls = None  # capsules that cannot move
    assert [key for key, metric in METRICS.items() if metric.applies(model, source)] == [
        "elbo",
        "log_likelihood",
        *always,
    ]


class Brightness(EvaluationMetric):
    """A metric of a user's own."""

    key = "brightness"

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images):
        self.total += images.double().sum()

    def compute(self):
        return self.total

    def measure(self, model, batch, elbo):
        assert elbo.t.shape == (3, 4, 2, 4)
        self.update(batch.images)

    def rows(self):
        return [Row(self.key, None, "brightness", self.compute().item(), 0.5, digits=3)]


def test_a_metric_of_a_users_own_is_evaluated(registry):
    source = Source(4)
    assert base.register(Brightness) is Brightness
    assert base.register(Brightness) is Brightness  # again is no harm
    sequences = FixedSequences.take(source, 6, batch_size=3)
    *_, row = evaluate(VAE(source.image_shape, 2, 4), sequences, EvaluationSettings(importance_samples=1))
    expected = sum(batch.images.double().sum().item() for batch in sequences.batches)
    assert row == Row("brightness", None, "brightness", pytest.approx(expected), 0.5, "", 3)


def test_a_key_is_one_metrics(registry):
    class Other(Brightness):
        key = "capcorr"

    with pytest.raises(ValueError, match="there is a metric 'capcorr' already: CapCorr"):
        base.register(Other)
    assert registry["capcorr"] is CapCorr
