"""Backbones: where tokens are, how words are found, which sizes and latents a family takes."""

import pytest
import torch
import torch.nn.functional as F

import inlay
from folders import save_flux
from inlay import Cond, ConfigError, InputError, ModelError
from inlay.backbones import adapt, load, text
from models import conds, flux, stable_diffusion

FAMILIES = {"flux": flux, "sd": stable_diffusion}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    return adapt(FAMILIES[request.param]())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("model") / "flux")


# token layout ---------------------------------------------------------------------------------


def keys_at(backbone, site, given):
    """K at a site in one evaluation, `1 h m d`, caught where every model calls attention."""
    caught, stock = [], F.scaled_dot_product_attention
    module = backbone.modules[site.name]
    running = []
    handles = [
        module.register_forward_pre_hook(lambda *_: running.append(1)),
        module.register_forward_hook(lambda *_: running.clear()),
    ]

    def catch(query, key, *args, **kwargs):
        if running:
            caught.append(key.clone())
        return stock(query, key, *args, **kwargs)

    F.scaled_dot_product_attention = catch
    try:
        session = inlay.Session(backbone.pipe)
        session.run(conds=given, steps=1, guidance=1.0, size=32, seed=0)
    finally:
        F.scaled_dot_product_attention = stock
        for handle in handles:
            handle.remove()
    (keys,) = caught
    return keys


def moved(backbone, site):
    """Key tokens that move when the prompt's embedding does, and those that do not."""
    given = conds(pooled=backbone.name == "flux")
    other = {k: dict(v) for k, v in given.items()}
    other["edit"]["embeds"] = other["edit"]["embeds"] + 1
    first, second = keys_at(backbone, site, given), keys_at(backbone, site, other)
    changed = ~torch.isclose(first, second, atol=1e-6).all(dim=(0, 1, 3))
    return changed.nonzero().flatten().tolist(), first.shape[2]


def test_the_first_sites_tokens_are_where_the_spans_say():
    """Perturb the prompt, look which keys move: nothing is taken from a table alone."""
    double, unet = adapt(flux()), adapt(stable_diffusion())
    cross = next(s for s in unet.sites if s.kind == "cross")
    own = next(s for s in unet.sites if s.kind == "self")
    for backbone, site in ((double, double.sites[0]), (unet, cross), (unet, own)):
        changed, total = moved(backbone, site)
        _, spans = backbone.spans(site, 12)(64, total)
        expected = range(total)[spans["text"]] if "text" in spans else []
        assert changed == list(expected)
        if "text" in spans:
            assert len(changed) == 12


def test_single_blocks_of_flux_keep_the_text_in_front():
    """With single blocks alone, their input is [text | image] untouched by any other block."""
    from diffusers import FluxTransformer2DModel

    pipe = flux()
    torch.manual_seed(0)
    shape = {**pipe.transformer.config, "num_layers": 0, "num_single_layers": 1}
    pipe.register_modules(transformer=FluxTransformer2DModel.from_config(shape).eval())
    backbone = adapt(pipe)
    (site,) = backbone.sites
    assert (site.block, site.kind) == ("single", "joint")
    changed, total = moved(backbone, site)
    queries, keys = backbone.spans(site, 12)(total, total)
    assert changed == list(range(total)[keys["text"]]) == list(range(12))
    assert range(total)[queries["image"]] == range(12, total)


# words ----------------------------------------------------------------------------------------

T5 = [
    "▁a",
    "▁hot",
    "▁air",
    "▁ball",
    "oon",
    "▁and",
    "▁two",
    "▁dog",
    "s",
    "▁near",
    "▁a",
    "▁dog",
    "</s>",
]
CLIP = ["<|startoftext|>", "a</w>", "ball", "oon</w>", "and</w>", "dogs</w>", ",", "dog</w>"]


@pytest.mark.parametrize(
    ("tokens", "word", "found"),
    [
        (T5, "hot air balloon", (1, 2, 3, 4)),
        (T5, "balloon", (3, 4)),
        (T5, "dog", (11,)),
        (T5, "dogs", (7, 8)),
        (T5, "Two  Dogs", (6, 7, 8)),
        (CLIP, "balloon", (2, 3)),
        (CLIP, "dog", (7,)),
        (CLIP, "dogs", (5,)),
        (CLIP, "balloon and dogs", (2, 3, 4, 5)),
    ],
)
def test_a_word_is_found_with_all_its_pieces(tokens, word, found):
    assert text.find(Cond(torch.zeros(1, len(tokens), 1), tokens=tokens), word) == found


@pytest.mark.parametrize("word", ["cat", "ball", "oon", "do", "air ball", "", "dogs near"])
def test_what_is_not_a_word_of_the_prompt_is_refused(word):
    cond = Cond(torch.zeros(1, len(CLIP), 1), tokens=CLIP)
    with pytest.raises(InputError, match=rf"plugins\.a\.b: '{word}' is not in the prompt"):
        text.find(cond, word, "plugins.a.b")


def test_pieces_follow_the_rows_of_the_embedding(folder):
    """Each piece of the real tokenizer stands at the index of its embedding."""
    backbone = adapt(load(str(folder), device="cpu"))
    cond = backbone.encode_text("a dog")
    assert cond.embeds.shape == (1, 32, 16) and cond.pooled.shape == (1, 16)
    at = text.find(cond, "dog")
    assert [cond.tokens[i] for i in at] == ["d", "o", "g"]
    ids = backbone.pipe.tokenizer_2("a dog")["input_ids"]
    assert backbone.pipe.tokenizer_2.convert_ids_to_tokens(ids) == cond.tokens


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(folder):
    pipe = load(str(folder), device="cpu")
    cond = adapt(pipe).encode_text("a dog, sitting")
    embeds, pooled, _ = pipe.encode_prompt("a dog, sitting", None, max_sequence_length=32)
    assert torch.equal(cond.embeds, embeds) and torch.equal(cond.pooled, pooled)


def test_a_prompt_that_is_too_long_is_refused(folder):
    with pytest.raises(InputError, match=r"prompt: the prompt has \d+ tokens, the model takes 32"):
        adapt(load(str(folder), device="cpu")).encode_text("a dog " * 40)


# sizes and latents ----------------------------------------------------------------------------


def test_sizes_are_the_askers_the_pictures_or_the_models(backbone):
    side = backbone.native_size[0]
    assert backbone.fit(None, None) == (side, side)
    assert backbone.fit(32, None) == (32, 32)
    assert backbone.fit([24, 40], (999, 10)) == (24, 40)
    height, width = backbone.fit(None, (300, 600))
    assert abs(width / height - 2) < 0.2
    assert abs(height * width / side**2 - 1) < 0.3
    assert height % backbone.multiple == width % backbone.multiple == 0


def test_a_size_below_two_tokens_is_refused(backbone):
    with pytest.raises(ConfigError, match=r"size: .* too small"):
        backbone.fit(1, None)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_layouts_are_inverse(backbone, size):
    x = backbone.latent(2, size, torch.Generator().manual_seed(0))
    grid = backbone.to_grid(x, size)
    assert grid.shape[-2:] == backbone.grid(size) and grid.shape[0] == 2
    assert torch.equal(backbone.from_grid(grid), x)
    assert torch.equal(backbone.pack(backbone.unpack(x, size)), x)


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0)])
def test_a_token_of_the_grid_is_a_place_in_the_picture(backbone, corner):
    """A mark in one corner of the autoencoder's latent is in that corner of the token grid."""
    size = (24, 40)
    z = torch.zeros_like(backbone.unpack(backbone.latent(1, size, torch.Generator()), size))
    z[:, :, corner[0], corner[1]] = 1
    grid = backbone.to_grid(backbone.pack(z), size).abs().sum(1)[0]
    assert grid[corner] > 0 and grid.sum() == grid[corner]


def test_n_latents_are_drawn_as_one(backbone):
    """The generator's order is the stock pipeline's: n latents are one tensor."""
    g = torch.Generator().manual_seed(0)
    two = backbone.latent(2, (32, 32), g)
    assert two.shape[0] == 2 and not torch.equal(two[0], two[1])
    again = backbone.latent(2, (32, 32), torch.Generator().manual_seed(0))
    assert torch.equal(two, again)
    assert torch.equal(backbone.latent(2, (32, 32), None, two), two)


# loading --------------------------------------------------------------------------------------


def test_a_family_without_a_backbone_is_refused():
    with pytest.raises(ModelError, match=r"no backbone for object\..* inlay\.attach\(pipe"):
        adapt(object())


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload_on_a_cpu_is_refused_by_name(folder, offload):
    with pytest.raises(ModelError, match=rf"offload: offload={offload} moves modules to an accel"):
        load(str(folder), device="cpu", offload=offload)


def test_a_device_that_is_not_there_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device: there is no CUDA device here"):
        load(str(folder), device="cuda")


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"model: .* cannot be loaded"):
        load(str(tmp_path), device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_offload_ends_where_the_resident_model_ends(folder, offload):
    session = inlay.Session(str(folder), device="cuda", offload=offload)
    resident = inlay.Session(str(folder), device="cuda")
    first = session.run("a dog", steps=2).latents["edit"].cpu()
    second = resident.run("a dog", steps=2).latents["edit"].cpu()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_accelerator_runs_every_precision(folder, dtype):
    result = inlay.Session(str(folder), device="cuda", dtype=dtype).run("a dog", steps=2)
    assert torch.isfinite(result.images["edit"]).all()
    assert result.manifest["dtype"] == dtype
