"""Recipe of Paint by Example (Yang et al. 2023): Stable Diffusion learns to fill a hole with what
an exemplar shows, from pictures with boxes alone.

The U-Net sees [z, z around the hole, where the picture is kept], its new channels zero at first;
the prompt is one token, CLIP's class token through a fresh mapper, and a learned vector stands for
none. CLIP and the autoencoder are frozen; U-Net, mapper and vector are trained.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PaintByExamplePipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.pipelines.deprecated import paint_by_example as published
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModel

from inlay.backbones.conditioned import OneToken
from inlay_config import registry
from inlay_config.errors import ModelError
from inlay_train import boxes, encoded, low_rank
from inlay_train.instruct_pix2pix import widened
from inlay_train.recipe import Data, Recipe, Sample, Training, freeze
from inlay_train.self_reference import Settings


class PaintByExample(Recipe):
    """Trains the U-Net and what stands between CLIP and it."""

    @dataclass
    class Config:
        """model: a Stable Diffusion to begin with, or a Paint by Example to go on from. clip: whose
        vision tower reads the exemplar, where `model` brings none. size: of the pictures in pixels.
        pairs: how they are made. null: share of batches, or with null_by sample of their rows, that
        see the learned vector alone. rank: of what is trained (0: all weights). encoded: draw and
        encode every row once. emphasis: what the loss weighs more in the hole, published: 0. shift:
        of timesteps towards noise, published: 1, none."""

        model: str = "CompVis/stable-diffusion-v1-4"
        clip: str = "openai/clip-vit-large-patch14"
        data: boxes.Sources = field(default_factory=boxes.Sources)
        pairs: Settings = field(default_factory=Settings)
        size: int = 512
        null: float = 0.2
        null_by: str = "batch"
        rank: int = 0
        encoded: bool = False
        emphasis: float = 0.0
        shift: float = 1.0
        train: Training = field(default_factory=Training)

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        pipe: Any = DiffusionPipeline.from_pretrained(
            registry.resolve_model(cfg.model), torch_dtype=torch.float32, use_safetensors=True
        )
        torch.manual_seed(cfg.train.seed)
        self.vae, self.scheduler = pipe.vae, pipe.scheduler
        self.levels: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.unet = self.prepared(pipe.unet)
        brought: Any = (getattr(pipe, "image_encoder", None), pipe.feature_extractor)
        if brought[0] is None:
            brought = mapped(cfg.clip, self.unet.config.cross_attention_dim)
        self.encoder, self.processor = brought
        freeze([self.vae])
        low_rank.add(self.unet, cfg.rank)
        freeze([self.encoder.model, *one_token(self.unet)])

    def prepared(self, unet: Any) -> Any:
        """The U-Net with room for the hole. Raises ModelError for other channels."""
        channels, taken = self.vae.config.latent_channels, unet.config.in_channels
        if taken == channels:
            return widened(unet, 2 * channels + 1)
        if taken != 2 * channels + 1:
            fix = "Begin with a Stable Diffusion, or go on from a Paint by Example."
            problem = f"its U-Net takes {taken} channels, not {channels} or {2 * channels + 1}"
            raise ModelError(problem, where=self.cfg.model, fix=fix)
        return unet

    def data(self, out: Path) -> Data:
        cfg = self.cfg
        shown = self.encoder.config.image_size
        pairs = boxes.SelfReference(cfg.data, cfg.size, shown, cfg.pairs)
        if not cfg.encoded:
            return pairs
        weights = self.vae.encoder.conv_out.weight.detach().cpu().numpy().tobytes()
        told = f"{asdict(cfg.data)} {asdict(cfg.pairs)} {cfg.size} {cfg.clip}".encode()
        identity = hashlib.sha256(told + weights).hexdigest()
        return encoded.encode(pairs, self.seen, out / "encoded.safetensors", identity)

    @torch.no_grad()
    def seen(self, batch: Sample) -> dict[str, Tensor]:
        """What the frozen networks make of rows: `clean` and `around` `b c h w`, mean and deviation
        of the latents of the picture and of the picture with a grey hole; `mask` `b 1 s s`;
        `token` `b d`, CLIP's class token of the exemplar."""
        picture, mask = 2 * batch["picture"] - 1, batch["mask"]
        tensors = {"mask": mask, "token": self._token(batch["exemplar"])}
        for name, shown in (("clean", picture), ("around", picture * (1 - mask))):
            found = self.vae.encode(shown.to(self.vae.device)).latent_dist
            tensors[name] = torch.stack([found.mean, found.std], 1)
        return tensors

    def _token(self, exemplar: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=exemplar.device)[:, None, None]
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        pooled: Tensor = self.encoder.model((exemplar - mean) / std).pooler_output
        return pooled

    def forward(self, batch: Sample) -> Tensor:
        rows = batch if "token" in batch else self.seen(batch)
        scale = self.vae.config.scaling_factor
        clean, around = (
            scale * (mean + std * torch.randn_like(mean))
            for mean, std in (rows[name].unbind(1) for name in ("clean", "around"))
        )
        keep = F.interpolate(1 - rows["mask"], clean.shape[-2:], mode="bilinear")
        noise, time = torch.randn_like(clean), self._times(clean)
        noisy = self.levels.add_noise(clean, noise, time)
        token = self._prompt(rows["token"])
        guess = self.unet(torch.cat([noisy, around, keep], 1), time, token, return_dict=False)[
            0
        ].float()
        target = noise
        if self.levels.config.prediction_type == "v_prediction":
            target = self.levels.get_velocity(clean, noise, time)
        weight = 1 + self.cfg.emphasis * (1 - keep)
        return (weight * (guess - target).square()).mean() / weight.mean()

    def _prompt(self, token: Tensor) -> Tensor:
        """The prompt `b 1 c` of class tokens `b d`, of some rows the learned vector."""
        mapped: Tensor = self.encoder.mapper(token[:, None])
        mapped = self.encoder.proj_out(self.encoder.final_layer_norm(mapped))
        draws = len(token) if self.cfg.null_by == "sample" else 1
        null = torch.rand(draws, 1, 1, device=token.device) < self.cfg.null
        return torch.where(null, self.encoder.uncond_vector.to(mapped), mapped)

    def _times(self, clean: Tensor) -> Tensor:
        """Random timesteps `b`, shifted towards noise."""
        u, shift = torch.rand(len(clean), device=clean.device), self.cfg.shift
        count = int(self.levels.config.num_train_timesteps)
        return (count * shift * u / (1 + (shift - 1) * u)).long().clamp(max=count - 1)

    def save(self, folder: Path) -> None:
        unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(low_rank.merged(self.unet))
        pipe = PaintByExamplePipeline(
            vae=self.vae,
            image_encoder=self.encoder,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=self.processor,
        )
        # As the published folder names it, whose module diffusers has moved since.
        encoder = "paint_by_example", type(self.encoder).__name__
        pipe.register_to_config(image_encoder=encoder)
        pipe.save_pretrained(folder)


def mapped(clip: str, width: int) -> tuple[Any, Any]:
    """The exemplar's encoder around a CLIP's vision tower, its mapper fresh, for prompts of this
    width; and what prepares its pictures."""
    folder = registry.resolve_model(clip, "clip", "config.json")
    tower = CLIPVisionModel.from_pretrained(folder, torch_dtype=torch.float32)
    tower.config.projection_dim = width
    encoder = published.PaintByExampleImageEncoder(tower.config)
    encoder.model.load_state_dict(tower.state_dict())
    return encoder, CLIPImageProcessor.from_pretrained(folder)


def one_token(unet: Any) -> list[Any]:
    """Compute cross-attention as the value of its one key -> what has no effect then."""
    idle = list[Any]()
    # On a CPU the fused attention's backward pass is several times slower than plain softmax.
    unet.set_attn_processor(AttnProcessor2_0() if torch.cuda.is_available() else AttnProcessor())
    for block in unet.modules():
        cross = getattr(block, "attn2", None)
        if cross is not None:
            cross.processor = OneToken(cross.processor)
            idle += [cross.to_q, cross.to_k, block.norm2]
    return idle
