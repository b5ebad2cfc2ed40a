"""Checkpoints of guided-diffusion become diffusers models: tests/goldens/bd_adm_forward."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from inlay.backbones.adm import Order, convert, load_adm
from inlay.cli.experiment import execute, plan_experiment
from inlay.cli.main import app
from inlay_config import config
from inlay_config.errors import InlayError, ModelError

GOLDENS = Path(__file__).parent / "goldens"


@cache
def golden() -> tuple[dict, dict, dict]:
    """The checkpoint, everything else that is stored, the tolerances."""
    stored = load_file(GOLDENS / "bd_adm_forward.safetensors")
    card = json.loads((GOLDENS / "bd_adm_forward.json").read_text())
    prefix = "weight."
    state = {k.removeprefix(prefix): v.float() for k, v in stored.items() if k.startswith(prefix)}
    rest = {k: v for k, v in stored.items() if not k.startswith(prefix)}
    return state, rest, card["tolerance_max_abs"]


def tiny(state: dict | None = None, order: Order = "legacy") -> UNet2DModel:
    return convert(state or golden()[0], head_channels=16, size=16, order=order)


def answer(model: UNet2DModel) -> torch.Tensor:
    _, stored, _ = golden()
    with torch.no_grad():
        return model(stored["x"], stored["t"]).sample


def test_the_converted_model_answers_as_the_published_one():
    _, stored, tolerance = golden()
    x = stored["x"].clone().requires_grad_()
    out = tiny()(x, stored["t"]).sample
    (out * stored["cotangent"]).sum().backward()
    assert (out - stored["out"]).abs().max() < tolerance["out"]
    assert (x.grad - stored["grad_x"]).abs().max() < tolerance["grad_x"]


def test_the_new_order_of_attention_channels_is_another_layout_of_the_same_model():
    state = dict(golden()[0])
    for key in [key for key in state if ".qkv." in key]:
        heads = state[key].reshape(-1, 3, 16, *state[key].shape[1:])
        state[key] = heads.transpose(0, 1).reshape_as(state[key])
    torch.testing.assert_close(answer(tiny(state, "new")), answer(tiny()))
    assert (answer(tiny(state)) - answer(tiny())).abs().max() > 1e-3


def residual(prefix: str, wide: int, out: int, embedding: int, shift: bool, plain: bool = True):
    yield f"{prefix}.in_layers.0", (wide,)
    yield f"{prefix}.in_layers.2", (out, wide, 3, 3)
    yield f"{prefix}.emb_layers.1", (2 * out if shift else out, embedding)
    yield f"{prefix}.out_layers.0", (out,)
    yield f"{prefix}.out_layers.3", (out, out, 3, 3)
    if plain and wide != out:
        yield f"{prefix}.skip_connection", (out, wide, 1, 1)


def attention(prefix: str, wide: int):
    yield f"{prefix}.norm", (wide,)
    yield f"{prefix}.qkv", (3 * wide, wide, 1)
    yield f"{prefix}.proj_out", (wide, wide, 1)


def published(
    base: int, factors: tuple, depth: int, attends: set, answers: int, updown: bool, shift: bool
):
    """Names and weight shapes of guided-diffusion's ``UNetModel``, written down independently.

    ``factors``: width of each level over ``base``; ``attends``: levels with attention.
    """
    time, widths = 4 * base, [base * factor for factor in factors]
    yield "time_embed.0", (time, base)
    yield "time_embed.2", (time, time)
    yield "input_blocks.0.0", (base, 3, 3, 3)
    kept, wide, block = [base], base, 1
    for level, out in enumerate(widths):
        for _ in range(depth):
            yield from residual(f"input_blocks.{block}.0", wide, out, time, shift)
            if level in attends:
                yield from attention(f"input_blocks.{block}.1", out)
            wide, block = out, block + 1
            kept.append(wide)
        if level < len(widths) - 1:
            if updown:
                yield from residual(f"input_blocks.{block}.0", wide, wide, time, shift)
            else:
                yield f"input_blocks.{block}.0.op", (wide, wide, 3, 3)
            block += 1
            kept.append(wide)
    yield from residual("middle_block.0", wide, wide, time, shift)
    yield from attention("middle_block.1", wide)
    yield from residual("middle_block.2", wide, wide, time, shift)
    block = 0
    for level, out in reversed(list(enumerate(widths))):
        for i in range(depth + 1):
            prefix = f"output_blocks.{block}"
            yield from residual(f"{prefix}.0", wide + kept.pop(), out, time, shift)
            wide, place, block = out, 1, block + 1
            if level in attends:
                yield from attention(f"{prefix}.1", out)
                place = 2
            if i == depth and level:
                if updown:
                    yield from residual(f"{prefix}.{place}", wide, wide, time, shift)
                else:
                    yield f"{prefix}.{place}.conv", (wide, wide, 3, 3)
    yield "out.0", (wide,)
    yield "out.2", (answers, wide, 3, 3)


def checkpoint(*layout, device: str = "meta") -> dict[str, torch.Tensor]:
    """Random tensors of these names and shapes."""
    source = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published(*layout):
        for key, size in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1])):
            empty = device == "meta"
            state[key] = (
                torch.empty(size, device=device)
                if empty
                else 0.1 * torch.randn(size, generator=source)
            )
    return state


def test_the_256_pixel_model_has_its_published_layout():
    state = checkpoint(256, (1, 1, 2, 2, 4, 4), 2, {3, 4, 5}, 6, True, True)
    assert sum(tensor.numel() for tensor in state.values()) == 552_814_086
    model = convert(state)
    assert model.num_parameters() == 552_814_086
    assert model.config.sample_size == 256
    assert model.config.block_out_channels == (256, 256, 512, 512, 1024, 1024)
    assert model.config.layers_per_block == 2
    assert model.down_blocks[3].attentions[0].heads == 512 // 64
    assert all(weight.is_meta for weight in model.parameters())


def test_other_published_layouts_convert_and_run():
    state = checkpoint(32, (1, 2), 2, {1}, 3, False, False, device="cpu")
    state["label_emb.weight"] = torch.zeros(10, 128)
    model = convert(state, head_channels=32)
    assert model.config.sample_size == 16
    assert model.config.down_block_types == ("DownBlock2D", "AttnDownBlock2D")
    with torch.no_grad():
        out = model(torch.randn(1, 3, 16, 16), 5, class_labels=torch.tensor([3])).sample
    assert out.shape == (1, 3, 16, 16)
    assert out.isfinite().all()


def test_a_converted_folder_loads_with_stock_classes_and_answers_the_same(tmp_path):
    torch.save(golden()[0], tmp_path / "model.pt")
    call = ["models", "convert", str(tmp_path / "model.pt"), "--out", str(tmp_path / "adm")]
    done = CliRunner().invoke(app, [*call, "--head-channels", "16", "--size", "16"])
    assert done.exit_code == 0, done.output
    pipe = DDPMPipeline.from_pretrained(tmp_path / "adm")
    assert torch.equal(answer(pipe.unet.eval()), answer(tiny()))
    assert pipe.scheduler.config.variance_type == "learned_range"
    assert not list(tmp_path.glob("*.partial"))
    again = CliRunner().invoke(app, [*call, "--head-channels", "16"])
    assert isinstance(again.exception, InlayError)
    assert "there already" in str(again.exception)


class Surprise:
    """A pickled object that would run code."""

    def __reduce__(self):
        return print, ("surprise",)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, capfd):
    absent, broken, objects = (tmp_path / f"{n}.pt" for n in ("absent", "broken", "objects"))
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk\n")
    other, table = tmp_path / "other.safetensors", tmp_path / "table.pt"
    broken.write_bytes(b"no checkpoint at all")
    torch.save({"state": Surprise()}, objects)
    torch.save({"state_dict": golden()[0]}, table)
    save_file({"conv_in.weight": torch.zeros(2)}, other)
    told = {
        absent: "no such file",
        broken: "is no checkpoint",
        junk: "cannot be read",
        objects: "Python objects",
        table: "plain table",
        other: "not an ADM U-Net",
    }
    for file, problem in told.items():
        with pytest.raises(ModelError, match=problem) as caught:
            load_adm(file)
        assert file.name in str(caught.value)
    assert "surprise" not in capfd.readouterr().out


def test_damaged_checkpoints_are_refused_with_what_is_wrong():
    whole = golden()[0]
    short = {k: v for k, v in whole.items() if k != "middle_block.0.out_layers.3.weight"}
    bent = whole | {"middle_block.0.out_layers.3.weight": torch.zeros(64, 64, 1, 1)}
    extra = whole | {"ema.decay": torch.zeros(())}
    for state, problem in ((short, "mid_block.resnets.0.conv2"), (bent, "size mismatch")):
        with pytest.raises(ModelError, match=problem):
            tiny(state)
    with pytest.raises(ModelError, match="unknown tensor ema"):
        tiny(extra)
    with pytest.raises(ModelError, match="heads of 48"):
        convert(whole, head_channels=48)
    with pytest.raises(ModelError, match="empty"):
        convert({})
    narrow = checkpoint(32, (1, 2), 1, {1}, 6, True, True)
    narrow["time_embed.0.weight"] = torch.empty(256, 64, device="meta")
    with pytest.raises(ModelError, match="one number for both"):
        convert(narrow)


def test_blended_diffusion_runs_on_a_checkpoint_by_its_name(tmp_path):
    """A model of the published kind, small, from the file that others share; and it is planned."""
    state = checkpoint(32, (1, 2), 1, {1}, 6, True, True, device="cpu")
    torch.save(state, file := tmp_path / "tiny_uncond.pt")
    over = [f"model={file}", "steps=4", "n=2", "prompt.edit=a red bus", "device=cpu"]
    over += [f"plugins.{name}.clips=[toybox/clip]" for name in ("clip_guidance", "rank")]
    exp = config.load("blended_diffusion_adm", over)
    planned = plan_experiment(exp)
    assert planned.backbone == "pixel" and planned.request.size == (16, 16)
    result = execute(exp)
    assert result.images["edit"].shape == (2, 3, 16, 16)
    mask = result.board["mask:region"] == 0
    moved = (result.latents["edit"] - result.board["latent:source"]).abs()
    assert (moved * ~mask).max() > 0.1 and (moved * mask).max() == 0
    with pytest.raises(ModelError, match=r"no model 'gone\.pt'"):
        execute(config.load("blended_diffusion_adm", ["model=gone.pt"]))
