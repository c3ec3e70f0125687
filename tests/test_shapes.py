"""Shapes close up, and whether what a model decodes of them is recognised and turned as it should be."""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

from tvae.config import EvaluationSettings
from tvae.data import SequenceStream, open_source
from tvae.data.shapes import ShapeSequences, draw_shapes
from tvae.metrics import METRICS, DecodedShapes
from tvae.metrics.shapes import orientations, recognised
from tvae.models import TVAE, VAE
from tvae_kernels import Neighborhood


@pytest.fixture(scope="module")
def batch():
    return SequenceStream(open_source("shapes", "train"), 48, seed=0)[0]


def test_the_pixels_are_the_same_on_every_machine():
    """Parts of 16 points of a pixel, of shapes that no edge cuts and of which no two are alike."""
    drawings = draw_shapes() * 16
    assert drawings.shape == (3, 5, 15, 32, 32)
    assert torch.equal(drawings, drawings.round())
    digest = hashlib.sha256(drawings.to(torch.uint8).numpy().tobytes()).hexdigest()
    assert digest == "c1ab8a60a811b40515197eb515a161429203e066fd73920c12d1a756dcc6c691"
    assert len(torch.unique(drawings.flatten(0, 2).flatten(1), dim=0)) == len(ShapeSequences()) == 225
    for edge in (drawings[..., 0, :], drawings[..., -1, :], drawings[..., 0], drawings[..., -1]):
        assert not edge.any()


def test_sequences_show_their_factors(batch):
    drawings = draw_shapes()
    for image, factors in zip(batch.images.flatten(0, 1), batch.factors.flatten(0, 1).tolist(), strict=True):
        assert torch.equal(image[0], drawings[tuple(factors)])
    assert torch.equal(batch.label, batch.factors[:, 0, 0])
    assert set(batch.transformation.tolist()) == {1, 2}


def test_orientations_are_found_by_moments():
    """Of the drawings themselves, to what pixels leave of them; the skewness of a heart is small."""
    drawings, degrees = draw_shapes().double(), torch.tensor(ShapeSequences.factors[2].values).rad2deg()
    upright = orientations(drawings[2, -1, 0][None], torch.tensor([2]), 0.0)
    assert upright.item() == pytest.approx(
        90
    )  # the centre lies below the middle of the lobes, whose side is the longer
    for shape, period, median, most in ((1, 180, 0.2, 1), (2, 360, 1, 6)):
        found = orientations(drawings[shape].flatten(0, 1), torch.full((75,), shape), upright)
        error = (found - degrees.repeat(5) + period / 2) % period - period / 2
        assert error.abs().median() < median
        assert error.abs().max() < most


def test_every_drawing_is_recognised_and_a_disc_is_not_what_it_was():
    drawings = draw_shapes()
    grey = drawings.flatten(0, 2).double()
    assert torch.equal(recognised(grey, drawings), torch.arange(3).repeat_interleave(75))
    assert torch.equal(recognised(0.5 * grey + 0.1, drawings)[:75], torch.zeros(75, dtype=torch.int64))


class Decoder(TVAE):
    """Shows true frames where it reconstructs, but moved in frames that it has seen those of other sequences."""

    def reconstruct(self, batch):
        return batch.images

    def moved(self, batch, mix=None):
        images, unseen = batch.images.roll(1, 0), ~self.frames_seen(15)
        images[:, unseen] = batch.images[:, unseen]
        return images

    def decode(self, t):
        return t.logit(eps=1e-6)


def test_true_frames_are_recognised_and_turned_right_and_only_those_not_seen_count(batch):
    model = Decoder(ShapeSequences.image_shape, 15, 15, Neighborhood(10, 1))
    metric = METRICS["shapes"].build(model, ShapeSequences(), EvaluationSettings())
    metric.measure(model, batch, None)
    shares = batch.label.bincount() / 48
    for part in ("reconstruction", "moved"):
        assert metric.compute()[f"recognised, {part}"] == (1.0, pytest.approx(shares.max().item()))
        error, chance = metric.compute()[f"orientation, {part}"]
        assert error < 1
        assert chance == pytest.approx(90 / (1 + shares[1] / (shares[1] + shares[2])).item())
    assert [row.label for row in metric.rows()] == [
        "shape recognised, reconstruction",
        "orientation error, reconstruction",
        "shape recognised, moved, unseen frames",
        "orientation error, moved, unseen frames",
    ]


def test_frames_of_other_sequences_are_at_chance():
    """Up to the sampling error of some hundred sequences."""
    stream, metric = SequenceStream(ShapeSequences(), 150, seed=1), DecodedShapes()
    for batch in (stream[number] for number in range(4)):
        others = torch.randperm(150, generator=torch.Generator().manual_seed(0))
        metric.update("reconstruction", batch.images[others], batch.factors, torch.ones(15, dtype=torch.bool))
    value, _ = metric.compute()["recognised, reconstruction"]
    assert value == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 600))
    error, chance = metric.compute()["orientation, reconstruction"]
    assert error == pytest.approx(chance, abs=10)


def test_it_is_a_metric_of_shapes_alone(batch):
    assert not DecodedShapes.applies(None, open_source("sprites", "train"))
    model, metric = VAE(ShapeSequences.image_shape, 2, 3), DecodedShapes()
    metric.measure(model, batch, None)
    assert len(metric.rows()) == 2  # it has no motion of its own


def test_it_depends_neither_on_batches_nor_on_pytorchs_defaults(batch):
    """Nor on their order; here with a default device that has no memory, and another default type."""
    noisy = batch.images.roll(1, 0) * 0.5 + batch.images * 0.5
    frames = torch.arange(15) > 4

    def found(*parts):
        metric = DecodedShapes()
        for part in parts:
            metric.update("moved", noisy[part], batch.factors[part], frames)
        return metric.compute()

    expected, whole = found(torch.arange(48)), torch.arange(48).split([1, 20, 27])
    assert 0.3 < expected["recognised, moved"][0] < 0.99
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            assert found(*reversed(whole)) == expected
    finally:
        torch.set_default_dtype(before)


def test_the_readme_has_the_numbers_of_the_committed_result():
    root = Path(__file__).parent.parent
    metrics = json.loads((root / "results/shapes-tvae/evaluation.json").read_text())["metrics"]
    known = {x["part"]: x for x in metrics if x["key"] == "shapes"}
    seen, turned = known["recognised, moved"], known["orientation, moved"]
    page = (root / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"\d+\.\d", page.split("results/shapes-tvae/evaluation.json")[1].split("![")[0])
    shares = [f"{100 * seen[name]:.1f}" for name in ("value", "chance")]
    assert shown == [*shares, *(f"{turned[name]:.1f}" for name in ("value", "chance"))]
    with (root / "results/shapes-tvae/metrics.csv").open(newline="") as log:
        (*_, last) = csv.DictReader(log)
    assert f"a loss near {float(last['loss']):.0f} nats a frame after {int(last['step']):,} steps" in page
