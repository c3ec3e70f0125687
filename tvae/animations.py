"""Capsule traversals that move: an animation, a video, or a page that any browser opens without a server."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from string import Template

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .figures import Panel, label_width, mosaic
from .files import replacing

RATE = 5  # frames a second
_DPI = 100
_CELL, _HEAD, _MARGIN = 0.9, 0.4, 0.1  # inches

Write = Callable[[list[Panel], str], bytes]


def writer(kind: str) -> Write:
    """Return what makes a file of a kind, "gif", "mp4" or "html", of panels with the same rows and a caption.

    Raises:
        ValueError: the kind needs a package that is missing.

    """
    if kind != "mp4":
        return {"gif": _gif, "html": _page}[kind]
    # Here and not above: PyAV is an extra, and the other kinds must work without it.
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"mp4 is written by PyAV, which cannot be imported here ({error}); "
            'install the extra video: pip install "tvae-kernels[video]"; or take --format gif'
        ) from error
    return lambda panels, caption: _mp4(av, panels)


def save(write: Write, panels: list[Panel], path: Path, caption: str = "") -> None:
    """Replace a file by what a writer makes of panels, at once or not at all.

    Raises:
        ValueError: the panels are of single frames, of which nothing moves.

    """
    if panels[0].images.shape[1] < 2:
        raise ValueError(f"{path.name} would show nothing that moves: sequences must have at least 2 frames, got 1")
    content = write(panels, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(content)


def drawn(panels: list[Panel]) -> list[UInt8[np.ndarray, "height width 3"]]:
    """Draw every frame of panels as an image: their rows with labels, and a column with a title for each panel.

    All images have one size, which is even, as videos need it.
    """
    rows, columns = len(panels[0].labels), len(panels)
    left = max(map(label_width, panels[0].labels))
    size = left + _CELL * columns + _MARGIN, _HEAD + _CELL * rows
    width, height = (2 * round(inches * _DPI / 2) / _DPI for inches in size)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, 0, _CELL * columns / width, _CELL * rows / height))
    images = [side_by_side(panels, frame) for frame in range(panels[0].images.shape[1])]
    y, x = images[0].shape[:2]
    shown = axes.imshow(images[0], cmap="gray", vmin=0, vmax=1)
    axes.set_xticks((np.arange(columns) + 0.5) * x / columns - 0.5, [panel.title for panel in panels], fontsize=8)
    axes.set_yticks((np.arange(rows) + 0.5) * y / rows - 0.5, panels[0].labels, fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    count = figure.text(_MARGIN / width, 1 - _MARGIN / height, "", fontsize=8, va="top")
    found = []
    for frame, image in enumerate(images):
        shown.set_data(image)
        count.set_text(f"frame {frame}")
        canvas.draw()
        found.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return found


def side_by_side(panels: list[Panel], frame: int) -> Float[np.ndarray, "y x *channel"]:
    """Put the rows of one frame of all panels into one image, of colours or of grey."""
    image = mosaic(torch.stack([panel.images[:, frame] for panel in panels], 1)).numpy()
    return image.squeeze(-1) if image.shape[-1] == 1 else image


def _gif(panels: list[Panel], caption: str) -> bytes:
    """Make an animation that begins again when it is over."""
    first, *others = map(Image.fromarray, drawn(panels))
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=1000 // RATE, loop=0, comment=caption)
    return file.getvalue()


def _mp4(av, panels: list[Panel]) -> bytes:
    """Make a video of what players and browsers know: H.264 with colours at half the resolution."""
    images, file = drawn(panels), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _page(panels: list[Panel], caption: str) -> bytes:
    """Make a page with a slider, which holds all images: for each row of a panel one, of its frames side by side."""
    cells = [
        f"<tr><th>{_label(label)}</th>{''.join(_cell(panel, row) for panel in panels)}</tr>"
        for row, label in enumerate(panels[0].labels)
    ]
    titles = "".join(f"<th>{html.escape(panel.title)}</th>" for panel in panels)
    steps = panels[0].images.shape[1]
    values = {"steps": steps, "last": steps - 1, "pause": 1000 // RATE, "titles": titles, "rows": "\n".join(cells)}
    return _PAGE.substitute(values, caption=html.escape(caption)).encode()


def _cell(panel: Panel, row: int) -> str:
    """Make the place where a row of a panel is shown, a frame at a time."""
    strip = panel.images[row].movedim(0, 1).flatten(1, 2)  # (height, frames side by side, channel)
    name = html.escape(f"{panel.title}: {panel.labels[row]}".replace("$", ""))
    return f'<td><div role="img" aria-label="{name}" style="background-image:url({data_url(strip)})"></div></td>'


def data_url(image: Float[Tensor, "height width channel"]) -> str:
    """Return an image in [0, 1], of one channel or of three, as PNG that stands in the address itself."""
    array, file = (255 * image).round().byte().numpy(), io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _label(label: str) -> str:
    """Write a label of a figure as HTML: what stands between dollars has subscripts."""
    formula = lambda found: re.sub(r"_(\w)", r"<sub>\1</sub>", found[1])  # noqa: E731
    return re.sub(r"\$(.*?)\$", formula, html.escape(label))


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Capsule traversals</title>
<style>
body { font: 15px sans-serif; margin: 2em auto; max-width: 50em; padding: 0 1em; --frame: 0 }
td div { width: 7em; height: 7em; image-rendering: pixelated;
         background-size: ${steps}00% 100%; background-position: calc(100% * var(--frame) / $last) 0 }
th { font-weight: normal } tr th:first-child { text-align: right; padding-right: 1em }
.controls { display: flex; gap: 1em; align-items: center; margin: 1em 0 } .controls input { flex: 1 }
</style>
<h1>Capsule traversals</h1>
<p>$caption</p>
<div class="controls">
<button id="play" type="button">play</button>
<input id="frame" type="range" min="0" max="$last" value="0" aria-label="frame">
<output id="shown">frame 0</output>
</div>
<table>
<tr><th></th>$titles</tr>
$rows
</table>
<script>
const slider = document.getElementById("frame"), shown = document.getElementById("shown");
const button = document.getElementById("play");
let timer = null;
function show() {
  document.body.style.setProperty("--frame", slider.value);
  shown.textContent = "frame " + slider.value;
}
slider.addEventListener("input", show);
button.addEventListener("click", () => {
  clearInterval(timer);
  timer = timer === null ? setInterval(() => { slider.value = (+slider.value + 1) % $steps; show(); }, $pause) : null;
  button.textContent = timer === null ? "play" : "pause";
});
show();
</script>
</html>
""")
