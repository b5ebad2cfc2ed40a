"""Background reconstruction: the autoencoder's decoder is tuned to this one picture, so that what
was kept is drawn as it was (Blended Latent Diffusion, section 4.2).

Without the seam of pasted pixels: θ* = argmin ‖(D_θ(z) - x̂)·m‖² + w·‖(D_θ(z) - x)·(1 - m)‖², with x̂
the picture before, x the source and m the mask. The latent z may be moved in the decoder's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay import ConfigError, ModelError, Needs, Plugin, Result, Run, hookimpl
from inlay_plugins import views


class ReconstructBackground(Plugin):
    """Consumes the mask. Acts when a picture was given: a generated source was decoded as well."""

    @dataclass
    class Config:
        """tune: the decoder's weights, or the latent, whose result is too smooth. steps: of Adam,
        for each picture; published: 75. rate: of learning; null: as published, 1e-4 for
        weights, 0.1 for a latent. preservation: weight of the background; published: 100. mask: a
        board key, 1 = the edit's.
        """

        tune: Literal["decoder", "latent"] = "decoder"
        steps: int = 75
        rate: float | None = None
        preservation: float = 100.0
        mask: str = "mask:user"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        for key in ("steps", "rate", "preservation"):
            if (value := getattr(self.cfg, key)) is not None and value < 0:
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
        """The picture after its optimisation; the autoencoder is then as before."""
        cfg, weights = self.cfg, [z := z.detach().clone()]
        if cfg.tune == "decoder":
            decoder = getattr(getattr(run.backbone.pipe, "vae", None), "decoder", None)
            if decoder is None:
                problem, fix = "this model has no decoder to be tuned", "Use paste_back."
                raise ModelError(problem, where=f"plugins.{self.name}", fix=fix)
            weights = list(decoder.parameters())
        rate = cfg.rate if cfg.rate is not None else 1e-4 if cfg.tune == "decoder" else 0.1
        before = [(w.detach().clone(), w.requires_grad) for w in weights]
        try:
            optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=rate)
            for _ in range(cfg.steps):
                with torch.enable_grad():
                    seen = run.backbone.pixels(z, run.size).float()
                    inside = ((seen - edited) * mask).square().mean()
                    outside = ((seen - source) * (1 - mask)).square().mean()
                    loss = inside + cfg.preservation * outside
                grads = torch.autograd.grad(loss, weights)
                for weight, grad in zip(weights, grads, strict=True):
                    weight.grad = grad
                optimizer.step()
            return run.backbone.decode(z.detach(), run.size).to(source)
        finally:
            for weight, (value, asked) in zip(weights, before, strict=True):
                weight.grad = None
                weight.requires_grad_(asked).data.copy_(value)
