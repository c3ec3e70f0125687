"""Metrics, by name: how likely images are, how equivariant capsules, how right motions; each beside its chance level.

Each is a `torchmetrics.Metric` over a data set, most of them also a plain function on one batch. A chance level is what
a model gets that knows nothing of the individual frame: capsules of iid Gaussian activations for E_eq and CapCorr, the
best single image for likelihoods, and the best of each frame index for what is moved.
"""

from .base import METRICS, EvaluationMetric, Row, register
from .capcorr import CapCorr, observed_roll, roll_since_canonical
from .clustering import Clustering
from .correlation import ActiveUnits, TotalCorrelation
from .equivariance import PLAIN, EquivarianceError, equivariance_error
from .fits import FittedMotions, fit_motions
from .flows import Folds
from .likelihood import BestSingleImage, ELBOTerms, LogLikelihood, log_likelihood
from .mixing import Superposing, Switching
from .motion import MovedLikelihood, PixelError, PixelErrors
from .poses import Poses
from .recognition import TransformationAccuracy
from .shapes import DecodedShapes
from .vp import VPScore

__all__ = [
    "METRICS",
    "PLAIN",
    "ActiveUnits",
    "BestSingleImage",
    "CapCorr",
    "Clustering",
    "DecodedShapes",
    "ELBOTerms",
    "EquivarianceError",
    "EvaluationMetric",
    "FittedMotions",
    "Folds",
    "LogLikelihood",
    "MovedLikelihood",
    "PixelError",
    "PixelErrors",
    "Poses",
    "Row",
    "Superposing",
    "Switching",
    "TotalCorrelation",
    "TransformationAccuracy",
    "VPScore",
    "equivariance_error",
    "fit_motions",
    "log_likelihood",
    "observed_roll",
    "register",
    "roll_since_canonical",
]

for _metric in (
    ELBOTerms,
    LogLikelihood,
    EquivarianceError,
    CapCorr,
    PixelError,
    MovedLikelihood,
    Switching,
    Superposing,
    DecodedShapes,
    TransformationAccuracy,
    Folds,
    VPScore,
    Clustering,
    Poses,
    TotalCorrelation,
    ActiveUnits,
):
    register(_metric)
