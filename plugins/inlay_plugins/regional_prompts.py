"""Words of the prompt each for a region of the picture: a bias on the logits by mask.

Image tokens outside a region have the logits of its words lowered, so that they hardly read them;
inside, and for every other word, attention is untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import AttnEdits, AttnSite, ConfigError, Needs, Plugin, Run, Window, hookimpl


class RegionalPrompts(Plugin):
    """Biases the lane `edit` under its prompt, at every site that holds the text."""

    @dataclass
    class Config:
        """regions: [{words: red bus, box: [0, 0.5, 0.5, 1]}, {words: kite, mask: mask:user}]: words
        of prompt.edit with a box (left, top, right, bottom, shares of the picture) or a mask on the
        board. strength: what is taken from the logits outside. active: when.
        """

        regions: list[Any] = field(default_factory=list)
        strength: float = 10.0
        active: Any = field(default_factory=lambda: [0.0, 0.6])

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if not cfg.regions:
            raise ConfigError("no regions", where=f"{where}.regions",
                              fix="[{words: red bus, box: [0, 0.5, 0.5, 1]}]")  # fmt: skip
        for i, region in enumerate(cfg.regions):
            path = f"{where}.regions[{i}]"
            keys = set(region) if isinstance(region, dict) else set()
            if keys not in ({"words", "box"}, {"words", "mask"}):
                raise ConfigError(f"{region!r} is no region", where=path,
                                  fix="Give words, and a box or a mask.")  # fmt: skip
            need.word(f"{need.owner}/{i}", "edit/text", str(region["words"]),
                          f"regions[{i}].words")  # fmt: skip
            if "mask" in region:
                need.consume(str(region["mask"]))
            elif not _is_box(region["box"]):
                raise ConfigError(f"{region['box']!r} is no box", where=f"{path}.box",
                                  fix="[left, top, right, bottom], 0 to 1.")  # fmt: skip
        if window := Window.parse(cfg.active, f"{where}.active"):
            sites = need.select(kind=["cross", "joint"])
            need.edit("bias", "edit/text", sites, window, queries="image", keys="text")

    @hookimpl
    def inlay_attention(self, run: Run, site: AttnSite, edits: AttnEdits) -> None:
        for i, region in enumerate(self.cfg.regions):
            tokens = run.words[f"{self.name}/{i}"]
            inside = _at_site(_mask(region, run), site, run).to(run.device, run.dtype)
            bias = (inside - 1) * self.cfg.strength  # 1 n
            edits.on("edit/text", "image").bias(tokens, bias[0, :, None].expand(-1, len(tokens)))


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4
    return numbers and 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


def _mask(region: dict[str, Any], run: Run) -> Tensor:
    """`1 1 h w`, 1 inside, in pixels for a box and as published for a mask."""
    if "mask" in region:
        published: Tensor = run.board[str(region["mask"])][:1]
        return published.float()
    height, width = run.size
    left, top, right, bottom = region["box"]
    mask = torch.zeros(1, 1, height, width)
    mask[..., round(top * height) : round(bottom * height),
         round(left * width) : round(right * width)] = 1  # fmt: skip
    return mask


def _at_site(mask: Tensor, site: AttnSite, run: Run) -> Tensor:
    """`1 n` on the site's tokens: 1 where at least half of a token lies inside."""
    height, width = (-(-side // site.scale) for side in run.backbone.grid(run.size))
    return (F.adaptive_avg_pool2d(mask, (height, width)) >= 0.5).float().flatten(1)
