"""Tiny random pipelines on disk, with tokenizers and text encoders: prompts are spelled letter by
letter, so words are several tokens."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

import models
from inlay_toybox import imitation, world

WIDTH, TOKENS = 16, 32


LETTERS = [*string.ascii_letters, *string.digits, *",.'-"]


def _clip() -> dict:
    """CLIP's tokenizer and text encoder."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate([*LETTERS, *(f"{x}</w>" for x in LETTERS), *ends])}
    clip = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
    )
    return {"tokenizer": clip, "text_encoder": CLIPTextModel(config).eval()}


def _watched() -> dict:
    """A safety checker and its processor, as Stable Diffusion's folders have."""
    one = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    one |= {"num_attention_heads": 1, "projection_dim": 8}
    vision = {**one, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=one, vision_config=vision, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    return {"safety_checker": checker, "feature_extractor": CLIPImageProcessor()}


def save_instruct(folder: Path) -> Path:
    """The layout of timbrooks/instruct-pix2pix."""
    pipe = models.instruct_pix2pix()
    torch.manual_seed(1)
    pipe.register_modules(**_clip(), **_watched())
    pipe.save_pretrained(folder)
    return folder


def save_stable_diffusion(folder: Path) -> Path:
    """The layout of Stable Diffusion."""
    pipe = models.stable_diffusion()
    torch.manual_seed(1)
    pipe.register_modules(**_clip())
    pipe.save_pretrained(folder)
    return folder


def save_paint_by_example(folder: Path) -> Path:
    """The layout of Fantasy-Studio/Paint-by-Example: the names of its day."""
    pipe = models.paint_by_example()
    pipe.register_modules(safety_checker=_watched()["safety_checker"])
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["image_encoder"] == ["paint_by_example", "PaintByExampleImageEncoder"]
    file = folder / "image_encoder" / "model.safetensors"
    tensors = {key.replace("model.", "model.vision_model.", key.startswith("model.")): tensor
               for key, tensor in load_file(file).items()}  # fmt: skip
    save_file(tensors, file, {"format": "pt"})
    return folder


def save_flux(folder: Path) -> Path:
    """The layout of FLUX.1, and the toybox's settings.json."""
    pipe = models.flux()
    torch.manual_seed(1)
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    t5 = T5TokenizerFast(
        vocab=[*pieces, *((x, -1.0) for x in ["▁", *LETTERS])], extra_ids=0, model_max_length=TOKENS
    )
    t5_config = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2
    )
    pipe.register_modules(
        **_clip(), tokenizer_2=t5, text_encoder_2=T5EncoderModel(t5_config).eval()
    )
    pipe.save_pretrained(folder)
    settings = {"height": 32, "width": 32, "max_sequence_length": TOKENS}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def save_depth_anything(folder: Path) -> tuple[Path, DepthAnythingForDepthEstimation]:
    """A depth model whose numbers are not constant, for pictures of 28 pixels."""
    torch.manual_seed(0)
    tower = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=28,
        patch_size=14,
        out_features=[f"stage{i}" for i in range(1, 5)],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    widths = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [4, 4, 8, 8]}
    widths |= {"fusion_hidden_size": 4, "head_hidden_size": 4}
    network = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=tower, patch_size=14, **widths)
    )
    for part in (network.neck, network.head):
        for weight in part.parameters():
            nn.init.normal_(weight, std=0.3)
    nn.init.constant_(network.head.conv3.bias, 1.0)
    network.save_pretrained(folder)
    sides = {"size": {"height": 28, "width": 28}}
    DPTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3, **sides).save_pretrained(folder)
    return folder, network.eval()


def save_vision_tower(folder: Path) -> Path:
    """CLIP's, as wide as a Stable Diffusion's prompts."""
    torch.manual_seed(2)
    CLIPVisionModel(models.mimicbrush().image_encoder.config).save_pretrained(folder)
    sides = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    CLIPImageProcessor(**sides).save_pretrained(folder)
    return folder


def save_photos(root: Path) -> Path:
    """Scenes in two clips, one torn, and alone; boxes as COCO and Open Images write them."""
    rows, things = [], []
    for i in range(4):
        views = imitation.views(i + 2)
        clip = root / f"clip{i % 2}"
        clip.mkdir(exist_ok=True)
        for scene, name in ((views.source, "a"), (views.reference, "b")):
            Image.fromarray(world.render(scene, 32).image).save(clip / f"{i}{name}.png")
        drawn = world.render(views.source, 48)
        Image.fromarray(drawn.image).save(root / f"{i}.jpg")
        left, top, right, bottom = (float(side) for side in drawn.boxes[0])
        rows.append({"id": i, "file_name": f"{i}.jpg", "width": 48, "height": 48})
        box = [left, top, right - left, bottom - top]
        things.append({"image_id": i, "bbox": box, "iscrowd": 0})
    (root / "2.jpg").write_bytes((root / "2.jpg").read_bytes()[:90])
    things += [{"image_id": 0, "bbox": [0, 0, 48, 48], "iscrowd": 0}]
    things += [{"image_id": 1, "bbox": [0, 0, 24, 24], "iscrowd": 1}]
    held = {"images": rows, "annotations": things}
    (root / "instances.json").write_text(json.dumps(held))
    lines = ["ImageID,XMin,XMax,YMin,YMax,IsGroupOf,IsDepiction"]
    lines += ["0,0.1,0.6,0.2,0.7,0,0", "0,0.1,0.6,0.2,0.7,1,0", "1,0.0,0.1,0.0,0.1,0,0"]
    (root / "boxes.csv").write_text("\n".join(lines))
    return root
