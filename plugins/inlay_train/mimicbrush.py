"""Recipe of MimicBrush (Chen et al. 2024): a hole in one view of a scene is filled with what
belongs there of another view, found by the model itself.

Two U-Nets begin as one Stable Diffusion. The imitative one sees [z, the hole, z around it, depth]
and reads, in its self-attention, what the other makes of the reference's clean latent at the same
time. The prompt of both are CLIP's tokens of the reference. The paper gives no code for training:
what it leaves open is said where it is set.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModel

from inlay.backbones.mimicbrush_forward import imitate, readers, reference
from inlay.backbones.mimicbrush_pipeline import DepthGuider, ImageTokens, MimicBrushPipeline
from inlay_config import registry
from inlay_config.errors import ModelError
from inlay_train import encoded, low_rank
from inlay_train.instruct_pix2pix import widened
from inlay_train.recipe import Data, Recipe, Sample, Training, freeze
from inlay_train.views import Changes, Masking, Sources, Views


class MimicBrush(Recipe):
    """Trains both U-Nets, the projection, the depth's layers, and with `tower` CLIP."""

    @dataclass
    class Config:
        """model: a Stable Diffusion to begin with, or a MimicBrush to go on from. inpainting: of
        which model the imitative U-Net begins as a copy, one that fills holes (None: of `model`).
        clip: whose vision tower reads the reference, where `model` brings none. size: of the
        pictures in pixels. changes, masks: of the views. depth: channels of the depth;
        depth_widths: of the layers before. drop_depth, drop_reference: shares of rows that see
        none. mix: of what is read, as in the plugin `imitation`. rank, reference_rank: of what is
        trained of either U-Net (0: all weights). train_reference, tower: train the reference U-Net,
        and CLIP, too. encoded: draw and encode every row once. emphasis: what the loss weighs more
        in the hole. shift: of timesteps towards noise; 1: none."""

        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        inpainting: str | None = None
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        data: Sources = field(default_factory=Sources)
        changes: Changes = field(default_factory=Changes)
        masks: Masking = field(default_factory=Masking)
        size: int = 512
        depth: int = 4
        depth_widths: tuple[int, ...] = (16, 32, 64, 128)
        drop_depth: float = 0.5
        drop_reference: float = 0.1
        mix: float = 0.5
        rank: int = 0
        reference_rank: int = 0
        train_reference: bool = True
        tower: bool = True
        encoded: bool = False
        emphasis: float = 0.0
        shift: float = 1.0
        train: Training = field(default_factory=Training)

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        folder = registry.resolve_model(cfg.model)
        options = {"torch_dtype": torch.float32, "use_safetensors": True}
        torch.manual_seed(cfg.train.seed)
        if _is_a(folder, "reference_unet"):
            pipe: Any = MimicBrushPipeline.from_pretrained(folder, **options)
        else:
            pipe = begun(DiffusionPipeline.from_pretrained(folder, **options), cfg)
        self.pipe = pipe
        self.levels: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        self.vae, self.tower, self.image_tokens = pipe.vae, pipe.image_encoder, pipe.image_tokens
        self.unet, self.reference_unet = pipe.unet, pipe.reference_unet
        self.depth_guider = pipe.depth_guider
        low_rank.add(self.unet, cfg.rank)
        low_rank.add(self.reference_unet, cfg.reference_rank)
        freeze([self.vae, *unread(self.reference_unet)])
        if not cfg.train_reference:
            freeze([self.reference_unet])
        self.tower.requires_grad_(cfg.tower)
        freeze(unread_tower(self.tower))
        if not torch.cuda.is_available():
            # On a CPU the fused attention's backward pass is several times slower than this one.
            for unet in (self.unet, self.reference_unet):
                unet.set_attn_processor(AttnProcessor())
        for site in readers(self.unet).values():
            site.processor = AttnProcessor2_0()

    def data(self, out: Path) -> Data:
        cfg = self.cfg
        views = Views(cfg.data, cfg.size, cfg.masks, cfg.changes)
        if not cfg.encoded:
            return views
        if cfg.tower:
            problem = "rows that are encoded once hold what CLIP saw, which tower trains"
            raise ModelError(problem, where="encoded", fix="Set tower: false.")
        weights = self.vae.encoder.conv_out.weight.detach().cpu().numpy().tobytes()
        parts = cfg.data, cfg.changes, cfg.masks
        told = f"{[asdict(part) for part in parts]} {cfg.size} {cfg.clip}".encode()
        identity = hashlib.sha256(told + weights).hexdigest()
        return encoded.encode(views, self.seen, out / "encoded.safetensors", identity)

    def seen(self, batch: Sample) -> dict[str, Tensor]:
        """What CLIP and autoencoder make of rows: `clean`, `around` and `shown` `b 2 c h w`, mean
        and deviation of the latents of the source, of the source with a black hole, and of the
        reference; `hidden` `b t d`, CLIP's; `mask` and `depth` `b 1 s s` as they are."""
        source, mask = batch["source"], batch["mask"]
        pictures = {"clean": source, "around": source * (1 - mask), "shown": batch["reference"]}
        tensors = {"mask": mask, "depth": batch["depth"]}
        with torch.no_grad():
            for name, picture in pictures.items():
                found = self.vae.encode(2 * picture - 1).latent_dist
                tensors[name] = torch.stack([found.mean, found.std], 1)
        return {**tensors, "hidden": self._hidden(batch["reference"])}

    def _hidden(self, pictures: Tensor) -> Tensor:
        """CLIP's penultimate hidden states `b t d` of pictures in 0..1."""
        side, given = self.tower.config.image_size, self.pipe.feature_extractor
        if pictures.shape[-1] != side:
            pictures = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(
                0, 1
            )
        mean, std = (
            torch.tensor(values, device=pictures.device)[:, None, None]
            for values in (given.image_mean, given.image_std)
        )
        seen = self.tower((pictures - mean) / std, output_hidden_states=True)
        states: Tensor = seen.hidden_states[-2]
        return states

    def forward(self, batch: Sample) -> Tensor:
        batch = _ordered(batch, self.cfg.drop_reference)
        rows = batch if "hidden" in batch else {**self.seen(batch), "reads": batch["reads"]}
        scale, count = self.vae.config.scaling_factor, int(rows["reads"].sum())
        clean, around, shown = (
            scale * (mean + std * torch.randn_like(mean))
            for mean, std in (rows[name].unbind(1) for name in ("clean", "around", "shown"))
        )
        noise, time = torch.randn_like(clean), self._times(clean)
        hole = F.interpolate(rows["mask"], clean.shape[-2:])
        given = [self.levels.add_noise(clean, noise, time), hole, around]
        if self.depth_guider is not None:
            known = torch.rand(len(clean), 1, 1, 1, device=clean.device) >= self.cfg.drop_depth
            grid = clean.shape[-2], clean.shape[-1]
            given.append(self.depth_guider(rows["depth"] * known, grid))
        prompt = self._prompt(rows["hidden"], count)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg.train_reference):
            read = reference(self.reference_unet, shown[:count], time[:count], prompt[:count])
        guess = imitate(
            self.unet, read, torch.cat(given, 1), time, prompt, self.cfg.mix, count
        ).float()
        target = noise
        if self.levels.config.prediction_type == "v_prediction":
            target = self.levels.get_velocity(clean, noise, time)
        inside = F.interpolate(rows["mask"], clean.shape[-2:], mode="area")
        weight = 1 + self.cfg.emphasis * inside
        return (weight * (guess - target).square()).mean() / weight.mean()

    def _prompt(self, hidden: Tensor, count: int) -> Tensor:
        """The prompt of hidden states `b t d`; from row `count` on that of no picture: of zeros
        behind CLIP's normalisation."""
        side = self.tower.config.image_size
        if count < len(hidden):
            nothing = torch.zeros(1, 3, side, side, device=hidden.device)
            blank = self.tower(nothing, output_hidden_states=True).hidden_states[-2]
            hidden = torch.cat([hidden[:count], blank.expand(len(hidden) - count, -1, -1)])
        prompt: Tensor = self.image_tokens(hidden)
        return prompt

    def _times(self, clean: Tensor) -> Tensor:
        """Random timesteps `b`, shifted towards noise."""
        u, shift = torch.rand(len(clean), device=clean.device), self.cfg.shift
        count = int(self.levels.config.num_train_timesteps)
        return (count * shift * u / (1 + (shift - 1) * u)).long().clamp(max=count - 1)

    def save(self, folder: Path) -> None:
        parts = dict(self.pipe.components)
        for name in ("unet", "reference_unet"):
            parts[name] = UNet2DConditionModel.from_config(parts[name].config)
            parts[name].load_state_dict(low_rank.merged(getattr(self, name)))
        MimicBrushPipeline(**parts).save_pretrained(folder)


def begun(pipe: Any, cfg: Any) -> MimicBrushPipeline:
    """MimicBrush before training: two of the U-Net, and what it has beside them, fresh."""
    channels, taken = pipe.vae.config.latent_channels, pipe.unet.config.in_channels
    if taken != channels:
        problem = f"its U-Net takes {taken} channels, not {channels}"
        fix = "Begin with a plain Stable Diffusion, or go on from a MimicBrush."
        raise ModelError(problem, where=cfg.model, fix=fix)
    folder = registry.resolve_model(cfg.clip, "clip", "config.json")
    tower = CLIPVisionModel.from_pretrained(folder, torch_dtype=torch.float32)
    width = pipe.unet.config.cross_attention_dim
    guider = DepthGuider(cfg.depth, tuple(cfg.depth_widths)) if cfg.depth else None
    filling = hole_filler(cfg.inpainting, channels) if cfg.inpainting else copy.deepcopy(pipe.unet)
    return MimicBrushPipeline(
        vae=pipe.vae,
        reference_unet=pipe.unet,
        unet=widened(filling, 2 * channels + 1 + cfg.depth),
        image_encoder=tower,
        image_tokens=ImageTokens(tower.config.hidden_size, width),
        depth_guider=guider,
        scheduler=pipe.scheduler,
        feature_extractor=CLIPImageProcessor.from_pretrained(folder),
    )


def hole_filler(name: str, channels: int) -> Any:
    """The U-Net of a Stable Diffusion for inpainting, or of a Paint by Example, which sees z, z
    around the hole and what is kept in place of z, the hole and z around it."""
    folder = registry.resolve_model(name)
    unet: Any = UNet2DConditionModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32
    )
    if (taken := unet.config.in_channels) != 2 * channels + 1:
        problem = f"its U-Net takes {taken} channels, not {2 * channels + 1}"
        raise ModelError(problem, where=name, fix="Name an inpainting model, or none.")
    if _is_a(folder, "PaintByExample"):
        seen = unet.conv_in
        with torch.no_grad():
            z, around, kept = seen.weight.split([channels, channels, 1], 1)
            seen.bias += kept.sum((1, 2, 3))
            seen.weight.copy_(torch.cat([z, -kept, around], 1))
    return unet


def unread(unet: Any) -> list[Any]:
    """What of a reference U-Net acts on nothing that is read: all behind the last self-attention's
    norm."""
    idle = [unet.conv_norm_out, unet.conv_out]
    for block in reversed(unet.up_blocks):
        if getattr(block, "attentions", None):
            outer = block.attentions[-1]
            inner = outer.transformer_blocks[-1].named_children()
            behind = [part for name, part in inner if name != "norm1"]
            return [*idle, *behind, outer.proj_out, *(block.upsamplers or ())]
        idle.append(block)
    return idle


def unread_tower(tower: Any) -> list[Any]:
    """What of CLIP stands behind its penultimate hidden states."""
    inner = getattr(tower, "vision_model", tower)
    return [inner.encoder.layers[-1], inner.post_layernorm]


def _is_a(folder: str, mark: str) -> bool:
    index = Path(folder) / "model_index.json"
    return index.is_file() and mark in index.read_text(encoding="utf-8")


def _ordered(batch: Sample, dropped: float) -> Sample:
    """The batch with those of its rows first that read their reference, which `reads` says; one
    does at least."""
    first = next(iter(batch.values()))
    reads = torch.rand(len(first), device=first.device) >= dropped
    reads[0] |= not reads.any()
    order = reads.argsort(descending=True, stable=True)
    return {**{name: rows[order] for name, rows in batch.items()}, "reads": reads[order]}
