"""Recipe of MimicBrush (Chen et al. 2024): a hole in one view of a scene is filled with what
belongs there of another view, found by the model itself.

Two U-Nets begin as one Stable Diffusion. The imitative one sees [z, the hole, z around it, depth]
and reads, in its self-attention, what the other makes of the reference's clean latent at the same
time. The prompt of both are CLIP's tokens of the reference. The paper gives no code for training:
what it leaves open is said where it is set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from inlay.backbones.mimicbrush_forward import imitate, readers, reference
from inlay.backbones.mimicbrush_pipeline import DepthGuider, ImageTokens, MimicBrushPipeline
from inlay_config import registry
from inlay_config.errors import ModelError
from inlay_plugins import depths
from inlay_train import encoded, low_rank
from inlay_train.encoded import told
from inlay_train.latent_diffusion import (
    LatentDiffusion,
    fast_backward,
    normalised,
    pipeline,
    tower,
    widened,
)
from inlay_train.recipe import Data, Sample, freeze
from inlay_train.views import Changes, Masking, Sources, Views

Prompts = Callable[[Tensor], Tensor]
"""Pictures `b 3 s s` in 0..1 -> the prompt of each, `b 1 d`."""


class MimicBrush(LatentDiffusion):
    """Trains both U-Nets, the projection, the depth's layers, and with `tower` CLIP."""

    @dataclass
    class Config(LatentDiffusion.Config):
        """model: a Stable Diffusion to begin with, or a MimicBrush to go on from. inpainting: of
        which model the imitative U-Net begins as a copy, one that fills holes (None: of `model`);
        if it is a Paint by Example, the projection begins near the prompts that this U-Net knows.
        clip: whose vision tower reads the reference, where `model` brings none. changes, masks: of
        the views. depth: channels of the depth; depth_widths: of the layers before; depth_model: of
        transformers, by name or folder, for photographs (None: theirs is 0). drop_depth,
        drop_reference: shares of rows that see none. mix: of what is read, as in the plugin
        `imitation`; 0: nothing, CLIP alone sees the reference. rank, reference_rank: of what is
        trained of either U-Net (0: all weights). train_reference, tower: train the reference U-Net,
        and CLIP, too. emphasis: in the hole."""

        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        inpainting: str | None = None
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
        data: Sources = field(default_factory=Sources)
        changes: Changes = field(default_factory=Changes)
        masks: Masking = field(default_factory=Masking)
        depth: int = 4
        depth_widths: tuple[int, ...] = (16, 32, 64, 128)
        depth_model: str | None = None
        drop_depth: float = 0.5
        drop_reference: float = 0.1
        mix: float = 0.5
        reference_rank: int = 0
        train_reference: bool = True
        tower: bool = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.pipe = pipe = begun(cfg)
        self.hold(pipe)
        self.tower, self.image_tokens = pipe.image_encoder, pipe.image_tokens
        self.unet, self.reference_unet = pipe.unet, pipe.reference_unet
        self.depth_guider = pipe.depth_guider
        model = cfg.depth_model
        self.depths: Any = depths.load(model, "depth_model") if model else None
        self.flat = torch.zeros(1, 1, cfg.size, cfg.size)
        if self.depths:
            self.depth_network = self.depths[0]
            freeze([self.depth_network])
            self.flat = self._estimated(self.flat.expand(1, 3, -1, -1), blank=True)
        low_rank.add(self.unet, cfg.rank)
        low_rank.add(self.reference_unet, cfg.reference_rank)
        taught = cfg.train_reference and cfg.mix
        freeze(unread(self.reference_unet) if taught else [self.reference_unet])
        self.tower.requires_grad_(cfg.tower)
        freeze(unread_tower(self.tower))
        fast_backward(self.unet, fused=readers(self.unet))
        fast_backward(self.reference_unet)

    def data(self, out: Path) -> Data:
        cfg = self.cfg
        views = Views(cfg.data, cfg.size, cfg.masks, cfg.changes)
        if not cfg.encoded:
            return views
        if cfg.tower:
            problem = "rows that are encoded once hold what CLIP saw, which tower trains"
            raise ModelError(problem, where="encoded", fix="Set tower: false.")
        parts = [told(part) for part in (cfg.data, cfg.changes, cfg.masks)]
        further = f" {cfg.depth_model}" if cfg.depth_model else ""
        identity = self.identity(f"{parts} {cfg.size} {cfg.clip}{further}")
        return encoded.encode(views, self.seen, out / "encoded.safetensors", identity)

    def seen(self, batch: Sample) -> dict[str, Tensor]:
        """What CLIP and autoencoder make of rows: `clean`, `around` and `shown` `b 2 c h w`, mean
        and deviation of the latents of the source, of the source with a black hole, and of the
        reference; `hidden` `b t d`, CLIP's; `mask` and `depth` `b 1 s s`."""
        source, mask = batch["source"], batch["mask"]
        pictures = {"clean": source, "around": source * (1 - mask), "shown": batch["reference"]}
        latents = {name: self.posterior(2 * shown - 1) for name, shown in pictures.items()}
        further = {"mask": mask, "depth": self._depth(batch["depth"], source)}
        return {**latents, **further, "hidden": hidden_of(self.pipe, batch["reference"])}

    def _depth(self, depth: Tensor, source: Tensor) -> Tensor:
        """Depth `b 1 s s`; where it is 0 and so unknown, what the depth model sees."""
        unknown = ~depth.flatten(1).any(1)
        if self.depths is None or not unknown.any():
            return depth
        return depth.index_put((unknown,), self._estimated(source[unknown]))

    def _estimated(self, pictures: Tensor, blank: bool = False) -> Tensor:
        """The depth model's own numbers `b 1 s s` for pictures `b 3 s s` in 0..1, as the plugin
        `imitation` asks for them: of what `keep_shape` keeps; blank: of what it does not."""
        shown = [to_pil_image(picture.cpu()) for picture in pictures]
        found = depths.estimate(self.depths, shown, True, blank)
        return F.interpolate(found, pictures.shape[-2:], mode="bilinear").to(pictures)

    def forward(self, batch: Sample) -> Tensor:
        cfg, batch = self.cfg, _ordered(batch, self.cfg.drop_reference)
        rows = batch if "hidden" in batch else {**self.seen(batch), "reads": batch["reads"]}
        clean, around, shown = (self.sampled(rows[name]) for name in ("clean", "around", "shown"))
        hole, count = F.interpolate(rows["mask"], clean.shape[-2:]), int(rows["reads"].sum())

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            given = torch.cat([noisy, hole, around, *self._shape(rows["depth"], clean)], 1)
            prompt, read = self._prompt(rows["hidden"], count), dict[str, Tensor]()
            if cfg.mix:
                with torch.set_grad_enabled(torch.is_grad_enabled() and cfg.train_reference):
                    given_to = shown[:count], time[:count], prompt[:count]
                    read = reference(self.reference_unet, *given_to)
            return imitate(self.unet, read, given, time, prompt, cfg.mix, count)

        return self.loss(clean, predict, F.interpolate(rows["mask"], clean.shape[-2:], mode="area"))

    def _shape(self, depth: Tensor, clean: Tensor) -> list[Tensor]:
        """The depth's channels for latents `b c h w`, some of whose rows see none."""
        if self.depth_guider is None:
            return []
        known = torch.rand(len(clean), 1, 1, 1, device=clean.device) >= self.cfg.drop_depth
        seen = torch.where(known, depth, self.flat.to(depth))
        return [self.depth_guider(seen, (clean.shape[-2], clean.shape[-1]))]

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

    def save(self, folder: Path) -> None:
        unets = {name: low_rank.stock(getattr(self, name)) for name in ("unet", "reference_unet")}
        made = {**self.pipe.components, **unets, "scheduler": self.scheduler}
        MimicBrushPipeline(**made).save_pretrained(folder)


def begun(cfg: Any) -> MimicBrushPipeline:
    """A MimicBrush as it is, or one before training, of a Stable Diffusion: two of the U-Net, and
    what it has beside them, fresh. Raises ModelError for other models."""
    pipe = pipeline(cfg.model)
    if isinstance(pipe, MimicBrushPipeline):
        return pipe
    channels, taken = pipe.vae.config.latent_channels, pipe.unet.config.in_channels
    if taken != channels:
        problem = f"its U-Net takes {taken} channels, not {channels}"
        fix = "Begin with a plain Stable Diffusion, or go on from a MimicBrush."
        raise ModelError(problem, where=cfg.model, fix=fix)
    torch.manual_seed(cfg.train.seed)
    vision, processor = tower(cfg.clip)
    width = pipe.unet.config.cross_attention_dim
    if cfg.inpainting:
        filling, prompted = hole_filler(cfg.inpainting, channels)
    else:
        filling, prompted = copy.deepcopy(pipe.unet), None
    made = MimicBrushPipeline(
        vae=pipe.vae,
        reference_unet=pipe.unet,
        unet=widened(filling, 2 * channels + 1 + cfg.depth),
        image_encoder=vision,
        image_tokens=ImageTokens(vision.config.hidden_size, width),
        depth_guider=DepthGuider(cfg.depth, tuple(cfg.depth_widths)) if cfg.depth else None,
        scheduler=pipe.scheduler,
        feature_extractor=processor,
    )
    if prompted:
        begin_projection(made, prompted, cfg)
    return made


def hole_filler(name: str, channels: int) -> tuple[Any, Prompts | None]:
    """The U-Net of a Stable Diffusion for inpainting, or of a Paint by Example, which sees z, z
    around the hole and what is kept in place of z, the hole and z around it; and what makes the
    prompts that a Paint by Example's knows."""
    folder = registry.resolve_model(name)
    index = Path(folder) / "model_index.json"
    painter: Any = None
    unet: Any
    if index.is_file() and "PaintByExample" in index.read_text(encoding="utf-8"):
        painter = pipeline(str(folder))
        unet = painter.unet
    else:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=torch.float32)
    if (taken := unet.config.in_channels) != 2 * channels + 1:
        problem = f"its U-Net takes {taken} channels, not {2 * channels + 1}"
        raise ModelError(problem, where=name, fix="Name an inpainting model, or none.")
    if painter is None:
        return unet, None
    seen, encoder = unet.conv_in, painter.image_encoder
    with torch.no_grad():
        z, around, kept = seen.weight.split([channels, channels, 1], 1)
        seen.bias += kept.sum((1, 2, 3))
        seen.weight.copy_(torch.cat([z, -kept, around], 1))
    return unet, lambda pictures: encoder(sized(pictures, encoder, painter.feature_extractor))


@torch.no_grad()
def begin_projection(pipe: Any, prompted: Prompts, cfg: Any, pictures: int = 256) -> None:
    """The projection as the linear map that brings every token of a reference nearest, in squares,
    to the one token a Paint by Example makes of it: a fresh one's tokens may be many times larger
    than any prompt that its U-Net has seen, whose attention they saturate."""
    unmatched = replace(cfg.data, sift=False)  # which no reference depends on
    views = Views(unmatched, cfg.size, cfg.masks, cfg.changes)
    drawn = [encoded.row(views, i, {}) for i in range(min(pictures, len(views)))]
    shown = torch.stack([row["reference"] for row in drawn]).split(32)
    hidden = torch.cat([hidden_of(pipe, part) for part in shown])
    wanted = torch.cat([prompted(part) for part in shown])
    wanted = wanted.expand(-1, hidden.shape[1], -1).flatten(0, 1).double()
    given = F.pad(hidden.flatten(0, 1), (0, 1), value=1.0).double()
    fitted = torch.linalg.lstsq(given, wanted, driver="gelsd").solution.T.float()
    pipe.image_tokens.proj.weight.copy_(fitted[:, :-1])
    pipe.image_tokens.proj.bias.copy_(fitted[:, -1])


def hidden_of(pipe: Any, pictures: Tensor) -> Tensor:
    """CLIP's penultimate hidden states `b t d` of pictures in 0..1."""
    shown = sized(pictures, pipe.image_encoder, pipe.feature_extractor)
    states: Tensor = pipe.image_encoder(shown, output_hidden_states=True).hidden_states[-2]
    return states


def sized(pictures: Tensor, encoder: Any, processor: Any) -> Tensor:
    """Pictures `b 3 s s` in 0..1 as a CLIP gets them."""
    side = encoder.config.image_size
    if pictures.shape[-1] != side:
        scaled = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True)
        pictures = scaled.clamp(0, 1)
    return normalised(pictures, processor)


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


def _ordered(batch: Sample, dropped: float) -> Sample:
    """The batch with those of its rows first that read their reference, which `reads` says; one
    does at least."""
    first = next(iter(batch.values()))
    reads = torch.rand(len(first), device=first.device) >= dropped
    reads[0] |= not reads.any()
    order = reads.argsort(descending=True, stable=True)
    return {**{name: rows[order] for name, rows in batch.items()}, "reads": reads[order]}
