"""torch.compile: the model with its edits in one graph, and anew only for another structure."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

import inlay
from inlay import ConfigError, ModelError
from inlay.cli.trace import Tracer
from inlay_attention import AttnEdits, Key, Probe, Rows, Seam, SiteProgram, attention_modules
from inlay_config.config import Experiment, Gradient
from models import conds, flux, stable_diffusion
from spies import Editor, plugin

STEPS = 3


def tiny_flux(**layers):
    """One double and one single block: compiling is what takes the time here."""
    pipe = flux()
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1, **layers}
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe


def tiny_sd():
    """One level: self- and cross-attention on the way down and, twice, on the way up."""
    pipe = stable_diffusion()
    config = {**pipe.unet.config, "block_out_channels": (8,), "mid_block_type": None}
    config |= {"down_block_types": ("CrossAttnDownBlock2D",)}
    config |= {"up_block_types": ("CrossAttnUpBlock2D",)}
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config(config).eval()
    return pipe


FAMILIES = {"flux": tiny_flux, "sd": tiny_sd}


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return FAMILIES[request.param]()


@pytest.fixture
def graphs():
    """A backend that runs a graph as it is, and the graphs it was given."""
    torch._dynamo.reset()
    return []


def backend(graphs):
    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return keep


def run(session, steps=STEPS):
    given = conds(pooled=session.backbone.flow)
    return session.run(conds=given, steps=steps, guidance=1.0).latents["edit"]


def denoiser(pipe):
    return inlay.Session(pipe).backbone.denoiser


class Ramp(Editor):
    """Another gain in every step, one among them that changes nothing; `active` steps only."""

    def inlay_attention(self, step, site, edits):
        self.options["gain"] = 1.0 + 0.2 * (step.index - 1)
        super().inlay_attention(step, site, edits)

    inlay_attention = inlay.hookimpl(inlay_attention)


# whole models ---------------------------------------------------------------------------------


def test_one_pipeline_with_other_plugins_in_turn_ends_where_it_ends_uncompiled(pipe, graphs):
    def scaled():
        options = {"keys": "all", "weight": 0.5, "renorm": False}
        return {"b": Editor("scale", options=options, select={"depth": (0.0, 0.4)})}

    made = {"none": dict, "gain": lambda: {"a": Ramp()}, "scale": scaled}
    turns, compiled = ("none", "gain", "scale", "gain", "none"), [1, 2, 3, 3, 3]
    if hasattr(pipe, "unet"):  # compiling it takes long
        turns, compiled = ("none", "gain", "none", "gain"), [1, 2, 2, 2]
    expected = {name: run(inlay.Session(pipe, made[name]())) for name in turns}
    assert all(
        not torch.equal(expected["none"], expected[name]) for name in turns if name != "none"
    )
    options = {"backend": backend(graphs)}
    sessions = {name: inlay.Session(pipe, made[name](), compile=options) for name in turns}
    counts = []
    for name in turns:
        assert torch.equal(run(sessions[name]), expected[name]), name
        counts.append(len(graphs))
    assert counts == compiled  # fullgraph: one graph each, whatever the numbers of a step
    assert torch.equal(run(inlay.Session(pipe)), expected["none"])


def test_a_window_costs_one_more_graph_and_numbers_cost_none(graphs):
    pipe = tiny_flux()
    windowed = {"a": Ramp(active=[1, 2])}
    expected = run(inlay.Session(pipe, windowed), steps=4)
    tracer, options = Tracer(), {"backend": backend(graphs)}
    session = inlay.Session(pipe, windowed, compile=options, tracer=tracer)
    with ThreadPoolExecutor(1) as fresh:  # nothing ran in this thread before
        assert torch.equal(fresh.submit(run, session, steps=4).result(), expected)
    assert len(graphs) == 2
    assert torch.equal(run(session, steps=4), expected)
    assert len(graphs) == 2
    timed = {what: calls for (what, _), (calls, _) in tracer.spent.items()}
    assert timed["model"] == 8 and "site" not in timed  # sites are part of the compiled model


def test_regional_compilation_compiles_equal_blocks_once(graphs):
    pipe = tiny_flux(num_layers=3, num_single_layers=2)
    expected = run(inlay.Session(pipe, {"a": Ramp()}))
    options = {"regional": True, "backend": backend(graphs)}
    session = inlay.Session(pipe, {"a": Ramp()}, compile=options)
    assert torch.equal(run(session), expected)
    assert len(graphs) == 3  # double blocks (the first gets other strides than the next), single
    assert torch.equal(run(inlay.Session(pipe, compile=options)), run(inlay.Session(pipe)))


def test_the_blocks_of_a_unet_compile_too(graphs):
    pipe = tiny_sd()
    expected = run(inlay.Session(pipe, {"a": Ramp()}))
    options = {"regional": True, "backend": backend(graphs)}
    session = inlay.Session(pipe, {"a": Ramp()}, compile=options)
    assert torch.equal(run(session), expected)
    compiled = {type(module).__name__ for module in session.compiled.targets}
    assert compiled == {"BasicTransformerBlock"} and len(graphs) < len(session.compiled.targets)


def test_nothing_stays_compiled(pipe):
    model = denoiser(pipe)

    def fail(step):
        raise ValueError("a plugin's mistake")

    session = inlay.Session(pipe, {"fail": plugin(pre_step=fail)}, compile=True)
    with pytest.raises(ValueError, match="a plugin's mistake"):
        run(session)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# programs -------------------------------------------------------------------------------------

BRANCHES = ("source/text", "edit/null", "edit/text")
SPANS = {"text": slice(0, 2), "image": slice(2, 6)}
SAID = {
    "logits": lambda on: (
        on.align("source").gain((1,), 2.0).bias("image", 0.5).scale("text", 2.0, renorm=True)
    ),
    "maps": lambda on: on.route(qk="source").mix("source", "text", 0.7, torch.eye(2).flip(0)),
    "keys": lambda on: (
        on.append("source", "image", 1.1).append("source", "text", 0.4, how="side")
        .append("source", "text", 0.3, how="sum", own=0.6).route(kv="source", keys="image")
    ),
    "columns": lambda on: on.scale((0,), 2.0).map("text", torch.ones(2, 2)),
    "identity": lambda on: on.identity(),
    "patch": lambda on: on.patch(lambda q, k, v, mask, attend: 2 * attend(q, k, v, mask)),
}  # fmt: skip


class Everything(tuple):
    """Declares whatever is said."""

    def __iter__(self):
        return iter([self])

    def covers(self, key: Key) -> bool:
        return True


def site(said, numbers=None):
    edits = AttnEdits(Everything(), "a test", BRANCHES, "p")
    said(edits.on("edit"))
    reads = ("columns", "rows", "mass")
    probes = [Probe(r, "p", "edit/text", r, frozenset("s"), frozenset({0}), (0, 1)) for r in reads]
    words, rows = dict.fromkeys(reads, (0, 1)), Rows.of(dict.fromkeys(BRANCHES, 1))
    spans = lambda queries, keys: (SPANS, SPANS)  # noqa: E731
    made = SiteProgram("s", rows, edits.by_branch, probes, words, spans, {})
    return made.with_tensors()


def qkv():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 6, 8, generator=g) for _ in range(3)]


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_every_operation_and_probe_is_one_graph(said, graphs):
    def attend(program, q, k, v):
        return program(F.scaled_dot_product_attention, q, k, v)

    eager, first, second = site(said), site(said), site(said)
    expected = attend(eager, *qkv())
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=backend(graphs))
    for program in (first, second):  # made anew in each step, and yet the same to the compiler
        assert torch.equal(compiled(program, *qkv()), expected)
        assert all(torch.equal(program.store[n]["s"], eager.store[n]["s"]) for n in eager.store)
    assert len(eager.store) == 3 and len(graphs) == 1


# gradients ------------------------------------------------------------------------------------


def gains(modules, gain):
    """Every site's logits times `gain`, for one row."""
    edits = AttnEdits(Everything(), "a test", ("edit/text",), "p")
    edits.on("edit").gain("all", gain)
    rows = Rows.of({"edit/text": 1})
    spans = lambda queries, keys: ({}, {})  # noqa: E731
    return {name: SiteProgram(name, rows, edits.by_branch, (), {}, spans, {}) for name in modules}


def gradient(pipe, checkpointing=False, compiled=None):
    """Of two evaluations under different edits with one backward, in a thread of its own: on CUDA
    checkpoints are recomputed in autograd's threads."""
    model, modules = pipe.unet, attention_modules(pipe.unet)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    call = {"encoder_hidden_states": conds(pooled=False)["edit"]["embeds"], "timestep": 1}
    model.train()
    with Seam(modules, compiled is not None) as seam:
        if checkpointing:
            model.enable_gradient_checkpointing(seam.checkpoint)
        try:
            loss = 0.0
            for gain in (torch.tensor(1.5), torch.tensor(0.5)):
                seam.programs = gains(modules, gain)
                loss = loss + model(x, **call).sample.square().sum()
                seam.check()
            seam.programs = {}
            backward = threading.Thread(target=loss.backward)
            backward.start()
            backward.join()
        finally:
            model.disable_gradient_checkpointing()
            model.eval()
    return x.grad


def test_gradient_checkpointing_recomputes_with_the_edits_of_its_evaluation():
    pipe = tiny_sd()
    expected = gradient(pipe)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(pipe, checkpointing=True), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}], ids=["eager", "compiled"])
def test_a_loss_over_two_calls_recomputes_each_with_its_edits(compiled):
    """True CFG on FLUX is two calls, and only one of them is edited; one backward for both."""
    pipe = tiny_flux()

    def steered(**options):
        loss = plugin(
            declare=lambda need: need.grad("edit"),
            objective=lambda step, lane: step.x0[lane].square().flatten(1).sum(1),
        )
        plugins = {"edit": Editor(target="edit/text"), "loss": loss}
        session = inlay.Session(pipe, plugins, **options)
        return session.run(conds=conds(), steps=2, true_cfg=3.0).latents["edit"]

    policy = Gradient(checkpoint=True)
    torch.testing.assert_close(steered(gradient=policy, compile=compiled), steered())


# refusals -------------------------------------------------------------------------------------


def whole(model):
    return torch.compile(model)


def in_place(model):
    model.compile()
    return model


def blocks(model):
    model.compile_repeated_blocks()
    return model


@pytest.mark.parametrize("how", [whole, in_place, blocks])
@pytest.mark.parametrize("plugins", [{}, {"e": Editor()}], ids=["no plugin", "an edit"])
def test_a_model_that_was_compiled_before_is_refused(how, plugins):
    pipe = tiny_sd()
    pipe.unet = how(pipe.unet)
    with pytest.raises(ModelError, match=r"is compiled already.*Session\(.*compile=True\)"):
        run(inlay.Session(pipe, plugins))


def test_a_model_that_somebody_compiles_later_is_edited_all_the_same():
    """Dynamo does not guard hooks that were not there, but the dispatcher and those that were."""
    pipe = tiny_flux()
    sessions = [inlay.Session(pipe, p) for p in ({}, {"e": Editor(select={"depth": (0.0, 0.0)})})]
    expected = [run(session) for session in sessions]
    pipe.transformer.compile(backend="eager")
    for session, wanted in zip(sessions, expected, strict=True):
        assert torch.equal(run(session), wanted)


def test_what_cannot_be_compiled_is_said():
    pipe = tiny_sd()
    pipe.unet.conv_in.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    session = inlay.Session(pipe, compile={"backend": "eager"})
    with pytest.raises(ModelError, match=r"compile: UNet2DConditionModel cannot be compiled: .*"):
        run(session)


def test_a_model_that_is_moved_about_is_not_compiled():
    pipe = tiny_sd()
    pipe.unet._hf_hook = object()
    with pytest.raises(ModelError, match="compile: offload moves the weights"):
        inlay.Session(pipe, compile=True)


@pytest.mark.parametrize("value", ["yes", 1, {"fullgrap": True}])
def test_an_experiment_says_which_options_there_are(value):
    with pytest.raises(ConfigError, match=r"compile: .* It must be true, false or some of backend"):
        Experiment(compile=value)
    assert Experiment(compile={"regional": True}).compile == {"regional": True}
