"""Prompts of different lengths in one batch: padding is hidden at the seam, exactly."""

import pytest
import torch

import inlay
from inlay import PluginError
from inlay.backbones import text
from models import conds, flux, pixart, stable_diffusion, stable_diffusion_3
from spies import Editor, plugin

MODELS = {"flux": flux, "sd": stable_diffusion, "sd3": stable_diffusion_3, "pixart": pixart}
LENGTHS = {"source": 12, "edit": 7, "negative": 5}


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return MODELS[request.param]()


def prompts(pipe, lengths=None):
    pooled = not hasattr(pipe, "unet")
    made = conds(pooled=pooled and "PixArt" not in type(pipe).__name__)
    return {k: v | {"embeds": v["embeds"][:, : (lengths or LENGTHS)[k]]} for k, v in made.items()}


def edit(pipe, plugins=None, **options):
    options = {"conds": prompts(pipe), "steps": 2, "size": 32, "seed": 3, "guidance": 1.0} | options
    return inlay.Session(pipe, plugins or {}).run(**options).latents["edit"]


def source(need):
    need.lane("source", prompt="source", seed=9, keep=False)


def test_a_short_prompt_beside_a_long_one_is_as_alone(pipe):
    together = edit(pipe, {"source": plugin(declare=source)})
    torch.testing.assert_close(together, edit(pipe), rtol=0, atol=2e-5)


def test_the_padding_would_be_seen_if_it_were_not_hidden(pipe):
    """The same zeros, said to be part of the prompt, change the picture: the test can fail."""
    longer = prompts(pipe)
    longer["edit"]["embeds"] = torch.nn.functional.pad(longer["edit"]["embeds"], (0, 0, 0, 5))
    assert not torch.allclose(edit(pipe, conds=longer), edit(pipe), atol=1e-4)


def test_edits_act_on_what_is_left(pipe):
    keys = {"options": {"keys": "text", "gain": 1.7}, "select": {"kind": ("cross", "joint")}}
    alone = edit(pipe, {"gain": Editor(**keys)})
    together = edit(pipe, {"source": plugin(declare=source), "gain": Editor(**keys)})
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert not torch.allclose(alone, edit(pipe), atol=1e-4)


def test_guidance_with_a_shorter_negative_prompt():
    """Two rows of one call against the two predictions made apart."""
    pipe, seen = stable_diffusion(), {}
    look = plugin(observe=lambda step: seen.update(step.preds) if step.index == 0 else None)
    edit(pipe, {"look": look}, guidance=3.0)
    for branch, prompt in (("edit/text", "edit"), ("edit/null", "negative")):
        given, alone = prompts(pipe), {}
        given["edit"] = given[prompt]
        watch = plugin(observe=lambda step, a=alone: a.setdefault(0, step.preds["edit/text"]))
        edit(pipe, {"watch": watch}, conds=given)
        torch.testing.assert_close(seen[branch], alone[0], rtol=0, atol=2e-5)


def test_equal_prompts_are_left_alone():
    given = {k: text.Cond(**v) for k, v in prompts(flux(), dict.fromkeys(LENGTHS, 7)).items()}
    padded, lengths = text.even(given)
    assert lengths == {}
    assert all(torch.equal(padded[k].embeds, given[k].embeds) for k in given)


def test_evaluations_on_request_need_prompts_of_one_length():
    ask = plugin(
        declare=lambda need: [source(need), need.evaluations(9)],
        post_step=lambda run, step: run.evaluate(step, {"edit/text": step.x["edit"]}),
    )
    with pytest.raises(PluginError, match=r"run\.evaluate: prompts differ in length"):
        edit(flux(), {"ask": ask})
