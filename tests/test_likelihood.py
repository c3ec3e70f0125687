"""log p(x), the terms of the ELBO and their chance level, on weights and images whose values are known in advance."""

import math

import pytest
import torch

from tvae.metrics import BestSingleImage, ELBOTerms, LogLikelihood, Row, log_likelihood
from tvae.models import ELBO, Bernoulli, Gaussian


def test_log_likelihood_in_both_forms():
    w = torch.tensor(
        [[[1.0, 2.0], [0.5, 0.25]], [[3.0, 4.0], [1.5, 0.75]], [[2.0, 1.0], [1.0, 1.0]]]
    )  # 3 samples, 2 x 2
    published, bound = log_likelihood(w.double().log())
    torch.testing.assert_close(published, torch.tensor([[6.0, 7.0], [3.0, 2.0]]).double().log())
    expected = torch.tensor([(2 + 12 + 2) / 3, (0.125 + 1.125 + 1) / 3]).double().log() / 2
    torch.testing.assert_close(bound, expected)
    metric = LogLikelihood()
    metric.update(w.log()[:, :1])
    metric.update(w.log()[:, 1:])
    assert metric.compute() == pytest.approx({"published": published.mean().item(), "bound": expected.mean().item()})


def test_elbo_terms_are_means_over_frames_and_add_up():
    values = torch.arange(12.0).reshape(3, 2, 2)
    metric = ELBOTerms()
    terms = dict(zip(("log_likelihood", "kl_z", "kl_u"), values, strict=True))
    total = values[0] - values[1] - values[2]
    for part in (slice(0, 1), slice(1, 2)):  # of a batch at a time
        elbo = ELBO(total[part], {name: term[part] for name, term in terms.items()}, 2 * total[part], torch.zeros(()))
        metric.update(elbo)
    expected = {"elbo": 1.5 - 5.5 - 9.5, "log_likelihood": 1.5, "kl_z": 5.5, "kl_u": 9.5}
    assert metric.compute() == pytest.approx(expected)


def test_a_term_of_any_name_has_a_row():
    """Its own label and a chance of 0, for a posterior that is the prior costs nothing."""
    images = torch.rand(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    best = BestSingleImage(Bernoulli(), (1, 2, 2))
    best.update(images)
    metric = ELBOTerms(best)
    terms = {"log_likelihood": torch.full((1, 2), -3.0), "tilt": torch.tensor([[1.0, 2.0]])}
    metric.update(ELBO(torch.full((1, 2), -4.5), terms, torch.zeros(1, 2), torch.zeros(())))
    chance = best.compute()
    assert metric.rows() == [
        Row("elbo", None, "ELBO", -4.5, chance, "nats/frame"),
        Row("elbo", "log_likelihood", "log p(x|t)", -3.0, chance, "nats/frame"),
        Row("elbo", "tilt", "tilt", 1.5, 0.0, "nats/frame"),
    ]


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(std=0.5)])
def test_best_single_image_is_the_likelihood_of_the_mean_image(likelihood):
    images = torch.rand(4, 3, 2, 5, 5, dtype=torch.float64)
    mean = images.mean((0, 1))
    decoded = torch.logit(mean) if isinstance(likelihood, Bernoulli) else mean
    expected = likelihood.log_prob(decoded.expand_as(images), images).mean()
    metric = BestSingleImage(likelihood, (2, 5, 5))
    metric.update(images[:1])
    metric.update(images[1:])
    assert metric.compute() == pytest.approx(expected.item())
    assert math.isfinite(metric.compute())
