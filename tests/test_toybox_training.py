"""The loop that every recipe runs: its state, its optimisers, its log."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from inlay_toybox import training


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.LayerNorm(4))


def loss_of(net: nn.Module):
    x, y = torch.randn(8, 2, 3, 3), torch.randn(8, 4)
    return lambda step: (net(x) - y).square().mean()


def test_a_run_goes_on_from_the_one_file_it_left(tmp_path):
    net = model()
    taken = training.fit({"net": net}, loss_of(net), tmp_path, 0.003, report_every=2)
    assert taken >= 2
    assert not list(tmp_path.glob("*.partial"))
    stored = load_file(tmp_path / "state.safetensors")
    again = model()
    average = training.Average({"net": again})
    step, seconds = training.load_state(tmp_path, average)
    assert step == taken
    assert 0 < seconds < 30
    torch.testing.assert_close(again[0].weight, stored["weights.net.0.weight"])
    average.swap()
    torch.testing.assert_close(again[0].weight, net[0].weight)


def test_progress_kept_in_a_file_of_its_own_is_still_read(tmp_path):
    average = training.Average({"net": model()})
    training.save_state(tmp_path, average, 7, 1.0)
    save_file(load_file(tmp_path / "state.safetensors"), tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps({"step": 3, "elapsed": 2.5, "average": 3}))
    assert training.load_state(tmp_path, average) == (3, 2.5)
    assert average.step == 3


def test_a_damaged_or_foreign_state_is_named(tmp_path):
    average = training.Average({"net": model()})
    training.save_state(tmp_path, average, 7, 1.0)
    other = training.Average({"net": nn.Sequential(nn.Conv2d(2, 5, 3))})
    with pytest.raises(ValueError, match=r"net\.0\.weight.*choose another --out"):
        training.load_state(tmp_path, other)
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        training.load_state(tmp_path, average)


def test_kernels_are_trained_as_matrices_and_the_rest_by_adamw():
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimisers = training.Optimisers(net.named_parameters(), convolutions=True)
    loss_of(net)(0).backward()
    optimisers.step(1.0)
    change = (net[0].weight - before["0.weight"]).detach().flatten(1)
    # Muon's update is orthogonal up to its iteration's error: singular values within 0.7..1.2.
    values = torch.linalg.svdvals(change / 0.02)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_the_shipped_curve_is_short_and_keeps_the_end(tmp_path):
    rows = "".join(f"{100 * i},{2.0 * i},{1 / i}\n" for i in range(1, 1001))
    (tmp_path / "loss.csv").write_text("step,seconds,loss\n" + rows)
    training.export_log(tmp_path, tmp_path)
    with (tmp_path / "training.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 300
    assert (table[-1]["step"], table[-1]["seconds"]) == ("100000", "2000.0")
    losses = [float(row["loss"]) for row in table]
    assert losses == sorted(losses, reverse=True)
