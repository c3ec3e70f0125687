"""E_eq, CapCorr and log p(x) on activations and weights whose values are known in advance."""

import math

import pytest
import torch

from tvae.metrics import (
    BestSingleImage,
    CapCorr,
    ELBOTerms,
    EquivarianceError,
    LogLikelihood,
    equivariance_error,
    log_likelihood,
    observed_roll,
    roll_since_canonical,
)
from tvae.models import ELBO, Bernoulli, Gaussian
from tvae_kernels import Neighborhood, roll_capsules


def rolling(t0, steps, speed=1):
    """Capsules `(B, C, D)` that roll by `speed` positions a frame: `(B, S, C, D)`."""
    return torch.stack([t0.roll(speed * l, dims=-1) for l in range(steps)], dim=1)


def sequences_of(starts, size, steps):
    """Factors `(B, S, 1)` and transformation `(B,)` of sequences whose only factor starts at `starts`."""
    factors = (starts[:, None, None] + torch.arange(steps)[:, None]) % size
    return factors, torch.zeros(len(starts), dtype=torch.int64)


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


def test_observed_roll_counts_positions_back_and_takes_the_mode_of_the_capsules():
    t0 = torch.randn(1, 5, 9)
    t = rolling(t0, 9)
    assert observed_roll(t[:, 0], t).tolist() == [[0, 8, 7, 6, 5, 4, 3, 2, 1]]
    t[:, 3, :2] = t0[:, :2]  # two of five capsules stand still in frame 3: outvoted
    assert observed_roll(t[:, 0], t)[0, 3] == 6
    t[:, 3, 2] = t0[:, 2].roll(4, dims=-1)  # two votes for 0, two for 6, one for 5: the smaller of the two
    assert observed_roll(t[:, 0], t)[0, 3] == 0


def test_capcorr_of_a_perfect_roll_is_one_for_full_and_looped_factors():
    starts = torch.arange(15)
    t = rolling(torch.randn(15, 4, 15), 15)
    for size in (15, 5):  # five scales are looped three times
        factors, kind = sequences_of(starts % size, size, 15)
        observed, true = roll_since_canonical(t, factors, kind)
        assert torch.equal(observed, starts % size)
        assert torch.equal(true, starts % size)
        metric = CapCorr(["scale"])
        metric.update(t, factors, kind)
        assert metric.compute()["scale"] == pytest.approx(1)


def test_capcorr_of_a_backward_roll_is_the_correlation_computed_by_hand():
    # Observed is -start mod 15. Over starts 0 … 14: covariance 49 - 224 = -175, variances 280 each.
    factors, kind = sequences_of(torch.arange(15), 15, 15)
    metric = CapCorr(["x"])
    metric.update(rolling(torch.randn(15, 4, 15), 15, speed=-1), factors, kind)
    assert metric.compute()["x"] == pytest.approx(-175 / 280)


def test_capcorr_of_random_activations_is_at_its_chance_level():
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(15, (2000,), generator=generator)
    t = torch.randn(2000, 15, 15, 15, generator=generator)
    # Uniform votes but for start 0, where frame 0 meets itself: about 0.1, and 0.54 where the best of three counts.
    for size, expected, spread in ((15, 0.12, 0.08), (5, 0.54, 0.06)):
        factors, kind = sequences_of(starts % size, size, 15)
        metric = CapCorr(["factor"])
        metric.update(t, factors, kind)
        assert metric.compute()["factor"] == pytest.approx(expected, abs=spread)
        assert metric.chance()["factor"] == pytest.approx(expected, abs=spread)


def test_capcorr_keeps_transformations_apart():
    factors = torch.zeros(30, 15, 2, dtype=torch.int64)
    kind = torch.arange(30) % 2
    starts = torch.arange(30) // 2
    factors[torch.arange(30), :, kind] = (starts[:, None] + torch.arange(15)) % 15
    t0 = torch.randn(30, 4, 15)
    t = torch.where((kind == 0)[:, None, None, None], rolling(t0, 15), rolling(t0, 15, speed=-1))
    metric = CapCorr(["x", "y"])
    metric.update(t[:10], factors[:10], kind[:10])
    metric.update(t[10:], factors[10:], kind[10:])
    assert metric.compute() == pytest.approx({"x": 1.0, "y": -0.625})


def test_capcorr_refuses_sequences_that_never_pass_the_canonical_pose():
    with pytest.raises(ValueError, match="index 0"):
        roll_since_canonical(
            torch.randn(1, 3, 2, 15), torch.tensor([[[4], [5], [6]]]), torch.zeros(1, dtype=torch.int64)
        )


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
    metric.update(ELBO(*values, t=torch.zeros(2, 2, 1, 1)))
    expected = {"elbo": 1.5 - 5.5 - 9.5, "log_likelihood": 1.5, "kl_z": 5.5, "kl_u": 9.5}
    assert metric.compute() == pytest.approx(expected)


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


# --- other topographies -----------------------------------------------------------------------------------------------

OTHERS = {
    "half a position": (Neighborhood(shift=0.5, roll="fourier"), 5, 10),
    "backwards": (Neighborhood(shift=-2), 5, 5),
    "speeds": (Neighborhood(speeds=(1, 2, -1)), 5, 5),
    "either axis": (Neighborhood(axes=(3, 5), roots="each axis"), 15, 15),
}


@pytest.mark.parametrize(("rolls", "dim", "steps"), OTHERS.values(), ids=OTHERS)
def test_capsules_that_roll_by_their_topography_are_equivariant(rolls, dim, steps):
    """E_eq is 0 and the observed roll is the frame's number, whatever a roll is; not if rolls are taken for others."""
    first = torch.randn(4, 3, dim, dtype=torch.float64)
    for axis in range(rolls.root_count) if rolls.root_count > 1 else (None,):
        t = torch.stack([roll_capsules(first, l, rolls, axis) for l in range(steps)], 1)
        assert equivariance_error(t, rolls).max() < 1e-10  # of some thousand differences of a few eps
        assert equivariance_error(t).min() > 1
        round_trip = 3 if axis == 0 else 5 if axis == 1 else steps
        back = observed_roll(t[:, 0], t, rolls)
        # frame l is the first rolled l times, which is the first rolled back round_trip - l times
        assert torch.equal((-back) % round_trip, torch.arange(steps).expand(4, -1) % round_trip)


def test_where_the_axis_is_known_no_other_counts():
    rolls = Neighborhood(axes=(3, 5), roots="each axis")
    first, axis = torch.randn(4, 3, 15, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    rolled = torch.stack([torch.stack([roll_capsules(first, l, rolls, a) for l in range(15)], 1) for a in (0, 1)])
    t = rolled[axis, torch.arange(4)]
    assert equivariance_error(t, rolls, axis).max() < 1e-10
    assert equivariance_error(t, rolls, 1 - axis).min() > 1
    rounds = torch.tensor([3, 5])[axis][:, None]
    assert torch.equal(-observed_roll(t[:, 0], t, rolls, axis) % rounds, torch.arange(15) % rounds)
    assert not torch.equal(-observed_roll(t[:, 0], t, rolls, 1 - axis) % rounds, torch.arange(15) % rounds)

    metric, either = EquivarianceError(rolls), EquivarianceError(rolls)
    metric.update(t, 1 - axis)
    either.update(t)
    assert metric.compute() == pytest.approx(equivariance_error(t, rolls, 1 - axis).mean().item())
    assert metric.chance() > either.chance()  # which is of the better axis


def test_capcorr_along_known_axes():
    rolls = Neighborhood(axes=(5, 5), roots="each axis")
    factors, kind = sequences_of(torch.arange(5), 5, 5)
    first = torch.randn(5, 3, 25, generator=torch.Generator().manual_seed(0))
    t = torch.stack([roll_capsules(first, l, rolls, 0) for l in range(5)], 1)
    found = {}
    for axis in (0, 1):
        metric = CapCorr(["x"], rolls)
        metric.update(t, factors, kind, torch.full((5,), axis))
        found[axis] = metric.compute()["x"]
    assert found[0] == pytest.approx(1)
    assert not found[1] > 0.9  # of iid activations, along the axis that does not roll


# frames, and after how many a circle along each axis would close
NOT_CIRCULAR = {
    "cut": (Neighborhood(capsule_boundary="zero"), 7, (7,)),
    "half a position": (Neighborhood(shift=0.5, capsule_boundary="zero"), 12, (14,)),
    "backwards, padded": (Neighborhood(3, 1, -2, time_boundary="padded", capsule_boundary="padded"), 4, (7,)),
    "speeds": (Neighborhood(speeds=(1, 2, 0.5), capsule_boundary="zero"), 4, (4,)),
    "either axis": (Neighborhood(axes=(4, 5), roots="each axis", capsule_boundary="zero"), 4, (4, 5)),
}


@pytest.mark.parametrize(("rolls", "frames", "rounds"), NOT_CIRCULAR.values(), ids=NOT_CIRCULAR)
@pytest.mark.parametrize("outside", [0.0, -10.0])
def test_the_roll_of_capsules_that_are_not_circular_is_seen_where_nothing_comes_from_outside(
    rolls, frames, rounds, outside
):
    """Whatever comes from there, and however far all are from 0: a product would then be largest without a roll."""
    first = torch.randn(4, 3, math.prod(rolls.axes or (7,)), dtype=torch.float64) - 30
    for axis, steps in enumerate(rounds):
        axis = axis if len(rounds) > 1 else None
        t = torch.stack([roll_capsules(first - outside, l, rolls, axis) for l in range(frames)], 1) + outside
        back = observed_roll(t[:, 0], t, rolls)
        assert torch.equal(-back % steps, torch.arange(frames).expand(4, -1))


def test_capcorr_of_a_perfect_roll_of_capsules_that_are_not_circular():
    starts = torch.arange(15)
    rolls = Neighborhood(capsule_boundary="zero")
    first = torch.randn(15, 4, 15) - 30
    t = torch.stack([roll_capsules(first, l, rolls) for l in range(15)], 1)
    factors, kind = sequences_of(starts, 15, 15)
    metric = CapCorr(["x"], rolls)
    metric.update(t, factors, kind)
    assert metric.compute()["x"] == pytest.approx(1)
