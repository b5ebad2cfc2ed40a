"""Where the subject appears in the edit: from attention, a segmenter, a detector, or the user.

The words' attention maps, mean over heads and recorded sites and sum over recorded steps, are
blurred, stretched to 0..1 and thresholded (Add-it, section 3.4), or tell a segmenter where to look
(A.4); latent_blend and paste_back put the source back outside.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from inlay import AttnSite, ConfigError, InputError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins import detection, masks, segmentation
from inlay_plugins.schedules import step_index
from inlay_plugins.segmentation import Hint
from inlay_plugins.word_sites import word_sites

# Double blocks 13, 14, 18 of 19 and single blocks 23, 33 of 38, as published, by relative depth.
DEPTHS = {"double": (13 / 18, 14 / 18, 1.0), "single": (23 / 37, 33 / 37)}
FUNCTION_WORDS = re.compile(
    "an?|the|this|that|its?|his|her|their|some|and|or|with|of|in|on|at|by|to|from|into|near|beside|"
    "behind|above|below|under|over|is|are|there",
    re.IGNORECASE,
)

ATTENTION = ("attention", "difference")  # the thresholded map itself
SEGMENTED = ("points", "box", "mask", "grounding_dino")  # SAM 2 on the picture in the making
LOCALISERS = (*ATTENTION, *SEGMENTED, "clipseg", "user")


class SubjectMask(Plugin):
    """Publishes `map:subject` (0..1) and `mask:subject` (0 or 1), both `b 1 h w`, on the token grid
    or, where networks or the user see the picture itself, at its size; and `points:subject`, clicks
    (x, y) in pixels per picture.

    What SAM 2, Grounding-DINO or CLIPSeg do not find, or find everywhere, is taken from the
    attention map. A map without contrast cannot be thresholded: the mask is then the whole picture,
    which leaves the edit as it is. A warning says so each time.
    """

    @dataclass
    class Config:
        """subject: words of prompt.edit, one string or several; "": what it adds to prompt.source.
        step: the last one recorded, which publishes; count: how many. sites: names of attention
        modules; []: chosen by depth. dilate: token cells added around the mask. key: other than
        subject, where several masks are to be found in one run.

        localiser: attention, as published: the map above Otsu's threshold; difference: likewise of
        map: difference; points, box, mask: SAM 2 is given up to three clicks at the map's peaks,
        the thresholded map's box, or its log odds and the first click; grounding_dino: SAM 2 is
        given the surest box for each subject that scores above `threshold`; clipseg: its heat above
        Otsu's threshold; user: the mask that comes with the picture, else `box`, [left, top, right,
        bottom] as shares of it.
        map: attention; difference: times the distance between the edit's clean estimate and the
        source, which drops what the words attend to in the source.

        segmenter, segmenter_config: see segmentation.load. detector: a folder or hub name; "": the
        published one.

        mode: fixed sums the picture's attention to all pieces of the words. reference, as
        published: the last piece only, the text's attention to the picture added up, and the
        picture's attention to it at the last step only (joint attention models); box unites three
        answers, mask is given as 0 and 1 and without a click, clicks get one answer.
        """

        subject: Any = ""
        localiser: str = "attention"
        map: Literal["attention", "difference"] = "attention"
        step: Any = 0.5
        count: int = 3
        sites: list[str] = field(default_factory=list)
        dilate: int = 0
        key: str = "subject"
        segmenter: str = "facebook/sam2-hiera-large"
        segmenter_config: str = ""
        detector: str = ""
        threshold: float = 0.4
        box: list[float] = field(default_factory=list)
        mode: Literal["fixed", "reference"] = "fixed"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, where = self.cfg, f"plugins.{need.owner}"
        if cfg.localiser not in LOCALISERS:
            raise ConfigError(f"no localiser {cfg.localiser!r}", where=f"{where}.localiser",
                              fix=f"Known: {', '.join(LOCALISERS)}.")  # fmt: skip
        if cfg.count < 1 or cfg.dilate < 0 or not 0 <= cfg.threshold < 1:
            problem = "count is 1 or more, dilate 0 or more, threshold in 0..1"
            raise ConfigError(problem, where=where)
        if cfg.localiser in SEGMENTED:
            segmentation.check(cfg.segmenter, cfg.segmenter_config, where)
        self.columns: list[str] = []
        self.rows: list[str] = []
        if cfg.localiser == "user":
            self._declare_user(need, where)
        else:
            self._declare_maps(need, where)
        for kind in ("points", "map", "mask"):
            need.publish(f"{kind}:{cfg.key}")

    def _declare_user(self, need: Needs, where: str) -> None:
        self.last = -1
        self.given = "mask:user" in need.request.inputs
        box = self.cfg.box
        if self.given:
            need.consume("mask:user")
        elif len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            fix = "Give input.mask, or left, top, right, bottom in 0..1, such as [0, 0.5, 1, 1]."
            raise ConfigError(
                f"no mask is given and {box} is no box", where=f"{where}.box", fix=fix
            )

    def _declare_maps(self, need: Needs, where: str) -> None:
        cfg = self.cfg
        self.last = step_index(cfg.step, need.request.steps, f"{where}.step")
        recorded = range(max(self.last - cfg.count + 1, 0), self.last + 1)
        self.sites = word_sites(need, cfg.sites, f"{where}.sites", DEPTHS)
        names = frozenset(self.sites)
        given = [cfg.subject] if isinstance(cfg.subject, str) else list(cfg.subject)
        words = given if any(given) else [infer_subject(need.request.prompt, f"{where}.subject")]
        self.words = words
        self.columns = [f"{need.owner}/columns/{word}" for word in words]
        for name, word in zip(self.columns, words, strict=True):
            steps = recorded if cfg.mode == "fixed" else [self.last]
            need.probe(name, "edit/text", word, names, steps, where="subject")
        if cfg.mode == "reference":
            if any(site.kind != "joint" for site in self.sites.values()):
                raise ConfigError("mode: reference reads rows of text queries, a U-Net has none",
                                  where=f"{where}.mode", fix="Use mode: fixed.")  # fmt: skip
            self.rows = [f"{need.owner}/rows/{word}" for word in words]
            for name, word in zip(self.rows, words, strict=True):
                need.probe(name, "edit/text", word, names, recorded, "rows", "subject")
        self.departs = "difference" in (cfg.localiser, cfg.map)
        if self.departs:
            need.consume("latent:source")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        """What is missing is told before the first step; networks stay for the next run."""
        kind = self.cfg.localiser
        if kind == "user":
            self._publish_user(run)
        elif kind not in ATTENTION:
            if not run.backbone.decodes:
                raise ConfigError(f"localiser: {kind} looks at pictures, and this model has no VAE",
                                  where=f"plugins.{self.name}",
                                  fix="Use localiser: attention.")  # fmt: skip
            device = str(run.device)
            if kind in SEGMENTED:
                self.segmenter = segmentation.load(
                    self.cfg.segmenter, self.cfg.segmenter_config, device
                )
            if kind == "grounding_dino":
                name = self.cfg.detector or detection.GROUNDING_DINO
                self.detector = detection.grounding_dino(name, device)
            if kind == "clipseg":
                self.clipseg = detection.clipseg(self.cfg.detector or detection.CLIPSEG, device)

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

        read = [_picture(total, self.sites[site], grid) for site, total in self.sums.items()]
        mean = torch.stack(read).mean(0)
        smooth = masks.blur(mean * departure() if self.departs else mean)
        heat, flat = masks.minmax(smooth), masks.is_flat(smooth)
        if flat.any():
            self._warn("the subject's attention map is constant or not finite; the mask is "
                       "the whole picture, so nothing of the source is put back")  # fmt: skip
            heat = torch.where(flat.view(-1, 1, 1, 1), torch.ones_like(heat), heat)
        mask = torch.ones_like(heat, dtype=torch.float32)
        if not flat.all():
            mask[~flat] = masks.otsu(heat[~flat])
        clicks = [
            masks.points(one, area, run.size) if area.any() and not still else []
            for one, area, still in zip(smooth.split(1), mask.split(1), flat, strict=True)
        ]
        if self.cfg.localiser not in ATTENTION:
            pictures = run.backbone.decode(step.x0["edit"].to(run.dtype), run.size).float()
            maps = heat.cpu().split(1), mask.cpu().split(1), clicks
            seen = [self._look(*each) for each in zip(pictures, *maps, strict=True)]
            heat, mask = (torch.cat(part).to(run.device) for part in zip(*seen, strict=True))
        self._write(run, clicks, heat, mask)

    def _look(
        self, picture: Tensor, heat: Tensor, mask: Tensor, clicks: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Map and mask `1 1 H W` by looking at a picture `3 H W`, or else from its attention map
        and mask `1 1 h w`."""
        size = picture.shape[-2:]
        wide, coarse = (masks.resize_bilinear(each, size) for each in (heat, mask))
        coarse = (coarse >= 0.5).float()
        if self.cfg.localiser == "clipseg":
            seen = torch.stack([self.clipseg.heat(picture, word) for word in self.words])
            hot = seen.amax(0)[None, None]
            if not masks.is_flat(hot):
                return masks.minmax(hot), masks.otsu(hot)
            self._warn("CLIPSeg's heat is constant; the attention map's mask is used")
            return wide, coarse
        hints = self._hints(picture, heat, mask, clicks)
        union = self.cfg.mode == "reference" and self.cfg.localiser == "box"
        found = segmentation.segment(self.segmenter, picture, hints, union)
        if found.any() and not found.all():
            return wide, found[None, None].float()
        if mask.mean() < 1:  # else it has been told already
            what = "the whole picture" if found.any() else "nothing"
            self._warn(
                f"localiser {self.cfg.localiser} finds {what}; the attention map's mask is used"
            )
        return wide, coarse

    def _hints(
        self, picture: Tensor, heat: Tensor, mask: Tensor, clicks: list[tuple[int, int]]
    ) -> list[Hint]:
        """What SAM 2 is told; nothing where there is nothing to tell."""
        kind, fixed, size = self.cfg.localiser, self.cfg.mode == "fixed", picture.shape[-2:]
        if kind == "grounding_dino":
            boxes = (self.detector.box(picture, word, self.cfg.threshold) for word in self.words)
            return [Hint(box=box) for box in boxes if box is not None]
        if not clicks or mask.mean() == 1:
            return []
        if kind == "points":
            return [Hint(clicks, several=fixed and len(clicks) == 1)]
        if kind == "box":
            return [Hint(box=masks.box(mask, size), several=not fixed)]
        rough = masks.log_odds(heat, mask) if fixed else mask
        return [Hint(clicks[:1] if fixed else (), logits=rough[0, 0])]

    def _publish_user(self, run: Run) -> None:
        """The caller's mask, 1 = the edit's, or the box."""
        if self.given:
            mask = (run.board["mask:user"] >= 0.5).float()
        else:
            mask = masks.rectangle(self.cfg.box, run.size).to(run.device)
        if not mask.any():
            raise InputError("the mask is empty, so nothing is to be edited", where="mask:user",
                             fix="Paint white what may change.")  # fmt: skip
        corners = mask[..., [0, 0, -1, -1], [0, -1, 0, -1]]
        if mask.all():
            self._warn("the mask is the whole picture, so nothing of the source is put back")
        elif corners.all() and mask.mean() > 0.5:
            self._warn("the mask holds all corners and most of the picture: is it inverted? "
                       "White is what may change")  # fmt: skip
        clicks = masks.points(masks.blur(mask), mask, run.size)
        self._write(run, [clicks] * run.plan.request.n, mask, mask)

    def _write(
        self, run: Run, clicks: list[list[tuple[int, int]]], heat: Tensor, mask: Tensor
    ) -> None:
        key, cell = self.cfg.key, round(mask.shape[-1] / run.backbone.grid(run.size)[1])
        run.board[f"points:{key}"], run.board[f"map:{key}"] = clicks, heat
        run.board[f"mask:{key}"] = masks.dilate(mask, self.cfg.dilate * cell)

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.name}: {what}", stacklevel=2)


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


def _picture(total: Tensor, site: AttnSite, grid: tuple[int, int]) -> Tensor:
    """`b n` of a site as `b 1 h w` on the token grid."""
    height, width = (math.ceil(side / site.scale) for side in grid)
    return masks.resize(total.unflatten(1, (1, height, width)), grid)
