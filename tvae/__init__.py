"""Topographic VAEs and their rivals: models, data, metrics, training, figures, presets and the command line."""

from .models import ELBO, TVAE, VAE, BubbleVAE

__all__ = ["ELBO", "TVAE", "VAE", "BubbleVAE"]
