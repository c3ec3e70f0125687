"""Evaluating a model on the fixed test set: repeatable, on the stated sequences, beside the right chance levels."""

import json
import math
from pathlib import Path

import pytest
import torch

from tvae import TVAE, VAE
from tvae.config import EvaluationSettings
from tvae.data import EVALUATION_SEED, FixedSequences, SequenceStream, open_source
from tvae.data.sprites import SpriteSequences
from tvae.evaluation import evaluate, load, save, table
from tvae.metrics import METRICS, CapCorr, EquivarianceError, Row
from tvae_kernels import Neighborhood

RESULTS = Path(__file__).parents[1] / "results"


SETTINGS = EvaluationSettings(importance_samples=2)


def test_rows_hold_what_the_metrics_say_on_the_fixed_sequences():
    source = SpriteSequences()
    torch.manual_seed(0)
    model = VAE(source.image_shape, 2, 15)
    torch.nn.init.zeros_(model.decoder[-1].weight)  # the image no longer depends on the latent variables
    state = torch.get_rng_state()
    sequences = FixedSequences.take(source, 7, batch_size=4)
    shown = []
    rows = {(row.key, row.part): row for row in evaluate(model, sequences, SETTINGS, shown.append)}
    assert torch.equal(torch.get_rng_state(), state)
    assert shown == [1, 2]

    stream = SequenceStream(source, 4, EVALUATION_SEED)
    x = torch.cat([stream[0].images, stream[1].images])
    with torch.no_grad():
        expected = model.likelihood.log_prob(model.decoder[-1].bias.view(1, 1, 1, 64, 64).expand_as(x), x).mean()
    assert rows["elbo", "log_likelihood"].value == pytest.approx(expected.item(), rel=1e-5)
    assert rows["elbo", None].value == pytest.approx(rows["elbo", "log_likelihood"].value - rows["elbo", "kl_z"].value)
    mean = x.double().mean((0, 1))
    chance = (torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum().item()
    likelihoods = (
        ("elbo", None),
        ("elbo", "log_likelihood"),
        ("log_likelihood", "published"),
        ("log_likelihood", "bound"),
    )
    for key in likelihoods:
        assert rows[key].chance == pytest.approx(chance)
    error = rows["equivariance_error", None]
    assert error.value == pytest.approx(error.chance, rel=0.1)  # z is noise: iid Gaussian, nearly
    assert rows["elbo", "kl_z"].chance == 0
    moved = [
        source.transformations[kind]
        for kind in torch.cat([b.transformation for b in sequences.batches]).unique().tolist()
    ]
    assert [(row.label, row.unit, row.digits) for row in rows.values()] == [
        ("ELBO", "nats/frame", 1),
        ("log p(x|t)", "nats/frame", 1),
        ("KL z", "nats/frame", 1),
        ("log p(x), as published, 2 samples", "nats/frame", 1),
        ("log p(x), bound, 2 samples", "nats/frame", 1),
        ("E_eq", "", 0),
        *((f"CapCorr {name}", "", 2) for name in moved),
        ("Gaussian total correlation", "nats", 1),
        ("active units of 30", "", 0),
    ]
    assert list(rows)[6:-2] == [("capcorr", name) for name in moved]

    torch.manual_seed(1)  # whatever the random state before
    again = evaluate(model, sequences, SETTINGS)
    assert str(again) == str(list(rows.values()))  # NaN, of a roll that never varied, equals itself as text


def test_a_model_that_is_told_is_evaluated_along_the_axes_it_is_told():
    source = open_source("sprites-shifts", "test")
    # Windows of one frame, after which capsules roll along no axis: the one that fits better is often the other.
    rolls = Neighborhood(1, 1, axes=(3, 5), roots="each axis")
    model = TVAE(source.image_shape, 1, 15, rolls, told_axis=True)
    settings = EvaluationSettings(importance_samples=1)
    rows = {
        (row.key, row.part): row.value
        for row in evaluate(model, FixedSequences.take(source, 16, batch_size=8), settings)
    }
    error, correlation = EquivarianceError(rolls), CapCorr(["", "", "", "x", "y"], rolls)
    stream = SequenceStream(source, 8, EVALUATION_SEED)
    torch.manual_seed(EVALUATION_SEED)
    for i in range(2):
        axis = stream[i].transformation - 3  # factor 3 is x, 4 is y
        t = model(stream[i]).t
        list(model.log_weights(stream[i], 1))  # draws the same noise
        error.update(t, axis)
        correlation.update(t, stream[i].factors, stream[i].transformation, axis)
    assert rows["equivariance_error", None] == pytest.approx(error.compute().item())
    found = [rows["capcorr", "x"], rows["capcorr", "y"]]
    assert found == pytest.approx([*correlation.compute().values()])


def test_a_combined_transformation_is_named_by_its_factors(mnist_dir):
    source = open_source("mnist-rotation-hue", "test", mnist_dir)
    model = VAE(source.image_shape, 2, 18)
    rows = evaluate(model, FixedSequences.take(source, 8, batch_size=4), EvaluationSettings(importance_samples=1))
    named = [(row.part, row.label) for row in rows if row.key == "capcorr"]
    assert named == [("rotation + hue", "CapCorr rotation + hue")]


def test_still_images_have_no_metrics_of_motion(mnist_dir):
    source = open_source("mnist-still", "test", mnist_dir)
    rows = evaluate(VAE(source.image_shape, 1, 6), FixedSequences.take(source, 8, batch_size=4), SETTINGS)
    assert {row.key for row in rows} == {"elbo", "log_likelihood", "total_correlation", "active_units"}


def test_the_table_prints_the_digits_of_each_row():
    rows = [
        Row("equivariance_error", None, "E_eq", 13_273.32, 13_270.3, "", 0),
        Row("capcorr", "x", "CapCorr x", 0.987, math.nan, "", 2),
        Row("elbo", "kl_z", "KL z", 1234.56, 0.0, "nats/frame"),
        Row("pixel_error", "frames seen", "frames seen", 5.0, math.nan, "", 0),  # which nobody guesses
        Row("capcorr", "y", "CapCorr y", math.nan, math.nan, "", 2),
    ]
    columns = [list(map(str, column.cells)) for column in table(rows, "title").columns]
    assert columns == [
        ["E_eq", "CapCorr x", "KL z", "frames seen", "CapCorr y"],
        ["13,273", "0.99", "1,234.6", "5", "nan"],
        ["13,270", "", "0.0", "", "nan"],
        ["", "", "nats/frame", "", ""],
    ]


def test_saved_rows_are_loaded(tmp_path):
    rows = [
        Row("equivariance_error", None, "E_eq", 0.1, float("nan"), "", 0),
        Row("capcorr", "x", "CapCorr x", 0.9, 0.1, digits=2),
        Row("a user's", "own", "of a metric that nobody knows", 3.0, 0.0, "m", 5),
    ]
    save(rows, 3, tmp_path / "evaluation.json")
    assert str(load(tmp_path / "evaluation.json")) == str(rows)
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()  # which is no JSON
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_labels_of_older_versions_are_read_as_keys(tmp_path):
    """They had no other key than what is printed, and no digits."""
    labels = {
        "ELBO": ("elbo", None, 1),
        "log p(x|t)": ("elbo", "log_likelihood", 1),
        "KL z": ("elbo", "kl_z", 1),
        "KL u": ("elbo", "kl_u", 1),
        "log p(x), as published, 10 samples": ("log_likelihood", "published", 1),
        "log p(x), bound, 250 samples": ("log_likelihood", "bound", 1),
        "E_eq": ("equivariance_error", None, 0),
        "CapCorr x": ("capcorr", "x", 2),
        "CapCorr rotation + hue": ("capcorr", "rotation + hue", 2),
    }
    metrics = [{"metric": label, "value": i, "chance": None, "unit": "u"} for i, label in enumerate(labels)]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"sequences": 1000, "metrics": metrics}))
    rows = load(path)
    assert {row.label: (row.key, row.part, row.digits) for row in rows} == labels
    assert [(row.value, row.unit) for row in rows] == [(i, "u") for i in range(len(labels))]
    assert all(math.isnan(row.chance) for row in rows)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/evaluation.json")), ids=lambda path: path.parent.name)
def test_the_evaluations_of_the_results_are_read(path):
    rows = load(path)
    measured = json.loads(path.read_text())["metrics"]
    assert [(row.label, row.value) for row in rows] == [(row["metric"], row["value"]) for row in measured]
    assert {row.key for row in rows} <= set(METRICS)
    assert len({(row.key, row.part) for row in rows}) == len(rows)
    assert {"elbo", "log_likelihood"} <= {row.key for row in rows}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"metrics": 3}',
        '{"metrics": ["E_eq"]}',
        '{"metrics": [{"metric": "speed", "value": 1, "chance": 1, "unit": ""}]}',
        '{"metrics": [{"metric": null, "value": 1, "chance": 1, "unit": ""}]}',
        '{"metrics": [{"metric": "E_eq", "value": "x", "chance": 1, "unit": ""}]}',
        '{"metrics": [{"metric": "E_eq", "key": "equivariance_error", "value": 1, "chance": 1, "unit": ""}]}',
    ],
)
def test_a_file_that_holds_no_evaluation_is_refused_by_name(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"evaluation\.json holds no evaluation"):
        load(path)
