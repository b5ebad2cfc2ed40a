"""A session without plugins against the stock pipeline: same model, steps and decoding."""

import resource
import statistics
import subprocess
import sys

import pytest
import torch
from pairs import ratio, report

import inlay
from inlay.backbones import adapt
from inlay_config import registry
from models import conds, stable_diffusion

STEPS = 20


def tiny_sd():
    return stable_diffusion(), conds(pooled=False), {"guidance": 7.5}


def toybox_flux():
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(registry.resolve_model("toybox/flux"))
    cond = adapt(pipe).encode_text("a dog on the grass")
    given = {"embeds": cond.embeds, "pooled": cond.pooled}
    return pipe, {"edit": given, "negative": given}, {"guidance": 1.0, "size": 64}


@pytest.mark.parametrize("make", [tiny_sd, toybox_flux], ids=lambda f: f.__name__)
def bench_a_session_without_plugins(benchmark, make):
    pipe, given, options = make()
    pipe.set_progress_bar_config(disable=True)
    session = inlay.Session(pipe)
    call = {
        "prompt_embeds": given["edit"]["embeds"],
        "num_inference_steps": STEPS,
        "guidance_scale": options["guidance"],
        "output_type": "pt",
    }
    if session.backbone.flow:
        call["pooled_prompt_embeds"] = given["edit"]["pooled"]
    else:
        call["negative_prompt_embeds"] = given["negative"]["embeds"]
    call |= {"height": options["size"], "width": options["size"]} if "size" in options else {}

    def ours():
        return session.run(conds=given, steps=STEPS, seed=3, **options).images["edit"]

    def theirs():
        return pipe(**call, generator=torch.Generator().manual_seed(3)).images

    assert torch.equal(ours(), theirs())
    made = ratio(benchmark, ours, theirs, rounds=15)
    name = make.__name__.replace("_", " ")
    what = f"session without plugins / stock pipeline, {name}, {STEPS} steps"
    value = made.pop("ratio")
    report(f"session_{make.__name__}", what, "at most 1.01", value, value <= 1.01, **made)


def bench_help_answers(benchmark):
    """From the shell to the text, in processor time of the child: no torch on the way."""
    times = []

    def spent():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    def call():
        begun = spent()
        code = "import sys; sys.argv = ['inlay', '--help']; from inlay.cli.main import main; main()"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(spent() - begun)

    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
    seconds = statistics.median(times)
    report("help", "`inlay --help`, seconds", "under 0.5", seconds, seconds < 0.5)
