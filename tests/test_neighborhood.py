import copy
import dataclasses
import pickle

import pytest

from tvae_kernels import Neighborhood


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
        ({"time_window": 2.0}, TypeError, "time_window must be an integer, got 2.0"),
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
