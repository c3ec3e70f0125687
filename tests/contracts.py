"""What every model promises of its training, on runs of any of them."""

import csv
import math

import torch
from acting import interrupted_at

from tvae.models import load
from tvae.training import Run, train


def curve(run):
    """All that was logged, `(row, column)`."""
    with (run.path / "metrics.csv").open(newline="") as file:
        return torch.tensor([[float(x) for x in row.values()] for row in csv.DictReader(file)], dtype=torch.float64)


def rounding(config, pixels=64 * 64):
    """How far curves of one training may be apart, relatively, when sums are taken in another order.

    Errors of additions are as good as random and grow with the root of their number (see benchmarks/operation.py). The
    longest chain of a step adds the pixels three times: into the encoder, over the likelihood, and into the weights'
    gradients, and every step starts with the errors of those before it.
    """
    return 6 * math.sqrt(config.training.steps * 3 * pixels) * torch.finfo(torch.float32).eps


def assert_resumed_bit_for_bit(whole, run, folder):
    """A run that is interrupted and resumed gives the model of one that was not, and its file gives it again."""
    cut = Run.create(folder, run.config)
    assert train(cut, "cpu", sources=interrupted_at(run.config, 3)) is None
    resumed = train(cut, "cpu")
    expected = whole.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.state_dict().items())
    assert cut.metrics.read_bytes() == run.metrics.read_bytes()
    read = load(run.model_file)
    assert type(read) is type(whole)
    assert read.settings == run.config.model
    assert all(torch.equal(x, expected[name]) for name, x in read.state_dict().items())


def assert_same_curves(eager, compiled, pixels):
    """Runs of a few steps of either kind have the same terms, within rounding, of the size of the loss at most."""
    found, expected = curve(compiled), curve(eager)
    scale = expected.abs().amax(1, keepdim=True)
    assert ((expected - found).abs() <= rounding(eager.config, pixels) * scale).all()
