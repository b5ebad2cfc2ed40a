"""A picture that is looked at without training: where it is seen, by whom, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import compositions
import inlay
from inlay import ConfigError, InputError, PlanConflict
from inlay_config.images import to_pil, to_tensor
from inlay_plugins.masks import resize_bicubic as resize
from models import conds, flux, stable_diffusion
from spies import plugin

DRAW = torch.Generator().manual_seed(5)
PICTURE, SHOWN = (
    to_pil(torch.rand(1, 3, *size, generator=DRAW))[0] for size in [(32, 32), (40, 24)]
)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 8:24, 16:32] = 1


def run(pipe, options, beside=None, mask=MASK, image=PICTURE, tracer=None, **asked):
    plugins = {"exemplar_attention": options, **(beside or {})}
    session = inlay.Session(pipe, plugins, device="cpu", tracer=tracer)
    given = {"image": image, "mask": None if mask is None else to_pil(mask)[0]}
    prompt = {"source": "a road", "edit": "a dog"}
    asked = {
        "steps": 3,
        "seed": 3,
        "size": 32,
        "conds": conds(),
    } | asked
    return session.run(prompt, **given, **asked)


def explicit(call, rows, other, looks, scale, shift):
    """One softmax over own and foreign keys, written out, for queries that look."""
    q, k, v = call.args[:3]
    own = torch.einsum("bhnd,bhmd->bhnm", q[rows], k[rows]) / q.shape[3] ** 0.5
    theirs = torch.einsum("bhnd,bhmd->bhnm", q[rows], k[other]) / q.shape[3] ** 0.5
    theirs = theirs * scale + shift
    theirs = theirs.masked_fill(~looks.view(1, 1, -1, 1), float("-inf"))
    return torch.cat([own, theirs], 3).softmax(3) @ torch.cat([v[rows], v[other]], 2)


def test_queries_inside_the_mask_see_it_and_no_others(shown):
    recorder, options = compositions.Recorder(), {"image": shown, "scale": 1.2, "shift": 0.7}
    run(stable_diffusion(), options, {"recorder": recorder}, tracer=recorder, guidance=5.0)
    edited = recorder.edited("exemplar_attention")
    assert {branch for _, branch in edited} == {"edit/text"}
    for call, branch in edited:
        rows, other = (call.program.rows[name] for name in (branch, "exemplar/text"))
        side = int(call.args[0].shape[2] ** 0.5)
        looks = F.adaptive_avg_pool2d(MASK, side).flatten() >= 0.5
        wanted = explicit(call, rows, other, looks, 1.2, 0.7)
        made = call.answer(call.args[2])[rows]
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [flux, stable_diffusion])
def test_it_lies_in_the_box_at_the_noise_of_the_step(shown, make):
    """Around it the picture; or it fills the frame. The lane is that picture with one noise."""
    pipe, seen = make(), {}
    for place in ("box", "frame"):
        kept = []
        watch = plugin(
            post_step=lambda run, step, kept=kept: kept.append(
                (step.frame, step.x["exemplar"], run.x_T["edit", "exemplar"])
            )
        )
        options = {"image": shown, "place": place, "active": [0.0, 1.0]}
        run(pipe, options, {"watch": watch})
        backbone = inlay.Session(pipe).backbone
        whole = to_tensor(PICTURE)
        if place == "box":
            whole[..., 8:24, 16:32] = resize(to_tensor(SHOWN), (16, 16))
        else:
            whole = F.pad(resize(to_tensor(SHOWN), (32, 19)), (6, 7), value=1.0)
        with torch.no_grad():
            clean = backbone.encode_image(whole)
        assert len(kept) == 3
        for frame, x, noise in kept:
            torch.testing.assert_close(x, frame.noise(clean, noise), rtol=1e-4, atol=1e-4)
        seen[place] = clean
    assert not torch.equal(seen["box"], seen["frame"])


def test_one_exemplar_serves_several_pictures(shown):
    both = run(flux(), {"image": shown}, n=2).latents["edit"]
    other = run(flux(), {"image": shown, "seed": 1}, n=2).latents["edit"]
    assert both.shape[0] == 2 and not torch.equal(both, other)


def test_what_cannot_be_used_is_refused(shown, tmp_path):
    pipe = flux()
    Image.new("RGB", (90, 4)).save(tmp_path / "tiny.png")
    where = r"plugins\.exemplar_attention"
    with pytest.raises(ConfigError, match=where + r"\.image: there is no exemplar"):
        run(pipe, {})
    with pytest.raises(InputError, match=where + r"\.image: .*90x4 pixels"):
        run(pipe, {"image": str(tmp_path / "tiny.png")})
    with pytest.raises(ConfigError, match=where + r"\.scale: 0\.0 turns"):
        run(pipe, {"image": shown, "scale": 0.0})
    with pytest.raises(PlanConflict, match="exemplar_attention needs 'mask:user'"):
        run(pipe, {"image": shown}, mask=None)
    with pytest.raises(InputError, match=where + ": the mask is empty"):
        run(pipe, {"image": shown}, mask=torch.zeros(1, 1, 32, 32))
