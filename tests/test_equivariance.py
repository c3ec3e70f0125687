"""E_eq on activations whose value is known in advance; with the rolls of other topographies in test_capcorr.py."""

import pytest
import torch

from tvae.metrics import EquivarianceError, equivariance_error


def rolling(t0, steps, speed=1):
    """Capsules `(B, C, D)` that roll by `speed` positions a frame: `(B, S, C, D)`."""
    return torch.stack([t0.roll(speed * l, dims=-1) for l in range(steps)], dim=1)


@pytest.mark.parametrize("size", [15, 18])
def test_capsules_that_roll_perfectly_have_no_equivariance_error(size):
    t = rolling(torch.randn(4, 5, size, dtype=torch.float64), size)
    # Norms of rolled capsules are sums in another order: each element is off by a few eps at most.
    bound = size * (size - 1) / 2 * 5 * size * 4 * torch.finfo(torch.float64).eps
    assert equivariance_error(t).max() < bound


@pytest.mark.parametrize(("size", "still_equal"), [(15, 0), (18, 9)])
def test_one_hot_capsules_that_roll_backwards_miss_by_two_in_every_pair(size, still_equal):
    # Roll_δ(t_l) and t_{l+δ} are 2δ positions apart: equal for 2δ = size (9 pairs of 18 frames), else disjoint.
    t = rolling(torch.eye(size)[:1].expand(3, 7, size), size, speed=-1)
    pairs = size * (size - 1) // 2 - still_equal
    torch.testing.assert_close(equivariance_error(t), torch.full((3,), 2.0 * 7 * pairs))


@pytest.mark.parametrize(("size", "expected"), [(18, 13_268), (15, 6_938)])
def test_random_activations_are_at_the_known_chance_level(size, expected):
    metric = EquivarianceError()
    metric.update(torch.randn(200, size, size, size, generator=torch.Generator().manual_seed(1)))
    # One sequence varies by about 60; the published level itself is rounded from a finite sample.
    assert metric.compute().item() == pytest.approx(expected, abs=25)
    assert metric.chance() == pytest.approx(expected, abs=40)


def test_equivariance_error_is_its_definition_pair_by_pair():
    t = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for l in range(5):
            for m in range(l + 1, 5):
                for c in range(3):
                    a, z = (t[b, i, c] / t[b, i, c].norm() for i in (l, m))
                    expected[b] += sum(abs(a[(d - (m - l)) % 7] - z[d]) for d in range(7))
    torch.testing.assert_close(equivariance_error(t), expected)


def test_metric_is_the_mean_over_sequences_of_all_batches():
    t = torch.randn(5, 6, 2, 6, dtype=torch.float64)
    metric = EquivarianceError()
    metric.update(t[:2])
    metric.update(t[2:])
    torch.testing.assert_close(metric.compute(), equivariance_error(t).mean())
