"""What stays true of plugins that take a further picture or change the frame; see invariants.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from inlay_plugins import masks

CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def instruct(made, without):
    for step in made.record.steps:
        text, image, null = (step.preds[f"edit/{role}"] for role in ("text", "image", "null"))
        mixed = -0.5 * null + (1.5 - 3) * image + 3 * text  # s_I = 1.5, s_T = 3
        torch.testing.assert_close(step.output["edit"], mixed, **CLOSE)


def exemplar(made, without):
    run = made.record.run
    assert run.conds["edit/text"].embeds.shape[1] == 1
    null = run.backbone.pipe.image_encoder.uncond_vector
    assert torch.equal(run.conds["edit/null"].embeds, null)
    assert not torch.equal(run.conds["edit/text"].embeds, null)
    for step in made.record.steps:
        text, null = step.preds["edit/text"], step.preds["edit/null"]
        torch.testing.assert_close(step.output["edit"], null + 5 * (text - null))


def imitation(made, without):
    run = made.record.run
    null, text = (run.conds[f"edit/{role}"].embeds for role in ("null", "text"))
    assert torch.equal(null, run.backbone.encode_text("").embeds)
    assert text.shape == null.shape and not torch.equal(text, null)
    assert {site.split("_")[0] for site in run.plan.sites} == {"mid", "up"}
    for call in made.record.calls:
        rows, given = call.program.rows["edit/text"], call.program.given["kv:exemplar"]
        q, k, v = (part[rows] for part in call.args[:3])
        keys, values = torch.cat([k, given.k], 2), torch.cat([v, given.v / 0.5], 2)
        joint, own = (F.scaled_dot_product_attention(q, *kv) for kv in ((keys, values), (k, v)))
        answer = call.answer(call.args[2])[rows]
        torch.testing.assert_close(answer, (joint + own) / 2, rtol=1e-4, atol=1e-5)


def exemplar_attention(made, without):
    for call, branch in made.record.edited("exemplar_attention"):
        seen = call.share(branch, ("exemplar/text", "image"))[..., 0].mean(1)
        side = math.isqrt(seen.shape[1])
        looks = masks.resize(made.board["mask:user"], (side, side)).flatten() >= 0.5
        assert branch == "edit/text" and seen[:, looks].mean() > 1e-3
        assert seen[:, ~looks].max() < 1e-9


def scribble(made, without):
    drawn, mask = made.result.images["scribble"], made.board["mask:user"]
    source = made.board["image:source"]
    assert torch.equal(drawn * (mask == 0), source * (mask == 0))
    assert torch.equal(drawn[0, :, 22, 16], torch.tensor([1.0, 0, 0]))
    again = made.record.run.backbone.encode_image(drawn)
    torch.testing.assert_close(made.board["latent:scribbled"], again)


def extrapolate(made, without):
    whole, mask = made.picture, made.board["mask:new"]
    canvas = made.board["image:original"]
    assert whole.shape[-2:] == canvas.shape[-2:] == mask.shape[-2:]
    assert torch.equal(whole * (mask == 0), canvas * (mask == 0).expand_as(whole))
    assert ((whole - canvas).abs() * mask).amax((1, 2, 3)).min() > 0


def crop_and_zoom(made, without):
    assert made.board["box:crop"] == (0, 0, *made.board["image:original"].shape[:-3:-1])
    assert torch.equal(made.board["image:source"], without.board["image:source"])
    assert torch.equal(made.picture, without.picture)
