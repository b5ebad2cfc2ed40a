"""Several users of one model at once, and models that no edit can reach: results are right, or the
error says what to do; and everything is restored."""

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

import inlay
from guests import STOCK
from inlay import ModelError, SeamMissed
from inlay.backbones import adapt
from inlay_attention import Seam, attention_modules
from models import conds, flux, stable_diffusion
from spies import Editor, plugin
from test_attention import hooks

FAMILIES = {"flux": flux, "sd": stable_diffusion}
CALLS = {"flux": {"true_cfg": 2.0}, "sd": {"guidance": 3.0}}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def pipe(family):
    pipe = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was():
    before = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is before


def run(pipe, plugins=None, **options):
    kind = "flux" if hasattr(pipe, "transformer") else "sd"
    given = {"conds": conds(), "steps": 3, "seed": 4, **CALLS[kind]}
    return inlay.Session(pipe, plugins).run(**given | options).latents["edit"]


def louder(gain=1.5, **options):
    return Editor(options={"keys": "all", "gain": gain}, **options)


# processors that compute attention themselves -------------------------------------------------


def eager(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


class XFormersLike:
    """What xformers' and sage's processors do: their own kernel in place of torch's."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        out = eager(*(t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v)))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "processor",
    [AttnProcessor, lambda: SlicedAttnProcessor(1), XFormersLike],
    ids=["eager", "sliced", "xformers"],
)
@pytest.mark.parametrize("mode", ["session", "guest"])
def test_a_unet_that_computes_attention_itself_is_missed(processor, mode):
    pipe = STOCK["sd"].pipe()
    stock = STOCK["sd"].call(pipe)
    kept = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(processor())
    name = type(processor()).__name__
    with pytest.raises(SeamMissed, match=f"site .*: its processor {name} never.*AttnProcessor2_0"):
        if mode == "session":
            run(pipe, {"louder": louder()})
        else:
            with inlay.attach(pipe, {"louder": louder()}):
                STOCK["sd"].call(pipe)
    assert hooks(pipe.unet) == [] and not vars(pipe.scheduler).get("step")
    pipe.unet.set_attn_processor(kept)
    assert torch.equal(STOCK["sd"].call(pipe), stock)
    assert not torch.equal(run(pipe, {"louder": louder()}), run(pipe))


@pytest.mark.parametrize("mode", ["session", "guest"])
def test_another_attention_backend_is_missed(mode):
    """flex stands for sage and xformers: a backend that needs no package and is no SDPA."""
    pipe = STOCK["flux"].pipe()
    pipe.transformer.set_attention_backend("flex")
    with pytest.raises(SeamMissed, match=r'site .*set_attention_backend\("native"\)'):
        if mode == "session":
            run(pipe, {"louder": louder()})
        else:
            with inlay.attach(pipe, {"louder": louder()}):
                STOCK["flux"].call(pipe)
    assert hooks(pipe.transformer) == []
    pipe.transformer.set_attention_backend("native")
    assert not torch.equal(run(pipe, {"louder": louder()}), run(pipe))


# models that are compiled ---------------------------------------------------------------------


def whole(pipe, name):
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager"))


def in_place(pipe, name):
    getattr(pipe, name).compile(backend="eager")


def by_block(pipe, name):
    model = getattr(pipe, name)
    block = model.mid_block if name == "unet" else model.transformer_blocks[0]
    block.compile(backend="eager")


@pytest.mark.parametrize("compiled", [whole, in_place, by_block])
def test_a_model_that_was_compiled_before_is_refused(pipe, compiled):
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    compiled(pipe, name)
    with pytest.raises(ModelError, match=r"model: .* is compiled already.* Give it uncompiled"):
        run(pipe, {"louder": louder()})
    with pytest.raises(ModelError, match=r"model: .* is compiled already.* Give it uncompiled"):
        inlay.attach(pipe, {"louder": louder()})
    assert "check_inputs" not in vars(pipe) and "step" not in vars(pipe.scheduler)


# several sessions on one model ----------------------------------------------------------------


@pytest.mark.parametrize("event", ["prepare", "inputs", "combine", "post_step"])
def test_a_session_inside_another_of_the_same_model(pipe, event):
    """Neither edits the other, though both have hooks on the same modules."""
    few = {"depth": (0.0, 0.5)}
    outer, inner = louder(), {"few": louder(3.0, select=few)}
    alone, expected, seen = run(pipe, {"edit": louder()}), [run(pipe, inner), run(pipe)], []

    def nested():
        seen.append([run(pipe, {"few": louder(3.0, select=few)}), run(pipe)])

    made = run(pipe, {"edit": outer, "nested": plugin(**{event: nested})})
    assert torch.equal(made, alone)
    assert seen and all(
        torch.equal(a, b) for runs in seen for a, b in zip(runs, expected, strict=True)
    )


def test_a_session_inside_a_guest_of_the_same_pipeline(family):
    pipe = STOCK[family].pipe()
    expected, seen = run(pipe, {"edit": louder(3.0)}), []
    with inlay.attach(pipe, {"edit": louder()}):
        alone = STOCK[family].call(pipe)

    def nested(step):
        seen.append(run(pipe, {"edit": louder(3.0)}))

    with inlay.attach(pipe, {"edit": louder(), "nested": plugin(post_step=nested)}):
        assert torch.equal(STOCK[family].call(pipe), alone)
    assert len(seen) == 3 and all(torch.equal(made, expected) for made in seen)


def test_sessions_and_a_stock_call_in_threads_on_one_model(pipe):
    """Every thread ends where it ends alone; they meet inside each other's forwards."""
    works = [
        lambda: run(pipe, {"a": louder(1.5)}),
        lambda: run(pipe, {"b": louder(3.0)}),
        lambda: run(pipe, {"c": louder(0.5, select={"depth": (0.0, 0.3)})}),
        lambda: run(pipe),
    ]
    alone, results = [work() for work in works], {}
    together = threading.Barrier(len(works))

    def meet(module, args):
        """Each forward waits in its middle until the others are in theirs."""
        together.wait(timeout=20)

    module = list(attention_modules(adapt(pipe).denoiser).values())[1]
    hook = module.register_forward_pre_hook(meet)

    def work(i):
        results[i] = works[i]()

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(works))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    assert sorted(results) == list(range(len(works)))
    assert all(torch.equal(results[i], alone[i]) for i in results)
    assert hooks(adapt(pipe).denoiser) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_seams_of_one_model_close_in_any_order(pipe, order):
    model = adapt(pipe).denoiser
    plain = run(pipe)
    seams = [Seam(attention_modules(model)) for _ in range(2)]
    for seam in seams:
        seam.__enter__()
    seams[order[0]].__exit__(None, None, None)
    assert hooks(model) and torch.equal(run(pipe), plain)
    seams[order[1]].__exit__(None, None, None)
    assert hooks(model) == [] and torch.equal(run(pipe), plain)


def test_a_session_after_one_that_failed_in_a_forward(pipe):
    expected = run(pipe, {"edit": louder()})
    model = adapt(pipe).denoiser
    module = list(attention_modules(model).values())[-1]

    def fail(*_):
        raise RuntimeError("in the middle of a forward")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, {"edit": louder()})
    handle.remove()
    assert hooks(model) == [] and torch.equal(run(pipe, {"edit": louder()}), expected)
