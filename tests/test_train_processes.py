"""`inlay train` in two processes: the launcher that accelerate itself starts for several GPUs, here
on CPUs, where processes talk by gloo; and a recipe that another package brings."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from inlay_train import trainer
from inlay_train.recipe import Training

RECIPE = '''
import json, os
from dataclasses import dataclass, field
import torch
from safetensors.torch import save_file
from torch import nn
from inlay_train.recipe import Recipe, Training


class Rows:
    def __len__(self):
        return 40

    def draw(self, index, rng):
        return {"x": torch.tensor([index / 40, 1.0, index % 3]), "index": index}


class Probe(Recipe):
    """Fits a line, and writes down the weights and rows of every backward pass."""

    @dataclass
    class Config:
        told: str = ""
        train: Training = field(default_factory=Training)

    def __init__(self, cfg):
        super().__init__(cfg)
        torch.manual_seed(3)
        self.net = nn.Linear(3, 1)

    def data(self, out):
        return Rows()

    def forward(self, batch):
        weights = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        with open(f"{self.cfg.told}-{os.environ.get('RANK', 'alone')}.jsonl", "a") as file:
            line = {"weights": weights.tolist(), "rows": batch["index"].tolist()}
            file.write(json.dumps(line) + chr(10))
        return (self.net(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()

    def save(self, folder):
        save_file({"w": self.net.weight.detach()}, folder / "line.safetensors")
'''
SETTINGS = {"steps": 4, "accumulate": 2, "rate": 0.05, "checkpoint": 2, "report": 1, "ema": 0.5}


def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch):
    """They end with equal weights, each has seen its half of the rows, one of them has written, and
    what they wrote goes on in one process."""
    package = tmp_path / "site" / "probe-1.0.dist-info"
    package.mkdir(parents=True)
    (tmp_path / "site" / "probe.py").write_text(RECIPE)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[inlay.recipes]\nprobe = probe:Probe\n")
    (tmp_path / "probe.yaml").write_text("recipe: probe\n")
    words = [f"train.{key}={value}" for key, value in SETTINGS.items()]
    words = [str(tmp_path / "probe.yaml"), *words, "train.batch=2", f"told={tmp_path / 'two'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    paths = [str(tmp_path / "site"), *sys.path]
    done = subprocess.run(
        [*launcher, "-m", "inlay_train", *words, "--out", str(tmp_path / "out")],
        env={**os.environ, **cpu, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if line.startswith("step 4 of 4")]
    ranks = [_lines(tmp_path / f"two-{rank}.jsonl") for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 8  # steps x accumulate
    for one, other in zip(*ranks, strict=True):
        assert one["weights"] == other["weights"] and not set(one["rows"]) & set(other["rows"])

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    from probe import Probe

    alone = Probe(Probe.Config(str(tmp_path / "one"), Training(batch=4, **SETTINGS)))
    trainer.train(alone, tmp_path / "alone")
    whole = _lines(tmp_path / "one-alone.jsonl")
    for one, other, both in zip(*ranks, whole, strict=True):
        assert one["rows"] + other["rows"] == both["rows"]
        torch.testing.assert_close(torch.tensor(one["weights"]), torch.tensor(both["weights"]))
    made = [
        load_file(tmp_path / name / "model" / "line.safetensors")["w"] for name in ("out", "alone")
    ]
    torch.testing.assert_close(*made)

    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    with safe_open(tmp_path / "out" / "checkpoint.safetensors", "pt") as stored:
        assert stored.metadata()["step"] == "4"
    more = Training(batch=4, **{**SETTINGS, "steps": 6})
    for name in ("out", "alone"):
        later = Probe(Probe.Config(str(tmp_path / f"later-{name}"), more))
        trainer.train(later, tmp_path / name, resume=True)
    ends = [_lines(tmp_path / f"later-{name}-alone.jsonl") for name in ("out", "alone")]
    assert len(ends[0]) == len(ends[1]) == 4
    for one, other in zip(*ends, strict=True):
        assert one["rows"] == other["rows"]
        torch.testing.assert_close(torch.tensor(one["weights"]), torch.tensor(other["weights"]))


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
