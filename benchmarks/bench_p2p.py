"""Prompt-to-Prompt against two pictures of the stock pipeline: as many rows, without edits."""

import pytest
import torch
from pairs import ratio, report

import inlay
from inlay.backbones import adapt
from inlay_config import registry

STEPS, GUIDANCE = 20, 3.0
PROMPTS = {"source": "a red bus on the road", "edit": "a blue bus on the road"}
P2P = {"prompt_to_prompt": {"edit": "replace", "cross_replace": 0.8, "self_replace": 0.4}}
BLENDED = P2P | {"local_blend": {"words": "bus", "maps": "made"}}


@pytest.mark.parametrize("plugins", [P2P, BLENDED], ids=["maps", "maps and local blend"])
def bench_p2p_against_two_pictures(benchmark, plugins):
    """Both decode both pictures."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(registry.resolve_model("toybox/sd"))
    pipe.set_progress_bar_config(disable=True)
    backbone, session = adapt(pipe), inlay.Session(pipe, plugins)
    conds = {k: backbone.encode_text(text) for k, text in (PROMPTS | {"negative": ""}).items()}
    call = {
        "prompt_embeds": torch.cat([conds["source"].embeds, conds["edit"].embeds]),
        "negative_prompt_embeds": conds["negative"].embeds.expand(2, -1, -1),
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "pt",
        "height": 64,
        "width": 64,
    }
    asked = {"conds": conds, "steps": STEPS, "guidance": GUIDANCE, "seed": 3, "size": 64}

    def ours():
        return session.run(PROMPTS, **asked)

    def theirs():
        return pipe(**call, generator=torch.Generator().manual_seed(3)).images

    made = ratio(benchmark, ours, theirs, rounds=9)
    blend = "local_blend" in plugins
    value = made.pop("ratio")
    what = "Prompt-to-Prompt / two pictures of the stock pipeline, toybox/sd"
    what += ", with local blending" if blend else ""
    aim = "reported" if blend else "at most 1.1"
    name = f"p2p_{'blend' if blend else 'maps'}"
    report(name, what, aim, value, blend or value <= 1.1, **made)
