"""Prompt-to-Prompt, its local blend, injection and inversions: their mathematics, against the same
written out with every map in full, and what they refuse."""

import pytest
import torch

import inlay
from inlay import ConfigError, InputError, PlanConflict
from inlay_plugins import alignment
from inlay_plugins.alignment import by_tokens, by_words, words
from inlay_plugins.null_text import NullText
from models import conds, flux, stable_diffusion
from spies import plugin

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SOURCE = ["<|startoftext|>", "a</w>", "cat</w>", "sits</w>", "<|endoftext|>"]
EDIT = ["<|startoftext|>", "a</w>", "tabby", "cat</w>", "sits</w>", "<|endoftext|>"]
PROMPT = {"source": "a cat sits", "edit": "a tabbycat sits"}


@pytest.fixture(scope="module", params=["flux", "sd"])
def model(request):
    pipe = flux() if request.param == "flux" else stable_diffusion()
    encoded = conds(pooled=request.param == "flux")
    encoded["source"]["tokens"], encoded["edit"]["tokens"] = SOURCE, EDIT
    guided = {"guidance": 3.5, "true_cfg": 2.0} if request.param == "flux" else {"guidance": 3.0}
    return pipe, encoded, guided


def run(model, plugins, **options):
    pipe, encoded, guided = model
    options = {"steps": 4, "conds": encoded, "seed": 1, **guided, **options}
    return inlay.Session(pipe, plugins).run(PROMPT, **options)


def explicit(change, steps):
    """A plugin that computes the edit's attention with every map in full, beside a source lane:
    change(site, step, ours, theirs), maps `b h n m` of image queries, the spans of its keys."""
    kept = {}

    def declare(need):
        need.lane("source", prompt="source", n=need.request.n)
        sites = need.select()
        need.edit("patch", "source/text", sites, steps, queries="image")
        need.edit("patch", "edit/text", sites, steps, queries="image")

    def attention(run, step, site, edits):
        def full(q, k, v, mask, attend):
            p = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
            kept[site.name] = p
            return p @ v

        def changed(q, k, v, mask, attend):
            p = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
            spans = run.backbone.spans(site, 12)(q.shape[2], k.shape[2])[1]
            return change(site, step.index, p, kept[site.name], spans) @ v

        edits.on("source/text", "image").patch(full)
        edits.on("edit/text", "image").patch(changed)

    return plugin(declare=declare, attention=attention)


def written_out(aligned, cross, own, weight):
    """Prompt-to-Prompt, section 3.2, as it reads; cross, own: first step without."""

    def change(site, step, ours, theirs, spans):
        ours = ours.clone()
        if "text" in spans and step < cross:
            text = spans["text"]
            taken = aligned.known * (theirs[..., text] @ aligned.matrix)
            taken += (1 - aligned.known) * ours[..., text]
            ours[..., text] = weight * taken
        if "image" in spans and step < own:
            ours[..., spans["image"]] = theirs[..., spans["image"]]
        return ours

    return explicit(change, range(4))


KINDS = {
    "replace": by_words(SOURCE, EDIT, 12),
    "refine": by_tokens(SOURCE, EDIT, 12),
    "reweight": alignment.identity(12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_edits_maps_are_the_sources(model, kind):
    """With a word of another weight, negative; without it something else comes out."""
    aligned, weight = KINDS[kind], torch.ones(12)
    weight[4] = -1.5
    asked = {"edit": kind, "cross_replace": 0.6, "self_replace": 0.5, "weights": {"sits": -1.5}}
    ours = run(model, {"prompt_to_prompt": asked}).latents["edit"]
    weighed, unweighed = (
        run(model, {"full": written_out(aligned, 3, 2, w)}).latents["edit"] for w in (weight, 1.0)
    )
    torch.testing.assert_close(ours, weighed, **CLOSE)
    assert not torch.allclose(ours, unweighed, atol=1e-3)


def test_words_have_windows_of_their_own(model):
    """Replaced in steps 0-1, and in all steps but for one word: the same for all but its token."""
    windows = {"default": 1.0, "sits": [0.2, 0.6]}
    plugins = {"prompt_to_prompt": {"cross_replace": windows, "self_replace": 0}}
    seen = {}

    def observe(run, step):
        seen[step.index] = run.board["columns:edit"](step.index).share

    run(model, plugins | {"spy": plugin(observe=observe)})
    others = [token for token in range(12) if token != 4]
    for step in range(4):
        assert seen[step][others].eq(1).all()
        assert seen[step][4] == (1 <= step < 3)


def test_pictures_of_one_run_have_sources_of_their_own(model):
    """Each source begins where its edit does, so that an edit that does nothing is its source."""
    asked = {"edit": "reweight", "cross_replace": 0, "self_replace": 0}
    made = run(model, {"prompt_to_prompt": asked}, n=2)
    pipe, encoded, guided = model
    alone = run((pipe, encoded | {"edit": encoded["source"]}, guided), {}, n=2)
    torch.testing.assert_close(made.latents["source"], alone.latents["edit"], **CLOSE)


# local_blend ----------------------------------------------------------------------------------

P2P = {"prompt_to_prompt": {"edit": "refine", "cross_replace": 0.5, "self_replace": 0.25}}


@pytest.mark.parametrize("maps", ["own", "made"])
def test_what_counts_is_the_edits_and_the_rest_the_sources(model, maps):
    plain = run(model, P2P).latents

    def blended(**asked):
        words = {"words": "sits", "maps": maps, **asked}
        return run(model, P2P | {"local_blend": words}).latents["edit"]

    assert torch.equal(blended(threshold=-1.0), plain["edit"])
    assert torch.equal(blended(threshold=1.0), plain["source"])
    assert torch.equal(
        blended(threshold=-1.0, subtract="a", subtract_threshold=-1.0), plain["source"]
    )
    mixed = blended(threshold=0.97)
    assert not torch.equal(mixed, plain["edit"]) and not torch.equal(mixed, plain["source"])


def test_blending_may_begin_late_and_end_early(model):
    blended = []

    def observe(step):
        blended.append(torch.equal(step.x_next["edit"], step.x_next["source"]))

    asked = {"words": "sits", "threshold": 1.0, "active": [0.25, 0.75]}
    run(model, P2P | {"local_blend": asked, "spy": plugin(observe=observe)})
    assert blended == [False, True, True, False]


# attention_injection --------------------------------------------------------------------------


def test_the_pictures_queries_and_keys_are_the_sources(model):
    kept = {}

    def attention(run, site, edits):
        for role in ("text", "null"):

            def full(q, k, v, mask, attend, role=role):
                kept[site.name, role] = q, k
                return attend(q, k, v, mask)

            def changed(q, k, v, mask, attend, role=role):
                image = run.backbone.spans(site, 12)(q.shape[2], k.shape[2])[1]["image"]
                theirs, k = kept[site.name, role], k.clone()
                k[:, :, image] = theirs[1][:, :, image]
                return attend(theirs[0], k, v, mask)

            edits.on(f"source/{role}", "image").patch(full)
            edits.on(f"edit/{role}", "image").patch(changed)

    def declare(need):
        need.lane("source", prompt="source", n=need.request.n)
        sites = need.select(kind=["self", "joint"])
        for branch in ("source/text", "source/null", "edit/text", "edit/null"):
            need.edit("patch", branch, sites, range(2), queries="image")

    ours = run(model, {"attention_injection": {"active": 0.5}}).latents["edit"]
    full = plugin(declare=declare, attention=attention)
    torch.testing.assert_close(ours, run(model, {"full": full}).latents["edit"], **CLOSE)
    assert not torch.allclose(ours, run(model, {}).latents["edit"], atol=1e-3)


# null_text ------------------------------------------------------------------------------------


def inverted(model, **asked):
    """How far the source ends from the clean latent, the run's plugin, and what it saw."""
    made, ends = NullText(NullText.Config(**asked)), {}

    def observe(run, step):
        if step.pass_ == "edit":
            ends[step.index] = step.x["source"], step.x_next["source"]
            ends["nulls"] = run.conds["edit/null"], run.conds["source/text"]

    plugins = {"source_trajectory": {}, "null_text": made, "spy": plugin(observe=observe)}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run(model, plugins, image=picture, size=32)
    return float((ends[3][1] - made.path[-1]).norm()), made, ends


def test_an_optimised_null_prompt_leads_the_source_back(model):
    far = inverted(model, iterations=1, rate=0.0)[0]
    near = inverted(model, iterations=8, rate=0.1)[0]
    assert near < 0.9 * far


def test_the_sources_prompt_as_the_null_prompt_needs_no_optimising(model):
    _, made, ends = inverted(model, method="negative_prompt")
    null, source = ends["nulls"]
    assert null is source
    torch.testing.assert_close(ends[0][0], made.path[0], rtol=0, atol=0)


def test_direct_inversion_puts_the_source_back_on_its_path(model):
    _, made, ends = inverted(model, method="direct")
    for step in range(4):
        assert torch.equal(ends[step][0], made.path[step])


# refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugins", "error", "message"),
    [
        ({"prompt_to_prompt": {"weights": {"dog": 2}}}, InputError, "'dog' is not in the prompt"),
        ({"prompt_to_prompt": {"cross_replace": {"dog": 1.0}}}, InputError, "a tabbycat sits"),
        ({"prompt_to_prompt": {"cross_replace": 1.5}}, ConfigError, r"cross_replace: 1\.5 is no"),
        ({"prompt_to_prompt": {"self_replace": [0.5, 0.2]}}, ConfigError, "self_replace: "),
        ({"prompt_to_prompt": {"self_tokens": 1}}, ConfigError, "self_tokens: no self-attention"),
        (P2P | {"local_blend": {}}, ConfigError, "local_blend.words: no words"),
        (P2P | {"local_blend": {"words": "cat"}}, InputError, "'cat' is not in the prompt"),
        (P2P | {"local_blend": {"words": "a", "active": [1, 0]}}, ConfigError, "active: "),
        (P2P | {"local_blend": {"words": "a", "sites": ["x"]}}, ConfigError, "no attention site"),
        ({"local_blend": {"words": "a", "maps": "made"}}, PlanConflict, "columns:edit"),
        ({"null_text": {}}, PlanConflict, "latent:source"),
        ({"source_trajectory": {}, "null_text": {"iterations": 0}}, ConfigError, "iterations: "),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(model, plugins, error, message):
    with pytest.raises(error, match=message):
        run(model, plugins)


def test_replace_refuses_prompts_of_different_length(model):
    pipe, encoded, guided = model
    longer = encoded["edit"] | {"tokens": [*EDIT[:-1], "here</w>", EDIT[-1]]}
    message = "'a tabbycat sits here' has 4 words and 'a cat sits' has 3"
    with pytest.raises(InputError, match=message):
        run((pipe, encoded | {"edit": longer}, guided), {"prompt_to_prompt": {}})


def test_a_null_prompt_is_only_there_under_guidance(model):
    pipe, encoded, _ = model
    plugins = {"source_trajectory": {}, "null_text": {}}
    with pytest.raises(ConfigError, match="without classifier-free guidance"):
        run((pipe, encoded, {"guidance": 1.0}), plugins)


def test_words_of_every_tokenizer():
    assert words(EDIT) == [("a", (1,)), ("tabbycat", (2, 3)), ("sits", (4,))]
    assert words(["▁A", "▁", "can", "oe", ",", "</s>", "<pad>"]) == [
        ("A", (0,)),
        ("canoe,", (1, 2, 3, 4)),
    ]
    clip_and_t5 = ["<|startoftext|>", "a</w>", "<|endoftext|>", "", "", "▁a", "</s>"]
    assert words(clip_and_t5) == [("a", (1,)), ("a", (5,))]


def test_what_follows_a_longer_word_moves_along():
    """The published code takes it from a neighbour."""
    fixed, published = (by_words(SOURCE, EDIT, 12, mode).matrix for mode in ("fixed", "reference"))
    assert fixed[:, 4].nonzero().tolist() == [[3]]
    assert published[:, 4].nonzero().tolist() == [[4]]
    assert torch.equal(fixed.sum(0)[4:], torch.ones(8))
