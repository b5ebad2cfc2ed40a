"""Losses of Blended Diffusion by meaning: slopes, options, other model families, bad input."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from inlay import ConfigError, InputError, ModelError, Plugin, Session, hookimpl
from inlay.backbones import adapt
from inlay_bench import packages
from inlay_config.config import Gradient
from inlay_plugins import clips, views
from inlay_plugins.background_loss import BackgroundLoss
from inlay_plugins.clip_guidance import ClipGuidance
from inlay_plugins.range_loss import RangeLoss
from inlay_toybox import world
from models import conds, flux, pixel, stable_diffusion, stable_diffusion_xl
from spies import plugin

CLIP = clips.load("toybox/clip")
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., 4:12, 4:12] = 1
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
MAKE = {"pixel": pixel, "sd": stable_diffusion, "flux": flux}


def drawn(kind="pixel", plugins=None, gradient=None, steps=4, **asked):
    """A run of a tiny random model, with a mask in the middle."""
    pipe = MAKE[kind]()
    if kind == "pixel":
        pipe.scheduler = DDIMScheduler(clip_sample=False)
    session = Session(pipe, plugins or {}, gradient=Gradient(**gradient or {}))
    size = session.backbone.native_size
    mask = torch.nn.functional.interpolate(MASK, size)
    given = {} if kind == "pixel" else conds(pooled=kind == "flux")
    asked = {"image": PICTURE, "mask": mask, "conds": given, "seed": 3, "n": 2} | asked
    return session.run({"edit": "a cow", "source": ""}, steps=steps, guidance=2.0, **asked)


def nearness(result, prompt="a cow") -> float:
    """To the prompt, of what the mask shows."""
    picture = result.images["edit"]
    mask = torch.nn.functional.interpolate(MASK, picture.shape[-2:])
    seen = torch.nn.functional.adaptive_avg_pool2d((2 * picture - 1) * mask, CLIP.side)
    return float((CLIP.images(seen / 2 + 0.5) @ CLIP.texts([prompt])[0]).mean())


class Told(Plugin):
    """What a loss is at step 1, the model moved by `by` along a direction; nobody is guided."""

    def __init__(self, loss, by):
        super().__init__()
        self.loss, self.by = loss, by

    @hookimpl
    def inlay_prepare(self, run):
        self.loss.texts, self.loss.files = {"a cow": 1.0}, {}
        self.loss.inlay_prepare(run)

    @hookimpl
    def inlay_begin(self, run, pass_, x):
        self.loss.inlay_begin(run, pass_, x)

    @hookimpl
    def inlay_pre_step(self, step):
        if step.index == 1:
            step.x["edit"] = step.x["edit"] + self.by * along(step.x["edit"])

    @hookimpl
    def inlay_denoised(self, run, step):
        if step.index == 1:
            self.said = float(self.loss.inlay_objective(run, step, "edit").double().sum())


def along(x):
    """A direction of unit length."""
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return way / way.norm()


@pytest.mark.parametrize("kind", MAKE)
def test_the_gradient_is_the_losses_slope(kind):
    """Finite differences through model, autoencoder, augmentations and CLIP."""
    moves = {}

    def look(run, step):
        if step.index == 1:
            moves["x0"] = run.unguided["edit"] - step.x0["edit"], step.frame

    guided = {"clip_guidance": {"active": [1, 1]}, "look": plugin(denoised=look)}
    drawn(kind, {"extending_augmentations": {}} | guided, steps=3)
    moved, frame = moves["x0"]
    slope = moved * frame.alpha / frame.sigma**2
    sides = []
    for by in (0.1, -0.1):
        told = Told(ClipGuidance(name="clip_guidance"), by)
        drawn(kind, {"extending_augmentations": {}, "told": told}, steps=3)
        sides.append(told.said)
    numeric = (sides[0] - sides[1]) / 0.2
    assert float((slope * along(slope)).sum()) == pytest.approx(numeric, rel=0.03, abs=0.05)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("through", ["model", "x0"])
def test_guidance_brings_the_picture_nearer_to_the_prompt(kind, through):
    plain = nearness(drawn(kind))
    for distance in ("spherical", "cosine"):
        scale = 10.0 if kind == "sd" else 300.0  # a random autoencoder amplifies
        options = {"scale": scale, "through": through, "distance": distance}
        assert nearness(drawn(kind, {"clip_guidance": options})) > plain + 0.01


def test_prompts_and_pictures_pull_and_push(tmp_path):
    scene = world.render(world.views("kite", 1, 9)[0]).image
    Image.fromarray(scene).save(tmp_path / "kite.png")
    plain = drawn()
    towards = drawn(plugins={"clip_guidance": {"prompts": {"a kite": 1.0}}})
    away = drawn(plugins={"clip_guidance": {"prompts": {"a kite": -1.0}}})
    pictured = drawn(plugins={"clip_guidance": {"images": [str(tmp_path / "kite.png")]}})
    assert nearness(towards, "a kite") > nearness(plain, "a kite") > nearness(away, "a kite")
    assert nearness(pictured, "a kite") > nearness(plain, "a kite")


def test_several_clips_are_averaged():
    """The second one sees the square of another size."""
    small = clips.Clip("small", 8, CLIP.mean, CLIP.deviation, grown, CLIP.read)
    losses = []
    for loaded in ([CLIP], [small], [CLIP, small]):
        told = Told(ClipGuidance(name="clip_guidance", loaded=loaded), 0.0)
        drawn(plugins={"told": told}, steps=3)
        losses.append(told.said)
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def grown(pictures):
    return CLIP.see(pictures.repeat_interleave(8, 2).repeat_interleave(8, 3))


def test_a_window_and_every_second_step():
    guided = []
    look = plugin(denoised=lambda step: guided.append("edit" in step.x0.written))
    options = {"active": [1, 5], "every": 2}
    drawn(plugins={"clip_guidance": options, "look": look}, gradient={"alpha_min": 0.0}, steps=7)
    assert guided == [False, True, False, True, False, True, False]


def test_through_x0_nothing_outside_the_mask_moves():
    moved = []

    def look(run, step):
        moved.append(run.unguided["edit"] - step.x0["edit"] if run.unguided else None)

    options = {"through": "x0", "view": "x0", "active": [2, 2]}
    drawn(plugins={"clip_guidance": options, "look": plugin(denoised=look)})
    assert (moved[2] * (1 - MASK)).abs().max() == 0 < (moved[2] * MASK).abs().max()
    everywhere = options | {"mask": ""}
    drawn(plugins={"clip_guidance": everywhere, "look": plugin(denoised=look)})
    assert (moved[6] * (1 - MASK)).abs().max() > 0


def seen_by(picture, n=2, mask=MASK):
    """A run whose estimate is `picture` `n 3 16 16` in -1..1, of a source that is grey."""
    board = {"mask:user": mask, "latent:source": torch.zeros(1, 3, 16, 16)}
    backbone = SimpleNamespace(pixels=lambda x, size: x)
    run = SimpleNamespace(board=board, backbone=backbone, size=(16, 16))
    step = SimpleNamespace(x0={"edit": picture})
    return run, step


def test_the_background_is_compared_outside_the_mask():
    config = {"lpips": 0.0, "l2": 100.0, "view": "x0"}
    inside = MASK.expand(2, 3, 16, 16)
    for mode, share in (("fixed", 1.0), ("reference", 0.5)):
        loss = BackgroundLoss(BackgroundLoss.Config(mode=mode, **config))
        assert loss.inlay_objective(*seen_by(inside.clone()), "edit").abs().max() == 0
        off = loss.inlay_objective(*seen_by(0.5 * (1 - inside)), "edit")
        outside = float((1 - MASK).mean())
        torch.testing.assert_close(off, torch.full((2,), share * 25 * outside))
        assert loss.inlay_objective(*seen_by(inside), "source") is None


@pytest.mark.parametrize(("mode", "holed"), [("fixed", True), ("reference", False)])
def test_what_lpips_is_shown(mode, holed):
    """The published code compares a hole with the whole source."""
    shown = []

    def perceptual(a, b):
        shown.append((a, b))
        return torch.ones(len(a))

    loss = BackgroundLoss(BackgroundLoss.Config(mode=mode, l2=0.0, view="x0"), "b", perceptual)
    run, step = seen_by(torch.ones(2, 3, 16, 16))
    run.board["latent:source"] = torch.ones(1, 3, 16, 16)
    assert torch.equal(loss.inlay_objective(run, step, "edit"), torch.full((2,), 1000.0))
    ((seen, target),) = shown
    assert (seen * MASK).abs().max() == 0
    assert ((target * MASK).abs().max() == 0) == holed


def test_lpips_that_was_not_fetched_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "folder", lambda kind: tmp_path)
    with pytest.raises(ModelError, match="inlay models fetch lpips"):
        drawn(plugins={"source_trajectory": {}, "background_loss": {"mask": "mask:user"}})


def test_the_range_is_left_alone_and_beyond_it_pulled_back():
    loss = RangeLoss()
    assert loss.inlay_objective(*seen_by(torch.rand(2, 3, 16, 16) * 2 - 1), "edit").max() == 0
    beyond = torch.full((2, 3, 16, 16), -1.5)
    torch.testing.assert_close(
        loss.inlay_objective(*seen_by(beyond), "edit"), torch.full((2,), 12.5)
    )
    guided = {"clip_guidance": {"scale": 100.0, "active": [0.5, 1.0]}}
    wide, kept = (
        drawn(plugins=guided),
        drawn(plugins=guided | {"range_loss": {"active": [0.5, 1.0]}}),
    )

    def excess(x):
        return float((x.abs() - 1).clamp(min=0).mean())

    assert excess(kept.latents["edit"]) < excess(wide.latents["edit"])


def test_a_view_is_the_picture_early_and_what_is_there_late():
    x, x0 = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    run = SimpleNamespace(backbone=SimpleNamespace(pixels=lambda x, size: x), size=(4, 4))
    for sigma, expected in ((1.0, 0.0), (0.0, 1.0), (0.6, 0.4)):
        alpha = torch.tensor(1 - sigma**2).sqrt()
        frame = SimpleNamespace(alpha=alpha, sigma=torch.tensor(sigma))
        step = SimpleNamespace(frame=frame, x={"edit": x}, x0={"edit": x0})
        assert views.view(run, step, "edit", "blended").mean() == pytest.approx(expected, abs=1e-6)
        assert views.view(run, step, "edit", "x0").max() == 0


def test_the_first_of_algorithm_2_and_the_sum_of_all_compose_in_one_run():
    """Guidance, range, blending and pasting: the background is the source's, bit for bit."""
    result = drawn(
        plugins={
            "region": {}, "source_trajectory": {}, "structure_transfer": {"step": 1},
            "extending_augmentations": {"copies": 3}, "clip_guidance": {"mask": "mask:region"},
            "range_loss": {}, "latent_blend": {"steps": [[1, 3]], "mask": "mask:region"},
            "paste_back": {"mask": "mask:region", "feather": 0}, "rank": {"mask": "mask:region"},
        },
    )  # fmt: skip
    outside = (result.board["mask:region"] == 0).expand_as(result.images["edit"])
    source = result.board["image:original"].expand_as(result.images["edit"])
    assert torch.equal(result.images["edit"][outside], source[outside])
    assert not torch.equal(result.images["edit"], source)


@pytest.mark.parametrize(
    ("options", "asked", "error", "message"),
    [
        ({}, {"mask": torch.zeros(1, 1, 16, 16)}, InputError, "mask:user: the mask is black"),
        ({"prompts": "a cow on the grass " * 30}, {}, InputError, "toybox/clip reads 32"),
        ({"prompts": {"a cow": 0}}, {}, ConfigError, r"clip_guidance\.prompts: .* no list of"),
        ({"prompts": [""]}, {}, ConfigError, "CLIP is told nothing to look for"),
        ({"images": ["gone.png"]}, {}, InputError, r"clip_guidance\.images: there is no file"),
        ({"clips": []}, {}, ConfigError, "at least one clip"),
        ({"clips": ["toybox/clp"]}, {}, ModelError, "clip model: no model 'toybox/clp'"),
        ({"every": 0}, {}, ConfigError, "every is 1 or more"),
        ({"scale": float("nan")}, {}, ConfigError, r"clip_guidance\.scale: nan is not a finite"),
        ({"scale": 3e38}, {}, ModelError, "the gradient is not finite"),
        ({"mask": "mask:gone"}, {}, Exception, "needs 'mask:gone', which nobody publishes"),
    ],
)
def test_what_cannot_guide_is_refused(options, asked, error, message):
    with pytest.raises(error, match=message):
        drawn(plugins={"clip_guidance": options}, **asked)


def test_an_autoencoder_that_float16_overflows_decodes_but_does_not_guide():
    """Stable Diffusion XL's is upcast for a picture, which a backward could not follow."""
    backbone = adapt(stable_diffusion_xl().to(torch.float16))
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture = backbone.pixels(latent, (32, 32))
    assert picture.dtype == torch.float32 and picture.isfinite().all()
    assert backbone.pipe.vae.dtype == torch.float16
    with pytest.raises(ModelError, match="dtype: float16 overflows this autoencoder"):
        backbone.pixels(latent.requires_grad_(), (32, 32))


def test_a_scheduler_without_variance_cannot_move_the_mean():
    with pytest.raises(ConfigError, match=r"gradient\.apply: DDIMScheduler has no variance"):
        drawn(plugins={"clip_guidance": {}}, gradient={"apply": "mean"})


def test_a_grey_mask_guides_in_part():
    grey = [drawn(plugins={"clip_guidance": {"scale": 300.0}}, mask=MASK * v) for v in (1.0, 0.5)]
    assert not torch.equal(*(made.latents["edit"] for made in grey))
