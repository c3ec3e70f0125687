"""Every file that a command reads, cut, with bits flipped and with values of other types: one line that says so.

What comes out is an error of one line, or exactly what was written; numbers are never others without a word.
"""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from acting import interrupted_at, often
from conftest import write_idx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from tvae import evaluation
from tvae.config import Config, DataSettings, EvaluationSettings, TrainingSettings
from tvae.data import DataError, SequenceStream, dsprites, open_source
from tvae.metrics import Row
from tvae.models import TVAE, VAE, SequenceModel
from tvae.training import Run, RunError, build_optimizer, train
from tvae.training.log import rows_until
from tvae_kernels import Neighborhood

pytestmark = pytest.mark.slow  # mark what is not `quick`

ERRORS = (DataError, RunError, ValueError)
CONFIG = Config(
    DataSettings(), VAE.Settings(1, 3), TrainingSettings("adam", batch_size=2, steps=6), EvaluationSettings(8, 2)
)
SHAPE = (1, 64, 64)
JSON = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=3)
JSON |= st.lists(st.integers(0, 3), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)


def sizes(examples):
    """A test of few examples each time, and one of many with `-m long`."""

    def both(test):
        @pytest.mark.parametrize("count", [examples, pytest.param(50 * examples, marks=pytest.mark.long)])
        def run(count, request):
            repeatable = settings.get_profile("repeatable")
            options = {"max_examples": count, "suppress_health_check": list(HealthCheck), "database": None}
            settings.register_profile("sized", repeatable, **options)
            settings.load_profile("sized")
            try:
                test(**{name: request.getfixturevalue(name) for name in test.fixtures})
            finally:
                settings.load_profile("repeatable")

        run.__name__ = run.__qualname__ = test.__name__
        return run

    return both


def uses(*names):
    """Name the fixtures that a test of random examples takes."""

    def named(test):
        test.fixtures = names
        return test

    return named


@st.composite
def damaged(draw, size):
    """A function that damages bytes: it cuts them, flips bits, or puts others in their place."""
    kind = draw(st.sampled_from(("cut", "flip", "flip", "replace")))
    place = draw(st.integers(0, size - 1))
    if kind == "cut":
        return lambda content: content[:place]
    if kind == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return lambda content: content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
    new = draw(st.binary(min_size=1, max_size=4))
    return lambda content: content[:place] + new + content[place + len(new) :]


def refused_or(action, unchanged):
    """Do what reads a file; where it is not refused in one line, what it gives must be what was written."""
    try:
        result = action()
    except ERRORS as error:
        text = str(error)
        assert text
        assert len(text.splitlines()) == 1, text
    else:
        assert unchanged(result)


def same(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in state.items())


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run with a checkpoint of step 5 and two rows in its log."""
    run = Run.create(tmp_path_factory.mktemp("damage") / "run", CONFIG)
    with often(2, 2):
        assert train(run, "cpu", sources=interrupted_at(CONFIG, 4)) is None
    return run


@pytest.fixture(scope="module")
def checkpoint(interrupted):
    return interrupted.checkpoint.read_bytes()


def restored(run):
    model = CONFIG.build_model(SHAPE)
    optimizer = build_optimizer(CONFIG.training, model)
    step = run.load_checkpoint(model, optimizer)
    states = {f"{i}.{name}": x for i, state in enumerate(optimizer.state.values()) for name, x in state.items()}
    return step, {**model.state_dict(), **states}


@pytest.fixture(scope="module")
def whole(interrupted):
    return restored(interrupted)


@pytest.fixture(scope="module")
def copy(interrupted, tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "copy"
    shutil.copytree(interrupted.path, path)
    return Run(path, CONFIG)


def test_a_checkpoint_restores_what_was_saved(whole):
    step, state = whole
    assert step == 5
    assert len(state) == 4 * len(CONFIG.build_model(SHAPE).state_dict())


@sizes(30)
@uses("copy", "checkpoint", "whole")
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused(copy, checkpoint, whole, data):
    header = 8 + struct.unpack("<Q", checkpoint[:8])[0]
    size = data.draw(st.sampled_from((header, len(checkpoint))))
    copy.checkpoint.write_bytes(data.draw(damaged(size))(checkpoint))
    refused_or(lambda: restored(copy), lambda found: found[0] == whole[0] and same(found[1], whole[1]))


def without(prefix):
    return lambda tensors: {name: x for name, x in tensors.items() if not name.startswith(prefix)}


def with_another(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


MOMENT = "optimizer.0.exp_avg"


@pytest.mark.parametrize("state", [{}, {"checksum": None}], ids=["checked", "of an older version"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_another(MOMENT, lambda x: x[:1].clone()), r"exp_avg is float32 of shape \(1, .*, should be float32 of"),
        (with_another(MOMENT, lambda x: x.double()), r"exp_avg is float64 of shape .*, should be float32 of"),
        (with_another("optimizer.0.step", lambda x: x.reshape(1)), r"step is float32 of shape \(1,\), should be"),
        (with_another("model.decoder.0.bias", lambda x: x.half()), "bias is float16 of shape .*, should be float32"),
        (without(MOMENT), "optimizer.0.exp_avg is missing, should be float32"),
        (without("optimizer."), "optimizer.0.exp_avg is missing"),
        (without("model.z_encoder.0.bias"), "model.z_encoder.0.bias is missing"),
        (lambda tensors: {**tensors, "optimizer.0.surplus": torch.zeros(1)}, "surplus is float32 .*, should be none"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_before_they_are_used(change, message, state, copy, interrupted):
    metadata = {"step": "5", "param_groups": "[]", **state}
    save_file(
        change(load_file(interrupted.checkpoint)), copy.checkpoint, {k: v for k, v in metadata.items() if v is not None}
    )
    with pytest.raises(RunError, match=f"cannot restore .*checkpoint.safetensors: .*{message}"):
        restored(copy)


@pytest.mark.parametrize("step", ["-5", "0", "", "5.0", "٥", "1e3", "9" * 5000, "x"])
def test_a_step_that_is_none_is_refused_and_deletes_no_row(step, copy, interrupted):
    rows = interrupted.metrics.read_bytes()
    copy.metrics.write_bytes(rows)
    save_file(load_file(interrupted.checkpoint), copy.checkpoint, {"step": step})
    with pytest.raises(RunError, match=r"cannot restore .*: its step is"):
        train(copy, "cpu", show_progress=False)
    with pytest.raises(RunError, match=r"cannot restore .*: .*its step is"):
        copy.steps_done()
    assert copy.metrics.read_bytes() == rows


def test_a_checkpoint_without_a_checksum_of_an_older_version_is_restored(copy, interrupted, whole):
    save_file(load_file(interrupted.checkpoint), copy.checkpoint, {"step": "5", "param_groups": "[]"})
    assert same(restored(copy)[1], whole[1])


# --- logs -------------------------------------------------------------------------------------------------------------

LOG = b"step,loss,kl_z\r\n" + b"".join(b"%d,1.5,0.25\r\n" % step for step in range(25, 251, 25))


@sizes(100)
@uses()
@given(change=damaged(len(LOG)), step=st.sampled_from((100, 110, 250)))
@example(change=lambda log: log.replace(b"75,", b"x5,"), step=250)
def test_a_damaged_log_loses_no_row_in_silence(change, step):
    """Up to the step of the checkpoint all rows are kept, or it is said that one is damaged."""
    expected, log = rows_until(step, LOG), change(LOG)
    place = next((i for i, (x, y) in enumerate(zip(LOG, log, strict=False)) if x != y), len(log))
    kept = expected.splitlines(keepends=True)[1:]
    starts = [expected.index(row) for row in kept]
    intact = [row for row, start in zip(kept, starts, strict=True) if start > place and log[start:].startswith(row)]

    def unchanged(found):
        """The digits of numbers have no check; what is lost is at the end."""
        return len(found.splitlines()) == 1 + len(kept) or not intact

    refused_or(lambda: rows_until(step, log), unchanged)


@pytest.mark.parametrize(
    "log",
    [
        LOG.replace(b"75,1.5", b"7x,1.5"),
        LOG.replace(b"75,1.5,0.25\r\n", b"75,1.5,0.25"),
        LOG.replace(b"75,1.5,0.25\r\n", b"\0\0\0\n"),
        LOG.replace(b"\n75,", b"\n7,"),
        LOG.replace(b"75,1.5,", b"75,1.5"),
        LOG.replace(b"loss,kl_z", b"loss;kl_z"),
    ],
    ids=["step", "line", "zeros", "order", "fields", "header"],
)
def test_a_log_that_is_damaged_before_the_checkpoint_is_refused(log, copy, interrupted):
    copy.checkpoint.write_bytes(interrupted.checkpoint.read_bytes())
    with pytest.raises(ValueError, match=r"line . is "):
        rows_until(250, log)
    damage = interrupted.metrics.read_bytes().replace(b"\n2,", b"\nx,")
    copy.metrics.write_bytes(damage)
    with pytest.raises(RunError, match=r"metrics.csv is damaged: line 2 is b'x,.*; mend it, or move it away"):
        train(copy, "cpu", show_progress=False)
    assert copy.metrics.read_bytes() == damage


@pytest.mark.parametrize("header", [b"step,lozz,kl_z", b"step,loss,kl_\xff", b"stop,loss,kl_z"])
def test_a_log_with_other_columns_is_refused_and_not_filled_with_nothing(header, copy, interrupted):
    copy.checkpoint.write_bytes(interrupted.checkpoint.read_bytes())
    names, _, rows = interrupted.metrics.read_bytes().partition(b"\r\n")
    assert names.count(b",") == 4
    copy.metrics.write_bytes(header + names[len(b"step,loss,kl_z") :] + b"\r\n" + rows)
    with often(2, 2), pytest.raises(RunError, match=r"metrics.csv has the columns .*, should have step, loss"):
        train(copy, "cpu", show_progress=False)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    torch.manual_seed(0)
    model = TVAE((1, 4, 4), 2, 3, Neighborhood(3, 1))
    model.save(path)
    return path, path.read_bytes(), model.state_dict()


@sizes(40)
@uses("model_file")
@given(data=st.data())
def test_a_damaged_model_is_refused(model_file, data):
    path, content, state = model_file
    header = 8 + struct.unpack("<Q", content[:8])[0]
    size = data.draw(st.sampled_from((header, len(content))))
    changed = path.with_name("damaged.safetensors")
    changed.write_bytes(data.draw(damaged(size))(content))

    def unchanged(model):
        assert model.settings == TVAE.Settings(2, 3, neighborhood=Neighborhood(3, 1))
        return same(model.state_dict(), state)

    refused_or(lambda: SequenceModel.load(changed), unchanged)


@sizes(40)
@uses("model_file")
@given(data=st.data())
def test_a_model_with_settings_of_other_types_is_refused(model_file, data):
    path, content, state = model_file
    length = struct.unpack("<Q", content[:8])[0]
    values = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["model"])
    if not data.draw(st.booleans()):  # as in a file of an older version
        del values["checksum"]
    values[data.draw(st.sampled_from(sorted(set(values) - {"mu_init"})))] = data.draw(JSON)
    changed = path.with_name("types.safetensors")
    changed.write_bytes(save(load(content), {"model": json.dumps(values)}))
    refused_or(lambda: SequenceModel.load(changed), lambda model: same(model.state_dict(), state))


@pytest.mark.parametrize("text", ["[]", "5", "null", "[" * 100_000, "{}", '{"model": "vae"}'])
def test_metadata_that_describe_no_model_are_refused(text, model_file):
    path, content, _ = model_file
    changed = path.with_name("described.safetensors")
    changed.write_bytes(save(load(content), {"model": text}))
    with pytest.raises(ValueError, match=r"described.safetensors is not a model file of this version: .") as error:
        SequenceModel.load(changed)
    assert "\n" not in str(error.value)


# --- configurations and evaluations -----------------------------------------------------------------------------------


@sizes(60)
@uses()
@given(change=damaged(len(CONFIG.to_json())))
def test_a_damaged_configuration_is_refused_or_one(change):
    """A digit or a letter may be another valid one: then the configuration says so itself."""

    def read():
        return Config.from_json(change(CONFIG.to_json().encode()).decode())

    refused_or(read, lambda found: Config.from_json(found.to_json()) == found)


PLACES = [(part, name) for part, values in json.loads(CONFIG.to_json()).items() for name in values]


@sizes(100)
@uses()
@given(place=st.sampled_from(PLACES), value=JSON)
@example(place=("training", "steps"), value=True)
@example(place=("training", "seed"), value=10**30)
@example(place=("training", "learning_rate"), value=True)
@example(place=("model", "capsules"), value=False)
def test_a_value_of_another_type_in_a_configuration_is_refused(place, value):
    values = json.loads(CONFIG.to_json())
    values[place[0]][place[1]] = value

    def kept(config):
        """It is that value, or the number or the path that it spells."""
        found = json.loads(config.to_json())[place[0]][place[1]]
        if isinstance(value, str):
            return found in (value, str(Path(value))) or found == float(value)
        return found == value and not isinstance(value, bool)

    refused_or(lambda: Config.from_json(json.dumps(values)), kept)


ROWS = [Row("elbo", None, "ELBO", -1.5, 2.0, "nats/frame"), Row("capcorr", "x", "CapCorr x", 0.5, 0.25, "", 2)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluations") / "evaluation.json"
    evaluation.save(ROWS, 8, path)
    return path, path.read_bytes()


@sizes(60)
@uses("evaluated")
@given(data=st.data())
def test_a_damaged_evaluation_is_refused_or_one(evaluated, data):
    path, content = evaluated
    path.write_bytes(data.draw(damaged(len(content)))(content))
    refused_or(lambda: evaluation.load(path), lambda rows: all(type(row.value) is float for row in rows))


@sizes(60)
@uses("evaluated")
@given(
    row=st.integers(0, 1), name=st.sampled_from(("key", "part", "metric", "value", "chance", "unit", "digits")), x=JSON
)
@example(row=0, name="value", x=True)
@example(row=0, name="digits", x=-1)
@example(row=0, name="value", x=10**400)
@example(row=0, name="chance", x="0.5")
def test_a_value_of_another_type_in_an_evaluation_is_refused(evaluated, row, name, x):
    path, content = evaluated
    values = json.loads(content)
    values["metrics"][row][name] = x
    path.write_text(json.dumps(values))

    def kept(rows):
        found = getattr(rows[row], {"metric": "label"}.get(name, name))
        return found == x or found != found

    refused_or(lambda: evaluation.load(path), kept)


def test_an_evaluation_that_is_nested_too_deep_is_refused(evaluated):
    path, _ = evaluated
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="holds no evaluation"):
        evaluation.load(path)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(mnist_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    shutil.copytree(mnist_dir, folder, dirs_exist_ok=True)
    return folder / "MNIST" / "raw"


FILES = [f"t10k-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]


@sizes(40)
@uses("digits", "mnist_dir")
@given(data=st.data(), name=st.sampled_from(FILES))
def test_damaged_mnist_is_refused_but_for_the_grey_values(digits, mnist_dir, data, name):
    """Of the values of pixels and the digits there is no check in the format; their number and shape are checked."""
    content = (mnist_dir / "MNIST/raw" / name).read_bytes()
    size = data.draw(st.sampled_from((16, len(content))))
    (digits / name).write_bytes(data.draw(damaged(min(size, len(content))))(content))
    whole = open_source("mnist", "test", mnist_dir)

    def unchanged(source):
        differ = int((source.images != whole.images).sum()) + int((source.labels != whole.labels).sum())
        return source.images.shape == whole.images.shape and differ <= 4 and source.labels.max() <= 9

    try:
        refused_or(lambda: open_source("mnist", "test", digits.parent.parent), unchanged)
    finally:
        (digits / name).write_bytes(content)


@pytest.mark.parametrize("shape", [(20, 32, 32), (20, 14, 28), (20, 28, 14)])
@pytest.mark.parametrize("name", ["mnist", "mnist-still", "mnist-rotation-hue"])
def test_mnist_of_another_shape_is_refused(shape, name, digits, mnist_dir):
    file = digits / FILES[0]
    content = file.read_bytes()
    write_idx(file, np.zeros(shape, dtype=np.uint8))
    try:
        with pytest.raises(
            DataError, match=r"should be images of uint8 \(N, 28, 28\) with N labels, found torch.uint8"
        ):
            open_source(name, "test", digits.parent.parent)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (torch.rand(20, 28, 28), torch.zeros(20).long(), r"torch.float32 \(20, 28, 28\)"),
        (torch.zeros(20, 28, 28, dtype=torch.uint8), torch.zeros(19).long(), r"\(20, 28, 28\) with 19 labels"),
        (torch.zeros(20, 28, 28, dtype=torch.uint8), torch.full((20,), 10), "labels from 0 to 9, found 10 to 10"),
    ],
)
def test_what_an_old_torchvision_has_left_is_checked_too(images, labels, found, mnist_dir, tmp_path):
    """It is read in place of good raw files."""
    shutil.copytree(mnist_dir, tmp_path, dirs_exist_ok=True)
    processed = tmp_path / "MNIST/processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((images, labels), processed / name)
    with pytest.raises(DataError, match=found):
        open_source("mnist", "test", tmp_path)


SIZES, KEPT = (3, 1, 2, 2, 2), (range(3), range(1), range(0, 2, 2), range(2), range(2))
IMAGES = np.random.default_rng(0).integers(2, size=(24, 64, 64), dtype=np.uint8)


def archive(compression):
    buffer, member = io.BytesIO(), io.BytesIO()
    np.save(member, IMAGES)
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("imgs.npy", member.getvalue())
    return buffer.getvalue()


KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ARCHIVES = {kind: archive(kind) for kind in KINDS}


@sizes(40)
@uses("tmp_path_factory")
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_damaged_dsprites_archive_is_refused(tmp_path_factory, data, kind):
    content, path = ARCHIVES[kind], tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(content)
    expected = dsprites._read_dsprites(path, SIZES, KEPT)
    end = data.draw(st.booleans())  # where the directory of the archive is
    change = data.draw(damaged(150 if end else len(content)))
    path.write_bytes(content[:-150] + change(content[-150:]) if end else change(content))
    refused_or(lambda: dsprites._read_dsprites(path, SIZES, KEPT), lambda found: np.array_equal(found, expected))


@pytest.mark.parametrize(
    ("place", "value"),
    [(8, b"\x09"), (6, b"\x01"), (8, b"\x63")],
    ids=["Deflate64", "encrypted", "AES"],
)
def test_an_archive_of_a_kind_that_python_does_not_read_is_a_data_error(place, value, tmp_path):
    content = bytearray(ARCHIVES[zipfile.ZIP_DEFLATED])
    directory = content.rindex(b"PK\x01\x02")
    for start in (place, directory + place + 2):
        content[start : start + 1] = value
    path = tmp_path / "other.npz"
    path.write_bytes(bytes(content))
    with pytest.raises(
        DataError, match=r"other.npz is not a whole dSprites archive .*; delete it and download it again"
    ):
        dsprites._read_dsprites(path, SIZES, KEPT)


def test_frames_do_not_depend_on_pytorchs_default_type(mnist_dir):
    for name in ("mnist", "mnist-still", "sprites"):
        expected = SequenceStream(open_source(name, "test", mnist_dir), 2, 0)[0].images
        torch.set_default_dtype(torch.float64)
        try:
            found = SequenceStream(open_source(name, "test", mnist_dir), 2, 0)[0].images
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
