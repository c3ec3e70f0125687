"""A page in the browser where one moves the capsules of a trained model by hand: `tvae play`."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .animations import RATE, data_url
from .data import SequenceBatch
from .models import SequenceModel

_FEW = 12  # steps of a motion, where sequences have fewer than 3 frames
_SIDE = 15  # em, of an image on the page
_ALL = "all capsules"
_TEXT = (
    "Frame 0 becomes capsules, which a motion of the model moves: all of them, or one while the others rest. "
    "Beside what is decoded: the sequence, and the reconstruction of its every frame."
)

Window = tuple[int, int]  # frames and positions


class View(NamedTuple):
    """What the page shows of one sequence at each of T steps of a motion."""

    images: dict[str, Float[Tensor, "step height width channel"]]  # in [0, 1], by what they are
    activity: Float[Tensor, "step row column"]  # t: a row for each capsule, or more of capsules with axes


@dataclass(frozen=True)
class Player:
    """A model, and sequences whose capsules it moves.

    Args:
        model: any.
        batch: sequences that fit it.
        titles: what to call the sequences.

    """

    model: SequenceModel
    batch: SequenceBatch
    titles: list[str]

    @property
    def steps(self) -> int:
        """Return how many steps of a motion are shown: one for each frame, and some where these are too few."""
        frames = self.batch.images.shape[1]
        return frames if frames > 2 else _FEW

    @property
    def window(self) -> Window | None:
        """Return the size of the model's window, of one axis and without learned weights; None without such a one."""
        if not hasattr(self.model, "with_window") or self.model.settings.window != "ones":
            return None
        n = self.model.settings.neighborhood
        return (n.time_window, n.capsule_window) if isinstance(n.capsule_window, int) else None

    @torch.no_grad()
    def motions(self) -> list[str]:
        """Return the names of the motions that the model has."""
        return list(self.model.eval().motions(self.batch.select([0]), self.steps))

    @torch.no_grad()
    def view(self, sequence: int, motion: str, capsule: int | None = None, window: Window | None = None) -> View:
        """Make what is shown of a sequence, frame 0 of which a motion moves.

        Args:
            sequence: its number.
            motion: one of `motions`.
            capsule: the number of the only one that is moved; None for all.
            window: one of another size than the model's, for models that have a `window`.

        Raises:
            ValueError: the model cannot have such a window.

        """
        model = self.model if window in (None, self.window) else self.model.with_window(*window)
        batch = self.batch.select([sequence])
        path = model.eval().motions(batch, self.steps)[motion]
        if capsule is not None:
            moved, path = path, path[:, :1].repeat(1, self.steps, 1, 1)
            path[:, :, capsule] = moved[:, :, capsule]
        # Where there are more steps than frames, the last frame stays.
        frames = torch.arange(self.steps).clamp(max=batch.images.shape[1] - 1)
        images = {
            "input": batch.images[:, frames],
            "reconstruction": model.reconstruct(batch)[:, frames],
            "moved": model.likelihood.mean(model.decode(path)),
        }
        axes = None if model.rolls is None else model.rolls.axes
        columns = path.shape[-1] if axes is None else axes[-1]
        return View(
            {name: x[0].clamp(0, 1).movedim(1, -1).cpu() for name, x in images.items()},
            path[0].reshape(self.steps, -1, columns).cpu(),
        )


def grey(activity: Float[Tensor, "step row column"], step: int) -> Float[Tensor, "row column 1"]:
    """Return the activity at one step as a grey image, from the least activity of all steps to the greatest."""
    low, high = activity.min(), activity.max()
    return ((activity[step] - low) / (high - low).clamp(min=1e-12)).nan_to_num(0.5)[..., None]


def find_nicegui() -> ModuleType:
    """Return the library that pages are made by.

    Raises:
        ValueError: it is missing.

    """
    # Here and not above: it is an extra, and takes a second.
    try:
        import nicegui
    except ImportError as error:
        raise ValueError(
            f"pages are made by NiceGUI, which cannot be imported here ({error}); "
            'install the extra play: pip install "tvae-kernels[play]"'
        ) from error
    return nicegui


def check_address(host: str, port: int) -> None:
    """Refuse an address where nobody can listen.

    Raises:
        ValueError: the port is in use, or none, or the host is not this machine.

    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be between 1 and 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = error.strerror.partition(" (while")[0]  # which repeats the address
        raise ValueError(f"cannot listen at {host}:{port}: {reason}; choose another --port or --host") from error


def serve(nicegui: ModuleType, player: Player, host: str, port: int, browser: bool, title: str) -> None:
    """Show the page to all who ask for it, until Ctrl-C; whether to open a browser at once is said by `browser`."""
    nicegui.ui.run(
        lambda: _page(nicegui.ui, player, title),
        host=host,
        port=port,
        title=title,
        show=browser,
        reload=False,
        show_welcome_message=False,
    )


def _page(ui, player: Player, title: str) -> None:
    """Build the page of one visitor: what may be chosen, a slider over the steps, and what is seen at the step."""
    ui.label(title).classes("text-h5")
    ui.label(_TEXT)
    with ui.row().classes("items-center"):
        numbered = {i: f"{i}  {name}" for i, name in enumerate(player.titles)}
        sequence = ui.select(numbered, value=0, label="sequence").classes("w-40").mark("sequence")
        names = {name: name.replace("$", "") for name in player.motions()}
        motion = ui.select(names, value=next(iter(names)), label="motion").classes("w-40").mark("motion")
        capsules = {_ALL: _ALL, **{c: f"capsule {c}" for c in range(player.model.capsule_shape[0])}}
        capsule = ui.select(capsules, value=_ALL, label="moved").classes("w-40").mark("capsule")
        capsule.set_visibility(len(capsules) > 2)
        playing = ui.switch("play")
    windows = _window_sliders(ui, player)
    with ui.row().classes("items-center w-full no-wrap"):
        count = ui.label().classes("w-20")
        step = ui.slider(min=0, max=player.steps - 1, value=0).mark("step")
    pictures, captions = {}, {}
    with ui.row():
        for name in ("input", "reconstruction", "moved", "activity"):
            with ui.column().classes("gap-1"):
                captions[name] = ui.label(name)
                style = f"width: {_SIDE}em; image-rendering: pixelated"
                pictures[name] = ui.interactive_image().style(style).mark(name)
    view: View

    def show() -> None:
        """Show the step of the view."""
        for name, images in view.images.items():
            pictures[name].set_source(data_url(images[step.value]))
        pictures["activity"].set_source(data_url(grey(view.activity, step.value)))
        count.set_text(f"step {step.value}")

    def look() -> None:
        """Make a new view of what is chosen."""
        nonlocal view
        chosen = None if capsule.value == _ALL else capsule.value
        try:
            view = player.view(sequence.value, motion.value, chosen, tuple(x.value for x in windows) or None)
        except ValueError as error:
            ui.notify(str(error), type="warning")
            return
        captions["moved"].set_text(f"moved: {names[motion.value]}")
        low, high = view.activity.min().item(), view.activity.max().item()
        captions["activity"].set_text(f"capsules t, from {low:.3g} (black) to {high:.3g}")
        show()

    for chosen in (sequence, motion, capsule, *windows):
        chosen.on_value_change(look)
    step.on_value_change(show)
    timer = ui.timer(1 / RATE, lambda: step.set_value((step.value + 1) % player.steps), active=False)
    playing.bind_value_to(timer, "active")
    look()


def _window_sliders(ui, player: Player) -> tuple:
    """Build sliders for the frames and the positions of a window that can be changed."""
    if player.window is None:
        return ()
    most = player.batch.images.shape[1], player.model.capsule_shape[1]
    sliders = []
    with ui.row().classes("items-center w-full no-wrap"):
        for name, value, end in zip(("frames", "positions"), player.window, most, strict=True):
            text = ui.label().classes("whitespace-nowrap")
            slider = ui.slider(min=1, max=end, value=value).mark(name)
            words = f"window, {name}: {{}} (trained with {value})"
            text.bind_text_from(slider, "value", words.format)
            sliders.append(slider)
    return tuple(sliders)
