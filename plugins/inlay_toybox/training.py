"""What the recipes share: one training loop with its clock, schedule, optimisers, average of the
weights and log, and batches of rendered scenes.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from inlay_toybox import world

ENDS = ("conv_in.", "conv_out.", "proj_out")
"""Names of layers at the ends of a network, whose matrices are not hidden."""

UNSEEN = 10_000_000
"""First seed of the scenes that no recipe trains on."""


@dataclass
class Clock:
    """Wall-clock budget of a run. ``done`` goes from 0 to 1, over several resumed runs if need
    be.
    """

    minutes: float
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds trained, earlier runs counted in."""
        return self.spent + time.monotonic() - self.started

    @property
    def done(self) -> float:
        return min(1.0, self.elapsed / (60 * self.minutes))


def pick_device(name: str) -> torch.device:
    """ "auto" is the accelerator when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def learning_rate(done: float, step: int, warmup: int = 50, decay: float = 0.5) -> float:
    """Warm-up, plateau, linear decay to 2 % over the last ``decay`` of the time: a factor in
    0..1.
    """
    tail = 1.0 if done < 1 - decay else 0.02 + 0.98 * (1 - done) / decay
    return min(1.0, (step + 1) / warmup) * tail


class Optimisers:
    """Muon on the hidden weight matrices, AdamW on everything else (embeddings, modulation, norms,
    biases).

    Muon scales its rate by sqrt(max(1, rows / columns)) by itself, so one rate serves every shape.
    With ``convolutions``, hidden kernels count as matrices ``[out, in * height * width]`` too
    (Jordan et al. 2024).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        muon: float = 0.02,
        adamw: float = 1e-3,
        convolutions: bool = False,
    ) -> None:
        outer = ("embed", "shared", "norm", "relative_attention_bias", *ENDS)
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        self.flat: list[tuple[nn.Parameter, nn.Parameter]] = []
        for name, parameter in named:
            inner = not any(part in name for part in outer)
            if convolutions and inner and parameter.ndim == 4:
                # A view of the same memory: what Muon writes there, the convolution reads. Kernels
                # in channels_last have no such view, and it raises.
                flat = nn.Parameter(parameter.detach().view(len(parameter), -1))
                self.flat.append((parameter, flat))
                matrices.append(self.flat[-1][1])
            else:
                (matrices if inner and parameter.ndim == 2 else rest).append(parameter)
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=adamw, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=muon, weight_decay=0.0))
        self.base = [[g["lr"] for g in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """One update with every rate multiplied by ``factor``; clears the gradients."""
        for kernel, matrix in self.flat:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        for part, rates in zip(self.parts, self.base, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


class Average:
    """Exponential moving average of the weights, in float32; short at first, ``decay`` in the long
    run.
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float = 0.998) -> None:
        self.modules, self.decay, self.step = modules, decay, 0
        self.shadow = {k: v.detach().clone() for k, v in self._tensors()}

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix, module in self.modules.items():
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        shadows, values = zip(*((self.shadow[k], v) for k, v in self._tensors()), strict=True)
        torch._foreach_lerp_(list(shadows), list(values), 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; twice is nothing."""
        for key, parameter in self._tensors():
            held = parameter.detach().clone()
            parameter.copy_(self.shadow[key])
            self.shadow[key].copy_(held)


def save_state(folder: Path, average: Average, step: int, elapsed: float) -> None:
    """Write weights, their average and the progress as one file, so that ``load_state`` goes on
    from here (momentum is not kept).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights.{k}": v.detach().contiguous() for k, v in average._tensors()}
    tensors |= {f"average.{k}": v.contiguous() for k, v in average.shadow.items()}
    progress = {"step": step, "elapsed": elapsed, "average": average.step}
    partial = folder / "state.partial"
    save_file(tensors, partial, metadata={k: json.dumps(v) for k, v in progress.items()})
    partial.replace(folder / "state.safetensors")


@torch.no_grad()
def load_state(folder: Path, average: Average) -> tuple[int, float]:
    """Read what ``save_state`` wrote; step and seconds trained, or (0, 0.0) when there is nothing.

    Raises:
        ValueError: the state is damaged or belongs to another model.
    """
    file = folder / "state.safetensors"
    if not file.exists():
        return 0, 0.0
    try:
        with safe_open(file, "pt") as state:
            progress = {
                k: json.loads(v) for k, v in (state.metadata() or {}).items() if k != "format"
            }
            tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it to begin anew") from None
    if "step" not in progress:  # written when the progress had a file of its own
        progress = json.loads((folder / "state.json").read_text())
    for key, parameter in average._tensors():
        for part, target in (("weights", parameter), ("average", average.shadow[key])):
            stored = tensors.get(f"{part}.{key}")
            if stored is None or stored.shape != target.shape:
                found = "nothing" if stored is None else f"shape {list(stored.shape)}"
                raise ValueError(
                    f"{file} is of another model: {key} should have shape {list(target.shape)}, "
                    f"there is {found}; choose another --out"
                )
            target.copy_(stored)
    average.step = progress["average"]
    return progress["step"], progress["elapsed"]


def fit(
    modules: dict[str, nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    out: Path,
    minutes: float,
    resume: bool = False,
    seed: int = 0,
    muon: float = 0.02,
    adamw: float = 1e-3,
    convolutions: bool = False,
    clip: float = 1.0,
    keep: float = 0.998,
    report_every: int = 100,
    preview: Callable[[], None] | None = None,
) -> int:
    """The loop of every recipe: train until ``minutes`` are spent, then leave the averaged weights
    in place.

    Args:
        modules: what is trained, by the name its weights have in the state.
        loss_of: the loss (a scalar) of the step with this number, autocast included.
        out: folder of state and loss curve.
        minutes: wall-clock budget of the whole schedule, resumed parts counted in.
        resume: go on from the state in ``out`` when there is one.
        seed: of torch's global generator, with the step at which this run begins added.
        muon, adamw: rates of the hidden matrices and of everything else.
        convolutions: train hidden kernels with Muon too.
        clip: largest norm of the gradient.
        keep: decay of the average.
        report_every: steps between two lines of the log and two writes of the state.
        preview: draws samples; called with the averaged weights in place, every fifth report and
            at the end.

    Returns:
        The number of steps taken so far, earlier runs counted in.
    """
    average = Average(modules, keep)
    step, spent = load_state(out, average) if resume else (0, 0.0)
    torch.manual_seed(seed + step)
    named = [
        (f"{prefix}.{name}", parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    optimisers = Optimisers(named, muon, adamw, convolutions)
    log, clock, begun = Log(out, fresh=step == 0), Clock(minutes, spent), step
    while clock.done < 1:
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in named], clip)
        optimisers.step(learning_rate(clock.done, step - begun))
        average.update()
        log.add(float(loss.detach()))
        step += 1
        if step % report_every == 0:
            log.report(step, clock.elapsed)
            save_state(out, average, step, clock.elapsed)
        if preview and step % (5 * report_every) == 0:
            average.swap()
            preview()
            average.swap()
    save_state(out, average, step, clock.elapsed)
    average.swap()
    if preview:
        preview()
    return step


class Log:
    """Loss curve: a csv file with one row per report, drawn as a png beside it."""

    def __init__(self, folder: Path, fresh: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "loss.csv"
        if fresh or not self.file.exists():
            self.file.write_text("step,seconds,loss\n")
        self.sum, self.n = 0.0, 0

    def add(self, loss: float) -> None:
        self.sum, self.n = self.sum + loss, self.n + 1

    def report(self, step: int, seconds: float) -> None:
        """Write and print the mean loss since the last report."""
        mean = self.sum / max(1, self.n)
        self.sum, self.n = 0.0, 0
        with self.file.open("a", newline="") as out:
            csv.writer(out).writerow([step, round(seconds, 1), round(mean, 6)])
        print(f"step {step:6d}  {seconds / 60:6.1f} min  loss {mean:.5f}", flush=True)
        draw_curve(self.file, self.file.with_suffix(".png"))


def draw_curve(table: Path, file: Path) -> None:
    """Draw a loss curve, a csv file of step, seconds and loss, as a png; the loss on a logarithmic
    scale, its highest fiftieth cut off.
    """
    with table.open() as rows:
        points = [(float(r["seconds"]) / 60, float(r["loss"])) for r in csv.DictReader(rows)]
    if len(points) < 2:
        return
    x, y = np.array(points).T
    y = np.log(np.maximum(y, 1e-9))
    low, high = y.min(), np.quantile(y, 0.98)
    image = Image.new("RGB", (640, 320), "white")
    pen = ImageDraw.Draw(image)
    across = 50 + 570 * (x - x.min()) / max(np.ptp(x), 1e-9)
    down = 290 - 260 * np.clip((y - low) / max(high - low, 1e-9), 0, 1)
    pen.line(list(zip(across, down, strict=True)), fill=(30, 90, 170), width=2)
    for value in (low, (low + high) / 2, high):
        row = 290 - 260 * (value - low) / max(high - low, 1e-9)
        pen.text((4, row - 5), f"{math.exp(value):.4f}", fill="black")
    pen.text((50, 300), f"{x.min():.0f} min", fill="black")
    pen.text((570, 300), f"{x.max():.0f} min", fill="black")
    image.save(file)


def export_log(out: Path, folder: Path, rows: int = 300) -> None:
    """Ship the loss curve of a run beside its weights: ``out/loss.csv`` as ``folder/training.csv``
    (step, seconds, loss), neighbours averaged until there are no more than ``rows``. Configs in
    ``folder`` lose the path that their weights were read from.
    """
    with (out / "loss.csv").open() as lines:
        table = np.array([[float(v) for v in row.values()] for row in csv.DictReader(lines)])
    parts = np.array_split(table, min(rows, len(table))) if len(table) else []
    partial = folder / "training.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "seconds", "loss"])
        for part in parts:
            step, seconds, loss = part[-1, 0], part[-1, 1], part[:, 2].mean()
            writer.writerow([int(step), round(seconds, 1), round(loss, 6)])
    partial.replace(folder / "training.csv")
    for config in folder.rglob("*.json"):  # where a run went on from is a path of one machine
        known = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(known, dict) and known.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Batch:
    """Rendered scenes. images: float32 ``[b, 3, s, s]`` in 0..1; objects: float32 ``[b, 1, s,
    s]``, 1 inside an object; scenes: the records behind them; renderings: everything drawn."""

    images: torch.Tensor
    objects: torch.Tensor
    scenes: list[world.Scene]
    renderings: list[world.Rendering]


def batch(seeds: Iterable[int], size: int, held_out: bool = False) -> Batch:
    """Render the scenes of some seeds. Only the training sampler's pairs unless ``held_out``."""
    scenes = [world.sample(seed, held_out) for seed in seeds]
    drawn = [world.render(scene, size) for scene in scenes]
    images = torch.from_numpy(np.stack([d.image for d in drawn])).permute(0, 3, 1, 2)
    inside = torch.from_numpy(np.stack([d.footprints.any(0) for d in drawn]))
    return Batch(images.float() / 255, inside[:, None].float(), scenes, drawn)


def save_grid(images: torch.Tensor, file: Path, columns: int = 8, zoom: int = 2) -> None:
    """Images ``[b, 3, h, w]`` in 0..1 as one png."""
    b, _, h, w = images.shape
    rows = -(-b // columns)
    canvas = Image.new("RGB", (columns * w, rows * h), "white")
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, tile in enumerate(pixels):
        canvas.paste(Image.fromarray(tile), (i % columns * w, i // columns * h))
    canvas.resize((canvas.width * zoom, canvas.height * zoom), Image.Resampling.NEAREST).save(file)
