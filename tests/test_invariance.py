"""What metrics must not depend on: the scale of capsules, batches and their order, processes, PyTorch's defaults."""

import math

import pytest
import torch

from tvae.evaluation import load, save, table
from tvae.metrics import (
    ActiveUnits,
    CapCorr,
    ELBOTerms,
    EquivarianceError,
    LogLikelihood,
    MovedLikelihood,
    PixelError,
    Row,
    TotalCorrelation,
    TransformationAccuracy,
    equivariance_error,
    observed_roll,
)
from tvae.models import ELBO, Bernoulli
from tvae_kernels import Neighborhood, roll_capsules

CUT = Neighborhood(capsule_boundary="zero")
AXES = Neighborhood(axes=(3, 5), roots="each axis")


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def sequences(count=24, steps=15):
    """Capsules, factors, transformations and axes of some sequences, which roll a little."""
    kind = torch.arange(count) % 2
    factors = torch.zeros(count, steps, 2, dtype=torch.int64)
    start = torch.randint(steps, (count, 1), generator=torch.Generator().manual_seed(1))
    factors[torch.arange(count), :, kind] = (start + torch.arange(steps)) % steps
    t = torch.stack([normal(count, 3, 15).roll(l, -1) for l in range(steps)], 1) + 2 * normal(count, steps, 3, 15)
    return t, factors, kind, kind


# --- scale ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1e-20, torch.float32), (1e-36, torch.float32), (1e25, torch.float32), (1e-250, torch.float64)],
)
@pytest.mark.parametrize("rolls", [Neighborhood(), CUT, AXES], ids=["circular", "cut", "axes"])
def test_metrics_of_capsules_do_not_depend_on_their_scale(rolls, scale, dtype):
    """One capsule at another scale than the others, and all at another."""
    t = normal(2, 15, 3, 15).to(dtype)
    # By a power of two, so that nothing is rounded.
    power = 2.0 ** round(math.log2(scale))
    scaled = t * power
    single = t * torch.tensor([1, power, 1], dtype=dtype)[:, None]
    expected = equivariance_error(t, rolls)
    assert torch.equal(equivariance_error(scaled, rolls), expected)
    assert torch.equal(equivariance_error(single, rolls), expected)
    assert torch.equal(observed_roll(scaled[:, 0], scaled, rolls), observed_roll(t[:, 0], t, rolls))
    if rolls is not AXES:  # where the larger products choose the axis
        assert torch.equal(observed_roll(single[:, 0], single, rolls), observed_roll(t[:, 0], t, rolls))


@pytest.mark.parametrize(("scale", "dtype"), [(1e-30, torch.float32), (1e25, torch.float32), (1e-250, torch.float64)])
def test_the_total_correlation_does_not_depend_on_scales(scale, dtype):
    """Of all variables, and of some of them."""
    t, power = normal(10, 15, 3, 15).to(dtype), 2.0 ** round(math.log2(scale))
    one, every, some = (added(TotalCorrelation(), [range(10)], x) for x in (t, t * power, t.clone()))
    some.samples[0][:, ::7] *= power
    assert one.rows() == every.rows() == some.rows()
    assert math.isfinite(one.rows()[0].value)


def test_the_axis_is_that_of_the_larger_products_before_they_are_scaled():
    """Capsules of any size: against the sums of the products themselves."""
    t = normal(16, 4, 3, 15) * torch.tensor([1e3, 1.0, 3.0], dtype=torch.float64)[:, None]
    scores, votes = [], []
    for axis, steps in enumerate(AXES.axes):
        rolled = torch.stack([roll_capsules(t[:, 0], -k, AXES, axis) for k in range(steps)])
        match = (rolled[:, :, None] * t).sum(-1)  # step, batch, time, capsule
        best = torch.nn.functional.one_hot(match.argmax(0), steps).sum(2).argmax(-1)
        votes.append(best)
        scores.append(match.sum(-1).gather(0, best[None])[0])
    expected = torch.where(scores[0] >= scores[1], votes[0], votes[1])
    assert torch.equal(observed_roll(t[:, 0], t, AXES), expected)
    assert not torch.equal(expected, votes[0])
    assert not torch.equal(expected, votes[1])


def test_a_sum_in_half_precision_is_taken_in_float32():
    t = normal(4, 18, 18, 18)
    for dtype in (torch.bfloat16, torch.float16):
        half, full = t.to(dtype), t.to(dtype).float()
        assert torch.equal(equivariance_error(half), equivariance_error(full))
        assert torch.equal(observed_roll(half[:, 0], half), observed_roll(full[:, 0], full))


# --- batches and processes --------------------------------------------------------------------------------------------


def measured(metric, parts, forward=False):
    """What a metric says, with its chance, of sequences that come in parts."""
    t, factors, kind, axis = sequences()
    for part in parts:
        add = metric if forward else metric.update
        if isinstance(metric, CapCorr):
            add(t[part], factors[part], kind[part], axis[part] if metric.rolls is AXES else None)
        else:
            add(t[part], axis[part] if metric.rolls is AXES else None)
    return metric.compute(), metric.chance()


WHOLE = [list(range(24))]
PARTED = {
    "batches": [list(range(i, i + 4)) for i in range(0, 24, 4)],
    "uneven batches": [list(range(5)), [5], list(range(6, 24))],
    "another order": [list(range(23, 11, -1)), list(range(0, 12))],
}


@pytest.mark.parametrize("forward", [False, True], ids=["update", "forward"])
@pytest.mark.parametrize("parts", PARTED.values(), ids=PARTED)
@pytest.mark.parametrize("rolls", [Neighborhood(), AXES], ids=["one axis", "known axes"])
def test_metrics_of_capsules_do_not_depend_on_batches(rolls, parts, forward):
    value, chance = measured(CapCorr(["x", "y"], rolls), parts, forward)
    expected, expected_chance = measured(CapCorr(["x", "y"], rolls), WHOLE)
    assert value == pytest.approx(expected, rel=1e-12)
    assert chance == expected_chance
    value, chance = measured(EquivarianceError(rolls), parts, forward)
    expected, expected_chance = measured(EquivarianceError(rolls), WHOLE)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert chance == expected_chance


@pytest.mark.parametrize("parts", PARTED.values(), ids=PARTED)
def test_likelihoods_do_not_depend_on_batches(parts):
    weights, frames = normal(3, 24, 5), normal(2, 24, 5)
    found = []
    for batches in (parts, WHOLE):
        metric, terms = LogLikelihood(), ELBOTerms()
        for part in batches:
            metric.update(weights[:, part])
            total, cost = frames[:, part]
            terms.update(ELBO(total, {"cost": cost}, total, cost))
        found.append({**metric.compute(), **terms.compute()})
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def moved(metric, parts):
    """What metrics of motion say of sequences that come in parts, in float32 as the images are."""
    images, guesses = (torch.rand(2, 24, 3, 1, 5, 7, generator=torch.Generator().manual_seed(0))).unbind(0)
    axis, log_prob = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0] * 3), normal(24, 3)
    for part in parts:
        if isinstance(metric, PixelError):
            metric.update(images[part], axis[part], {"own motion": guesses[part], "x_0 kept": images[part, :1]})
        elif isinstance(metric, MovedLikelihood):
            metric.update(log_prob[part], images[part], axis[part])
        else:
            metric.update((axis[part] + torch.tensor(part) // 20) % 2, axis[part])
    return metric


def added(metric, parts, t):
    """A metric of all frames of capsules or posterior means that come in parts."""
    for part in parts:
        metric.update(t[part])
    return metric


CORRELATED = normal(24, 15, 2, 3) * torch.linspace(0.03, 0.3, 3) + normal(24, 1, 2, 1) / 10
COUNTED = {"total correlation": TotalCorrelation, "active units": ActiveUnits}


@pytest.mark.parametrize("make", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("parts", PARTED.values(), ids=PARTED)
def test_metrics_of_variables_do_not_depend_on_batches(parts, make):
    expected = added(make(), WHOLE, CORRELATED).rows()
    assert expected[0].value > expected[0].chance
    assert_alike(added(make(), parts, CORRELATED).rows(), expected)


MOVED = {
    "pixel error": lambda: PixelError(["x", "y"], 3),
    "likelihood": lambda: MovedLikelihood(["x", "y"], Bernoulli(), 3, (1, 5, 7)),
    "accuracy": lambda: TransformationAccuracy(2),
}


@pytest.mark.parametrize("make", MOVED.values(), ids=MOVED)
@pytest.mark.parametrize("parts", PARTED.values(), ids=PARTED)
def test_metrics_of_motion_do_not_depend_on_batches(parts, make):
    assert_alike(moved(make(), parts).rows(), moved(make(), WHOLE).rows())


def assert_alike(rows, expected):
    """Rows that are the same up to the order of sums, in float64."""
    for row, other in zip(rows, expected, strict=True):
        assert row[:3] == other[:3]
        assert (row.value, row.chance) == pytest.approx((other.value, other.chance), rel=1e-12, nan_ok=True)


def test_metrics_do_not_depend_on_the_number_of_processes():
    """Each holds what one of three processes has been given; the states of all are gathered as torchmetrics does."""
    t, factors, kind, _ = sequences()
    parts = [list(range(0, 8)), list(range(8, 12)), list(range(12, 24))]
    for make, values in (
        (lambda: CapCorr(["x", "y"]), (t, factors, kind)),
        (EquivarianceError, (t,)),
    ):
        whole, (metric, *others) = make(), [make() for _ in parts]
        whole.update(*values)
        for process, part in zip((metric, *others), parts, strict=True):
            process.update(*(x[part] for x in values))
        states = list(metric._defaults)  # in whose order they are gathered
        asked = iter(states * 10)

        def gather(x, group, asked=asked, others=others):
            name = next(asked)
            of_others = [getattr(other, name) for other in others]
            return [x, *(torch.cat(y) if isinstance(y, list) else y for y in of_others)]

        metric.dist_sync_fn, metric.distributed_available_fn = gather, lambda: True
        assert metric.chance() == whole.chance()
        expected = whole.compute()
        assert metric.compute() == pytest.approx(expected if isinstance(expected, dict) else expected.item())


def counted(metric, parts):
    return added(metric, parts, CORRELATED)


NEWER = [*((moved, make) for make in MOVED.values()), *((counted, make) for make in COUNTED.values())]
newer = pytest.mark.parametrize(("measured", "make"), NEWER, ids=[*MOVED, *COUNTED])


@newer
def test_metrics_of_motion_and_of_variables_do_not_depend_on_the_number_of_processes(measured, make):
    """As above; images of several processes come as one tensor."""
    parts = [list(range(0, 8)), list(range(8, 12)), list(range(12, 24))]
    whole, (metric, *others) = measured(make(), WHOLE), [measured(make(), [part]) for part in parts]
    holders = [getattr(x, "errors", x) for x in (metric, *others)]  # of the states
    asked = iter(list(holders[0]._defaults) * 10)

    def gather(x, group):
        name = next(asked)
        of_others = [getattr(other, name) for other in holders[1:]]
        return [x, *(torch.cat(y) if isinstance(y, list) else y for y in of_others)]

    holders[0].dist_sync_fn, holders[0].distributed_available_fn = gather, lambda: True
    assert_alike(metric.rows(), whole.rows())


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
@newer
def test_metrics_of_motion_and_of_variables_do_not_depend_on_pytorchs_defaults(default, measured, make):
    metric = measured(make(), WHOLE)
    expected = measured(make(), WHOLE).rows()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    try:
        assert_alike(metric.rows(), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("default", [torch.float64, torch.device("meta")], ids=str)
def test_chance_levels_do_not_depend_on_pytorchs_defaults(default):
    metric, error = CapCorr(["x", "y"]), EquivarianceError(AXES)
    t, factors, kind, axis = sequences()
    metric.update(t, factors, kind)
    error.update(t, axis)
    expected = metric.chance(), error.chance()
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    else:
        torch.set_default_device(default)
    try:
        assert (metric.chance(), error.chance()) == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# --- what has no value ------------------------------------------------------------------------------------------------


def spoilt(change):
    t, factors, kind, _ = (x.clone() for x in sequences(6))
    change(t, factors, kind)
    metric = CapCorr(["x", "y"])
    metric.update(t, factors, kind)
    return metric


def never_at_0(t, factors, kind):
    factors[0, :, 0] += 1


def all_alike(t, factors, kind):
    factors[kind == 0] = factors[0].clone()


def not_finite(t, factors, kind):
    t[2, 3, 1, 4] = math.nan


def one_alone(t, factors, kind):
    kind[2:] = 1


def still(t, factors, kind):
    t[kind == 0] = t[kind == 0][:, :1]
    t[kind == 0] = 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (never_at_0, "a sequence never passes index 0 of the factor"),
        (all_alike, "all sequences start alike"),
        (not_finite, "capsules are not finite"),
        (one_alone, "of one sequence alone"),
        (still, "the observed roll never varies"),
    ],
)
def test_capcorr_that_there_is_none_of_is_nan_with_a_reason(change, reason, tmp_path):
    """And no warning, which would be an error here; the other transformation has its value."""
    metric = spoilt(change)
    value = metric.compute()
    assert math.isnan(value["x"])
    assert math.isfinite(value["y"])
    assert metric.reasons() == {"x": reason}
    rows = metric.rows()
    assert [row.note for row in rows] == [reason, ""]
    save(rows, 6, tmp_path / "evaluation.json")
    assert str(load(tmp_path / "evaluation.json")) == str(rows)
    units = [str(cell) for cell in list(table(rows, "title").columns)[3].cells]
    assert units == [reason, ""]


def test_a_row_without_a_note_is_written_as_before(tmp_path):
    save([Row("capcorr", "x", "CapCorr x", 0.9, 0.1, digits=2)], 3, tmp_path / "evaluation.json")
    assert "note" not in (tmp_path / "evaluation.json").read_text()
