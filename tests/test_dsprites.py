"""The reader of dSprites on whole, damaged and missing files, and its frames against our own sprites."""

import io
import itertools
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tvae.data import DataError, SequenceStream, dsprites, open_source, sprites
from tvae.data.dsprites import DSpritesSequences
from tvae.data.sprites import SpriteSequences

SIZES = (3, 2, 4, 5, 3)
KEPT = (range(3), range(1, 2), range(0, 4, 2), range(0, 5, 2), range(1, 3))


def npz(**arrays):
    """What `np.savez_compressed` writes, compressed less and so in less time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def small_imgs():
    return np.random.default_rng(1).integers(2, size=(360, 64, 64), dtype=np.uint8)


def test_dsprites_reader_keeps_the_subset(small_imgs, tmp_path):
    path = tmp_path / "small.npz"
    np.savez_compressed(path, imgs=small_imgs, latents_classes=np.zeros((360, 6)))
    packed = dsprites._read_dsprites(path, SIZES, KEPT)
    assert packed.shape == (3, 1, 2, 3, 2, 512)
    for place, index in zip(np.ndindex(3, 1, 2, 3, 2), itertools.product(*KEPT), strict=True):
        image = small_imgs[np.ravel_multi_index(index, SIZES)]
        assert np.array_equal(np.unpackbits(packed[place]).reshape(64, 64), image)


def damage(content, first, patch):
    return content[:first] + patch + content[first + len(patch) :]


def archive(imgs, compression=zipfile.ZIP_STORED, cut=None, extra=b""):
    """An archive with a right checksum, of an imgs.npy without its end or with bytes after it. Its data begin at 38."""
    buffer, member = io.BytesIO(), io.BytesIO()
    np.save(member, imgs)
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive:
        archive.writestr("imgs.npy", member.getvalue()[:cut] + extra)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda imgs: npz(images=imgs), r"should contain imgs.npy, found \['images.npy'\]"),
        (lambda imgs: npz(imgs=imgs[1:]), r"uint8 \(360, 64, 64\) in C order, found uint8 \(359, 64, 64\)"),
        (lambda imgs: npz(imgs=imgs.astype(np.int8)), "should be uint8 .* found int8"),
        (lambda imgs: npz(imgs=np.asfortranarray(imgs)), "found uint8 .* in Fortran order"),
        (lambda imgs: npz(imgs=np.array([None])), "found object"),
        (lambda imgs: npz(imgs=imgs)[:-1000], "not a whole dSprites archive"),
        (lambda imgs: damage(archive(imgs, zipfile.ZIP_DEFLATED), 38, b"\x07"), "not a whole .*invalid block type"),
        (lambda imgs: damage(archive(imgs), 360 * 4096, b"2"), "not a whole dSprites archive .*CRC"),
        (lambda imgs: archive(imgs, cut=-4096), "not a whole dSprites archive"),
        (lambda imgs: archive(imgs, extra=b"x"), "goes on after its last image"),
        (lambda imgs: b"<html>not found</html>", "not a whole dSprites archive"),
        (lambda imgs: b"", "not a whole dSprites archive"),
    ],
    ids=[
        "key",
        "shape",
        "dtype",
        "order",
        "pickle",
        "truncated",
        "deflate",
        "checksum",
        "short",
        "long",
        "not a zip",
        "empty",
    ],
)
def test_wrong_dsprites_file(small_imgs, tmp_path, content, message):
    path = tmp_path / "wrong.npz"
    path.write_bytes(content(small_imgs))
    with pytest.raises(DataError, match=message) as raised:
        dsprites._read_dsprites(path, SIZES, KEPT)
    assert str(path) in str(raised.value)


def test_dsprites_gives_the_frames_of_its_file(tmp_path, monkeypatch):
    """Filled with our own sprites, it cannot be told from them."""
    own = SpriteSequences()
    (tmp_path / Path(dsprites._DSPRITES_URL).name).touch()

    def read(path, sizes, kept):
        assert [len(part) for part in kept] == list(own.sizes)
        poses = torch.cartesian_prod(*map(torch.arange, own.sizes)).view(*own.sizes, 5)
        frames = [sprites.cut_frames(own._canvases, part).flatten(-2).numpy() for part in poses]
        return np.stack([np.packbits(part, axis=-1) for part in frames])

    monkeypatch.setattr(dsprites, "_read_dsprites", read)
    source = open_source("dsprites", "train", tmp_path)
    assert source.factors == own.factors
    for i in range(3):
        batch, expected = (SequenceStream(drawn, 8, seed=2)[i] for drawn in (source, own))
        assert all(torch.equal(x, y) for x, y in zip(batch[:5], expected[:5], strict=True))


def test_dsprites_is_downloaded_whole_or_not_at_all(small_imgs, tmp_path, monkeypatch):
    origin, folder = tmp_path / "origin.npz", tmp_path / "new"
    monkeypatch.setattr(dsprites, "_DSPRITES_URL", origin.as_uri())
    with pytest.raises(DataError, match=r"no origin.npz in .*new; pass --data-dir"):
        DSpritesSequences(folder)
    with pytest.raises(DataError, match=r"cannot download file:.*origin.npz"):
        DSpritesSequences(folder, download=True)

    def break_off(url, path):
        path.write_bytes(b"PK")
        raise urllib.error.ContentTooShortError("got 2 bytes of 3", None)

    with monkeypatch.context() as broken:
        broken.setattr("urllib.request.urlretrieve", break_off)
        with pytest.raises(DataError, match="got 2 bytes of 3"):
            DSpritesSequences(folder, download=True)
    assert list(folder.iterdir()) == []
    origin.write_bytes(npz(imgs=small_imgs))
    with pytest.raises(DataError, match=r"found uint8 \(360, 64, 64\)"):
        DSpritesSequences(folder, download=True)
    assert [path.name for path in folder.iterdir()] == ["origin.npz"]
