"""Small plots with intervals, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from inlay_bench.intervals import Interval

WIDTH, HEIGHT = 260, 200  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 24, 36  # around its field
BLUE, GREY = (30, 90, 170), (200, 200, 200)
Points = Sequence[tuple[float, Interval]]


def panels(curves: Mapping[str, Points], across: str) -> Image.Image:
    """One panel per curve, side by side; across: what the horizontal axis says."""
    image = Image.new("RGB", (WIDTH * len(curves), HEIGHT), "white")
    for i, (title, points) in enumerate(curves.items()):
        image.paste(panel(title, points, across), (i * WIDTH, 0))
    return image


def panel(title: str, points: Points, across: str) -> Image.Image:
    """A curve through means, with a bar from low to high at each."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    low, high = min(v.low for _, v in points), max(v.high for _, v in points)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - first) / (last - first or 1) * (WIDTH - LEFT - RIGHT)
        up = (y - low) / (high - low or 1) * (HEIGHT - TOP - BOTTOM)
        return LEFT + right, HEIGHT - BOTTOM - up

    for y in (low, (low + high) / 2, high):
        pen.line([place(first, y), place(last, y)], fill=GREY)
        pen.text((4, place(first, y)[1] - 6), f"{y:.2f}" if high < 10 else f"{y:.1f}", fill="black")
    for x, value in points:
        pen.line([place(x, value.low), place(x, value.high)], fill=BLUE)
        pen.ellipse([c + d for d in (-3, 3) for c in place(x, value.mean)], fill=BLUE)
        pen.text((place(x, low)[0] - 8, HEIGHT - BOTTOM + 4), f"{x:g}", fill="black")
    pen.line([place(x, value.mean) for x, value in points], fill=BLUE, width=2)
    pen.text((LEFT, 6), title, fill="black")
    pen.text((LEFT, HEIGHT - 16), across, fill="black")
    return image
