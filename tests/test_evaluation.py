"""Evaluating a model on the fixed test set: repeatable, on the stated sequences, beside the right chance levels."""

import pytest
import torch

from tvae import TVAE, VAE
from tvae.data import SequenceStream, SpriteSequences, open_source
from tvae.evaluation import EVALUATION_SEED, FixedSequences, Row, evaluate, load, save
from tvae.metrics import CapCorr, EquivarianceError
from tvae_kernels import Neighborhood


def test_rows_hold_what_the_metrics_say_on_the_fixed_sequences():
    source = SpriteSequences()
    torch.manual_seed(0)
    model = VAE(source.image_shape, 2, 15)
    torch.nn.init.zeros_(model.decoder[-1].weight)  # the image no longer depends on the latent variables
    state = torch.get_rng_state()
    sequences = FixedSequences.of(source, 7, batch_size=4)
    rows = {row.metric: row for row in evaluate(model, sequences, samples=2)}
    assert torch.equal(torch.get_rng_state(), state)

    stream = SequenceStream(source, 4, EVALUATION_SEED)
    x = torch.cat([stream[0].images, stream[1].images])
    with torch.no_grad():
        expected = model.likelihood.log_prob(model.decoder[-1].bias.view(1, 1, 1, 64, 64).expand_as(x), x).mean()
    assert rows["log p(x|t)"].value == pytest.approx(expected.item(), rel=1e-5)
    assert rows["ELBO"].value == pytest.approx(rows["log p(x|t)"].value - rows["KL z"].value - rows["KL u"].value)
    mean = x.double().mean((0, 1))
    chance = (torch.xlogy(mean, mean) + torch.xlogy(1 - mean, 1 - mean)).sum().item()
    for name in ("ELBO", "log p(x|t)", "log p(x), as published, 2 samples", "log p(x), bound, 2 samples"):
        assert rows[name].chance == pytest.approx(chance)
    assert rows["E_eq"].value == pytest.approx(rows["E_eq"].chance, rel=0.1)  # z is noise: iid Gaussian, nearly
    assert rows["KL u"].value == rows["KL z"].chance == 0

    torch.manual_seed(1)  # whatever the random state before
    again = evaluate(model, sequences, samples=2)
    assert str(again) == str(list(rows.values()))  # NaN, of a roll that never varied, equals itself as text


def test_a_model_that_is_told_is_evaluated_along_the_axes_it_is_told():
    source = open_source("sprites-shifts", "test")
    # Windows of one frame, after which capsules roll along no axis: the one that fits better is often the other.
    rolls = Neighborhood(1, 1, axes=(15, 15), roots="each axis")
    model = TVAE(source.image_shape, 1, 225, rolls, told_axis=True)
    rows = {row.metric: row.value for row in evaluate(model, FixedSequences.of(source, 16, batch_size=8), samples=1)}
    error, correlation = EquivarianceError(rolls), CapCorr(["", "", "", "x", "y"], rolls)
    stream = SequenceStream(source, 8, EVALUATION_SEED)
    torch.manual_seed(EVALUATION_SEED)
    for i in range(2):
        axis = stream[i].transformation - 3  # factor 3 is x, 4 is y
        t = model(stream[i].images, axis=axis).t
        list(model.log_weights(stream[i].images, 1, axis))  # draws the same noise
        error.update(t, axis)
        correlation.update(t, stream[i].factors, stream[i].transformation, axis)
    assert rows["E_eq"] == pytest.approx(error.compute().item())
    assert [rows["CapCorr x"], rows["CapCorr y"]] == pytest.approx([*correlation.compute().values()])


def test_a_combined_transformation_is_named_by_its_factors(mnist_dir):
    source = open_source("mnist-rotation-hue", "test", mnist_dir)
    model = VAE(source.image_shape, 2, 18)
    rows = evaluate(model, FixedSequences.of(source, 8, batch_size=4), samples=1)
    assert [row.metric for row in rows if row.metric.startswith("CapCorr")] == ["CapCorr rotation + hue"]


def test_saved_rows_are_loaded(tmp_path):
    rows = [Row("E_eq", 0.1, float("nan"), "")]
    save(rows, 3, tmp_path / "evaluation.json")
    assert str(load(tmp_path / "evaluation.json")) == str(rows)
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()  # which is no JSON
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]
