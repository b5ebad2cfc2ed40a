"""The edit algebra against explicit softmax in float64: each operation, random combinations."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from explicit import HEADS, IMAGE, MATRIX, SPANS, TEXT, TOKENS, WIDTH, Site
from inlay import InputError, PluginError
from inlay_attention import AttnEdits, Held, Key


def assert_exact(site, tolerance=1e-12):
    expected, maps = site.explicit()
    torch.testing.assert_close(site.run(), expected, rtol=0, atol=tolerance)
    return maps


MASKS = {
    "none": None,
    "keys": torch.randn(1, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)).double(),
    "rows": torch.randn(4, 1, 1, TOKENS, generator=torch.Generator().manual_seed(2)).double(),
    "full": torch.randn(1, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3)).double(),
    "bool": torch.tensor([True] * 6 + [False, True])[None, None, None],
    "causal": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None],
}
KEYS = ["all", "text", "image", (0,), (0, 2)]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("queries", ["all", "text", "image"])
@pytest.mark.parametrize("renorm", [False, True])
def test_scale_multiplies_columns_of_the_map(keys, queries, renorm):
    op = ("scale", "edit", queries, {"keys": keys, "weight": 2.5, "renorm": renorm})
    assert_exact(Site([op]))


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("queries", ["all", "text", "image"])
def test_gain_multiplies_logits(keys, queries):
    assert_exact(Site([("gain", "edit", queries, {"keys": keys, "gain": 1.3})]))


@pytest.mark.parametrize("keys", ["all", "text", "image"])
@pytest.mark.parametrize("how", ["join", "sum"])
def test_append_attends_to_another_lane(keys, how):
    options = {"from_": "source", "keys": keys, "gain": 1.2, "how": how, "own": 0.8}
    assert_exact(Site([("append", "edit", "all", options)]))


@pytest.mark.parametrize("keys", ["all", "text", "image"])
@pytest.mark.parametrize("queries", ["all", "text", "image"])
def test_align_takes_the_statistics_of_another_lane(keys, queries):
    gained = ("gain", "edit", "image", {"keys": "image", "gain": 1.3})  # parts the queries
    assert_exact(Site([("align", "edit", queries, {"from_": "source", "keys": keys}), gained]))


def test_aligned_to_itself_nothing_moves():
    site = Site([("align", "edit/text", "all", {"from_": "edit/text", "keys": "image"})])
    torch.testing.assert_close(site.run(), Site().run(), rtol=0, atol=1e-12)


def test_append_takes_the_same_role_where_the_source_has_it():
    rows = {"source/null": 1, "source/text": 1, "edit/null": 1, "edit/text": 1}
    assert_exact(Site([("append", "edit", "all", {"from_": "source", "keys": "image"})], rows))


def test_a_branch_can_be_edited_alone():
    site = Site([("gain", "edit/text", "all", {"keys": "all", "gain": 1.5})])
    assert_exact(site)
    plain = Site().run()
    null, text = site.slices["edit/null"], site.slices["edit/text"]
    assert torch.equal(site.run()[null], plain[null])
    assert not torch.allclose(site.run()[text], plain[text])


@pytest.mark.parametrize("queries", ["all", "text", "image"])
@pytest.mark.parametrize(("qk", "kv"), [("source", ""), ("", "source"), ("source", "source")])
def test_route_takes_the_map_or_the_content_of_another_lane(qk, kv, queries):
    options = {key: lane for key, lane in (("qk", qk), ("kv", kv)) if lane}
    assert_exact(Site([("route", "edit", queries, options)], mask=MASKS["rows"]))


@pytest.mark.parametrize("how", ["qk", "kv"])
@pytest.mark.parametrize("keys", ["image", "text", (0, 2)])
def test_route_may_take_some_of_the_keys(how, keys):
    """Image queries and keys of the source, the prompt one's own: how a DiT is injected."""
    op = ("route", "edit", "image", {how: "source", "keys": keys})
    assert_exact(Site([op], mask=MASKS["rows"]))


@pytest.mark.parametrize("keys", ["text", (0, 1, 2)])
def test_map_moves_attention_between_keys(keys):
    assert_exact(Site([("map", "edit", "all", {"keys": keys, "matrix": MATRIX})]))


@pytest.mark.parametrize("alpha", [0.3, torch.tensor([0.0, 0.5, 1.0]).double()])
@pytest.mark.parametrize("matrix", [None, MATRIX])
def test_mix_blends_two_maps_key_by_key(alpha, matrix):
    options = {"from_": "source", "keys": "text", "alpha": alpha, "matrix": matrix}
    scaled = ("scale", "edit", "all", {"keys": (1,), "weight": 3.0})
    assert_exact(Site([("mix", "edit", "image", options), scaled], mask=MASKS["rows"]))


def test_mix_of_nothing_is_the_own_map_and_of_everything_the_other():
    own, other = (
        Site([("mix", "edit", "all", {"from_": "source", "keys": "all", "alpha": a})]).run()
        for a in (0.0, 1.0)
    )
    torch.testing.assert_close(own, Site().run(), rtol=0, atol=1e-14)
    routed = Site([("route", "edit", "all", {"qk": "source"})]).run()
    torch.testing.assert_close(other, routed, rtol=0, atol=1e-14)


BIASES = {
    "number": (1.5, "all", "all"),
    "keys": (torch.tensor([0.5, -1.0, 2.0]).double(), "all", "text"),
    "queries and keys": (torch.arange(15.0).double().view(5, 3) / 7, "image", "text"),
    "closed": (torch.tensor([0.0, -math.inf, 0.0]).double(), "image", "text"),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", ["none", "rows", "full"])
def test_bias_is_added_to_logits(bias, mask):
    value, queries, keys = BIASES[bias]
    assert_exact(Site([("bias", "edit", queries, {"keys": keys, "bias": value})], mask=MASKS[mask]))


def test_a_bias_per_query_follows_its_queries_where_another_edit_parts_them():
    bias = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(7)).double()
    gained = ("gain", "edit", "image", {"keys": "text", "gain": 1.3})
    assert_exact(Site([("bias", "edit", "all", {"keys": "all", "bias": bias}), gained]))


@pytest.mark.parametrize("keys", ["all", "text", "image"])
def test_append_aside_adds_a_second_softmax(keys):
    options = {"from_": "source", "keys": keys, "gain": 0.6, "how": "side"}
    assert_exact(Site([("append", "edit", "image", options)], mask=MASKS["rows"]))


def test_identity_gives_every_query_its_own_value():
    site = Site([("identity", "edit", "image", {})])
    assert_exact(site)
    rows = site.slices["edit/text"]
    assert torch.equal(site.run()[rows, :, TEXT:], site.v[rows, :, TEXT:])


def test_patch_replaces_attention_for_one_branch():
    def doubled(q, k, v, mask, attend):
        return 2 * attend(q, k, v, mask)

    plain = Site().run()
    site = Site([("patch", "edit/text", "all", {"function": doubled})])
    rows = site.slices["edit/text"]
    torch.testing.assert_close(site.run()[rows], 2 * plain[rows], rtol=0, atol=1e-14)
    assert torch.equal(site.run()[: rows.start], plain[: rows.start])


def test_keys_and_values_may_be_given():
    """What no row of the call holds: an exemplar's tokens, a stored trajectory."""
    g = torch.Generator().manual_seed(9)
    k, v = (torch.randn(1, HEADS, 4, WIDTH, generator=g, dtype=torch.float64) for _ in "kv")
    site = Site([("append", "edit", "all", {"from_": "store:dog", "gain": 0.9})])
    program = site.program()
    program.given = {"store:dog": Held(k, v)}
    out = program(F.scaled_dot_product_attention, site.q, site.k, site.v)
    rows = site.slices["edit/text"]
    keys, values = (
        torch.cat([a[rows], b.expand(2, -1, -1, -1)], 2)
        for a, b in ((site.k, 0.9 * k), (site.v, v))
    )
    maps = (site.q[rows] @ keys.transpose(2, 3) / math.sqrt(WIDTH)).softmax(-1)
    torch.testing.assert_close(out[rows], maps @ values, rtol=0, atol=1e-12)


def test_padding_of_the_shorter_prompt_is_never_seen():
    """Branches with one and three words in one call: the shorter one reads as if it were alone."""
    site = Site()
    program = site.program()
    program.lengths = {"source/text": 1, "edit/null": 3, "edit/text": 2}
    out = program(F.scaled_dot_product_attention, site.q, site.k, site.v)
    for branch, length in program.lengths.items():
        rows, real = site.slices[branch], [*range(length), *range(TEXT, TOKENS)]
        q, k, v = (t[rows][:, :, real] for t in (site.q, site.k, site.v))
        alone = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out[rows][:, :, real], alone, rtol=0, atol=1e-12)


def counted(site):
    """(queries, keys) of every SDPA call that a site makes."""
    calls = []

    def sdpa(q, k, v, mask=None, **options):
        calls.append((q.shape[0], q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v, mask, **options)

    site.program()(sdpa, site.q, site.k, site.v, site.mask)
    return calls


def test_edits_that_keep_the_shape_share_one_call():
    """Replaced, scaled, gained and plain rows: four rows, one call."""
    ops = [
        ("route", "edit/null", "all", {"qk": "source"}),
        ("scale", "edit/text", "all", {"keys": "text", "weight": 2.0}),
        ("gain", "edit/text", "all", {"keys": "image", "gain": 1.1}),
    ]
    assert counted(Site(ops)) == [(4, TOKENS, TOKENS)]
    assert_exact(Site(ops))


def test_both_branches_of_an_extended_lane_share_one_call():
    joined = ("append", "edit", "all", {"from_": "source", "keys": "image"})
    assert counted(Site([joined])) == [(1, TOKENS, TOKENS), (3, TOKENS, TOKENS + IMAGE)]
    mixed = ("mix", "edit", "all", {"from_": "source", "keys": "text", "alpha": 0.5})
    assert counted(Site([mixed])) == [(7, TOKENS, TOKENS)]


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_added_to_and_never_dropped(mask):
    ops = [
        ("append", "edit", "image", {"from_": "source", "keys": "image", "gain": 1.1}),
        ("gain", "edit", "all", {"keys": "text", "gain": 1.2}),
        ("scale", "edit/text", "all", {"keys": "text", "weight": 0.5, "renorm": True}),
    ]
    assert_exact(Site(ops, mask=MASKS[mask]))


def test_grouped_query_attention_is_expanded():
    site = Site([("append", "edit", "all", {"from_": "source", "keys": "image"})], kv_heads=1)
    expected, _ = site.explicit()
    torch.testing.assert_close(site.run(enable_gqa=True), expected, rtol=0, atol=1e-12)


def test_causal_attention_keeps_its_mask():
    ops = [("gain", "edit", "all", {"keys": "all", "gain": 1.5})]
    expected, _ = Site(ops, mask=MASKS["causal"]).explicit()
    torch.testing.assert_close(Site(ops).run(is_causal=True), expected, rtol=0, atol=1e-12)


def test_rows_without_edits_are_untouched_bit_for_bit():
    site = Site([("gain", "edit/text", "all", {"keys": "all", "gain": 1.5})])
    rows = site.slices["source/text"]
    sdpa = F.scaled_dot_product_attention
    assert torch.equal(site.run()[rows], sdpa(site.q[rows], site.k[rows], site.v[rows]))


operations = st.one_of(
    st.tuples(
        st.just("scale"),
        st.sampled_from(["edit", "edit/text", "edit/null", "source"]),
        st.sampled_from(["all", "text", "image"]),
        st.fixed_dictionaries(
            {
                "keys": st.sampled_from(KEYS),
                "weight": st.floats(0.1, 3),
                "renorm": st.booleans(),
                "plugin": st.sampled_from("abc"),
            }
        ),
    ),
    st.tuples(
        st.just("gain"),
        st.sampled_from(["edit", "edit/text", "edit/null", "source"]),
        st.sampled_from(["all", "text", "image"]),
        st.fixed_dictionaries(
            {
                "keys": st.sampled_from(KEYS),
                "gain": st.floats(0.2, 2),
                "plugin": st.sampled_from("abc"),
            }
        ),
    ),
    st.tuples(
        st.just("append"),
        st.sampled_from(["edit", "edit/text", "edit/null"]),
        st.sampled_from(["all", "text", "image"]),
        st.fixed_dictionaries(
            {
                "from_": st.just("source"),
                "keys": st.sampled_from(["all", "text", "image"]),
                "gain": st.floats(0.2, 2),
                "plugin": st.sampled_from("abc"),
            }
        ),
    ),
)


def edit_of(op, **options):
    """Strategy of one operation on a lane or branch of the edit, by some of its queries."""
    return st.tuples(
        st.just(op),
        st.sampled_from(["edit", "edit/text", "edit/null"]),
        st.sampled_from(["all", "text", "image"]),
        st.fixed_dictionaries({"plugin": st.sampled_from("abc"), **options}),
    )


SOURCE, PARTS = st.just("source"), st.sampled_from(["text", (0, 2), (1,)])
SQUARE = {"text": 3, (0, 2): 2, (1,): 1}
exclusive = st.one_of(  # of these, one per query: the conflict table refuses two
    edit_of("map", keys=PARTS),
    edit_of("mix", from_=SOURCE, keys=PARTS, alpha=st.floats(0, 1)),
    edit_of("mix", from_=SOURCE, keys=st.just("all"), alpha=st.floats(0, 1)),
)
further = st.one_of(
    operations,
    edit_of("bias", keys=st.sampled_from(KEYS), bias=st.floats(-2, 2)),
    edit_of(
        "append",
        from_=SOURCE,
        keys=st.sampled_from(["all", "text", "image"]),
        gain=st.floats(0.2, 2),
        how=st.just("side"),
    ),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    ops=st.lists(further, max_size=5),
    alone=st.none() | exclusive,
    qk=st.none() | edit_of("route", qk=SOURCE),
    kv=st.none() | edit_of("route", kv=SOURCE),
    align=st.none() | edit_of("align", from_=SOURCE, keys=st.sampled_from(["all", "image"])),
    mask=st.sampled_from(sorted(set(MASKS) - {"causal"})),  # a second softmax needs a key to see
    seed=st.integers(0, 5),
)
def test_random_combinations_of_the_whole_algebra(ops, alone, qk, kv, align, mask, seed):
    if alone and "keys" in alone[3] and alone[3]["keys"] in SQUARE:
        g = torch.Generator().manual_seed(seed)
        m = SQUARE[alone[3]["keys"]]
        matrix = torch.rand(m, m, generator=g, dtype=torch.float64)
        alone = (*alone[:3], alone[3] | {"matrix": matrix})
    site = Site([*ops, *filter(None, (alone, qk, kv, align))], mask=MASKS[mask], seed=seed)
    site.probes = [("columns", "edit/text", "columns", (0, 2)), ("rows", "edit/text", "rows", (1,))]
    expected, maps = site.explicit()
    torch.testing.assert_close(site.run(), expected, rtol=0, atol=1e-11)
    check_probes(site, maps)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    ops=st.lists(operations, max_size=6),
    summed=st.none() | st.floats(0.2, 2),
    mask=st.sampled_from(sorted(MASKS)),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
)
def test_random_combinations_compose_exactly(ops, summed, mask, kv_heads, seed):
    if summed:
        options = {"from_": "source", "keys": "image", "gain": summed, "own": 0.7, "how": "sum"}
        ops = [("append", "edit", "image", options | {"plugin": "c"}), *ops]
    probes = [
        ("columns", "edit/text", "columns", (0, 2)),
        ("rows", "edit/text", "rows", (1,)),
    ]
    site = Site(ops, probes=probes, mask=MASKS[mask], kv_heads=kv_heads, seed=seed)
    expected, maps = site.explicit()
    out = site.run(enable_gqa=kv_heads != HEADS)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    check_probes(site, maps)


def check_probes(site, maps):
    """What was read equals the explicit map: own tokens first, appended ones behind."""
    image = torch.stack([maps["edit/text"][i].mean(1) for i in range(TEXT, TOKENS)], dim=1)
    close = {"rtol": 0, "atol": 1e-11}
    torch.testing.assert_close(site.store["columns"]["s"], image[..., [0, 2]], **close)
    row = maps["edit/text"][1].mean(1)[:, None, SPANS["image"]]
    torch.testing.assert_close(site.store["rows"]["s"], row, **close)


@pytest.mark.parametrize(("read", "others"), [("columns", "text"), ("rows", "image")])
def test_probe_sees_the_edits_of_its_own_queries_only(read, others):
    """An edit on the text's queries leaves the map of the image's queries as it is."""
    op = ("gain", "edit", others, {"keys": "all", "gain": 3.0})
    edited = Site([op], probes=[("p", "edit/text", read, (0,))])
    plain = Site(probes=[("p", "edit/text", read, (0,))])
    edited.run(), plain.run()
    assert torch.equal(edited.store["p"]["s"], plain.store["p"]["s"])


def test_plugin_order_moves_no_bit():
    ops = [
        ("append", "edit", "all", {"from_": "source", "keys": "all", "how": "sum", "plugin": "c"}),
        ("gain", "edit", "all", {"keys": "image", "gain": 1.7, "plugin": "a"}),
        ("gain", "edit", "all", {"keys": "all", "gain": 1.1, "plugin": "b"}),
        ("scale", "edit", "all", {"keys": "text", "weight": 3.1, "plugin": "d"}),
    ]
    forward, backward = Site(ops).run(), Site(ops[::-1]).run()
    assert torch.equal(forward, backward)
    assert_exact(Site(ops))


def test_gradients_flow_through_edits_and_probes():
    ops = [
        ("append", "edit", "image", {"from_": "source", "keys": "image", "gain": 1.4}),
        ("gain", "edit", "all", {"keys": "text", "gain": 1.2}),
        ("scale", "edit/text", "image", {"keys": (1,), "weight": 2.0}),
    ]
    site = Site(ops, probes=[("columns", "edit/text", "columns", (0,))])
    for tensor in (site.q, site.k, site.v):
        tensor.requires_grad_()
    weight = torch.randn(site.q.shape, generator=torch.Generator().manual_seed(4)).double()
    inputs = (site.q, site.k, site.v)
    expected, maps = site.explicit()
    column = torch.stack([maps["edit/text"][i].mean(1)[:, 0] for i in range(TEXT, TOKENS)], 1)
    explicit = torch.autograd.grad((expected * weight).sum() + column.square().sum(), inputs)
    loss = (site.run() * weight).sum() + site.store["columns"]["s"].square().sum()
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), explicit, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gains_may_be_tensors_that_receive_gradients():
    gain = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    site = Site([("gain", "edit", "all", {"keys": "image", "gain": gain})])
    value = lambda g: Site([("gain", "edit", "all", {"keys": "image", "gain": g})])  # noqa: E731
    (slope,) = torch.autograd.grad(site.run().square().sum(), gain)
    up, down = value(1.3 + 1e-5).run(), value(1.3 - 1e-5).run()
    numeric = (up.square().sum() - down.square().sum()) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)


def test_no_map_is_ever_materialised():
    """No tensor of N x N elements is made, whatever is edited or read."""
    ops = [
        ("append", "edit", "image", {"from_": "source", "keys": "image"}),
        ("scale", "edit", "all", {"keys": "text", "weight": 0.5, "renorm": True}),
    ]
    site = Site(ops, probes=[("columns", "edit/text", "columns", (0,))])
    with Largest() as seen:
        site.run()
    heads = rearrange(site.k, "b h n d -> b (h n d)").shape[1]
    assert seen.elements <= site.q.shape[0] * 2 * heads


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor any operation returned, the fused attention's own included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_an_undeclared_edit_is_refused():
    edits = AttnEdits(frozenset({Key("p", "gain", "edit")}), "site s", ("edit/text",), "p")
    edits.on("edit").gain("all", 2.0)
    with pytest.raises(PluginError, match=r"site s: p emitted an undeclared edit: scale on edit"):
        edits.on("edit").scale("all", 2.0)


def test_edits_of_queries_that_a_site_has_not_are_refused():
    site = Site([("gain", "edit", "text", {"keys": "image", "gain": 2.0})])
    program = site.program()
    program.spans = lambda q, k: ({"image": slice(0, q)}, {"image": slice(0, k)})
    with pytest.raises(PluginError, match="edits text queries, which this site has not"):
        program(F.scaled_dot_product_attention, site.q, site.k, site.v)


def test_sharing_needs_one_source_row_or_as_many_as_there_are_pictures():
    rows = {"source/text": 2, "edit/text": 3}
    site = Site([("append", "edit", "all", {"from_": "source", "keys": "all"})], rows)
    with pytest.raises(InputError, match="cannot share 2 source rows with 3 rows"):
        site.run()


def test_a_probe_holds_as_many_words_as_a_head_is_wide():
    wide = tuple(range(WIDTH + 1))
    site = Site(probes=[("columns", "edit/text", "columns", wide)])
    with pytest.raises(PluginError, match="cannot read columns of 5 text tokens at this site"):
        site.run()
