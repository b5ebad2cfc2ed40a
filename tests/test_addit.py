"""Add-it's plugins: options, composition, and what must hold on any model."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image

from inlay import (
    AttnEdits,
    AttnSite,
    ConfigError,
    InlayError,
    Needs,
    PlanConflict,
    Plugin,
    Rows,
    Session,
    Window,
    hookimpl,
)
from inlay.plan import Draft, Request
from inlay_attention import SiteProgram
from inlay_config import images
from inlay_config.config import Experiment, Prompt
from inlay_plugins import masks
from inlay_plugins.inversion import Inverter
from inlay_plugins.schedules import Schedule, step_index
from inlay_plugins.subject_mask import SubjectMask, infer_subject
from inlay_plugins.weighted_attention import WeightedAttention, Windows
from models import conds, flux, stable_diffusion

PROMPT = {"source": "a photo of a bed", "edit": "a photo of a spotted dog on a bed"}
WORDS = ["▁a", "▁photo", "▁of", "▁a", "▁spot", "ted", "▁dog", "▁on", "▁a", "▁bed", "</s>", ""]
WINDOWS = ("double", "single", "unet")
ADDIT = {
    "source_trajectory": {},
    "structure_transfer": {"step": 1},
    "weighted_attention": {},
    "subject_mask": {"step": 3, "count": 2},
    "latent_blend": {"steps": [3]},
}


class Record(Plugin):
    """Remembers lanes, predictions and x_next of every evaluation."""

    def __init__(self):
        super().__init__()
        self.steps = []

    @hookimpl
    def inlay_observe(self, run, step):
        self.steps.append((step.pass_, step.index, step.lanes, dict(step.x), dict(step.x_next)))


def given(pooled=True):
    embedded = conds(pooled=pooled)
    for name in embedded:
        embedded[name]["tokens"] = WORDS
    return embedded


def picture(height=40, width=56, seed=0):
    values = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((values[0] * 255).byte().permute(1, 2, 0).numpy())


def run(pipe=None, plugins=ADDIT, steps=6, skip=True, **options):
    """One run on a tiny model, FLUX at 32x32 px (8x8 tokens) unless told otherwise."""
    pipe = pipe or flux()
    session = Session(pipe, plugins, skip_dead_rows=skip)
    pooled = "transformer" in pipe.components
    options = {"prompt": PROMPT, "size": 32, "conds": given(pooled)} | options
    return session.run(steps=steps, **options)


def with_options(**changes):
    return {name: {**options, **changes.get(name, {})} for name, options in ADDIT.items()}


# options -----------------------------------------------------------------------------------------


def test_steps_are_indices_or_progress():
    assert [step_index(value, 30, "x") for value in (0, 29, 0.0, 0.5, 2 / 30)] == [0, 29, 0, 15, 2]
    for value in (30, -1, 1.0, float("nan"), "3", True):
        with pytest.raises(ConfigError, match=r"plugins\.x\.step"):
            step_index(value, 30, "plugins.x.step")


def test_schedules_are_linear_between_knots():
    assert [Schedule.parse(1.05, 10, "x")(p) for p in (0, 0.9)] == [1.05, 1.05]
    ramp = Schedule.parse({"start": 1.0, "end": 1.9}, 10, "x")
    assert [ramp(i / 10) for i in range(10)] == pytest.approx([1 + i / 10 for i in range(10)])
    knots = Schedule.parse([[2, 1.0], [0.6, 3.0]], 10, "x")
    assert [knots(i / 10) for i in (0, 2, 4, 6, 9)] == pytest.approx([1, 1, 2, 3, 3])
    for value in (float("nan"), -1, "high", [], [[5, 1.0], [2, 1.0]], {"start": 1.0}, [[0, None]]):
        with pytest.raises(ConfigError, match=r"plugins\.x\.gamma"):
            Schedule.parse(value, 10, "plugins.x.gamma")


@pytest.mark.parametrize(
    ("source", "edit", "subject"),
    [
        ("the grass", "a dog on the grass", "dog"),
        ("a cow on the grass", "a cow and a polar bear on the grass", "polar bear"),
        ("A bed.", "A bed with a cat.", "cat"),
        ("a kite over the grass", "a cow on the grass and a kite in it", "cow"),
    ],
)
def test_the_subject_is_what_the_edit_prompt_adds(source, edit, subject):
    assert infer_subject({"source": source, "edit": edit}, "subject") == subject


@pytest.mark.parametrize("edit", ["a man", "a man wearing a hat", ""])
def test_an_unclear_subject_is_asked_for(edit):
    with pytest.raises(ConfigError, match=r"plugins\.subject_mask\.subject"):
        infer_subject({"source": "a man", "edit": edit}, "plugins.subject_mask.subject")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighted_attention": {"windows": {"single": [0, 6]}}}, r"windows\.single.*0\.\.6"),
        ({"structure_transfer": {"step": 6}}, r"plugins\.structure_transfer\.step"),
        ({"latent_blend": {"steps": [9]}}, r"plugins\.latent_blend\.steps"),
        ({"subject_mask": {"subject": "cat"}}, "'cat' is not in the prompt"),
        ({"subject_mask": {"subject": "spot"}}, "'spot' is not in the prompt"),
        ({"subject_mask": {"localiser": "sam"}}, "localiser"),
        ({"subject_mask": {"sites": ["mid"]}}, "no attention site 'mid'"),
        ({"subject_mask": {"step": 0}, "structure_transfer": {"step": 2}}, "subject_mask reads"),
        ({"latent_blend": {"mask": "mask:user"}}, "'mask:user', which nobody publishes"),
        ({"source_trajectory": {"provide": "invert"}}, "needs a picture"),
        ({"source_trajectory": {"fixed_point_iterations": 0}}, "fixed_point_iterations"),
        ({"weighted_attention": {"gamma": -1}}, r"plugins\.weighted_attention\.gamma"),
        (
            {"weighted_attention": {"gamma": "auto", "gamma_t": 1.2}},
            "gamma_t says what gamma",
        ),
        ({"weighted_attention": {"gamma": "auto", "combine": "sum"}}, "weighs two sets of keys"),
        ({"weighted_attention": {"gamma": "auto", "auto": {"step": 99}}}, r"auto\.step: step 99"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, message):
    with pytest.raises(InlayError, match=message):
        run(plugins=with_options(**changes))


def test_a_mask_must_come_before_what_reads_it():
    order = ["source_trajectory", "latent_blend", "subject_mask"]
    with pytest.raises(PlanConflict, match="Put subject_mask above latent_blend"):
        run(plugins={name: ADDIT[name] for name in order})


# the source --------------------------------------------------------------------------------------


def test_a_regenerated_source_is_the_stock_picture_of_its_prompt():
    result = run(plugins={"source_trajectory": {"seed": 5}, "structure_transfer": {}})
    alone = Session(flux()).run("", size=32, steps=6, seed=5, conds={"edit": given()["source"]})
    assert torch.equal(result.latents["source"], alone.latents["edit"])
    assert torch.equal(result.images["source"], alone.images["edit"])


def test_an_interpolated_source_mixes_picture_and_one_noise():
    record = Record()
    plugins = {"source_trajectory": {}, "weighted_attention": {}, "record": record}
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    result = run(plugins=plugins, image=picture(), noise={"source": noise}, skip=False)
    clean = result.board["latent:source"]
    sigmas = [1.0, *(None,) * 5]
    for pass_, index, lanes, x, _ in record.steps:
        assert (pass_, lanes) == ("edit", ("source", "edit"))
        sigma = ((x["source"] - clean).norm() / (noise - clean).norm()).item()
        torch.testing.assert_close(x["source"], (1 - sigma) * clean + sigma * noise)
        sigmas[index] = sigma
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[0] == 1


def predict(frame, x, spread=0.7):
    """What a perfect model says of x when pictures are normal with this standard deviation."""
    a, s = frame.alpha, frame.sigma
    total = (a * spread) ** 2 + s**2
    x0, noise = a * spread**2 * x / total, s * x / total
    if frame.predicts == "epsilon":
        return noise
    return noise - x0 if frame.predicts == "flow" else (a * noise - s * x0) / (a**2 + s**2).sqrt()


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
        ),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
        diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    ],
    ids=["flow", "ddim", "ddim-v", "euler", "euler-v"],
)
def test_sampling_undoes_inversion(scheduler):
    """Every correction brings the inverter nearer to the exact inverse of the sampler."""
    clean, errors = torch.tensor([[0.9, -0.4]]), []
    for iterations in (1, 2, 3):
        scheduler.set_timesteps(10)
        inverter, x = Inverter(scheduler, iterations), clean
        assert len(inverter.timesteps) == 10 * iterations
        for i, t in enumerate(inverter.timesteps):
            (x,) = inverter.step(predict(inverter.frames[i], x), t, x)
        for frame, t in zip(inverter.levels[:0:-1], scheduler.timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)  # Euler counts its steps there
            x = scheduler.step(predict(frame, x), t, x, return_dict=False)[0]
        errors.append(float((x - clean).norm()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05


def test_a_model_of_unit_variance_sees_it_while_inverting():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    inverter, x = Inverter(scheduler, 1), torch.ones(1, 2)
    assert torch.equal(inverter.scale_model_input(x, inverter.timesteps[0]), x)
    inverter.step(x, inverter.timesteps[0], x)
    scaled = inverter.scale_model_input(x, inverter.timesteps[1])
    torch.testing.assert_close(scaled, scheduler.scale_model_input(x, scheduler.timesteps[3]))


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_solver_with_several_evaluations_per_step_is_not_inverted(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(5)
    with pytest.raises(InlayError, match=f"{name} cannot be inverted"):
        Inverter(scheduler, 2)


@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_an_inverted_source_ends_where_the_picture_began(family):
    record = Record()
    plugins = {"source_trajectory": {"provide": "invert"}, "record": record}
    result = run(family(), plugins, image=picture(), true_cfg=3.0, skip=False)
    invert = [entry for entry in record.steps if entry[0] == "invert"]
    edit = [entry for entry in record.steps if entry[0] == "edit"]
    assert [entry[2] for entry in invert] == [("source",)] * 12
    assert torch.equal(invert[0][3]["source"], result.board["latent:source"])
    for i, (_, _, _, x, _) in enumerate(edit):
        assert torch.equal(x["source"], invert[11 - 2 * i][4]["source"])


def test_several_variants_share_one_source():
    record = Record()
    plugins = with_options() | {"record": record}
    result = run(plugins=plugins, n=3, image=picture(), steps=6)
    assert result.images["edit"].shape[0] == 3
    assert result.board["mask:subject"].shape == (3, 1, 8, 8)
    rows = {lane: x[lane].shape[0] for *_, lanes, x, _ in record.steps for lane in lanes}
    assert rows == {"source": 1, "edit": 3}
    noise = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0))
    together = run(n=3, image=picture(), noise={"edit": noise})
    single = run(image=picture(), noise={"edit": noise[[1]]})
    torch.testing.assert_close(together.latents["edit"][[1]], single.latents["edit"])


def test_the_offset_moves_the_edit_by_the_sources_error():
    record = Record()
    plugins = {"source_trajectory": {"use_offset": True}, "record": record}
    run(plugins=plugins, image=picture(), steps=3)
    plain = run(plugins={"source_trajectory": {}}, image=picture(), steps=3)
    (_, _, _, _, first), (_, _, _, second_x, _) = record.steps[:2]
    drift = second_x["source"] - first["source"]
    assert drift.abs().max() > 1e-3
    assert not torch.allclose(plain.latents["edit"], record.steps[-1][4]["edit"])


# structure transfer and skipping -----------------------------------------------------------------


def test_structure_transfer_writes_the_noisy_source():
    record = Record()
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(4))
    plugins = with_options(structure_transfer={"step": 2}) | {"record": record}
    result = run(plugins=plugins, image=picture(), noise={"edit": noise, "source": noise})
    entry = next(e for e in record.steps if e[1] == 2)
    torch.testing.assert_close(entry[3]["edit"], entry[3]["source"])
    assert entry[2] == ("source", "edit")
    assert not any("edit" in lanes for _, i, lanes, *_ in record.steps if i < 2)
    assert result.latents["edit"].isfinite().all()


@pytest.mark.parametrize("family", [flux, stable_diffusion])
@pytest.mark.parametrize("image", [None, picture()])
def test_skipping_dead_rows_changes_no_result(family, image):
    whole, partial = (run(family(), image=image, skip=skip) for skip in (False, True))
    torch.testing.assert_close(whole.latents["edit"], partial.latents["edit"], rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.board["mask:subject"], partial.board["mask:subject"])


def test_forward_units_of_the_published_setting():
    """A picture: 17 steps of two rows and 9 of one. A generated source: 77 of 90."""
    plugins = {
        "source_trajectory": {},
        "structure_transfer": {"step": 4},
        "weighted_attention": {},
        "subject_mask": {"step": 18},
        "latent_blend": {"steps": [18], "background": "lane"},
    }
    asked = Experiment(prompt=Prompt(**PROMPT), size=32, steps=30)
    session = Session(flux(), plugins)
    assert session.plan(asked, (32, 32), ["image"]).evaluations == {"edit": 43}
    plugins["structure_transfer"] = {"step": 2}
    generated = Session(flux(), plugins).plan(asked, None, [])
    assert generated.evaluations == {"source": 30, "edit": 47}
    everything = Session(flux(), plugins, skip_dead_rows=False).plan(asked, None, [])
    assert everything.evaluations == {"source": 30, "edit": 60}


# attention ---------------------------------------------------------------------------------------


def test_separate_gammas_equal_the_papers_when_equal():
    plain = run(plugins=with_options(weighted_attention={"gamma": 1.2}))
    split = {"gamma_p": 1.2, "gamma_t": {"start": 1.2, "end": 1.2}, "gamma_s": [[0, 1.0]]}
    other = run(plugins=with_options(weighted_attention=split))
    torch.testing.assert_close(plain.latents["edit"], other.latents["edit"])
    for changed in ({"gamma_p": 0.5}, {"gamma_t": 0.5}, {"gamma_s": 2.0}, {"combine": "sum"}):
        moved = run(plugins=with_options(weighted_attention={"gamma": 1.2} | changed))
        assert not torch.allclose(plain.latents["edit"], moved.latents["edit"], atol=1e-4), changed


@pytest.mark.parametrize("kind", ["joint", "self"])
@pytest.mark.parametrize("combine", ["join", "sum"])
def test_attention_is_the_equation(combine, kind):
    """The plugin's edits against softmax written out, in float64; text 3, image 5 tokens."""
    plugin = WeightedAttention.Config(
        gamma_s=0.8, gamma_p=1.3, gamma_t=1.1, combine=combine, windows=Windows(unet=[0, 3])
    )
    plugin, text = WeightedAttention(plugin, "w"), 3 if kind == "joint" else 0
    site = AttnSite("site", 0, kind, "single" if text else "up", 0.5, 2, 4)
    request, draft = Request({}, steps=10, size=(32, 32), grid=(8, 8)), Draft()
    plugin.inlay_declare(Needs("w", request, (site,), draft))
    allowed = frozenset(e.key for e in draft.edits)
    rows = Rows.of({"source/text": 1, "edit/text": 2})
    edits = AttnEdits(allowed, "site", tuple(rows), owner="w")
    plugin.inlay_attention(None, SimpleNamespace(progress=0.1), site, edits)
    spans = {"text": slice(0, text), "image": slice(text, text + 5)}
    program = SiteProgram(
        "site", rows, edits.by_branch, [], {}, lambda q, k: (spans, spans), store={}
    )
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 3, 2, text + 5, 4, generator=g, dtype=torch.float64)
    out = program(torch.nn.functional.scaled_dot_product_attention, q, k, v)

    (source_k, own_k), (source_v, own_v) = ((x[:1, :, text:], x[1:]) for x in (k, v))
    prompt, image = 1.3 * own_k[:, :, :text], own_k[:, :, text:]
    if combine == "join":
        keys = torch.cat([prompt, 1.1 * image, 0.8 * source_k.expand_as(image)], 2)
        values = torch.cat([own_v, source_v.expand_as(image)], 2)
    else:
        w_s, w_t = 0.8 / 1.9, 1.1 / 1.9
        keys = torch.cat([prompt, w_t * image + w_s * source_k], 2)
        mixed = w_t * own_v[:, :, text:] + w_s * source_v
        values = torch.cat([own_v[:, :, :text], mixed], 2)
    expected = (q[1:] @ keys.transpose(2, 3) / 2).softmax(-1) @ values
    torch.testing.assert_close(out[1:], expected)
    torch.testing.assert_close(out[:1], (q[:1] @ k[:1].mT / 2).softmax(-1) @ v[:1])


# masks -------------------------------------------------------------------------------------------


def test_blur_keeps_constants_and_mirrors_borders():
    assert torch.equal(masks.blur(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    spike = torch.zeros(1, 1, 3, 3)
    spike[..., 0, 0] = 16
    assert masks.blur(spike)[0, 0].tolist() == [[4, 2, 0], [2, 1, 0], [0, 0, 0]]


def test_dilate_and_feather_reach_as_far_as_they_say():
    spot = torch.zeros(1, 1, 21, 21)
    spot[..., 10, 10] = 1
    assert masks.dilate(spot, 2).sum() == 25
    soft = masks.feather(spot, 6)
    line = soft[0, 0, 10]
    assert line[10] == 1
    assert (line[4:17] > 0).sum() == 13
    assert (line[:4] == 0).all()
    assert (line[10:].diff() <= 0).all()
    assert torch.equal(masks.feather(spot, 0), spot)


def test_a_map_without_contrast_keeps_the_whole_edit():
    pipe = flux()
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_k", "add_k_proj")):  # equal logits everywhere
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    with pytest.warns(UserWarning, match="constant"):
        result = run(pipe, with_options(weighted_attention={"windows": dict.fromkeys(WINDOWS)}))
    assert result.board["mask:subject"].min() == 1


def test_words_of_several_pieces_and_several_words_are_summed():
    """The map of a list of words is the sum of theirs; a phrase takes all its pieces."""
    sums = {}
    for subject in ("spotted", "dog", "spotted dog", ["spotted", "dog"]):
        plugin = SubjectMask(SubjectMask.Config(subject=subject, step=3, count=2), "m")
        run(plugins={"m": plugin}, image=picture())
        sums[str(subject)] = plugin.sums
    for site, both in sums["spotted dog"].items():
        parts = sums["spotted"][site] + sums["dog"][site]
        torch.testing.assert_close(both, parts)
        torch.testing.assert_close(sums["['spotted', 'dog']"][site], parts)


@pytest.mark.parametrize("family", [flux, stable_diffusion])
def test_the_difference_localiser_looks_where_the_edit_left_the_source(family):
    """An edit that is the source outside a quarter is found in that quarter."""

    class Quarter(Plugin):
        @hookimpl
        def inlay_denoised(self, run, step):
            clean = run.board["latent:source"]
            change = torch.zeros_like(run.backbone.to_grid(clean, run.size))
            change[:, :, : change.shape[2] // 2, : change.shape[3] // 2] = 3
            step.x0["edit"] = clean + run.backbone.from_grid(change)

    mask = {"step": 3, "localiser": "difference"}
    plugins = {"source_trajectory": {}, "subject_mask": mask, "quarter": Quarter()}
    found = run(family(), plugins, image=picture()).board["mask:subject"]
    height, width = found.shape[-2:]
    assert found[..., : height // 2 - 1, : width // 2 - 1].any()
    assert not found[..., height // 2 + 1 :, :].any()
    assert not found[..., width // 2 + 1 :].any()


@pytest.mark.parametrize("background", ["noised", "lane"])
def test_blending_puts_the_source_back_outside_the_mask(background):
    record = Record()
    blend = {"steps": [2, [4, 5]], "mask": "mask:user", "background": background}
    plugins = {"source_trajectory": {}, "latent_blend": blend, "record": record}
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    result = run(plugins=plugins, image=picture(), mask=half, steps=6)
    outside = torch.arange(64).view(8, 8)[:, 4:].flatten()
    for _, index, lanes, _, after in record.steps:
        assert ("source" in lanes) == (background == "lane" and index in (2, 4, 5))
        if "source" in lanes:
            assert torch.equal(after["edit"][:, outside], after["source"][:, outside])
            assert not torch.equal(after["edit"], after["source"])
    if background == "noised":
        clean = result.board["latent:source"][:, outside]
        assert torch.equal(result.latents["edit"][:, outside], clean)


@pytest.mark.parametrize(("feather", "size"), [(4, (90, 70)), (0, (90, 70)), (None, (33, 47))])
def test_pasting_back_leaves_the_original_bit_for_bit(feather, size):
    original = picture(*size)
    spot = Image.new("L", original.size)
    spot.paste(255, (20, 30, 35, 45) if size[0] > 60 else (10, 10, 20, 20))
    paste = {"mask": "mask:user", "feather": feather}
    result = run(plugins={"paste_back": paste}, image=original, mask=spot, size=None)
    edited, before = result.images["edit"], images.to_tensor(original)
    assert edited.shape == before.shape
    changed = (edited != before).any(1)
    reach = 12 if feather is None else feather + 4  # the mask is resized to the model and back
    mask = masks.dilate(images.to_tensor(spot), reach)
    assert changed.any()
    assert not (changed & (mask[:, 0] == 0)).any()
    assert images.to_pil(edited)[0].size == original.size


def test_a_generated_source_has_nothing_to_paste_into():
    plain, pasted = run(), run(plugins=ADDIT | {"paste_back": {}})
    assert torch.equal(plain.images["edit"], pasted.images["edit"])


# models and composition --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (flux, {"true_cfg": 3.0, "n": 2, "size": (24, 40)}),
        (flux, {"true_cfg": 3.0, "image": picture()}),
        (stable_diffusion, {"guidance": 7.5, "n": 2, "size": (24, 40)}),
        (stable_diffusion, {"guidance": 7.5, "image": picture(), "size": None}),
        (stable_diffusion, {"guidance": {"source": 1, "edit": 7.5}, "image": picture()}),
    ],
)
@pytest.mark.parametrize("provide", ["auto", "invert"])
def test_all_plugins_compose_on_every_model(family, options, provide):
    if provide == "invert" and "image" not in options:
        options = options | {"image": picture()}
    changes = with_options(source_trajectory={"provide": provide})
    plain = with_options(weighted_attention={"windows": dict.fromkeys(WINDOWS)})
    result = run(family(), changes | {"paste_back": {}}, **options)
    assert result.latents["edit"].isfinite().all()
    assert result.board["mask:subject"].unique().tolist() == [0, 1]
    assert result.board["map:subject"].amax() == 1
    assert set(result.images) == {"source", "edit"}
    other = run(family(), plain | {"paste_back": {}}, **options)
    assert not torch.allclose(result.latents["edit"], other.latents["edit"], atol=1e-4)


def test_bfloat16_stays_close_to_float32():
    """Rounding costs Add-it no more than twice what it costs the model alone."""
    errors = {}
    for plugins in ({}, {name: ADDIT[name] for name in list(ADDIT)[:3]}):
        exact, rough = (
            run(flux().to(dtype), plugins, image=picture()).latents["edit"]
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert rough.dtype == torch.bfloat16
        errors[len(plugins)] = (rough - exact).norm() / exact.norm()
    assert errors[3] < 2 * errors[0]
    mask = run(flux().to(torch.bfloat16), image=picture()).board["mask:subject"]
    assert mask.unique().tolist() == [0, 1]


def test_windows_may_be_progress_or_steps():
    by_index = run(plugins=with_options(weighted_attention={"windows": {"double": 2, "single": 3}}))
    same = {"double": [0.0, 0.5], "single": [0.0, 0.6]}
    by_progress = run(plugins=with_options(weighted_attention={"windows": same}))
    assert torch.equal(by_index.latents["edit"], by_progress.latents["edit"])
    assert Window.parse([0.0, 0.35], "").steps(30) == range(11)
    assert Window.parse([0.0, 0.68], "").steps(30) == range(21)
