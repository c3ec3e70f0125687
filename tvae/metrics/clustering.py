"""How well the classes of examples are found without labels: by a model's own clusters, and by k-means of any model's.

Whatever finds clusters numbers them as it likes: accuracy is under the best one-to-one assignment to the classes.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from tvae_kernels import Neighborhood, roll_capsules

from ..config import EvaluationSettings
from ..data import EVALUATION_SEED, SequenceBatch, SequenceSource
from ..models import ELBO, SequenceModel
from ..models.layers import Capsules
from .base import EvaluationMetric, Row, private_generator
from .equivariance import scale_of

OWN = "own clusters"
_DRAWS = 20  # of random labels
_STARTS = 10  # of k-means
_USED = 0.01  # share of the sequences that a cluster must have to count as used
SCORES = {"ACC": 3, "NMI": 3, "ARI": 3, "clusters used": 0}  # with how many digits they are printed

Labels = Int[Tensor, " example"]


def counts(found: Labels, label: Labels, clusters: int, classes: int) -> Int[Tensor, "class cluster"]:
    """Count the examples of each class, from 0, in each cluster, from 0."""
    return torch.bincount(label * clusters + found, minlength=classes * clusters).view(classes, clusters)


def assigned(table: Int[Tensor, "class cluster"]) -> list[int]:
    """Return the clusters of the classes, or of as many as there are clusters, under the best one-to-one assignment."""
    return linear_sum_assignment(table.numpy(), maximize=True)[1].tolist()


def accuracy(table: Int[Tensor, "class cluster"]) -> float:
    """Return the share of examples that are in the cluster of their class, under the best one-to-one assignment."""
    table = table.numpy()
    return table[linear_sum_assignment(table, maximize=True)].sum().item() / table.sum().item()


def scores(found: Labels, label: Labels, clusters: int, classes: int) -> dict[str, float]:
    """Return accuracy, NMI (over the arithmetic mean of both entropies), ARI, and how many clusters are used."""
    table = counts(found, label, clusters, classes)
    values = (
        accuracy(table),
        normalized_mutual_info_score(label, found),
        adjusted_rand_score(label, found),
        (table.sum(0) > _USED * len(label)).sum().item(),
    )
    return dict(zip(SCORES, map(float, values), strict=True))


def k_means(x: Float[Tensor, "example number"], clusters: int) -> Labels:
    """Return the clusters of k-means: the best of 10 seeded starts, whatever the scale and place of the numbers."""
    x = x.detach().double().cpu()
    x = x - x.mean(0)
    x = (x / scale_of(x.flatten())).float().numpy()
    means = KMeans(clusters, n_init=_STARTS, random_state=EVALUATION_SEED)
    # In one thread, for sums that several share have another order every time.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer distinct examples than clusters
        return torch.from_numpy(means.fit_predict(x)).long()


def averaged(t: Capsules, rolls: Neighborhood) -> Capsules:
    """Return the mean of capsules over all of their rolls, which no roll changes, at every position."""
    return sum(roll_capsules(t, steps, rolls) for steps in range(t.shape[-1])) / t.shape[-1]


def come_round(rolls: Neighborhood | None) -> bool:
    """Say whether capsules roll by whole positions, and what leaves them at one end comes back at the other."""
    if rolls is None or rolls.capsule_boundary != "circular":
        return False
    shift = rolls.shift if rolls.is_multidimensional else (rolls.shift,)
    return all(isinstance(positions, int) for positions in shift)


class Clustering(EvaluationMetric):
    """Accuracy, NMI, ARI and number of used clusters: of a model's own clusters of frame 0, and of k-means.

    k-means, as many means as there are classes, is taken of the most typical capsules `t`: their mean over frames; of
    the same averaged over all rolls; of `t_0` and of `t_0` averaged; of canonical images, where the model has them; of
    the pixels of frame 0; and of those of the examples in no pose, where the source has them. Chance: random labels for
    the same examples, as many as there are clusters; a mean over seeded draws.

    Args:
        source: of the examples.
        rolls: how capsules move, if they come round.

    """

    key = "clustering"
    higher_is_better = True

    def __init__(self, source: SequenceSource, rolls: Neighborhood | None = None):
        super().__init__()
        self.source, self.classes = source, len(source.classes)
        self.rolls = rolls if come_round(rolls) else None
        self.clusters = 0  # of the model's own
        for state in ("label", "own", "capsules", "first", "canonical", "pixels", "upright"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @classmethod
    def applies(cls, model: SequenceModel, source: SequenceSource) -> bool:
        """Say that it takes sources whose examples shall be told apart."""
        return source.clustered

    @classmethod
    def build(cls, model: SequenceModel, source: SequenceSource, settings: EvaluationSettings) -> Clustering:
        """Make the metric for the rolls of a model and the classes of a source."""
        return cls(source, model.rolls)

    def measure(self, model: SequenceModel, batch: SequenceBatch, elbo: ELBO) -> None:
        """Add what a model makes of a batch."""
        self.update(batch, model.encode(batch, sample=False))
        if hasattr(model, "identified"):
            found = model.identified(batch)
            self.clusters = found.clusters
            self.own.append(found.cluster[:, 0])
            self.canonical.append(found.canonical[:, 0].flatten(1))

    def update(self, batch: SequenceBatch, t: Capsules) -> None:
        """Add the sequences of a batch, and their capsules."""
        self.label.append(batch.label)
        self.capsules.append(t.mean(1))
        self.first.append(t[:, 0])
        self.pixels.append(batch.images[:, 0].flatten(1))
        upright = self.source.canonical(batch.example)
        if upright is not None:
            self.upright.append(upright.flatten(1))

    def representations(self) -> dict[str, Float[Tensor, "example number"]]:
        """Return what k-means is taken of, by name."""
        found = {}
        for name, state in (("k-means", self.capsules), ("k-means on t_0", self.first)):
            t = dim_zero_cat(state)
            found[name] = t.flatten(1)
            if self.rolls is not None:
                found[f"{name}, rolls averaged"] = averaged(t, self.rolls).flatten(1)
        images = {"canonical images": self.canonical, "pixels": self.pixels, "upright pixels": self.upright}
        return found | {f"k-means on {name}": dim_zero_cat(state) for name, state in images.items() if state}

    def compute(self) -> dict[str, dict[str, float]]:
        """Return the scores by what was clustered; NaN where it is not finite, or of fewer examples than classes."""
        label = dim_zero_cat(self.label).cpu()
        found = {}
        if self.clusters:
            found[OWN] = scores(dim_zero_cat(self.own).cpu(), label, self.clusters, self.classes)
        for name, x in self.representations().items():
            if not x.isfinite().all() or len(x) < self.classes:
                found[name] = dict.fromkeys(SCORES, math.nan)
            else:
                found[name] = scores(k_means(x, self.classes), label, self.classes, self.classes)
        return found

    def chance(self, clusters: int) -> dict[str, float]:
        """Return the scores of random labels."""
        label, generator = dim_zero_cat(self.label).cpu().sort().values, private_generator(0)
        draws = [
            scores(
                torch.randint(clusters, label.shape, generator=generator, device="cpu"), label, clusters, self.classes
            )
            for _ in range(_DRAWS)
        ]
        return {name: sum(draw[name] for draw in draws) / _DRAWS for name in SCORES}

    def rows(self) -> list[Row]:
        """Return a row for each score, the model's own first."""
        by_clusters = {clusters: self.chance(clusters) for clusters in {self.clusters or self.classes, self.classes}}
        rows = []
        for name, values in self.compute().items():
            clusters = self.clusters if name == OWN else self.classes
            note = self._reason(name) if math.isnan(values["ACC"]) else ""
            for score, digits in SCORES.items():
                label = score if name == OWN else f"{score}, {name}"
                chance = by_clusters[clusters][score]
                rows.append(Row(self.key, label, label, values[score], chance, digits=digits, note=note))
        return rows

    def _reason(self, name: str) -> str:
        """Say why there are no clusters."""
        examples = len(dim_zero_cat(self.label))
        return f"of {examples} examples" if examples < self.classes else f"{name}: numbers are not finite"
