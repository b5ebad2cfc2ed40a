"""Every backbone of the zoo: who attends, where prompt and picture lie, what an edit does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbone_checks import CHECKS, STOCK, Case
from backbone_zoo import FAMILIES, REFUSED, ROWS, TEXT, WIDTH, drawn
from inlay import ModelError
from inlay.backbones import adapt, token_spans
from inlay_attention import Seam, attention_modules


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    yield
    assert F.scaled_dot_product_attention is STOCK


@pytest.mark.parametrize("check", CHECKS)
def test_a_family_passes(case, check):
    assert CHECKS[check](case), (case.sites, case.called, case.without_softmax)


def test_spans_cover_every_token_once_and_one_family_alone_attends_without_a_softmax(case):
    for site, keys in case.keys_seen():
        spans = list(case.sites[site].keys.values())
        assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
        assert spans[-1].stop == keys.shape[2]
    kinds = {spans.kind for spans in case.sites.values()}
    assert ("joint" in kinds) == bool(case.family.joint) != ("cross" in kinds)
    assert bool(case.without_softmax) == (case.family.name == "Sana")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.adapter], ids=lambda f: f.name)
def test_the_adapter_of_a_family_says_the_same(family):
    case, pipe = Case(family), family.adapter()
    backbone = type(adapt(pipe))
    pipe.register_modules(**{backbone.denoiser_name: case.model})
    for site in backbone(pipe).sites:
        found = case.sites[site.name]
        tokens = [max(s.stop for s in side.values()) for side in (found.queries, found.keys)]
        spans = backbone(pipe).spans(site, TEXT)(*tokens)
        assert (site.kind, spans) == (found.kind, (found.queries, found.keys))


@pytest.mark.parametrize("family", REFUSED, ids=lambda f: f.name)
def test_a_family_whose_tokens_cannot_be_told_apart_is_refused(family):
    model, call = family.build()
    with pytest.raises(ModelError, match=REFUSED[family]):
        token_spans.probe(model, (), call)


# what is not in the zoo -----------------------------------------------------------------------


class Unlisted(nn.Module):
    """A denoiser of nobody's: grouped keys, 3 registers behind the picture, no attention class.

    order: where a prompt of 5 and a picture of 8 tokens go; gossip: a mean of one is given to the
    other.
    """

    def __init__(self, order="text image registers", gossip=""):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.gossip = order, gossip
        self.registers = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.blocks = nn.ModuleList(Grouped() for _ in range(2))

    def forward(self, latents, prompt_embeds, scale=1.0):
        image, text = latents * scale, prompt_embeds
        if "prompt to picture" in self.gossip:
            image = image + text.mean(1, keepdim=True)
        if "picture to prompt" in self.gossip:
            text = text + latents.mean(1, keepdim=True)
        parts = {"image": image, "text": text}
        parts["registers"] = self.registers.expand(len(image), -1, -1)
        parts |= {"half": image[:, :4], "other": image[:, 4:]}
        x = torch.cat([parts[name] for name in self.order.split()], 1)
        for block in self.blocks:
            x = x + block(x)
        return x


class Grouped(nn.Module):
    """Four heads of queries on two of keys."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 32)

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (8, 4)).transpose(1, 2).split([4, 2, 2], 1)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


LATENTS, PROMPT = drawn(ROWS, 8, WIDTH), drawn(ROWS, TEXT, WIDTH, seed=2)


def test_a_model_nobody_listed_is_understood_by_trying():
    model = Unlisted()
    plain, drawn_before = model(LATENTS, PROMPT), torch.get_rng_state()
    sites = token_spans.probe(model, (LATENTS,), {"prompt_embeds": PROMPT})
    tokens = {"text": slice(0, 5), "image": slice(5, 13), "rest": slice(13, 16)}
    joint = token_spans.SiteSpans("joint", tokens, tokens)
    assert sites == {"blocks.0": joint, "blocks.1": joint}
    assert torch.equal(torch.get_rng_state(), drawn_before)
    assert torch.equal(model(LATENTS, PROMPT), plain) and F.scaled_dot_product_attention is STOCK


@pytest.mark.parametrize("order", ["text image", "image text", "registers text image"])
@pytest.mark.parametrize("gossip", ["", "prompt to picture"])
def test_a_prompt_that_moves_the_whole_picture_is_still_told_from_it(order, gossip):
    sites = token_spans.probe(Unlisted(order, gossip), (LATENTS, PROMPT))
    names = ["rest" if name == "registers" else name for name in order.split()]
    assert [list(spans.keys) for spans in sites.values()] == [names] * 2


@pytest.mark.parametrize("order", ["half text other", "half registers text other"])
def test_tokens_in_turns_are_refused(order):
    with pytest.raises(ModelError, match=r"site blocks\.0, queries: tokens of the picture are not"):
        token_spans.probe(Unlisted(order), (LATENTS, PROMPT))


@pytest.mark.parametrize("gossip", ["picture to prompt", "picture to prompt, prompt to picture"])
def test_tokens_that_everything_moves_are_refused(gossip):
    with pytest.raises(ModelError, match=r"site blocks\.0: queries .*every part of the pic"):
        token_spans.probe(Unlisted(gossip=gossip), (LATENTS, PROMPT))


def test_inputs_that_nobody_knows_are_refused_by_name():
    class Odd(Unlisted):
        def forward(self, a, b):
            return super().forward(a, b)

    class Mute(Unlisted):
        def forward(self, latents, b):
            return super().forward(latents, b)

    with pytest.raises(ModelError, match=r"Odd: takes a, b, and none .* Name it hidden_states"):
        token_spans.probe(Odd(), (LATENTS, PROMPT))
    with pytest.raises(ModelError, match=r"no input that is known.* encoder_hidden_states"):
        token_spans.probe(Mute(), (LATENTS, PROMPT))


def test_attention_without_sdpa_or_with_two_of_it_is_refused():
    class Eager(Grouped):
        def forward(self, x):
            return x

    class Twice(Grouped):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    for block, problem in ((Eager(), "no attention module reaches"), (Twice(), "more than once")):
        model = Unlisted()
        model.blocks[1] = block
        model.blocks[0] = block if isinstance(block, Eager) else model.blocks[0]
        with pytest.raises(ModelError, match=problem):
            token_spans.probe(model, (LATENTS, PROMPT))
        assert F.scaled_dot_product_attention is STOCK


def test_prompts_of_unequal_length_that_shift_the_picture_are_refused():
    (family,) = (f for f in FAMILIES if f.name == "Lumina 2")
    model, call = family.build()
    call["encoder_attention_mask"][1, -2:] = False
    with pytest.raises(ModelError, match=r"the prompt's in one row .* call once per prompt"):
        token_spans.probe(model, (), call)


def test_a_probe_within_a_running_seam_leaves_it_in_place(case):
    """The outer seam's own marker is back after each module, whoever hooked it later."""
    modules, reached = attention_modules(case.model), []

    def note(sdpa, *args, **options):
        reached.append(1)
        return sdpa(*args, **options)

    with Seam(modules) as seam:
        seam.programs = dict.fromkeys(case.sites, note)
        assert token_spans.probe(case.model, (), case.call) == case.sites
        F.scaled_dot_product_attention(*drawn(3, 1, 1, 2, 4))  # of another model, say its VAE
        assert not reached
        assert torch.equal(case.run(), case.plain) and len(reached) == len(case.sites)
