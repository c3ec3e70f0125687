import copy
import dataclasses
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from tvae_kernels import Neighborhood
from tvae_kernels.neighborhood import read


@pytest.mark.parametrize(
    ("window", "causal", "taps"),
    [
        (1, False, [0]),
        (2, False, [0, 1]),
        (3, False, [-1, 0, 1]),
        (4, False, [-1, 0, 1, 2]),
        (18, False, list(range(-8, 10))),
        (1, True, [0]),
        (4, True, [-3, -2, -1, 0]),
    ],
)
def test_time_taps(window, causal, taps):
    assert list(Neighborhood(time_window=window, causal=causal).time_taps) == taps


@pytest.mark.parametrize(("window", "taps"), [(1, [0]), (2, [0, 1]), (3, [-1, 0, 1]), (6, [-2, -1, 0, 1, 2, 3])])
def test_capsule_taps_are_centred_whether_causal_or_not(window, taps):
    for causal in (False, True):
        assert list(Neighborhood(time_window=5, capsule_window=window, causal=causal).capsule_taps) == taps


def test_defaults_are_the_shifting_circular_single_tap():
    expected = Neighborhood(1, 1, 1, False, "circular", "circular")
    assert Neighborhood() == expected
    assert hash(Neighborhood()) == hash(expected)
    assert len({Neighborhood(), expected, Neighborhood(shift=0)}) == 2


def test_numbers_of_numpy_are_numbers():
    found = Neighborhood(
        np.int64(5), np.array([2, 1]), np.array([1.0, 0.5]), axes=np.array([2, 3]), speeds=np.float32([1, 2])
    )
    expected = Neighborhood(5, (2, 1), (1, 0.5), axes=(2, 3), speeds=(1, 2))
    assert found == expected
    assert read(found.text) == expected
    assert Neighborhood(capsule_window=np.int32(3), shift=np.float64(0.5)).text == Neighborhood(1, 3, 0.5).text
    with pytest.raises(TypeError, match=r"axes must be an integer, got .*2\.5"):
        Neighborhood(axes=np.array([2.5, 1.0]))


def test_a_window_without_what_is_always_outside():
    n = Neighborhood(10**7, time_boundary="zero")
    assert n.within(4, 3).time_taps == range(-3, 4)
    assert Neighborhood(10**7, causal=True, time_boundary="zero").within(4, 3).time_taps == range(-3, 1)
    assert Neighborhood(8, time_boundary="zero").within(4, 3).time_taps == range(-3, 4)
    cut = Neighborhood(3, 10**7, -2, capsule_boundary="zero")
    assert cut.within(4, 3).capsule_taps == range(-4, 5)  # 2 positions, and 2 more a frame of either side
    for whole in (n.within(4, 3), cut.within(4, 3), Neighborhood(3, 2), Neighborhood(7, 5, time_boundary="padded")):
        assert whole.within(4, 3) is whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("roots", ["one", "each axis"])
def test_padding_is_as_far_as_any_tap_reaches(causal, roots):
    n = Neighborhood(
        4,
        (3, 2),
        (0.3, -1),
        causal,
        "padded",
        "padded",
        axes=(3, 4),
        roots=roots,
        speeds=(1, -0.5),
    )
    offsets = list(zip(*(tap.offsets for speed in n.speeds for tap in n.taps(speed)), strict=True))
    expected = tuple((-math.floor(min(x)), math.ceil(max(x))) for x in offsets)
    assert n.padding() == ((-n.time_taps[0], n.time_taps[-1]), expected)


@pytest.mark.parametrize("shift", [0.1, 1 / 3, -1.25, -0.1, 1000.1, -1e9 - 0.3, 2.0**60, -2.0])
def test_coefficients_of_fractions_are_those_of_the_exact_ones(shift):
    """Rounded once: whatever the window adds to a roll, and however near to a position the roll is."""
    for tap in Neighborhood(4, 5, shift).taps():
        place = Fraction(tap.roll[0]) + tap.window[0]
        expected = {math.floor(place): float(1 - place % 1), math.floor(place) + 1: float(place % 1)}
        assert {at: part for part, (at,) in tap.corners} == {at: part for at, part in expected.items() if part}


def test_is_frozen_and_survives_copies():
    neighborhood = Neighborhood(18, 3, shift=-2, causal=True, capsule_boundary="zero")
    with pytest.raises(dataclasses.FrozenInstanceError):
        neighborhood.shift = 1
    assert pickle.loads(pickle.dumps(neighborhood)) == copy.deepcopy(neighborhood) == neighborhood


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"time_window": 0}, ValueError, "time_window must be at least 1, got 0"),
        ({"capsule_window": -3}, ValueError, "capsule_window must be at least 1, got -3"),
        (
            {"time_window": 0.5},
            TypeError,
            "time_window must be an integer, got 0.5: of sequences of S frames the paper's L is a window of W = 2·L·S",
        ),
        ({"capsule_window": True}, TypeError, "capsule_window must be an integer, got True"),
        ({"shift": "1"}, TypeError, "shift must be a number, got '1'"),
        ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
        (
            {"time_boundary": "reflect"},
            ValueError,
            'time_boundary must be "circular" or "zero" or "padded", got \'reflect\'',
        ),
        (
            {"capsule_boundary": None},
            ValueError,
            'capsule_boundary must be "circular" or "zero" or "padded", got None',
        ),
    ],
)
def test_refuses_what_is_no_neighborhood(options, error, message):
    with pytest.raises(error) as caught:
        Neighborhood(**options)
    assert str(caught.value) == message


def test_a_circular_window_must_fit_its_axis():
    Neighborhood(7, 5).check_fits(time=7, dim=5)
    with pytest.raises(ValueError, match="circular time_window of 8 does not fit 7 time steps"):
        Neighborhood(8, 5).check_fits(time=7, dim=5)
    with pytest.raises(ValueError, match="circular capsule_window of 6 does not fit 5 positions in a capsule"):
        Neighborhood(7, 6).check_fits(time=7, dim=5)


def test_a_cut_window_may_be_longer_than_its_axis():
    Neighborhood(8, 6, time_boundary="zero", capsule_boundary="zero").check_fits(time=7, dim=5)
    with pytest.raises(ValueError, match="capsule_window of 6"):
        Neighborhood(8, 6, time_boundary="zero").check_fits(time=7, dim=5)
