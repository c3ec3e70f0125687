"""How easily a network tells the motions of a model apart: the VP score."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import EvaluationSettings
from ..data import EVALUATION_SEED, SequenceBatch, SequenceSource, SequenceStream
from ..models import ELBO, SequenceModel
from ..models.layers import Capsules
from .base import EvaluationMetric, Row, private_generator
from .fits import AFFINE, FittedMotions, one_by_one
from .motion import OWN, fitted_to, names_of

TRUE = "true pairs"
_PAIRS, _AT_ONCE = 2000, 50
_SIDE = 32  # of the largest differences that the network sees
_EPOCHS, _BATCH, _LEARNING_RATE = 30, 32, 1e-3

Differences = Float[Tensor, "pair channel height width"]


def network(channels: int, kinds: int) -> nn.Sequential:
    """Make the network of the published metric at half its width, on the CPU."""

    def block(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False, **here)
        return [convolution, nn.BatchNorm2d(outputs, **here), nn.ReLU()]

    here = {"device": "cpu", "dtype": torch.float32}
    return nn.Sequential(
        *block(channels, 32, 7, stride=2),
        *block(32, 32, 3),
        nn.MaxPool2d(2, ceil_mode=True),
        *block(32, 64, 3),
        *block(64, 128, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, kinds, **here),
    )


def distinguished(differences: Differences, kind: Int[Tensor, " pair"], kinds: int) -> float:
    """Return the share of pairs whose kind a network tells from their difference, that was trained on others.

    It is trained on the first tenth of the pairs, rounded down to whole rounds of the kinds, and tested on all others:
    once, after 30 epochs of Adam with 1e-3 and batches of 32. On the CPU, seeded, and no generator is disturbed.
    Differences of more than 32 pixels are halved by averaging until they are not.
    """
    x, kind = differences.float().cpu(), kind.cpu()
    while max(x.shape[-2:]) > _SIDE:
        x = F.avg_pool2d(x, 2, ceil_mode=True)
    x = x.contiguous(memory_format=torch.channels_last)  # in which convolutions on a CPU take two thirds of the time
    trained = kinds * max(1, len(x) // (10 * kinds))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(EVALUATION_SEED)  # torch.manual_seed would seed those of GPUs as well
        net = network(x.shape[1], kinds).to(memory_format=torch.channels_last)
        _train(net, x[:trained], kind[:trained])
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in x[trained:].split(100)])
    return (found == kind[trained:]).double().mean().item()


def _train(net: nn.Module, x: Differences, kind: Int[Tensor, " pair"]) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    generator, parts = private_generator(EVALUATION_SEED), -(-len(x) // _BATCH)
    for _ in range(_EPOCHS):
        # Of like size, for a single pair may have no variance to normalise by.
        for chosen in torch.randperm(len(x), generator=generator, device="cpu").tensor_split(parts):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), kind[chosen]).backward()
            optimizer.step()


# Of the true pairs, by source: of all models the same.
_CEILINGS: WeakKeyDictionary[SequenceSource, float] = WeakKeyDictionary()


class VPScore(EvaluationMetric):
    """Share of pairs of images, the first and last of a motion, whose transformation a network tells: the VP score.

    Of 2,000 seeded test examples, or as many as there are, each moved by one of K transformations, all alike often:
    as the model moves them, if it is told the transformation; as the affine motion does that is fitted to its latent
    variables; and as they are, which is the ceiling. `distinguished` says how. Where motions differ it is near 1,
    whether they are right or not: it is to be read beside `PixelError`. Chance: 1/K.

    Args:
        source: of the test examples, on open paths.

    """

    key = "vp_score"
    fits = True
    higher_is_better = True

    def __init__(self, source: SequenceSource):
        super().__init__()
        self.source, self.names = source, names_of(source)
        self.fitted: FittedMotions | None = None
        self.scores: dict[str, float] = {}

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes open paths of several transformations, and a motion that is told them."""
        one_a_kind = model.told_transformations or not model.shares_latents
        moves = source.open_paths and len(source.transformations) > 1 and source.sequence_length > 1
        return one_a_kind and moves and len(source) >= 2 * len(source.transformations)

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> VPScore:
        """Make the metric for the transformations of a source."""
        return cls(source)

    def fit(self, model: SequenceModel, training: SequenceSource) -> None:
        """Fit the affine motion."""
        self.fitted = fitted_to(model, training, self.names)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Score pairs of its own, when the first batch is measured."""
        if not self.update_called:
            self.update(model)

    def update(self, model: SequenceModel) -> None:
        """Score the pairs of a model."""
        differences: dict[str, list[Tensor]] = {}
        kinds = []
        for batch in self.batches():
            kinds.append(batch.axis)
            for name, difference in self._differences(model, batch).items():
                differences.setdefault(name, []).append(difference)
        kind = torch.cat(kinds)
        for name, parts in differences.items():
            self.scores[name] = distinguished(torch.cat(parts), kind, len(self.names))
        if TRUE in self.scores:
            _CEILINGS[self.source] = self.scores[TRUE]
        else:
            self.scores[TRUE] = _CEILINGS[self.source]

    def batches(self) -> Iterator[SequenceBatch]:
        """Render the sequences that the pairs are taken of, all transformations alike often."""
        kinds = len(self.names)
        count = min(_PAIRS, len(self.source)) // kinds * kinds
        examples, starts, _ = SequenceStream(self.source, count, EVALUATION_SEED).draw(0)
        transformation = torch.tensor(sorted(self.source.transformations), device="cpu").repeat(count // kinds)
        for part in torch.arange(count, device="cpu").split(_AT_ONCE):
            yield self.source.sequences(examples[part], starts[part], transformation[part])

    def _differences(self, model: SequenceModel, batch: SequenceBatch) -> dict[str, Differences]:
        """Return first less last images, by what moves them."""
        paths: dict[str, Capsules] = {}
        if model.told_transformations:
            paths[OWN] = model.moved(batch)
        if self.fitted is not None:
            first = model.encode(batch, sample=False)[:, 0]
            paths[AFFINE] = self.fitted.moved(AFFINE, first, one_by_one(batch, len(self.names)))
        images = {name: model.likelihood.mean(model.decode(path[:, [0, -1]])) for name, path in paths.items()}
        if self.source not in _CEILINGS:
            images[TRUE] = batch.images[:, [0, -1]]
        return {name: x[:, 0] - x[:, -1] for name, x in images.items()}

    def compute(self) -> dict[str, float]:
        """Return the scores, by what moves the images."""
        return self.scores

    def rows(self) -> list[Row]:
        """Return a row for each score."""
        return [
            Row(
                self.key,
                None if name == OWN else name,
                "VP score" if name == OWN else f"VP score, {name}",
                self.scores[name],
                1 / len(self.names),
                digits=3,
            )
            for name in (OWN, AFFINE, TRUE)
            if name in self.scores
        ]
