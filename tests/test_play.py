"""The page of `tvae play`: what it shows, by value, and in a browser where there is one."""

import asyncio
import base64
import io
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import complaints, open_chromium, wait_until
from PIL import Image

from tvae import cli
from tvae.data import FixedSequences, SequenceBatch, open_source
from tvae.data.sprites import SpriteSequences
from tvae.models import MODELS, TVAE, VAE, BubbleVAE, ClusterVAE, FlowVAE
from tvae.play import Player, check_address, grey
from tvae.presets import PRESETS
from tvae.training import Run
from tvae_kernels import Neighborhood

ROOT = Path(__file__).parent.parent
ROLL = "Roll$_l(t_0)$"


def sequences(count=3, frames=6, shape=(1, 8, 8)):
    torch.manual_seed(1)
    return SequenceBatch(torch.rand(count, frames, *shape), axis=torch.arange(count) % 3)


def made(model, batch=None):
    batch = sequences() if batch is None else batch
    return Player(model, batch, ["a", "b", "c"])


def topographic(**values):
    torch.manual_seed(0)
    return TVAE((1, 8, 8), 3, 6, Neighborhood(4, 3), **values)


def images_of(x):
    return x[0].detach().movedim(1, -1)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_all_capsules_roll():
    player = made(topographic())
    assert (player.motions(), player.steps) == ([ROLL], 6)
    view, batch = player.view(2, ROLL), player.batch.select([2])
    torch.testing.assert_close(view.images["input"], batch.images[0].movedim(1, -1))
    torch.testing.assert_close(view.images["reconstruction"], images_of(player.model.reconstruct(batch)))
    torch.testing.assert_close(view.images["moved"], images_of(player.model.traverse(batch)))
    t = player.model.encode(batch, sample=False)[0, 0].detach()
    for l in range(6):
        torch.testing.assert_close(view.activity[l], t.roll(l, -1))


def test_one_capsule_rolls_while_the_others_rest():
    player = made(topographic())
    view = player.view(1, ROLL, capsule=2)
    t = player.model.encode(player.batch.select([1]), sample=False)[0, 0].detach()
    for l in range(6):
        expected = torch.stack((t[0], t[1], t[2].roll(l)))
        torch.testing.assert_close(view.activity[l], expected)
        decoded = player.model.likelihood.mean(player.model.decode(expected[None, None]))
        torch.testing.assert_close(view.images["moved"][l : l + 1], images_of(decoded))
    assert not torch.equal(view.images["moved"][1], player.view(1, ROLL).images["moved"][1])


@pytest.mark.parametrize("kind", [TVAE, BubbleVAE])
def test_another_window_is_that_of_a_model_with_the_same_networks(kind):
    torch.manual_seed(0)
    neighborhood = Neighborhood(4, 3, shift=int(kind is TVAE))
    player = made(kind((1, 8, 8), 3, 6, neighborhood, mu_init=7.0))
    with torch.no_grad():
        player.model.topographic.mu.fill_(9)
    assert player.window == (4, 3)
    other = kind((1, 8, 8), 3, 6, Neighborhood(2, 5, shift=int(kind is TVAE)))
    other.load_state_dict(player.model.state_dict())
    found, expected = player.view(0, ROLL, window=(2, 5)), made(other).view(0, ROLL)
    torch.testing.assert_close(found.activity, expected.activity)
    torch.testing.assert_close(found.images["moved"], expected.images["moved"])
    torch.testing.assert_close(found.images["reconstruction"], expected.images["reconstruction"])
    assert not torch.isclose(found.activity, player.view(0, ROLL).activity).any()
    assert player.model.with_window(2, 5).z_encoder is player.model.z_encoder
    with pytest.raises(ValueError, match="a circular time_window of 7 does not fit 6 time steps"):
        player.view(0, ROLL, window=(7, 1))


def test_windows_that_cannot_be_changed_have_none():
    assert made(topographic(window="shared")).window is None
    with pytest.raises(ValueError, match="a window with learned weights has the size that it was trained with"):
        topographic(window="shared").with_window(2, 1)
    assert made(VAE((1, 8, 8), 3, 6)).window is None
    assert made(TVAE((1, 8, 8), 1, 6, Neighborhood(2, (1, 2), axes=(2, 3)))).window is None
    padded = TVAE((1, 8, 8), 3, 6, Neighborhood(4, 3, capsule_boundary="padded"))
    with pytest.raises(ValueError, match=r"^this window needs u at \d+ positions of a capsule, the encoder gives \d+$"):
        padded.with_window(4, 5)


def test_capsules_of_two_axes_are_shown_on_them():
    player = made(TVAE((1, 8, 8), 2, 6, Neighborhood(2, 1, axes=(2, 3), roots="each axis")))
    assert player.motions() == [f"{ROLL}, axis 0", f"{ROLL}, axis 1"]
    t = player.model.encode(player.batch.select([0]), sample=False)[0, 0].detach()
    view = player.view(0, f"{ROLL}, axis 1")
    torch.testing.assert_close(view.activity[2], t.view(2, 2, 3).roll(2, -1).view(4, 3))


def test_flows_are_followed_by_their_numbers():
    torch.manual_seed(0)
    model = FlowVAE((1, 8, 8), 2, 3)
    with torch.no_grad():
        model.potentials.w.mul_(10)
    player = made(model)
    assert player.motions() == ["flow 1", "flow 2", "flow 3"]
    for k in range(3):
        view, batch = player.view(0, f"flow {k + 1}"), player.batch.select([0])._replace(axis=torch.tensor([k]))
        path = model.moved(batch).detach()
        torch.testing.assert_close(view.activity, path[0])
        torch.testing.assert_close(view.images["moved"], images_of(model.likelihood.mean(model.decode(path))))
        assert (path[0, 0] - path[0, 5]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("group", "motions"),
    [("SO(2)", ["turned"]), ("Sim(2)", ["turned", "shifted in x", "shifted in y", "grown"])],
)
def test_clusters_move_by_their_poses(group, motions):
    """By pairs of frames, of which there are more steps."""
    torch.manual_seed(0)
    model = ClusterVAE((1, 8, 8), 1, 12, code=3, clusters=4, group=group, starts=2, units=8)
    player = made(model, sequences(frames=2))
    assert (player.motions(), player.steps) == (motions, 12)
    view, batch = player.view(1, "turned"), player.batch.select([1])
    torch.testing.assert_close(view.images["input"], batch.images[0, [0, *[1] * 11]].movedim(1, -1))
    t = model.encode(batch, sample=False)[0, 0].detach()
    torch.testing.assert_close(view.activity[0], t)
    angle = view.activity[:, 0, -1] - t[0, -1]
    torch.testing.assert_close(angle.rad2deg(), torch.arange(12) * 30.0)
    assert torch.equal(view.activity[..., :-1], t[..., :-1].expand(12, -1, -1))
    quarter, around = (view.images["moved"][l] for l in (3, 0))
    torch.testing.assert_close(quarter[..., 0], around[..., 0].rot90(), atol=1e-4, rtol=0)
    for i, motion in enumerate(motions[1:], 1):
        path = player.view(1, motion).activity[:, 0]
        number = sum(model.sizes[:2]) + i
        torch.testing.assert_close(path[3, number] - t[0, number], torch.tensor(2.0))  # standard deviations
        others = [n for n in range(12) if n != number]
        assert torch.equal(path[:, others], t[:, others].expand(12, -1))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_motion_that_can_be_looked_at(name):
    settings = MODELS[name].Settings(capsules=2, capsule_dim=20)
    if hasattr(settings, "frames"):
        settings = type(settings)(capsules=2, capsule_dim=20, frames=6)
    values = {x: getattr(settings, x) for x in type(settings).__dataclass_fields__}
    player = made(MODELS[name]((1, 8, 8), **values))
    for motion in player.motions():
        view = player.view(0, motion, capsule=1)
        assert {x.shape for x in view.images.values()} == {(6, 8, 8, 1)}
        assert all(((x >= 0) & (x <= 1)).all() for x in view.images.values())


def test_activity_is_grey_from_the_least_of_all_steps_to_the_greatest():
    activity = torch.tensor([[[-30.0, -20]], [[-25.0, -10]]])
    assert grey(activity, 0).flatten().tolist() == [0, 0.5]
    assert grey(activity, 1).flatten().tolist() == [0.25, 1]
    assert grey(torch.full((2, 1, 2), 5.0), 0).tolist() == [[[0.0], [0.0]]]


# --- the page ---------------------------------------------------------------------------------------------------------


def decoded(address):
    """The image in a `data:` address, in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))) / 255


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of what NiceGUI imports
def test_what_is_chosen_on_the_page_is_what_is_shown():
    pytest.importorskip("nicegui", reason="needs the package nicegui")
    from nicegui import ui
    from nicegui.testing import user_simulation

    from tvae.play import _page

    player = made(topographic())

    async def visit():
        async with user_simulation(lambda: _page(ui, player, "the title")) as user:
            await user.open("/")
            await user.should_see("the title")

            def found(marker):
                (element,) = user.find(marker=marker).elements
                return element

            def check(step, *arguments, **window):
                view = player.view(*arguments, **window)
                for name, images in view.images.items():
                    expected = images[step, ..., 0].numpy()
                    np.testing.assert_allclose(decoded(found(name).source), expected, atol=0.51 / 255)
                activity = grey(view.activity, step)[..., 0].numpy()
                np.testing.assert_allclose(decoded(found("activity").source), activity, atol=0.51 / 255)

            check(0, 0, ROLL)
            choices = (
                ("step", 4, (4, 0, ROLL), {}),
                ("sequence", 2, (4, 2, ROLL), {}),
                ("capsule", 1, (4, 2, ROLL, 1), {}),
                ("frames", 2, (4, 2, ROLL, 1), {"window": (2, 3)}),
                ("positions", 5, (4, 2, ROLL, 1), {"window": (2, 5)}),
            )
            for marker, value, arguments, window in choices:
                with user:
                    found(marker).set_value(value)
                check(*arguments, **window)

    asyncio.run(visit())


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model is as it was made."""
    run = Run.create(tmp_path_factory.mktemp("play") / "run", PRESETS["quickstart"].config)
    torch.manual_seed(0)
    run.save_model(TVAE(SpriteSequences().image_shape, 15, 15, run.config.model.neighborhood))
    return run


@pytest.mark.slow
def test_in_a_browser_without_a_network_the_slider_changes_the_image(run, tmp_path):
    pytest.importorskip("nicegui", reason="needs the package nicegui")
    driver = open_chromium()
    port = free_port()
    command = [sys.executable, "-m", "tvae", "play", str(run.path), "--no-browser", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment["PYTHONPATH"] = str(ROOT)
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=tmp_path
        )
    try:
        line = process.stdout.readline()
        while line.endswith("...\n"):
            line = process.stdout.readline()
        assert line == f"{run.path}: http://127.0.0.1:{port}, until Ctrl-C\n"
        while process.poll() is None:  # until it listens
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
        driver.get(f"http://127.0.0.1:{port}")
        assert driver.title == "TVAE on sprites, after 1,400 steps"
        source = "Array.from(document.images).map(x => x.src)"
        wait_until(driver, f"document.images.length == 4 && {source}.every(x => x.startsWith('data:image/png'))")
        batch = FixedSequences.take(open_source("sprites", "test"), 64, 8)
        player = Player(run.load_model(), SequenceBatch.joined(batch.batches), [""] * 64)
        view = player.view(0, ROLL)
        before = driver.execute_script(f"return {source}")
        np.testing.assert_allclose(decoded(before[2]), view.images["moved"][0, ..., 0], atol=0.51 / 255)
        step = driver.find_elements("css selector", ".q-slider__track-container")[-1]
        step.click()  # in its middle
        wait_until(driver, f"{source}[0] != {before[0]!r}")
        wait_until(driver, f"{source}[3] != {before[3]!r}")
        after = driver.execute_script(f"return {source}")
        for i, name in enumerate(view.images):
            np.testing.assert_allclose(decoded(after[i]), view.images[name][7, ..., 0], atol=0.51 / 255)
        assert complaints(driver) == []
        if "TVAE_SCREENSHOT" in os.environ:
            driver.save_screenshot(os.environ["TVAE_SCREENSHOT"])
    finally:
        driver.quit()
        process.send_signal(2)
        process.wait()
        process.stdout.close()
    assert process.returncode == 130
    assert (tmp_path / "errors").read_text() == "tvae: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def error(arguments, capsys):
    """The status of a command, and the one line of its error."""
    status = cli.main(shlex.split(arguments))
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return status, line.removeprefix("tvae: error: ")


def test_without_the_extra_there_is_one_line_of_advice(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    status, line = error("play nowhere", capsys)
    assert status == 1
    assert line.startswith("pages are made by NiceGUI, which cannot be imported here (")
    assert line.endswith('install the extra play: pip install "tvae-kernels[play]"')


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_a_port_that_is_none_is_a_wrong_value(port, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nicegui", sys)  # any module: nothing is asked of it
    assert error(f"play nowhere --port {port}", capsys) == (2, f"--port must be between 1 and 65535, got {port}")


def test_a_port_in_use_and_a_host_that_is_another_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"^cannot listen at 127.0.0.1:{port}: Address already in use; choose"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"^cannot listen at 192.0.2.1:8080: .*; choose another --port or --host$"):
        check_address("192.0.2.1", 8080)


def test_a_run_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nicegui", sys)
    assert error(f"play nowhere --port {free_port()}", capsys) == (
        1,
        "nowhere is not a run directory: it has no config.json",
    )
