"""Clusters and poses against examples whose classes and poses are known."""

import math

import pytest
import torch
from sklearn import metrics as sklearn_metrics

from tvae import TVAE, VAE
from tvae.config import EvaluationSettings
from tvae.data import Factor, FixedSequences, SequenceSource, SequenceStream
from tvae.evaluation import evaluate
from tvae.metrics import Clustering, Poses
from tvae.metrics.clustering import SCORES, accuracy, assigned, averaged, come_round, counts, k_means, scores
from tvae.metrics.poses import invariance_error
from tvae.models import Identified
from tvae.models.group import exp, warped
from tvae_kernels import Neighborhood, roll_capsules

KINDS = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_classes_that_are_found_are_found_under_any_numbers():
    label = torch.arange(10).repeat(20)
    for _ in range(3):
        found = torch.randperm(10)[label]
        assert scores(found, label, 10, 10) == {"ACC": 1, "NMI": pytest.approx(1), "ARI": 1, "clusters used": 10}
        table = counts(found, label, 10, 10)
        assert assigned(table) == [found[k].item() for k in range(10)]
    everything = scores(torch.zeros(200, dtype=torch.int64), label, 10, 10)
    assert everything == {"ACC": 0.1, "NMI": 0, "ARI": 0, "clusters used": 1}


def test_scores_are_their_formulas_and_scikit_learns():
    label, found = torch.randint(4, (300,)), torch.randint(6, (300,))
    found = torch.where(torch.rand(300) < 0.6, label + 1, found)
    n = counts(found, label, 6, 4).double()
    assert n.sum() == 300
    assert n[2, 5] == ((label == 2) & (found == 5)).sum()
    p = n / 300
    entropy = lambda q: -torch.xlogy(q, q).sum()  # noqa: E731
    information = entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p)
    pairs = lambda x: (x * (x - 1) / 2).sum()  # noqa: E731
    expected_index = pairs(n.sum(0)) * pairs(n.sum(1)) / pairs(torch.tensor(300.0))
    most = (pairs(n.sum(0)) + pairs(n.sum(1))) / 2
    values = scores(found, label, 6, 4)
    assert values["NMI"] == pytest.approx((2 * information / (entropy(p.sum(0)) + entropy(p.sum(1)))).item())
    assert values["ARI"] == pytest.approx(((pairs(n) - expected_index) / (most - expected_index)).item())
    assert values["ACC"] == max(
        sum(n[k, order[k]].item() for k in range(4)) / 300
        for order in torch.cartesian_prod(*[torch.arange(6)] * 4).tolist()
        if len(set(order)) == 4
    )
    assert values["NMI"] == sklearn_metrics.normalized_mutual_info_score(label, found)
    assert values["ARI"] == sklearn_metrics.adjusted_rand_score(label, found)


def test_a_cluster_of_one_in_a_hundred_is_not_used():
    label = torch.zeros(200, dtype=torch.int64)
    found = torch.zeros(200, dtype=torch.int64)
    found[:2], found[2:5] = 1, 2
    assert scores(found, label, 5, 1)["clusters used"] == 2


def test_k_means_finds_what_lies_apart_wherever_it_lies_and_however_far():
    label = torch.arange(3).repeat(30)
    x = torch.eye(3)[label] * 4 + torch.rand(90, 3)
    expected = k_means(x, 3)
    assert accuracy(counts(expected, label, 3, 3)) == 1
    for other in (1e30 * x.double(), 1e-30 * x.double(), 1e6 + x.double()):
        assert accuracy(counts(k_means(other, 3), label, 3, 3)) == 1
    assert torch.equal(k_means(x, 3), expected)
    assert k_means(torch.ones(5, 2), 3).tolist() == [0] * 5  # of equal ones, without a warning


@pytest.mark.parametrize("rolls", [Neighborhood(), Neighborhood(shift=2), Neighborhood(axes=(2, 3), shift=(1, 1))])
def test_an_average_over_rolls_is_the_same_after_any_roll(rolls):
    t = torch.randn(4, 3, 6, dtype=torch.float64)
    expected = averaged(t, rolls)
    torch.testing.assert_close(expected.mean(-1), t.mean(-1), rtol=0, atol=1e-14)
    torch.testing.assert_close(averaged(roll_capsules(t, 1, rolls), rolls), expected, rtol=0, atol=1e-14)
    assert come_round(rolls)


def test_an_average_is_over_whole_positions_that_come_round():
    assert not come_round(None)
    assert not come_round(Neighborhood(shift=0.5))
    assert not come_round(Neighborhood(capsule_boundary="zero"))


# --- what is measured of models ---------------------------------------------------------------------------------------


class Arrows(SequenceSource):
    """Arrows of four kinds, told by how bright they are, in turns of 0 to 90 degrees, each frame by itself."""

    name = "arrows"
    image_shape = (1, 15, 15)
    sequence_length = 3
    clustered = True
    classes = tuple("abcd")
    factors = (Factor("still", (0, 1), transforms=False), Factor("rotation", (0, 30, 60, 90), transforms=False))

    def __len__(self):
        return 40

    def label(self, examples, factors):
        return examples % KINDS

    def canonical(self, examples):
        image = torch.zeros(1, 15, 15)
        image[:, 2:9, 7] = 1
        image[:, 2, 5:8] = 1
        return image * (0.25 + 0.2 * (examples % KINDS) + 0.001 * examples)[:, None, None, None]

    def advance(self, starts, transformation):
        return torch.stack((starts, starts.roll(1, 0), starts.roll(2, 0)), 1)

    def render(self, examples, factors):
        angle = torch.tensor(self.factors[1].values)[factors[..., 1]].deg2rad()
        images = self.canonical(examples)[:, None].expand(-1, factors.shape[1], -1, -1, -1)
        return warped(images.flatten(0, 1), exp(angle.flatten()[:, None])).view(*factors.shape[:2], *self.image_shape)


class Knows(VAE):
    """A VAE that says what the truth is, off by some numbers: of clusters, degrees, and what its zeros are."""

    name = "knows"

    def __init__(self, source, wrong=0, off=0.0, zeros=(0, 0, 0, 0), blur=0.0):
        super().__init__(source.image_shape, 2, 3)
        self.source, self.wrong, self.off, self.blur = source, wrong, off, blur
        self.zeros = torch.tensor(zeros)

    def identified(self, batch):
        cluster = (3 - batch.label)[:, None].expand(-1, batch.images.shape[1]).clone()
        cluster[batch.example < self.wrong] = 4
        zero = self.zeros[batch.label][:, None]
        angle = torch.tensor(Arrows.factors[1].values)[batch.factors[..., 1]].double() + zero
        angle[:, 1] += self.off
        upright = self.source.canonical(batch.example)
        canonical = warped(upright, exp(zero.double().deg2rad())) + self.blur
        code = batch.label[:, None, None] + self.blur * torch.rand(*batch.images.shape[:2], 1)
        return Identified(cluster, 5, code, angle, canonical[:, None].expand_as(batch.images))


def rows_of(model, source, sequences=40, batch_size=8):
    taken = FixedSequences.take(source, sequences, batch_size)
    rows = evaluate(model, taken, EvaluationSettings(sequences, 1))
    return {(row.key, row.part): row for row in rows}


def test_what_a_model_identifies_is_scored_against_the_truth():
    source = Arrows()
    rows = rows_of(Knows(source), source)
    expected = {"ACC": 1, "NMI": 1, "ARI": 1, "clusters used": 4}
    for score, value in expected.items():
        row = rows["clustering", score]
        assert row.value == pytest.approx(value)
        assert row.label == score
        assert row.digits == SCORES[score]
    assert rows["clustering", "clusters used"].chance == 5
    # Ten of each class by chance in five clusters: more than a fifth, under the best assignment.
    assert 0.25 < rows["clustering", "ACC"].chance < 0.45
    assert abs(rows["clustering", "ARI"].chance) < 0.05
    assert rows["poses", "pose error"].value == pytest.approx(0, abs=1e-12)
    assert rows["poses", "invariance error"].value == 0
    assert rows["poses", "invariance error"].chance == 1
    wrong = rows_of(Knows(source, wrong=4), source)
    assert wrong["clustering", "ACC"].value == pytest.approx(0.9)
    # Each of four a class of its own bright images: k-means on those in no pose, or on what is canonical.
    assert rows["clustering", "ACC, k-means on upright pixels"].value == 1
    assert rows["clustering", "ACC, k-means on canonical images"].value == 1
    assert rows["clustering", "ACC, k-means on pixels"].value < 1
    assert ("clustering", "ACC, k-means on t_0, rolls averaged") in rows


def test_poses_are_differences_and_each_cluster_has_a_zero_of_its_own():
    source = Arrows()
    found = rows_of(Knows(source, off=350.0, zeros=(0, 90, 180, -90)), source)
    assert found["poses", "pose error"].value == pytest.approx(10, abs=1e-9)  # the way around
    stream = SequenceStream(source, 8, 2021)
    turns = torch.cat([stream[i].factors[:, :2, 1] for i in range(5)]).diff(dim=1).abs() * 30.0
    assert found["poses", "pose error"].chance == turns.median().item()
    upright = source.canonical(torch.arange(40))
    best = torch.nn.functional.binary_cross_entropy(upright, upright, reduction="none").sum((1, 2, 3)).mean().item()
    likelihood = found["poses", "canonical likelihood"]
    # Where the image is black, probabilities are 1e-5 of 225 pixels, and logits of 11 are rounded.
    assert likelihood.value == pytest.approx(-best, abs=225 * 2e-5)
    assert likelihood.value > likelihood.chance
    one_zero = Poses(Knows(source, zeros=(0, 90, 180, -90)), source)
    for i in range(5):
        one_zero.measure(Knows(source, zeros=(0, 90, 180, -90)), stream[i], None)
    one_zero.cluster = [torch.zeros_like(x) for x in one_zero.cluster]
    assert one_zero.compute()["canonical likelihood"] < likelihood.value - 1


def test_the_invariance_error_is_of_the_same_over_that_of_others():
    first = torch.eye(4) * math.sqrt(0.5)  # all at a distance of 1
    assert invariance_error(first, first) == 0
    assert invariance_error(first, first.roll(1, 0)) == pytest.approx(1 / (2 / 3))  # of three others one is the same
    many = torch.randn(500, 3, dtype=torch.float64)
    assert invariance_error(many, torch.randn(500, 3, dtype=torch.float64)) == pytest.approx(1, abs=0.05)
    assert invariance_error(10 * many, 10 * many + torch.tensor([1.0, 0, 0])) == pytest.approx(
        invariance_error(many, many + torch.tensor([0.1, 0, 0]))
    )


def test_rolls_are_averaged_where_they_come_round_alone():
    source = Arrows()
    still = VAE(source.image_shape, 2, 3)
    assert "k-means on t_0, rolls averaged" in _names(still, source)
    still.rolls = None
    assert not [name for name in _names(still, source) if "rolls" in name]
    open_ended = TVAE(source.image_shape, 2, 3, Neighborhood(1, 3, capsule_boundary="zero"))
    assert not [name for name in _names(open_ended, source) if "rolls" in name]


def _names(model, source):
    metric = Clustering.build(model, source, EvaluationSettings())
    batch = SequenceStream(source, 8, 0)[0]
    metric.measure(model, batch, None)
    return list(metric.compute())


def test_an_equivariant_capsule_is_invariant_on_average():
    """Capsules that roll from frame to frame: raw they differ, averaged they do not."""

    class Rolls(VAE):
        name = "rolls"

        def encode(self, batch, sample=True):
            t = torch.arange(6.0).view(2, 3) ** 2 + 5 * batch.label[:, None, None]
            return torch.stack([roll_capsules(t, l, self.rolls) for l in range(3)], 1)

    source = Arrows()
    rows = rows_of(Rolls(source.image_shape, 2, 3), source)
    assert rows["poses", "invariance error of t"].value > 0.5
    assert rows["poses", "invariance error of t, rolls averaged"].value == pytest.approx(0, abs=1e-6)
    assert rows["clustering", "ACC, k-means on t_0, rolls averaged"].value == 1


def test_what_is_not_finite_or_too_few_has_no_clusters():
    source = Arrows()
    model = VAE(source.image_shape, 2, 3)
    rows = rows_of(model, source, sequences=3, batch_size=3)
    assert math.isnan(rows["clustering", "ACC, k-means"].value)
    assert rows["clustering", "ACC, k-means"].note == "of 3 examples"
    metric = Clustering.build(model, source, EvaluationSettings())
    batch = SequenceStream(source, 8, 0)[0]
    metric.update(batch, torch.full((8, 3, 2, 3), math.nan))
    by_part = {row.part: row for row in metric.rows()}
    assert math.isnan(by_part["NMI, k-means"].value)
    assert by_part["NMI, k-means"].note == "k-means: numbers are not finite"
    assert math.isfinite(by_part["NMI, k-means on pixels"].value)


def test_sources_that_are_not_to_be_clustered_are_left_alone():
    source = Arrows()
    source.clustered = False
    assert not Clustering.applies(VAE(source.image_shape, 2, 3), source)
    assert not Poses.applies(VAE(source.image_shape, 2, 3), source)
