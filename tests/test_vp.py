"""The VP score: what it is of motions that are as different as can be, and of such as are not."""

import math

import pytest
import torch
from moving import Blocks, Mirror, Seer

from tvae.config import EvaluationSettings
from tvae.data import SequenceStream
from tvae.metrics import VPScore, vp
from tvae.metrics.vp import distinguished, network


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def squares(count, kinds, size=8):
    """Differences that are squares, of a colour for each kind, in noise; and the kinds."""
    kind = torch.arange(count) % kinds
    images = 0.1 * noise(count, kinds, size, size)
    images[torch.arange(count), kind, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] += 1
    return images, kind


@pytest.mark.parametrize("kinds", [2, 3, 5])
def test_coloured_squares_are_told_apart(kinds):
    assert distinguished(*squares(60 * kinds, kinds), kinds) == 1


def test_pairs_that_have_nothing_to_do_with_their_kind_give_chance():
    kind = torch.arange(1998) % 3
    share = 1 / 3
    deviation = math.sqrt(share * (1 - share) / 1800)
    assert distinguished(noise(1998, 1, 6, 6), kind, 3) == pytest.approx(share, abs=4 * deviation)


def test_it_is_trained_on_a_tenth_of_the_pairs_and_tested_on_all_others():
    """The others of which all have the next kind's colour: none is right that was not trained on."""
    images, kind = squares(300, 3)
    other = kind.clone()
    other[30:] = (kind[30:] + 1) % 3
    assert distinguished(images, other, 3) == 0
    other[29] = (kind[29] + 1) % 3  # the last of the tenth
    before = distinguished(images, kind, 3)
    assert before == 1
    images[30:33] = images[[31, 32, 30]]  # three of the others are wrong
    assert distinguished(images, kind, 3) == pytest.approx(1 - 3 / 270)


def test_a_pair_is_judged_whatever_pairs_it_is_tested_with():
    """Such as those that are all alike, between which there is no variance."""
    images, kind = squares(300, 3)
    for only in range(3):
        images[30:], kind[30:] = images[only], only
        assert distinguished(images, kind, 3) == 1


def test_it_is_the_same_every_time_and_disturbs_no_generator():
    images, kind = squares(120, 3)
    images = 0.05 * images + noise(120, 3, 8, 8)  # which are hard to tell apart
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = distinguished(images, kind, 3)
    assert 0 < first < 1
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for default in (torch.float64, torch.float32):
        torch.set_default_dtype(default)
        try:
            assert distinguished(images, kind, 3) == first
        finally:
            torch.set_default_dtype(torch.float32)


def test_large_differences_are_averaged():
    images, kind = squares(90, 3, size=64)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1:]) if isinstance(module, torch.nn.Sequential) else None
    )
    with handle:
        assert distinguished(images, kind, 3) > 0.9
    assert set(seen) == {(3, 32, 32)}
    for size in (1, 2, 3, 33):
        distinguished(noise(8, 1, size, size), torch.arange(8) % 2, 2)


def test_the_network_is_the_published_one_at_half_its_width():
    weights = [tuple(p.shape) for p in network(3, 4).parameters() if p.ndim > 1]
    assert weights == [(32, 3, 7, 7), (32, 32, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (4, 128)]
    assert network(3, 4)[:7](torch.zeros(2, 3, 28, 28)).shape == (2, 32, 7, 7)


class Still(Seer):
    """A seer that moves all alike."""

    def moved(self, batch, mix=None):
        return super().moved(batch, mix)[:, :1].expand(-1, batch.images.shape[1], -1, -1)


def scores(model, source, fit=False):
    metric = VPScore.build(model, source, EvaluationSettings())
    if fit:
        metric.fit(model, source)
    for _ in range(2):  # the second time nothing is left to do
        metric.measure(model, SequenceStream(source, 4, 0)[0], None)
    return {row.part: row for row in metric.rows()}


def test_what_is_scored_are_first_and_last_images_of_all_transformations_alike():
    source = Blocks()
    batches = list(VPScore(source).batches())
    assert torch.cat([batch.axis for batch in batches]).tolist() == [0, 1] * 12
    seen = torch.cat([batch.images[:, 0].amax((1, 2, 3)) for batch in batches])
    assert len(seen.unique()) == 24  # of every example one
    rows = scores(Seer(source.image_shape), source)
    assert rows[None].value == rows["true pairs"].value
    images = torch.cat([batch.images for batch in batches])
    expected = distinguished(images[:, 0] - images[:, -1], torch.arange(24) % 2, 2)
    assert rows[None].value == expected
    assert [(row.label, row.chance, row.digits) for row in rows.values()] == [
        ("VP score", 0.5, 3),
        ("VP score, true pairs", 0.5, 3),
    ]


def test_motions_that_are_alike_are_not_told_apart():
    source = Blocks()
    source.examples = 100
    rows = scores(Still(source.image_shape), source, fit=True)
    assert rows[None].value == 0.5  # one answer for all
    assert rows["true pairs"].value > 0.8
    assert rows["affine"].value > 0.8
    assert None not in scores(Mirror(source.image_shape), source)  # it has no motion of its own


def test_the_true_pairs_of_a_source_are_scored_once(monkeypatch):
    source, calls = Blocks(), []
    monkeypatch.setattr(vp, "distinguished", lambda differences, kind, kinds: calls.append(kinds) or 0.25)
    for expected in (2, 3):  # with the true pairs, and without
        rows = scores(Seer(source.image_shape), source)
        assert rows["true pairs"].value == 0.25
        assert len(calls) == expected
    scores(Seer(source.image_shape), Blocks())
    assert len(calls) == 5
