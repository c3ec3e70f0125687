"""A user's own sequences: every kind gives the same batches, what is wrong is said, and commands go on from a run."""

import itertools
import json
import re
import resource
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import tvae
from tvae import cli
from tvae.config import Config
from tvae.data import SOURCES, SPLITS, DataError, FixedSequences, SequenceStream, open_source
from tvae.evaluation import load as load_rows
from tvae.models import VAE
from tvae.presets import PRESETS
from tvae.training import Run, train

FEW = "--capsules 2 --steps 3 --batch-size 4 --importance-samples 2"


def moving(n=20, frames=12, channels=1, size=16):
    """Bars that move to the right by one pixel a frame and come round, on noise: (N, S, C, H, W) uint8."""
    x = np.random.default_rng(0).integers(100, size=(n, frames, channels, size, size), dtype=np.uint8)
    for i in range(n):
        for frame in range(frames):
            x[i, frame, :, i % 8 : i % 8 + 8, (i + frame) % size] = 255
    return x


def save_frames(path, x):
    """Write a folder of folders of frames, whose names are in order only as numbers."""
    for i, sequence in enumerate(x):
        folder = path / f"take {i + 1}"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("no frame")
        for frame, pixels in enumerate(sequence):
            Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
                folder / f"{frame + 1}.png"
            )


def save_videos(path, x, ending="mkv", codec="ffv1", format="gray"):
    """Write a folder of videos; without loss, if the codec has none."""
    av = pytest.importorskip("av", reason='needs the extra "video"')
    path.mkdir(parents=True)
    for i, sequence in enumerate(x):
        with av.open(str(path / f"take{i + 1}.{ending}"), "w") as container:
            stream = container.add_stream(codec, rate=10, width=x.shape[4], height=x.shape[3], pix_fmt=format)
            for pixels in sequence:
                image = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
                frame = av.VideoFrame.from_ndarray(image, format="gray" if len(pixels) == 1 else "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


class Takes(Dataset):
    """A data set that counts what is taken from it."""

    def __init__(self, x, labels=None):
        self.x, self.labels, self.taken = x, labels, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.taken.append(i)
        return self.x[i] if self.labels is None else (self.x[i], self.labels[i])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder, where the command is given; what a test opens in memory is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    before = dict(SOURCES)
    yield tmp_path
    SOURCES.clear()
    SOURCES.update(before)


def command(words):
    """Return the exit status of `tvae WORDS`."""
    return cli.main(shlex.split(words))


def error(capsys):
    """Return the one line of an error, and say that no run was made."""
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("runs").exists()
    return line.removeprefix("tvae: error: ")


# --- every kind -------------------------------------------------------------------------------------------------------


def kinds(x):
    """The same sequences in every kind, by name."""
    np.save("x.npy", x)
    np.savez("x.npz", x)
    np.save("floats.npy", x.astype(np.float64) / 255)
    np.save("fortran.npy", np.asfortranarray(x))
    save_frames(Path("frames"), x)
    items = Takes(torch.from_numpy(x))
    files = ("x.npy", Path("x.npz"), "floats.npy", "fortran.npy", "frames")
    return {**{str(path): path for path in files}, "array": x, "tensor": items.x, "dataset": items, "arrays": Takes(x)}


@pytest.mark.slow
def test_every_kind_gives_the_same_batches(capsys):
    x = moving()
    for name, kind in kinds(x).items():
        source = tvae.open_sequences(kind)["train"]
        batch = SequenceStream(source, 8, seed=3)[1]
        expected = torch.from_numpy(x[source.numbers[batch.example]]).float() / 255
        torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        assert batch[1:5] == (None, None, None, None), name
        assert (source.image_shape, source.sequence_length, len(source)) == ((1, 16, 16), 12, 16), name


def test_processes_share_a_batch():
    source = tvae.open_sequences(moving())["train"]
    whole = SequenceStream(source, 8, seed=3)[1]
    parts = [SequenceStream(source, 8, 3, rank, 2)[1] for rank in range(2)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert [(part.first, part.total) for part in parts] == [(0, 8), (4, 8)]


@pytest.mark.slow
def test_videos_give_the_same_batches():
    x = moving()
    save_videos(Path("videos"), x)
    batch = tvae.open_sequences("videos")["all"].render(torch.arange(20), None)
    assert torch.equal(batch, torch.from_numpy(x).float() / 255)


def test_frames_and_videos_of_colours():
    x = moving(3, 4, 3)
    save_frames(Path("frames"), x)
    assert torch.equal(
        tvae.open_sequences("frames")["all"].render(torch.arange(3), None), torch.from_numpy(x).float() / 255
    )
    smooth = np.broadcast_to(np.array([200, 30, 90], dtype=np.uint8)[:, None, None], (3, 4, 3, 16, 16)).copy()
    smooth[:, :, 1] += np.arange(4, dtype=np.uint8)[:, None, None] * 20
    save_videos(Path("videos"), smooth, "mp4", "mpeg4", "yuv420p")
    found = tvae.open_sequences("videos")["all"].render(torch.arange(3), None)
    torch.testing.assert_close(found, torch.from_numpy(smooth).float() / 255, rtol=0, atol=0.03)  # with losses


def test_palettes_and_alpha_are_colours():
    x = moving(3, 2, 3)
    save_frames(Path("frames"), x)
    for file in Path("frames").rglob("*.png"):
        image = Image.open(file)
        image.convert("RGBA").save(file)
    Image.fromarray(x[0, 0, 0]).convert("P").save("frames/take 1/1.png")  # greys as a palette
    found = tvae.open_sequences("frames")["all"].render(torch.arange(3), None)
    assert torch.equal(found[1:], torch.from_numpy(x[1:]).float() / 255)
    assert torch.equal(found[0, 0], torch.from_numpy(x[0, 0, :1]).float().expand(3, -1, -1) / 255)


def test_labels_and_factors_come_with_their_sequences():
    x, n = moving(20, 16), np.arange(20)
    labels = np.array(["up", "down", "down", "left"])[n % 4]
    place = (n[:, None] + np.arange(16)) % 16
    factors = np.stack([np.broadcast_to(n[:, None] % 8, place.shape), place], axis=-1)
    np.savez("x.npz", frames=x, labels=labels, factors=factors)
    for own in (tvae.open_sequences("x.npz"), tvae.open_sequences(x, labels, torch.from_numpy(factors), name="bars")):
        source = own["train"]
        assert source.classes == ("down", "left", "up")
        assert source.transformations == {1: "factor 1"}
        assert (source.sizes, source.clustered) == ((8, 16), True)
        batch = SequenceStream(source, 16, seed=0)[0]
        numbers = source.numbers[batch.example]
        assert [source.classes[i] for i in batch.label.tolist()] == labels[numbers].tolist()
        assert torch.equal(batch.factors, torch.from_numpy(factors)[numbers])
        assert torch.equal(batch.transformation, torch.ones(16, dtype=torch.int64))
        assert torch.equal(batch.axis, torch.zeros(16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "advances"),
    [
        (lambda f: f, True),
        (lambda f: f * 2, False),  # by two a frame
        (lambda f: np.where(np.arange(12)[:, None, None] == 2, f[:, :1], f), False),  # one stands still
        (lambda f: f[..., [0, 0]], False),  # two at once, or none
        (lambda f: f[:, ::-1], False),  # backwards
    ],
)
def test_a_factor_that_advances_in_every_sequence_is_its_transformation(change, advances):
    factors = np.zeros((12, 4, 2), dtype=np.int64)
    for i in range(12):
        factors[i, :, i % 2] = (i + np.arange(4)) % 5
    source = tvae.open_sequences(moving(12, 4), factors=change(factors))["train"]
    batch = FixedSequences.take(source, 12, 12).batches[0]
    assert torch.equal(batch.factors, torch.from_numpy(change(factors).copy())[source.numbers])
    if advances:
        assert torch.equal(batch.transformation, source.numbers % 2)
        assert torch.equal(batch.axis, source.numbers % 2)
        assert source.transformations == {0: "factor 0", 1: "factor 1"}
    else:
        assert batch.transformation is batch.axis is None
        assert source.transformations == {}


def test_a_data_set_may_have_labels():
    items = Takes(moving(), labels=[i % 3 for i in range(20)])
    with pytest.raises(DataError, match=r"items of Takes have labels, .* attribute `classes` .* or pass classes="):
        tvae.open_sequences(items)
    with pytest.raises(
        DataError, match=r"item 0 of Takes should be .* its label, for there are classes; found no label"
    ):
        tvae.open_sequences(Takes(items.x), classes=("a", "b", "c"))
    source = tvae.open_sequences(items, classes=("a", "b", "c"))["test"]
    batch = FixedSequences.take(source, 9, 4).batches[0]
    assert batch.label.tolist() == [i % 3 for i in source.numbers[batch.example].tolist()]
    items.labels[7] = 3
    with pytest.raises(DataError, match=r"the label of item 7 of Takes should be from 0 to 2, found 3"):
        tvae.open_sequences(items, classes=("a", "b", "c"))


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "sizes"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (29, [25, 2, 2]), (40, [32, 4, 4])])
def test_splits_share_all_sequences(n, sizes):
    own = tvae.open_sequences(moving(n, 2))
    parts = [own[split].numbers.tolist() for split in SPLITS]
    assert list(map(len, parts)) == sizes
    assert sorted(itertools.chain(*parts)) == list(range(n))
    again = tvae.open_sequences(moving(n, 2), name="again")
    assert [again[split].numbers.tolist() for split in SPLITS] == parts


def test_splits_are_the_same_for_good():
    own = tvae.open_sequences(moving(20, 2))
    assert [own[split].numbers.tolist() for split in ("validation", "test")] == [[10, 18], [8, 2]]


def test_a_split_is_taken_once_in_its_order():
    source = tvae.open_sequences(moving(70, 2))["test"]
    batches = FixedSequences.take(source, 5, 2).batches
    assert [batch.example.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert sum(len(batch.images) for batch in FixedSequences.take(source, 1000, 4).batches) == 7


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"shape \(N, S, C, H, W\): .*; found uint8 of the shape \(12, 1, 16, 16\); grey frames need"),
        (lambda x: x[0, 0], r"shape \(N, S, C, H, W\): .*; found uint8 of the shape \(1, 16, 16\)$"),
        (lambda x: x[:, :0], r"found none: uint8 of the shape \(20, 0, 1, 16, 16\)"),
        (lambda x: np.moveaxis(x, 2, -1), r"1 channel or 3, found 16 of \(16, 1\); they seem to come last: .*moveaxis"),
        (lambda x: x[:2], "should have a sequence for each of train, validation, test, found 2"),
        (
            lambda x: x[:, :1].repeat(12, 1),
            "nothing moves in .*: in each of 20 sequences looked at all frames are equal",
        ),
        (lambda x: x.astype(int), r"found int64, in its first sequence from 0 to 255: scale with x / 255"),
        (lambda x: x.astype(int) - 9, r"found int64, .* from -9 to 246: scale with \(x - low\) / \(high - low\)"),
        (lambda x: x > 9, r"found bool: scale with x.astype\('uint8'\) \* 255"),
        (lambda x: x * 1j, "found complex128$"),
        (lambda x: x.astype(np.float32), r"should be floating-point numbers from 0 to 1 .*, found 0 to 255: .*x / 255"),
        (lambda x: x / 255 - 0.5, r"found -0.5 to 0.5: scale with \(x - low\) / \(high - low\)"),
        (lambda x: np.where(x == 255, np.nan, x / 255), "found nan to nan: take out what is not finite"),
    ],
)
def test_arrays_of_another_kind_are_refused(change, message):
    x = change(moving())
    np.save("x.npy", x)
    for kind in (x, "x.npy"):
        with pytest.raises(DataError, match=message):
            tvae.open_sequences(kind)
    assert "own" not in SOURCES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": np.zeros(19, int)}, r"labels of own .* of the shape \(20,\), found int64 of the shape \(19,\)"),
        ({"labels": np.zeros(20)}, r"labels of own should be integers or texts .*, found float64"),
        ({"factors": np.zeros((20, 11, 2), int)}, r"factors of own .*N, S = \(20, 12\), found int64 .*\(20, 11, 2\)"),
        ({"factors": np.zeros((20, 12, 2))}, "factors of own should be integers .*, found float64"),
        ({"factors": np.full((20, 12, 2), -1)}, "factors of own should be indices from 0, found -1"),
        ({"labels": np.zeros(20, int), "classes": ("a", "b")}, "classes should be 1 names, .*, found 2"),
    ],
)
def test_labels_and_factors_of_another_kind_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        tvae.open_sequences(moving(), **values)


def test_other_values_are_refused():
    with pytest.raises(DataError, match=r"an array or tensor .*, a path, or a .*Dataset, found list"):
        tvae.open_sequences([moving()])
    with pytest.raises(ValueError, match="there is a source 'mnist' already: MNISTSequences"):
        tvae.open_sequences(moving(), name="mnist")
    with pytest.raises(ValueError, match="labels, factors and classes are for what is in memory"):
        tvae.open_sequences("x.npy", labels=[1])
    np.savez("two.npz", a=moving(), b=moving(), labels=np.zeros(20, int))
    with pytest.raises(DataError, match=r"two.npz should hold one array .* labels and factors; found a, b, labels"):
        tvae.open_sequences("two.npz")
    Path("x.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"cannot read .*/x.npy as an array of numpy"):
        tvae.open_sequences("x.npy")
    x = moving()
    with pytest.raises(DataError, match=r"item 3 of Takes should have the shape .* \(12, 1, 16, 16\), found \(11, 1,"):
        tvae.open_sequences(Takes([*x[:3], x[3, :-1], *x[4:]]))
    with pytest.raises(
        DataError, match=r"item 3 of Takes should be uint8 or floating-point numbers, found torch.int64"
    ):
        tvae.open_sequences(Takes([*x[:3], x[3].astype(int), *x[4:]]))


def spoil(what):
    """Do something to the folder `frames` of sequences."""
    first = Path("frames/take 2/3.png")
    if what == "size":
        Image.open(first).resize((16, 15)).save(first)
    elif what == "colour":
        Image.open(first).convert("RGB").save(first)
    elif what == "length":
        first.unlink()
    elif what == "empty":
        Path("frames/take 21").mkdir()
    elif what == "bits":
        Image.fromarray(np.zeros((16, 16), np.uint16)).save(first)
    elif what == "damage":
        first.write_bytes(first.read_bytes()[:60])
    elif what == "text":
        first.write_text("no image")
    elif what == "both":
        Path("frames/a.mp4").touch()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", r"of the first, 1x16x16; found 1x15x16 in .*/frames/take 2/3.png"),
        ("colour", r"of the first, 1x16x16; found 3x16x16 in .*/frames/take 2/3.png"),
        ("length", r"all folders in .*/frames should hold as many frames .*; found 12 in take 1 and 11 in take 2"),
        ("empty", r"found 12 in take 1 and 0 in take 21"),
        ("bits", r"take 2/3.png should have 8 bits a channel, found 'I;16': scale its values to 0 to 255"),
        ("damage", r"cannot read the frame .*/frames/take 2/3.png \("),
        ("text", r"cannot read the frame .*/frames/take 2/3.png \("),
        ("both", r"should hold folders of frames or videos, found both: take 1 and a.mp4"),
    ],
)
def test_folders_of_another_kind_are_refused(what, message):
    save_frames(Path("frames"), moving())
    spoil(what)
    with pytest.raises(DataError, match=message):
        tvae.open_sequences("frames")


def test_the_sizes_of_all_frames_are_checked_before_any_is_needed():
    save_frames(Path("frames"), moving(100, 3))
    source = tvae.open_sequences("frames")["all"]
    spoil("size")  # of a sequence that is not looked at
    with pytest.raises(DataError, match=r"found 1x15x16 in .*/frames/take 2/3.png"):
        tvae.open_sequences("frames")
    with pytest.raises(DataError, match=r"found 1x15x16 in .*/frames/take 2/3.png"):
        source.render(torch.tensor([1]), None)


def test_one_folder_of_frames_is_refused():
    save_frames(Path("frames"), moving(3, 2))
    with pytest.raises(DataError, match=r"found neither \(one folder of frames is one sequence: pass the folder that"):
        tvae.open_sequences("frames/take 1")
    Path("nothing").mkdir()
    with pytest.raises(DataError, match=r"nothing should hold a folder of frames, or a video, .*videos end in .avi"):
        tvae.open_sequences("nothing")


def test_videos_of_another_kind_are_refused(monkeypatch):
    save_videos(Path("videos"), moving(4, 5))
    save_videos(Path("short"), moving(1, 4))
    file = Path("videos/take3.mkv")
    content = file.read_bytes()
    shutil.copy("short/take1.mkv", file)
    with pytest.raises(DataError, match=r"of the first, \(5, 1, 16, 16\); found \(4, 1, 16, 16\) in take3.mkv"):
        tvae.open_sequences("videos")
    file.write_bytes(b"no video")
    with pytest.raises(DataError, match=r"cannot read the video .*/videos/take3.mkv \("):
        tvae.open_sequences("videos")
    file.write_bytes(content)
    tvae.open_sequences("videos")
    monkeypatch.setitem(sys.modules, "av", None)
    advice = r'videos are read by PyAV, which cannot be imported .*: pip install "tvae-kernels\[video\]"'
    with pytest.raises(DataError, match=advice):
        tvae.open_sequences("videos")


def test_some_sequences_may_stand_still():
    x = moving()
    x[1:] = x[1:, :1]
    tvae.open_sequences(x)


def test_what_was_not_looked_at_is_checked_when_it_is_read():
    x = moving(100, 2).astype(np.float32) / 255
    x[1, 1] *= 2
    np.save("x.npy", x)
    source = tvae.open_sequences("x.npy")["all"]
    with pytest.raises(DataError, match=r"sequence 1 of .*/x.npy should be .* from 0 to 1 .*, found 0 to 2: .*x / 255"):
        source.render(torch.tensor([0, 1]), None)
    with pytest.raises(DataError, match=r"own should be .* from 0 to 1 .*, found 0 to 2"):  # where no file is read
        tvae.open_sequences(x)


# --- larger than memory -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_larger_than_memory_is_read_as_it_is_needed():
    """A file of 256 GiB, which has holes in place of most of its zeros."""
    shape = (2**20, 4, 1, 256, 256)
    with open("large.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(bytes([255]))
        file.truncate(file.tell() - 1 + int(np.prod(shape)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own = tvae.open_sequences("large.npy")
    batch = SequenceStream(own["train"], 8, seed=0)[0]
    assert batch.images.shape == (8, 4, 1, 256, 256)
    assert own["all"].render(torch.tensor([0]), None).sum() == 1
    assert len(own["train"]) == 2**20 - 2 * (2**20 // 10)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_frames_and_items_are_read_as_they_are_needed(monkeypatch):
    x = moving(100, 2)
    save_frames(Path("frames"), x)
    items = Takes(x)
    own = tvae.open_sequences(items)
    assert len(items.taken) == 1 + 32  # the first for its shape, and those looked at
    items.taken.clear()
    batch = SequenceStream(own["train"], 4, seed=0)[0]
    assert items.taken == own["train"].numbers[batch.example].tolist()

    source = tvae.open_sequences("frames")["train"]
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    SequenceStream(source, 4, seed=0)[0]
    names = [str(Path(path).parent.name) for path in opened]
    assert names == [f"take {i + 1}" for i in source.numbers[batch.example].tolist() for _ in range(2)]


def test_the_evaluation_of_recorded_sequences_keeps_none():
    items = Takes(moving(40, 2))
    batches = FixedSequences.take(tvae.open_sequences(items)["test"], 1000, 2).batches
    items.taken.clear()
    assert [len(batch.images) for batch in batches] == [2, 2]
    assert len(items.taken) == 4


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a file, in a folder of its own, and what was printed."""
    path = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        np.save("bars.npy", moving().astype(np.float32) / 255)
        assert command(f"train --data bars.npy {FEW}") == 0
    return path


@pytest.fixture
def trained(finished, folder):
    """A copy of the run, beside its data where that was: runs/own."""
    shutil.copytree(finished / "runs", folder / "runs")
    return finished / "bars.npy"


@pytest.mark.slow
def test_one_command_trains_and_others_go_on(trained, capsys):
    run = Path("runs/own")
    values = json.loads((run / "config.json").read_text())
    assert values["data"].pop("contents").startswith("20 sequences of 12 frames of 1x16x16, CRC-32 ")
    assert values["data"] == {"name": str(trained), "evaluation": None, "folder": None}
    assert values["model"]["neighborhood"]["time_boundary"] == "zero"
    assert Config.from_json((run / "config.json").read_text()) == Run.open(run).config
    rows, before = load_rows(run / "evaluation.json"), (run / "evaluation.json").read_bytes()
    assert {row.key for row in rows} == {
        "elbo",
        "log_likelihood",
        "equivariance_error",
        *("total_correlation", "active_units"),
    }
    assert json.loads(before)["sequences"] == 2
    assert command("evaluate runs/own") == 0
    assert "2 test sequences after 3 steps" in " ".join(capsys.readouterr().out.split())
    assert (run / "evaluation.json").read_bytes() == before
    (run / "figures/traversals.png").unlink()
    assert command("traverse runs/own") == 0
    assert (run / "figures/traversals.png").read_bytes().startswith(b"\x89PNG")
    assert command("train --resume runs/own --steps 5") == 0
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("5,")
    assert tvae.load(run / "model.safetensors").image_shape == (1, 16, 16)


@pytest.mark.slow
def test_data_that_has_changed_is_noticed_and_moved_data_found(trained, folder, capsys, monkeypatch):
    path = folder / "here/bars.npy"
    path.parent.mkdir()
    shutil.copy(trained, path)
    config = Path("runs/own/config.json")
    config.write_text(config.read_text().replace(str(trained), str(folder / "gone/bars.npy")))
    for words in ("evaluate runs/own", "traverse runs/own", "train --resume runs/own --steps 4"):
        assert command(words) == 1
        assert capsys.readouterr().err == (
            f"tvae: error: there is no file or folder {folder}/gone/bars.npy; if it has moved, pass --data-dir with "
            "the folder that holds it now\n"
        )
    assert command("evaluate runs/own --data-dir here") == 0
    assert command("train --resume runs/own --steps 4 --data-dir here") == 0
    assert json.loads(config.read_text())["data"]["folder"] == str(folder / "here")
    assert command("evaluate runs/own") == 0
    capsys.readouterr()
    x = np.load(path)
    x[13, 4, 0, 2, 3] = 0.5
    np.save(path, x)
    for words in ("evaluate runs/own", "traverse runs/own", "train --resume runs/own --steps 5"):
        assert command(words) == 1
        assert re.fullmatch(
            rf"tvae: error: the sequences of {path} have changed: they were 20 sequences of 12 frames of 1x16x16, "
            r"CRC-32 \w{8}, are 20 sequences .*, CRC-32 \w{8}; put the old ones back, or train a new run\n",
            capsys.readouterr().err,
        )


@pytest.mark.slow
def test_labels_and_factors_are_measured(capsys):
    place = (np.arange(40)[:, None] + np.arange(16)) % 16
    np.savez("bars.npz", moving(40, 16), labels=np.arange(40) % 2, factors=place[..., None])
    assert command(f"train --data bars.npz {FEW}") == 0
    assert "without" not in capsys.readouterr().out.partition("\n")[0]
    labels = [row.label for row in load_rows(Path("runs/own/evaluation.json"))]
    for label in ("CapCorr factor 0", "NMI, k-means", "invariance error of t"):
        assert label in labels
    np.savez("bars.npz", moving(40, 16))
    assert command(f"train --data bars.npz {FEW} --run-dir runs/less") == 0
    assert "; without classes or factors that advance: metrics that need them are left out" in capsys.readouterr().out
    assert not {"capcorr", "clustering", "poses"} & {row.key for row in load_rows(Path("runs/less/evaluation.json"))}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "frames"), [("frames", 4), ("videos", 3), ("frames", 1)])
def test_folders_are_trained_on(kind, frames):
    {"frames": save_frames, "videos": save_videos}[kind](Path("takes"), moving(10, frames))
    assert command(f"train --data takes --model vae {FEW}") == 0
    assert Run.open(Path("runs/own")).config.model_class is VAE
    assert command("evaluate runs/own") == 0


@pytest.mark.slow
def test_own_sequences_to_evaluate_on_are_taken_whole(capsys):
    np.save("a.npy", moving())
    np.save("b.npy", moving(7))
    np.save("c.npy", moving(7, channels=3))
    assert command(f"train --data a.npy --evaluation-data c.npy {FEW}") == 2
    assert re.fullmatch(
        r"a model of .*/a.npy images, \(1, 16, 16\), cannot be evaluated on .*/c.npy, \(3, 16, 16\)", error(capsys)
    )
    assert command(f"train --data a.npy --evaluation-data b.npy {FEW}") == 0
    assert json.loads(Path("runs/own/evaluation.json").read_text())["sequences"] == 7
    np.save("b.npy", moving(8))
    assert command("evaluate runs/own") == 1
    assert "the sequences of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("--data quickstart", 2, "quickstart is a preset, and no data: tvae train quickstart"),
        ("bars.npy", 2, "bars.npy is no preset; for sequences of your own: tvae train --data bars.npy"),
        ("--data bar.npy", 1, "there is no file or folder .*/bar.npy"),
        ("--data bars", 2, ".*no data 'bars' is registered, only .*, or give the path of your own sequences"),
        ("--data notes.txt", 1, ".*/notes.txt should be a .npy or .npz file, a folder of folders of frames"),
        ("sprites-tvae-w15-k1 --data bars.npy", 2, "a circular time_window of 15 does not fit 12 time steps"),
        (
            "--data bars.npy --batch-size 17",
            2,
            "batch_size must be between 1 and the 16 examples of .*/bars.npy, got 17",
        ),
        ("--data bars.npy --model flowvae", 2, r"\d flows .* do not fit .*/bars.npy, which has 0: no transformation"),
        ("--data bars.npy --step graph", 2, "--step graph is for data that is made on the GPU, not for bars.npy"),
        ("--data wide.npy", 1, r".*/wide.npy should be floating-point numbers from 0 to 1 .*, found 0 to 2\d\d"),
    ],
)
def test_mistakes_are_said_before_a_run_is_made(words, status, message, capsys):
    np.save("bars.npy", moving())
    np.save("wide.npy", moving().astype(np.float32))
    Path("notes.txt").touch()
    assert command(f"train {words}") == status
    assert re.match(message, error(capsys))


# --- in Python --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_in_memory_is_trained_on_and_known_again():
    x = moving()
    config = PRESETS["own"].config.on(tvae.open_sequences(x))
    config = replace(
        config, model=replace(config.model, capsules=2), training=replace(config.training, steps=3, batch_size=4)
    )
    whole = train(Run.create(Path("whole"), config), show_progress=False)
    run = Run.create(Path("parts"), replace(config, training=replace(config.training, steps=2)))
    train(run, show_progress=False)
    SOURCES.clear()
    with pytest.raises(RuntimeError, match=r"no data 'own' is registered"):
        Run.open(Path("parts"))
    tvae.open_sequences(Takes(x))
    run = Run.open(Path("parts"))
    run.change(config)
    with pytest.raises(DataError, match=r"the sequences of own have changed: they were 20 .*, CRC-32 .*, are 20 seq"):
        train(run, show_progress=False)
    tvae.open_sequences(torch.from_numpy(x))
    model = train(run, show_progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())
    tvae.open_sequences(255 - x)
    with pytest.raises(DataError, match="have changed"):
        config.open_source("train")


@pytest.mark.slow
def test_what_is_in_memory_has_a_name_on_the_command_line(capsys):
    tvae.open_sequences(moving(), labels=np.arange(20) % 2, name="bars")
    assert command(f"train --data bars {FEW}") == 0
    assert capsys.readouterr().out.startswith("bars: 20 sequences of 12 frames of 1x16x16, CRC-32 ")
    before = Path("runs/own/evaluation.json").read_bytes()
    assert command("evaluate runs/own") == 0
    assert Path("runs/own/evaluation.json").read_bytes() == before
    tvae.open_sequences(moving(), labels=np.arange(20) % 3, name="bars")
    assert command("evaluate runs/own") == 1
    assert "the sequences of bars have changed" in capsys.readouterr().err


def test_sources_open_paths_as_they_open_names():
    np.save("bars.npy", moving())
    source = open_source("bars.npy", "validation")
    assert (source.name, len(source)) == (str(Path.cwd() / "bars.npy"), 2)
    with pytest.raises(ValueError, match="unknown split 'valid'; choose from train, validation, test, all"):
        open_source("bars.npy", "valid")
