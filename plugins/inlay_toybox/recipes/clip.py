"""Recipe of the CLIP that guides: a stock ``CLIPModel`` trained contrastively on scenes, close-ups
and masked regions, under the extending augmentations and the corruptions that guidance shows it.

Blended Diffusion (Avrahami et al. 2022) asks its CLIP about denoising previews, masked to the
edited region and warped at random. A CLIP that never saw such pictures answers with noise, and its
gradient draws nothing. The judge (``recipes/judge.py``) is trained by the same loop to another
design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from kornia.augmentation import AugmentationSequential, RandomAffine, RandomPerspective
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from inlay_toybox import captions, text, training, world
from inlay_toybox.classes import CLASSES, GROUNDS, NAMES

SIZE = 64
"""Side of the rendered pictures in pixels."""

WARMEST = math.log(100)
"""Upper bound of the learned logit scale, as in CLIP (Radford et al. 2021)."""

FACTS = (
    *NAMES,
    *(f"{colour} {toy.name}" for toy in CLASSES for colour in toy.colours),
    *GROUNDS,
    "sunset",
)
"""What a caption can claim. One that claims a subset of a picture's facts is true of it."""

_FACT = {name: i for i, name in enumerate(FACTS)}


@dataclass(frozen=True)
class Design:
    """What tells two of these models apart.

    Attributes:
        side: the picture the model sees, in pixels. patch: side of a patch.
        width, layers, heads: of the vision tower. text_width, text_layers: of the text tower.
        embedding: length of the joint embedding.
        seed: of weights and augmentation. first: seed of the first training scene.
        scenes: number of training scenes. round_trips: share of them that went through the
            autoencoder with noisy latents.
        extended: share of the pictures of a step under the extending augmentations.
        blurred, noisy, masked, close: shares under each corruption, and of each kind of picture.
        grain: largest standard deviation of the noise, in the range 0..1 of a picture.
        mirrored: share of the pictures that are flipped.
    """

    side: int = 64
    patch: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    text_width: int = 96
    text_layers: int = 2
    embedding: int = 64
    seed: int = 3
    first: int = 0
    scenes: int = 30_000
    round_trips: float = 0.2
    extended: float = 0.4
    blurred: float = 0.35
    noisy: float = 0.4
    masked: float = 0.25
    close: float = 0.3
    grain: float = 0.15
    mirrored: float = 0.0


GUIDE = Design()


def build(design: Design = GUIDE, tokenizer: CLIPTokenizer | None = None) -> CLIPModel:
    """A fresh model: pictures ``[b, 3, side, side]`` and token ids ``[b, n <= TOKENS]`` to joint
    embeddings ``[b, embedding]``.
    """
    tokenizer = tokenizer or text.clip_tokenizer(text.corpus())
    return CLIPModel(
        CLIPConfig(
            projection_dim=design.embedding,
            vision_config={
                "image_size": design.side,
                "patch_size": design.patch,
                "hidden_size": design.width,
                "intermediate_size": 2 * design.width,
                "num_hidden_layers": design.layers,
                "num_attention_heads": design.heads,
                "projection_dim": design.embedding,
            },
            text_config={
                "vocab_size": len(tokenizer),
                "max_position_embeddings": text.TOKENS,
                "hidden_size": design.text_width,
                "intermediate_size": 2 * design.text_width,
                "num_hidden_layers": design.text_layers,
                "num_attention_heads": 4,
                "projection_dim": design.embedding,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
        )
    )


def image_processor(side: int) -> CLIPImageProcessor:
    """CLIP's own preparation (bicubic, centre crop, mean and deviation) for a smaller side."""
    return CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Pictures ``[b, 3, h, w]`` in 0..1 with CLIP's mean and deviation taken out."""
    mean = images.new_tensor(OPENAI_CLIP_MEAN)[:, None, None]
    return (images - mean) / images.new_tensor(OPENAI_CLIP_STD)[:, None, None]


def extending() -> AugmentationSequential:
    """The extending augmentations of Blended Diffusion, for pictures in -1..1.

    With probability 0.7 each: a rotation by up to 15 degrees with a vertical shift by up to 10 %,
    border repeated; a perspective that moves each corner inwards by up to 35 %, grey outside.
    """
    return AugmentationSequential(
        RandomAffine(15.0, (0.0, 0.1), padding_mode="border", p=0.7),
        RandomPerspective(0.7, p=0.7),
        data_keys=["input"],
    )


@dataclass
class Scenes:
    """Drawn scenes. images: uint8 ``[n, 3, SIZE, SIZE]``; owners: uint8 ``[n, SIZE, SIZE]``, the
    number of the object that a pixel shows, from 1, or 0; boxes: float ``[n, 3, 4]``, left, top,
    right, bottom in pixels, 0 without an object; records: the scenes; first: the seed of the first.
    """

    images: torch.Tensor
    owners: torch.Tensor
    boxes: torch.Tensor
    records: list[world.Scene]
    first: int


@torch.no_grad()
def _round_trip(images: torch.Tensor, vae: AutoencoderKL, device: torch.device) -> torch.Tensor:
    """uint8 pictures through the autoencoder, with noise of random strength on their latents."""
    with torch.autocast(device.type, torch.bfloat16):
        x = images.to(device) / 127.5 - 1
        latents = vae.encode(x).latent_dist.mode()
        level = 0.5 * torch.rand(len(x), 1, 1, 1, device=device) / vae.config.scaling_factor
        back = vae.decode(latents + level * torch.randn_like(latents)).sample.float()
    return ((back / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def draw(design: Design, device: torch.device, vae: AutoencoderKL | None = None) -> Scenes:
    """Draw the training scenes of a design; half a millisecond each, so nothing is kept on disk."""
    chunks: list[tuple[torch.Tensor, ...]] = []
    records: list[world.Scene] = []
    for start in range(0, design.scenes, 200):
        seeds = range(design.first + start, design.first + min(start + 200, design.scenes))
        scenes = [world.sample(seed) for seed in seeds]
        drawn = [world.render(scene, SIZE) for scene in scenes]
        images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2)
        images = images.contiguous()
        owners = torch.zeros(len(drawn), SIZE, SIZE, dtype=torch.uint8)
        boxes = torch.zeros(len(drawn), 3, 4)
        for i, rendering in enumerate(drawn):
            boxes[i, : len(rendering.boxes)] = torch.from_numpy(rendering.boxes)
            for k, mask in enumerate(rendering.masks):
                owners[i][torch.from_numpy(mask)] = k + 1
        if vae is not None:
            chosen = torch.rand(len(drawn)) < design.round_trips
            images[chosen] = _round_trip(images[chosen], vae, device)
        chunks.append((images, owners, boxes))
        records += scenes
    images, owners, boxes = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return Scenes(images, owners, boxes, records, design.first)


@dataclass
class Pairs:
    """One step's pictures and captions. images: float ``[b, 3, SIZE, SIZE]`` in -1..1; lines: the
    captions; shown, told: bool ``[b, len(FACTS)]``, what each picture shows and each caption
    claims.
    """

    images: torch.Tensor
    lines: list[str]
    shown: torch.Tensor
    told: torch.Tensor


@dataclass
class _Collected:
    """A step in the making. windows: centre x, centre y and side, in pixels, of the part that is
    seen; kept: by place in the step, what a mask leaves to see.
    """

    lines: list[str] = field(default_factory=list)
    shown: list[torch.Tensor] = field(default_factory=list)
    told: list[torch.Tensor] = field(default_factory=list)
    windows: list[tuple[float, float, float]] = field(default_factory=list)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)


def facts(things: tuple[world.Thing, ...], ground: str = "", sunset: bool = False) -> torch.Tensor:
    """What is so: bool ``[len(FACTS)]``."""
    row = torch.zeros(len(FACTS), dtype=torch.bool)
    names = [thing.name for thing in things]
    names += [captions.subject(thing) for thing in things if thing.colour]
    names += [ground] if ground else []
    names += ["sunset"] if sunset else []
    row[[_FACT[name] for name in names]] = True
    return row


def _describe(
    scene: world.Scene, thing: world.Thing, rng: np.random.Generator
) -> tuple[str, torch.Tensor]:
    """One object in words, with or without its colour, its place, an opening; and what they
    claim.
    """
    named = thing
    if thing.colour and rng.random() < 0.25:
        named = world.Thing(thing.name, None, thing.x, thing.base, thing.side)
    if rng.random() < 0.4:
        line = captions.caption([named], scene.ground, scene.sunset)
        told = facts((named,), scene.ground, scene.sunset)
    else:
        line, told = captions.phrase(named), facts((named,))
    if rng.random() < 0.25:
        line = f"a photo of {line}"
    return line, told


def _region(
    owners: torch.Tensor, number: int, box: torch.Tensor, rng: np.random.Generator
) -> torch.Tensor:
    """What a mask leaves to see of an object, bool ``[SIZE, SIZE]``: itself alone, or a box around
    it.
    """
    if rng.random() < 0.4:
        return owners == number
    left, top, right, bottom = box.tolist()
    slack = rng.random(4) * 0.35 * max(right - left, bottom - top)
    keep = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    rows = slice(max(0, int(top - slack[0])), int(bottom + slack[1]) + 1)
    keep[rows, max(0, int(left - slack[2])) : int(right + slack[3]) + 1] = True
    return keep


def pairs(scenes: Scenes, design: Design, b: int, rng: np.random.Generator) -> Pairs:
    """Pictures and captions of one step: whole scenes, close-ups, masked regions."""
    rows = rng.integers(0, len(scenes.records), b)
    made = _Collected()
    for place, row in enumerate(rows.tolist()):
        scene = scenes.records[row]
        big = [
            i
            for i in range(len(scene.things))
            if (scenes.boxes[row, i, 2:] - scenes.boxes[row, i, :2]).prod() >= 64
        ]
        kind = rng.random()
        if not big or kind >= design.masked + design.close:
            words = text.wordings(scene, scenes.first + row)
            made.lines.append(words[int(rng.integers(len(words)))])
            claims = facts(scene.things, scene.ground, scene.sunset)
            made.shown.append(claims)
            made.told.append(claims)
            made.windows.append((SIZE / 2, SIZE / 2, SIZE * (1 - 0.06 * rng.random())))
            continue
        index = big[int(rng.integers(len(big)))]
        thing, box = scene.things[index], scenes.boxes[row, index]
        line, told = _describe(scene, thing, rng)
        made.lines.append(line)
        made.told.append(told)
        made.shown.append(facts((thing,), scene.ground, scene.sunset))
        if kind < design.masked:
            made.kept[place] = _region(scenes.owners[row], index + 1, box, rng)
            made.windows.append((SIZE / 2, SIZE / 2, SIZE))
        else:
            left, top, right, bottom = box.tolist()
            side = max(right - left, bottom - top) * (1.05 + 0.75 * rng.random())
            shift = (rng.random(2) - 0.5) * 0.15 * side
            x, y = (left + right) / 2 + shift[0], (top + bottom) / 2 + shift[1]
            made.windows.append((float(x), float(y), float(side)))
    images = scenes.images[torch.from_numpy(rows)].float() / 127.5 - 1
    for place, keep in made.kept.items():
        images[place] = torch.where(keep, images[place], _surround(images[place], rng))
    flip = torch.from_numpy(rng.random(b) < design.mirrored)
    images[flip] = images[flip].flip(-1)
    windows = torch.tensor(made.windows)
    windows[flip, 0] = SIZE - windows[flip, 0]
    return Pairs(
        _look(images, windows), made.lines, torch.stack(made.shown), torch.stack(made.told)
    )


def _surround(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """What is outside a mask: grey as in guidance, black as in ranking, or the picture blurred."""
    kind = rng.random()
    if kind < 0.5:
        return torch.zeros_like(image)
    if kind < 0.75:
        return torch.full_like(image, -1.0)
    return F.interpolate(F.avg_pool2d(image[None], 16), size=SIZE, mode="bilinear")[0]


def _look(images: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """The part of each picture in its window, at full size; edges repeat."""
    x, y, side = (windows / SIZE).unbind(1)
    zero = torch.zeros_like(x)
    first = torch.stack([side, zero, 2 * x - 1], 1)
    theta = torch.stack([first, torch.stack([zero, side, 2 * y - 1], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def disturb(images: torch.Tensor, design: Design, warp: AugmentationSequential) -> torch.Tensor:
    """Some pictures blurred as denoising previews are, some noisy, some brighter or duller, some
    warped.

    Args:
        images: ``[b, 3, h, w]`` in -1..1.
        design: the shares.
        warp: the extending augmentations.
    """
    b = len(images)
    images = images.clone()
    soft = torch.rand(b) < design.blurred
    if soft.any():
        coarse = int(torch.randint(12, 49, ()))
        small = F.interpolate(images[soft], size=coarse, mode="area")
        images[soft] = F.interpolate(small, size=images.shape[-1], mode="bicubic")
    contrast = 1 + 0.3 * (torch.rand(b, 1, 1, 1) - 0.5)
    images = images * contrast.to(images) + 0.15 * (torch.rand(b, 1, 1, 1).to(images) - 0.5)
    level = 2 * design.grain * torch.rand(b, 1, 1, 1) * (torch.rand(b, 1, 1, 1) < design.noisy)
    images = images + level.to(images) * torch.randn_like(images)
    warped = torch.rand(b) < design.extended
    if warped.any():
        images[warped] = warp(images[warped])
    return images.clamp(-1, 1)


def contrastive_loss(
    image: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    shown: torch.Tensor,
    told: torch.Tensor,
) -> torch.Tensor:
    """Symmetric InfoNCE in which nothing true counts as wrong.

    A caption that is true of another picture is no wrong answer for that picture's caption unless
    it says less; a picture of which a caption is true is no wrong answer for that caption.

    Args:
        image, words: unit embeddings ``[b, d]`` of pairs.
        scale: factor of the cosines (a scalar).
        shown, told: bool ``[b, f]``, the facts of each picture and each caption.

    Returns:
        The loss, a scalar.
    """
    cosine = scale * image @ words.T
    true = (~shown).float() @ told.float().T == 0
    amount = told.sum(1)
    own = torch.eye(len(image), dtype=torch.bool, device=image.device)
    as_good = true & (amount[None] >= amount[:, None]) & ~own
    target = torch.arange(len(image), device=image.device)
    by_image = F.cross_entropy(cosine.masked_fill(as_good, -torch.inf), target)
    by_words = F.cross_entropy(cosine.masked_fill(true & ~own, -torch.inf).T, target)
    return (by_image + by_words) / 2


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    resume: bool = False,
    start: Path | None = None,
    vae: Path | None = None,
    batch_size: int = 128,
    report_every: int = 25,
    design: Design = GUIDE,
    name: str = "clip",
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and sample grid; the model is written to ``out/name``.
        device: where to train.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a saved model, usually the shipped one.
        vae: an autoencoder for the round trips; none are made without it.
        batch_size: pairs per step.
        report_every: steps between two lines of the log.
        design: which of the two models.
        name: its folder.

    Returns:
        The model's folder.
    """
    torch.manual_seed(design.seed)
    if resume and start and start.is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(start)
        model = CLIPModel.from_pretrained(start, dtype=torch.float32)
    else:
        tokenizer = text.clip_tokenizer(text.corpus())
        model = build(design, tokenizer)
    model.to(device).train()
    if device.type == "cpu":
        # On a CPU the gradient of the fused attention takes four times as long as that of the sum.
        model.set_attn_implementation("eager")
    coder = AutoencoderKL.from_pretrained(vae).to(device) if vae else None
    scenes, warp = draw(design, device, coder), extending()
    shown: list[torch.Tensor] = []

    def loss_of(step: int) -> torch.Tensor:
        data = pairs(scenes, design, batch_size, np.random.default_rng([design.seed, step]))
        images = disturb(data.images.to(device), design, warp)
        shown[:] = [images]
        if design.side != SIZE:
            images = F.interpolate(images, size=design.side, mode="bicubic")
        tokens = tokenizer(data.lines, padding=True, return_tensors="pt").to(device)
        with torch.no_grad():
            model.logit_scale.clamp_(max=WARMEST)
        with torch.autocast(device.type, torch.bfloat16):
            output = model(pixel_values=normalise(images / 2 + 0.5), **tokens)
        return contrastive_loss(
            output.image_embeds.float(),
            output.text_embeds.float(),
            model.logit_scale.exp(),
            data.shown.to(device),
            data.told.to(device),
        )

    training.fit(
        {"clip": model}, loss_of, out, minutes, resume, design.seed, report_every=report_every
    )
    if shown:
        training.save_grid(shown[0][:64] / 2 + 0.5, out / "samples.png")
    save(model, tokenizer, design.side, out / name)
    training.export_log(out, out / name)
    return out / name


def save(model: CLIPModel, tokenizer: CLIPTokenizer, side: int, folder: Path) -> None:
    """Write weights in bfloat16, marked to be loaded in float32, and the processor."""
    model.to(torch.bfloat16).save_pretrained(folder)
    CLIPProcessor(image_processor(side), tokenizer).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(file.read_text().replace("bfloat16", "float32"))
