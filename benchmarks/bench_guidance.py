"""Guidance by losses: forwards per step, the price of a guided step, memory; ranking."""

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from pairs import ratio, report

from inlay import Plugin, Session, hookimpl
from inlay_config.config import Gradient
from inlay_plugins.rank import Rank

SIDE, STEPS = 64, 2
PLUGINS = {
    "source_trajectory": {},
    "extending_augmentations": {"copies": 4},
    "clip_guidance": {"scale": 1.0},
    "latent_blend": {"steps": [[0.0, 1.0]], "mask": "mask:user"},
}


def pipe() -> DDPMPipeline:
    """A random pixel model that outweighs the toybox's CLIP as ADM outweighs ViT-B/16."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(96, 128, 192),
        layers_per_block=2,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return DDPMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))


class ForwardAgain(Plugin):
    """The published order: the solver's prediction, then the same one again for its gradient."""

    @hookimpl
    def inlay_pre_step(self, run, step):
        with torch.no_grad():
            self.seen = run.backbone.denoiser(step.x["edit"], step.t).sample


def runner(plugins, **gradient):
    session = Session(pipe(), plugins, gradient=Gradient(alpha_min=0.0, **gradient))
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


def bench_a_guided_step_against_a_plain_one(benchmark):
    guided, plain = runner(PLUGINS), runner({})
    times = ratio(benchmark, guided, plain, 5)
    what = f"guided run of {STEPS} steps against an unguided one, 4 copies for CLIP"
    report("guidance-step", what, "≤ 2.2×", times["ratio"], times["ratio"] <= 2.2,
           seconds=times["ours"])  # fmt: skip


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


def bench_ranking_in_batches(benchmark):
    pictures = torch.rand(64, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    scores = []
    for batch in (32, 1):
        rank = Rank(Rank.Config(scope="image", batch=batch))
        rank.texts = {"a red bus": 1.0}
        scores.append(lambda rank=rank: rank.scores(pictures, None))
    with torch.no_grad():
        torch.testing.assert_close(scores[0](), scores[1]())
        times = ratio(benchmark, *scores, 7)
    faster = 1 / times["ratio"]
    report("ranking", "64 candidates ranked 32 at a time against one by one", "> 1×", faster,
           faster > 1, seconds=times["ours"])  # fmt: skip
