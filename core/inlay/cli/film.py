"""`inlay run --trace-images`: what every step made, as a strip to look at and a film to watch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from inlay.cli.sheet import FAINT, GAP, INK, PAPER, TEXT
from inlay_config.images import save, to_pil, whole

COLUMNS, SIDE, SECONDS = 12, 128, 6.0  # of the strip; of its panels; of the film


class Film:
    """Frames of lane `edit`, first picture: x before the step, its clean estimate, and where a mask
    is known the foreground and background of the estimate. Latent models decode each."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, dict[str, Image.Image]]] = []

    def update(self, event: Mapping[str, Any]) -> None:
        """Takes the events of a run; see `Session.run(callback=…)`."""
        if event["kind"] != "step" or event["pass"] != "edit" or "edit" not in event["seen"].lanes:
            return
        run, step = event["run"], event["seen"]

        def picture(latent: Any) -> Any:
            return run.backbone.decode(latent[:1], run.size)

        clean = picture(step.x0["edit"])
        panels = {"x": picture(step.frame.shown(step.x["edit"]))}
        panels["x0"] = clean
        for name, mask in run.board.of("mask")[:1]:
            mask = F.interpolate(mask[:1].to(clean), clean.shape[2:], mode="bilinear")
            panels |= {f"in {name}": clean * mask, f"outside {name}": clean * (1 - mask)}
        drawn = {name: to_pil(panel)[0] for name, panel in panels.items()}
        self.frames.append((f"step {step.index}", drawn))

    def save(self, folder: Path) -> None:
        """Write film.png (at most COLUMNS steps, evenly) and film.webp (every step)."""
        if not self.frames:
            return
        last = len(self.frames) - 1
        every = max(1, min(COLUMNS, last + 1) - 1)
        chosen = sorted({round(i * last / every) for i in range(every + 1)})
        save(strip([self.frames[i] for i in chosen]), folder / "film.png")
        pictures = [strip([frame]) for frame in self.frames]
        size = max(p.width for p in pictures), max(p.height for p in pictures)
        pictures = [_on_paper(p, size) for p in pictures]
        pace = max(40, int(1000 * SECONDS / len(pictures)))
        options = {"save_all": True, "append_images": pictures[1:], "duration": pace, "loop": 0}
        with whole(folder / "film.webp") as partial:
            pictures[0].save(partial, format="WEBP", quality=85, **options)


def strip(frames: list[tuple[str, dict[str, Image.Image]]]) -> Image.Image:
    """A column per step, a row per kind of picture."""
    kinds = list(dict.fromkeys(kind for _, panels in frames for kind in panels))
    width, height = next(iter(frames[0][1].values())).size
    scale = max(1, round(SIDE / min(width, height)))
    width, height, head = width * scale, height * scale, GAP + TEXT + GAP // 2
    font = ImageFont.load_default(TEXT)
    side = GAP + round(max(font.getlength(kind) for kind in kinds))
    size = side + len(frames) * (width + GAP) + GAP, head + len(kinds) * (height + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, kind in enumerate(kinds):
        draw.text((GAP // 2, head + row * (height + GAP)), kind, fill=FAINT, font=font)
    for column, (title, panels) in enumerate(frames):
        left = side + GAP + column * (width + GAP)
        draw.text((left, GAP // 2), title, fill=INK, font=font)
        for kind, panel in panels.items():
            top = head + kinds.index(kind) * (height + GAP)
            sheet.paste(panel.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return sheet


def _on_paper(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    page = Image.new("RGB", size, PAPER)
    page.paste(picture, (0, 0))
    return page
