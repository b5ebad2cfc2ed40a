"""Recipe of Paint by Example (Yang et al. 2023): Stable Diffusion learns to fill a hole with what
an exemplar shows, from pictures with boxes alone.

The U-Net sees [z, z around the hole, where the picture is kept], its new channels zero at first;
the prompt is one token, CLIP's class token through a fresh mapper, and a learned vector stands for
none. CLIP and the autoencoder are frozen; U-Net, mapper and vector are trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import PaintByExamplePipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from inlay.backbones.conditioned import OneToken
from inlay_config.errors import ModelError
from inlay_train import boxes, encoded, exemplar_prompts, low_rank
from inlay_train.encoded import told
from inlay_train.latent_diffusion import (
    LatentDiffusion,
    embedded,
    fast_backward,
    normalised,
    pipeline,
    tower,
)
from inlay_train.recipe import Data, Sample, freeze
from inlay_train.self_reference import Settings


class PaintByExample(LatentDiffusion):
    """Trains the U-Net and what stands between CLIP and it."""

    @dataclass
    class Config(LatentDiffusion.Config):
        """model: a Stable Diffusion to begin with, or a Paint by Example to go on from. clip: whose
        vision tower reads the exemplar, where `model` brings none. pairs: how they are made.
        null: share of batches, or with null_by sample of their rows, that see the learned vector
        alone. emphasis: in the hole. For comparison: prompt: the class token, all of CLIP's tokens,
        or a text that names the object, which the toybox alone knows (`exemplar_prompts`); prior:
        begin with the weights of the U-Net, or with random ones."""

        model: str = "CompVis/stable-diffusion-v1-4"
        clip: str = "openai/clip-vit-large-patch14"
        data: boxes.Sources = field(default_factory=boxes.Sources)
        pairs: Settings = field(default_factory=Settings)
        null: float = 0.2
        null_by: str = "batch"
        prompt: Literal["class", "tokens", "text"] = "class"
        prior: bool = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        pipe = pipeline(cfg.model)
        self.hold(pipe)
        unet = pipe.unet if cfg.prior else UNet2DConditionModel.from_config(pipe.unet.config)
        self.unet = self.roomy(unet, 2 * self.vae.config.latent_channels + 1, "a Paint by Example")
        self.encoder, self.processor = self._encoder(pipe)
        low_rank.add(self.unet, cfg.rank)
        fast_backward(self.unet)
        freeze([self.encoder.model, *(one_token(self.unet) if cfg.prompt == "class" else ())])

    def _encoder(self, pipe: Any) -> tuple[Any, Any]:
        """What makes a prompt of an exemplar, and what prepares its pictures."""
        if getattr(pipe, "image_encoder", None) is not None:
            if self.cfg.prompt == "text":
                problem, fix = "it has no text encoder", "Begin with a Stable Diffusion."
                raise ModelError(problem, where=self.cfg.model, fix=fix)
            return pipe.image_encoder, pipe.feature_extractor
        vision, processor = tower(self.cfg.clip)
        width, config = self.unet.config.cross_attention_dim, vision.config
        if self.cfg.prompt != "text":
            patches = (config.image_size // config.patch_size) ** 2
            tokens = 1 + (patches if self.cfg.prompt == "tokens" else 0)
            return exemplar_prompts.encoder(vision, width, tokens), processor
        self.tokenizer, self.text_encoder = pipe.tokenizer, pipe.text_encoder
        with torch.no_grad():
            silence = embedded(self.tokenizer, self.text_encoder, [""])
        made = exemplar_prompts.encoder(vision, width, silence.shape[1])
        made.uncond_vector.data.copy_(silence)
        freeze([made, self.text_encoder])
        return made, processor

    def data(self, out: Path) -> Data:
        cfg, shown = self.cfg, self.encoder.config.image_size
        pairs = boxes.SelfReference(cfg.data, cfg.size, shown, cfg.pairs, cfg.prompt == "text")
        if not cfg.encoded:
            return pairs
        read = "" if cfg.prompt == "class" else f" {cfg.prompt}"
        settings = f"{told(cfg.data)} {told(cfg.pairs)} {cfg.size} {cfg.clip}{read}"
        file = out / "encoded.safetensors"
        return encoded.encode(pairs, self.seen, file, self.identity(settings))

    @torch.no_grad()
    def seen(self, batch: Sample) -> dict[str, Tensor]:
        """What the frozen networks make of rows: `clean` and `around` `b 2 c h w`, mean and
        deviation of the latents of the picture and of the picture with a grey hole; `mask`
        `b 1 s s`; `token` `b d`, CLIP's class token of the exemplar, or `b t d`, all its tokens, or
        `b t c`, words that the text encoder read."""
        picture, mask = 2 * batch["picture"] - 1, batch["mask"]
        around = self.posterior(picture * (1 - mask))
        found = {"clean": self.posterior(picture), "around": around, "mask": mask}
        return {**found, "token": self._token(batch)}

    def _token(self, batch: Sample) -> Tensor:
        if self.cfg.prompt == "text":
            return embedded(self.tokenizer, self.text_encoder, batch["words"])
        seen = self.encoder.model(normalised(batch["exemplar"], self.processor))
        token: Tensor = seen.pooler_output if self.cfg.prompt == "class" else seen.last_hidden_state
        return token

    def forward(self, batch: Sample) -> Tensor:
        rows = batch if "token" in batch else self.seen(batch)
        clean, around = (self.sampled(rows[name]) for name in ("clean", "around"))
        keep = F.interpolate(1 - rows["mask"], clean.shape[-2:], mode="bilinear")

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            seen, prompt = torch.cat([noisy, around, keep], 1), self._prompt(rows["token"])
            guess: Tensor = self.unet(seen, time, prompt, return_dict=False)[0]
            return guess

        return self.loss(clean, predict, 1 - keep)

    def _prompt(self, token: Tensor) -> Tensor:
        """The prompt `b t c` of what `seen` says of rows, of some the null prompt."""
        prompt = token
        if self.cfg.prompt != "text":
            states = token[:, None] if self.cfg.prompt == "class" else token
            prompt = exemplar_prompts.through(self.encoder, states)
        draws = len(token) if self.cfg.null_by == "sample" else 1
        null = torch.rand(draws, 1, 1, device=token.device) < self.cfg.null
        return torch.where(null, self.encoder.uncond_vector.to(prompt), prompt)

    def save(self, folder: Path) -> None:
        pipe = PaintByExamplePipeline(
            vae=self.vae,
            image_encoder=self.encoder,
            unet=low_rank.stock(self.unet),
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=self.processor,
        )
        if self.cfg.prompt == "class":
            # As the published folder names it, whose module diffusers has moved since.
            named = "paint_by_example", type(self.encoder).__name__
            pipe.register_to_config(image_encoder=named)
        pipe.save_pretrained(folder)


def one_token(unet: Any) -> list[Any]:
    """Compute cross-attention as the value of its one key -> what has no effect then."""
    idle = list[Any]()
    for block in unet.modules():
        cross = getattr(block, "attn2", None)
        if cross is not None:
            cross.processor = OneToken(cross.processor)
            idle += [cross.to_q, cross.to_k, block.norm2]
    return idle
