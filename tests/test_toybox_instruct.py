"""toybox/instruct, /magicbrush, /erasedraw: small, loaded by stock diffusers, do what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

import inlay
import inlay_toybox
from inlay_toybox import edits, world
from inlay_toybox.detector import Detector
from inlay_toybox.training import UNSEEN

NAMES = ("instruct", "magicbrush", "erasedraw")
SHIPPED = Path(inlay_toybox.__file__).parent / "models"


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """An empty cache, in which the models are expanded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INLAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        inlay_toybox.path.cache_clear()
        yield
    inlay_toybox.path.cache_clear()


def drawn(kind: str, n: int) -> list[edits.Edit]:
    return [edits.draw(UNSEEN + 7_000_000 + i, [kind]) for i in range(n)]


def pictures(scenes) -> torch.Tensor:
    images = [torch.from_numpy(world.render(scene).image) for scene in scenes]
    return torch.stack(images).permute(0, 3, 1, 2) / 255


def edited(name: str, asked: list[edits.Edit]) -> torch.Tensor:
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(inlay_toybox.path(name))
    pipe.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", torch.bfloat16):
        return pipe(
            [edit.instruction for edit in asked],
            pictures(edit.before for edit in asked),
            num_inference_steps=10,
            guidance_scale=3.0,
            image_guidance_scale=1.5,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images.float()


def test_they_are_small_and_say_where_they_come_from():
    files = [p for name in NAMES for p in (SHIPPED / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 2.0 * 2**20
    for name in NAMES:
        files = {p.name for p in (SHIPPED / name).rglob("*") if p.is_file()}
        assert {"delta.safetensors", "training.csv"} <= files
        configs = [json.loads(p.read_text()) for p in (SHIPPED / name).rglob("*.json")]
        assert not any("_name_or_path" in config for config in configs)


@pytest.mark.parametrize(
    ("name", "most"), [("instruct", 0.19), ("magicbrush", 0.15), ("erasedraw", 0.12)]
)
def test_what_is_to_be_added_appears_and_the_rest_stays(name, most):
    """At least four objects of six; elsewhere a picture is nearer to itself than to the next."""
    asked = drawn("add", 6)
    made = edited(name, asked)
    found = Detector.from_pretrained().detect(made)
    new = [({t.name for t in e.after.things} - {t.name for t in e.before.things}) for e in asked]
    assert sum(names <= set(d.classes) for names, d in zip(new, found, strict=True)) >= 4
    before, after = (pictures(getattr(e, k) for e in asked) for k in ("before", "after"))
    same = ((before - after).abs().amax(1) == 0)[:, None]
    moved, other = (
        ((made - near).abs() * same).sum() / same.sum() / 3 for near in (before, before.roll(1, 0))
    )
    assert moved < most and moved < other


def test_light_changes_when_it_is_said():
    asked = [edit for edit in drawn("light", 12) if edit.after.sunset][:4]
    made, before = edited("magicbrush", asked), pictures(edit.before for edit in asked)
    warmth = [(p[:, 0] - p[:, 2])[:, :24].mean((1, 2)) for p in (before, made)]
    assert (warmth[1] > warmth[0] + 0.1).sum() >= 3


def test_they_run_from_their_experiments_and_compose(invoke, tmp_path):
    edit = drawn("add", 1)[0]
    Image.fromarray(world.render(edit.before).image).save(picture := tmp_path / "scene.png")
    words = [f"input.image={picture}", "steps=2", f"prompt.edit={edit.instruction}"]
    code, _, told = invoke("run", "erasedraw", *words, "--out", "made")
    assert code == 0, told
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:, :32] = 1
    plugins = {
        "source_trajectory": {},
        "instruct": {},
        "clip_guidance": {"prompts": edit.after.caption},
        "latent_blend": {"steps": [[0.0, 1.0]], "mask": "mask:user"},
        "rank": {"prompts": edit.after.caption},
    }
    session = inlay.Session("toybox/instruct", plugins, device="cpu")
    made = session.run(
        edit.instruction, str(picture), mask=mask, n=2, steps=3, guidance=4.0, seed=1
    )
    clean = made.board["latent:source"]
    inside = torch.nn.functional.interpolate(mask, clean.shape[-2:]) > 0
    for latent in made.latents["edit"]:
        moved = (latent - clean[0]).abs().mean(0)
        assert moved[~inside[0, 0]].mean() < 0.1 < moved[inside[0, 0]].mean()
    assert len(made.board["rank:scores"]) == 2
