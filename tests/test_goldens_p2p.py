"""Prompt-to-Prompt and null-text inversion against stored numbers of the published implementation
(tests/goldens/README.md)."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from inlay import InputError, Plugin, Session, hookimpl
from inlay_plugins import alignment
from inlay_plugins.null_text import NullText
from models import _vae

GOLDENS = Path(__file__).parent / "goldens"


@cache
def golden(name: str) -> tuple[dict, dict]:
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    return tensors, json.loads((GOLDENS / f"{name}.json").read_text())


def pieces(prompt: str, lexicon: dict) -> list[str]:
    """The toy tokenizer's pieces, as CLIP's tokenizer writes them."""
    listed = ["<|startoftext|>"]
    for word in prompt.split(" "):
        *begin, last = lexicon.get(word, word).split("|")
        listed += [*begin, f"{last}</w>"]
    return [*listed, "<|endoftext|>"]


# alignment ------------------------------------------------------------------------------------

CARD = golden("p2p_align")[1]
SPELLED = [p for p in CARD["pairs"] if "burmillacat" not in p["target"]]  # its pieces do not spell


@pytest.mark.parametrize("pair", CARD["pairs"], ids=lambda p: str(p["index"]))
def test_refine_aligns_tokens_as_published(pair):
    tensors = golden("p2p_align")[0]
    source, edit = (pieces(pair[k], CARD["lexicon"]) for k in ("source", "target"))
    found = alignment.by_tokens(source, edit, 77)
    mapper, known = (tensors[f"pair{pair['index']}.refine_{k}"] for k in ("mapper", "alpha"))
    stored = torch.zeros(77, 77)
    for j in range(77):
        if mapper[j] >= 0:
            stored[mapper[j], j] = 1
    assert torch.equal(found.matrix, stored)
    assert torch.equal(found.known, known.float())


@pytest.mark.parametrize("pair", SPELLED, ids=lambda p: str(p["index"]))
def test_replace_aligns_words_as_published(pair):
    tensors, k = golden("p2p_align")[0], pair["index"]
    source, edit = (pieces(pair[k], CARD["lexicon"]) for k in ("source", "target"))
    if pair["replace"] == "ValueError":
        with pytest.raises(InputError, match="puts word in place of word"):
            alignment.by_words(source, edit, 77)
        return
    stored = torch.zeros(77, 77)
    places = tensors[f"pair{k}.replace_nonzero_row_col"]
    for (i, j), value in zip(places, tensors[f"pair{k}.replace_nonzero_value"], strict=True):
        stored[i, j] = value
    assert torch.equal(alignment.by_words(source, edit, 77, "reference").matrix, stored)


@pytest.mark.parametrize("pair", SPELLED, ids=lambda p: str(p["index"]))
def test_words_are_the_published_ones(pair):
    for prompt, stored in (("source", "word_inds_source"), ("target", "word_inds_target")):
        found: dict[str, list[int]] = {}
        for word, tokens in alignment.words(pieces(pair[prompt], CARD["lexicon"])):
            found.setdefault(word, []).extend(tokens)
        assert found == pair[stored]


# runs -----------------------------------------------------------------------------------------


class Latents(Plugin):
    """Keeps the latents of source and edit after each step."""

    def __init__(self):
        super().__init__()
        self.after = {}

    @hookimpl
    def inlay_observe(self, step):
        if step.pass_ == "edit":
            self.after[step.index] = torch.cat([step.x_next["source"], step.x_next["edit"]])


def tiny_unet(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    weights, card = golden("tiny_unet_weights")
    unet = UNet2DConditionModel(**card["kwargs"])
    unet.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline(
        vae=_vae(4).to(dtype),
        unet=unet.to(dtype).eval(),
        scheduler=DDIMScheduler(**card["scheduler"]["kwargs"]),
        requires_safety_checker=False,
        **parts,
    )
    pipe.vae_scale_factor = 2
    return pipe


def options(case: dict, source: str, edit: str) -> dict:
    """The plugins of a stored case for one of its edits."""
    kind = case["controller"].removesuffix(")").split("(")[-1].lower()
    asked = {"edit": kind, "alignment": "reference", "self_tokens": 256}
    asked["self_tokens"] = case.get("self_limit_pixels", 256)
    cross = case["cross_replace_steps"]
    if isinstance(cross, dict):
        cross = {key.replace("default_", "default"): value for key, value in cross.items()}
    asked |= {"cross_replace": cross, "self_replace": case["self_replace_steps"]}
    asked |= {"weights": case.get("equalizer", {})}
    listed = {"prompt_to_prompt": asked}
    if "local_blend" in case:
        at = case["prompts"].index(edit)
        words = case["local_blend"]
        blend = {"source_words": words[0], "words": words[at], "maps": "made"}
        if "th" in case:
            blend["threshold"], blend["subtract_threshold"] = case["th"]
            blend["active"] = [case["start_blend"], 1.0]
        else:
            blend["threshold"] = case["threshold"]
        if "subtract_words" in case:
            subtracted = case["subtract_words"]
            blend |= {"source_subtract": subtracted[0], "subtract": subtracted[at]}
        listed["local_blend"] = blend
    return listed


RUNS = golden("p2p_run")[1]
CASES = [
    (name, edit)
    for name, case in RUNS["cases"].items()
    for edit in range(1, len(case["prompts"]))
    if name != "none"
]


@pytest.mark.parametrize(("name", "edit"), CASES)
def test_a_run_is_the_published_one(name, edit):
    tensors, case = golden("p2p_run")[0], RUNS["cases"][name]
    source, target = case["prompts"][0], case["prompts"][edit]
    conds = {"negative": {"embeds": tensors["uncond_embedding"][None].float()}}
    for key, prompt in (("source", source), ("edit", target)):
        tokens = pieces(prompt, {"tabbycat": "tabby|cat"})
        embeds = tensors[f"embedding.{prompt}"][None].float()
        conds[key] = {"embeds": embeds, "tokens": tokens}
    record, pipe = Latents(), tiny_unet()
    session = Session(pipe, options(case, source, target) | {"record": record})
    noise = tensors["x_T"].float()
    session.run(
        {"source": source, "edit": target},
        conds=conds,
        noise={"source": noise, "edit": noise},
        steps=RUNS["N"],
        guidance=RUNS["guidance"],
        size=64,
    )
    for at, index in enumerate(RUNS["stored_steps"]):
        both = tensors["source.latents"][at, 0], tensors[f"{name}.latents"][at, edit - 1]
        stored = torch.stack(both)
        assert (record.after[index][..., 1::4, 1::4] - stored).norm() < 2e-5 * stored.norm()


# null-text inversion --------------------------------------------------------------------------


def unshifted() -> DDIMScheduler:
    """With timesteps 666, 333, 0, which the pipeline of today would shift by one."""
    return DDIMScheduler(
        **golden("tiny_unet_weights")[1]["scheduler"]["kwargs"] | {"steps_offset": 0}
    )


class Stored(Plugin):
    """The stored clean latent; checks its inversion, puts the stored float64 path in its place, and
    keeps the null prompt of each step. The step at timestep 0 changes neither: not stored."""

    def __init__(self, null_text, inverted):
        super().__init__()
        self.null_text, self.inverted, self.nulls = null_text, inverted, []

    @hookimpl
    def inlay_declare(self, need):
        need.publish("latent:source")

    @hookimpl
    def inlay_prepare(self, run):
        run.board["latent:source"] = self.inverted[:1]

    @hookimpl
    def inlay_begin(self, pass_, x):
        if pass_ == "edit":
            ours, stored = torch.cat(self.null_text.path), self.inverted.flip(0)[[0, 1, 2, 2]]
            assert (ours - stored).norm() < 1e-6 * stored.norm()
            self.null_text.path = list(stored.split(1))
            x["edit"] = self.null_text.path[0]

    @hookimpl
    def inlay_observe(self, run, step):
        if step.pass_ == "edit":
            self.nulls.append(run.conds["edit/null"].embeds)


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("inner2", {"iterations": 2}),
        ("early_stop", {"iterations": 5, "tolerance": 0.7041991368192146}),
    ],
)
def test_null_text_inversion_optimises_as_published(stored, asked):
    """In float64: in float32, two correct implementations differ by 1e-2 (Adam)."""
    tensors, card = golden("nti")
    null_text, record = NullText(NullText.Config(**asked)), Latents()
    given = Stored(null_text, tensors["inverted"])
    conds = {
        "source": {"embeds": tensors["cond_embedding"]},
        "edit": {"embeds": tensors["cond_embedding"]},
        "negative": {"embeds": tensors["uncond_embedding"]},
    }
    plugins = {"given": given, "null_text": null_text, "record": record}
    Session(tiny_unet(torch.float64), plugins, unshifted()).run(
        {"source": card["prompt"], "edit": card["prompt"]},
        conds=conds,
        steps=card["N"],
        guidance=card["guidance"],
        size=64,
    )
    ours, theirs = torch.cat(given.nulls), tensors[f"uncond_optimised.{stored}"][[0, 1, 1]]
    assert ours.dtype == torch.float64
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()
    if stored == "inner2":
        replayed = tensors["replay_latents.inner2"]
        for step in range(card["N"]):
            source, edit = record.after[step]
            assert (source - edit).abs().max() < 1e-9
            assert (edit[..., 1::4, 1::4] - replayed[step + 1]).norm() < 1e-6 * replayed.norm()
