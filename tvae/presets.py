"""Named configurations: the models of the paper's tables and figures, and of every topography that it proposes.

Names are DATA-MODEL[-wW-kK][-OPTION], as "mnist-tvae-w18-k3-normalised": W frames and K positions in the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from tvae_kernels import Neighborhood

from .config import Config, DataSettings, EvaluationSettings, TrainingSettings
from .data import SOURCES
from .models import (
    TVAE,
    VAE,
    BetaVAE,
    BubbleVAE,
    ClusterVAE,
    FactorVAE,
    FlowVAE,
    ModelSettings,
    PoFlow,
    SlowVAE,
    WeakFlowVAE,
)
from .models.group import DIMENSIONS

DEFAULT_PRESET = "shapes-tvae"
OWN_PRESET = "own"  # of the user's own sequences


@dataclass(frozen=True)
class Preset:
    """A named configuration and what it is."""

    config: Config
    description: str


PRESETS: dict[str, Preset] = {}


def coherence_length(model: ModelSettings) -> Fraction | None:
    """Return the paper's L, half of the time window relative to the sequence, which is as long as capsules there.

    None for a model without a neighbourhood.
    """
    neighborhood = getattr(model, "neighborhood", None)
    if neighborhood is None:
        return None
    window = neighborhood.time_window
    return Fraction(window if window > 1 else 0, 2 * model.capsule_dim)


def describe(config: Config) -> str:
    """Describe the model in the paper's terms, as "TVAE, L=5/36, K=3": see `coherence_length`."""
    parts = [config.model_class.__name__]
    if coherence_length(config.model) is not None:
        parts += [f"L={coherence_length(config.model)}", f"K={config.model.neighborhood.capsule_window}"]
    return ", ".join(parts)


@dataclass(frozen=True)
class _Family:
    """Presets of models of one size, trained alike on one kind of data."""

    data: DataSettings
    capsules: int  # as many as their dimensions
    training: TrainingSettings

    def add(self, model: type, window: tuple[int, int] | None = None, option: str = "", **values) -> None:
        """Add one to the presets: a model, with its window of W frames and K positions, and other settings."""
        name, data = [self.data.name, model.name], self.data
        if window is not None:
            values["neighborhood"] = Neighborhood(*window, shift=0 if model is BubbleVAE else 1)
            name += [f"w{window[0]}", f"k{window[1]}"]
        if option == "generalisation":
            data = replace(data, evaluation="mnist-rotation-hue")
        elif option:
            values["weights"] = option
        config = Config(data, model.Settings(self.capsules, self.capsules, **values), self.training)
        PRESETS["-".join([*name, option] if option else name)] = Preset(config, describe(config))


def _family(data: str) -> _Family:
    if data.startswith("mnist"):
        return _Family(DataSettings(data), 18, TrainingSettings(steps=600_000))  # 100 epochs of 48,000 / 8 batches
    return _Family(DataSettings(data), 15, TrainingSettings(steps=632_800))  # 100 epochs of 50,625 // 8 batches


def _add_first() -> None:
    """Add what is trained first: in minutes, with Adam and nothing to download."""
    model, evaluation = TVAE.Settings(neighborhood=Neighborhood(10, 1)), EvaluationSettings(sequences=200)
    training = TrainingSettings("adam", 1e-3, warmup_steps=200, decay_from=0.4, steps=6000)
    _add(DEFAULT_PRESET, DataSettings("shapes"), model, training, "Adam", evaluation)
    training = TrainingSettings("adam", 5e-4, steps=1400)
    _add("quickstart", DataSettings(), model, training, "Adam", evaluation)


def _add_mnist() -> None:
    """Add the models of Tables 1, 3 and 4, and of Figures 1, 4, 6 to 11 and B.4."""
    mnist = _family("mnist")
    for window in ((18, 3), (13, 3), (5, 3), (1, 9)):
        mnist.add(TVAE, window)
    mnist.add(BubbleVAE, (5, 3))
    mnist.add(VAE)
    for window in ((18, 3), (13, 3), (9, 3), (5, 3), (1, 9)):
        mnist.add(TVAE, window, "normalised")
    for window in ((18, 18), (9, 9), (5, 5), (5, 3)):
        mnist.add(BubbleVAE, window, "normalised")
    mnist.add(TVAE, (5, 3), "projected")
    mnist.add(VAE, option="projected")
    mnist.add(VAE, option="normalised")
    mnist.add(TVAE, (13, 3), "generalisation")
    for data in ("mnist-rotation-hue", "mnist-perspective-hue"):
        _family(data).add(TVAE, (13, 3))


def _add_sprites(data: str) -> None:
    """Add the models of Tables 2 and 5, and of Figures 4, 5 and 12 to 17."""
    sprites = _family(data)
    for window in ((15, 1), (10, 1), (5, 1), (1, 10)):
        sprites.add(TVAE, window)
    sprites.add(BubbleVAE, (10, 10))
    sprites.add(VAE)
    for window in ((15, 1), (12, 1), (10, 1), (8, 1), (5, 1), (1, 10)):
        sprites.add(TVAE, window, "normalised")
    for size in (15, 12, 10, 8, 5):
        sprites.add(BubbleVAE, (size, size), "normalised")


def _add_topographies() -> None:
    """Add a model for every topography that the paper proposes beside those of its tables; all but one with Adam."""
    training = TrainingSettings(batch_size=128, steps=93_750)  # 250 epochs of 48,000 / 128 batches
    torus = TVAE.Settings(1, 324, neighborhood=Neighborhood(1, 5, axes=(18, 18)), mu_init=10.0)
    PRESETS["mnist-still-tvae-torus"] = Preset(
        Config(DataSettings("mnist-still"), torus, training),
        "TVAE on a torus of 18 x 18, windows of 5 x 5 (section 6.2)",
    )
    training = replace(_family("sprites").training, optimizer="adam", learning_rate=5e-4)

    def add(name: str, description: str, model: ModelSettings, data: str = "sprites") -> None:
        PRESETS[f"{data}-tvae-{name}"] = Preset(Config(DataSettings(data), model, training), description)

    axes = TVAE.Settings(2, 225, neighborhood=Neighborhood(10, 1, axes=(15, 15), roots="each axis"))
    add("axes", "TVAE, a root for each of two axes (Eq. 21)", axes, "sprites-shifts")
    told = replace(axes, told_axis=True)
    add("told", "TVAE, told which of two axes rolls (Eq. 21)", told, "sprites-shifts")
    third = 1 / 3  # 5 positions for 15 frames
    add("third", "TVAE, shift 1/3 (Eq. 19)", TVAE.Settings(45, 5, neighborhood=Neighborhood(10, 1, third)))
    phase = Neighborhood(10, 1, third, roll="fourier")
    add("phase", "TVAE, shift 1/3 by phase (C.1)", TVAE.Settings(45, 5, neighborhood=phase))
    padded = Neighborhood(9, 1, time_boundary="padded", capsule_boundary="padded")
    add("padded", "TVAE, not cyclic (C.2)", TVAE.Settings(neighborhood=padded))
    causal = replace(padded, causal=True)
    add("causal", "TVAE, causal, not cyclic (Eq. 22)", TVAE.Settings(neighborhood=causal))
    speeds = Neighborhood(10, 1, speeds=(1,) * 8 + (2,) * 7)
    add("speeds", "TVAE, 8 capsules of speed 1, 7 of speed 2", TVAE.Settings(neighborhood=speeds))
    learned = TVAE.Settings(neighborhood=Neighborhood(10, 3), window="capsule")
    add("learned", "TVAE, a learned window for each capsule", learned)


_ADAM = {"optimizer": "adam", "learning_rate": 5e-4}  # of all models that are compared with rivals


def _add_baselines() -> None:
    """Add rivals that differ from the VAE in the objective alone, and the VAE and the TVAE trained as they are."""
    for data, window in (("mnist", Neighborhood(13, 3)), ("sprites", Neighborhood(10, 1))):
        family = _family(data)
        training = replace(family.training, **_ADAM)
        for model in (VAE, BetaVAE, FactorVAE, SlowVAE, TVAE):
            values = {"neighborhood": window} if model is TVAE else {}
            name = f"{data}-{model.name}" + ("-adam" if model in (VAE, TVAE) else "")
            _add(name, family.data, model.Settings(family.capsules, family.capsules, **values), training)


_OPEN_WINDOW = Neighborhood(5, 3, time_boundary="zero")  # whose rolls do not close, as the paths do not
_ANNEALED = 1000  # steps; short of any budget that teaches anything


def _add_flows() -> None:
    """Add the latent flows, and what they are compared with, on open paths; batches of 16 sequences, with Adam."""
    for data, size, steps, transformations in (("mnist-open", 18, 90_000, 3), ("rooms", 15, 100_000, 4)):
        training = TrainingSettings(**_ADAM, batch_size=16, steps=steps)
        told, frames = {"transformations": transformations}, SOURCES[data].sequence_length
        models = {
            VAE: {},
            BetaVAE: {},
            FactorVAE: {},
            SlowVAE: {},
            TVAE: {"neighborhood": _OPEN_WINDOW},
            PoFlow: told,
            FlowVAE: told,
            WeakFlowVAE: {**told, "frames": frames, "anneal_steps": _ANNEALED},
        }
        for model, values in models.items():
            _add(f"{data}-{model.name}", DataSettings(data), model.Settings(size, size, **values), training)


def _add_ablations() -> None:
    """Add flows without their penalty, of more steps, and evaluated on digits that they have not seen."""
    flow = PRESETS["mnist-open-flowvae"].config
    for option, text, values in (
        ("free", "no penalty", {"gamma": 0.0}),
        ("steps2", "2 steps a frame", {"steps_per_frame": 2}),
        ("steps4", "4 steps a frame", {"steps_per_frame": 4}),
    ):
        _add(f"mnist-open-flowvae-{option}", flow.data, replace(flow.model, **values), flow.training, text)
    for model in (FlowVAE, PoFlow):
        config = PRESETS[f"mnist-open-{model.name}"].config
        for data, text in ((None, "digits 0 to 7"), ("mnist-open-unseen", "digits 0 to 7, tested on 8 and 9")):
            name = f"mnist-open-seen-{model.name}" + ("" if data is None else "-generalisation")
            _add(name, DataSettings("mnist-open-seen", evaluation=data), config.model, config.training, text)


_POSED = {"mnist-posed": "SO(2)", "mnist-posed-shift": "SE(2)", "mnist-posed-scale": "Sim(2)"}  # data of each group
_CODED, _VARIED = 10, 3  # numbers of a class and of its variation
_WARMED = 2000  # steps


def _add_clusters() -> None:
    """Add models of clusters and poses, and those whose representations k-means is taken of; all with Adam."""
    evaluation = EvaluationSettings(sequences=5000)
    training = TrainingSettings("adam", 1e-3, batch_size=32, steps=20_000)
    for data, group in _POSED.items():
        size = _CODED + _VARIED + DIMENSIONS[group] + 1
        model = ClusterVAE.Settings(1, size, group=group, code=_CODED, warm_steps=_WARMED)
        _add(f"{data}-clustervae", DataSettings(data), model, training, group, evaluation)
    training = replace(training, learning_rate=_ADAM["learning_rate"])
    _add("mnist-posed-vae", DataSettings("mnist-posed"), VAE.Settings(18, 18), training, evaluation=evaluation)
    training, evaluation = replace(training, batch_size=16), EvaluationSettings(sequences=2000)
    for model, values in (
        (VAE, {}),
        (TVAE, {"neighborhood": Neighborhood(13, 3)}),
        (FlowVAE, {"transformations": 1}),
    ):
        name, data = f"mnist-turning-{model.name}", DataSettings("mnist-turning")
        _add(name, data, model.Settings(18, 18, **values), training, evaluation=evaluation)


def _add(
    name: str,
    data: DataSettings,
    model: ModelSettings,
    training: TrainingSettings,
    text: str = "",
    evaluation: EvaluationSettings | None = None,
) -> None:
    config = Config(data, model, training, evaluation or EvaluationSettings())
    PRESETS[name] = Preset(config, ", ".join(filter(None, (describe(config), text))))


def _add_own() -> None:
    """Add what sequences of the user's own are trained by: of any length, and they need not come round."""
    training = TrainingSettings(**_ADAM, steps=3000)
    _add(OWN_PRESET, DataSettings(), TVAE.Settings(neighborhood=_OPEN_WINDOW), training, "for your own: --data PATH")


_add_first()
_add_own()
_add_mnist()
_add_sprites("sprites")
_add_sprites("dsprites")
_add_topographies()
_add_baselines()
_add_flows()
_add_ablations()
_add_clusters()
