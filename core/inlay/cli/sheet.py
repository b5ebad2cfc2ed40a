"""The contact sheet: source, edit, mask and attention overlay side by side, a row per picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from PIL import Image, ImageDraw, ImageFont, ImageOps

from inlay.events import Result
from inlay_config.config import Experiment
from inlay_config.images import open_image, to_pil

SIDE, GAP, TEXT = 256, 12, 13
INK, PAPER, FAINT = "#222222", "#ffffff", "#888888"


def contact_sheet(result: Result, experiment: Experiment) -> Image.Image:
    """Panels of at least `SIDE` pixels, titled by lane, mask or map, prompts below the title."""
    columns = list(_columns(result, experiment))
    rows = list(zip_longest(*(pictures for _, _, pictures in columns)))
    width, height = _panel_size(columns[0][2][0])
    head = GAP + 2 * (TEXT + 4) + GAP // 2
    sheet = Image.new(
        "RGB", (GAP + len(columns) * (width + GAP), head + len(rows) * (height + GAP)), PAPER
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for column, (title, note, _) in enumerate(columns):
        left = GAP + column * (width + GAP)
        draw.text((left, GAP), _fit(title, width, font), fill=INK, font=font)
        draw.text((left, GAP + TEXT + 4), _fit(note, width, font), fill=FAINT, font=font)
        for row, pictures in enumerate(rows):
            if pictures[column] is not None:
                panel = _enlarge(pictures[column], (width, height))
                sheet.paste(panel, (left, head + row * (height + GAP)))
    return sheet


def scene_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]], int]],
) -> Image.Image:
    """A row per object of a scene: its name, pictures with their titles, the taken one framed."""
    width, height = _panel_size(rows[0][1][0][1])
    columns, head = max(len(shown) for _, shown, _ in rows), TEXT + GAP
    across, down = GAP + columns * (width + GAP), GAP + len(rows) * (head + height + GAP)
    sheet = Image.new("RGB", (across, down), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for row, (name, shown, taken) in enumerate(rows):
        top = GAP + row * (head + height + GAP)
        for column, (title, picture) in enumerate(shown):
            left = GAP + column * (width + GAP)
            note = _fit(f"{name}: {title}" if column == 0 else title, width, font)
            draw.text((left, top), note, fill=INK if column == taken else FAINT, font=font)
            panel = _enlarge(picture, _inside(picture.size, (width, height)))
            corner = (width - panel.width) // 2, (height - panel.height) // 2
            sheet.paste(panel, (left + corner[0], top + head + corner[1]))
            if column == taken:
                corners = (left - 3, top + head - 3, left + width + 2, top + head + height + 2)
                draw.rectangle(corners, outline=INK, width=3)
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Several sheets below each other."""
    size = max(s.width for s in sheets), sum(s.height for s in sheets)
    whole, top = Image.new("RGB", size, PAPER), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _columns(
    result: Result, experiment: Experiment
) -> Iterator[tuple[str, str, list[Image.Image]]]:
    if experiment.input.image:
        yield "input", "", [open_image(experiment.input.image)]
    lanes = sorted(result.images, key=lambda lane: lane != "source")
    for lane in lanes:
        yield lane, getattr(experiment.prompt, lane, ""), to_pil(result.images[lane])
    for name, mask in result.board.of("mask"):
        yield f"mask {name}", experiment.subject, to_pil(mask)
    edits = to_pil(result.images[lanes[-1]])
    for name, heat in result.board.of("map"):
        pairs = zip(to_pil(heat / heat.amax().clamp(min=1e-12)), edits, strict=False)
        yield f"attention {name}", "over the edit", [overlay(h, e) for h, e in pairs]


def overlay(heat: Image.Image, picture: Image.Image) -> Image.Image:
    """A dark-to-bright colouring of the map (L) over the greyed picture."""
    glow = ImageOps.colorize(heat, black="#000004", mid="#bb3754", white="#fcffa4")
    grey = ImageOps.grayscale(picture).convert("RGB")
    return Image.blend(grey, glow.resize(picture.size, Image.Resampling.BICUBIC), 0.6)


def _panel_size(picture: Image.Image) -> tuple[int, int]:
    scale = max(1, round(SIDE / min(picture.size)))
    return picture.width * scale, picture.height * scale


def _inside(size: tuple[int, int], panel: tuple[int, int]) -> tuple[int, int]:
    """The largest size of that shape in a panel, both (width, height)."""
    scale = min(new / old for new, old in zip(panel, size, strict=True))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _enlarge(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Small pictures keep their pixels; others are scaled smoothly."""
    whole = all(new % old == 0 for new, old in zip(size, picture.size, strict=True))
    filter_ = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, filter_)


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
