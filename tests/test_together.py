"""Experiments of several methods in one file: each of them acts, and none undoes another."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from inlay import Session, backbones
from inlay.events import Result
from inlay_config import config, registry
from inlay_plugins import masks

STEPS = 8


@cache
def pipe(model: str) -> Any:
    return backbones.load(registry.resolve_model(model), device="cpu")


def run(name: str, *without: str) -> tuple[Session, Result]:
    """A shipped experiment in few steps, without some of its plugins."""
    said = [f"plugins.{plugin}=null" for plugin in without]
    exp = config.load(name, [f"steps={STEPS}", *said])
    session = Session(pipe(exp.model), exp.plugins, gradient=exp.gradient)
    asked = {key: getattr(exp, key) for key in ("guidance", "true_cfg", "steps", "seed")}
    return session, session.run(config.to_dict(exp)["prompt"], **asked)


def outside(session: Session, mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """The latent's cells that no part of the mask touches."""
    grid = session.backbone.grid(session.backbone.native_size)
    keep = session.backbone.from_grid(masks.resize(mask, grid))
    return latent[(keep == 0).expand_as(latent)]


def test_prompt_to_prompt_acts_in_the_box_and_outside_it_the_source_is_back() -> None:
    session, both = run("p2p_blending")
    _, blended = run("p2p_blending", "prompt_to_prompt")
    _, replaced = run("p2p_blending", "latent_blend")
    mask, source = both.board["mask:region"], both.board["latent:source"]
    kept = outside(session, mask, source)
    assert 0 < kept.numel() < source.numel()
    assert torch.equal(outside(session, mask, both.latents["edit"]), kept)
    assert not torch.equal(outside(session, mask, replaced.latents["edit"]), kept)
    far = [(r.latents["edit"] - source).square().mean() for r in (both, blended)]
    assert 0 < far[0] < far[1]  # the source's attention maps keep more of it inside, too


def test_clip_guides_add_it_in_the_mask_that_it_found() -> None:
    session, guided = run("clip_guided_addit")
    _, plain = run("clip_guided_addit", "clip_guidance")
    mask = guided.board["mask:subject"]
    assert torch.equal(mask, plain.board["mask:subject"])  # it is found before the first gradient
    latents = [r.latents["edit"] for r in (guided, plain)]
    assert not torch.equal(*latents)
    inside = session.backbone.from_grid(mask).bool().expand_as(latents[0])
    moved = (latents[0] - latents[1]).abs()
    assert moved[inside].mean() > moved[~inside].mean()
