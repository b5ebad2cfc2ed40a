"""Measurements of the toybox's models, for reports: how often the right thing is drawn, found,
placed.

Everything runs over scenes that no recipe has trained on. Pairs that are held out of training are
counted apart. What needs further libraries is imported by its own name: ``quality.contrastive``,
``quality.unconditional``, ``quality.segmentation``.
"""

from inlay_toybox.quality.detection import detector_accuracy
from inlay_toybox.quality.drawing import generate, object_accuracy, settings
from inlay_toybox.quality.exemplars import ExemplarItem, exemplar_items, imitation_items
from inlay_toybox.quality.insertion import InsertionItem, insertion_items
from inlay_toybox.quality.shares import OVERLAP, THRESHOLD, Share, unseen_scenes

__all__ = [
    "OVERLAP",
    "THRESHOLD",
    "ExemplarItem",
    "InsertionItem",
    "Share",
    "detector_accuracy",
    "exemplar_items",
    "generate",
    "imitation_items",
    "insertion_items",
    "object_accuracy",
    "settings",
    "unseen_scenes",
]
