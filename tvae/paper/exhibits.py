"""What the paper shows: the models behind each of its tables and figures, and the numbers that it prints.

Mean and standard deviation over three seeds, from T. A. Keller and M. Welling, "Topographic VAEs learn Equivariant
Capsules", NeurIPS 2021: Tables 1 and 2 from the published version, whose models have free weights; Tables 3 to 5 from
the appendix of the version under review, where all topographic models have normalised weights (A.1) unless their row
says otherwise. That version's own Tables 1 and 2 are rows of Tables 4 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from .. import figures
from ..data import EVALUATION_SEED, FixedSequences, SequenceBatch, SequenceSource
from ..metrics import Superposing, Switching
from ..metrics.clustering import SCORES, assigned, counts
from ..models import SequenceModel
from ..presets import PRESETS
from ..training import Run
from .runs import Job
from .tables import CAPCORR, EQUIVARIANCE_ERROR, LOG_LIKELIHOOD, REPORTED, Line, Metric, Printed, Results, mean_and_std

_MNIST: tuple[Metric, ...] = (LOG_LIKELIHOOD, EQUIVARIANCE_ERROR)
_DSPRITES: tuple[Metric, ...] = (*((CAPCORR, name) for name in ("x", "y", "orientation", "scale")), EQUIVARIANCE_ERROR)
Draw = Callable[[Results, list[Job], torch.device], Figure]


@dataclass(frozen=True)
class Exhibit:
    """A table or a figure of the paper, or one in its manner: its models by preset, with the numbers printed for each.

    Models of dSprites are those of sprites; `with_data` takes those of the data at hand. `draw` draws the figure, if
    there is one, from the table and the runs; `reported` are the metrics in the table, all parts of a key or one.
    """

    title: str
    models: dict[str, Printed]
    draw: Draw | None = None
    reported: tuple[str | Metric, ...] = REPORTED
    note: str = ""

    def with_data(self, sprites: str) -> Exhibit:
        """Return the same with the models of "sprites" or of "dsprites" data."""
        return replace(self, models={_on(preset, sprites): printed for preset, printed in self.models.items()})


def _on(preset: str, sprites: str) -> str:
    """Return the preset of the same model on other data, if it is one of sprites and there is one."""
    config = PRESETS[preset].config
    if config.data.name != "sprites":
        return preset
    wanted = replace(config, data=replace(config.data, name=sprites))
    return next((name for name, other in PRESETS.items() if other.config == wanted), preset)


def _table(metrics: tuple[Metric, ...], rows: dict[str, tuple[tuple[float, float], ...]]) -> dict[str, Printed]:
    return {name: dict(zip(metrics, values, strict=True)) for name, values in rows.items()}


def _figure(*presets: str) -> dict[str, Printed]:
    return {preset: {} for preset in presets}


# --- figures, each of the table and the runs of its exhibit -----------------------------------------------------------


def draw_traversals(results: Results, jobs: list[Job], device: torch.device, each: int | None = None) -> Figure:
    """Draw traversals of the first model, `each` of every transformation or 12 in all."""
    model, source = _model_and_source(jobs[0], device)
    return figures.traversals(model, source, each or 12 // len(source.transformations))


def draw_panels(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw a column of traversals of every model with the first seed (Fig. 4)."""
    columns = []
    for job in _with_first_seed(jobs):
        columns.append(figures.traversal_panels(*_model_and_source(job, device), 1, f"{job.config.data.name}: "))
    return figures.draw_panels(columns)


def draw_torus(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw the map of the torus of the first model (Fig. 3)."""
    model, source = _model_and_source(jobs[0], device)
    batches = FixedSequences.take(source, len(source), jobs[0].config.training.batch_size).batches
    return figures.torus_map(model, batches)


def draw_covariance(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw the correlations of squared activations of every model with the first seed."""
    correlations = {}
    for job in _with_first_seed(jobs):
        model, source = _model_and_source(job, device)
        config = job.config
        batches = FixedSequences.take(source, config.evaluation.sequences, config.training.batch_size).batches
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(EVALUATION_SEED)
            correlation = figures.squared_activation_correlation(model, batches)
        correlations[PRESETS[job.preset].description] = correlation
    return figures.covariance(correlations)


def draw_capcorr(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw average CapCorr against L (Fig. 5)."""
    return figures.capcorr_against_coherence(*capcorr_series(results.lines))


def draw_comparison(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw what the models with the first seed make of the same sequences, a column for each kind of data."""
    columns = []
    for data, chosen in _by_data(jobs).items():
        models = {_short(job): Run(job.path, job.config).load_model(device) for job in chosen}
        source = chosen[0].config.open_source("test", device)
        batch = figures.some_of_each(source, 1)
        titles = [f"{data}: {title}" for title in figures.titles_of(source, batch)]
        columns.append(figures.comparison_panels(models, batch, titles))
    return figures.draw_panels(columns)


def draw_mixed(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw how the models with the first seed move sequences that switch, and that superpose, transformations."""
    chosen = next(iter(_by_data(jobs).values()))
    models = {_short(job): Run(job.path, job.config).load_model(device) for job in chosen}
    source = chosen[0].config.open_source("test", device)
    columns = []
    for metric, word in ((Switching(source), "then"), (Superposing(source), "and")):
        column = []
        for number, pair in enumerate(metric.pairs):
            batch, mix = metric.batch(number)
            title = f" {word} ".join(metric.names[k] for k in pair)
            column += figures.comparison_panels(models, batch.select([0]), [title], mix[:1])
        columns.append(column)
    return figures.draw_panels(columns)


def draw_clusters(results: Results, jobs: list[Job], device: torch.device) -> Figure:
    """Draw what is in the clusters of every model that has any, with the first seed, and which classes that are.

    The cluster that belongs to a class under the best assignment stands in its place.
    """
    columns, tables, classes = [], {}, ()
    for job in _with_first_seed(jobs):
        model, source = _model_and_source(job, device)
        if not hasattr(model, "identified"):
            continue
        sequences = min(job.config.evaluation.sequences, len(source))
        batches = FixedSequences.take(source, sequences, job.config.training.batch_size).batches
        table, order = _confusion(model.eval(), batches, source)
        name, classes = PRESETS[job.preset].description, source.classes
        tables[name] = table[:, order].numpy(), order
        columns.append(figures.cluster_panels(model, batches, _cluster_titles(name, table, order, classes)))
    figure = figures.draw_panels(columns)
    figures.add_confusion(figure, tables, classes)
    return figure


@torch.no_grad()
def _confusion(
    model: SequenceModel, batches: list[SequenceBatch], source: SequenceSource
) -> tuple[torch.Tensor, list[int]]:
    """Return how many of each class are in each cluster, (class, cluster), and the clusters in the order of classes."""
    found = [model.identified(batch) for batch in batches]
    clusters, label = (torch.cat(x).cpu() for x in ([x.cluster[:, 0] for x in found], [b.label for b in batches]))
    table = counts(clusters, label, found[0].clusters, len(source.classes))
    order = assigned(table)
    return table, order + [cluster for cluster in range(table.shape[1]) if cluster not in order]


def _cluster_titles(name: str, table: torch.Tensor, order: list[int], classes: tuple[str, ...]) -> dict[int, str]:
    """Say of each cluster which class most of it are, and what share."""
    titles = {}
    for cluster in order:
        column = table[:, cluster]
        share = column.max().item() / max(1, column.sum().item())
        titles[cluster] = f"{name}: cluster {cluster}, {share:.0%} {classes[column.argmax()]}"
    return titles


def _by_data(jobs: list[Job]) -> dict[str, list[Job]]:
    """Return the jobs with the first seed by the data that they are trained on."""
    chosen = {}
    for job in _with_first_seed(jobs):
        chosen.setdefault(job.config.data.name, []).append(job)
    return chosen


def _short(job: Job) -> str:
    """Return the class of a model, and what tells it apart from others of the same."""
    name, _, rest = PRESETS[job.preset].description.partition(", ")
    return f"{name}, {rest}" if rest and not rest.startswith("L=") else name


def _with_first_seed(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if job.config.training.seed == jobs[0].config.training.seed]


def _model_and_source(job: Job, device: torch.device) -> tuple[SequenceModel, SequenceSource]:
    return Run(job.path, job.config).load_model(device), job.config.open_source("test", device)


def capcorr_series(lines: list[Line]) -> tuple[dict[str, list[figures.Series]], float]:
    """Return average CapCorr over all transformations against L by model, of ours and the paper's; and chance."""
    lines = [line for line in lines if line.key == CAPCORR]
    models = dict.fromkeys(line.model for line in lines)
    panels = {
        "ours": [_series(model, "ours", lines) for model in models]
        + [_series(model, "untrained", lines) for model in models],
        "paper": [_series(model, "paper", lines) for model in models],
    }
    return panels, float(np.mean([line.chance for line in lines]))


def _series(model: str, kind: str, lines: list[Line]) -> figures.Series:
    points = {}
    for preset in dict.fromkeys(line.preset for line in lines if line.model == model):
        chosen = [line for line in lines if line.preset == preset]
        points[float(chosen[0].L or 0)] = _average(chosen, kind)
    order = sorted(points)
    means, stds = zip(*(points[L] for L in order), strict=True)
    label = f"{model}, untrained" if kind == "untrained" else model
    return figures.Series(label, order, list(means), [std or 0.0 for std in stds])


def _average(lines: list[Line], kind: str) -> tuple[float, float | None]:
    """Return the mean over the transformations, and its standard deviation over seeds (not known of the paper's)."""
    if kind == "paper":
        return float(np.mean([line.paper[0] for line in lines])), None
    return mean_and_std(np.mean([getattr(line, kind) for line in lines], axis=0))


# --- what the paper prints --------------------------------------------------------------------------------------------

_TABLE_1 = {
    "mnist-tvae-w18-k3": ((-186.8, 0.1), (574, 2)),
    "mnist-tvae-w5-k3": ((-186.0, 0.7), (3247, 3)),
    "mnist-tvae-w1-k9": ((-218.5, 0.9), (3217, 105)),
    # The paper does not say which K this row has: 2L by its text, 3 by the published code and by Table 4, where E_eq is
    # 3277 for K = 3 and 2522 for K = 5.
    "mnist-bubblevae-w5-k3": ((-191.4, 0.5), (3370, 12)),
    "mnist-vae": ((-189.0, 0.8), (13274, 1)),
}
_TABLE_2 = {
    "sprites-tvae-w15-k1": ((1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (344, 5)),
    "sprites-tvae-w10-k1": ((1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (1034, 6)),
    "sprites-tvae-w5-k1": ((0.67, 0.02), (0.66, 0.02), (0.52, 0.01), (0.42, 0.01), (2549, 38)),
    "sprites-tvae-w1-k10": ((0.17, 0.03), (0.21, 0.02), (0.09, 0.01), (0.51, 0.01), (2971, 9)),
    "sprites-bubblevae-w10-k10": ((0.13, 0.01), (0.12, 0.01), (0.10, 0.01), (0.50, 0.00), (1951, 34)),
    "sprites-vae": ((0.18, 0.01), (0.16, 0.01), (0.11, 0.00), (0.52, 0.00), (6934, 0)),
}
_TABLE_3 = {
    "mnist-tvae-w5-k3-projected": ((-189.0, 0.1), (3196.7, 5.0)),
    "mnist-tvae-w5-k3-normalised": ((-184.9, 0.8), (3137.9, 6.4)),
    "mnist-vae-projected": ((-209.1, 1.1), (13262.0, 0.5)),
    "mnist-vae-normalised": ((-192.5, 0.5), (13273.2, 1.4)),
    "mnist-vae": ((-189.0, 0.8), (13273.9, 0.5)),
}
_TABLE_4 = {
    "mnist-tvae-w18-k3-normalised": ((-188.5, 1.1), (386.7, 1.1)),
    "mnist-tvae-w13-k3-normalised": ((-187.1, 1.2), (990.6, 10.7)),
    "mnist-tvae-w9-k3-normalised": ((-186.9, 0.6), (2045.7, 3.3)),
    "mnist-tvae-w5-k3-normalised": ((-184.7, 0.7), (3149.6, 20.8)),
    "mnist-tvae-w1-k9-normalised": ((-217.3, 1.3), (3047.8, 59.2)),
    "mnist-bubblevae-w18-k18-normalised": ((-196.3, 1.1), (2066.5, 596.7)),
    "mnist-bubblevae-w9-k9-normalised": ((-203.2, 2.1), (1005.3, 12.7)),
    "mnist-bubblevae-w5-k5-normalised": ((-190.0, 0.3), (2522.5, 21.3)),
    "mnist-bubblevae-w5-k3-normalised": ((-190.4, 0.9), (3277.0, 15.6)),
    "mnist-vae": ((-189.0, 0.8), (13273.9, 0.5)),
}
_TABLE_5 = {
    "sprites-tvae-w15-k1-normalised": ((1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (131, 0)),
    "sprites-tvae-w12-k1-normalised": ((1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (679, 4)),
    "sprites-tvae-w10-k1-normalised": ((1.0, 0), (1.0, 0), (1.0, 0), (1.0, 0), (964, 9)),
    "sprites-tvae-w8-k1-normalised": ((0.96, 0.01), (0.97, 0.01), (0.90, 0.01), (0.97, 0.00), (1298, 5)),
    "sprites-tvae-w5-k1-normalised": ((0.68, 0.02), (0.69, 0.02), (0.57, 0.01), (0.42, 0.01), (2313, 33)),
    "sprites-tvae-w1-k10-normalised": ((0.17, 0.03), (0.17, 0.04), (0.11, 0.02), (0.52, 0.01), (1075, 20)),
    "sprites-bubblevae-w15-k15-normalised": ((0.17, 0.01), (0.16, 0.01), (0.12, 0.03), (0.52, 0.00), (3543, 441)),
    "sprites-bubblevae-w12-k12-normalised": ((0.14, 0.01), (0.14, 0.00), (0.13, 0.01), (0.53, 0.00), (6922, 6)),
    "sprites-bubblevae-w10-k10-normalised": ((0.13, 0.02), (0.12, 0.01), (0.10, 0.01), (0.52, 0.02), (2037, 924)),
    "sprites-bubblevae-w8-k8-normalised": ((0.12, 0.03), (0.12, 0.02), (0.09, 0.01), (0.49, 0.03), (2420, 1192)),
    "sprites-bubblevae-w5-k5-normalised": ((0.07, 0.02), (0.08, 0.01), (0.05, 0.01), (0.26, 0.00), (1397, 29)),
    "sprites-vae": ((0.24, 0.01), (0.25, 0.00), (0.09, 0.01), (0.47, 0.00), (6929, 1)),
}

# Figures 6 to 17 show the models of the main text; for BubbleVAE on dSprites (16) that is L = 1/3, as in Table 2.
_TRAVERSALS = {
    "fig6": "mnist-tvae-w18-k3",
    "fig7": "mnist-tvae-w13-k3",
    "fig8": "mnist-tvae-w5-k3",
    "fig9": "mnist-tvae-w1-k9",
    "fig10": "mnist-bubblevae-w5-k3",
    "fig11": "mnist-vae",
    "fig12": "sprites-tvae-w15-k1",
    "fig13": "sprites-tvae-w10-k1",
    "fig14": "sprites-tvae-w5-k1",
    "fig15": "sprites-tvae-w1-k10",
    "fig16": "sprites-bubblevae-w10-k10",
    "fig17": "sprites-vae",
    "fig18": "mnist-rotation-hue-tvae-w13-k3",
    "fig19": "mnist-perspective-hue-tvae-w13-k3",
}

_DATA = {
    "mnist": "MNIST",
    "mnist-rotation-hue": "MNIST with combined rotation and hue",
    "mnist-perspective-hue": "MNIST with combined perspective and hue",
    "sprites": "dSprites",
}


def _traversal_title(name: str, preset: str) -> str:
    data, model = _DATA[PRESETS[preset].config.data.name], PRESETS[preset].description
    return f"Fig. {name.removeprefix('fig')}: capsule traversals of {model} on {data}"


_BASELINES = ("vae-adam", "betavae", "factorvae", "slowvae", "tvae-adam")
_FLOWS = ("vae", "betavae", "slowvae", "factorvae", "tvae", "poflow", "flowvae", "weakflowvae")
_LEVELS = ("unseen frames", "direction", "affine", "x_0 kept", "own reconstruction")


def _motion(*transformations: str) -> tuple[str | Metric, ...]:
    """Say what to report of motions: errors of a model's own by transformation, and the mean of all others."""
    kept = (f"{transformation}, x_0 kept" for transformation in transformations)
    errors = tuple(("pixel_error", part) for part in (None, *transformations, *_LEVELS, *kept))
    likelihoods = ("log_likelihood", ("elbo", "kl_z"), ("moved_likelihood", None))
    return (*likelihoods, *errors, "vp_score", "transformation_accuracy")


_K_MEANS = ("k-means", "k-means on canonical images", "k-means on pixels", "k-means on upright pixels")
_SCORES, _ON, _ROLLS = ("ACC", "NMI"), (" on t_0", ""), ("", ", rolls averaged")
_SAME_SIZES = (
    "All models have the same networks, as many latent variables, Adam at 5e-4, batches, steps and seed: the objective "
    "alone differs. No number is printed here as published, for none was found."
)

EXHIBITS: dict[str, Exhibit] = {
    "table1": Exhibit("Table 1: log-likelihood and equivariance error on MNIST", _table(_MNIST, _TABLE_1)),
    "table2": Exhibit("Table 2: CapCorr and equivariance error on dSprites", _table(_DSPRITES, _TABLE_2)),
    "table3": Exhibit("Table 3: weight normalisation and projected gradient on MNIST", _table(_MNIST, _TABLE_3)),
    "table4": Exhibit("Table 4: all models on MNIST", _table(_MNIST, _TABLE_4)),
    "table5": Exhibit("Table 5: all models on dSprites", _table(_DSPRITES, _TABLE_5)),
    "fig1": Exhibit(
        "Fig. 1: a capsule traversal of rotation and hue together",
        _figure(_TRAVERSALS["fig18"]),
        partial(draw_traversals, each=1),
    ),
    "fig3": Exhibit(
        "Fig. 3: the images that activate a torus of variables most", _figure("mnist-still-tvae-torus"), draw_torus
    ),
    "fig4": Exhibit("Fig. 4: capsule traversals", _figure("sprites-tvae-w10-k1", "mnist-tvae-w13-k3"), draw_panels),
    "fig5": Exhibit("Fig. 5: average CapCorr against L", _table(_DSPRITES, _TABLE_5), draw_capcorr),
    "capcorr": Exhibit(
        "Average CapCorr against L, of the models of Table 2", _table(_DSPRITES, _TABLE_2), draw_capcorr
    ),
    "figB4": Exhibit(
        "Appendix B.4: traversals of unseen combined transformations",
        _figure("mnist-tvae-w13-k3-generalisation"),
        partial(draw_traversals, each=6),
    ),
    **{
        name: Exhibit(_traversal_title(name, preset), _figure(preset), draw_traversals)
        for name, preset in _TRAVERSALS.items()
    },
    "baselines": Exhibit(
        "Rivals that differ from the VAE in the objective alone, on MNIST and sprites",
        _figure(*(f"{data}-{model}" for data in ("mnist", "sprites") for model in _BASELINES)),
        draw_comparison,
        ("elbo", "log_likelihood", "equivariance_error", CAPCORR, "total_correlation", "active_units"),
        _SAME_SIZES,
    ),
    "flows": Exhibit(
        "Latent flows and what they are compared with, on MNIST along open paths",
        _figure(*(f"mnist-open-{model}" for model in _FLOWS)),
        draw_comparison,
        _motion("rotation", "scale", "hue"),
        _SAME_SIZES,
    ),
    "rooms": Exhibit(
        "Latent flows and what they are compared with, on rooms in the manner of 3D Shapes",
        _figure(*(f"rooms-{model}" for model in _FLOWS)),
        draw_comparison,
        _motion("floor hue", "wall hue", "object hue", "scale"),
        _SAME_SIZES,
    ),
    "flow-extras": Exhibit(
        "Transformations that switch or superpose, and digits that were not trained on",
        _figure(
            *(f"mnist-open-{model}" for model in ("vae", "slowvae", "tvae", "poflow", "flowvae", "weakflowvae")),
            *(f"mnist-open-seen-{model}{data}" for model in ("poflow", "flowvae") for data in ("", "-generalisation")),
        ),
        draw_mixed,
        (("log_likelihood", "bound"), ("pixel_error", None), ("pixel_error", "x_0 kept"), "switching", "superposing"),
    ),
    "flow-ablations": Exhibit(
        "The flow-factorised VAE without its penalty, with more steps, and told nothing",
        _figure(
            "mnist-open-flowvae",
            *(f"mnist-open-flowvae-{option}" for option in ("free", "steps2", "steps4")),
            "mnist-open-weakflowvae",
        ),
        draw_comparison,
        (*_motion("rotation", "scale", "hue"), "folds"),
    ),
    "clusters": Exhibit(
        "Clusters and poses on MNIST: the ClusterVAE for three groups, and k-means on what other models encode",
        _figure(
            *(f"mnist-posed{data}-clustervae" for data in ("", "-shift", "-scale")),
            "mnist-posed-vae",
            *(f"mnist-turning-{model}" for model in ("vae", "tvae", "flowvae")),
        ),
        draw_clusters,
        (
            ("log_likelihood", "bound"),
            *(("clustering", score) for score in SCORES),
            *(("clustering", f"{score}, {name}") for name in _K_MEANS for score in ("ACC", "NMI", "ARI")),
            *(("poses", name) for name in ("invariance error", "pose error", "canonical likelihood")),
        ),
        "Clusters are of frame 0; k-means on what a model encodes is of its mean over frames, which are 2 poses of "
        "mnist-posed and a whole turn of mnist-turning. No number is printed here as published, for none was found.",
    ),
    "invariance": Exhibit(
        "Does equivariance buy invariance? Capsules of digits that turn once around, as they are and over their rolls",
        _figure(*(f"mnist-turning-{model}" for model in ("vae", "flowvae", "tvae"))),
        draw_comparison,
        (
            ("equivariance_error", None),
            *(("poses", f"invariance error of t{part}") for part in _ROLLS),
            *(("clustering", f"{score}, k-means{on}{part}") for on in _ON for part in _ROLLS for score in _SCORES),
            *(("clustering", f"{score}, {name}") for name in _K_MEANS[2:] for score in _SCORES),
        ),
        "t_0 has seen the frames of its window. The invariance error compares opposite poses.",
    ),
    "covariance": Exhibit(
        "Covariance of squared activations, within and between capsules",
        _figure("mnist-tvae-w5-k3", "mnist-bubblevae-w5-k3", "mnist-vae"),
        draw_covariance,
    ),
}


def shown_in(preset: str) -> list[str]:
    """Return the exhibits that a preset is part of."""
    return [
        name
        for name, exhibit in EXHIBITS.items()
        if preset in exhibit.models or preset in exhibit.with_data("dsprites").models
    ]
