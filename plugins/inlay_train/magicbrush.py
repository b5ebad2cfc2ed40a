"""Recipe of MagicBrush (Zhang et al. 2023): an InstructPix2Pix is tuned on edits that are exact,
made by people (`osunlp/MagicBrush`) or, in the toybox, by the world itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inlay_config.errors import ModelError
from inlay_train.edit_data import Sources
from inlay_train.instruct_pix2pix import InstructPix2Pix
from inlay_train.recipe import Training


class MagicBrush(InstructPix2Pix):
    """Goes on from an InstructPix2Pix."""

    @dataclass
    class Config(InstructPix2Pix.Config):
        """As of InstructPix2Pix, with what was published of the tuning."""

        model: str = "timbrooks/instruct-pix2pix"
        train: Training = field(default_factory=lambda: Training(rate=5e-5, warmup=1000))
        data: Sources = field(default_factory=Sources)

    def prepared(self, unet: Any) -> Any:
        """Raises ModelError for a U-Net that sees no picture."""
        if unet.config.in_channels == self.vae.config.latent_channels:
            fix = "Train instruct_pix2pix first, or take timbrooks/instruct-pix2pix."
            raise ModelError("its U-Net sees no picture", where=self.cfg.model, fix=fix)
        return super().prepared(unet)
