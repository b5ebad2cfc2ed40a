"""A step of MimicBrush at Stable Diffusion 1.5's shapes: as published, and what is needed of it."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from einops import rearrange
from pairs import ratio, report
from torch.utils.flop_counter import FlopCounterMode

from inlay.backbones.mimicbrush_forward import imitate, program, readers, reference, shared
from inlay_attention import Rows

LEVELS = [(64, 320, 2), (32, 640, 5)]  # side of latents, channels, rounds
HEADS, CONTEXT = 8, 768
TINY = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}


def split(attn, x):
    """Queries, keys and values `b h n d` of hidden states `b n c`."""
    maps = (attn.to_q, attn.to_k, attn.to_v)
    return [rearrange(f(x), "b n (h d) -> b h n d", h=attn.heads) for f in maps]


class Naive:
    """Attention processor in the published form: every row pays for maps that are overwritten or
    cut off. bank: hidden states `2 n c` of the reference; rows: null, then the condition's."""

    def __init__(self):
        self.bank = None

    def attend(self, attn, x):
        q, k, v = split(attn, x)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return attn.to_out[0](out)

    def __call__(self, attn, x, *rest, **more):
        own = self.attend(attn, x)
        joint = self.attend(attn, torch.cat([x, self.bank], 1))[:, : x.shape[1]]
        mixed = (joint + own) / 2
        mixed[:1] = self.attend(attn, x[:1])
        return mixed


def unets(settings):
    """The imitative and the reference one."""
    return [UNet2DConditionModel(in_channels=n, **settings).eval() for n in (13, 4)]


def inputs(side, context, device="cpu"):
    """Channels `2 13 h w`, time, tokens `2 257 c` and the exemplar's latent `1 4 h w`."""
    with torch.device(device):
        sizes = (2, 13, side, side), (2, 257, context), (1, 4, side, side)
        sample, tokens, z = (torch.randn(size) for size in sizes)
        return sample, torch.tensor(481), tokens, z


@torch.no_grad()
def ours(unet, other, sample, t, tokens, z):
    """Predictions of null and condition: one row is read, as far as it is read."""
    read = reference(other, z, t, tokens[1:])
    return imitate(unet, read, sample.flip(0), t, tokens.flip(0), rows=1).flip(0)


@torch.no_grad()
def published(unet, other, sample, t, tokens, z):
    """The same; the reference U-Net is evaluated whole, for a null row too."""
    kept, hooks = {}, []
    for site, module in readers(other).items():
        put = module.register_forward_pre_hook(lambda _, args, at=site: kept.update({at: args[0]}))
        hooks.append(put)
    other(z.repeat(2, 1, 1, 1), t, tokens)
    for hook in hooks:
        hook.remove()
    stock = {site: module.processor for site, module in readers(unet).items()}
    for site, module in readers(unet).items():
        module.processor = Naive()
        module.processor.bank = kept[site]
    made = unet(sample, t, tokens).sample
    for site, module in readers(unet).items():
        module.processor = stock[site]
    return made


def bench_step_of_mimicbrush(benchmark):
    """Floating-point operations of a whole step, counted; equal results on a small pair."""
    torch.manual_seed(0)
    small, given = unets(TINY), inputs(16, 16)
    torch.testing.assert_close(
        ours(*small, *given), published(*small, *given), rtol=1e-3, atol=1e-4
    )
    with torch.device("meta"):
        large, shapes = unets({"cross_attention_dim": CONTEXT}), inputs(64, CONTEXT, "meta")
    counted = {}

    def count():
        for step in (ours, published):
            with FlopCounterMode(display=False) as counter:
                step(*large, *shapes)
            counted[step.__name__] = counter.get_total_flops() / 1e9

    benchmark.pedantic(count, rounds=1)
    value = counted["ours"] / counted["published"]
    what = "a step of MimicBrush at 64x64 latents, operations needed / operations as published"
    numbers = {f"GFLOP {name}": number for name, number in counted.items()}
    report("mimicbrush_flop", what, "at most 0.65", value, value <= 0.65, **numbers)


@pytest.mark.parametrize(("side", "width", "rounds"), LEVELS)
def bench_joint_attention(benchmark, side, width, rounds):
    """One site, two rows, what it makes of the exemplar's tokens included."""
    torch.manual_seed(0)
    site = Attention(width, None, HEADS, dim_head=width // HEADS).eval()
    x, r = torch.randn(2, side * side, width), torch.randn(1, side * side, width)
    naive, rows = Naive(), Rows.of({"edit/null": 1, "edit/text": 1})
    naive.bank = r.expand(2, -1, -1)

    @torch.no_grad()
    def needed():
        q, k, v = split(site, x)
        answer = program("s", rows, shared(site, r, 0.5), 0.5)
        out = answer(F.scaled_dot_product_attention, q, k, v)
        return site.to_out[0](rearrange(out, "b h n d -> b n (h d)"))

    @torch.no_grad()
    def theirs():
        return naive(site, x)

    torch.testing.assert_close(needed(), theirs(), rtol=1e-3, atol=1e-4)
    made = ratio(benchmark, needed, theirs, rounds=rounds)
    what = f"MimicBrush's joint attention at {side}x{side} latents / as published"
    value = made.pop("ratio")
    report(f"mimicbrush_{side}", what, "at most 0.65", value, value <= 0.65, **made)
