"""Add-it against stored numbers of the published implementation (tests/goldens/README.md)."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file

from inlay import AttnEdits, AttnSite, Needs, Plugin, Rows, Session, hookimpl
from inlay.plan import Draft, Request
from inlay_attention import Probe, Seam, SiteProgram
from inlay_plugins import masks
from inlay_plugins.source_trajectory import SourceTrajectory
from inlay_plugins.subject_mask import SubjectMask
from inlay_plugins.weighted_attention import WeightedAttention

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = ["▁a", "▁photo", "▁of", "▁a", "▁puppy", "dog", "▁on", "▁a", "▁bed", "</s>"]
PROMPTS = {"source": "a photo of a bed", "edit": "a photo of a puppydog on a bed"}
RECORDED = [
    "transformer_blocks.1.attn",
    "single_transformer_blocks.0.attn",
    "single_transformer_blocks.1.attn",
]


@cache
def golden(name: str) -> tuple[dict, dict]:
    return load_file(GOLDENS / f"{name}.safetensors"), json.loads(
        (GOLDENS / f"{name}.json").read_text()
    )


def tiny_flux(dtype: torch.dtype = torch.float32) -> FluxPipeline:
    weights, card = golden("tiny_flux_weights")
    transformer = FluxTransformer2DModel(**card["kwargs"])
    transformer.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(**card["scheduler"]["kwargs"])
    return FluxPipeline(transformer=transformer.to(dtype).eval(), scheduler=scheduler, **parts)


def rel(ours: torch.Tensor, stored: torch.Tensor) -> float:
    return float((ours.float() - stored.float()).norm() / stored.float().norm())


class Recorder(Plugin):
    """Keeps what a test compares: latents after each step, predictions, probe sums."""

    def __init__(self):
        super().__init__()
        self.after, self.preds, self.inverted = {}, {}, []

    @hookimpl
    def inlay_observe(self, run, step):
        if step.pass_ == "edit":
            rows = [step.x_next[lane] for lane in ("source", "edit") if lane in step.x_next]
            self.after[step.index] = torch.cat(rows)
            self.preds[step.index] = [step.preds[f"{lane}/text"] for lane in step.lanes]
        elif step.pass_ == "invert" and step.last_eval:
            self.inverted.append(step.x_next["source"])
        elif step.pass_ == "source":
            self.after["source", step.index] = step.x_next["source"]


class Given(Plugin):
    """Structure transfer from this clean latent, whatever the source lane ended with."""

    def __init__(self, latent):
        super().__init__()
        self.latent = latent

    @hookimpl
    def inlay_begin(self, run, pass_):
        if pass_ == "edit":
            run.board["latent:source"] = self.latent


def insert(  # one call of the whole method, as the published pipeline's arguments name it
    noise,
    side,
    steps,
    guidance,
    gamma=1.05,
    double=None,
    single=None,
    structure=None,
    blend=(),
    mode="reference",
    subject="puppydog",
    latent=None,
    provide="auto",
    iterations=2,
    use_offset=False,
    dtype=torch.float32,
    skip=False,
    mask=None,
    gamma_options=None,
):
    common, _ = golden("addit_common")
    tokens = ["▁dog" if piece == subject else piece for piece in TOKENS]  # the last piece alone
    conds = {
        name: {
            "embeds": common["prompt_embeds"][[i]],
            "pooled": common["pooled"][[i]],
            "tokens": tokens,
        }
        for i, name in enumerate(("source", "edit"))
    }
    source = SourceTrajectory.Config(
        provide=provide, use_offset=use_offset, fixed_point_iterations=iterations
    )
    record = Recorder()
    if provide == "regenerate" and latent is not None:
        plugins = {"source_trajectory": SourceTrajectory(source), "given": Given(latent)}
    else:
        plugins = {"source_trajectory": SourceTrajectory(source, latent=latent)}
    if structure is not None:
        plugins["structure_transfer"] = {"step": structure}
    windows = {"double": double, "single": single}
    options = {"gamma": gamma, "windows": windows} | (gamma_options or {})
    plugins["weighted_attention"] = options
    if blend:
        plugins["subject_mask"] = {"subject": subject, "step": blend[0], "mode": mode}
        plugins["subject_mask"]["sites"] = RECORDED
        plugins["latent_blend"] = {"steps": list(blend), "background": "lane", "mode": "reference"}
        plugins["latent_blend"]["mask"] = "mask:subject" if mask is None else "mask:user"
    session = Session(tiny_flux(dtype), plugins | {"record": record}, skip_dead_rows=skip)
    result = session.run(
        PROMPTS,
        mask=mask,
        size=side * 16,
        steps=steps,
        guidance=guidance,
        conds=conds,
        noise={"source": noise[[0]], "edit": noise[[1]]},
    )
    return record, result


def run_4096(case, **options):
    """An `addit_run_*` case with its stored settings; returns recorder, result, golden tensors."""
    stored, card = golden(case)
    hyper, common = card["hyper"], golden("addit_common")[0]
    record, result = insert(
        common["eps"],
        64,
        hyper["N"],
        dict(zip(("source", "edit"), hyper["guidance"], strict=True)),
        options.pop("gamma", hyper["extended_scale"]),
        hyper["extended_steps_double"],
        hyper["extended_steps_single"],
        hyper["structure_transfer_step"],
        card.get("blend_steps", ()),
        **options,
    )
    return record, result, stored, card


def rel_thinned(ours, stored):
    """Of the tokens that are stored: all of 64, every eighth of 4,096 (attention couples them)."""
    return rel(ours[..., :: ours.shape[-2] // stored.shape[-2], :], stored)


def check_latents(record, stored, steps, tolerance):
    for latents, step in zip(stored, steps, strict=True):
        assert rel_thinned(record.after[step], latents) < tolerance, f"step {step}"


def check_mask(result, stored):
    ours = result.board["mask:subject"][0, 0]
    assert (ours != stored[-1]).sum() <= 2  # the last sub-token's


# one layer ---------------------------------------------------------------------------------------


def weighted(gamma: float, site: str, rows: Rows, text: int = 512) -> SiteProgram:
    """The program that the plugin asks for at one joint site."""
    plugin = WeightedAttention(WeightedAttention.Config(gamma=gamma), "weighted_attention")
    block = "single" if site.startswith("single") else "double"
    place = AttnSite(site, 0, "joint", block, 0.0, 2, 16)
    request = Request({}, steps=30, size=(128, 128), grid=(8, 8))
    draft = Draft()
    plugin.inlay_declare(Needs("weighted_attention", request, (place,), draft))
    allowed = frozenset(e.key for e in draft.edits)
    edits = AttnEdits(allowed, site, tuple(rows), owner="weighted_attention")
    plugin.inlay_attention(None, SimpleNamespace(progress=0.1), place, edits)

    def spans(q, k):
        return {"text": slice(0, text), "image": slice(text, q)}, {
            "text": slice(0, text),
            "image": slice(text, k),
        }

    return SiteProgram(site, rows, edits.by_branch, [], {}, spans, {})


ROWS = Rows.of({"source/text": 1, "edit/text": 1})


@pytest.mark.parametrize("gamma", [1.0, 1.05, 1.1])
def test_layer_function(gamma):
    stored, _ = golden("addit_layer")
    q, k, v = (stored[name].float() for name in "qkv")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = weighted(gamma, "transformer_blocks.1.attn", ROWS)(sdpa, q, k, v)
    for ours, name in ((out[1], f"out_target.g{gamma}"), (out[0], "out_source.g1.05")):
        assert (ours[:, ::4] - stored[name]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("gamma", [1.05, 1.1, None])
def test_layer_modules(gamma):
    """None: the window is closed, the site runs plain."""
    stored, _ = golden("addit_layer")
    model = tiny_flux().transformer
    ids = torch.cartesian_prod(torch.arange(1.0), torch.arange(8.0), torch.arange(8.0))
    rope = model.pos_embed(torch.cat([torch.zeros(512, 3), ids]))
    image, text = stored["double.hidden"].float(), stored["double.encoder_hidden"].float()
    double, single = "transformer_blocks.1.attn", "single_transformer_blocks.1.attn"
    modules = {name: model.get_submodule(name) for name in (double, single)}
    with Seam(modules) as seam:
        if gamma:
            seam.programs = {name: weighted(gamma, name, ROWS) for name in modules}
        out, prompt = modules[double](
            hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rope
        )
        joint = modules[single](hidden_states=torch.cat([text, image], 1), image_rotary_emb=rope)
    if gamma is None:
        assert (out[:, ::4] - stored["double.out_image.window_closed"]).abs().max() < 1e-5
        return
    for ours, name in (
        (out[:, ::4], f"double.out_image.g{gamma}"),
        (prompt[:, :32], f"double.out_text_first32.g{gamma}"),
        (joint[:, 512::4], f"single.out_image.g{gamma}"),
        (joint[:, :32], f"single.out_text_first32.g{gamma}"),
    ):
        assert (ours - stored[name]).abs().max() < 1e-5, name


# maps --------------------------------------------------------------------------------------------

FLUX_SITES = tuple(
    AttnSite(f"{prefix}transformer_blocks.{i}.attn", i, "joint", block, 0.0, 2, 8)
    for prefix, block, count in (("", "double", 19), ("single_", "single", 38))
    for i in range(count)
)


def read_maps(layer: str, step: int, tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """T `1 t n` and I `1 n t` of one recorded layer, through the seam's probes."""
    stored, _ = golden("addit_maps_qk")
    at = f"{layer.removesuffix('.attn')}.step{step}."
    q = stored[f"{at}q_target"].float().expand(2, -1, -1, -1)
    target = stored[f"{at}k_target"].float()
    source, extended = target.clone(), f"{at}k_source_image" in stored
    if extended:
        source[:, 512:] = stored[f"{at}k_source_image"].float()
    names = {"rows": "T", "columns": "I"}
    probes = [
        Probe(name, "m", "edit/text", read, frozenset([layer]), frozenset([step]), tokens)
        for read, name in names.items()
    ]
    program = weighted(1.05, layer, ROWS)
    program.edits = program.edits if extended else {}
    program.probes, program.words = probes, dict.fromkeys(names.values(), tokens)
    k = torch.stack([source, target])
    program(torch.nn.functional.scaled_dot_product_attention, q, k, torch.zeros_like(k))
    return {name: program.store[name][layer] for name in names.values()}


def test_probes_read_the_recorded_maps():
    stored, card = golden("addit_maps_qk")
    for layer in card["recorded_layers"]:
        for step in card["recorded_steps"]:
            read = read_maps(f"{layer}.attn", step, (4, 5))
            for name, ours in (("T", read["T"][0]), ("I", read["I"][0].T)):
                assert (ours - stored[f"{layer}.step{step}.{name}"]).abs().max() < 2e-6


@pytest.mark.parametrize(("mode", "token"), [("reference", 1), ("fixed", 0), ("fixed", 1)])
def test_subject_mask_of_recorded_maps(mode, token):
    """The published sites are chosen, summed (with or without the bug), blurred, thresholded."""
    stored, card = golden("addit_maps_qk")
    plugin = SubjectMask(SubjectMask.Config(subject="puppydog", step=18, mode=mode), "subject_mask")
    request = Request(PROMPTS, steps=30, size=(256, 256), grid=(16, 16))
    plugin.inlay_declare(Needs("subject_mask", request, FLUX_SITES, Draft()))
    assert [name.removesuffix(".attn") for name in plugin.sites] == card["recorded_layers"]
    plugin.inlay_begin(None, "edit", {})
    grid = SimpleNamespace(grid=lambda size: (16, 16))
    run = SimpleNamespace(board={}, backbone=grid, size=(256, 256))
    tokens = (4, 5) if mode == "reference" else (4 + token,)
    for step in card["recorded_steps"]:
        read = {site: read_maps(site, step, tokens) for site in plugin.sites}
        probes = {name: {site: maps["T"] for site, maps in read.items()} for name in plugin.rows}
        if mode == "fixed" or step == 18:
            columns = {site: maps["I"] for site, maps in read.items()}
            probes |= dict.fromkeys(plugin.columns, columns)
        now = {"pass_": "edit", "index": step, "last_eval": True, "probes": probes}
        plugin.inlay_post_step(run, SimpleNamespace(**now))
    case = "reference" if mode == "reference" else "clean"
    smooth = torch.stack([plugin.sums[name][0] for name in plugin.sites]).mean(0).view(1, 1, 16, 16)
    assert (masks.blur(smooth)[0, 0] - stored[f"{case}.map_smoothed"][token]).abs().max() < 2e-6
    assert torch.equal(run.board["mask:subject"][0, 0].byte(), stored[f"{case}.mask"][token])


def test_localise():
    stored, card = golden("addit_maps_localise")
    for case in card["cases"]:
        layers = torch.stack([stored[f"{case}.layer_{x}"] for x in "ab"])
        smooth = masks.blur(layers.mean(0).view(1, 1, 64, 64))
        stretched = masks.minmax(smooth)
        assert (smooth[0, 0] - stored[f"{case}.map_smoothed"]).abs().max() < 1e-6, case
        assert (stretched[0, 0] - stored[f"{case}.map_minmax"]).abs().max() < 5e-6, case
        assert torch.equal(masks.otsu(stretched)[0, 0].byte(), stored[f"{case}.mask"]), case
        clicks = masks.points(smooth, masks.otsu(stretched), card["image_size"])
        assert torch.equal(torch.tensor(clicks), stored[f"{case}.points_xy"].long()), case


# whole runs, 64 image tokens ---------------------------------------------------------------------

SMALL = list(json.loads((GOLDENS / "addit_small.json").read_text())["cases"])


@cache
def small(case: str, skip: bool = False):
    """A case of addit_small; the run itself is shared by the tests of it."""
    stored, card = golden("addit_small")
    asked = card["cases"][case]["args"]
    guidance = asked["guidance_scale"]
    if isinstance(guidance, list):
        guidance = dict(zip(("source", "edit"), guidance, strict=True))
    real = asked.get("is_img_src", False)
    provide = "regenerate"
    if real:
        provide = "invert" if "img_src_latents" in asked else "interpolate"
    return insert(
        stored["eps"],
        8,
        card["cases"][case]["N"],
        guidance,
        asked["extended_scale"],
        asked["extended_steps_multi"],
        asked["extended_steps_single"],
        asked["structure_transfer_step"],
        latent=stored[asked["source_latents"]],
        provide=provide,
        use_offset=asked.get("use_offset", False),
        skip=skip,
    )


@pytest.mark.parametrize("case", SMALL)
def test_small_runs(case):
    stored, card = golden("addit_small")
    record, _ = small(case)
    check_latents(record, stored[f"{case}.latents"], card["cases"][case]["stored_steps"], 3e-6)
    if case.startswith("real_inversion"):
        assert rel(torch.cat(record.inverted), stored["inverted"][1:]) < 3e-6
    elif case == "generated_defaults":
        assert rel(record.after["source", 29], stored["x_src_generated"]) < 3e-6


@pytest.mark.parametrize("case", ["generated_defaults", "real_interp", "real_inversion"])
def test_skipped_rows_change_nothing(case):
    """Only rows that nobody needs are skipped: 43 of 60 forward units for a picture at 30 steps."""
    whole, complete = small(case)
    partial, shorter = small(case, skip=True)
    assert rel(shorter.latents["edit"], complete.latents["edit"]) < 1e-6
    rows = [sum(map(len, record.preds.values())) for record in (whole, partial)]
    assert rows == [60, 77 - 30 if case == "generated_defaults" else 43]


# whole runs, 4096 image tokens -------------------------------------------------------------------


def test_run_blend():
    record, result, stored, card = run_4096("addit_run_blend", provide="regenerate")
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-6)
    check_mask(result, stored["mask_otsu"])


@pytest.mark.parametrize("case", ["plain", "offset"])
def test_run_real_inversion(case):
    latent = golden("addit_common")[0]["x_src_real"]
    record, result, stored, card = run_4096(
        "addit_run_real_inversion", latent=latent, provide="invert", use_offset=case == "offset"
    )
    for step, level in zip((0, 4, 9), (1, 5, 10), strict=True):
        known = dict(zip(card["stored_inverted"], stored["inverted"], strict=True))
        if level in known:
            assert rel_thinned(record.inverted[step][0], known[level]) < 2e-6
    check_latents(record, stored[f"{case}.latents_after_step"], card["stored_steps"], 2e-6)
    check_mask(result, stored[f"{case}.mask_otsu"])


@pytest.mark.goldens
def test_run_blend_by_clicks():
    """The segmenter is a stub that answers any clicks with one disc; the clicks are compared."""
    y, x = torch.meshgrid(torch.arange(1024), torch.arange(1024), indexing="ij")
    disc = ((x - 503) ** 2 + (y - 610) ** 2 <= 217.3**2).float()[None, None]
    record, result, stored, card = run_4096("addit_run_blend_sam", provide="regenerate", mask=disc)
    assert torch.equal(torch.tensor(result.board["points:subject"][0]), stored["points_xy"].long())
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-6)


@pytest.mark.goldens
def test_run_generated():
    record, result, stored, card = run_4096("addit_run_generated", provide="regenerate")
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-6)
    for step in (0, 2, 5, 8):
        assert rel_thinned(torch.cat(record.preds[step]), stored[f"velocity_step{step}"]) < 2e-6
    for step, latents in zip((0, 4, 9), stored["source_only_latents_after_step"], strict=True):
        assert rel_thinned(record.after["source", step], latents) < 2e-6
    assert rel(result.board["latent:source"], golden("addit_common")[0]["x_src_generated"]) < 2e-6


@pytest.mark.goldens
def test_run_generated_bf16():
    record, _, stored, card = run_4096(
        "addit_run_generated_bf16", provide="regenerate", dtype=torch.bfloat16
    )
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-2)


@pytest.mark.goldens
@pytest.mark.parametrize("case", ["addit_run_blend_twice", "addit_run_blend_clean"])
def test_run_blend_variants(case):
    clean = {"mode": "fixed", "subject": "dog"} if case.endswith("clean") else {}
    record, result, stored, card = run_4096(case, provide="regenerate", **clean)
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-6)
    check_mask(result, stored["mask_otsu"])


@pytest.mark.goldens
def test_run_real_interp():
    latent = golden("addit_common")[0]["x_src_real"]
    record, result, stored, card = run_4096("addit_run_real_interp", latent=latent)
    check_latents(record, stored["latents_after_step"], card["stored_steps"], 2e-6)
    check_mask(result, stored["mask_otsu"])


@pytest.mark.parametrize("mode", ["fixed", pytest.param("reference", marks=pytest.mark.goldens)])
def test_run_automatic_gamma(mode):
    """The same root, found on the edit's rows alone; in fixed mode step 5 is made with it."""
    latent = golden("addit_common")[0]["x_src_real"]
    options = {"gamma": "auto", "gamma_options": {"mode": mode}}
    record, result, stored, _ = run_4096("addit_autogamma", latent=latent, **options)
    assert abs(result.board["scale:gamma"] - float(stored["root_xtol_1e_2"])) < 1e-4
    for step, latents in zip((5, 7), stored[f"{mode}_latents_after_step"], strict=True):
        assert rel(record.after[step][1, ::8], latents) < 5e-6


@pytest.mark.goldens
@pytest.mark.parametrize(("iterations", "name"), [(1, "fp1"), (3, "fp3")])
def test_inversion_with_other_corrections(iterations, name):
    latent = golden("addit_common")[0]["x_src_real"]
    record, *_ = run_4096(
        "addit_run_real_inversion", latent=latent, provide="invert", iterations=iterations
    )
    stored, _ = golden("addit_run_real_inversion")
    assert rel_thinned(record.inverted[-1][0], stored[f"inverted_last_{name}"]) < 2e-6
