"""Background reconstruction: the autoencoder's decoder is tuned to this one picture, so that what
was kept is drawn as it was (Blended Latent Diffusion, section 4.2).

Without the seam of pasted pixels: θ* = argmin ‖(D_θ(z) - x̂)·m‖² + w·‖(D_θ(z) - x)·(1 - m)‖², with x̂
the picture before, x the source and m the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay import ConfigError, ModelError, Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import views


class ReconstructBackground(Plugin):
    """Consumes the mask. Acts when a picture was given: a generated source was decoded as well."""

    @dataclass
    class Config:
        """steps: of Adam, for each picture; published: 75. rate: of learning; published: 1e-4.
        preservation: weight of the background; published: 100. mask: a board key, 1 = the edit's.
        """

        steps: int = 75
        rate: float = 1e-4
        preservation: float = 100.0
        mask: str = "mask:user"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        for key in ("steps", "rate", "preservation"):
            if (value := getattr(self.cfg, key)) < 0:
                where = f"plugins.{need.owner}.{key}"
                raise ConfigError(f"{value} is below 0", where=where, fix="Use 0 or more.")
        self.acts = "image:source" in need.request.inputs
        if self.acts:
            need.consume(self.cfg.mask)

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        if not self.acts or "edit" not in result.images:
            return
        source = run.board["image:source"] * 2 - 1
        mask = views.region(run, self.cfg.mask, source)
        pairs = zip(result.latents["edit"].split(1), result.images["edit"].split(1), strict=True)
        drawn = [self._tuned(run, z, x.to(source) * 2 - 1, source, mask) for z, x in pairs]
        result.images["edit"] = torch.cat(drawn)

    def _tuned(self, run: Run, z: Tensor, edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """The latent decoded by weights of its own; the autoencoder is then as before."""
        decoder = getattr(getattr(run.backbone.pipe, "vae", None), "decoder", None)
        if decoder is None:
            raise ModelError("this model has no decoder to be tuned", where=f"plugins.{self.name}",
                             fix="Use paste_back.")  # fmt: skip
        weights = list(decoder.parameters())
        before = [(w.detach().clone(), w.requires_grad) for w in weights]
        try:
            optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=self.cfg.rate)
            for _ in range(self.cfg.steps):
                with torch.enable_grad():
                    seen = run.backbone.pixels(z, run.size).float()
                    inside = ((seen - edited) * mask).square().mean()
                    outside = ((seen - source) * (1 - mask)).square().mean()
                    loss = inside + self.cfg.preservation * outside
                grads = torch.autograd.grad(loss, weights)
                for weight, grad in zip(weights, grads, strict=True):
                    weight.grad = grad
                optimizer.step()
            return run.backbone.decode(z, run.size).to(source)
        finally:
            for weight, (value, asked) in zip(weights, before, strict=True):
                weight.grad = None
                weight.requires_grad_(asked).data.copy_(value)
