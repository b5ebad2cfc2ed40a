"""IP-Adapter: the stock pipeline's numbers, on tiny weights in the published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import inlay
from inlay import ConfigError, ModelError
from inlay_config.images import to_pil
from invariants import CASES
from models import conds, flux, stable_diffusion

PICTURE = to_pil(torch.rand(1, 3, 40, 64, generator=torch.Generator().manual_seed(2)))[0]
WIDTH, SEEN = 16, 12  # of the prompt's tokens, of what CLIP sees
STEPS, SIDE, SCALE = 3, 32, 0.7


def state(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of an adapter, `plain` (one vector of the picture), `plus` (a resampler of all
    tokens) or `full` (all tokens), by the names of its training program; or `faceid`."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * 0.5

    if kind == "plain":
        made = {"proj.weight": drawn(4 * WIDTH, SEEN), "proj.bias": drawn(4 * WIDTH)}
        made |= {"norm.weight": drawn(WIDTH), "norm.bias": drawn(WIDTH)}
    elif kind == "plus":
        made = {"latents": drawn(1, 4, 32)}
        for name, out, into in (("proj_in", 32, 24), ("proj_out", WIDTH, 32)):
            made |= {f"{name}.weight": drawn(out, into), f"{name}.bias": drawn(out)}
        normed = {"norm_out": WIDTH}
        for i in range(4):
            made |= {f"layers.{i}.0.to_q.weight": drawn(64, 32)}
            made |= {f"layers.{i}.0.to_kv.weight": drawn(128, 32)}
            made |= {f"layers.{i}.0.to_out.weight": drawn(32, 64)}
            made |= {f"layers.{i}.1.1.weight": drawn(128, 32)}
            made |= {f"layers.{i}.1.3.weight": drawn(32, 128)}
            normed |= dict.fromkeys(
                (f"layers.{i}.{part}" for part in ("0.norm1", "0.norm2", "1.0")), 32
            )
        for name, width in normed.items():
            made |= {f"{name}.weight": drawn(width), f"{name}.bias": drawn(width)}
    elif kind == "faceid":
        made = {"proj.0.weight": drawn(24, SEEN), "proj.0.bias": drawn(24)}
        made |= {"proj.2.weight": drawn(4 * WIDTH, 24), "proj.2.bias": drawn(4 * WIDTH)}
        made |= {"norm.weight": drawn(WIDTH), "norm.bias": drawn(WIDTH)}
    else:
        made = {f"proj.{i}.bias": drawn(n) for i, n in ((0, 24), (2, WIDTH), (3, WIDTH))}
        made |= {"proj.0.weight": drawn(24, 24), "proj.2.weight": drawn(WIDTH, 24)}
        made["proj.3.weight"] = drawn(WIDTH)
    made = {f"image_proj.{key}": tensor for key, tensor in made.items()}
    unet = stable_diffusion().unet
    for i, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            inner = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("k", "v"):
                made[f"ip_adapter.{i}.to_{part}_ip.weight"] = drawn(inner, WIDTH)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, CLIP's vision tower, and the picture."""
    place = tmp_path_factory.mktemp("ip")
    for kind in ("plain", "plus", "full"):
        save_file(state(kind), place / f"{kind}.safetensors")
    torch.manual_seed(4)
    config = CLIPVisionConfig(hidden_size=24, intermediate_size=24, num_hidden_layers=3,
                              num_attention_heads=2, image_size=32, patch_size=16,
                              projection_dim=SEEN)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(place / "image_encoder")
    PICTURE.save(place / "shown.png")
    return place


def run(folder: Path, kind: str = "plain", pipe: Any = None, **options: Any) -> Any:
    asked = {"guidance": options.pop("guidance", 5.0), "n": options.pop("n", 1)}
    beside, given = options.pop("beside", {}), options.pop("given", {})
    options = {"image": str(folder / "shown.png"), "scale": SCALE, **options}
    options.setdefault("weights", str(folder / f"{kind}.safetensors"))
    solver = given.pop("scheduler", None)
    session = inlay.Session(pipe or stable_diffusion(), {"ip_adapter": options, **beside}, solver)
    return session.run(conds=conds(pooled=False), steps=STEPS, size=SIDE, seed=3, **asked, **given)


def stock(folder: Path, kind: str, guidance: float, n: int) -> torch.Tensor:
    pipe = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(folder), "", f"{kind}.safetensors", low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale(SCALE)
    given = conds(pooled=False)
    return pipe(
        prompt_embeds=given["edit"]["embeds"],
        negative_prompt_embeds=given["negative"]["embeds"],
        ip_adapter_image=PICTURE,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        num_images_per_prompt=n,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@pytest.mark.parametrize(("guidance", "n"), [(5.0, 1), (1.0, 2)])
def test_it_is_the_stock_pipeline(folder: Path, kind: str, guidance: float, n: int) -> None:
    mine = run(folder, kind, guidance=guidance, n=n).latents["edit"]
    theirs = stock(folder, kind, guidance, n)
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
    plain = run(folder, kind, guidance=guidance, n=n, scale=0.0).latents["edit"]
    assert (plain - theirs).norm() > 1e-2 * theirs.norm()


def test_without_weight_nothing_moves_and_no_processor_is_replaced(folder: Path) -> None:
    pipe = stable_diffusion()
    before = {name: type(p) for name, p in pipe.unet.attn_processors.items()}
    made, without = run(folder, pipe=pipe, scale=0.0), inlay.Session(pipe).run(
        conds=conds(pooled=False), steps=STEPS, size=SIDE, seed=3, guidance=5.0
    )  # fmt: skip
    assert torch.equal(made.latents["edit"], without.latents["edit"])
    assert {name: type(p) for name, p in pipe.unet.attn_processors.items()} == before
    assert made.board["kv:picture"] == {}


def test_where_and_when_are_chosen(folder: Path) -> None:
    whole = run(folder).latents["edit"]
    early = run(folder, active=[0.0, 0.4]).latents["edit"]
    low = run(folder, depth=[0.0, 0.5]).latents["edit"]
    none = run(folder, scale=0.0).latents["edit"]
    found = [whole, early, low, none]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_it_composes_with_other_edits_of_the_same_sites(folder: Path) -> None:
    """Words that are made louder, and the picture beside them."""
    beside = {"pag": {"scale": 1.5}}
    both, alone = run(folder, beside=beside), run(folder)
    assert torch.isfinite(both.latents["edit"]).all()
    assert not torch.equal(both.latents["edit"], alone.latents["edit"])


def test_it_composes_with_blending_guidance_and_ranking(folder: Path) -> None:
    """Outside the mask the source stays to the end, CLIP's gradient and the picture move what is
    inside, and the better of two pictures is first."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 8:24, 8:24] = 1
    beside = {
        "source_trajectory": {},
        "latent_blend": {"steps": [[0, STEPS - 1]], "mask": "mask:user"},
        "clip_guidance": {"prompts": "a red bus", "scale": 10.0},
        "rank": {"prompts": "a red bus", "mask": "mask:user"},
    }
    given = {"prompt": {"source": "a", "edit": "b"}, "image": PICTURE, "mask": to_pil(mask)[0]}
    given["scheduler"] = "EulerDiscreteScheduler"  # its last step leaves no noise
    made = run(folder, beside=beside, given=dict(given), n=2)
    clean = made.board["latent:source"]
    outside = torch.nn.functional.interpolate(mask, clean.shape[-2:]) == 0
    for one in made.latents["edit"].split(1):
        assert torch.equal(one[outside.expand_as(one)], clean[outside.expand_as(clean)])
    assert made.board["rank:scores"].diff() >= 0
    unseen = run(folder, beside=beside, given=dict(given), n=2, scale=0.0)
    del beside["clip_guidance"]
    unguided = run(folder, beside=beside, given=dict(given), n=2)
    for other in (unseen, unguided):
        assert not torch.equal(other.latents["edit"], made.latents["edit"])


def test_a_pickle_holds_the_same(folder: Path, tmp_path: Path) -> None:
    tables: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state("plain").items():
        part, _, inner = key.partition(".")
        tables[part][inner] = tensor
    torch.save(tables, tmp_path / "ip-adapter.bin")
    options = {
        "weights": str(tmp_path / "ip-adapter.bin"),
        "encoder": str(folder / "image_encoder"),
    }
    assert torch.equal(run(folder, **options).latents["edit"], run(folder).latents["edit"])


def test_its_invariant(folder: Path) -> None:
    case = CASES["ip_adapter"]
    case.holds(run(folder), run(folder, scale=0.0))
    with pytest.raises(AssertionError):
        case.holds(run(folder, scale=0.0), run(folder, scale=0.0))


# what is refused ---------------------------------------------------------------------------------


def test_what_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no picture"):
        run(folder, image="")
    with pytest.raises(ModelError, match=r"ip_adapter\.weights: there is no file"):
        run(folder, weights=str(tmp_path / "none.safetensors"))
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is no such adapter"):
        run(folder, weights=str(tmp_path / "other.safetensors"))
    wrong = {k: t[:, :8] if "_ip." in k else t for k, t in state("plain").items()}
    save_file({k: t.contiguous() for k, t in wrong.items()}, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match="is no such adapter"):
        run(folder, weights=str(tmp_path / "wide.safetensors"))
    with pytest.raises(ModelError, match="CLIP's vision tower is not at"):
        run(folder, encoder=str(tmp_path))
    for plus in (False, True):
        faces = state("faceid")
        if plus:
            faces |= {"image_proj.perceiver_resampler.proj_in.weight": torch.zeros(32, 24)}
            faces |= {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, WIDTH)}
        save_file(faces, tmp_path / "faces.safetensors")
        with pytest.raises(ModelError, match=r"FaceID.* Give a plain, Plus or Full Face adapter"):
            run(folder, weights=str(tmp_path / "faces.safetensors"))
    narrow = {
        k: t[:, :8] if k == "image_proj.proj.weight" else t for k, t in state("plain").items()
    }
    save_file({k: t.contiguous() for k, t in narrow.items()}, tmp_path / "narrow.safetensors")
    with pytest.raises(ModelError, match=r"is 12 wide, the adapter reads 8\. .* `encoder`"):
        run(
            folder,
            weights=str(tmp_path / "narrow.safetensors"),
            encoder=str(folder / "image_encoder"),
        )
    Image.new("RGB", (8, 8)).save(tmp_path / "me.png")
    session = inlay.Session(flux(), {"ip_adapter": {"image": str(tmp_path / "me.png")}})
    with pytest.raises(ConfigError, match="cross"):
        session.run(conds=conds(), steps=1, size=SIDE)
