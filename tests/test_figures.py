"""What the figures show, by value."""

import numpy as np
import pytest
import torch

from tvae import TVAE, VAE
from tvae.data import FixedSequences, SequenceBatch, SequenceSource, SequenceStream, open_source
from tvae.data.sprites import SpriteSequences
from tvae.figures import (
    FIGURE_SEED,
    Panel,
    Series,
    add_confusion,
    capcorr_against_coherence,
    cluster_panels,
    comparison,
    covariance,
    draw_panels,
    portrait,
    some_of_each,
    squared_activation_correlation,
    torus_map,
    traversal_panels,
    traversals,
    within_and_between,
)
from tvae.models import ClusterVAE
from tvae_kernels import Neighborhood


def frames(axes, rows, steps):
    """The frames of a panel, (row, frame, height, width), which a white rim keeps apart."""
    shown = torch.as_tensor(np.asarray(axes.images[0].get_array()))
    cells = shown.unflatten(0, (rows, -1)).unflatten(2, (steps, -1)).movedim(2, 1)  # row, frame, height, width
    size = 64
    assert (cells[:, :, size:] == 1).all()
    assert (cells[:, :, :, size:] == 1).all()
    return cells[:, :, :size, :size]


def test_rows_are_input_reconstruction_and_traversal_of_every_transformation():
    source = SpriteSequences()
    torch.manual_seed(0)
    model = TVAE(source.image_shape, 1, 15, Neighborhood(5))
    panels = traversals(model, source).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["scale", "orientation", "x", "y"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["input", "reconstruction", "Roll$_l(t_0)$"]
    shown = torch.stack([frames(panel, 3, 15) for panel in panels])
    seen = model.frames_seen(15)
    images = torch.where(seen[:, None, None], shown[:, 0], 1 - (1 - shown[:, 0]) / 0.25).float()  # undo the grey
    assert set(images.unique().tolist()) == {0.0, 1.0}
    batch = SequenceBatch(images[:, :, None])
    with torch.no_grad():
        torch.testing.assert_close(shown[:, 1].float(), model.reconstruct(batch)[:, :, 0])
        torch.testing.assert_close(shown[:, 2].float(), model.traverse(batch)[:, :, 0])


def test_a_comparison_shows_the_motion_of_each_model_or_its_reconstruction():
    source = SpriteSequences()
    torch.manual_seed(0)
    rolling, still = TVAE(source.image_shape, 1, 15, Neighborhood(5)), VAE(source.image_shape, 1, 15)
    panels = comparison({"TVAE": rolling, "a VAE that stands still": still}, source).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["scale", "orientation", "x", "y"]
    labels = ["input", "TVAE, moved", "a VAE that stands still, reconstruction"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == labels
    shown = torch.stack([frames(panel, 3, 15) for panel in panels]).float()
    batch = SequenceBatch(shown[:, 0, :, None])
    with torch.no_grad():
        torch.testing.assert_close(shown[:, 1], rolling.traverse(batch)[:, :, 0])
        torch.testing.assert_close(shown[:, 2], still.reconstruct(batch)[:, :, 0])


def test_a_grid_shows_every_transformation_and_shape_evenly_in_two_columns():
    source = SpriteSequences()
    model = VAE(source.image_shape, 1, 15)
    figure = traversals(model, source, each=3)
    assert [panel.get_title(loc="left") for panel in figure.axes] == [
        name for name in ("scale", "orientation", "x", "y") for _ in range(3)
    ]
    assert [round(panel.get_position().x0, 3) for panel in figure.axes] == sorted(
        round(panel.get_position().x0, 3) for panel in figure.axes
    )
    assert len({round(panel.get_position().x0, 3) for panel in figure.axes}) == 2
    shapes = some_of_each(source, 3).factors[:, 0, 0].tolist()
    assert [set(shapes[i : i + 3]) for i in range(0, 12, 3)] == [{0, 1, 2}] * 4


def test_panels_of_different_lengths_have_frames_of_one_size():
    panels = [Panel("", ("a",), torch.zeros(1, frames, 4, 4, 1)) for frames in (3, 7)]
    figure = draw_panels([panels[:1], panels[1:]])
    width, height = figure.get_size_inches()
    boxes = [axes.get_position() for axes in figure.axes]
    for box, count in zip(boxes, (3, 7), strict=True):
        assert box.width * width / count == pytest.approx(box.height * height)
    assert boxes[0].x1 < boxes[1].x0


class Noise(SequenceSource):
    """Colour images of noise, of which nothing else is known."""

    name = "noise"
    image_shape = (3, 4, 4)
    sequence_length = 5

    def __len__(self):
        return 6

    def render(self, examples, factors):
        assert factors.shape == (len(examples), 5, 0)
        return torch.rand(len(examples), 5, *self.image_shape, generator=torch.Generator().manual_seed(0))


def test_of_a_source_without_factors_sequences_of_one_kind_are_shown():
    source = Noise()
    model = VAE(source.image_shape, 1, 5)
    panels = traversal_panels(model, source, each=2, title="noise")
    assert [panel.title for panel in panels] == ["noise", "noise"]
    batch = SequenceStream(source, 6, FIGURE_SEED)[0].select([0, 1])
    images = torch.stack([panel.images for panel in panels])
    torch.testing.assert_close(images[:, 0, 0], batch.images[:, 0].movedim(1, -1))
    with torch.no_grad():
        torch.testing.assert_close(images[:, 1], model.reconstruct(batch).movedim(2, -1))
    assert len(traversals(model, source).axes) == 1


def test_squared_activations_correlate_as_numpy_says():
    source = SpriteSequences()
    torch.manual_seed(0)
    model = TVAE(source.image_shape, 2, 15, Neighborhood(3))
    batches = [SequenceStream(source, 4, 0)[i] for i in range(2)]
    torch.manual_seed(5)
    correlation = squared_activation_correlation(model, batches)
    torch.manual_seed(5)
    with torch.no_grad():
        t = torch.cat([model.encode(batch) for batch in batches])
    expected = np.corrcoef((t.double() ** 2).flatten(0, 1).flatten(1).T.numpy())
    # squares were rounded to float32: 6e-8 of each, which the coefficients of 120 frames do not enlarge much
    np.testing.assert_allclose(correlation.flatten(2).flatten(0, 1), expected, atol=1e-5)


def test_correlations_within_and_between_capsules_by_distance_on_the_circle():
    C, D = 3, 6
    c, d, e, f = np.meshgrid(range(C), range(D), range(C), range(D), indexing="ij")
    distance = np.minimum((d - f) % D, (f - d) % D)
    correlation = torch.tensor(np.where(c == e, 1 - distance / 4, 0.01 * distance))
    within, between = within_and_between(correlation)
    torch.testing.assert_close(within, torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(between, torch.tensor([0, 0.01, 0.02, 0.03], dtype=torch.float64))
    lines = covariance({"a": correlation, "b": correlation}, capsules=2).axes
    np.testing.assert_array_equal(lines[0].images[0].get_array(), correlation[:2, :, :2].reshape(12, 12))
    np.testing.assert_allclose(lines[2].lines[0].get_ydata(), within)


def test_capcorr_figure_draws_every_series_and_chance():
    series = [Series("TVAE", [0.0, 0.5], [0.2, 1.0], [0.1, 0.0]), Series("VAE", [0.0], [0.3], [0.0])]
    panels = capcorr_against_coherence({"ours": series, "paper": series[:1]}, chance=0.25).axes
    labels = [sorted(text.get_text() for text in axes.get_legend().get_texts()) for axes in panels]
    assert labels == [["TVAE", "VAE", "chance"], ["TVAE", "chance"]]
    np.testing.assert_allclose(panels[0].containers[0].lines[0].get_xydata(), [[0, 0.2], [0.5, 1]])
    styles = {(c.lines[0].get_linestyle(), c.lines[0].get_marker()) for c in panels[0].containers}
    assert len(styles) == 2
    with pytest.raises(IndexError):
        capcorr_against_coherence({"ours": series * 4}, chance=0.25)  # rather than draw two alike, or leave one out


def test_the_torus_shows_the_image_that_activates_each_variable_most():
    """Of two images, of which each activates half of the variables more."""
    model = TVAE((1, 2, 2), 1, 6, Neighborhood(axes=(2, 3)))
    images = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1, 1).expand(2, 1, 1, 2, 2)
    activations = {0.25: [1.0, 1, 1, 0, 0, 0], 0.75: [0.0, 0, 0, 1, 1, 1]}
    model.encode = lambda batch, sample: torch.tensor([[[activations[float(i[0, 0, 0, 0])]]] for i in batch.images])
    batches = [SequenceBatch(image[None]) for image in images]
    for order in (
        batches,
        batches[::-1],
        [SequenceBatch(images)],
    ):
        (shown,) = torus_map(model, order).axes[0].get_images()
        tiles = shown.get_array()
        assert tiles.shape == (6, 9)  # 2 x 3 images of 2 x 2 pixels with rims
        assert (tiles[:2, [0, 1, 3, 4, 6, 7]] == 0.25).all()
        assert (tiles[3:5, [0, 1, 3, 4, 6, 7]] == 0.75).all()


def test_a_torus_needs_still_images_and_two_axes():
    still = SequenceBatch(torch.rand(1, 1, 1, 2, 2))
    moving = SequenceBatch(torch.rand(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="of a single capsule of two axes, got 2 of Neighborhood"):
        torus_map(TVAE((1, 2, 2), 2, 6, Neighborhood(axes=(2, 3))), [still])
    with pytest.raises(ValueError, match="of still images, got sequences of 3 frames"):
        torus_map(TVAE((1, 2, 2), 1, 6, Neighborhood(axes=(2, 3))), [moving])


def test_the_portrait_of_a_model_is_of_what_it_does(mnist_dir):
    source = open_source("mnist-still", "test", mnist_dir)
    model = TVAE(source.image_shape, 1, 6, Neighborhood(1, (1, 2), axes=(2, 3)))
    name, figure = portrait(model, source, batch_size=10)
    assert name == "torus"
    (shown,) = figure.axes[0].get_images()
    assert shown.get_array().shape == (2 * 29, 3 * 29)
    name, figure = portrait(VAE((1, 64, 64), 1, 15), SpriteSequences(), batch_size=10)
    assert (name, len(figure.axes)) == ("traversals", 4)


@pytest.mark.parametrize("told_axis", [False, True])
def test_capsules_with_a_root_for_each_axis_are_rolled_along_each(told_axis):
    model = TVAE((1, 64, 64), 1, 6, Neighborhood(2, 1, axes=(2, 3), roots="each axis"), told_axis=told_axis)
    panels = traversal_panels(model, open_source("sprites-shifts", "test"))
    assert [panel.title for panel in panels] == ["x", "y"]
    for panel in panels:
        assert panel.labels[2:] == ("Roll$_l(t_0)$, axis 0", "Roll$_l(t_0)$, axis 1")
        assert panel.images.shape == (4, 15, 64, 64, 1)
        assert not torch.equal(panel.images[2], panel.images[3])


def test_clusters_are_drawn_with_what_is_canonical_and_how_many_of_each_class_they_hold(mnist_dir):
    source = open_source("mnist-posed", "test", mnist_dir)
    torch.manual_seed(0)
    model = ClusterVAE(source.image_shape, 1, 7, code=3, clusters=3, starts=2, units=8)
    batches = FixedSequences.take(source, 20, 10).batches
    found = torch.cat([model.identified(batch).cluster[:, 0] for batch in batches])
    shown = found.mode().values.item()
    count = min(4, (found == shown).sum().item())
    (panel,) = cluster_panels(model, batches, {shown: "most", 99: "no such cluster"})
    assert (panel.title, panel.labels) == ("most", ("input", "reconstruction", "canonical"))
    assert panel.images.shape == (3, 2 * count, 28, 28, 1)
    images = torch.cat([batch.images for batch in batches])[found == shown][:count].flatten(0, 1)
    torch.testing.assert_close(panel.images[0], images.movedim(1, -1))
    batch = SequenceBatch(images[:, None])
    torch.testing.assert_close(panel.images[2], model.identified(batch).canonical[:, 0].movedim(1, -1).detach())
    figure = draw_panels([[panel]])
    table = np.array([[3, 0, 1], [0, 5, 2]])
    add_confusion(figure, {"first": (table, [2, 0, 1]), "second": (table, [2, 0, 1])}, ("a", "b"))
    _, first, second = figure.axes
    assert [text.get_text() for text in first.texts] == ["3", "0", "1", "0", "5", "2"]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["2", "0", "1"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["a", "b"]
    torch.testing.assert_close(torch.from_numpy(first.images[0].get_array().data), torch.from_numpy(table / [[4], [7]]))
    assert second.get_title() == "second"
    assert second.get_position().y1 < first.get_position().y0
    assert first.get_position().x0 > 1  # right of the panels
