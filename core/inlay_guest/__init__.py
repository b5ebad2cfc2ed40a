"""Plugins in loops that inlay does not own: a pipeline's call, a sampler of k-diffusion."""

from .guest import Guest
from .sampler import Denoiser, denoiser

attach = Guest

__all__ = ["Denoiser", "Guest", "attach", "denoiser"]
