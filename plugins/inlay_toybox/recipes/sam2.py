"""Recipe of the small SAM 2: clicks, boxes and mask hints on rendered scenes, one round of
correction, with the losses of SAM (Kirillov et al. 2023, "Segment Anything", A) but for the focal
one: cross-entropy in its place reached half again the overlap after the first 150 steps.

A scene is encoded once and all its objects are asked for. An object's truth is its visible body,
without shadow or reflection.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from sam2.modeling.sam2_base import SAM2Base
from scipy.ndimage import distance_transform_edt
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from inlay_toybox import segmenter, training
from inlay_toybox.recipes.detector import disturb
from inlay_toybox.training import UNSEEN

SIDE = 64
SMALLEST = 16
"""Objects with fewer visible pixels, of pictures of this side, are not asked for."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the package's own image transform."""


def architecture(
    image_size: int = 128, width: int = 64, narrowest: int = 16, stages: tuple[int, ...] = (1, 2, 2)
) -> dict[str, Any]:
    """Configuration of an image-only SAM 2 in the package's style.

    Three stages at strides 4, 8 and 16 all reach the decoder, and there is no memory
    (``num_maskmem`` 0, the package's way to be SAM on single pictures).

    Args:
        image_size: side in pixels to which every picture is resized, a multiple of 16.
        width: channels of the decoder, a multiple of 16.
        narrowest: channels of the first stage; each further stage has twice as many.
        stages: blocks of the three stages.
    """
    package = "sam2.modeling"
    last = range(stages[0] + stages[1] + 1, sum(stages))
    trunk = {
        "_target_": f"{package}.backbones.hieradet.Hiera",
        "embed_dim": narrowest,
        "num_heads": 1,
        "q_pool": 2,
        "stages": list(stages),
        "window_spec": [8, 8, 4],
        "global_att_blocks": list(last),
        "window_pos_embed_bkg_spatial_size": [4, 4],
    }
    neck = {
        "_target_": f"{package}.backbones.image_encoder.FpnNeck",
        "position_encoding": {
            "_target_": f"{package}.position_encoding.PositionEmbeddingSine",
            "num_pos_feats": width,
        },
        "d_model": width,
        "backbone_channel_list": [4 * narrowest, 2 * narrowest, narrowest],
        "fpn_interp_model": "nearest",
    }
    return {
        "model": {
            "_target_": f"{package}.sam2_base.SAM2Base",
            "image_encoder": {
                "_target_": f"{package}.backbones.image_encoder.ImageEncoder",
                "scalp": 0,
                "trunk": trunk,
                "neck": neck,
            },
            "memory_attention": None,
            "memory_encoder": None,
            "num_maskmem": 0,
            "image_size": image_size,
            "backbone_stride": 16,
            "use_high_res_features_in_sam": True,
            "multimask_output_in_sam": True,
            "iou_prediction_use_sigmoid": True,
        }
    }


def build(config: dict[str, Any]) -> SAM2Base:
    """A fresh model, always the same one. Its random frequencies of position are values of
    bfloat16 from the start: weights are saved in that type, and frequencies are never trained.
    """
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = segmenter.build(config)
    frequencies = model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    frequencies.copy_(frequencies.bfloat16())
    return model.train()


def bodies(data: training.Batch, side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Objects to ask for: index of the picture ``[n]``, and visible bodies ``[n, 1, side, side]``,
    0 or 1; the pictures may be a whole number of times as large.
    """
    index, masks = [], []
    for b, drawn in enumerate(data.renderings):
        scale = drawn.image.shape[0] // side
        small = F.avg_pool2d(torch.from_numpy(drawn.masks).float()[:, None], scale) > 0.5
        for mask in small:
            if mask.sum() >= SMALLEST * (side / SIDE) ** 2:
                index.append(b)
                masks.append(mask)
    return torch.tensor(index), torch.stack(masks).float()


def draw_pixels(weights: torch.Tensor) -> torch.Tensor:
    """One place per map ``[n, 1, h, w]`` of weights: ``[n, 1, 2]``, x and y in 0..1, anywhere
    inside the pixel drawn.
    """
    height, width = weights.shape[-2:]
    flat = torch.multinomial(weights.flatten(1), 1)
    corner = torch.stack([flat % width, flat // width], -1)
    return (corner + torch.rand(corner.shape)) / torch.tensor([width, height])


def inside(truth: torch.Tensor) -> torch.Tensor:
    """Weights of a click on an object: some even, some growing with the distance from its edge."""
    depth = np.stack([distance_transform_edt(mask) for mask in truth[:, 0].numpy()])
    power = torch.randint(0, 4, (len(truth), 1, 1, 1))
    return truth * torch.from_numpy(depth).float()[:, None] ** power


def around(truth: torch.Tensor) -> torch.Tensor:
    """Weights of a click beside an object: within 8 pixels of it, and a little anywhere else."""
    near = F.max_pool2d(truth, 17, 1, 8)
    return (1 - truth) * (0.02 + near)


def boxes(truth: torch.Tensor) -> torch.Tensor:
    """Upper left and lower right corners ``[n, 2, 2]`` in 0..1, each side off by about 5 %."""
    corners = []
    for mask in truth[:, 0]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        corners.append([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]])
    exact = torch.tensor(corners).float()
    size = exact[:, 1:] - exact[:, :1]
    return ((exact + 0.05 * size * torch.randn(exact.shape)) / truth.shape[-1]).clamp(0, 1)


def two_points(truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes for half of the objects, two clicks for the others, the second one beside the object
    every other time: places ``[n, 2, 2]`` in 0..1 and labels ``[n, 2]`` (0 beside, 1 inside, 2
    and 3 the corners).
    """
    n = len(truth)
    boxed, beside = torch.rand(n) < 0.5, torch.rand(n) < 0.5
    second = torch.where(beside[:, None, None, None], around(truth), inside(truth))
    clicks = torch.cat([draw_pixels(inside(truth)), draw_pixels(second)], 1)
    labels = torch.stack([torch.ones(n), 1.0 - beside.float()], 1)
    places = torch.where(boxed[:, None, None], boxes(truth), clicks)
    return places, torch.where(boxed[:, None], torch.tensor([2.0, 3.0]), labels)


def hints(truth: torch.Tensor, side: int) -> torch.Tensor:
    """Rough masks as logits ``[n, 1, side, side]``: bodies shifted, scaled, blurred, faint."""
    n = len(truth)
    scale = 1 + 0.15 * torch.randn(n)
    shift = 0.05 * torch.randn(n, 2)
    zero = torch.zeros(n)
    rows = [torch.stack(row, 1) for row in ((scale, zero, shift[:, 0]), (zero, scale, shift[:, 1]))]
    grid = F.affine_grid(torch.stack(rows, 1), list(truth.shape), align_corners=False)
    moved = F.grid_sample(truth, grid, align_corners=False)
    reach = int(torch.randint(0, 5, ()))
    soft = F.avg_pool2d(moved, 2 * reach + 1, 1, reach)
    soft = F.interpolate(soft, (side, side), mode="bilinear", antialias=True)
    return (soft - 0.4) * (4 + 24 * torch.rand(n, 1, 1, 1))


def normalised(images: torch.Tensor, side: int) -> torch.Tensor:
    """The package's image transform for a batch in 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(images) for v in (MEAN, STD))
    big = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return (big - mean) / std


def features(model: SAM2Base, images: torch.Tensor) -> list[torch.Tensor]:
    """Maps of pictures ``[b, 3, h, w]`` in 0..1, finest first, as the decoder takes them."""
    return model.forward_image(normalised(images, model.image_size))["backbone_fpn"]


def decode(
    model: SAM2Base,
    maps: list[torch.Tensor],
    points: tuple[torch.Tensor, torch.Tensor] | None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All four masks of every prompt, the single one first.

    Args:
        maps: of ``features``, one row per prompt.
        points: places ``[n, k, 2]`` in 0..1 and labels ``[n, k]``.
        masks: logits ``[n, 1, s, s]``, four times as fine as the image embedding.

    Returns:
        Logits ``[n, 4, s, s]`` and estimated overlaps ``[n, 4]`` in 0..1.
    """
    device = maps[0].device
    if points is not None:
        points = (points[0].to(device) * model.image_size, points[1].to(device))
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=masks)
    logits, quality, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=maps[2],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=maps[:2],
    )
    return logits.float(), quality.float()


def loss(logits: torch.Tensor, quality: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """5 × cross-entropy + dice + the estimate's error; of the three masks for unclear prompts only
    the nearest one learns, the single mask always.
    """
    logits = F.interpolate(logits, truth.shape[-2:], mode="bilinear")
    truth = truth.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((2, 3))
    p = logits.sigmoid()
    dice = 1 - (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    each = 5 * entropy + dice
    with torch.no_grad():
        seen, real = logits > 0, truth > 0.5
        overlap = (seen & real).sum((2, 3)) / (seen | real).sum((2, 3)).clamp(min=1)
    return (each[:, 0] + each[:, 1:].amin(1)).mean() + (quality - overlap).abs().mean()


def corrected(
    points: tuple[torch.Tensor, torch.Tensor],
    logits: torch.Tensor,
    quality: torch.Tensor,
    truth: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The next round's prompts: one more click where the surest mask is wrong, and that mask."""
    best = quality.argmax(1)
    hint = logits[torch.arange(len(best)), best][:, None].detach().clamp(-32, 32)
    seen = F.interpolate(hint, truth.shape[-2:], mode="bilinear").cpu() > 0
    wrong = (seen != truth.cpu().bool()).float() + 1e-4 * truth.cpu()
    place = draw_pixels(wrong)
    column, row = (place[:, 0] * truth.shape[-1]).long().unbind(1)
    label = truth.cpu()[torch.arange(len(truth)), 0, row, column][:, None]
    return (torch.cat([points[0], place], 1), torch.cat([points[1], label], 1)), hint


def train(
    minutes: float,
    out: Path,
    device: torch.device,
    resume: bool = False,
    start: Path | None = None,
    size: int = SIDE,
    vae: Path | None = None,
    batch_size: int = 16,
    report_every: int = 100,
) -> Path:
    """Train, or go on training.

    Args:
        minutes: wall-clock budget of the whole schedule.
        out: folder for state, loss curve and sample grid; the model is written to ``out/sam2``.
        device: where to train.
        resume: go on from ``out``, or else from the weights in ``start``.
        start: a saved model, usually the shipped one; it may be of another size.
        size: side of the scenes in pixels, a multiple of 16. Inside they are twice as large, which
            makes the decoder's masks half as fine as the scene.
        vae: an autoencoder for round trips; none are made without it.
        batch_size: scenes per step.
        report_every: steps between two lines of the log.

    Returns:
        The model's folder.
    """
    config = architecture(2 * size)
    model = build(config)
    if resume and start:
        model.load_state_dict(segmenter.load(start).state_dict())
    model = model.to(device)
    coder = AutoencoderKL.from_pretrained(vae).float().to(device) if vae else None
    side = model.sam_prompt_encoder.mask_input_size[0]

    def loss_of(step: int) -> torch.Tensor:
        first = UNSEEN // 4 + step * batch_size
        large = step % 4 == 3
        data = training.batch(range(first, first + batch_size), 2 * size if large else size)
        index, truth = bodies(data, size)
        images = disturb(data.images.to(device), None if large else coder)
        click = draw_pixels(inside(truth)), torch.ones(len(truth), 1)
        second = (two_points(truth), None) if step % 2 else (None, hints(truth, side).to(device))
        goal = truth.to(device)
        # With heads this narrow the fused kernel's backward pass takes half of the step on a CPU.
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
        with torch.autocast(device.type, torch.bfloat16), plain:
            maps = [level[index.to(device)] for level in features(model, images)]
            rounds = [decode(model, maps, click), decode(model, maps, *second)]
            points, hint = corrected(click, *rounds[0], truth)
            rounds.append(decode(model, maps, points, hint))
        return torch.stack([loss(*answer, goal) for answer in rounds]).mean()

    def preview() -> None:
        training.save_grid(sample(model, UNSEEN // 8), out / "samples.png", columns=6, zoom=3)

    training.fit(
        {"sam2": model}, loss_of, out, minutes, resume, seed=6, adamw=2e-3,
        report_every=report_every, preview=preview,
    )  # fmt: skip
    folder = segmenter.save(model, config, out / "sam2")
    training.export_log(out, folder)
    return folder


@torch.no_grad()
def sample(model: SAM2Base, seed: int, n: int = 24) -> torch.Tensor:
    """Scenes with the mask of one random click on each object laid over them: ``[n, 3, 64, 64]`` in
    0..1, the body's overlap in green, what is too much in red, what is missing in blue.
    """
    data = training.batch(range(seed, seed + n), SIDE)
    index, truth = bodies(data)
    maps = [level[index] for level in features(model, data.images.to(model.device))]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        click = draw_pixels(inside(truth)), torch.ones(len(truth), 1)
    logits, quality = decode(model, maps, click)
    best = logits[torch.arange(len(truth)), 1 + quality[:, 1:].argmax(1)][:, None].cpu()
    seen = F.interpolate(best, truth.shape[-2:], mode="bilinear") > 0
    images = data.images.clone()
    for b, one, real in zip(index.tolist(), seen, truth > 0.5, strict=True):
        tint = torch.cat([one & ~real, one & real, real & ~one]).float()
        images[b] = torch.where(one | real, 0.5 * images[b] + 0.5 * tint, images[b])
    return images
