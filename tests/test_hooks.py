"""Every hook does what docs/hooks.md says: its example is run and its effect is checked."""

import pytest
import torch

import inlay
import pages
from inlay import Plugin
from inlay_config.config import Experiment
from models import conds, flux, stable_diffusion

PAGE = pages.read("docs/hooks.md")
EXAMPLES = {h.strip("`").split("(")[0]: text for h, text in pages.sections(PAGE).items()}
STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return flux()


@pytest.fixture
def example(tmp_path):
    """The plugin class that the documentation of a hook shows."""

    def load(hook):
        start = pages.blocks(PAGE, "python")[0]
        (code,) = pages.blocks(EXAMPLES[hook], "python")
        made = vars(pages.module(start + code, tmp_path, hook)).values()
        (cls,) = [
            c for c in made if isinstance(c, type) and issubclass(c, Plugin) and c is not Plugin
        ]
        assert hasattr(cls, hook) and cls.__doc__
        return cls

    return load


def run(pipe, plugin=None, **options):
    given = {"conds": conds(pooled=hasattr(pipe, "transformer")), "steps": STEPS, "seed": 3}
    return inlay.Session(pipe, {"example": plugin} if plugin else None).run(**given | options)


def latent(pipe, plugin=None, **options):
    return run(pipe, plugin, **options).latents["edit"]


def test_inlay_declare(pipe, example):
    session = inlay.Session(pipe, {"watch": example("inlay_declare")()})
    made = session.plan(Experiment(steps=STEPS), None, [])
    (probe,) = made.probes
    assert (probe.plugin, probe.branch, sorted(probe.steps)) == ("watch", "edit/text", [0, 1])
    middle = [s.name for s in session.backbone.sites if 0.3 <= s.depth <= 0.7]
    assert sorted(probe.sites) == sorted(middle) and middle
    seen = {}

    class Seen(type(session.plugins["watch"])):
        @inlay.hookimpl
        def inlay_observe(self, step):
            seen[step.index] = {k: v.shape for k, v in step.probes.get("word", {}).items()}

    run(pipe, Seen(), size=32)
    assert seen[0] == dict.fromkeys(middle, (1, 64, 1)) and seen[2] == {}


def test_inlay_prepare(pipe, example):
    mask = run(pipe, example("inlay_prepare")(), size=32, steps=1).board["mask:ring"]
    assert mask.shape == (1, 1, 8, 8)
    assert mask.sum() == 16 and mask[0, 0, 2:6, 2:6].all()


def test_inlay_begin(pipe, example):
    start = []

    class Seen(example("inlay_begin")):
        @inlay.hookimpl
        def inlay_pre_step(self, run, step):
            start.append((step.x["edit"], run.x_T["edit", "edit"]))

    run(pipe, Seen(), steps=1)
    assert torch.equal(start[0][0], 0.9 * start[0][1])


def test_inlay_pre_step(pipe, example):
    cls = example("inlay_pre_step")
    seen = {}

    class Seen(cls):
        @inlay.hookimpl
        def inlay_observe(self, run, step):
            seen[step.index] = (step.x["edit"], step.frame.sigma, run)

    latent(pipe, Seen(cls.Config(step=2)))
    x, sigma, made = seen[2]
    torch.testing.assert_close(x, sigma * made.noise("restart", x.shape))
    assert not torch.allclose(seen[1][0], seen[1][1] * made.noise("restart", x.shape))


def test_inlay_attention(pipe, example):
    plugin = example("inlay_attention")()
    assert not torch.allclose(latent(pipe, plugin), latent(pipe), atol=1e-4)
    once = example("inlay_attention")
    once.inlay_attention = inlay.hookimpl(
        lambda self, edits: edits.on("edit/text").scale((0,), 1.0)
    )
    torch.testing.assert_close(latent(pipe, once()), latent(pipe), rtol=1e-4, atol=1e-5)


def test_inlay_inputs(pipe, example):
    def predictions(cls):
        seen = []
        watch = inlay.hookimpl(lambda self, step: seen.append(step.preds["edit/text"]))
        latent(pipe, type("Seen", (cls,), {"inlay_observe": watch})(), steps=3)
        return seen

    muted, plain = predictions(example("inlay_inputs")), predictions(Plugin)
    assert torch.equal(muted[0], plain[0]) and torch.equal(muted[1], plain[1])
    assert not torch.allclose(muted[2], plain[2])


def test_inlay_combine(example):
    pipe = stable_diffusion()
    outputs = []

    class Seen(example("inlay_combine")):
        @inlay.hookimpl
        def inlay_observe(self, step):
            outputs.append((step.output["edit"], step.preds["edit/text"]))

    latent(pipe, Seen(), guidance=7.5)
    for output, text in outputs:
        torch.testing.assert_close(output.std(), text.std())
    assert torch.equal(latent(pipe, Seen(), guidance=1.0), latent(pipe, guidance=1.0))


def test_inlay_objective(pipe, example):
    cls = example("inlay_objective")
    pulled, plain = latent(pipe, cls()).mean(), latent(pipe).mean()
    assert abs(pulled - 1) < abs(plain - 1)
    still = latent(pipe, cls(cls.Config(scale=0.0)))
    torch.testing.assert_close(still, latent(pipe), rtol=1e-4, atol=1e-5)


def test_inlay_denoised(pipe, example):
    cls = example("inlay_denoised")
    x = latent(pipe, cls(cls.Config(limit=0.1)))
    torch.testing.assert_close(x, x.clamp(-0.1, 0.1), rtol=0, atol=1e-5)
    assert latent(pipe).abs().max() > 1


def test_inlay_post_step(pipe, example):
    """Where the mask is zero, the picture comes back; where it is one, nothing changes."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    result = run(pipe, example("inlay_post_step")(), image=picture, mask=mask, size=32)
    session = inlay.Session(pipe)
    clean = session.backbone.encode_image(result.board["image:source"])
    grid = session.backbone.to_grid(result.latents["edit"] - clean, (32, 32))
    torch.testing.assert_close(grid[..., 4:], torch.zeros_like(grid[..., 4:]))
    assert (grid[..., :4].abs() > 0.1).any()


def test_inlay_observe(pipe, example):
    watch = example("inlay_observe")()
    assert torch.equal(latent(pipe, watch), latent(pipe))
    assert [index for index, _ in watch.curve] == [0, 1, 2, 3]


def test_inlay_final(pipe, example):
    framed, plain = run(pipe, example("inlay_final")()), run(pipe)
    assert torch.equal(framed.latents["edit"], plain.latents["edit"])
    picture = framed.images["edit"]
    edge = torch.ones_like(picture)
    edge[..., 1:-1, 1:-1] = plain.images["edit"][..., 1:-1, 1:-1]
    assert torch.equal(picture, edge)


def test_a_misspelt_hook_is_refused(pipe):
    typo = type("Typo", (Plugin,), {"inlay_poststep": inlay.hookimpl(lambda self: None)})
    with pytest.raises(inlay.PluginError, match=r"plugins: .*inlay_poststep"):
        run(pipe, typo())


def test_a_misspelt_argument_is_refused(pipe):
    typo = type("Typo", (Plugin,), {"inlay_post_step": inlay.hookimpl(lambda self, stop: None)})
    with pytest.raises(inlay.PluginError, match=r"plugins: .*stop"):
        run(pipe, typo())
