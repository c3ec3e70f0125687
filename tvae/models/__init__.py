"""Models of sequences of images, by name: the Topographic VAE and what it is compared with."""

from ..settings import settings
from .base import ELBO, MODELS, ModelSettings, SequenceModel, find, model_of, register
from .likelihoods import Bernoulli, Gaussian, Likelihood
from .tvae import TVAE, BubbleVAE
from .vae import VAE

__all__ = [
    "ELBO",
    "MODELS",
    "TVAE",
    "VAE",
    "Bernoulli",
    "BubbleVAE",
    "Gaussian",
    "Likelihood",
    "ModelSettings",
    "SequenceModel",
    "find",
    "load",
    "model_of",
    "register",
    "settings",
]

load = SequenceModel.load

for _model in (TVAE, BubbleVAE, VAE):
    register(_model)
