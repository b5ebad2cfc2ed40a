"""Add-it against plain sampling of as many rows, and the rows that it leaves out."""

import pytest
import torch
from bench_session import toybox_flux
from pairs import ratio, report

import inlay
from inlay_attention import Store
from inlay_config.config import Experiment, Prompt
from models import flux

STEPS = 30
PLUGINS = {
    "source_trajectory": {},
    "structure_transfer": {},
    "weighted_attention": {},
    "subject_mask": {"subject": "dog"},
    "latent_blend": {},
}
READING = ("subject_mask", "latent_blend")


@pytest.mark.parametrize("probe", [False, True], ids=["edits", "edits and a probe"])
def bench_addit_against_two_rows(benchmark, probe):
    """Row skipping off: 30 steps of two rows on both sides."""
    pipe, given, options = toybox_flux()
    pipe.set_progress_bar_config(disable=True)
    size = options["size"]
    cond = given["edit"] | {"tokens": ["dog</w>"] + ["<pad>"] * 31}
    picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    plugins = {name: options for name, options in PLUGINS.items() if probe or name not in READING}
    session = inlay.Session(pipe, plugins, skip_dead_rows=False)
    prompts = {"source": "a road", "edit": "a dog"}
    call = {
        "prompt_embeds": cond["embeds"].expand(2, -1, -1),
        "pooled_prompt_embeds": cond["pooled"].expand(2, -1),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "output_type": "latent",
        "height": size,
        "width": size,
    }

    def ours():
        ready = {"source": cond, "edit": cond}
        return session.run(prompts, picture, conds=ready, steps=STEPS, seed=3, size=size)

    def theirs():
        return pipe(**call, generator=torch.Generator().manual_seed(3)).images

    made = ratio(benchmark, ours, theirs, rounds=9)
    aim, value = 1.25 if probe else 1.15, made.pop("ratio")
    kind = "with the subject's probe and blending" if probe else "without a probe"
    what = f"Add-it / two rows of the stock pipeline, toybox/flux, {kind}"
    name = f"addit_{'probe' if probe else 'edits'}"
    report(name, what, f"at most {aim}", value, value <= aim, **made)


def bench_forward_units(benchmark):
    """One unit is one row in one step. The plan knows: nothing is run."""
    pipe = flux()
    units = {}

    def count():
        for name, skip in (("skipping", True), ("all", False)):
            session = inlay.Session(pipe, PLUGINS, skip_dead_rows=skip)
            prompt = Prompt(source="a road", edit="a dog on a road")
            asked = Experiment(prompt=prompt, steps=STEPS, size=[32, 32], guidance=3.5)
            units[name] = sum(session.plan(asked, None, ["image"]).evaluations.values())

    benchmark.pedantic(count, rounds=3)
    what = f"forward units of Add-it on a picture, {STEPS} steps, of {units['all']}"
    report("units", what, "43 of 60", units["skipping"], units == {"skipping": 43, "all": 60})


def bench_forward_units_of_further_seeds(benchmark):
    """More seeds of one source: rows of the edit alone, where the source is there already."""
    pipe, store, units = flux(), Store(), {}

    def count():
        for name, n, kept in (("batch", 8, None), ("stored", 1, store)):
            session = inlay.Session(pipe, PLUGINS, store=kept)
            prompt = Prompt(source="a road", edit="a dog on a road")
            asked = Experiment(prompt=prompt, steps=STEPS, size=[32, 32], guidance=3.5, n=n)
            plan = session.plan(asked, None, ["image"])
            units[name] = sum(plan.evaluations.values()) / n

    store.facts["recorded"] = "by a run before"
    benchmark.pedantic(count, rounds=3)
    what = f"forward units of Add-it per further seed, {STEPS} steps, a stored source"
    value, more = units["stored"], {"eight seeds in one batch, each": units["batch"]}
    report("units_seeds", what, "26 to 28", value, 26 <= value <= 28, **more)
