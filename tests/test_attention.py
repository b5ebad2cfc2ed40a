"""The seam: found on every backbone, restored always, and equal to an independent oracle."""

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch.overrides import TorchFunctionMode

import inlay
from inlay import SeamMissed
from inlay.backbones import adapt
from inlay_attention import Edit, Rows, Seam, SiteProgram, attention_modules
from models import conds, flux, stable_diffusion
from spies import Editor, plugin

FAMILIES = {"flux": flux, "sd": stable_diffusion}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return FAMILIES[request.param]()


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    before = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is before


def hooks(model):
    return [
        (name, len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
        if m._forward_pre_hooks or m._forward_hooks
    ]


def run(pipe, plugins=None, **options):
    given = {"conds": conds(pooled=hasattr(pipe, "transformer")), "steps": 2, "guidance": 1.0}
    return inlay.Session(pipe, plugins).run(**given | options).latents["edit"]


def denoiser(pipe):
    return adapt(pipe).denoiser


# coverage -------------------------------------------------------------------------------------


def test_every_site_reaches_the_seam_once_per_call(pipe):
    calls = []
    stock = F.scaled_dot_product_attention

    def counting(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    F.scaled_dot_product_attention = counting
    try:
        run(pipe, steps=1)
    finally:
        F.scaled_dot_product_attention = stock
    own = len(attention_modules(pipe.vae.decoder))  # the decoder attends too
    assert len(calls) == len(inlay.Session(pipe).backbone.sites) + own
    editor = Editor()
    run(pipe, {"edit": editor}, steps=1)
    assert {name for _, name in editor.seen} == set(attention_modules(denoiser(pipe)))


def test_an_eager_processor_is_missed_by_name(pipe):
    if hasattr(pipe, "transformer"):
        return missed_by_another_backend(pipe)
    module = dict(denoiser(pipe).named_modules())[
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    processor = module.processor
    module.set_processor(AttnProcessor())
    try:
        with pytest.raises(SeamMissed, match=r"site mid_block.*attn1: its processor AttnProcessor"):
            run(pipe, {"edit": Editor()})
        run(pipe, {"edit": Editor(select={"block": ["down"]})})  # nobody asked for that site
    finally:
        module.set_processor(processor)


def missed_by_another_backend(pipe):
    """A processor of another kind, which writes its softmax out."""
    module = denoiser(pipe).transformer_blocks[0].attn
    processor = module.processor

    class Eager(type(processor)):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
            return hidden_states, encoder_hidden_states

    module.processor = Eager()
    try:
        with pytest.raises(SeamMissed, match=r"site transformer_blocks\.0\.attn: .*Eager never"):
            run(pipe, {"edit": Editor()})
    finally:
        module.processor = processor


# restoration ----------------------------------------------------------------------------------


def test_no_hook_is_installed_when_nobody_wants_one(pipe):
    seen = []

    def watch(step):
        seen.append((hooks(denoiser(pipe)), F.scaled_dot_product_attention))

    stock = F.scaled_dot_product_attention
    run(pipe, {"watch": plugin(observe=watch)})
    assert seen == [([], stock)] * 2


def test_hooks_are_on_subscribed_sites_only_and_gone_afterwards(pipe):
    seen = []
    select = {"depth": (0.0, 0.0)}
    watch = plugin(observe=lambda step: seen.append(hooks(denoiser(pipe))))
    plain = run(pipe)
    run(pipe, {"edit": Editor(select=select), "watch": watch})
    assert [(before, after) for _, before, after in seen[0]] == [(1, 1)]
    assert hooks(denoiser(pipe)) == []
    assert torch.equal(run(pipe), plain)


def test_everything_is_restored_after_an_exception_inside_a_forward(pipe):
    module = next(iter(attention_modules(denoiser(pipe)).values()))

    def fail(*_):
        raise RuntimeError("in the middle of a forward")

    plain, handle = run(pipe), module.to_out[0].register_forward_pre_hook(fail) if hasattr(
        module, "to_out"
    ) else None  # fmt: skip
    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, {"edit": Editor()})
    handle.remove()
    assert hooks(denoiser(pipe)) == []
    assert not attention_is_marked()
    assert torch.equal(run(pipe), plain)


def attention_is_marked():
    from inlay_attention import seam as attention

    return getattr(attention._local, "running", None) is not None


def test_an_exception_in_a_plugin_restores_too(pipe):
    def fail(step):
        raise ValueError("a plugin's mistake")

    with pytest.raises(ValueError, match="a plugin's mistake"):
        run(pipe, {"edit": Editor(), "fail": plugin(post_step=fail)})
    assert hooks(denoiser(pipe)) == []


def test_sessions_may_nest_and_neither_edits_the_other(pipe):
    alone = run(pipe, {"edit": Editor()})
    other, inner = stable_diffusion(seed=1), []
    plain = run(other)

    def nested(step):
        inner.append(run(other))

    outer = run(pipe, {"edit": Editor(), "nested": plugin(post_step=nested)})
    assert torch.equal(outer, alone)
    assert torch.equal(inner[0], plain)


def test_sessions_may_close_in_any_order():
    stock = F.scaled_dot_product_attention
    first, second = (Seam(attention_modules(stable_diffusion(seed).unet)) for seed in (0, 1))
    first.__enter__()
    second.__enter__()
    assert F.scaled_dot_product_attention is not stock
    first.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is not stock
    second.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is stock


def test_other_threads_are_untouched():
    """Two sessions and a stock pipeline in three threads end where each ends alone."""
    pipes, results = [stable_diffusion(seed) for seed in range(3)], {}
    editing = [True, True, False]

    def work(i):
        results[i] = run(pipes[i], {"edit": Editor()} if editing[i] else None)

    for i in range(3):
        work(i)
    alone, results = results, {}
    threads = [threading.Thread(target=work, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], alone[i]) for i in range(3))


def test_attention_outside_the_denoiser_is_untouched(pipe):
    """The VAE's own attention and any call between forwards pass straight through."""
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    stock, seen = F.scaled_dot_product_attention(q, q, q), []
    watch = plugin(post_step=lambda step: seen.append(F.scaled_dot_product_attention(q, q, q)))
    run(pipe, {"edit": Editor(), "watch": watch})
    assert all(torch.equal(out, stock) for out in seen) and len(seen) == 2


# another library on the same function ---------------------------------------------------------


def test_a_replacement_that_was_there_first_is_wrapped_and_left_alone(pipe):
    stock, calls = F.scaled_dot_product_attention, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    expected = run(pipe, {"edit": Editor()})
    F.scaled_dot_product_attention = theirs
    try:
        assert torch.equal(run(pipe, {"edit": Editor()}), expected)
        assert calls and F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = stock


def test_a_replacement_on_top_of_ours_survives_and_never_recurses(pipe):
    """They keep our dispatcher and call it: a later session must not put it under itself."""
    stock, expected = F.scaled_dot_product_attention, run(pipe, {"edit": Editor()})
    plain = run(pipe)

    def wrap(run):
        ours = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda *args, **kwargs: ours(*args, **kwargs)

    try:
        outcome = run(pipe, {"edit": Editor(), "wrap": plugin(prepare=wrap)})
        assert torch.equal(outcome, expected)
        theirs = F.scaled_dot_product_attention
        assert torch.equal(run(pipe), plain)
        assert torch.equal(run(pipe, {"edit": Editor()}), expected)
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = stock
    assert torch.equal(run(pipe, {"edit": Editor()}), expected)


# an oracle that shares no code with the seam --------------------------------------------------


class Doubled(TorchFunctionMode):
    """Every attention's logits times `gain`, through torch's own override protocol."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if args:
                args = (args[0], args[1] * self.gain, *args[2:])
            else:
                kwargs["key"] = kwargs["key"] * self.gain
        return func(*args, **kwargs)


def test_the_seam_equals_a_torch_function_mode(pipe):
    edited = run(pipe, {"edit": Editor()})
    with Doubled(1.5):
        oracle = run(pipe)
    torch.testing.assert_close(edited, oracle, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(edited, run(pipe), atol=1e-3)


def test_a_neutral_edit_moves_nothing(pipe):
    """A gain of one computes the same attention: the program's path itself adds no error."""
    neutral = Editor(options={"keys": "all", "gain": torch.tensor(1.0)})
    torch.testing.assert_close(run(pipe, {"edit": neutral}), run(pipe), rtol=1e-5, atol=1e-6)


def test_a_number_known_to_be_neutral_leaves_the_stock_call(pipe):
    """Bit for bit: no program takes the place of the model's own attention."""
    neutral = Editor(options={"keys": "all", "gain": 1.0})
    assert torch.equal(run(pipe, {"edit": neutral}), run(pipe)) and neutral.seen
    with Seam(attention_modules(denoiser(pipe))) as seam:
        seam.programs = {name: gain_of(1.0, name) for name in seam.modules}
        assert not seam.programs
        seam.programs = {name: gain_of(1.5, name) for name in seam.modules}
        assert seam.programs.keys() == seam.modules.keys()


def gain_of(gain, site):
    edit = Edit("gain", "p", "edit/text", value=gain)
    return SiteProgram(site, Rows.of({"edit/text": 1}), {"edit/text": [edit]}, (), {}, whole, {})


def whole(queries, keys):
    return {}, {}
