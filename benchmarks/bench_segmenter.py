"""SAM 2 stays in the process: what the first run pays, and those after it."""

import statistics
import time

import torch
from pairs import report

import inlay
from inlay import backbones
from inlay_config import config, registry
from inlay_plugins import segmentation

RUNS = 4


def bench_sam2_is_loaded_once(benchmark, monkeypatch):
    """Each run has a session of its own; a run is Add-it whose mask SAM 2 draws."""
    experiment = config.load("addit_sam2")
    pipe = backbones.load(registry.resolve_model("toybox/flux"), device="cpu")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = config.to_dict(experiment)["prompt"]
    loads = []
    real = segmentation.read

    def counted(folder):
        loads.append(folder)
        return real(folder)

    monkeypatch.setattr(segmentation, "read", counted)
    segmentation.load.cache_clear()
    spent = []

    def run():
        begun = time.process_time()
        session = inlay.Session(pipe, experiment.plugins)
        session.run(prompts, picture, guidance=1.0, true_cfg=3.0, size=64, steps=4)
        spent.append(time.process_time() - begun)

    benchmark.pedantic(run, rounds=RUNS)
    more = {"first run": spent[0], "later runs": statistics.median(spent[1:])}
    what = f"times SAM 2 is loaded in {RUNS} sessions of one process, toybox/sam2, seconds per run"
    report("sam2_loads", what, "1", len(loads), len(loads) == 1, **more)
