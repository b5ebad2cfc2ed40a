"""Backbones: one file per model family, and all that inlay knows about diffusers pipelines."""

from .base import Backbone as Backbone
from .compiled import Compiled as Compiled
from .loading import adapt as adapt
from .loading import family as family
from .loading import load as load
from .loading import skeleton as skeleton
