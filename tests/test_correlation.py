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


def total_correlation(*batches, shared=False):
    metric = TotalCorrelation(shared)
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
    # Of two variables 1 - r² is of a beta distribution, B((N - 2) / 2, 1/2).
    assert total_correlation(normal(1, 3, 1, 2)).chance() == pytest.approx(math.log(2), rel=1e-12)
    assert total_correlation(normal(1, 5, 1, 2)).chance() == pytest.approx(math.log(2) - 1 / 2, rel=1e-12)


@pytest.mark.parametrize("place", [1.0, 1e6])
def test_it_does_not_depend_on_where_variables_lie(place):
    t = normal(40, 5, 2, 3) @ normal(3, 3)
    expected = total_correlation(t).compute()
    # where numbers are rounded to 53 bits of their place, and 6 variables are compared over 200 frames
    error = 6 * math.sqrt(200) * place * torch.finfo(torch.float64).eps
    torch.testing.assert_close(total_correlation(t + place).compute(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.4567, 1e6])
@pytest.mark.parametrize("size", [1, 24])
def test_what_never_varies_has_no_part(value, size):
    """Whatever it is: of most numbers the sum of squares has no exact mean."""
    t = normal(240, 15, 1, 3).float()
    still = torch.cat((t, torch.full((240, 15, 1, 5), value)), -1)
    found, expected = total_correlation(*still.split(size)), total_correlation(t)
    torch.testing.assert_close(found.compute(), expected.compute(), rtol=1e-12, atol=1e-12)
    assert found.chance() == expected.chance()
    (row,) = total_correlation(torch.ones(3, 4, 2, 2)).rows()
    assert (str(row.value), row.chance, row.note) == ("0.0", 0.0, "")


def test_a_variable_that_varies_a_little_far_from_0_has_its_part():
    """By the last bits of float32, which is 1e-14 of its square."""
    t = normal(40, 5, 1, 2).float()
    bits = (t[..., :1] > 0).float()
    far = torch.cat((t[..., 1:], 1e6 + bits / 16), -1)
    near = torch.cat((t[..., 1:], bits), -1)
    assert torch.equal(far[..., 1:] - 1e6, bits / 16)
    expected = total_correlation(near).compute()
    assert expected > 0
    torch.testing.assert_close(total_correlation(far).compute(), expected, rtol=1e-7, atol=1e-12)


def nothing(change):
    t = normal(40, 5, 2, 3)
    change(t)
    return t


@pytest.mark.parametrize(
    ("t", "reason"),
    [
        (normal(2, 4, 2, 5), "of 8 frames, with 10 variables"),
        (nothing(lambda t: t[3, 2, 1, 1].fill_(math.nan)), "capsules are not finite"),
        (nothing(lambda t: t.fill_(math.nan)), "capsules are not finite"),
        (nothing(lambda t: t[3, 2, 1, 1].fill_(math.inf)), "capsules are not finite"),
        (nothing(lambda t: t[..., 1].copy_(t[..., 2])), "variables are linear functions of others"),
        (nothing(lambda t: t[:, :, 0, 0].copy_(t[:, :, 1].sum(-1) - 3)), "variables are linear functions of others"),
    ],
    ids=["few frames", "one NaN", "NaN", "one infinity", "twice the same", "a sum"],
)
def test_where_there_is_none_it_is_nan_with_a_reason(t, reason):
    (row,) = total_correlation(t).rows()
    assert math.isnan(row.value)
    assert row.note == reason
    assert math.isnan(row.chance) == reason.startswith("of")


def test_one_frame_more_than_variables_is_enough():
    """Of n + 1 frames less their mean n are independent."""
    (row,) = total_correlation(normal(1, 11, 1, 10)).rows()
    assert 0 < row.chance < math.inf
    assert 0 < row.value < math.inf
    (row,) = total_correlation(normal(1, 10, 1, 10)).rows()
    assert math.isnan(row.value)


def test_frames_that_share_their_latent_variables_are_one_draw():
    """Copies in all frames: the value of one frame a sequence, beside the chance of as many frames as sequences."""
    z = normal(30, 1, 2, 3)
    found, single = total_correlation(z.expand(-1, 9, -1, -1), shared=True), total_correlation(z)
    torch.testing.assert_close(found.compute(), single.compute(), rtol=1e-12, atol=1e-12)
    assert found.chance() == single.chance()
    (row,) = total_correlation(normal(6, 9, 2, 3), shared=True).rows()
    assert math.isnan(row.value)
    assert row.note == "of 6 sequences, with 6 variables"


def test_active_units_are_those_whose_means_vary():
    metric = ActiveUnits()
    spread = torch.tensor([0.0, 0.09, 0.11, 3.0])  # squared 0, 0.0081, 0.0121, 9
    means = torch.tensor([-1.0, 1.0]).repeat(50).view(10, 10, 1, 1) * spread + 5
    for part in means.split(4):
        metric.update(part)
    (row,) = metric.rows()
    assert (row.value, row.chance, row.label, row.note) == (2, 0, "active units of 4", "")
    metric.update(torch.full((1, 10, 1, 4), math.nan))
    (row,) = metric.rows()
    assert math.isnan(row.value)
    assert row.note == "posterior means are not finite"


def test_active_units_are_those_of_every_kind_of_latent_variables():
    """There may be other numbers of `u` than of `z`, and more frames of it."""
    z, u = (torch.tensor([-1.0, 1.0]).repeat(n).view(10, -1, 1, 1) for n in (50, 60))
    z, u = z * torch.tensor([0.09, 0.11]), u * torch.tensor([0.0, 0.09, 0.11, 3.0, 3.0]) + 5
    metric = ActiveUnits()
    for part in (slice(0, 4), slice(4, 10)):
        metric.update(z[part], u[part])
    assert metric.rows()[0][2:4] == ("active units of 7", 4)


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
    assert row.label == f"active units of {6 if kind is VAE else 12}"
