"""Models that take a picture, at Stable Diffusion 1.5's shapes or near them; random weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from pairs import ratio, report

from inlay.backbones.conditioned import OneToken

LEVELS = [(64, 320), (32, 640), (16, 1280)]  # side of the latents, channels
HEADS, CONTEXT = 8, 768
HALF = {"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": CONTEXT}


@pytest.mark.parametrize(("side", "width"), LEVELS)
def bench_one_token(benchmark, side, width):
    """Paint by Example's cross-attention, two rows: the value of the key against a softmax."""
    torch.manual_seed(0)
    site = Attention(width, CONTEXT, HEADS, dim_head=width // HEADS).eval()
    queries, token = torch.randn(2, side * side, width), torch.randn(2, 1, CONTEXT)
    stock, spared = site.processor, OneToken(site.processor)

    @torch.no_grad()
    def call(processor):
        site.processor = processor
        return queries + site(queries, token)

    torch.testing.assert_close(call(spared), call(stock), rtol=1e-5, atol=1e-5)
    made = ratio(benchmark, lambda: call(spared), lambda: call(stock), rounds=9)
    what = f"cross-attention to one token, {side}x{side} latents, as a bias / as a softmax"
    value = made.pop("ratio")
    report(f"exemplar_{side}", what, "at most 0.5", value, value <= 0.5, **made)


def bench_unet_of_paint_by_example(benchmark):
    """One row of a whole U-Net of half the width, 32x32 latents."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=9, **HALF).eval()
    sample, token = torch.randn(1, 9, 32, 32), torch.randn(1, 1, CONTEXT)
    sites = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    stock = [site.processor for site in sites]
    spared = [OneToken(processor) for processor in stock]

    @torch.no_grad()
    def call(processors):
        for site, processor in zip(sites, processors, strict=True):
            site.processor = processor
        return unet(sample, 500, token).sample

    torch.testing.assert_close(call(spared), call(stock), rtol=1e-3, atol=1e-4)
    made = ratio(benchmark, lambda: call(spared), lambda: call(stock), rounds=5)
    value, what = (
        made.pop("ratio"),
        "Paint by Example's U-Net at half its width, cross-attention as a bias / stock",
    )
    report("exemplar_unet", what, "below 1", value, value < 1, **made)


def bench_instruct_rows(benchmark):
    """InstructPix2Pix's U-Net with s_I = 1, which leaves two rows of three."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(in_channels=8, **HALF).eval()
    sample, text = torch.randn(3, 8, 48, 48), torch.randn(3, 77, CONTEXT)

    @torch.no_grad()
    def call(rows):
        return unet(sample[:rows], 500, text[:rows]).sample

    torch.testing.assert_close(call(2), call(3)[:2], rtol=1e-3, atol=1e-4)
    made = ratio(benchmark, lambda: call(2), lambda: call(3), rounds=5)
    value, what = (
        made.pop("ratio"),
        "InstructPix2Pix's U-Net at half its width, image_scale 1 / any other",
    )
    report("instruct_rows", what, "about 2/3", value, value <= 0.7, **made)
