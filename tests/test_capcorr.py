"""Observed rolls and CapCorr on activations whose values are known in advance, and both of rolls that differ."""

import math

import pytest
import torch

from tvae.metrics import CapCorr, EquivarianceError, equivariance_error, observed_roll, roll_since_canonical
from tvae_kernels import Neighborhood, roll_capsules


def rolling(t0, steps, speed=1):
    """Capsules `(B, C, D)` that roll by `speed` positions a frame: `(B, S, C, D)`."""
    return torch.stack([t0.roll(speed * l, dims=-1) for l in range(steps)], dim=1)


def sequences_of(starts, size, steps):
    """Factors `(B, S, 1)` and transformation `(B,)` of sequences whose only factor starts at `starts`."""
    factors = (starts[:, None, None] + torch.arange(steps)[:, None]) % size
    return factors, torch.zeros(len(starts), dtype=torch.int64)


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
    # Of two factors, of 15 values and of 5, every other sequence advances the one and the other.
    kind, sizes = torch.arange(2000) % 2, torch.tensor([15, 5])
    factors = torch.zeros(2000, 15, 2, dtype=torch.int64)
    factors[torch.arange(2000), :, kind] = (starts[:, None] + torch.arange(15)) % sizes[kind][:, None]
    metric = CapCorr(["full", "looped"])
    metric.update(t, factors, kind)
    # Uniform votes but for start 0, where frame 0 meets itself: about 0.1, and 0.54 where the best of three counts.
    for name, expected, spread in (("full", 0.12, 0.08), ("looped", 0.54, 0.06)):
        assert metric.compute()[name] == pytest.approx(expected, abs=spread)
        assert metric.chance()[name] == pytest.approx(expected, abs=spread)


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
