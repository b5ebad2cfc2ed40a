"""Edit pairs made by Prompt-to-Prompt (Brooks et al. 2023, section 3.1): `inlay pairs`.

Both pictures of a pair begin with the same noise; in the first p of the steps, p uniform in 0.1 to
0.9, the second takes the attention of the first. Kept are those of a caption that CLIP believes, at
most `keep` by direction: similar pictures, each like its caption, changed the way the captions are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay import Session, backbones
from inlay_config import config, registry
from inlay_config.errors import ConfigError
from inlay_config.images import to_pil
from inlay_train import pairs

PUBLISHED = {"image": 0.75, "caption": 0.2, "direction": 0.2}
"""Least similarities with CLIP ViT-L/14."""
TOYBOX = {"image": 0.3, "caption": 0.75, "direction": 0.6}
"""Those of toybox/clip, whose space is wider: nine in ten of the world's exact edits are above."""


@dataclass(frozen=True)
class Making:
    """samples: pictures for a caption pair, half of them with a p of their own. keep: how many at
    most. shares, scales: ranges of p and of the guidance. least: similarities. What is None is as
    published, or as suits the toybox's models."""

    samples: int = 8
    keep: int = 4
    shares: tuple[float, float] = (0.1, 0.9)
    scales: tuple[float, float] | None = None
    least: dict[str, float] | None = None


def bounds(text: str) -> dict[str, float]:
    """`0.75,0.2,0.2` as least similarities. Raises ConfigError for anything else."""
    try:
        image, caption, direction = (float(part) for part in text.split(","))
    except ValueError as error:
        fix = "Write three numbers, such as 0.75,0.2,0.2."
        raise ConfigError(f"{text!r} cannot be used", where="--least", fix=fix) from error
    return {"image": image, "caption": caption, "direction": direction}


def similarities(clip: Any, before: Tensor, after: Tensor, texts: tuple[str, str]) -> Tensor:
    """Pictures `b 3 h w` in 0..1 and their two captions -> `b 3`: of the pictures to one another,
    the lesser to its caption, and of the change to the captions' change."""
    side = (clip.side, clip.side)
    seen = [clip.images(F.interpolate(p, side, mode="bicubic")) for p in (before, after)]
    read = clip.texts(list(texts))
    captions = torch.minimum(seen[0] @ read[0], seen[1] @ read[1])
    change = F.normalize(seen[1] - seen[0], dim=-1) @ F.normalize(read[1] - read[0], dim=-1)
    return torch.stack([(seen[0] * seen[1]).sum(-1), captions, change], 1)


class Maker:
    """Makes and filters pairs with an experiment whose plugin is `prompt_to_prompt`."""

    def __init__(self, exp: config.Experiment, clip: Any, making: Making) -> None:
        if "prompt_to_prompt" not in exp.plugins:
            fix = "Add it; its cross_replace and self_replace are drawn anew."
            raise ConfigError("no prompt_to_prompt", where="plugins", fix=fix)
        self.exp, self.clip, self.making = exp, clip, making
        folder = registry.resolve_model(exp.model)
        self.pipe = backbones.load(folder, exp.dtype, exp.device, exp.offload, exp.revision)
        shipped = exp.model.startswith("toybox/")
        self.least = making.least or (TOYBOX if shipped else PUBLISHED)
        self.scales = making.scales or ((2.0, 4.0) if shipped else (7.5, 15.0))

    @torch.no_grad()
    def __call__(self, words: pairs.Triplet, seed: int) -> list[tuple[Any, Any, dict[str, Any]]]:
        """(before, after, facts) of the pairs that are kept, the best direction first."""
        rng = np.random.default_rng(seed)
        found = []
        for part in range(2):
            share = float(rng.uniform(*self.making.shares))
            scale = float(rng.uniform(*self.scales))
            made = self._draw(words, share, scale, seed * 2 + part, self.making.samples // 2)
            told = (words.before, words.after)
            before, after = (made[key].float().cpu() for key in ("source", "edit"))
            near = similarities(self.clip, before, after, told)
            least = torch.tensor([self.least[k] for k in ("image", "caption", "direction")])
            for i in (near >= least).all(1).nonzero().flatten().tolist():
                facts = dict(zip(("image", "caption", "direction"), near[i].tolist(), strict=True))
                facts = {key: round(value, 4) for key, value in facts.items()}
                facts |= {"share": round(share, 3), "guidance": round(scale, 3)}
                found.append((before[i : i + 1], after[i : i + 1], facts))
        found.sort(key=lambda pair: -pair[2]["direction"])
        return found[: self.making.keep]

    def _draw(
        self, words: pairs.Triplet, share: float, scale: float, seed: int, n: int
    ) -> dict[str, Tensor]:
        """Pictures `n 3 h w` in 0..1 by lane."""
        plugins = {name: dict(options or {}) for name, options in self.exp.plugins.items()}
        plugins["prompt_to_prompt"]["self_replace"] = share
        session = Session(self.pipe, plugins, self.exp.scheduler)
        prompts = {"source": words.before, "edit": words.after}
        asked: dict[str, Any] = {"steps": self.exp.steps, "size": self.exp.size}
        images: dict[str, Tensor] = session.run(
            prompts, guidance=scale, seed=seed, n=n, **asked
        ).images
        return images


def make(
    where: str,
    folder: Path,
    n: int,
    maker: Maker,
    seed: int = 0,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Make pairs of `n` triplets into `folder`; goes on where it stopped. How many were kept.

    Every triplet has a line in `made.jsonl`, so none is tried again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "made.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    counts = {"triplets": len(lines), "kept": sum(json.loads(line)["kept"] for line in lines)}
    for i, words in enumerate(pairs.triplets(where, n, seed)):
        if i < len(lines):
            continue
        kept = maker(words, seed + i)
        for k, (before, after, facts) in enumerate(kept):
            facts = {"edit_prompt": words.instruction} | facts
            facts |= {"original_prompt": words.before, "edited_prompt": words.after}
            pictures = (to_pil(before)[0], to_pil(after)[0])
            pairs.append(folder, f"{i:06d}-{k}", *pictures, facts)
        counts = {"triplets": i + 1, "kept": counts["kept"] + len(kept)}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"instruction": words.instruction, "kept": len(kept)}) + "\n")
        told(f"{words.instruction}: {len(kept)} kept; {counts['kept']} of {i + 1} triplets")
    return counts
