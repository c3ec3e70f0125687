"""Which frames the traversal figure greys out, and what its rows show."""

import pytest
import torch

from tvae import TVAE, VAE
from tvae.data import SpriteSequences
from tvae.figures import frames_seen, traversals
from tvae_kernels import Neighborhood


@pytest.mark.parametrize(
    ("neighborhood", "seen"),
    [
        (Neighborhood(1), [0]),
        (Neighborhood(4), [0, 1, 2, 7]),  # taps -1 … 2
        (Neighborhood(4, time_boundary="zero"), [0, 1, 2]),
        (Neighborhood(3, causal=True), [0, 6, 7]),
        (Neighborhood(8), list(range(8))),
    ],
)
def test_t0_sees_the_frames_of_its_window(neighborhood, seen):
    model = TVAE((1, 2, 2), 1, 8, neighborhood)
    assert frames_seen(model, 8).nonzero().flatten().tolist() == seen


def test_without_topography_t0_sees_frame_0_alone():
    assert frames_seen(VAE((1, 2, 2), 1, 8), 8).nonzero().flatten().tolist() == [0]


def test_rows_are_input_reconstruction_and_traversal_of_every_transformation():
    source = SpriteSequences()
    torch.manual_seed(0)
    model = TVAE(source.image_shape, 1, 15, Neighborhood(5))
    cells = traversals(model, source).axes
    assert [cell.get_title(loc="left") for cell in cells[:: 3 * 15]] == ["scale", "orientation", "x", "y"]
    shown = torch.stack([torch.as_tensor(cell.images[0].get_array().data) for cell in cells]).reshape(4, 3, 15, 64, 64)
    seen = frames_seen(model, 15)
    images = torch.where(seen[:, None, None], shown[:, 0], 1 - (1 - shown[:, 0]) / 0.25).float()  # undo the grey
    assert set(images.unique().tolist()) == {0.0, 1.0}
    x = images[:, :, None]
    with torch.no_grad():
        torch.testing.assert_close(shown[:, 1].float(), model.reconstruct(x)[:, :, 0])
        torch.testing.assert_close(shown[:, 2].float(), model.traverse(x)[:, :, 0])
