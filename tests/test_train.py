"""`inlay train`: the loop, its batches and its checkpoints, on a recipe of one layer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from inlay_config.errors import ConfigError, InputError
from inlay_train import batches, checkpoints, recipes, trainer
from inlay_train.recipe import Recipe, Training, TrainingError

SHORT = {"steps": 6, "batch": 2, "rate": 0.1, "checkpoint": 2, "report": 2, "ema": 0.9}


class Points:
    """Ten rows; `broken` ones cannot be read."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return 10

    def draw(self, index, rng):
        if index in self.broken:
            raise InputError("it is torn", where=f"picture {index}")
        return {"x": torch.full((3,), float(index)), "jitter": float(rng.normal()), "name": "row"}


class Line(Recipe):
    """Learns to predict noise from a row."""

    @dataclass
    class Config:
        poison: int = -1
        broken: list[int] = field(default_factory=list)
        train: Training = field(default_factory=Training)

    def __init__(self, cfg):
        super().__init__(cfg)
        torch.manual_seed(5)
        self.net, self.frozen = nn.Linear(3, 1), nn.Linear(3, 1)
        self.frozen.requires_grad_(False)
        self.seen, self.passes = [], 0

    def data(self, out):
        return Points(self.cfg.broken)

    def forward(self, batch):
        self.seen.append(batch["x"][:, 0].tolist())
        assert batch["name"] == ["row"] * len(batch["x"])
        self.passes += 1
        loss = (self.net(batch["x"] / 10) - torch.randn(len(batch["x"]), 1)).square().mean()
        return loss * float("nan") if self.passes == self.cfg.poison else loss

    def save(self, folder):
        save_file({"w": self.net.weight.detach()}, folder / "line.safetensors")


def line(poison=-1, broken=(), **settings) -> Line:
    return Line(Line.Config(poison, list(broken), Training(**{**SHORT, **settings})))


def result(folder):
    return load_file(folder / "model" / "line.safetensors")["w"]


def step_of(folder) -> int:
    recipe = line()
    optimizer = torch.optim.AdamW(recipe.net.parameters())
    average = EMAModel(recipe.net.parameters()).shadow_params
    return checkpoints.read(folder, recipe.trained(), average, optimizer)[0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Weights, average, optimizer, data and noise: equal to the bit, and nothing else trained."""
    whole, first, second = line(), line(), line()
    before = whole.frozen.weight.clone()
    trainer.train(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(first, tmp_path / "parts", told=_interrupt)
    assert step_of(tmp_path / "parts") == 2
    trainer.train(second, tmp_path / "parts", resume=True)
    assert second.seen == whole.seen[2:]
    assert torch.equal(result(tmp_path / "whole"), result(tmp_path / "parts"))
    assert torch.equal(second.net.weight, whole.net.weight)
    assert torch.equal(whole.frozen.weight, before)
    rows = (tmp_path / "parts" / "loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4", "6"]
    assert list((tmp_path / "whole").rglob("events.out.tfevents.*"))


def _interrupt(told):
    if told.startswith("step 4"):
        raise KeyboardInterrupt


def test_the_model_has_the_averaged_weights(tmp_path):
    recipe = line(ema=0.5)
    trainer.train(recipe, tmp_path)
    stored = load_file(tmp_path / checkpoints.NAME)
    assert torch.equal(result(tmp_path), stored["average.net.weight"])
    assert torch.equal(recipe.net.weight.detach(), stored["weights.net.weight"])
    assert not torch.equal(result(tmp_path), stored["weights.net.weight"])


def test_backward_passes_add_up_to_one_update(tmp_path):
    """Two of two rows take as many steps as one of four, over the same rows."""
    halves, whole = line(accumulate=2, steps=2), line(batch=4, steps=2)
    trainer.train(halves, tmp_path / "halves")
    trainer.train(whole, tmp_path / "whole")
    assert list(chain(*halves.seen)) == list(chain(*whole.seen))
    assert len(halves.seen) == 4 and step_of(tmp_path / "halves") == 2


def test_rows_depend_on_seed_and_step_alone():
    cfg = Training(batch=2, seed=3)
    alone = [row[0] for row in islice(batches.rows(10, Training(batch=4, seed=3), 0, 0, 1), 40)]
    assert sorted(alone[:10]) == sorted(alone[10:20]) == list(range(10))
    assert alone[:10] != alone[10:20]
    parts = [list(islice(batches.rows(10, cfg, 0, process, 2), 20)) for process in (0, 1)]
    joined = [row[0] for k in range(0, 20, 2) for part in parts for row in part[k : k + 2]]
    assert joined == alone
    later = list(islice(batches.rows(10, cfg, 4, 1, 2), 4))
    assert later == parts[1][8:12]


def test_workers_draw_what_one_process_draws():
    drawn = []
    for workers in (0, 2):
        source = iter(batches.loader(Points(), Training(batch=3, workers=workers), 5))
        drawn.append([next(source)["jitter"] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_broken_pictures_are_skipped_and_counted(tmp_path):
    lines = []
    recipe = line(broken=[1, 2, 7])
    trainer.train(recipe, tmp_path, told=lines.append)
    seen = {value for batch in recipe.seen for value in batch}
    assert seen <= set(range(10)) - {1, 2, 7}
    assert "3 broken pictures skipped" in lines[-1]
    with pytest.raises(InputError, match=r"picture \d: 50 rows in a row cannot be read.*torn"):
        trainer.train(line(broken=range(10)), tmp_path / "none")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan in step 4\. .* is of step 4\. Lower"):
        trainer.train(line(poison=5), tmp_path)
    assert step_of(tmp_path) == 4
    assert not (tmp_path / "model").exists()
    with pytest.raises(TrainingError, match=r"in step 0\. There is no checkpoint yet"):
        trainer.train(line(poison=1), tmp_path / "new")


def test_a_kill_during_a_checkpoint_leaves_the_last_one(tmp_path, monkeypatch):
    trainer.train(line(), tmp_path, max_steps=2)
    recipe = line()
    optimizer = torch.optim.AdamW(recipe.net.parameters())
    average = EMAModel(recipe.net.parameters()).shadow_params
    asked = (recipe.trained(), average, optimizer, {})
    if not (child := os.fork()):
        monkeypatch.setattr(checkpoints.os, "fsync", lambda descriptor: os._exit(9))
        checkpoints.write(tmp_path, 4, *asked)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.glob(".checkpoint*"))) == 1  # what the kill left
    assert step_of(tmp_path) == 2
    trainer.train(line(), tmp_path, resume=True)
    assert step_of(tmp_path) == 6
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_full_disk_leaves_the_last_one_and_says_so(tmp_path, monkeypatch):
    saved = []

    def save(tensors, path, notes):
        saved.append(notes["step"])
        if notes["step"] == "4":
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, notes)

    monkeypatch.setattr(checkpoints, "save_file", save)
    with pytest.raises(TrainingError, match=r"step 4: .*No space.* checkpoint is of step 2\. Make"):
        trainer.train(line(), tmp_path)
    assert step_of(tmp_path) == 2
    assert not list(tmp_path.glob(".checkpoint*"))
    trainer.train(line(steps=3), tmp_path, resume=True)
    assert saved == ["2", "4", "3"]


def test_a_model_is_whole_or_not_there(tmp_path, monkeypatch):
    trainer.train(line(), tmp_path, max_steps=2)
    kept = result(tmp_path)

    def full(self, folder):
        (folder / "line.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Line, "save", full)
    with pytest.raises(TrainingError, match=r"model could not be written: .*No space"):
        trainer.train(line(), tmp_path, resume=True)
    assert torch.equal(result(tmp_path), kept)


def test_checkpoints_of_others_are_refused(tmp_path):
    trainer.train(line(), tmp_path, max_steps=2)
    with pytest.raises(InputError, match=r"there is a checkpoint already.*--resume"):
        trainer.train(line(), tmp_path)
    other = line()
    other.net = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"of another model: net\.bias is .*Choose another --out"):
        trainer.train(other, tmp_path, resume=True)
    file = tmp_path / checkpoints.NAME
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        trainer.train(line(), tmp_path, resume=True)


def test_the_rate_rises_stays_and_falls():
    cfg = Training(warmup=10, decay=0.25)
    rates = [trainer.rate(step, cfg, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:76] == [1.0] * 67
    assert rates[-1] == pytest.approx(0.04) and np.all(np.diff(rates[75:]) < 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.rate=-1"], r"train\.rate: -1.* above 0"),
        (["train.precision=int8"], r"train\.precision"),
        (["train.stepz=3"], r"train\.stepz: unknown key\. Did you mean 'steps'"),
        (["sise=3"], "unknown key"),
        (["size"], "'size' is not an override"),
    ],
)
def test_settings_that_cannot_be_used_are_named(words, told):
    with pytest.raises(ConfigError, match=told):
        recipes.load("instruct_pix2pix", words)


def test_recipes_are_files_by_name(tmp_path, invoke):
    assert {"instruct_pix2pix", "magicbrush", "erasedraw"} <= set(recipes.listing())
    for name in recipes.listing():
        cls, cfg = recipes.load(name, ["train.seed=7"])
        assert issubclass(cls, Recipe) and cfg.train.seed == 7
    mine = tmp_path / "mine.yaml"
    mine.write_text("recipe: instruct_pixtopix")
    with pytest.raises(ConfigError, match=r"no recipe 'instruct_pixtopix'.*instruct_pix2pix"):
        recipes.load(str(mine))
    assert "instruct_pix2pix" in invoke("train")[1]
    code, _, told = invoke("train", "instruct")
    assert code == 2 and "no recipe file 'instruct'" in told


def test_settings_are_flat_in_the_log():
    assert trainer._flat({"train": {"rate": 0.1}, "model": None}) == {
        "train.rate": 0.1,
        "model": "None",
    }
    assert json.dumps(trainer._flat({"a": [1]})) == '{"a": "[1]"}'
