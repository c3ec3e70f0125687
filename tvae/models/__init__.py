"""Models of sequences of images, by name: the Topographic VAE and what it is compared with."""

from ..settings import settings
from .base import ELBO, MODELS, Identified, ModelSettings, SequenceModel, find, model_of, register
from .beta_vae import BetaVAE
from .cluster_vae import ClusterVAE
from .factor_vae import FactorVAE
from .flow_vae import FlowVAE
from .likelihoods import Bernoulli, Gaussian, Likelihood
from .poflow import PoFlow
from .slow_vae import SlowVAE
from .tvae import TVAE, BubbleVAE
from .vae import VAE
from .weak_flow_vae import WeakFlowVAE

__all__ = [
    "ELBO",
    "MODELS",
    "TVAE",
    "VAE",
    "Bernoulli",
    "BetaVAE",
    "BubbleVAE",
    "ClusterVAE",
    "FactorVAE",
    "FlowVAE",
    "Gaussian",
    "Identified",
    "Likelihood",
    "ModelSettings",
    "PoFlow",
    "SequenceModel",
    "SlowVAE",
    "WeakFlowVAE",
    "find",
    "load",
    "model_of",
    "register",
    "settings",
]

load = SequenceModel.load

for _model in (TVAE, BubbleVAE, VAE, BetaVAE, FactorVAE, SlowVAE, FlowVAE, WeakFlowVAE, PoFlow, ClusterVAE):
    register(_model)
