"""IP-Adapter: a picture as a prompt, by attention of its own beside that to the words (Ye et al.
2023), for U-Nets; any published weights that diffusers' loader reads, but face identities.

    Z = softmax(Q Kᵀ / √d) V + scale · softmax(Q K'ᵀ / √d) V',   K', V' = W'(tokens of the picture)

Rows without a prompt see the picture's absence: the projection of zeros (of CLIP's answer to zeros,
where tokens are read from its last layer but one).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from inlay import (
    AttnEdits,
    ConfigError,
    Held,
    ModelError,
    Needs,
    Plugin,
    Result,
    Run,
    Window,
    hookimpl,
    open_image,
)
from inlay_plugins import image_prompts

SHOWN, ABSENT = "kv:picture", "kv:no_picture"


class IPAdapter(Plugin):
    """Publishes keys and values by site, of the picture and of its absence."""

    @dataclass
    class Config:
        """image: path of the picture. weights: file of the adapter, or OWNER/REPOSITORY/FILE of the
        hub. encoder: folder or hub name of CLIP's vision tower with its projection; "": the folder
        image_encoder beside the weights. scale: of what the picture adds; 0 adds nothing. active:
        when. depth: where, shares of the cross-attention sites from the input on.
        """

        image: str = ""
        weights: str = "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
        encoder: str = ""
        scale: float = 1.0
        active: Any = field(default_factory=lambda: [0.0, 1.0])
        depth: list[float] = field(default_factory=lambda: [0.0, 1.0])

    @hookimpl
    def inlay_declare(self, need: Needs) -> None:
        where = f"plugins.{need.owner}"
        if not self.cfg.image:
            fix = "Give a picture's path."
            raise ConfigError("there is no picture", where=f"{where}.image", fix=fix)
        self.picture = open_image(self.cfg.image, f"{where}.image")
        window = Window.parse(self.cfg.active, f"{where}.active")
        first, last = self.cfg.depth
        self.sites = need.select(kind=["cross"], depth=(first, last))
        guided = need.request.guided("edit")
        self.seen = {"edit/text": SHOWN, **({"edit/null": ABSENT} if guided else {})}
        for branch, key in self.seen.items():
            need.publish(key)
            need.edit("append", branch, self.sites, window, from_=key, how="side")

    @hookimpl
    def inlay_prepare(self, run: Run) -> None:
        denoiser, where = cast(Any, run.backbone).denoiser, f"plugins.{self.name}"
        if not hasattr(denoiser, "_convert_ip_adapter_attn_to_diffusers"):
            problem = f"{run.backbone.name} is no U-Net, and takes no IP-Adapter"
            raise ModelError(problem, where=where, fix="Use a Stable Diffusion 1, 2 or XL.")
        adapter = image_prompts.load(
            denoiser, self.cfg.weights, self.cfg.encoder, f"{where}.weights"
        )
        tokens = dict(zip((SHOWN, ABSENT), adapter.tokens(self.picture), strict=True))
        for key in self.seen.values():
            shown = tokens[key].to(run.device, run.dtype)
            run.board[key] = {name: self._held(run, adapter, name, shown) for name in self.sites}

    @staticmethod
    def _held(run: Run, adapter: image_prompts.Adapter, site: str, tokens: Tensor) -> Held:
        """Keys and values `1 h m d` of tokens `1 m c` at a site."""
        heads = cast(Any, run.backbone).modules[site].heads
        weights = adapter.weights[site]
        with torch.no_grad():
            k, v = (
                (tokens @ w.to(tokens).T).unflatten(-1, (heads, -1)).transpose(1, 2)
                for w in weights
            )
        return Held(k, v)

    @hookimpl
    def inlay_attention(self, edits: AttnEdits) -> None:
        for branch, key in self.seen.items():
            edits.on(branch).append(key, gain=self.cfg.scale, how="side")

    @hookimpl
    def inlay_final(self, run: Run, result: Result) -> None:
        for key in self.seen.values():
            run.board[key] = {}  # of no use to anybody
