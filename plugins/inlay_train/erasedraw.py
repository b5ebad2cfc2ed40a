"""Recipe of EraseDraw (Canberk et al. 2024): learning to add objects from pictures in which they
were erased.

A pair goes backwards: what an eraser left is the picture before, the untouched picture is the one
after, so that every pixel that is to be drawn is real. In the toybox the world's twin without an
object is a perfect erasure. Of pictures of your own, `inlay_train.pairs` folders hold both, with an
instruction such as "add a dog".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay_train.edit_data import Sources
from inlay_train.instruct_pix2pix import InstructPix2Pix
from inlay_train.recipe import Training


class EraseDraw(InstructPix2Pix):
    """Additions alone."""

    @dataclass
    class Config(InstructPix2Pix.Config):
        """As of InstructPix2Pix, on additions."""

        model: str = "timbrooks/instruct-pix2pix"
        data: Sources = field(default_factory=lambda: Sources(kinds=["add"]))
        train: Training = field(default_factory=lambda: Training(rate=5e-5))
