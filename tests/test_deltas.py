"""Models that ship as what they learned beyond another, and the edits that they are trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay_toybox
from inlay_toybox import deltas, edits, world
from inlay_toybox.cli import main


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of a base and of a model that was tuned from it with rank 3, and a cache."""
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    low = torch.randn(40, 3) @ torch.randn(3, 60)
    old = {"a.weight": torch.randn(40, 60), "conv_in.weight": torch.randn(20, 4, 3, 3)}
    old |= {"norm.bias": torch.randn(40), "same": torch.randn(5, 5), "scalar": torch.tensor(2.0)}
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["a.weight"] += low
    new["conv_in.weight"] = torch.cat([old["conv_in.weight"], torch.randn(20, 5, 3, 3)], 1)
    new["norm.bias"] += 0.1 * torch.randn(40)
    new["scalar"] = torch.tensor(2.5)
    for name, tensors, further in (("base", old, {}), ("tuned", new, {"in": 9})):
        unet = tmp_path / name / "unet"
        unet.mkdir(parents=True)
        save_file(tensors, unet / "weights.safetensors")
        config = {"_name_or_path": str(unet), "channels": 4, **further}
        (unet / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "tokenizer").mkdir()
        (tmp_path / name / "tokenizer" / "t.json").write_text(f'{{"of": "{name}"}}')
        (tmp_path / name / "scheduler").mkdir()
        (tmp_path / name / "scheduler" / "s.json").write_text(f'{{"of": "{name}"}}')
    (tmp_path / "tuned" / "head").mkdir()
    head = {"net.a.weight": new["a.weight"], "fresh": torch.randn(40, 60)}  # of no low rank
    save_file(head, tmp_path / "tuned" / "head" / "weights.safetensors")
    return tmp_path / "base", tmp_path / "tuned", tmp_path / "delta"


def test_a_model_comes_back_from_its_delta(models):
    base, tuned, delta = models
    again = {"head/weights.safetensors": "unet/weights.safetensors"}
    size = deltas.write(tuned, base, delta, 3, again)
    assert size == sum(p.stat().st_size for p in delta.rglob("*") if p.is_file())
    assert deltas.base_of(delta) == "base"
    made = deltas.expand(delta, base)
    for part in ("unet", "head"):
        found = load_file(made / part / "weights.safetensors")
        wanted = load_file(tuned / part / "weights.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == torch.float32
            step = tensor.abs().max() / 60  # 8 bits, of two factors
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=float(step))
    unet, old = (load_file(f / "unet" / "weights.safetensors") for f in (made, base))
    assert torch.equal(unet["same"], old["same"])
    assert json.loads((made / "unet" / "config.json").read_text()) == {"channels": 4, "in": 9}
    assert "base" in (made / "tokenizer" / "t.json").read_text()
    assert "tuned" in (made / "scheduler" / "s.json").read_text()


def test_a_tower_of_another_model_costs_nothing(models):
    """What is frozen is taken from there, in float32, and is followed when it changes."""
    base, tuned, delta = models
    file = base.parent / "clip" / "model.safetensors"
    file.parent.mkdir()
    tower = {"vision_model.pre.weight": torch.randn(6, 6).bfloat16()}
    save_file(tower | {"text_model.pre.weight": torch.randn(6, 6).bfloat16()}, file)
    (tuned / "encoder").mkdir()
    held = {"model.pre.weight": tower["vision_model.pre.weight"].float(), "null": torch.randn(1, 6)}
    save_file(held, tuned / "encoder" / "model.safetensors")
    deltas.write(tuned, base, delta, 3, {"encoder/model.safetensors": "../clip/model.safetensors"})
    made = deltas.expand(delta, base)
    found = load_file(made / "encoder" / "model.safetensors")
    assert torch.equal(found["model.pre.weight"], held["model.pre.weight"])
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found["null"], held["null"], rtol=0, atol=0.05)
    save_file({name: 2 * tensor for name, tensor in tower.items()}, file)
    assert deltas.expand(delta, base) != made


def test_a_model_of_another_kind_ships_what_it_does_not_share(models):
    """With rank 0, to the byte; a tuned one's base may then be such a model, out of the cache."""
    base, tuned, delta = models
    (tuned / "vae").mkdir()
    (base / "vae").mkdir()
    for folder in (base, tuned):
        (folder / "vae" / "w.safetensors").write_bytes(b"the same")
    deltas.write(tuned, base, delta, 0)
    kept = {"unet", "head", "tokenizer", "scheduler"}
    assert {p.name for p in delta.iterdir()} == {deltas.NAME, *kept}
    made = deltas.expand(delta, base)
    for file in (p for p in tuned.rglob("*") if p.is_file()):
        ours = (made / file.relative_to(tuned)).read_bytes()
        assert ours == file.read_bytes() or json.loads(ours) == {"channels": 4, "in": 9}
    held = load_file(inlay_toybox.path("clip") / "model.safetensors")
    held = {n: t.float() for n, t in held.items() if t.numel() < 9}
    further, name = made.parent / "further", "head/weights.safetensors"
    (further / "head").mkdir(parents=True)
    save_file(held, further / name)
    deltas.write(further, made, delta.parent / "next", 3, {name: "../clip/model.safetensors"})
    assert not load_file(delta.parent / "next" / deltas.NAME)["integers"].numel()
    found = load_file(deltas.expand(delta.parent / "next", made) / name)
    assert held and all(torch.equal(found[n], t) for n, t in held.items())


def test_a_delta_is_small(models):
    base, tuned, delta = models
    deltas.write(tuned, base, delta, 3, {"head/weights.safetensors": "unet/weights.safetensors"})
    integers = load_file(delta / deltas.NAME)["integers"]
    low, whole = 3 * (40 + 60), 20 * 9 * 9 + 40 + 1 + 40 * 60
    assert len(integers) == 2 * low + whole and integers.dtype == torch.int8


def test_it_is_expanded_once_and_again_when_it_changes(models):
    base, tuned, delta = models
    deltas.write(tuned, base, delta, 3)
    made = deltas.expand(delta, base)
    stamp = (made / "unet" / "weights.safetensors").stat().st_mtime_ns
    assert deltas.expand(delta, base) == made
    assert (made / "unet" / "weights.safetensors").stat().st_mtime_ns == stamp
    deltas.write(tuned, base, delta, 2, called="another")
    assert deltas.expand(delta, base) != made and deltas.base_of(delta) == "another"
    assert not [p for p in made.parent.iterdir() if p.name.startswith(".")]


def test_what_goes_wrong_leaves_no_half_a_model(models, monkeypatch):
    base, tuned, delta = models
    deltas.write(tuned, base, delta, 3)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(deltas, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        deltas.expand(delta, base)
    assert list((delta.parent / "cache" / "toybox").iterdir()) == []


def test_a_tuned_model_is_shipped_with_its_curve(models, capsys):
    _, tuned, delta = models
    out = tuned.parent / "run"
    out.mkdir()
    tuned.rename(out / "model")
    (out / "loss.csv").write_text("step,seconds,loss\n2,1.0,0.5\n4,2.0,0.25\n")
    assert main(["ship", str(out), str(delta), "--base", "flux", "--rank", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(delta)
    assert deltas.base_of(delta) == "flux"
    assert (delta / "training.csv").read_text().splitlines()[-1] == "4,2.0,0.25"


# edits ----------------------------------------------------------------------------------------


def test_edits_change_what_they_say_and_nothing_else():
    for seed in range(60):
        edit = edits.draw(seed)
        assert edit == edits.draw(seed)
        before, after = edit.before, edit.after
        names = [sorted(t.name for t in scene.things) for scene in (before, after)]
        assert before.ground == after.ground and before.look == after.look
        assert (before.sunset != after.sunset) is (edit.kind == "light")
        more = {"add": 1, "remove": -1}.get(edit.kind, 0)
        assert len(names[1]) - len(names[0]) == more
        if edit.kind == "replace":
            (new,) = [t for t in after.things if t not in before.things]
            (old,) = [t for t in before.things if t not in after.things]
            assert old.name in edit.instruction and new.name in edit.instruction
            assert old.toy.habitat == new.toy.habitat and before.ground in new.toy.grounds
            left, top, right, _ = new.box
            assert left >= 0 and top >= 0 and right <= 1
        if edit.kind == "recolour":
            assert names[0] == names[1] and before.things != after.things
        assert (world.render(before).image != world.render(after).image).any()


def test_kinds_can_be_chosen_and_held_out_pairs_stay_out():
    for kind in edits.KINDS:
        drawn = [edits.draw(seed, [kind]) for seed in range(20)]
        assert {edit.kind for edit in drawn} == {kind}
        assert not any(e.before.held_out or e.after.held_out for e in drawn)
    shares = np.array([edits.draw(seed).kind == "add" for seed in range(400)])
    assert 0.25 < shares.mean() < 0.5


def test_an_addition_is_told_plainly():
    scene = next(s for i in range(50) if len((s := world.sample(i)).things) == 2)
    edit = edits.addition(scene, 1)
    assert edit.after == scene and edit.before == scene.without(1)
    assert edit.instruction.startswith("add a") and scene.things[1].name in edit.instruction


def test_instructions_fit_the_models_tokens():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(inlay_toybox.path("sd") / "tokenizer")
    lengths = [len(tokenizer(edits.draw(seed).instruction).input_ids) for seed in range(300)]
    assert max(lengths) <= tokenizer.model_max_length
