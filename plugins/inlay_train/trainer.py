"""The loop of every recipe, on accelerate: one CPU, one GPU, or as many as its launcher starts."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from diffusers.training_utils import EMAModel
from torch import Tensor

from inlay_config.errors import InputError
from inlay_train import batches, checkpoints
from inlay_train.recipe import Recipe, Sample, Training, TrainingError

Told = Callable[[str], None]


def rate(step: int, cfg: Training, steps: int) -> float:
    """Share of the rate in a step: up in `warmup` steps, level, down in the last `decay` of all."""
    rising = min(1.0, (step + 1) / max(1, cfg.warmup))
    falling = (steps - step) / max(1.0, cfg.decay * steps)
    return rising * min(1.0, falling)


def train(
    recipe: Recipe,
    out: Path,
    max_steps: int | None = None,
    resume: bool = False,
    told: Told = lambda line: None,
) -> Path:
    """Train and write `out/model`, with the averaged weights.

    recipe: built, its `cfg.train` says how. max_steps: in place of `train.steps`. resume: go on
    from the checkpoint in `out`, if there is one. told: gets a line per report.

    Raises TrainingError for a loss that is not finite and for a disk that is full, InputError for a
    folder with another run's checkpoint.
    """
    cfg: Training = recipe.cfg.train
    steps = max_steps or cfg.steps
    if not resume and (out / checkpoints.NAME).exists():
        fix = "Go on from it with --resume, or choose another --out."
        raise InputError("there is a checkpoint already", where=str(out), fix=fix)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision="no" if cfg.precision == "fp32" else cfg.precision,
        gradient_accumulation_steps=cfg.accumulate,
        log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
        project_config=ProjectConfiguration(project_dir=str(out)),
    )
    run = _Run(accelerator, recipe, out, steps, told if accelerator.is_main_process else _silent)
    begun = run.resume() if resume else 0
    accelerator.init_trackers("tensorboard", config=_flat(asdict(recipe.cfg)))
    run.go(begun)
    if accelerator.is_main_process:
        with run.averaged():
            _publish(recipe, out / "model")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the processes' connection down
    return out / "model"


class _Run:
    """A recipe with its optimizer and average, in one process."""

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, out: Path, steps: int, told: Told
    ) -> None:
        self.accelerator, self.recipe, self.out, self.told = accelerator, recipe, out, told
        self.cfg: Training = recipe.cfg.train
        self.steps, self.broken, self.spent = steps, set[str](), 0.0
        self.weights = recipe.trained()
        parameters = list(self.weights.values())
        optimizer = torch.optim.AdamW(parameters, self.cfg.rate, weight_decay=self.cfg.weight_decay)
        self.model, self.optimizer = accelerator.prepare(recipe, optimizer)
        self.average = EMAModel(parameters, decay=self.cfg.ema, foreach=True)
        self.average.to(accelerator.device)

    def resume(self) -> int:
        step, facts = checkpoints.read(
            self.out, self.weights, self.average.shadow_params, self.optimizer
        )
        self.average.optimization_step = step
        self.broken, self.spent = set(facts.get("broken", ())), facts.get("seconds", 0.0)
        self.told(f"goes on from step {step}" if step else "no checkpoint: begins anew")
        return step

    def go(self, begun: int) -> None:
        """From step `begun` to the end."""
        cfg, accelerator = self.cfg, self.accelerator
        if begun >= self.steps:
            return
        place = accelerator.process_index, accelerator.num_processes
        data = self.recipe.data(self.out)
        source = iter(batches.loader(data, cfg, begun * cfg.accumulate, *place))
        self.model.train()
        clock, losses = time.monotonic() - self.spent, list[float]()
        for step in range(begun, self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = cfg.rate * rate(step, cfg, self.steps)
            for part in range(cfg.accumulate):
                losses.append(self._backward(next(source), step, part))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.step(self.weights.values())
            done, self.spent = step + 1, time.monotonic() - clock
            if done % cfg.report == 0 or done == self.steps:
                self._report(done, sum(losses) / len(losses))
                losses.clear()
            if done % cfg.checkpoint == 0 or done == self.steps:
                self._checkpoint(done)

    def _backward(self, batch: Sample, step: int, part: int) -> float:
        """The gradient of one batch -> its loss, over all processes."""
        accelerator, cfg = self.accelerator, self.cfg
        self.broken |= set(batch.pop("broken"))
        moved = {
            k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        number = step * cfg.accumulate + part
        torch.manual_seed((cfg.seed * 1_000_003 + number) * 4096 + accelerator.process_index)
        with accelerator.accumulate(self.model):
            loss = self.model(moved)
            mean = float(accelerator.reduce(loss.detach().float(), "mean"))
            if not torch.isfinite(torch.tensor(mean)):
                fix = f"{checkpoints.last(self.out)} Lower train.rate and go on with --resume."
                raise TrainingError(f"the loss is {mean} in step {step}", where="train", fix=fix)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(list(self.weights.values()), cfg.clip)
        return mean

    def _report(self, step: int, loss: float) -> None:
        self.accelerator.log({"loss": loss}, step=step)
        self.broken = set(gather_object(sorted(self.broken)))
        if not self.accelerator.is_main_process:
            return
        skipped = f", {len(self.broken)} broken pictures skipped" if self.broken else ""
        self.told(
            f"step {step} of {self.steps}, {self.spent / 60:.1f} min, loss {loss:.5f}{skipped}"
        )
        table = self.out / "loss.csv"
        fresh = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([["step", "seconds", "loss"]] if fresh else [])
            writer.writerow([step, round(self.spent, 1), round(loss, 6)])

    def _checkpoint(self, step: int) -> None:
        if self.accelerator.is_main_process:
            facts = {"seconds": self.spent, "broken": sorted(self.broken)}
            average = self.average.shadow_params
            checkpoints.write(self.out, step, self.weights, average, self.optimizer, facts)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def averaged(self) -> Any:
        """The average in place of the weights."""
        parameters = list(self.weights.values())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        yield
        self.average.restore(parameters)


def _publish(recipe: Recipe, folder: Path) -> None:
    """The folder is whole or not there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        recipe.save(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        fix = "The checkpoint is there: make room and say the same with --resume."
        raise TrainingError(f"the model could not be written: {error}", fix=fix) from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, as TensorBoard holds them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float) else str(value)
    return flat


def _silent(line: str) -> None:
    """For the processes that are not the first."""
