"""Guidance by losses: forwards per step, the price of a guided step, memory; ranking."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from pairs import ratio, report

from inlay import Plugin, Session, hookimpl
from inlay_config.config import Gradient
from inlay_plugins import clips
from inlay_plugins.rank import Rank

SIDE, STEPS = 64, 2
PLUGINS = {
    "source_trajectory": {},
    "extending_augmentations": {"copies": 4},
    "clip_guidance": {"scale": 1.0},
    "latent_blend": {"steps": [[0.0, 1.0]], "mask": "mask:user"},
}


def pipe(attention: int = 1) -> DDPMPipeline:
    """A random pixel model that takes seven times as long as the toybox's CLIP with four copies,
    forward and back, as ADM would beside ViT-B/16. attention: at how many of three resolutions, the
    coarsest first; ADM's, at an eighth of the side and below, is a hundredth of its work."""
    down = ["AttnDownBlock2D" if level >= 3 - attention else "DownBlock2D" for level in range(3)]
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(128, 160, 192),
        layers_per_block=2,
        attention_head_dim=32,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
    ).eval()
    return DDPMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))


class ForwardAgain(Plugin):
    """The published order: the solver's prediction, then the same one again for its gradient."""

    @hookimpl
    def inlay_pre_step(self, run, step):
        with torch.no_grad():
            self.seen = run.backbone.denoiser(step.x["edit"], step.t).sample


def runner(plugins, attention=1, **gradient):
    session = Session(pipe(attention), plugins, gradient=Gradient(alpha_min=0.0, **gradient))
    g = torch.Generator().manual_seed(1)
    picture, mask = torch.rand(1, 3, SIDE, SIDE, generator=g), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 16:48, 16:48] = 1

    def run():
        return session.run("a red bus", picture, mask, steps=STEPS).latents["edit"]

    return run


def bench_one_forward_where_the_published_code_runs_two(benchmark):
    one, two = runner(PLUGINS), runner({"again": ForwardAgain()} | PLUGINS)
    assert torch.equal(one(), two())
    times = ratio(benchmark, one, two, 5)
    faster = 1 / times["ratio"]
    what = f"guided run of {STEPS} steps, one forward each against two"
    report("guidance-forward", what, "≥ 1.4×", faster, faster >= 1.4,
           seconds=times["ours"])  # fmt: skip


@pytest.mark.parametrize(("attention", "limit"), [(1, 2.2), (2, 2.5)])
def bench_a_guided_step_against_a_plain_one(benchmark, attention, limit):
    """Beside the model in ADM's proportions one that spends a fifth of its work on attention, whose
    backward costs three times its forward; that of a convolution costs as much as its forward."""
    guided, plain = runner(PLUGINS, attention), runner({}, attention)
    times = ratio(benchmark, guided, plain, 9)
    what = f"guided run of {STEPS} steps against an unguided one, 4 copies for CLIP"
    what += ", a fifth of the model's work in attention" if attention > 1 else ""
    report(f"guidance-step-{attention}", what, f"≤ {limit}×", times["ratio"],
           times["ratio"] <= limit, seconds=times["ours"])  # fmt: skip


def bench_what_checkpointing_keeps_for_the_backward(benchmark):
    """Bytes of distinct tensors that the graph holds, parameters aside."""

    def kept(run):
        storages = {}

        def keep(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            latent = run()
        return sum(storages.values()), latent

    plain, light = runner(PLUGINS), runner(PLUGINS, checkpoint=True)
    (whole, expected), (less, latent) = kept(plain), kept(light)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)
    times = ratio(benchmark, light, plain, 3)
    saved = 1 - less / whole
    what = "bytes kept for the backward that checkpointing saves"
    report("guidance-memory", what, "≥ 40 %", saved, saved >= 0.4,
           kept_mib=whole / 2**20, time=times["ratio"])  # fmt: skip


def bench_all_copies_in_one_batch(benchmark):
    """Forward and back through CLIP, of eight warped copies at once and one by one."""
    clip = clips.load("toybox/clip")
    target = clips.Target.of(clip, {"a red bus": 1.0}, {}, "")
    copies = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def slope(at_once):
        def run():
            seen = copies.clone().requires_grad_()
            vectors = torch.cat([clip.images(part) for part in seen.split(at_once)])
            loss = target.distances(vectors, "spherical").mean()
            return torch.autograd.grad(loss, seen)[0]

        return run

    together, singly = slope(8), slope(1)
    torch.testing.assert_close(together(), singly(), rtol=1e-4, atol=1e-7)
    times = ratio(benchmark, together, singly, 9)
    faster = 1 / times["ratio"]
    report("guidance-copies", "8 copies for CLIP in one batch against one by one", "> 1×", faster,
           faster > 1, seconds=times["ours"])  # fmt: skip


def bench_ranking_in_batches(benchmark):
    pictures = torch.rand(64, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    scores = []
    for batch in (32, 1):
        rank = Rank(Rank.Config(scope="image", batch=batch))
        rank.texts, rank.files = {"a red bus": 1.0}, {}
        scores.append(lambda rank=rank: rank.scores(pictures, None))
    with torch.no_grad():
        torch.testing.assert_close(scores[0](), scores[1]())
        times = ratio(benchmark, *scores, 7)
    faster = 1 / times["ratio"]
    report("ranking", "64 candidates ranked 32 at a time against one by one", "> 1×", faster,
           faster > 1, seconds=times["ours"])  # fmt: skip
