"""What stays true of every first-party plugin, whatever it is composed with.

One case per plugin: the options and companions it is run with, a sentence, and the check of it. A
check is called as `holds(made, without)`: the run of a pair, and the run without this plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import inlay_toybox
from inlay.backbones import text
from inlay_plugins import clips, masks
from invariants_pictured import (
    crop_and_zoom,
    exemplar,
    exemplar_attention,
    extrapolate,
    imitation,
    instruct,
    scribble,
)

CLOSE = {"rtol": 1e-3, "atol": 1e-5}
SHOWN = Path(inlay_toybox.__file__).parent / "sprites" / "1f335.webp"


@dataclass(frozen=True)
class Case:
    """says: the invariant, for docs/compose.md; holds: its check; companions: plugins that provide
    what this one asks for; beside: further options where the other plugin would undo its effect;
    draws: whether it changes the picture, else it only publishes `board`. model: the kind that it
    needs, where it is none of the matrix's; the plugin's own test then runs the check.
    """

    says: str
    holds: Callable
    options: dict = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    beside: dict[str, dict] = field(default_factory=dict)
    draws: bool = True
    board: tuple[str, ...] = ()
    model: str = ""


def source_trajectory(made, without):
    trajectory, clean = made.board["trajectory:source"], made.board["latent:source"]
    noise = made.record.run.x_T["edit", "source"]
    for step in made.record.steps:
        assert torch.equal(trajectory(step, 0), step.frame.noise(clean, noise))
        if "source" in step.lanes and "null_text" not in made.plugins:  # which leads it itself
            assert torch.equal(step.x["source"], trajectory(step, 0))


def structure_transfer(made, without):
    (step,) = (step for step in made.record.steps if step.index == 1)
    noise = made.record.run.x_T["edit", "edit"]
    assert torch.equal(step.x["edit"], step.frame.noise(made.board["latent:source"], noise))


def weighted_attention(made, without):
    for call, branch in made.record.edited("weighted_attention"):
        role = branch.split("/")[1]
        twin = f"source/{role}" if f"source/{role}" in call.program.rows else "source/text"
        assert (call.share(branch, (twin, "image")) > 0).all()


def mutual_self_attention(made, without):
    for call, branch in made.record.edited("mutual_self_attention"):
        assert (call.share(branch, (branch, "image")) == 0).all()


def shared_attention(made, without):
    for call, branch in made.record.edited("shared_attention"):
        role = branch.split("/")[1]
        twin = f"reference/{role}" if f"reference/{role}" in call.program.rows else "reference/text"
        assert (call.share(branch, (twin, "image")) > 0).all()


def subject_mask(made, without):
    heat, mask = made.board["map:subject"], made.board["mask:subject"]
    assert torch.equal(mask, masks.otsu(heat)) and 0 < mask.mean() < 1
    assert torch.equal(made.picture, without.picture)


def latent_blend(made, without):
    run, trajectory = made.record.run, made.board["trajectory:source"]
    mask = masks.resize(made.board["mask:user"], run.backbone.grid(run.size))
    outside = (run.backbone.from_grid(mask) == 0).expand_as(made.record.steps[0].x["edit"])
    assert outside.any()
    for step in (step for step in made.record.steps if step.index >= 2):
        lane = made.plugins["latent_blend"].get("background") == "lane"
        source = step.x_next["source"] if lane else trajectory(step, 1)
        assert torch.equal(step.x_next["edit"][outside], source[outside])


def paste_back(made, without):
    near = F.max_pool2d(made.board["mask:user"], 5, 1, 2)  # a feather of 2 pixels
    outside = (near == 0).expand_as(made.picture)
    assert outside.any()
    assert torch.equal(made.picture[outside], made.board["image:original"][outside])


def reweight(made, without):
    tokens = made.record.run.words["reweight/grass"]
    for call, branch in made.record.edited("reweight"):
        ours, plain = (call.share(branch, (branch, tokens), without=w) for w in ("", "reweight"))
        torch.testing.assert_close(ours, 3 * plain, **CLOSE)


def pag(made, without):
    for step in made.record.steps:
        guided = made.record.guided[step.eval, "edit"]
        moved = 1.5 * (step.preds["edit/text"] - step.preds["edit/pag"])
        torch.testing.assert_close(step.output["edit"], guided + moved)
        assert moved.abs().max() > 0
    for call, branch in made.record.edited("pag"):
        places = torch.rand(*call.args[1].shape[1:3], 1).expand(*call.args[1].shape[:3], 1)
        assert torch.equal(call.of(branch, call.answer(places)), call.of(branch, places))


def guider(made, without):
    for step in made.record.steps:
        text, null = step.preds["edit/text"], step.preds["edit/null"]
        added = made.record.guided[step.eval, "edit"] - null
        assert (added * text).sum().abs() < 1e-4 * added.norm() * text.norm()


def regional_prompts(made, without):
    tokens = made.record.run.words["regional_prompts/0"]
    for call, branch in made.record.edited("regional_prompts"):
        seen = (branch, tokens), (branch, (0,))
        ours, plain = (call.share(branch, *seen, without=w) for w in ("", "regional_prompts"))
        odds = (ours[..., 0] / ours[..., 1]) / (plain[..., 0] / plain[..., 1])
        side = round(odds.shape[2] ** 0.5)
        inside = (torch.arange(odds.shape[2]) % side < side / 2).expand_as(odds)
        torch.testing.assert_close(odds[inside], torch.ones_like(odds[inside]), **CLOSE)
        lowered = torch.full_like(odds[~inside], -4.0).exp()
        torch.testing.assert_close(odds[~inside], lowered, **CLOSE)


def attention_maps(made, without):
    heat = made.board["map:cow"]
    assert (float(heat.min()), float(heat.max())) == (0.0, 1.0)
    assert torch.equal(made.picture, without.picture)


def region(made, without):
    mask = made.board["mask:region"]
    grown = F.max_pool2d(made.board["mask:user"], 5, 1, 2)
    assert torch.equal(mask, 1 - grown)
    assert torch.equal(made.picture, without.picture)


def pixel_blend(made, without):
    (step,), run = [s for s in made.record.steps if s.index == 1], made.record.run
    picture, mask = run.backbone.pixels(step.x0["edit"], run.size), made.board["mask:user"]
    mixed = mask * (picture / 2 + 0.5) + (1 - mask) * made.board["image:source"]
    with torch.no_grad():
        clean = run.backbone.encode_image(mixed)
    noised = step.next_frame.noise(clean, run.noise("pixel_blend/1", clean.shape))
    torch.testing.assert_close(step.x_next["edit"], noised)


def rank(made, without):
    alone = without.picture[made.board["rank:order"]]
    assert torch.equal(made.picture, alone)
    assert (made.board["rank:scores"].diff() >= 0).all()


def extending_augmentations(made, without):
    augment, mask = made.board["augment:clip"], torch.ones(1, 1, 1, 1)
    copies = [augment(made.picture, mask, 16, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*copies) and len(copies[0]) == 3 * len(made.picture)
    assert torch.equal(copies[0][:1], F.adaptive_avg_pool2d(made.picture, 16))


LOSSES = ("clip_guidance", "range_loss", "background_loss")


def guided_by(plugin):
    """The estimate moves against the slope of the loss, added to those of other plugins."""

    def holds(made, without):
        run, (step,) = made.record.run, [s for s in made.record.steps if s.index == 1]
        run.hook.inlay_begin(run=run, pass_="none", x={})  # draws of augmentations begin again
        x0 = step.unguided["edit"]
        slopes = {name: torch.zeros_like(x0) for name in (plugin, *LOSSES)}
        for name in (name for name in LOSSES if name in made.plugins):
            with torch.enable_grad():
                leaf = x0.detach().requires_grad_()
                looked = replace(step, x=step.x)
                looked.x0.offer("edit", leaf)
                (loss,) = run.hook_of("inlay_objective", name)(run=run, step=looked, lane="edit")
                (slopes[name],) = torch.autograd.grad(loss.sum(), leaf)
        assert slopes[plugin].abs().max() > 0
        scale = step.frame.sigma**2 / step.frame.alpha**2
        torch.testing.assert_close(x0 - step.x0["edit"], scale * sum(slopes.values()), **CLOSE)

    return holds


def prompt_to_prompt(made, without):
    run = made.record.run
    cow = text.find(run.conds["edit/text"], "cow")
    tokens = range(len(run.conds["source/text"].tokens))
    for call, branch in made.record.edited("prompt_to_prompt"):
        if "text" in call.spans:
            twins = run.board["columns:edit"](call.step).matrix[: len(tokens), list(cow)]
            theirs = call.share("source/text", *(("source/text", (token,)) for token in tokens))
            ours = call.share(branch, *((branch, (token,)) for token in cow))
            torch.testing.assert_close(ours, theirs @ twins.to(theirs), **CLOSE)


def local_blend(made, without):
    last, run = made.record.steps[-1], made.record.run
    outside = run.backbone.from_grid(made.board["mask:local_blend"]) == 0
    outside = outside.expand_as(last.x_next["edit"])
    assert outside.any()
    assert torch.equal(last.x_next["edit"][outside], last.x_next["source"][outside])


def sdedit(made, without):
    (step,) = (step for step in made.record.steps if step.index == 1)
    noise = made.record.run.x_T["edit", "edit"]
    assert torch.equal(step.x["edit"], step.frame.noise(made.board["latent:source"], noise))


def flow_edit(made, without):
    run, clean = made.record.run, made.board["latent:source"]
    steps = [step for step in made.record.steps if "flow_source" in step.lanes]
    assert steps and torch.equal(steps[0].x["edit"], steps[0].x["flow_source"])
    for step in steps:
        noise = run.noise(f"flow_edit/flow_source/{step.eval}", clean.shape)
        assert torch.equal(step.x["flow_source"], step.frame.noise(clean, noise))


def rf_inversion(made, without):
    first = made.record.steps[0]
    estimate, clean = made.record.estimated[first.eval], made.board["latent:source"]
    assert torch.equal(first.x["edit"], made.record.run.finals["rf_inversion"]["inverted"])
    torch.testing.assert_close(first.x0["edit"], estimate + 0.9 * (clean - estimate))


def presence(made, without):
    run, clip = made.record.run, clips.load("toybox/clip")
    square = F.interpolate(made.picture, [clip.side] * 2, mode="bilinear", antialias=True)
    texts = clip.texts([run.prompts["edit"], run.prompts["source"]])
    nearness = clip.images(square) @ texts.T
    torch.testing.assert_close(made.board["presence:scores"], nearness[:, 0] - nearness[:, 1])
    assert torch.equal(made.picture, without.picture)


def latent_optimisation(made, without):
    run = made.record.run
    mask = masks.resize(made.board["mask:user"], run.backbone.grid(run.size))
    moved = (made.result.latents["edit"] - made.board["latent:source"]).abs()
    assert (moved * (run.backbone.from_grid(mask) == 0)).max() == 0 < moved.max()
    assert not made.record.steps


def attention_injection(made, without):
    """The edit's own queries and keys of the picture may be anything."""
    generator = torch.Generator().manual_seed(0)
    for call, branch in made.record.edited("attention_injection"):
        q, k, v, *rest = call.args
        changed, spans = (q.clone(), k.clone()), call.program.spans(q.shape[2], k.shape[2])
        for x, named in zip(changed, spans, strict=True):
            own = x[call.program.rows[branch], :, named["image"]]
            own.copy_(torch.randn(own.shape, generator=generator))
        other = replace(call, args=(*changed, v, *rest)).answer(v)
        assert torch.equal(call.of(branch, other), call.of(branch, call.answer(v)))


def null_text(made, without):
    run, first = made.record.run, made.record.steps[0]
    assert torch.equal(first.x["edit"], run.finals["null_text"]["inverted"])
    for step in made.record.steps:
        null, text = step.preds["source/null_text"], step.preds["source/text"]
        torch.testing.assert_close(step.output["source"], null + 3 * (text - null))
    assert run.conds["edit/null"] is run.conds["source/null_text"]


def letterbox(made, without):
    assert made.board["box:picture"] == (0, 0, *made.board["image:source"].shape[:-3:-1])
    assert torch.equal(made.board["image:source"], without.board["image:source"])
    assert torch.equal(made.picture, without.picture)


def reconstruct_background(made, without):
    run, mask = made.record.run, made.board["mask:user"]
    plain = run.backbone.decode(made.result.latents["edit"], run.size)
    off = [((x - made.board["image:source"]) * (1 - mask)).square().mean() for x in
           (made.picture, plain)]  # fmt: skip
    assert off[0] < off[1]


def ip_adapter(made, without):
    assert made.board["kv:picture"] == {}  # its tensors are not kept
    assert not torch.equal(made.latents["edit"], without.latents["edit"])


CASES = {
    "crop_and_zoom": Case(
        "where nothing is enlarged the box is the picture, and no bit of the picture changes",
        crop_and_zoom,
        {"zoom": 1.0},
        draws=False,
        board=("box:crop",),
    ),
    "letterbox": Case(
        "a picture of the frame's shape fills it, and no bit of the picture changes",
        letterbox,
        draws=False,
        board=("box:picture",),
    ),
    "source_trajectory": Case(
        "at every step the lane `source` is the source picture at that step's noise level",
        source_trajectory,
        draws=False,
        board=("latent:source", "trajectory:source"),
    ),
    "structure_transfer": Case(
        "at its step the edit is the source picture, noised with the edit's own noise, bit for bit",
        structure_transfer,
        {"step": 1},
        ("source_trajectory",),
    ),
    "weighted_attention": Case(
        "inside its windows every image query of the edit attends to the source's image keys",
        weighted_attention,
        companions=("source_trajectory",),
    ),
    "subject_mask": Case(
        "its mask is its map above Otsu's threshold, and no bit of the picture changes",
        subject_mask,
        draws=False,
        board=("map:subject", "mask:subject", "points:subject"),
    ),
    "latent_blend": Case(
        "after its steps the latent outside the mask is the source's, bit for bit",
        latent_blend,
        {"steps": [[2, 3]], "mask": "mask:user"},
        ("source_trajectory",),
        {"local_blend": {"background": "lane"}},
    ),
    "paste_back": Case(
        "outside the mask and its feather the pixels are the original's, bit for bit",
        paste_back,
        {"feather": 2, "mask": "mask:user"},
    ),
    "reweight": Case(
        "the picture pays each word exactly its weight times the attention it would pay otherwise",
        reweight,
        {"words": {"grass": 3.0}},
    ),
    "pag": Case(
        "in its branch each image query sees itself alone, and the output moves by the scale times "
        "the difference to that branch",
        pag,
        {"scale": 1.5},
    ),
    "guider": Case(
        "what projected guidance adds to the null prediction is orthogonal to the text prediction",
        guider,
        {"options": {"eta": 0.0, "adaptive_projected_guidance_rescale": 0.0}},
    ),
    "mutual_self_attention": Case(
        "inside its window no image query of the edit gets a value of the edit's own picture",
        mutual_self_attention,
        {"active": [1, 3]},
        ("source_trajectory",),
    ),
    "shared_attention": Case(
        "every image query of the edit attends to the reference's image keys",
        shared_attention,
    ),
    "regional_prompts": Case(
        "outside the region the logits of its words are lowered by the strength, inside by nothing",
        regional_prompts,
        {"regions": [{"words": "cow", "box": [0, 0, 0.5, 1]}], "strength": 4.0},
        beside={"prompt_to_prompt": {"active": [2, 3]}},
    ),
    "attention_maps": Case(
        "its maps span 0 to 1, and no bit of the picture changes",
        attention_maps,
        {"words": ["cow"]},
        draws=False,
        board=("map:cow",),
    ),
    "region": Case(
        "its mask is the caller's, grown and inverted, and no bit of the picture changes",
        region,
        {"grow": 2, "invert": True},
        draws=False,
        board=("mask:region",),
    ),
    "pixel_blend": Case(
        "at its step the latent is an encoded picture whose outside is the source, noised",
        pixel_blend,
        {"active": [1, 1], "mask": "mask:user"},
        ("source_trajectory",),
    ),
    "rank": Case(
        "pictures change their order and nothing else, and the nearest to the prompt is the first",
        rank,
        {"mask": "mask:user"},
        draws=False,
        board=("rank:scores", "rank:order"),
    ),
    "extending_augmentations": Case(
        "of each picture the first copy is untouched, and a seed repeats the others",
        extending_augmentations,
        {"copies": 3},
        ("clip_guidance",),
        board=("augment:clip",),
    ),
    "clip_guidance": Case(
        "the clean estimate moves against the slope of its loss, added to those of other plugins",
        guided_by("clip_guidance"),
        {"active": [1, 1], "through": "x0", "scale": 100.0},
    ),
    "range_loss": Case(
        "the clean estimate moves against the slope of its loss, added to those of other plugins",
        guided_by("range_loss"),
        {"active": [1, 1], "through": "x0", "scale": 1e4, "limit": 0.3},
    ),
    "background_loss": Case(
        "the clean estimate moves against the slope of its loss, added to those of other plugins",
        guided_by("background_loss"),
        {"active": [1, 1], "through": "x0", "lpips": 0.0},
        ("source_trajectory",),
    ),
    "prompt_to_prompt": Case(
        "the picture pays each token what the source's picture pays to its twin",
        prompt_to_prompt,
        {"cross_replace": 0.5},
        ("source_trajectory",),
    ),
    "local_blend": Case(
        "after its steps the latent outside its mask is the source lane's, bit for bit",
        local_blend,
        {"words": "cow", "source_words": "view", "threshold": 0.7},
        ("source_trajectory",),
        board=("mask:local_blend",),
    ),
    "sdedit": Case(
        "at its first step the edit is the source picture, noised, bit for bit",
        sdedit,
        {"strength": 0.75},
        ("source_trajectory",),
    ),
    "flow_edit": Case(
        "it starts at the source, and the lane beside it is the source under noise drawn anew",
        flow_edit,
        {"n_max": 3},
        ("source_trajectory",),
    ),
    "rf_inversion": Case(
        "it starts from the inverted source, and goes its share of the way back to it in each step "
        "of its window",
        rf_inversion,
        companions=("source_trajectory",),
    ),
    "presence": Case(
        "its score is how much nearer CLIP finds the picture to the edit's prompt than to the "
        "source's, and no bit of the picture changes",
        presence,
        draws=False,
        board=("presence:scores",),
    ),
    "attention_injection": Case(
        "where it acts, the edit's picture is answered without any query or key of its own",
        attention_injection,
        {"active": [0, 1]},
        ("source_trajectory",),
    ),
    "null_text": Case(
        "the edit starts where the inverted source ends, and both are guided from one null prompt",
        null_text,
        {"iterations": 1},
        ("source_trajectory",),
    ),
    "instruct": Case(
        "the output is 1 - s_I parts of the row that sees nothing, s_I - s_T of the one that sees "
        "the picture, and s_T of the one that sees picture and instruction",
        instruct,
        model="instruct-pix2pix",
    ),
    "reconstruct_background": Case(
        "outside the mask its picture is nearer to the source than the decoded latent is",
        reconstruct_background,
        {"steps": 5, "rate": 1e-3, "mask": "mask:user"},
    ),
    "ip_adapter": Case(
        "the picture's tokens are attended to beside the words, by a softmax of their own",
        ip_adapter,
        board=("kv:picture", "kv:no_picture"),
        model="an IP-Adapter's weights",
    ),
    "exemplar": Case(
        "the prompt is one token of the exemplar, the null prompt the model's own, and guidance "
        "the scale between them",
        exemplar,
        model="paint-by-example",
    ),
    "scribble": Case(
        "its picture has the strokes in it and is the source outside the mask, and no bit of the "
        "edit changes until a plugin starts from it",
        scribble,
        {"strokes": [{"colour": "red", "points": [[0.5, 0.7]]}]},
        ("source_trajectory",),
        draws=False,
        board=("latent:scribbled",),
    ),
    "extrapolate": Case(
        "the picture is larger, and the pixels that were there are the original's, bit for bit",
        extrapolate,
        model="pictures that grow",
    ),
    "latent_optimisation": Case(
        "the denoiser draws nothing of the edit, and latents outside the mask are the source's, "
        "bit for bit",
        latent_optimisation,
        model="losses in a denoiser's place",
    ),
    "exemplar_attention": Case(
        "inside the mask, and nowhere else, the edit's picture looks at the exemplar, in rows with "
        "the prompt",
        exemplar_attention,
        {"image": str(SHOWN)},
    ),
    "imitation": Case(
        "the null prompt is CLIP's view of nothing; in the middle and on the way up the other row "
        "answers half by its own map, half by one over the exemplar's tokens too",
        imitation,
        model="mimicbrush",
    ),
}
