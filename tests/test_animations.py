"""Traversals that move: what each frame of a file shows, and what a page holds."""

import base64
import io
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import complaints, open_chromium, picture, wait_until
from PIL import Image, ImageSequence

from tvae import animations, cli
from tvae.data.sprites import SpriteSequences
from tvae.figures import Panel
from tvae.models import MODELS
from tvae.training import Run

ROOT = Path(__file__).parent.parent
STEPS = 5
MOVE = "const s = document.getElementById('frame'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"


@pytest.fixture
def panels():
    """Two sequences in two rows, with levels of grey of which each is only once."""
    grey = torch.linspace(0, 1, 2 * 2 * STEPS).view(2, 2, STEPS, 1, 1, 1).expand(-1, -1, -1, 8, 8, 1)
    return [Panel(name, ("input", "Roll$_l(t_0)$"), x) for name, x in zip("x&", grey, strict=True)]


def cell(image, column, row):
    """The colour in the middle of a cell: cells are at the right and at the bottom of an image."""
    height, width = image.shape[:2]
    size, margin = (round(100 * inches) for inches in (animations._CELL, animations._MARGIN))
    y, x = height - size * (2 - row) + size // 2, width - margin - size * (2 - column) + size // 2
    return image[y, x].astype(int)


def check_frames(images, panels, error):
    """Check that frame after frame shows each row of each panel in its place, as well as 256 levels of grey can."""
    assert len(images) == STEPS
    for l, image in enumerate(images):
        for column, panel in enumerate(panels):
            for row in range(2):
                expected = 255 * panel.images[row, l, 0, 0, 0].item()
                assert abs(cell(image, column, row) - expected).max() <= error


def test_frames_are_drawn_with_their_labels_at_an_even_size(panels):
    images = animations.drawn(panels)
    check_frames(images, panels, 2)
    assert {image.shape for image in images} == {(images[0].shape[0], images[0].shape[1], 3)}
    assert all(n % 2 == 0 for n in images[0].shape[:2])
    head = slice(0, round(100 * animations._HEAD) - 2)
    for right in (10, 100):  # of the second column and of the first, whose titles stand above them
        assert (images[0][head, -right - 90 : -right] < 128).any()
    assert not np.array_equal(images[0][head], images[1][head])  # the number of the frame


def test_a_gif_has_every_frame_and_begins_again(panels, tmp_path):
    animations.save(animations.writer("gif"), panels, tmp_path / "new/t.gif", "what it is")
    with Image.open(tmp_path / "new/t.gif") as file:
        assert (file.info["loop"], file.info["duration"], file.info["comment"]) == (0, 200, b"what it is")
        images = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    check_frames(images, panels, 2)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.gif"]


def test_an_mp4_has_every_frame(panels, tmp_path):
    av = pytest.importorskip("av", reason="needs the package av")
    animations.save(animations.writer("mp4"), panels, tmp_path / "t.mp4")
    with av.open(tmp_path / "t.mp4") as file:
        (stream,) = file.streams
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 5)
        images = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    check_frames(images, panels, 6)  # of 255, for H.264 loses something, and its range is 16 to 235


def test_colours_are_kept(panels):
    colour = torch.tensor([1.0, 0.2, 0.6]).expand(2, STEPS, 8, 8, 3)
    image = animations.drawn([Panel("", ("a", "b"), colour)])[0]
    assert image[-50, -55].tolist() == [255, 51, 153]


class Page(HTMLParser):
    """What a page is made of: its elements with their attributes, and all that it would load."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)
        self.close()
        self.loaded = re.findall(r"url\(([^)]*)\)", text)
        self.loaded += [value for _, found in self.elements for name, value in found.items() if name in ("src", "href")]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_holds_all_its_images_and_its_slider_fits_the_frames(panels):
    page = Page(animations.writer("html")(panels, "T<VAE>").decode())
    assert "T<VAE>" in page.text
    (slider,) = [found for tag, found in page.elements if found.get("type") == "range"]
    assert (slider["min"], slider["max"]) == ("0", str(STEPS - 1))
    assert len(page.loaded) == 4
    for i, address in enumerate(page.loaded):
        kind, _, content = address.partition(",")
        assert kind == "data:image/png;base64"
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        row, column = divmod(i, 2)
        expected = (255 * panels[column].images[row, ..., 0]).round().byte()  # (frame, height, width)
        np.testing.assert_array_equal(strip, torch.cat(list(expected), 1).numpy())
    labels = [found["aria-label"] for tag, found in page.elements if found.get("role") == "img"]
    assert labels == ["x: input", "&: input", "x: Roll_l(t_0)", "&: Roll_l(t_0)"]
    assert [tag for tag, _ in page.elements].count("sub") == 2


def test_the_documents_have_a_page_and_an_animation_of_shapes():
    file = ROOT / "docs/roll.html"
    page = Page(file.read_text(encoding="utf-8"))
    assert file.stat().st_size < 2**20
    assert "TVAE on shapes, after 6,000 steps" in page.text
    (slider,) = [found for tag, found in page.elements if found.get("type") == "range"]
    assert len(page.loaded) == 3 * 2  # rows, transformations
    for address in page.loaded:
        assert address.startswith("data:image/png;base64,")
        strip = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert strip.size == (32 * (int(slider["max"]) + 1), 32)
    file = ROOT / "docs/images/shapes.gif"
    assert file.stat().st_size < 2**21
    with Image.open(file) as animation:
        assert animation.n_frames == int(slider["max"]) + 1 == 15


@pytest.mark.slow
def test_the_slider_of_a_page_changes_the_images(panels, tmp_path):
    driver = open_chromium()
    try:
        animations.save(animations.writer("html"), panels, tmp_path / "t.html")
        driver.get((tmp_path / "t.html").as_uri())
        cells = driver.find_elements("css selector", "[role=img]")
        for l in (0, 3, STEPS - 1):
            driver.execute_script(MOVE, l)
            for i, found in enumerate(cells):
                row, column = divmod(i, 2)
                expected = round(255 * panels[column].images[row, l, 0, 0, 0].item())
                shown = picture(found)
                assert (shown[4:-4, 4:-4] == expected).all()
            assert driver.find_element("id", "shown").text == f"frame {l}"
        driver.find_element("id", "play").click()
        wait_until(driver, f"document.getElementById('frame').value != {STEPS - 1}")
        assert complaints(driver) == []
    finally:
        driver.quit()


@pytest.mark.parametrize("kind", ["gif", "html"])
def test_what_stands_still_is_refused(kind, tmp_path):
    panel = Panel("", ("a",), torch.zeros(1, 1, 4, 4, 1))
    with pytest.raises(ValueError, match=f"^t.{kind} would show nothing that moves: .* at least 2 frames, got 1$"):
        animations.save(animations.writer(kind), [panel], tmp_path / f"t.{kind}")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_the_one_before(panels, tmp_path, monkeypatch):
    path = tmp_path / "t.html"
    path.write_text("before")

    def write_half(place, data):
        with place.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no room")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="no room"):
        animations.save(animations.writer("html"), panels, path)
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [("t.html", "before")]


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run whose model is as it was made."""
    from tvae.presets import PRESETS

    run = Run.create(tmp_path / "run", PRESETS["quickstart"].config)
    source = SpriteSequences()
    run.save_model(MODELS["tvae"](source.image_shape, 15, 15, run.config.model.neighborhood))
    return run


def tvae(arguments):
    return cli.main(shlex.split(arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "start"), [("gif", b"GIF89a"), ("mp4", b"\0\0\0"), ("html", b"<!DOCTYPE html>")])
def test_traverse_writes_each_format_into_the_run(kind, start, run, capsys):
    if kind == "mp4":
        pytest.importorskip("av", reason="needs the package av")
    assert tvae(f"traverse {run.path} --format {kind}") == 0
    path = run.figures / f"traversals.{kind}"
    assert f"capsule traversals: {path}" in capsys.readouterr().out.replace("drawing ...\n", "").splitlines()
    assert path.read_bytes().startswith(start)
    assert list(run.figures.iterdir()) == [path]
    if kind == "html":
        assert b"TVAE on sprites, after 1,400 steps" in path.read_bytes()
        assert path.stat().st_size < 2**20


def test_without_the_extra_a_video_is_refused_in_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    assert tvae(f"traverse {run.path} --format mp4") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tvae: error: mp4 is written by PyAV, which cannot be imported here (")
    assert line.endswith('install the extra video: pip install "tvae-kernels[video]"; or take --format gif')
    assert not run.figures.exists()


def test_a_format_that_is_none_is_refused(capsys):
    assert tvae("traverse run --format avi") == 2
    assert "invalid choice 'avi' for argument '--format'" in capsys.readouterr().err
