"""Local blending (Prompt-to-Prompt, section 3.2): away from chosen words the source stays.

After every step: z_edit <- z_source + m·(z_edit - z_source), where m is 1 around what the edit's
picture or the source's has paid to the words so far. Nothing is localised beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay import ConfigError, Needs, Plugin, Run, Step, hookimpl
from inlay_plugins.word_sites import word_sites

DEPTHS = {"double": tuple(block / 18 for block in (11, 12, 14, 17, 18))}  # as for FLUX


class LocalBlend(Plugin):
    """Publishes `mask:local_blend` `b 1 h w` on the token grid, 1 = the edit's."""

    @dataclass
    class Config:
        """words: of prompt.edit, one string or several; source_words: of prompt.source, [] the
        same. subtract, source_subtract: words whose place is left to the source. threshold,
        subtract_threshold: share of the largest value that counts. active: when, shares of the run;
        published: [0, 1], with null-text inversion [0.2, 1], for FLUX and SD3 [0, 0.5]. sites:
        names of attention modules; []: the published ones by map size or depth.

        maps: made, as published, are those that prompt_to_prompt made, which must be above; own are
        those of the edit before that.
        """

        words: Any = ""
        source_words: Any = ""
        subtract: Any = ""
        source_subtract: Any = ""
        threshold: float = 0.3
        subtract_threshold: float = 0.3
        active: tuple[float, float] = (0.0, 1.0)
        sites: list[str] | None = None
        maps: Literal["own", "made"] = "own"

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        cfg, total, where = self.cfg, need.request.steps, f"plugins.{need.owner}"
        if not _list(cfg.words):
            raise ConfigError("no words to blend by", where=f"{where}.words", fix="Such as cat.")
        first, last = cfg.active
        if not 0 <= first < last <= 1:
            raise ConfigError(f"{cfg.active} is no window of shares", where=f"{where}.active",
                              fix="Give [first, last] of 0.0 to 1.0.")  # fmt: skip
        self.steps = range(int(first * total + 1e-9), int(last * total + 1e-9))
        self.words = {
            ("edit/text", "words"): _list(cfg.words),
            ("edit/text", "subtract"): _list(cfg.subtract),
            ("source/text", "words"): _list(cfg.source_words) or _list(cfg.words),
            ("source/text", "subtract"): _list(cfg.source_subtract) or _list(cfg.subtract),
        }
        self.sites = word_sites(need, cfg.sites or (), f"{where}.sites", DEPTHS)
        need.lane("source", prompt="source", n=need.request.n, active=range(self.steps.stop))
        for (branch, part), listed in self.words.items():
            own = branch == "source/text" and _list(getattr(cfg, f"source_{part}"))
            for word in listed:
                option = f"source_{part}" if own else part
                need.word(f"{need.owner}/{branch}/{part}/{word}", branch, word, option)
        for branch in ("edit/text", "source/text"):
            name, seen = f"{need.owner}/{branch}", range(self.steps.stop)
            need.probe(name, branch, (0,), frozenset(self.sites), seen)  # found in prepare
        if cfg.maps == "made":
            need.consume("columns:edit")
        need.publish("mask:local_blend")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        self.tokens: dict[tuple[str, str], list[int]] = {}
        for (branch, part), listed in self.words.items():
            found = [run.words[f"{self.name}/{branch}/{part}/{word}"] for word in listed]
            self.tokens[branch, part] = sorted({token for tokens in found for token in tokens})
        for branch in ("edit/text", "source/text"):
            seen = {*self.tokens[branch, "words"], *self.tokens[branch, "subtract"]}
            if branch == "source/text" and self.cfg.maps == "made":
                edited = self.tokens["edit/text", "words"] + self.tokens["edit/text", "subtract"]
                seen |= set(run.board["columns:edit"](0).sources(edited))
            run.words[f"{self.name}/{branch}"] = tuple(sorted(seen))

    @hookimpl
    def inlay_begin(self) -> None:
        self.sums: dict[tuple[str, str], Tensor] = {}

    @hookimpl
    def inlay_post_step(self, run: Run, step: Step) -> None:
        if step.pass_ != "edit" or step.index >= self.steps.stop or not step.last_eval:
            return
        for key in (key for key in self.tokens if key[0].split("/")[0] in step.lanes):
            self.sums[key] = self.sums.get(key, torch.zeros(())) + self._seen(run, step, *key)
        if step.index in self.steps and "edit" in step.lanes:
            mask = self._mask(run, "words", self.cfg.threshold)
            if self.tokens["edit/text", "subtract"]:
                mask = mask * (1 - self._mask(run, "subtract", self.cfg.subtract_threshold))
            run.board["mask:local_blend"] = mask
            source, edit = step.x_next["source"], step.x_next["edit"]
            inside = run.backbone.from_grid(mask).to(run.device, run.dtype)
            step.x_next["edit"] = torch.where(inside > 0, edit, source)

    def _seen(self, run: Run, step: Step, branch: str, part: str) -> Tensor:
        """What each place paid to these words in this step, mean over the sites: `b 1 h w`."""
        name, tokens = f"{self.name}/{branch}", self.tokens[branch, part]
        made = branch == "edit/text" and self.cfg.maps == "made"
        maps = []
        for site in self.sites.values():
            own = _columns(run, step, name, site.name, tokens)
            if made:
                edited = run.board["columns:edit"](step.index)
                sources = edited.sources(tokens)
                theirs = _columns(run, step, f"{self.name}/source/text", site.name, sources)
                own = edited(own, tokens, theirs, sources)
            sides = (math.ceil(side / site.scale) for side in run.backbone.grid(run.size))
            maps.append(own.sum(2).unflatten(1, (1, *sides)))
        return torch.stack(maps).mean(0)

    def _mask(self, run: Run, part: str, threshold: float) -> Tensor:
        """1 where the edit or the source counts, on the token grid."""
        grid, masks = run.backbone.grid(run.size), []
        for branch in ("edit/text", "source/text"):
            seen = self.sums[branch, part]
            if part == "words":
                seen = self._widen(seen)
            wide = F.interpolate(seen, grid)
            masks.append(wide / wide.amax((1, 2, 3), keepdim=True) > threshold)
        return (masks[0] | masks[1]).float()

    def _widen(self, seen: Tensor) -> Tensor:
        """The largest of 3 x 3 neighbours; of joint attention a Gaussian of 7 x 7, sigma 1."""
        if any(site.kind == "cross" for site in self.sites.values()):
            return F.max_pool2d(seen, 3, 1, 1)
        taps = torch.arange(-3.0, 4.0, device=seen.device).square().div(-2).exp()
        taps = taps / taps.sum()
        rows = F.conv2d(seen, taps.view(1, 1, 7, 1), padding=(3, 0))
        return F.conv2d(rows, taps.view(1, 1, 1, 7), padding=(0, 3))


def _list(words: Any) -> list[str]:
    return [words] if isinstance(words, str) and words else list(words)


def _columns(run: Run, step: Step, name: str, site: str, tokens: Iterable[int]) -> Tensor:
    """`b n t` in float32 of these tokens, which are among the probe's."""
    at = [run.words[name].index(token) for token in tokens]
    return step.probes[name][site][..., at].float()
