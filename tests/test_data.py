"""The registry of sources: what it opens, what it refuses, and that every source is what it says."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import tvae.data
from tvae.data import SOURCES, DataError, SequenceSource, SequenceStream, dsprites, open_source, register, shapes3d
from tvae.data.sprites import SpriteSequences


@pytest.fixture
def dsprites_dir(tmp_path, monkeypatch):
    """A folder that stands for one with dSprites, whose frames are noise."""
    DSprites = dsprites.DSpritesSequences
    DSprites.file(tmp_path).touch()
    noise = np.random.default_rng(0).integers(256, size=(*SpriteSequences().sizes, 1), dtype=np.uint8)
    monkeypatch.setattr(
        dsprites, "_read_dsprites", lambda path, sizes, kept: np.broadcast_to(noise, (*noise.shape[:-1], 512)).copy()
    )
    return tmp_path


def test_open_source(mnist_dir):
    assert isinstance(open_source("sprites", "test"), SpriteSequences)
    assert len(open_source("mnist", "validation", mnist_dir)) == 10
    with pytest.raises(
        ValueError, match="unknown source 'cifar'; choose from sprites, sprites-shifts, shapes, dsprites, mnist,"
    ):
        open_source("cifar", "train")
    with pytest.raises(ValueError, match="unknown split 'valid'; choose from train, validation, test"):
        open_source("sprites", "valid")
    with pytest.raises(DataError, match="mnist is read from files: pass --data-dir"):
        open_source("mnist", "train")


@pytest.fixture
def shapes3d_dir(tmp_path, monkeypatch):
    """A folder that stands for one with 3D Shapes, whose frames are noise."""

    class Noise:
        def __getitem__(self, rows):
            return np.random.default_rng(0).integers(256, size=(len(rows), 64, 64, 3), dtype=np.uint8)

    shapes3d.Shapes3DSequences.file(tmp_path).touch()
    monkeypatch.setattr(shapes3d, "_opened_hdf5", lambda path: nullcontext({"images": Noise()}))
    monkeypatch.setattr(shapes3d, "_check", lambda *_: None)
    return tmp_path


class Echo(SequenceSource):
    name = "echo"
    image_shape = (1, 2, 2)
    sequence_length = 3

    def __len__(self):
        return 9

    def render(self, examples, factors):
        return (examples[:, None, None, None, None] / 9).expand(-1, 3, *self.image_shape)


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back afterwards."""
    monkeypatch.setattr(tvae.data, "SOURCES", dict(SOURCES))
    return tvae.data.SOURCES


def test_a_source_of_a_users_own_is_opened_by_its_name(registry):
    assert register(Echo) is Echo
    source = open_source("echo", "validation")
    assert isinstance(source, Echo)
    assert source.device == torch.device("cpu")
    assert SequenceStream(source, 4, seed=0)[0].images.shape == (4, 3, 1, 2, 2)
    with pytest.raises(ValueError, match=r"unknown source 'echoes'; choose from .*, shapes3d, echo$"):
        open_source("echoes", "train")


def test_a_name_is_one_sources(registry):
    register(Echo)
    register(Echo)  # again is no harm

    class Other(Echo):
        pass

    with pytest.raises(ValueError, match="there is a source 'echo' already: Echo"):
        register(Other)
    assert registry["echo"] is Echo


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_what_it_says(name, mnist_dir, dsprites_dir, shapes3d_dir):
    folders = {"dsprites": dsprites_dir, "shapes3d": shapes3d_dir}
    source = open_source(name, "train", folders.get(name, mnist_dir))
    assert (source.name, SOURCES[name]) == (name, type(source))
    sequences = min(16, len(source))  # of two digits there are fewer
    images, factors, transformation, axis, label, *_ = SequenceStream(source, sequences, seed=0)[0]
    assert images.shape == (sequences, source.sequence_length, *source.image_shape)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert factors.shape == (sequences, source.sequence_length, len(source.sizes))
    assert (factors < torch.tensor(source.sizes)).all()
    if source.transformations:
        assert set(transformation.tolist()) <= set(source.transformations)
        assert torch.equal(torch.tensor(list(source.transformations))[axis], transformation)
        assert all(x.dtype == torch.int64 for x in (transformation, axis))
    else:  # as of pairs of poses
        assert transformation is axis is None
    assert label.shape == (sequences,)
    assert set(label.tolist()) <= set(range(len(source.classes)))
    assert all(x.dtype == torch.int64 for x in (factors, label))
    if source.open_paths:
        course = factors.gather(2, transformation[:, None, None].expand(-1, source.sequence_length, 1))[..., 0]
        assert torch.equal(course, torch.arange(source.sequence_length).expand(sequences, -1))
