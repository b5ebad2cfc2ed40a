"""Where the subject appears in the edit, from its words' attention maps (Add-it, section 3.4).

The maps, mean over heads and recorded sites and sum over recorded steps, are blurred, stretched to
0..1 and thresholded; latent_blend and paste_back put the source back outside.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from inlay import AttnSite, ConfigError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins import masks
from inlay_plugins.schedules import step_index

# Double blocks 13, 14, 18 of 19 and single blocks 23, 33 of 38, as published, by relative depth.
DEPTHS = {"double": (13 / 18, 14 / 18, 1.0), "single": (23 / 37, 33 / 37)}
UNET_SIDE = 16  # cells per side of the cross-attention maps with the clearest shapes (SD at 512 px)
FUNCTION_WORDS = re.compile(
    "an?|the|this|that|its?|his|her|their|some|and|or|with|of|in|on|at|by|to|from|into|near|beside|"
    "behind|above|below|under|over|is|are|there",
    re.IGNORECASE,
)

LOCALISERS: dict[str, Callable[[Tensor, Callable[[], Tensor]], Tensor]] = {
    "attention": lambda seen, departure: seen,
    "difference": lambda seen, departure: seen * departure(),
}
"""Name -> the map to threshold, from attention `b 1 h w` and from how far the edit is from the
source there, both on the token grid."""


class SubjectMask(Plugin):
    """Publishes `map:subject` (0..1) and `mask:subject` (0 or 1), both `b 1 h w` on the token grid,
    and `points:subject`, clicks (x, y) in pixels per picture, for a segmenter.

    A map without contrast cannot be thresholded: the mask is then the whole picture, which leaves
    the edit as it is, and a warning says so.
    """

    @dataclass
    class Config:
        """subject: words of prompt.edit, one string or several; "": what it adds to prompt.source.
        step: the last one recorded, which publishes; count: how many. sites: names of attention
        modules; []: chosen by depth. dilate: token cells added around the mask.

        localiser: attention, as published; difference: attention times the distance between the
        edit's clean estimate and the source, which drops what the words attend to in the source.
        mode: fixed sums the picture's attention to all pieces of the words. reference, as
        published: the last piece only, the text's attention to the picture added up, and the
        picture's attention to it at the last step only (joint attention models).
        """

        subject: Any = ""
        localiser: str = "attention"
        step: Any = 0.5
        count: int = 3
        sites: list[str] = field(default_factory=list)
        dilate: int = 0
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if cfg.localiser not in LOCALISERS:
            raise ConfigError(f"no localiser {cfg.localiser!r}", where=f"{where}.localiser",
                              fix=f"Known: {', '.join(LOCALISERS)}.")  # fmt: skip
        if cfg.count < 1 or cfg.dilate < 0:
            raise ConfigError("count is 1 or more, dilate 0 or more", where=where)
        self.last = step_index(cfg.step, need.request.steps, f"{where}.step")
        recorded = range(max(self.last - cfg.count + 1, 0), self.last + 1)
        self.sites = _sites(need, cfg.sites, f"{where}.sites")
        names = frozenset(self.sites)
        given = [cfg.subject] if isinstance(cfg.subject, str) else list(cfg.subject)
        words = given if any(given) else [infer_subject(need.request.prompt, f"{where}.subject")]
        self.columns = [f"{need.owner}/columns/{word}" for word in words]
        self.rows = []
        for name, word in zip(self.columns, words, strict=True):
            steps = recorded if cfg.mode == "fixed" else [self.last]
            need.probe(name, "edit/text", word, names, steps)
        if cfg.mode == "reference":
            if any(site.kind != "joint" for site in self.sites.values()):
                raise ConfigError("mode: reference reads rows of text queries, a U-Net has none",
                                  where=f"{where}.mode", fix="Use mode: fixed.")  # fmt: skip
            self.rows = [f"{need.owner}/rows/{word}" for word in words]
            for name, word in zip(self.rows, words, strict=True):
                need.probe(name, "edit/text", word, names, recorded, read="rows")
        if cfg.localiser == "difference":
            need.consume("latent:source")
        need.publish("points:subject")
        need.publish("map:subject")
        need.publish("mask:subject")

    @hookimpl
    def inlay_begin(self, run: Run, pass_: str, x: dict[str, Tensor]) -> None:
        self.sums: dict[str, Tensor] = {}

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        if step.pass_ != "edit" or not step.last_eval:
            return
        fixed = self.cfg.mode == "fixed"
        for name in (*self.columns, *self.rows):
            for site, read in step.probes.get(name, {}).items():
                pieces = read if name in self.columns else read.transpose(1, 2)  # b n t
                seen = pieces.float().sum(2) if fixed else pieces[..., -1]
                self.sums[site] = self.sums[site] + seen if site in self.sums else seen
        if step.index == self.last:
            self._publish(run, step)

    def _publish(self, run: Run, step: Step) -> None:
        grid = run.backbone.grid(run.size)

        def departure() -> Tensor:
            moved = step.x0["edit"] - run.board["latent:source"]
            return run.backbone.to_grid(moved, run.size).norm(dim=1, keepdim=True)

        maps = [_picture(total, self.sites[site], grid) for site, total in self.sums.items()]
        mean = torch.stack(maps).mean(0)
        smooth = masks.blur(LOCALISERS[self.cfg.localiser](mean, departure))
        stretched, flat = masks.minmax(smooth), masks.is_flat(smooth)
        if flat.any():
            warnings.warn(
                f"{self.name}: the subject's attention map is constant or not finite; the mask is "
                "the whole picture, so nothing of the source is put back",
                stacklevel=2,
            )
            stretched = torch.where(flat.view(-1, 1, 1, 1), torch.ones_like(stretched), stretched)
        mask = torch.ones_like(stretched, dtype=torch.float32)
        if not flat.all():
            mask[~flat] = masks.otsu(stretched[~flat])
        run.board["points:subject"] = [
            masks.points(one, area, run.size) if area.any() else []
            for one, area in zip(smooth.split(1), mask.split(1), strict=True)
        ]
        run.board["map:subject"] = stretched
        run.board["mask:subject"] = masks.dilate(mask, self.cfg.dilate)


def infer_subject(prompt: Any, where: str) -> str:
    """The words that prompt.edit adds to prompt.source, function words left out.

    Raises ConfigError unless they are one phrase.
    """
    source, edit = ([w.strip(".,;:!?") for w in prompt[k].split()] for k in ("source", "edit"))
    known, added = Counter(w.lower() for w in source), []
    for i, word in enumerate(edit):
        known[word.lower()] -= 1
        if known[word.lower()] < 0 and not FUNCTION_WORDS.fullmatch(word):
            added.append((i, word))
    runs = groupby(enumerate(added), key=lambda item: item[1][0] - item[0])
    phrases = [" ".join(word for _, (_, word) in run) for _, run in runs]
    if len(phrases) != 1:
        found = " and ".join(map(repr, phrases)) or "no word"
        raise ConfigError(f"prompt.edit adds {found} to prompt.source", where=where,
                          fix="Say which words of prompt.edit are the subject.")  # fmt: skip
    return phrases[0]


def _sites(need: Needs, names: Iterable[str], where: str) -> dict[str, AttnSite]:
    """Recorded sites by name: as asked, else by depth (joint) or by map size (cross)."""
    known = {site.name: site for site in need.sites if site.kind != "self"}
    if missing := [name for name in names if name not in known]:
        raise ConfigError(f"no attention site {missing[0]!r} that sees text", where=where,
                          fix=f"This model has {', '.join(known)}.")  # fmt: skip
    if chosen := {name: known[name] for name in names}:
        return chosen
    for block, depths in DEPTHS.items():
        inside = [site for site in known.values() if site.block == block]
        picked = {round(depth * (len(inside) - 1)) for depth in depths} if inside else ()
        chosen |= {inside[i].name: inside[i] for i in sorted(picked)}
    if chosen:
        return chosen
    cross = [site for site in known.values() if site.block != "mid"]
    side = max(need.request.grid)
    scale = min({site.scale for site in cross}, key=lambda s: abs(math.log2(side / s / UNET_SIDE)))
    return {site.name: site for site in cross if site.scale == scale}


def _picture(total: Tensor, site: AttnSite, grid: tuple[int, int]) -> Tensor:
    """`b n` of a site as `b 1 h w` on the token grid."""
    height, width = (math.ceil(side / site.scale) for side in grid)
    return masks.resize(total.unflatten(1, (1, height, width)), grid)
