"""Metrics, by name: how likely images are and how equivariant capsules, each beside its chance level.

Each is a `torchmetrics.Metric` over a data set, most of them also a plain function on one batch. A chance level is what
a model gets that knows nothing of the individual frame: capsules of iid Gaussian activations for E_eq and CapCorr, the
best single image for likelihoods.
"""

from .base import METRICS, EvaluationMetric, Row, register
from .capcorr import CapCorr, observed_roll, roll_since_canonical
from .correlation import ActiveUnits, TotalCorrelation
from .equivariance import PLAIN, EquivarianceError, equivariance_error
from .likelihood import BestSingleImage, ELBOTerms, LogLikelihood, log_likelihood

__all__ = [
    "METRICS",
    "PLAIN",
    "ActiveUnits",
    "BestSingleImage",
    "CapCorr",
    "ELBOTerms",
    "EquivarianceError",
    "EvaluationMetric",
    "LogLikelihood",
    "Row",
    "TotalCorrelation",
    "equivariance_error",
    "log_likelihood",
    "observed_roll",
    "register",
    "roll_since_canonical",
]

for _metric in (ELBOTerms, LogLikelihood, EquivarianceError, CapCorr, TotalCorrelation, ActiveUnits):
    register(_metric)
