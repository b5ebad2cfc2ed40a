"""reweight, pag, mutual_self_attention, shared_attention, regional_prompts, attention_maps: their
mathematics, against the same written out with every map in full, on both families."""

import pytest
import torch

import inlay
import pages
from compositions import Recorder
from inlay import ConfigError, Held, InputError, PlanConflict, project_kv
from inlay_attention import Seam
from inlay_plugins.attention_maps import AttentionMaps
from inlay_plugins.mutual_self_attention import MutualSelfAttention
from inlay_plugins.pag import Pag
from inlay_plugins.regional_prompts import RegionalPrompts
from inlay_plugins.reweight import Reweight
from inlay_plugins.shared_attention import SharedAttention
from models import conds, flux, stable_diffusion
from spies import plugin

CFG = {"flux": {"guidance": 3.5, "true_cfg": 2.0}, "sd": {"guidance": 3.0}}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SHOWN = [
    "reweight", "pag", "mutual_self_attention", "shared_attention", "regional_prompts",
    "attention_maps",
]  # fmt: skip


@pytest.fixture(scope="module", params=["flux", "sd"])
def model(request):
    pipe = flux() if request.param == "flux" else stable_diffusion()
    encoded = conds(pooled=request.param == "flux")
    tokens = ["a</w>", "dog</w>", *["on</w>"] * 10]
    return pipe, CFG[request.param], {k: {**v, "tokens": tokens} for k, v in encoded.items()}


def run(model, plugins, **options):
    pipe, cfg, encoded = model
    options = {"steps": 3, "conds": encoded, **cfg, **options}
    return inlay.Session(pipe, plugins).run({"source": "a", "edit": "b"}, **options)


def explicit(change, kind=("cross", "joint"), branch="edit/text"):
    """A plugin that computes attention with the map in full, `b h n m` of image queries, changed by
    `change`; the word is its second column."""

    def declare(need):
        need.edit("patch", branch, need.select(kind=kind), queries="image")

    def attention(site, edits):
        def full(q, k, v, mask, attend):
            p = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(-1)
            return change(p) @ v

        edits.on(branch, "image").patch(full)

    return plugin(declare=declare, attention=attention)


def latents(model, plugins, **options):
    return run(model, plugins, **options).latents["edit"]


def test_reweight_multiplies_the_words_columns(model):
    def change(p):
        return torch.cat([p[..., :1], 2.5 * p[..., 1:2], p[..., 2:]], -1)

    ours = latents(model, {"reweight": Reweight(Reweight.Config(words={"dog": 2.5}))})
    torch.testing.assert_close(ours, latents(model, {"full": explicit(change)}), **CLOSE)
    assert not torch.allclose(ours, latents(model, {}), atol=1e-4)


def test_reweight_with_renorm_keeps_the_sum(model):
    def change(p):
        p = torch.cat([p[..., :1], 2.5 * p[..., 1:2], p[..., 2:]], -1)
        return p / p.sum(-1, keepdim=True)

    cfg = Reweight.Config(words={"dog": 2.5}, renorm=True)
    full = latents(model, {"full": explicit(change)})
    torch.testing.assert_close(latents(model, {"reweight": Reweight(cfg)}), full, **CLOSE)


def test_a_negative_weight_pushes_away(model):
    one, minus = (
        latents(model, {"reweight": Reweight(Reweight.Config(words={"dog": w}))})
        for w in (1.0, -1.0)
    )
    torch.testing.assert_close(one, latents(model, {}), **CLOSE)
    assert not torch.allclose(minus, one, atol=1e-4)


def test_pag_adds_the_difference_to_a_branch_that_sees_only_itself(model):
    """eq. 13, and P = I at the chosen sites, seen from inside."""
    seen = {}

    def denoised(step):
        seen.update({name: pred.clone() for name, pred in step.preds.items()})
        seen["output"] = step.output["edit"].clone()

    spy = plugin(denoised=denoised)
    run(model, {"pag": Pag(Pag.Config(scale=1.7)), "spy": spy}, steps=1)
    text, null, perturbed = (seen[f"edit/{role}"] for role in ("text", "null", "pag"))
    weight = model[1].get("true_cfg", model[1]["guidance"])
    guided = null + weight * (text - null) + 1.7 * (text - perturbed)
    torch.testing.assert_close(seen["output"], guided, rtol=0, atol=0)

    def identity(need):
        blocks = {"block": ["mid"]} if model[1] is CFG["sd"] else {"depth": (1 / 3, 2 / 3)}
        need.edit("patch", "edit/text", need.select(kind=["self", "joint"], **blocks),
                  queries="image")  # fmt: skip

    def attention(site, edits):
        def own(q, k, v, mask, attend):
            return v[:, :, -q.shape[2] :]

        edits.on("edit/text", "image").patch(own)

    alone = plugin(declare=identity, attention=attention)
    kept = dict(seen)
    run(model, {"alone": alone, "spy": spy}, steps=1)
    torch.testing.assert_close(seen["edit/text"], kept["edit/pag"], **CLOSE)


def test_pag_of_scale_zero_adds_no_row(model):
    session = inlay.Session(model[0], {"pag": Pag(Pag.Config(scale=0.0))})
    ours = session.run({"edit": "b"}, steps=2, conds=model[2], **model[1]).latents["edit"]
    assert torch.equal(ours, latents(model, {}, steps=2))


def test_pag_leaves_out_the_steps_outside_its_window(model):
    counted = []
    spy = plugin(denoised=lambda step: counted.append("edit/pag" in step.preds))
    run(model, {"pag": Pag(Pag.Config(active=[1, 1])), "spy": spy}, steps=3)
    assert counted == [False, True, False]


def source():
    return plugin(declare=lambda need: need.lane("source", prompt="source", seed=9))


def test_mutual_self_attention_of_equal_lanes_is_nothing(model):
    """The same prompt and noise: the source's keys are the edit's own."""
    same = plugin(declare=lambda need: need.lane("source", prompt="edit"))
    plugins = {"source": same, "masa": MutualSelfAttention(MutualSelfAttention.Config([0, 2]))}
    torch.testing.assert_close(latents(model, plugins), latents(model, {}), **CLOSE)


def test_mutual_self_attention_reads_the_sources_keys_and_values(model):
    """Another source changes the edit, inside the window alone."""
    plugins = {"source": source(), "masa": MutualSelfAttention(MutualSelfAttention.Config([0, 2]))}
    ours = latents(model, plugins)
    assert not torch.allclose(ours, latents(model, {"source": source()}), atol=1e-4)
    late = MutualSelfAttention(MutualSelfAttention.Config([2, 2]))
    assert not torch.allclose(ours, latents(model, {"source": source(), "masa": late}), atol=1e-4)


def adain(x, y):
    """eq. 4 of StyleAligned: x `b h n d` with mean and deviation of y over the tokens."""
    spread = (x.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(2, True)) / spread * (
        y.var(2, correction=0, keepdim=True) + 1e-5
    ).sqrt() + y.mean(2, True)


@pytest.mark.parametrize(
    "options", [{}, {"normalise": False}, {"scale": 1.2, "shift": -0.7}], ids=str
)
def test_shared_attention_is_one_softmax_over_own_and_reference_keys(model, options):
    """For both pictures, with and without the prompt, at every site; text queries are untouched."""
    plugin, recorder = SharedAttention(SharedAttention.Config(**options)), Recorder()
    session = inlay.Session(model[0], {"s": plugin, "recorder": recorder}, tracer=recorder)
    asked = {"steps": 2, "n": 2, "conds": model[2], **model[1]}
    session.run({"source": "a", "edit": "b"}, **asked)
    places = recorder.edited("s")
    assert {branch for _, branch in places} == {"edit/text", "edit/null"}
    for call, branch in places:
        q, k, v = (t.double() for t in call.args[:3])
        image = call.program.spans(q.shape[2], k.shape[2])[0]["image"]
        own, other = (call.program.rows[b] for b in (branch, branch.replace("edit", "reference")))
        theirs, keys, queries = k[other, :, image], k[own].clone(), q[own, :, image]
        if options.get("normalise", True):
            queries = adain(queries, q[other, :, image])
            keys[:, :, image] = adain(keys[:, :, image], theirs)
        logits = queries @ theirs.mT / q.shape[3] ** 0.5
        logits = options.get("scale", 1.0) * logits + options.get("shift", 0.0)
        p = torch.cat([queries @ keys.mT / q.shape[3] ** 0.5, logits], -1).softmax(-1)
        ours = call.answer(call.args[2])[own]
        values = torch.cat([v[own], v[other, :, image].expand(2, -1, -1, -1)], 2)
        torch.testing.assert_close(ours[:, :, image], (p @ values).float(), **CLOSE)
        text = slice(0, image.start)
        plain = (q[own, :, text] @ k[own].mT / q.shape[3] ** 0.5).softmax(-1) @ v[own]
        torch.testing.assert_close(ours[:, :, text], plain.float(), **CLOSE)


def test_shared_attention_draws_the_reference_as_if_alone_and_whatever_the_seed(model):
    shared = {"s": SharedAttention()}
    one, two = (run(model, shared, seed=seed).latents["reference"] for seed in (0, 1))
    assert torch.equal(one, two)
    alone = plugin(declare=lambda need: need.lane("reference", prompt="source", seed=6311))
    assert torch.equal(one, run(model, {"alone": alone}).latents["reference"])


def test_shared_attention_takes_the_source_lane_as_reference(model):
    cfg = SharedAttention.Config(lane="source", active=[0, 2])
    result = run(model, {"source": source(), "s": SharedAttention(cfg)})
    assert set(result.latents) == {"source", "edit"}
    assert not torch.allclose(
        result.latents["edit"], latents(model, {"source": source()}), atol=1e-4
    )
    with pytest.raises(PlanConflict, match="lane 'source', which nobody declares"):
        run(model, {"s": SharedAttention(cfg)})


def test_regional_prompts_lower_the_logits_outside(model):
    left = [{"words": "dog", "box": [0, 0, 0.5, 1]}]

    def change(p):
        side = round(p.shape[2] ** 0.5)
        outside = (torch.arange(p.shape[2]) % side >= side / 2)[None, None, :, None]
        factor = torch.where(outside, torch.tensor(-4.0).exp(), torch.tensor(1.0))
        p = torch.cat([p[..., :1], factor * p[..., 1:2], p[..., 2:]], -1)
        return p / p.sum(-1, keepdim=True)

    cfg = RegionalPrompts.Config(regions=left, strength=4.0, active=[0, 2])
    full = latents(model, {"full": explicit(change)})
    torch.testing.assert_close(latents(model, {"r": RegionalPrompts(cfg)}), full, **CLOSE)


def test_a_region_may_be_a_mask_on_the_board(model):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    box = RegionalPrompts.Config(regions=[{"words": "dog", "box": [0, 0, 0.5, 1]}])
    given = RegionalPrompts.Config(regions=[{"words": "dog", "mask": "mask:user"}])
    image = torch.rand(1, 3, 32, 32)
    ours, theirs = (
        latents(model, {"r": RegionalPrompts(c)}, image=image, mask=mask, size=32)
        for c in (box, given)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_attention_maps_change_nothing_and_are_published(model):
    cfg = AttentionMaps.Config(words=["dog"], steps=[1])
    result = run(model, {"maps": AttentionMaps(cfg)})
    assert torch.equal(result.latents["edit"], latents(model, {}))
    for name in ("map:dog", "map:dog at 1"):
        heat = result.board[name]
        assert heat.shape[:2] == (1, 1)
        assert (float(heat.min()), float(heat.max())) == (0.0, 1.0)
    assert not torch.equal(result.board["map:dog"], result.board["map:dog at 1"])


@pytest.mark.parametrize("plugin", SHOWN)
def test_the_page_shows_what_the_plugin_draws(plugin):
    page = pages.read("docs/attention.md")
    assert f"`{plugin}`: " in page and f"(pictures/attention/{plugin}.webp)" in page


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Reweight.Config(), r"plugins\.p\.words: no words"),
        (Reweight.Config({"dog": 0.0}, renorm=True), r"plugins\.p\.words: .*weight of 0"),
        (RegionalPrompts.Config(), r"plugins\.p\.regions: no regions"),
        (RegionalPrompts.Config([{"words": "dog"}]), r"plugins\.p\.regions\[0\].*is no region"),
        (RegionalPrompts.Config([{"words": "dog", "box": [0.5, 0, 0.2, 1]}]), r"\.box.*is no box"),
        (SharedAttention.Config(scale=0.0), r"plugins\.p\.scale: 0\.0 turns"),
        (AttentionMaps.Config(), r"plugins\.p\.words: no words"),
        (
            AttentionMaps.Config(["dog"], steps=[7]),
            r"plugins\.p\.steps.*\[7\] are outside a run of 3",
        ),
        (AttentionMaps.Config(["dog"], scale=99), r"plugins\.p\.scale.*no site of scale 99"),
    ],
)
def test_options_that_cannot_work_are_refused(model, cfg, message):
    made = {Reweight.Config: Reweight, RegionalPrompts.Config: RegionalPrompts}
    made |= {SharedAttention.Config: SharedAttention}
    with pytest.raises(ConfigError, match=message):
        run(model, {"p": made.get(type(cfg), AttentionMaps)(cfg)})


def test_a_word_that_the_prompt_has_not_is_refused(model):
    with pytest.raises(InputError, match="'cat' is not in the prompt"):
        run(model, {"p": Reweight(Reweight.Config({"cat": 2.0}))})


def test_keys_and_values_come_from_the_board_too(model):
    """A plugin publishes them by site; `append` joins them to the row's own."""
    made = {}

    def begin(run):
        g = torch.Generator().manual_seed(3)
        for site in run.backbone.sites:
            k, v = torch.randn(2, 1, site.heads, 5, site.dim, generator=g)
            made[site.name] = Held(k=k, v=v)
        run.board["kv:given"] = made

    def declare(need):
        need.publish("kv:given")
        sites = need.select(kind=["self", "joint"])
        need.edit("append", "edit/text", sites, queries="image", from_="kv:given")

    def attention(edits):
        edits.on("edit/text", "image").append("kv:given")

    def patched(need):
        need.edit("patch", "edit/text", need.select(kind=["self", "joint"]), queries="image")

    def joined(site, edits):
        def full(q, k, v, mask, attend):
            k, v = (torch.cat(pair, 2) for pair in zip((k, v), made[site.name][:2], strict=True))
            return attend(q, k, v)

        edits.on("edit/text", "image").patch(full)

    ours = latents(model, {"given": plugin(declare=declare, begin=begin, attention=attention)})
    full = latents(model, {"full": plugin(declare=patched, attention=joined)})
    torch.testing.assert_close(ours, full, **CLOSE)
    assert not torch.allclose(ours, latents(model, {}), atol=1e-4)


def test_project_kv_is_what_the_site_makes_of_hidden_states():
    site = stable_diffusion().unet.mid_block.attentions[0].transformer_blocks[0].attn1
    hidden, seen = torch.randn(2, 7, site.query_dim), {}

    def kept(sdpa, q, k, v, *args, **rest):
        seen.update(k=k, v=v)
        return sdpa(q, k, v)

    with Seam({"s": site}) as seam:
        seam.programs = {"s": kept}
        site(hidden)
    held = project_kv(site, hidden)
    assert torch.equal(held.k, seen["k"]) and torch.equal(held.v, seen["v"])
