"""Every backbone of the zoo: who attends, where prompt and picture lie, what an edit does."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbone_zoo import FAMILIES, ROWS, TEXT, WIDTH, drawn
from inlay import ModelError, Rows
from inlay.backbones import adapt, token_spans
from inlay_attention import AttnEdits, Key, Seam, SiteProgram, attention_modules

STOCK = F.scaled_dot_product_attention
ROW = Rows.of({"edit/text": 1, "other/text": 1})
WEIGHT, FOREIGN = 0.25, 3  # of the scale that is tried; how many keys are appended


class Case:
    """A family's model and call with what the probe says of it, made once."""

    def __init__(self, family):
        self.family = family
        self.model, self.call = family.build()
        self.plain = self.run()
        self.sites = token_spans.probe(self.model, (), self.call)

    @torch.no_grad()
    def run(self, **changed):
        out = self.model(**self.call | changed)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def edited_sites(self):
        """Those with a prompt among the keys."""
        return {name: spans for name, spans in self.sites.items() if "text" in spans.keys}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def case(request):
    return Case(request.param)


@contextmanager
def replaced(model, function):
    """`function(site, q, k, v, mask, scale)` in place of SDPA within attention modules, by a plain
    patch; grouped keys are repeated before."""
    inside = []

    def sdpa(query, key, value, attn_mask=None, *rest, scale=None, enable_gqa=False, **options):
        if not inside:
            options |= {"scale": scale, "enable_gqa": enable_gqa}
            return STOCK(query, key, value, attn_mask, *rest, **options)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return function(inside[-1], query, key, value, attn_mask, scale)

    with ExitStack() as stack:
        for name, module in attention_modules(model).items():
            enter = module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            leave = module.register_forward_hook(lambda *_: inside.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.callback(setattr, F, "scaled_dot_product_attention", STOCK)
        F.scaled_dot_product_attention = sdpa
        yield


def keys_of(case, **changed):
    """The keys `R h m d` of every site in a stock forward, in the order of the calls."""
    seen = []

    def note(site, q, k, v, mask, scale):
        seen.append((site, k))
        return STOCK(q, k, v, mask, scale=scale)

    with replaced(case.model, note):
        case.run(**changed)
    return seen


# sites and spans ------------------------------------------------------------------------------


def test_the_sites_are_the_modules_with_a_softmax_and_each_is_reached_once(case):
    called = [site for site, _ in keys_of(case)]
    assert called == list(case.sites)
    others = attention_modules(case.model).keys() - called
    linear = "Linear"  # Sana's own name for attention without a softmax
    assert all(linear in type(case.model.get_submodule(name).processor).__name__ for name in others)
    assert bool(others) == (case.family.name == "Sana")


def test_spans_are_where_the_literature_puts_them_and_cover_every_token(case):
    for site, keys in keys_of(case):
        spans = case.sites[site]
        if spans.kind == "joint":
            assert {name: s.stop - s.start for name, s in spans.keys.items()} == case.family.joint
            assert list(spans.keys) == list(case.family.joint) and spans.queries == spans.keys
        assert [s.start for s in spans.keys.values()][1:] == [s.stop for s in spans.keys.values()][
            :-1
        ]
        assert max(s.stop for s in spans.keys.values()) == keys.shape[2]
    kinds = {spans.kind for spans in case.sites.values()}
    assert ("joint" in kinds) == bool(case.family.joint) and ("cross" in kinds) != (
        "joint" in kinds
    )


def test_one_word_moves_its_own_key_where_the_prompt_is_first_read(case):
    """With attention as it is: nothing has been mixed there yet."""
    name = "cap_feats" if "cap_feats" in case.call else "encoder_hidden_states"
    other = torch.stack(list(case.call[name])).clone()
    other[0, 1] += drawn(WIDTH, seed=9)
    moved = keys_of(case, **{name: list(other) if name == "cap_feats" else other})
    for (site, was), (_, now) in zip(keys_of(case), moved, strict=True):
        if "text" in case.sites[site].keys:
            at = (now != was).any(dim=(1, 3)).nonzero().tolist()
            assert at == [[0, case.sites[site].keys["text"].start + 1]]
            break


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.adapter], ids=lambda f: f.name)
def test_the_adapter_of_a_family_says_the_same(family):
    case, pipe = Case(family), family.adapter()
    backbone = type(adapt(pipe))
    pipe.register_modules(**{backbone.denoiser_name: case.model})
    backbone = backbone(pipe)
    assert [site.name for site in backbone.sites if site.name in case.sites] == [
        site.name for site in backbone.sites
    ]
    for site in backbone.sites:
        found = case.sites[site.name]
        tokens = [max(s.stop for s in side.values()) for side in (found.queries, found.keys)]
        assert (site.kind, backbone.spans(site, TEXT)(*tokens)) == (
            found.kind,
            (found.queries, found.keys),
        )


# edits ----------------------------------------------------------------------------------------


def foreign(q):
    """Keys and values of nobody in this call, `1 h m d`, for a site with queries `R h n d`."""
    shape = 1, q.shape[1], FOREIGN, q.shape[3]
    return drawn(*shape, seed=5), drawn(*shape, seed=6)


def by_hand(case, op):
    """The forward with every map of the edited row written out."""

    def attend(site, q, k, v, mask, scale):
        if site not in case.edited_sites():
            return STOCK(q, k, v, mask, scale=scale)
        out = STOCK(q, k, v, mask, scale=scale)
        scale = scale or q.shape[-1] ** -0.5
        logits = q[:1] @ k[:1].mT * scale
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
        logits = logits if mask is None else logits + mask[:1]
        if op == "scale":
            p = logits.softmax(-1)
            p[..., case.sites[site].keys["text"]] *= WEIGHT
            out[:1] = p @ v[:1]
        else:
            new_k, new_v = foreign(q)
            p = torch.cat([logits, q[:1] @ new_k.mT * scale], -1).softmax(-1)
            out[:1] = p @ torch.cat([v[:1], new_v], 2)
        return out

    with replaced(case.model, attend):
        return case.run()


def by_seam(case, op):
    """The same forward with the edit as data."""
    modules = attention_modules(case.model)

    def program(site, spans):
        how = "join" if op == "append" else ""
        span = "text" if op == "scale" else "all"
        key = Key("a test", op, "edit/text", "given:keys" if how else "", how, keys=span)
        edits = AttnEdits({key}, "a test", tuple(ROW), "a test").on("edit/text")
        if op == "scale":
            edits.scale("text", WEIGHT)
        else:
            edits.append("given:keys")

        def run(sdpa, q, *rest, **options):
            given = {"given:keys": foreign(q)}
            both = spans.queries, spans.keys
            lowered = SiteProgram(site, ROW, edits.by_branch, [], {}, lambda n, m: both, {}, given)
            return lowered(sdpa, q, *rest, **options)

        return run

    edited = case.edited_sites()
    with Seam({site: modules[site] for site in edited}) as seam:
        seam.programs |= {site: program(site, spans) for site, spans in edited.items()}
        out = case.run()
        seam.check()
    return out


@pytest.mark.parametrize("op", ["scale", "append"])
def test_an_edit_changes_the_output_as_the_softmax_written_out_does(case, op):
    expected, out = by_hand(case, op), by_seam(case, op)
    change, size = (expected - case.plain).abs().amax(), case.plain.abs().amax()
    error = (out - expected).abs().amax()
    assert error < 1e-5 * size and error < 1e-2 * change
    assert (out[1] - case.plain[1]).abs().amax() < 1e-5 * size  # the row that nobody edits
    assert torch.equal(case.run(), case.plain)  # and nothing is left behind
    assert F.scaled_dot_product_attention is STOCK


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
        seam.programs |= dict.fromkeys(case.sites, note)
        assert token_spans.probe(case.model, (), case.call) == case.sites
        F.scaled_dot_product_attention(*drawn(3, 1, 1, 2, 4))  # of another model, say its VAE
        assert not reached
        assert torch.equal(case.run(), case.plain) and len(reached) == len(case.sites)
