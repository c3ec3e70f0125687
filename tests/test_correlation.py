"""Gaussian total correlation and active units."""

import math

import pytest
import torch

from tvae.data import SequenceBatch
from tvae.metrics import ActiveUnits, TotalCorrelation
from tvae.models import TVAE, VAE
from tvae_kernels import Neighborhood


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def total_correlation(*batches):
    metric = TotalCorrelation(math.prod(batches[0].shape[2:]))
    for t in batches:
        metric.update(t)
    return metric


@pytest.mark.parametrize(("rho", "expected"), [(0.5, 0.1438), (0.9, 0.8304), (0.0, 0.0)])
def test_total_correlation_of_known_correlations(rho, expected):
    """Exactly correlated: whitened numbers, mixed by a Cholesky factor."""
    x = normal(500, 2)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x)).T)
    t = x @ torch.linalg.cholesky(torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)).T
    metric = total_correlation(t.view(100, 5, 1, 2))
    assert metric.compute().item() == pytest.approx(expected, abs=5e-5)
    assert metric.compute().item() == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-12)


def test_chance_is_what_independent_variables_give():
    values = []
    for seed in range(200):
        t = torch.randn(40, 5, 3, 4, generator=torch.Generator().manual_seed(seed))
        values.append(total_correlation(t).compute())
    values = torch.stack(values)
    metric = total_correlation(t)
    assert metric.chance() == pytest.approx(values.mean().item(), abs=4 * values.std().item() / math.sqrt(200))
    assert metric.chance() == pytest.approx(12 * 11 / (4 * 200), rel=0.1)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_it_depends_on_no_scale_place_order_or_batches(scale):
    t = normal(40, 5, 2, 3) @ normal(3, 3)
    expected = total_correlation(t).compute()
    moved = scale * (t * torch.tensor([1, 1e3, 1e-3])) - scale
    # 200 squares are added; 1 / 1e-3 of the numbers are lost where they lie beside the mean
    error = 1e6 * math.sqrt(200) * torch.finfo(torch.float64).eps * 10
    torch.testing.assert_close(total_correlation(moved).compute(), expected, rtol=error, atol=error)
    found = total_correlation(t[30:], t[:10], t[10:30]).compute()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_never_varies_has_no_part_and_too_few_frames_say_why():
    t = normal(40, 5, 1, 3)
    still = torch.cat((t, torch.full((40, 5, 1, 1), 1e6)), -1)
    found, expected = total_correlation(still), total_correlation(t)
    torch.testing.assert_close(found.compute(), expected.compute(), rtol=1e-12, atol=1e-12)
    assert found.chance() == expected.chance()
    (row,) = total_correlation(normal(2, 4, 2, 5)).rows()
    assert math.isnan(row.value)
    assert math.isnan(row.chance)
    assert row.note == "of 8 frames, with 10 variables"


def test_active_units_are_those_whose_means_vary():
    metric = ActiveUnits(4)
    spread = torch.tensor([0.0, 0.09, 0.11, 3.0])  # squared 0, 0.0081, 0.0121, 9
    means = torch.tensor([-1.0, 1.0]).repeat(50).view(10, 10, 1, 1) * spread + 5
    for part in means.split(4):
        metric.update(part)
    (row,) = metric.rows()
    assert (row.value, row.chance, row.label) == (2, 0, "active units of 4")


@pytest.mark.parametrize("kind", [VAE, TVAE])
def test_they_apply_to_every_model(kind):
    window = {"neighborhood": Neighborhood(3, 1)} if kind is TVAE else {}
    model, batch = kind((1, 4, 4), 2, 3, **window), SequenceBatch(torch.rand(6, 5, 1, 4, 4))
    for metric_class in (TotalCorrelation, ActiveUnits):
        metric = metric_class.build(model, None, None)
        with torch.no_grad():
            metric.measure(model, batch, model(batch))
        (row,) = metric.rows()
        assert math.isfinite(row.value)
