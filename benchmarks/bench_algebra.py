"""The algebra against what it stands for: Prompt-to-Prompt, extended and joint attention, no edit.

Shapes are Stable Diffusion 1.5's and FLUX.1's, weights random: nothing here depends on them.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_attention import GAMMA, HEADS, TEXT, TOKENS, WIDTH, program, resident, tensors
from bench_session import STEPS, toybox_flux
from diffusers import FluxTransformer2DModel, Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from pairs import ratio, report

import inlay
from inlay_attention import AttnEdits, Held, Key, Rows, Seam, SiteProgram, Store, attention_modules
from spies import Editor, plugin

# Stable Diffusion 1.5 at 512 px: (channels before and of a decoder layer, side of its grid)
LAYERS = ((2560, 1280, 16), (1280, 640, 32), (640, 320, 64))
PROMPT = 77


def edited(branches, said, *keys):
    """The edits that `said` states on lane `edit`, by branch."""
    edits = AttnEdits([Key("p", *key) for key in keys], "a benchmark", branches, "p")
    said(edits.on("edit"))
    return edits.by_branch


def site(branches, edits, text=0, given=None):
    """A program with one row for each branch; text: tokens of the prompt among the keys."""
    rows = Rows.of(dict.fromkeys(branches, 1))
    spans = lambda n, m: ({"image": slice(0, n)}, {"text": slice(0, text or m)})  # noqa: E731
    return SiteProgram("s", rows, edits, (), {}, spans, {}, given or {})


# Prompt-to-Prompt -----------------------------------------------------------------------------

LANES = ("source/text", "edit/text")
SHARE = 0.8


def p2p(tokens, channels, generator):
    """(self-attention, cross-attention) of one site: programs and q, k, v of two rows."""
    heads, width = 8, channels // 8
    draw = lambda n: torch.randn(2, heads, n, width, generator=generator)  # noqa: E731
    swap = torch.eye(PROMPT)[torch.randperm(PROMPT, generator=generator)]
    same = edited(LANES, lambda on: on.route(qk="source"), ("route", "edit", "source", "qk"))
    told = edited(
        LANES, lambda on: on.mix("source", "text", SHARE, swap), ("mix", "edit", "source")
    )
    own = site(LANES, same), [draw(tokens) for _ in range(3)]
    crossed = site(LANES, told, PROMPT), [draw(tokens), draw(PROMPT), draw(PROMPT)]
    return own, crossed, swap


def maps(q, k):
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)


def bench_prompt_to_prompt(benchmark):
    """One self- and one cross-attention of each resolution, replacement in both."""
    g = torch.Generator().manual_seed(0)
    sites = [p2p(side**2, channels, g) for _, channels, side in LAYERS]
    sdpa = F.scaled_dot_product_attention

    def ours():
        return [p(sdpa, *qkv) for *pair, _ in sites for p, qkv in pair]

    def theirs():
        """As published: every map is made and edited, then applied."""
        outputs = []
        for (_, (q, k, v)), (_, (cq, ck, cv)), swap in sites:
            p = maps(q, k)
            p[1] = p[0]
            outputs.append(p @ v)
            p = maps(cq, ck)
            p[1] = SHARE * (p[0] @ swap) + (1 - SHARE) * p[1]
            outputs.append(p @ cv)
        return outputs

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-5)
    made = ratio(benchmark, theirs, ours, rounds=3)
    what = "Prompt-to-Prompt, replacement and self: explicit maps / inlay, SD 1.5, 64x64 latents"
    times, value = {"ours": made["theirs"], "theirs": made["ours"]}, made["ratio"]
    report("p2p", what, "at least 2", value, value >= 2, **times)


def p2p_alone(tokens):
    """Peak bytes that both attentions of one site add; in a process of its own."""
    torch.set_num_threads(1)
    own, crossed, _ = p2p(tokens, 320, torch.Generator().manual_seed(0))
    q, k, v = own[1]
    F.scaled_dot_product_attention(q[:, :, :8], k, v)
    before = resident(reset=True)
    for made, qkv in (own, crossed):
        made(F.scaled_dot_product_attention, *qkv)
    return resident() - before


def bench_prompt_to_prompt_memory(benchmark):
    """Each size in a process of its own, whose peak is then its own."""
    sizes, used = (1024, 4096, 9216), {}

    def measure():
        for tokens in sizes:
            code = f"import bench_algebra as b; print(b.p2p_alone({tokens}))"
            folder = Path(__file__).parent
            paths = f"import sys; sys.path.insert(0, {str(folder.parent / 'tests')!r}); "
            call = [sys.executable, "-c", paths + code]
            done = subprocess.run(call, cwd=folder, check=True, capture_output=True)
            used[tokens] = int(done.stdout)

    benchmark.pedantic(measure, rounds=1)
    growth = used[9216] / used[4096] / 2.25
    what = "memory of Prompt-to-Prompt per token, 9,216 against 4,096 tokens (2.25: full maps)"
    more = {f"MiB at {tokens}": used[tokens] / 2**20 for tokens in sizes}
    report("p2p_memory", what, "at most 1.3", growth, growth <= 1.3, **more)


# extended attention ---------------------------------------------------------------------------


def bench_extended_attention(benchmark):
    """Add-it's attention has 1.375 times the products of plain attention over the same rows."""
    q, k, v = tensors(TOKENS)
    extended = program(False)
    scores = q[1:] @ torch.cat([k[1:] * GAMMA, k[:1, :, TEXT:]], 2).transpose(2, 3)
    values = torch.cat([v[1:], v[:1, :, TEXT:]], 2)
    expected = (scores / WIDTH**0.5).softmax(-1) @ values
    sdpa = F.scaled_dot_product_attention
    torch.testing.assert_close(extended(sdpa, q, k, v)[1:], expected, rtol=1e-3, atol=1e-4)
    more = (TOKENS + (2 * TOKENS - TEXT)) / (2 * TOKENS)
    made = ratio(benchmark, lambda: extended(sdpa, q, k, v), lambda: sdpa(q, k, v), rounds=9)
    value = more / made.pop("ratio")
    what = f"speed of extended attention for its products / plain SDPA, {HEADS} heads, {TOKENS}"
    report("extended", f"{what} tokens", "at least 0.9", value, value >= 0.9, **made)


# a joint read: MimicBrush ---------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A decoder layer of the U-Net: residual block and transformer."""

    def __init__(self, before, channels, side):
        super().__init__()
        norms = {"groups": 32, "temb_channels": 1280}
        self.resnet = ResnetBlock2D(in_channels=before, out_channels=channels, **norms)
        self.transformer = Transformer2DModel(
            8, channels // 8, in_channels=channels, cross_attention_dim=768, norm_num_groups=32
        )
        self.inputs = [(before, side, side), (1280,), (PROMPT, 768)]
        self.attention = self.transformer.transformer_blocks[0].attn1

    def forward(self, x, time, prompt):
        return self.transformer(self.resnet(x, time), encoder_hidden_states=prompt).sample


@contextmanager
def recorded(attention) -> Iterator[list]:
    """What this module reads while the reference passes through."""
    bank = []
    hook = attention.register_forward_pre_hook(lambda _, args: bank.append(args[0]))
    try:
        yield bank
    finally:
        hook.remove()


def split(attention, x):
    return rearrange(x, "b n (h d) -> b h n d", h=attention.heads)


class Naive:
    """The published form: plain attention of all rows, once more of the null rows, and joint
    attention of all rows over [own | reference] with the queries of both, half of them dropped."""

    def __init__(self, bank):
        self.bank = bank

    def __call__(self, attention, x, encoder_hidden_states=None, attention_mask=None, **_):
        def attend(x):
            q, k, v = (split(attention, f(x)) for f in (attention.to_q, attention.to_k,
                                                        attention.to_v))  # fmt: skip
            out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
            return attention.to_out[0](out)

        alone, null = attend(x), attend(x[:1])
        joint = attend(torch.cat([x, self.bank], 1))[:, : x.shape[1]]
        return torch.cat([null, (alone[1:] + joint[1:]) / 2])


def reading(attention, bank):
    """The same as edits: half of what the row sees alone, half of what it sees beside the
    reference, whose values are given at half their size; the null row stays plain."""
    (seen,) = bank
    k, v = split(attention, attention.to_k(seen)), split(attention, attention.to_v(seen)) / 2

    def said(on):
        on.append("bank:reference").mix("edit/text", "all", 0.5)

    branches = ("edit/null", "edit/text")
    keys = (("append", "edit/text", "bank:reference", "join"), ("mix", "edit/text", "edit/text"))
    edits = AttnEdits([Key("p", *key) for key in keys], "a benchmark", branches, "p")
    said(edits.on("edit/text"))
    return site(branches, edits.by_branch, given={"bank:reference": Held(k, v)})


def bench_joint_read(benchmark):
    """One decoder layer of each resolution: reference, then the two rows that read it."""
    torch.manual_seed(0)
    both = [[Layer(*shape).eval().requires_grad_(False) for _ in range(2)] for shape in LAYERS]
    g = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(2, *s, generator=g) for s in pair[0].inputs] for pair in both]

    def ours():
        outputs = []
        for (reference, layer), inputs in zip(both, drawn, strict=True):
            with recorded(reference.attention) as bank:
                reference(*(x[1:] for x in inputs))
            with Seam({"s": layer.attention}) as seam:
                seam.programs = {"s": reading(layer.attention, bank)}
                outputs.append(layer(*inputs))
                seam.check()
        return outputs

    def theirs():
        outputs = []
        for (reference, layer), inputs in zip(both, drawn, strict=True):
            with recorded(reference.attention) as bank:
                reference(*inputs)
            stock, layer.attention.processor = layer.attention.processor, Naive(bank[0])
            outputs.append(layer(*inputs))
            layer.attention.processor = stock
        return outputs

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    made = ratio(benchmark, ours, theirs, rounds=3)
    value = made.pop("ratio")
    what = "joint read of a reference / its naive form, a decoder layer of SD 1.5 at 64, 32 and 16"
    report("joint_read", what, "at most 0.65", value, value <= 0.65, **made)


# nothing to do --------------------------------------------------------------------------------


def deep_flux():
    """FLUX.1's 19 double and 38 single blocks, narrow: what costs nothing must not cost here."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=32,
        num_attention_heads=8, joint_attention_dim=64, pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def bench_an_edit_that_changes_nothing(benchmark):
    """Every site is subscribed, and programs are made anew for each forward."""
    model, g = deep_flux(), torch.Generator().manual_seed(0)
    sites, ids = attention_modules(model), torch.zeros(64 + 256, 3)
    call = {
        "hidden_states": torch.randn(1, 256, 64, generator=g),
        "encoder_hidden_states": torch.randn(1, 64, 64, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": ids[:64],
        "img_ids": ids[64:],
        "return_dict": False,
    }

    def neutral():
        edits = edited(("edit/text",), lambda on: on.gain("all", 1.0), ("gain", "edit"))
        return site(("edit/text",), edits)

    def ours():
        with Seam(sites) as seam:
            seam.programs = {name: neutral() for name in sites}
            out = model(**call)[0]
            seam.check()
        return out

    def theirs():
        return model(**call)[0]

    assert torch.equal(ours(), theirs())
    made = ratio(benchmark, ours, theirs, rounds=9)
    value = made.pop("ratio")
    what = (
        f"an edit that changes nothing at {len(sites)} sites / none, FLUX.1's blocks of width 256"
    )
    report("neutral", what, "at most 1.02", value, value <= 1.02, **made)


# a stored source ------------------------------------------------------------------------------


def lane(need):
    need.lane("source", prompt="source", n=1, seed=9, keep=False)


@pytest.mark.parametrize("kind", ["route kv", "append"])
def bench_edits_of_a_stored_source(benchmark, kind):
    """Eight edits that take the source's content at every site and step, the source recorded."""
    pipe, _, options = toybox_flux()
    backbone = inlay.Session(pipe).backbone
    words = ("cow", "car", "cat", "bus", "tree", "kite", "boat", "house")
    conds = [backbone.encode_text(f"a {word} on the grass") for word in words]
    source = backbone.encode_text("the grass")
    takes = {"kv": "source"} if kind == "route kv" else {"from_": "source", "how": "join"}

    def session(store=None):
        edit = Editor(kind.split()[0], "edit/text", options={**takes, "keys": "image"})
        return inlay.Session(pipe, {"source": plugin(declare=lane), "edit": edit}, store=store)

    def sample(made, cond):
        ready = {"source": source, "edit": cond}
        return made.run(conds=ready, steps=STEPS, seed=3, **options).latents["edit"]

    store = Store()
    stored, begun = session(store), time.process_time()
    sample(stored, conds[0])
    recording = time.process_time() - begun
    plain = inlay.Session(pipe)
    torch.testing.assert_close(sample(stored, conds[1]), sample(session(), conds[1]))

    def ours():
        return [sample(stored, cond) for cond in conds]

    def theirs():
        return [sample(plain, cond) for cond in conds]

    made = ratio(benchmark, ours, theirs, rounds=3)
    value = made.pop("ratio")
    what = f"eight edits of a stored source ({kind}) / eight plain samplings, toybox/flux, {STEPS}"
    met, more = value <= 1.15, {"recording": recording, **made}
    report(f"stored_{kind.split()[0]}", f"{what} steps", "at most 1.15", value, met, **more)
