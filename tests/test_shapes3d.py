"""The reader of 3D Shapes on whole, damaged and missing files of its layout."""

import sys

import h5py
import numpy as np
import pytest
import torch

from tvae.data import DataError, Factor, SequenceStream, open_source
from tvae.data.rooms import RoomSequences
from tvae.data.shapes3d import Shapes3DSequences

SIZES = (3, 2, 2, 4, 2, 5)
COUNT = 480


class Small(Shapes3DSequences):
    """3D Shapes of 480 images, whose scale advances alone: four frames."""

    sequence_length = 4
    factors = tuple(
        Factor(factor.name, factor.values[:size], factor.name == "scale")
        for factor, size in zip(Shapes3DSequences.factors, SIZES, strict=True)
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(256, size=(COUNT, 64, 64, 3), dtype=np.uint8)


def grid(sizes):
    """The labels of a file: values that rise with the index, the last factor varying fastest."""
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=-1) / 10


def write(folder, **arrays):
    with h5py.File(folder / "3dshapes.h5", "w") as file:
        for name, array in arrays.items():
            if array is None:
                file.create_group(name)
            else:
                file.create_dataset(
                    name, data=array, chunks=(1, *array.shape[1:]), compression="gzip", compression_opts=1
                )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    return write(tmp_path_factory.mktemp("small"), images=images, labels=grid(SIZES))


def test_frames_are_the_rows_of_the_file_in_any_order_with_duplicates(folder, images):
    source = Small(folder)
    factors = torch.tensor([[[2, 1, 1, 3, 1, 4], [0, 0, 0, 0, 0, 0]], [[1, 0, 1, 2, 0, 3], [2, 1, 1, 3, 1, 4]]])
    frames = source.render(torch.zeros(2, dtype=torch.int64), factors)
    rows = [[479, 0], [160 + 40 + 2 * 10 + 3, 479]]
    expected = torch.from_numpy(images[rows]).permute(0, 1, 4, 2, 3).float() / 255
    assert frames.dtype == torch.float32
    assert torch.equal(frames, expected)


def test_sequences_are_of_the_kinds_of_rooms(folder, images):
    source = Small.open("train", folder, torch.device("cpu"), download=True)
    assert len(source) == COUNT
    batch = SequenceStream(source, 32, seed=0)[0]
    assert batch.factors[:, :, 3].tolist() == [[0, 1, 2, 3]] * 32
    assert torch.equal(batch.label, batch.factors[:, 0, 4])
    rows = np.ravel_multi_index(tuple(batch.factors.numpy().transpose(2, 0, 1)), SIZES)
    assert torch.equal(batch.images.mul(255).round().byte(), torch.from_numpy(images[rows]).permute(0, 1, 4, 2, 3))
    for what in ("factors", "classes", "image_shape", "sequence_length", "open_paths"):
        assert getattr(Shapes3DSequences, what) == getattr(RoomSequences, what)
    assert RoomSequences.capturable
    assert not Shapes3DSequences.capturable


def test_a_file_of_the_real_size_is_opened(tmp_path):
    """Without pixels: of chunks that nobody wrote, HDF5 stores nothing."""
    sizes = (10, 10, 10, 8, 4, 15)
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file.create_dataset("images", (480_000, 64, 64, 3), np.uint8, chunks=(1, 64, 64, 3), fillvalue=255)
        file["labels"] = grid(sizes)
    source = open_source("shapes3d", "validation", tmp_path)
    assert source.sizes == sizes
    batch = SequenceStream(source, 2, seed=0)[0]
    assert torch.equal(batch.images, torch.ones(2, 8, 3, 64, 64))


def relabelled(function):
    def labels():
        values = grid(SIZES)
        function(values)
        return values

    return labels


def swap(values):
    values[[5, 6]] = values[[6, 5]]


def merge(values):
    values[:, 3] = np.minimum(values[:, 3], 0.2)  # the last two scales


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ...}, r"should contain images and labels, found \['labels'\]"),
        ({"labels": ...}, r"should contain images and labels, found \['images'\]"),
        ({"images": lambda x: x[1:]}, r"images should be uint8 \(480, 64, 64, 3\), found uint8 \(479, 64, 64, 3\)"),
        ({"images": lambda x: x[:, :32]}, r"found uint8 \(480, 32, 64, 3\)"),
        ({"images": lambda x: x.astype(np.int16)}, r"found int16 \(480, 64, 64, 3\)"),
        ({"images": lambda x: None}, "images should be uint8 .* found None None"),
        ({"labels": lambda x: x[:, :5]}, r"labels should be float64 \(480, 6\), found float64 \(480, 5\)"),
        ({"labels": lambda x: x.astype(np.float32)}, r"found float32 \(480, 6\)"),
        ({"labels": lambda x: relabelled(swap)()}, "factor 5 of the labels should have 5 values, in the order"),
        ({"labels": lambda x: relabelled(merge)()}, "factor 3 of the labels should have 4 values, in the order"),
        ({"labels": lambda x: grid(SIZES[::-1])[:, ::-1]}, "factor 0 of the labels should have 3 values, in the order"),
    ],
    ids=["no images", "no labels", "count", "size", "type", "group", "columns", "float", "swapped", "merged", "order"],
)
def test_another_layout_is_a_data_error(change, message, images, tmp_path):
    arrays = {"images": images, "labels": grid(SIZES)}
    for name, function in change.items():
        if function is ...:
            del arrays[name]
        else:
            arrays[name] = function(arrays[name])
    write(tmp_path, **arrays)
    with pytest.raises(DataError, match=message) as raised:
        Small(tmp_path)
    assert str(tmp_path / "3dshapes.h5") in str(raised.value)
    assert "not a whole file" not in str(raised.value)


@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[: len(content) // 2], lambda content: b"<html>not found</html>", lambda content: b""],
    ids=["cut", "not HDF5", "empty"],
)
def test_a_damaged_file_is_a_data_error(spoil, folder, tmp_path):
    path = tmp_path / "3dshapes.h5"
    path.write_bytes(spoil((folder / path.name).read_bytes()))
    with pytest.raises(DataError, match=r"is not a whole file of 3D Shapes .*3d-shapes") as raised:
        Small(tmp_path)
    assert str(path) in str(raised.value)


def test_damaged_images_are_a_data_error_when_they_are_read(folder, images, tmp_path):
    path = tmp_path / "3dshapes.h5"
    content = bytearray((folder / path.name).read_bytes())
    with h5py.File(folder / path.name) as file:
        chunk = file["images"].id.get_chunk_info(7)
    content[chunk.byte_offset + 100 : chunk.byte_offset + 200] = bytes(100)
    path.write_bytes(content)
    source = Small(tmp_path)
    row = torch.tensor([[[0, 0, 0, 0, 1, 3]]])  # 8
    frame = source.render(torch.zeros(1, dtype=torch.int64), row)[0, 0]
    assert torch.equal(frame, torch.from_numpy(images[8]).permute(2, 0, 1) / 255)
    with pytest.raises(DataError, match=f"{path} is not a whole file of 3D Shapes"):
        source.render(torch.zeros(1, dtype=torch.int64), row - torch.tensor([0, 0, 0, 0, 0, 1]))


def test_a_missing_file_is_said_where_to_find(tmp_path):
    with pytest.raises(
        DataError, match=r"no 3dshapes.h5 in .*; pass --data-dir .* bucket 3d-shapes, https://"
    ) as raised:
        open_source("shapes3d", "train", tmp_path, download=True)
    assert str(tmp_path) in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_only_3d_shapes_need_h5py(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    open_source("rooms", "train")
    with pytest.raises(DataError, match="install the extra shapes3d, or h5py itself"):
        Small(folder)
